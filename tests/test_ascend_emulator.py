"""Every check of the AscendC emulator: a kernel with the fault is stopped, and one without runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ascend_ops import emulator
from ascend_ops.emulator import Tensor

#: kernels of faults.cpp, and what the emulator says of each
FAULTS = {
    "fault_misaligned_copy": r"\[alignment\] .*DataCopy: dst starts at byte 12",
    "fault_copy_length": r"\[alignment\] .*20 bytes are no multiple of 32",
    "fault_capacity": r"\[capacity\] .* of the 188160 bytes of UB",
    "fault_buffer_count": r"\[capacity\] .*more than 64 buffers",
    "fault_buffer_overrun": r"\[bounds\] .*Duplicate: dst takes bytes \[0, 132\) of .* 128",
    "fault_leak": r"\[leak\] .*allocated and not freed",
    "fault_no_enque": r"\[queue\] .*DeQue: the queue is empty",
    "fault_use_after_free": r"\[queue\] .*Adds: src has been freed",
    "fault_use_while_queued": r"\[queue\] .*Adds: src is in its queue",
    "fault_too_many_tensors": r"\[queue\] .*none of the queue's 2 buffers is free",
    "fault_missing_flag": r"\[race\] .*reads byte 0 of UB, which core 0 PIPE_MTE2 wrote",
    "fault_wrong_flag": r"\[race\] .*reads byte 0 of UB, which core 0 PIPE_MTE2 wrote",
    "fault_wait_without_set": r"\[deadlock\] .*nothing set flag 1 of PIPE_MTE2 to PIPE_V",
    "fault_set_twice": r"\[flag\] .*is set already",
    "fault_flag_left_set": r"\[leak\] .*flag 3 of PIPE_V to PIPE_MTE2 .* never waited for",
    "fault_event_leak": r"\[leak\] .*event id of PIPE_V to PIPE_S .* never released",
    "fault_queue_event": r"\[flag\] .*a queue holds event id 0",
    "fault_missing_barrier": r"\[race\] .*writes byte 0 of UB, which core 0 PIPE_MTE2 wrote",
    "fault_scalar_read": r"\[race\] .*reads .* which core 0 PIPE_V wrote",
    "fault_scalar_write": r"\[race\] .*reads byte 0 of UB, which core 0 PIPE_S wrote",
    "fault_overwritten": r"\[race\] .*writes byte 0 of UB, which core 0 PIPE_MTE3 read",
    "fault_uninitialized": r"\[uninitialized\] .*reads byte 1024 of UB",
    "fault_padding": r"\[uninitialized\] .*reads byte 20 of UB",
    "fault_workspace_unwritten": r"\[uninitialized\] .*of workspace",
    "fault_global_overrun": r"\[bounds\] .*reads bytes \[3104, 4128\) of 'x', which has 4096",
    "fault_output_unwritten": r"\[unwritten\] .*never wrote byte 0 of output 'y'",
    "fault_repeat_range": r"\[repeat\] .*260 does not fit",
    "fault_mask_range": r"\[repeat\] .*mask is 65, not in \[1, 64\]",
    "fault_stride": r"\[bounds\] .*Adds: dst takes bytes \[1024, 1280\)",
    "fault_partial_overlap": r"\[overlap\] .*Adds: dst and src overlap",
    "fault_shared_memory": r"\[overlap\] .*Brcb: dst and src share memory",
    "fault_square_root": r"\[domain\] .*Sqrt: 0 is not positive",
    "fault_unsupported": r"\[unsupported\] .*Cast: RoundMode 6",
    "fault_cross_core_race": r"\[race\] vector core 1: reads .* which core 0 PIPE_MTE3 wrote",
    "fault_overlapping_outputs": r"\[race\] vector core 1: writes byte 992 of y, which core 0",
    "fault_sync_deadlock": r"\[deadlock\] .*core 0 waits for SyncAll; core 2",
    "fault_stale_cache": r"\[cache\] .*'y' was written in this launch",
    "fault_role": r"\[role\] .*a vector core has no PIPE_M",
}


def run(ascend: ModuleType, name: str, fault: bool) -> torch.Tensor:
    x, y = torch.arange(1024.0), torch.full((1024,), torch.nan)
    tensors = [Tensor("x", "in", x), Tensor("y", "out", y)]
    emulator.launch(name, tensors, ascend.fault_tiling(fault), workspace=4096, blocks=4)
    return y


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(ascend: ModuleType, name: str) -> None:
    y = run(ascend, name, fault=False)
    assert not y.isnan().any()
    with pytest.raises(ascend.Fault, match=FAULTS[name]):
        run(ascend, name, fault=True)


def test_every_faulty_kernel_is_tested(ascend: ModuleType) -> None:
    names = {name for name in ascend.kernels() if name.startswith("fault_")}
    assert names == FAULTS.keys()


@pytest.mark.parametrize(
    ("statement", "compiles"),
    [
        ("Adds(x, x, 1.0f, 64);", True),
        ("Adds(x, x, 1, 64);", False),
        ("Tanh(x, x, 64);", False),
        ("Exp(i, i, 64);", False),
        ("Cast(i, x, RoundMode::CAST_RINT, 64);", True),
        ("Cast(x, y, RoundMode::CAST_NONE, 64);", False),
        ("SetFlag<HardEvent::V_FIX>(0);", False),
    ],
)
def test_other_apis_do_not_compile(statement: str, compiles: bool) -> None:
    source = f"""#include "kernel_operator.h"
    using namespace AscendC;
    void f(LocalTensor<float>& x, LocalTensor<int32_t>& i, LocalTensor<int16_t>& y) {{
      {statement}
    }}"""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None
    include = Path(emulator.SOURCE) / "include"
    command = [compiler, "-std=c++17", "-fsyntax-only", "-I", str(include), "-x", "c++", "-"]
    done = subprocess.run(command, input=source, text=True, capture_output=True)
    assert (done.returncode == 0) == compiles, done.stderr


def test_report_counts(ascend: ModuleType) -> None:
    x, y = torch.arange(1024.0), torch.empty(1024)
    tensors = [Tensor("x", "in", x), Tensor("y", "out", y)]
    tiling = ascend.fault_tiling(False)
    report = emulator.launch("fault_leak", tensors, tiling, workspace=4096, blocks=4)
    assert y.equal(x + 1)
    assert report["gm_to_local"] == report["local_to_gm"] == 4096
    assert report["vector_repeats"] == 4096 // 256
    assert report["peak_ub"] == 3 * 1024
    assert report["flags"] == 4 * 5  # each core: two EnQue, three FreeTensor
    assert len(report["cores"]) == 4
    assert report["cores"][0]["vector_repeats"] == 4


def test_arguments_are_checked(ascend: ModuleType) -> None:
    x = torch.zeros(1024)
    with pytest.raises(KeyError, match="no kernel 'nothing'"):
        emulator.launch("nothing", [], b"")
    with pytest.raises(ValueError, match="expected 2 tensors, got 1"):
        emulator.launch("fault_leak", [Tensor("x", "in", x)], b"")
    with pytest.raises(ValueError, match="expected 'in', 'out' or 'inout', got 'of'"):
        emulator.launch("fault_leak", [Tensor("x", "of", x)] * 2, b"")
    with pytest.raises(ascend.Fault, match="tiling data of 8 bytes for a struct of 4"):
        emulator.launch("fault_leak", [Tensor("x", "in", x), Tensor("y", "out", x)], bytes(8))
