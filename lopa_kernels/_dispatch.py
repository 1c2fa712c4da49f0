"""Which implementation runs an operator: by the device of its tensors, or as asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lopa_kernels import _load

#: every backend there is; "auto" is the choice by device
BACKENDS = ("cpu", "reference")

_AUTO_BY_DEVICE = {"cpu": ("cpu",)}

_implementations: dict[str, dict[str, Callable[..., Any]]] = {name: {} for name in BACKENDS}


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(
            f"{source}: expected one of {', '.join(('auto', *BACKENDS))}, got {name!r}"
        )
    return name


_default: str = _checked(os.environ.get("LOPA_BACKEND", "auto"), "LOPA_BACKEND")


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
        _implementations["cpu"][op] = getattr(torch.ops.lopa, op).default


def why_absent(backend: str, op: str | None = None) -> str | None:
    """The reason why `backend` cannot run (`op`), or None if it can."""
    library = {"cpu": "lopa_cpu"}.get(backend)
    if library is not None and library in _load.missing:
        return _load.missing[library]
    if op is not None and op not in _implementations[backend]:
        return f"backend {backend!r} has no {op}"
    return None


def implementation(op: str, device_type: str, backend: str | None = None) -> Callable[..., Any]:
    """The callable that runs `op`.

    `backend` (or the process-wide default, see :func:`set_backend`) names it; ``"auto"`` takes
    the first backend present for the device. An explicitly named backend that is missing, or that
    does not run on the device, is a RuntimeError; so is a device that no backend serves, since the
    PyTorch reference is never a silent substitute for a kernel.
    """
    name = _default if backend is None else _checked(backend, "backend")
    if name == "auto":
        for candidate in _AUTO_BY_DEVICE.get(device_type, ()):
            if op in _implementations[candidate]:
                return _implementations[candidate][op]
        raise RuntimeError(
            f"{op}: no backend for device type {device_type!r}; "
            "backend='reference' runs the PyTorch reference there"
        )
    if name != "reference" and name not in _AUTO_BY_DEVICE.get(device_type, ()):
        raise RuntimeError(f"{op}: backend {name!r} does not run on device type {device_type!r}")
    reason = why_absent(name, op)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {name!r} is missing: {reason}")
    return _implementations[name][op]


def get_backend() -> str:
    """The process-wide default backend."""
    return _default


def set_backend(name: str) -> None:
    """Sets the process-wide default backend: "auto", "cpu" or "reference".

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
