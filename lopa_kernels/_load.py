"""Loads the native libraries, and remembers why one is absent."""

from __future__ import annotations

from pathlib import Path

import torch

PACKAGE = Path(__file__).parent

#: library name -> why it is not loaded; a loaded library has no entry
missing: dict[str, str] = {}


def _load(name: str) -> None:
    path = PACKAGE / f"lib{name}.so"
    if not path.exists():
        missing[name] = f"{path.name} is not in the package: it was not built"
        return
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        missing[name] = f"{path.name} does not load: {error}"


_load("lopa_cpu")
if "lopa_cpu" in missing:
    # Every schema lives in this library, so nothing works without it.
    raise ImportError(
        f"lopa_kernels: {missing['lopa_cpu']}. Build it with: pip install --no-build-isolation ."
    )
