"""The cube side of the AscendC emulator: its arithmetic, and every check with a kernel at fault."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from ascend import ascend  # noqa: F401

from ascend_ops import emulator
from ascend_ops.emulator import Tensor

BLOCKS = 2

#: faults of faults_cube.cpp, and what the emulator says of each
FAULTS = {
    "l1_alignment": r"\[alignment\] cube core 0: DataCopy \(Nd2Nz\): dst starts at byte 16",
    "l0a_alignment": r"\[alignment\] .*LoadData: dst starts at byte 32, .* no multiple of 512",
    "l0b_alignment": r"\[alignment\] .*LoadDataWithTranspose: dst .* no multiple of 512",
    "l0c_alignment": r"\[alignment\] .*Mmad: dst starts at byte 512, .* no multiple of 1024",
    "fixpipe_alignment": r"\[alignment\] .*Fixpipe: src starts at byte 32, .* no multiple of 64",
    "l1_capacity": r"\[capacity\] .* of the 524032 bytes of L1",
    "l0a_capacity": r"\[capacity\] .* of the 65536 bytes of L0A",
    "l0b_capacity": r"\[capacity\] .* of the 65536 bytes of L0B",
    "l0c_capacity": r"\[capacity\] .* of the 131072 bytes of L0C",
    "load_position": r"\[position\] .*LoadData: dst has to lie in L0A or L0B",
    "mmad_position": r"\[position\] .*Mmad: fm has to lie in L0A",
    "fixpipe_position": r"\[position\] .*Fixpipe: src has to lie in L0C",
    "vector_role": r"\[role\] vector core .* has no such memory",
    "nd2nz_stride": r"\[repeat\] .*dstNzC0Stride is 0, not in \[1, 16384\]",
    "nd2nz_narrowing": r"\[repeat\] .*65536 does not fit",
    "nd2nz_rows": r"\[overlap\] .*rows of 48 elements begin 32 apart",
    "nd2nz_bounds": r"\[bounds\] .*DataCopy \(Nd2Nz\)",
    "load_repeat": r"\[repeat\] .*256 does not fit",
    "load_bounds": r"\[bounds\] .*LoadData: src",
    "load_address_mode": r"\[unsupported\] .*LoadData: addrMode 1",
    "transpose_gap": r"\[unsupported\] .*dstFracGap",
    "fill_range": r"\[repeat\] .*InitConstValue: blockNum is 32768",
    "mmad_range": r"\[repeat\] .*Mmad: k is 4096, not in \[0, 4095\]",
    "mmad_unit_flag": r"\[unsupported\] .*Mmad: unitFlag 3",
    "mmad_bias": r"\[unsupported\] .*Mmad: a bias",
    "mmad_gemv": r"\[unsupported\] .*GEMV",
    "fixpipe_columns": r"\[alignment\] .*nSize 24 is no multiple of 16",
    "fixpipe_source_stride": r"\[alignment\] .*srcStride 16",
    "fixpipe_overlap": r"\[overlap\] .*rows of 32 elements begin 16 apart",
    "fixpipe_unit_flag": r"\[unsupported\] .*Fixpipe: unitFlag 3",
    "fixpipe_quantization": r"\[unsupported\] .*quantPre 1",
    "fixpipe_bounds": r"\[bounds\] .*Fixpipe",
    "unwritten_l1": r"\[uninitialized\] .* of L1",
    "unwritten_l0a": r"\[uninitialized\] .* of L0A",
    "unwritten_l0c": r"\[uninitialized\] .* of L0C",
    "no_flag_to_mte1": r"\[race\] .*reads .* of L1, which core 0 PIPE_MTE2 wrote",
    "no_flag_to_m": r"\[race\] .*reads .* of L0A, which core 0 PIPE_MTE1 wrote",
    "no_flag_to_fix": r"\[race\] .*reads .* of L0C, which core 0 PIPE_M wrote",
    "no_flag_from_mte1": r"\[race\] .*writes .* of L1, which core 0 PIPE_MTE1 read",
    "no_flag_from_m": r"\[race\] .*writes .* of L0A, which core 0 PIPE_M read",
    "no_flag_from_fix": r"\[race\] .*writes .* of L0C, which core 0 PIPE_FIX read",
    "no_barrier_m": r"\[race\] .*reads .* of L0C, which core 0 PIPE_M wrote",
    "no_wait_of_vector": r"\[race\] vector core 1: reads .* which core 0 PIPE_FIX wrote",
    "no_wait_of_cube": r"\[uninitialized\]|\[race\] vector core 1: reads .* core 0 PIPE_FIX wrote",
    "wrong_pipe": r"\[race\] vector core 1: reads .* which core 0 PIPE_FIX wrote",
    "other_pipe_back": r"\[race\] cube core 0: writes .* which core [12] PIPE_MTE2 read",
    "one_vector_core_sets": r"\[deadlock\] .*core 0 waits for CrossCoreWaitFlag\(1\)",
    "nobody_sets": r"\[deadlock\] .*core 0 waits for CrossCoreWaitFlag\(7\)",
    "flag_range": r"\[flag\] .*flag 16 is not in \[0, 16\)",
    "flag_of_sync_all": r"\[flag\] .*flags 11 to 14 are SyncAll's",
    "flag_overflow": r"\[flag\] .*flag 5 of core 1 is set more than 15 times",
    "flag_left": r"\[leak\] .*flag 5 of core 1 is set and never waited for",
    "flag_offered": r"\[leak\] core 0 sets flag 6, and others of its group never do",
    "flag_modes": r"\[flag\] .*flag 5 of core .* is still in use in mode",
    "flag_mode_role": r"\[role\] .*mode 1 is for vector cores",
    "no_wait_of_all_cubes": r"\[uninitialized\]|\[race\] .*which core 3 PIPE_FIX wrote",
    "no_wait_of_pair": r"\[uninitialized\]|\[race\] .*which core [12] PIPE_MTE3 wrote",
}


def run(ascend: ModuleType, name: str) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: F811
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(32, 48, generator=generator).half()
    b = torch.randn(48, 32, generator=generator).half()
    y = torch.full((BLOCKS, 32, 32), torch.nan)
    emulator.launch(
        "cube_fault",
        [Tensor("a", "in", a), Tensor("b", "in", b), Tensor("y", "out", y)],
        ascend.cube_fault_tiling(name),
        workspace=BLOCKS * (32 * 32 + 32) * 4,
        blocks=BLOCKS,
        cores="mixed",
    )
    return y, a.double() @ b.double()


def test_product(ascend: ModuleType) -> None:  # noqa: F811
    y, expected = run(ascend, "none")
    torch.testing.assert_close(y.double(), expected.expand_as(y), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(ascend: ModuleType, name: str) -> None:  # noqa: F811
    with pytest.raises(ascend.Fault, match=FAULTS[name]):
        run(ascend, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(16, 16, 32), (40, 70, 96), (2, 5, 32), (33, 16, 64), (48, 79, 32)]
)
def test_ragged_product(
    ascend: ModuleType,  # noqa: F811
    m: int,
    k: int,
    n: int,
    dtype: torch.dtype,
) -> None:
    """Any m and k, NaN in what they leave of a fractal; rounded once, on the way out."""
    generator = torch.Generator().manual_seed(m)
    a = torch.randint(-8, 9, (m, k), generator=generator).to(dtype)
    b = torch.randint(-8, 9, (k, n), generator=generator).to(dtype)
    y = torch.full((m, n), torch.nan, dtype=dtype)
    report = emulator.launch(
        "cube_product_fp16" if dtype == torch.float16 else "cube_product_bf16",
        [Tensor("a", "in", a), Tensor("b", "in", b), Tensor("y", "out", y)],
        ascend.cube_product_tiling(m, k, n),
        cores="cube",
    )
    assert y.equal((a.float() @ b.float()).to(dtype))  # whole numbers: exact in any order
    up = [-(-size // 16) * 16 for size in (m, k, n)]
    assert report["cube_macs"] == up[0] * up[1] * up[2]
