"""Loads the native libraries, and remembers why one is absent."""

from __future__ import annotations

from pathlib import Path

import torch

PACKAGE = Path(__file__).parent

#: library name -> why it is not loaded; a loaded library has no entry
missing: dict[str, str] = {}


def library_path(name: str) -> Path:
    return PACKAGE / f"lib{name}.so"


def _load(name: str) -> None:
    path = library_path(name)
    if not path.exists():
        missing[name] = f"{path.name} is not in the package: it was not built"
        return
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        missing[name] = f"{path.name} does not load: {error}"


def require(name: str) -> None:
    """Raises ImportError, with the reason and the remedy, where a library is not loaded."""
    if name in missing:
        raise ImportError(
            f"lopa_kernels: {missing[name]}. Build it with: pip install --no-build-isolation . "
            "(python -m lopa_kernels.collect_env prints what a bug report needs)"
        )


def _load_cuda() -> None:
    if "lopa_cpu" in missing:
        missing["lopa_cuda"] = "the schemas are in liblopa_cpu.so, which is not loaded"
    elif torch.version.cuda is None:
        # The library's symbols of torch's CUDA part would not be found.
        missing["lopa_cuda"] = f"torch {torch.__version__} is built without CUDA"
    else:
        _load("lopa_cuda")


_load("lopa_cpu")
_load_cuda()
