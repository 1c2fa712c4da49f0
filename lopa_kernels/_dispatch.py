"""Which implementation runs an operator: by the device of its tensors, or as asked."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lopa_kernels import _load

#: every backend there is; "auto" is the choice by device
BACKENDS = ("cpu", "cuda", "triton", "ascend", "reference")

#: the backends of a device, best first; "cuda" is also what PyTorch calls AMD's devices
_AUTO_BY_DEVICE = {
    "cpu": ("cpu",),
    "cuda": ("cuda", "triton"),
    "xpu": ("triton",),
    "npu": ("ascend",),
}

#: native backend -> its library
LIBRARIES = {"cpu": "lopa_cpu", "cuda": "lopa_cuda", "ascend": "lopa_ascend"}

#: native backend -> PyTorch's name for kernels of its devices
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "ascend": "PrivateUse1"}

#: the rooms with a triton.py
_TRITON_ROOMS = ("confidence", "branch", "step", "kv_cache", "branch_attention", "certainty_loss")

_implementations: dict[str, dict[str, Callable[..., Any]]] = {name: {} for name in BACKENDS}

#: op -> the native operator, and the form of it that a plain call takes (see plain_call)
_native_forms: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(
            f"{source}: expected one of {', '.join(('auto', *BACKENDS))}, got {name!r}"
        )
    return name


_default: str = _checked(os.environ.get("LOPA_BACKEND", "auto"), "LOPA_BACKEND")


def interpreted() -> bool:
    """Triton's interpreter runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True")


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not (torch.version.cuda or torch.version.hip or torch.xpu.is_available() or interpreted()):
        return f"torch {torch.__version__} has no GPU, and TRITON_INTERPRET is not set"
    return None


