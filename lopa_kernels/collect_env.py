"""What a bug report needs: ``python -m lopa_kernels.collect_env`` prints it.

It works where the native library was not built or does not load, since that is when it is wanted.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.utils.collect_env

import lopa_kernels
from lopa_kernels import _dispatch, _load

#: environment variable -> what it does; README.md has the same table
VARIABLES = {
    "LOPA_BACKEND": "default backend: auto, cpu, cuda, triton, ascend or reference; read at import",
    "LOPA_CPU_ISA": "instruction set of the CPU kernels: portable, avx2 or avx512; read once",
    "LOPA_CUDA": "the build's CUDA library: 0 never, 1 always; default: where nvcc is found",
    "LOPA_CUDA_ARCHS": "its architectures, as CMake's; default: 80-real;90a-real;100",
    "CUDA_HOME": "where the build looks for nvcc that is not on PATH; default: /usr/local/cuda",
    "TRITON_INTERPRET": "1 runs the Triton kernels on CPU tensors, in Triton's interpreter",
    "MAX_JOBS": "parallel compilations of the build; default: the number of processors",
    "CXX": "C++ compiler of the build; default: c++",
    "OMP_NUM_THREADS": "threads of PyTorch and of these operators; default: PyTorch's choice",
}


def table(rows: Iterable[Sequence[object]]) -> str:
    """Rows as left-aligned columns, each as wide as its longest cell."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
    return "\n".join(f"  {line}" for line in lines)


def versions() -> list[tuple[str, str]]:
    return [
        ("lopa_kernels", lopa_kernels.__version__),
        ("torch", str(torch.__version__)),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("platform", platform.platform()),
    ]


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use, or why that is unknown."""
    if "lopa_cpu" in _load.missing:
        return "none: the library is not loaded"
    try:
        return torch.ops.lopa.cpu_isa()
    except RuntimeError as error:
        # A value of LOPA_CPU_ISA that is unknown, or that this processor lacks.
        return f"none: {str(error).partition(chr(10))[0]}"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # Absent on processors that are not x86, where the machine's name has to do.
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def devices() -> list[tuple[str, str]]:
    """The processor, and PyTorch's accelerators with the backend that serves each."""
    rows = [
        ("cpu", f"{cpu_name()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads"),
        ("cpu kernels", cpu_isa()),
    ]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        module = torch.get_device_module(accelerator)
        for index in range(torch.accelerator.device_count()):
            name = module.get_device_name(index) if hasattr(module, "get_device_name") else ""
            serves = [b for b in _dispatch.of_device(accelerator.type) if not _absent(b)]
            rows.append((f"{accelerator.type}:{index}", f"{name} ({', '.join(serves) or 'none'})"))
    return rows


def _absent(backend: str) -> str | None:
    # No operator can be registered, in any backend, without the schemas of the CPU library.
    return _dispatch.why_absent(backend) or _load.missing.get("lopa_cpu")


def backends() -> list[tuple[str, str]]:
    """Each backend: present, or why not."""
    rows = []
    for name in _dispatch.BACKENDS:
        reason = _absent(name)
        rows.append((name, "present" if reason is None else f"absent: {reason}"))
    return rows


def environment() -> list[tuple[str, str, str]]:
    return [(name, os.environ.get(name, "-"), meaning) for name, meaning in VARIABLES.items()]


def libraries() -> list[tuple[str, str]]:
    """Path and size of the native libraries."""
    paths = [_load.library_path(name) for name in _dispatch.LIBRARIES.values()]
    return [(str(p), f"{p.stat().st_size} bytes" if p.exists() else "absent") for p in paths]


def summary() -> str:
    """What ``python -m lopa_kernels`` prints."""
    sections: dict[str, Iterable[Sequence[object]]] = {
        "Versions": versions(),
        "Devices": devices(),
        f"Backends (default: {_dispatch.get_backend()})": backends(),
        "Environment variables": environment(),
    }
    return "\n\n".join(f"{title}\n{table(rows)}" for title, rows in sections.items())


def report() -> str:
    """What ``python -m lopa_kernels.collect_env`` prints."""
    return "\n\n".join(
        [
            summary(),
            f"Library\n{table(libraries())}",
            torch.__config__.show().strip(),
            torch.__config__.parallel_info().strip(),
            torch.utils.collect_env.get_pretty_env_info().strip(),
        ]
    )


if __name__ == "__main__":
    print(report())
