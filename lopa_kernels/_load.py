"""Loads the native libraries, and remembers why one is absent."""

from __future__ import annotations

import importlib.util
import sys
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


def _load_ascend() -> None:
    """The adapters of ascend_ops/torch, and the kernels of ascend_ops that they call."""
    name = "lopa_ascend"
    if "lopa_cpu" in missing:
        missing[name] = "the schemas are in liblopa_cpu.so, which is not loaded"
    elif importlib.util.find_spec("torch_npu") is None:
        missing[name] = "the package torch_npu is not installed"
    elif "torch_npu" not in sys.modules:
        # `import torch` imports it, unless TORCH_DEVICE_BACKEND_AUTOLOAD forbids it.
        missing[name] = "torch_npu is not imported: import it before lopa_kernels"
    elif not library_path(name).exists():
        missing[name] = f"{library_path(name).name} is not in the package: build ascend_ops/torch"
    else:
        _load(name)
        absent = [] if name in missing else torch.ops.lopa_ascend.missing()
        if absent:
            missing[name] = (
                f"the package of custom operators built from ascend_ops lacks {', '.join(absent)}, "
                "or is not installed (ASCEND_CUSTOM_OPP_PATH)"
            )


_load("lopa_cpu")
_load_cuda()
_load_ascend()