def implements(op: str, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: registers a Python function as `backend`'s implementation of `op`.

    It takes exactly the arguments of the schema of ``torch.ops.lopa.<op>``, positionally.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations[backend][op] = function
        return function

    return register


def native(*ops: str) -> None:
    """Registers ``torch.ops.lopa.<op>`` as the implementation of the native backends."""
    for op in ops:
        call = getattr(torch.ops.lopa, op).default
        for backend, library in LIBRARIES.items():
            key = _DISPATCH_KEYS[backend]
            if library not in _load.missing and torch._C._dispatch_has_kernel_for_dispatch_key(
                f"lopa::{op}", key
            ):
                _implementations[backend][op] = call
                _native_forms.setdefault(op, (call, call))


# PyTorch takes five times as long for an argument that is no tensor, or that has a keyword, as for
# a tensor in its place. torch.ops.lopa_eager.* are the native kernels under schemas that get across
# faster. They have no fakes and no other backend: only a plain call takes them.
_eager_library = torch.library.Library("lopa_eager", "DEF")


def eager(*ops: str, change: Callable[[str], str] = str) -> None:
    """Defines ``torch.ops.lopa_eager.<op>``: all arguments in place, and what `change` does."""
    for op in ops:
        if op in _native_forms:
            native, _ = _native_forms[op]
            schema = str(native._schema).removeprefix("lopa::")  # type: ignore[attr-defined]
            _eager_library.define(change(re.sub(r" \*,|=[^,)]*", "", schema)))
            form = getattr(torch.ops.lopa_eager, op).default
            # What its __call__ calls, a frame of Python later.
            _native_forms[op] = native, getattr(form, "_op", form)


def plain_call(op: str, like: torch.Tensor, backend: str | None) -> Callable[..., Any] | None:
    """The form of the native operator for a plain call on the device of `like`, if it is one.

    A call is plain if a native kernel runs it and no compiler, exporter or dispatch mode is
    watching. The kernel refuses what the public function refuses, before anything is written, so
    that a plain call need not check its tensors twice: where it raises, the public function checks
    them, in its own wording, and calls the operator proper.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    if not isinstance(like, torch.Tensor):
        return None
    device = "cuda" if like.is_cuda else "cpu" if like.is_cpu else ""
    name = _default if backend is None else backend
    # The native backends are called as their devices.
    if not device or name not in ("auto", device) or op not in _native_forms:
        return None
    native, form = _native_forms[op]
    return form if _implementations[device].get(op) is native else None


# Triton's operators are torch.ops.lopa_triton.*, of the same schemas, so that compilers see one
# node with declared mutation. Where a device has no native kernel they stand in for
# torch.ops.lopa.* as well.
_triton_library = torch.library.Library("lopa_triton", "DEF")
_fallback_library = torch.library.Library("lopa", "IMPL")
_triton_loaded = False


def implements_triton(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: a function that launches Triton kernels as ``torch.ops.lopa_triton.<op>``.

    It takes the arguments of the schema of ``torch.ops.lopa.<op>``, those after ``*`` by keyword.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        schema = str(getattr(torch.ops.lopa, op).default._schema).removeprefix("lopa::")
        _triton_library.define(schema)
        for key in ("CPU", "CUDA", "XPU") if interpreted() else ("CUDA", "XPU"):
            _triton_library.impl(op, function, key)

        @torch.library.register_fake(f"lopa_triton::{op}", lib=_triton_library)
        def fake(*arguments: Any, **options: Any) -> Any:
            return getattr(torch.ops.lopa, op).default(*arguments, **options)

        for key in ("CUDA", "XPU"):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"lopa::{op}", key):
                _fallback_library.impl(op, function, key)
        _implementations["triton"][op] = getattr(torch.ops.lopa_triton, op).default
        return function

    return register


def load_triton() -> None:
    """Registers the Triton kernels where they can run; called once, after the schemas' rooms."""
    global _triton_loaded
    if _triton_loaded or _why_no_triton() is not None:
        return
    _triton_loaded = True
    for room in _TRITON_ROOMS:
        importlib.import_module(f"lopa_kernels.ops.{room}.triton")


def why_absent(backend: str, op: str | None = None) -> str | None:
    """The reason why `backend` cannot run (`op`), or None if it can."""
    library = LIBRARIES.get(backend)
    if library is not None and library in _load.missing:
        return _load.missing[library]
    if backend == "triton":
        reason = _why_no_triton()
        if reason is not None:
            return reason
    if op is not None and op not in _implementations[backend]:
        return f"backend {backend!r} has no {op}"
    return None


def of_device(device_type: str) -> tuple[str, ...]:
    """The backends that "auto" considers for a device, best first."""
    return _AUTO_BY_DEVICE.get(device_type, ())


def _runs_on(backend: str, device_type: str) -> bool:
    if backend == "reference" or backend in _AUTO_BY_DEVICE.get(device_type, ()):
        return True
    return backend == "triton" and device_type == "cpu" and interpreted()


def implementation(op: str, device_type: str, backend: str | None = None) -> Callable[..., Any]:
    """The callable that runs `op`.

    `backend` (or the process-wide default, see :func:`set_backend`) names it; ``"auto"`` takes
    the first backend present for the device. An explicitly named backend that is missing, or that
    does not run on the device, is a RuntimeError; so is a device that no backend serves, since the
    PyTorch reference is never a silent substitute for a kernel.
    """
    name = _default if backend is None else _checked(backend, "backend")
    if name == "auto":
        candidates = _AUTO_BY_DEVICE.get(device_type, ())
        for candidate in candidates:
            if op in _implementations[candidate]:
                return _implementations[candidate][op]
        reasons = "".join(f"; {c}: {why_absent(c, op)}" for c in candidates)
        raise RuntimeError(
            f"{op}: no backend for device type {device_type!r}{reasons}; "
            "backend='reference' runs the PyTorch reference there"
        )
    if not _runs_on(name, device_type):
        raise RuntimeError(f"{op}: backend {name!r} does not run on device type {device_type!r}")
    # The reason is asked for last: compilers trace this function, but no search for packages.
    if op not in _implementations[name]:
        raise RuntimeError(f"{op}: backend {name!r} is missing: {why_absent(name, op)}")
    return _implementations[name][op]


def get_backend() -> str:
    """The process-wide default backend."""
    return _default


def set_backend(name: str) -> None:
    """Sets the process-wide default backend.

    "auto", "cpu", "cuda", "triton", "ascend" or "reference".

    Raises:
        ValueError: no such backend.
    """
    global _default
    _default = _checked(name, "set_backend")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context manager form of :func:`set_backend`."""
    previous = _default
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)
