"""Arrays of other libraries in, the same kind out, by DLPack."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def _is_foreign(value: object) -> bool:
    return hasattr(value, "__dlpack__") and not isinstance(value, torch.Tensor)


def _namespace(array: object) -> Callable[[torch.Tensor], Any]:
    module = type(array).__module__.partition(".")[0]
    # jax arrays come from `jaxlib`; their `from_dlpack` is in jax.numpy.
    name = {"jaxlib": "jax.numpy", "jax": "jax.numpy"}.get(module, module)
    from_dlpack = getattr(importlib.import_module(name), "from_dlpack", None)
    if from_dlpack is None:
        raise TypeError(f"arrays of {type(array)!r} cannot be made from DLPack")
    return from_dlpack


def _convert(value: Any, test: Callable[[object], bool], how: Callable[[Any], Any]) -> Any:
    if test(value):
        return how(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_convert(item, test, how) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_convert(item, test, how) for item in value)
    return value


def _first_foreign(values: Any) -> object | None:
    for value in values:
        if _is_foreign(value):
            return value
        if isinstance(value, (tuple, list)):
            found = _first_foreign(value)
            if found is not None:
                return found
    return None


def accepts_dlpack(function: Function) -> Function:
    """Lets a public function take any ``__dlpack__`` array (CuPy, JAX, NumPy) without a copy.

    Torch tensors pass straight through. Where an argument (or a field of a tuple argument) is an
    array of another library, every such array is imported by DLPack and every tensor of the result
    goes back as an array of that library.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], torch.Tensor):
            return function(*args, **kwargs)
        foreign = _first_foreign((*args, *kwargs.values()))
        if foreign is None:
            return function(*args, **kwargs)
        args = _convert(args, _is_foreign, torch.from_dlpack)
        kwargs = {k: _convert(v, _is_foreign, torch.from_dlpack) for k, v in kwargs.items()}
        result = function(*args, **kwargs)
        return _convert(result, lambda v: isinstance(v, torch.Tensor), _namespace(foreign))

    return wrapper  # type: ignore[return-value]
