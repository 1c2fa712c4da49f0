"""Builds and drives the AscendC emulator.

The kernels of ``ascend_ops/*/op_kernel`` compiled by the host's C++ compiler against the headers of
``ascend_ops/emulator/include``, in a pybind11 module under ``build/``.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

SOURCE = Path(__file__).resolve().parent
BUILD = SOURCE.parent.parent / "build" / f"ascend_emulator-{sys.implementation.cache_tag}"


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}")


@functools.cache
def module() -> ModuleType:
    """The module ``lopa_ascend_emulator``, built where its sources changed."""
    import pybind11

    cmake = shutil.which("cmake")
    if cmake is None:
        raise RuntimeError("the AscendC emulator is built by cmake, which was not found")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (BUILD / "CMakeCache.txt").exists():
            options = [f"-DPython_EXECUTABLE={sys.executable}"]
            options.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
            _run([cmake, "-S", SOURCE, "-B", BUILD, *options])
        _run([cmake, "--build", BUILD])
        (library,) = BUILD.glob("lopa_ascend_emulator*.so")
        spec = importlib.util.spec_from_file_location("lopa_ascend_emulator", library)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    return loaded


@dataclass(frozen=True)
class Tensor:
    """An argument of a kernel: `access` is "in", "out" or "inout"; `value` None where absent."""

    name: str
    access: str
    value: torch.Tensor | None


def _bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    if not tensor.is_contiguous():
        raise ValueError("an emulated launch takes contiguous tensors")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def launch(
    name: str,
    tensors: Sequence[Tensor],
    tiling: bytes,
    *,
    workspace: int = 0,
    blocks: int = 1,
    cores: str = "vector",
    tiling_key: int = 0,
) -> Mapping[str, Any]:
    """Runs a kernel on emulated cores and returns what it did, as counters.

    Args:
        name: the entry of a registered kernel.
        tensors: its arguments before workspace and tiling, on the CPU; outputs are written.
        tiling: the bytes of its tiling struct.
        workspace: bytes of the kernel's own workspace.
        blocks: AI cores of the launch.
        cores: "vector", "cube", or "mixed" (a cube core and two vector cores a block).
        tiling_key: what TILING_KEY_IS compares with.

    Raises:
        Fault: (of :func:`module`) the kernel broke a rule; the message starts with its kind.
    """
    memory = [(t.name, t.access, None if t.value is None else _bytes_of(t.value)) for t in tensors]
    return module().launch(
        name,
        memory,
        tiling,
        workspace=workspace,
        blocks=blocks,
        cores=cores,
        tiling_key=tiling_key,
    )


def run(
    name: str,
    inputs: dict[str, torch.Tensor | None],
    outputs: dict[str, torch.Tensor],
    tiling: Mapping[str, Any],
    reports: list[Any] | None = None,
) -> None:
    """A launch of kernel `name`; its report is appended to `reports`."""
    tensors = [Tensor(key, "in", value) for key, value in inputs.items()]
    tensors += [Tensor(key, "out", value) for key, value in outputs.items()]
    report = launch(
        name, tensors, tiling["data"], workspace=tiling["workspace"], blocks=tiling["blocks"]
    )
    if reports is not None:
        reports.append(report)
