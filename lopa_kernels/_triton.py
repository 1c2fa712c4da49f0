"""Host code that the Triton rooms share: checks, the tensors' device, sizes of launches.

The checks are those of the native operators (csrc/include/lopa/checks.h), in the same words: they
keep the kernels memory-safe for callers of torch.ops. The public functions raise ValueError and
TypeError for the same mistakes earlier.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from lopa_kernels._checks import FLOATING

# Elements of a tile that one thread holds, roughly; counts of columns are added up 16 bits wide.
ELEMENTS_PER_THREAD = 8
MAX_WARPS = 16
MAX_WINDOW = 32768
# Slots, and the rows that name them, are numbers of 32 bits.
MAX_INT32 = 2**31 - 1


def fail(op: str, name: str, expected: object, got: object) -> NoReturn:
    raise RuntimeError(f"{op}: {name}: expected {expected}, got {got}")


def _dtype_name(dtype: torch.dtype) -> str:
    """As in C++: Float, Long."""
    return torch.empty(0, dtype=dtype).type().removeprefix("torch.").removesuffix("Tensor")


def _device_name(device: torch.device) -> str:
    return "the CPU" if device.type == "cpu" else str(device)


def check_device(op: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        fail(op, name, f"a tensor on {_device_name(device)}", _device_name(tensor.device))


def check_dtype(op: str, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        fail(op, name, f"dtype {_dtype_name(dtype)}", _dtype_name(tensor.dtype))


def check_floating(op: str, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in FLOATING:
        fail(op, name, "dtype BFloat16, Half or Float", _dtype_name(tensor.dtype))


def check_shape(op: str, name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    if tensor.shape != shape:
        fail(op, name, f"shape {list(shape)}", f"shape {list(tensor.shape)}")


def check_rank(op: str, name: str, tensor: torch.Tensor, rank: int) -> None:
    if tensor.dim() != rank:
        fail(op, name, f"{rank} dimensions", f"shape {list(tensor.shape)}")


def check_tensor(
    op: str,
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    # One comparison where all is well, as most calls check a dozen tensors.
    if tensor.dtype == dtype and tensor.shape == shape and tensor.device == device:
        return
    check_device(op, name, tensor, device)
    check_dtype(op, name, tensor, dtype)
    check_shape(op, name, tensor, shape)


def check_at_least(op: str, name: str, value: int, least: int) -> None:
    if value < least:
        fail(op, name, f"at least {least}", value)


def check_at_most(op: str, name: str, value: int, most: int) -> None:
    if value > most:
        fail(op, name, f"at most {most}", value)


def check_share(op: str, name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        fail(op, name, "a number in [0, 1]", f"{value:g}")


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    device: Any = torch.get_device_module(tensor.device)
    return device.device(tensor.device)


@functools.cache
def dependent(device: torch.device) -> bool:
    """Has the device programmatic dependent launch? A kernel then waits for those before it."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(device: torch.device, elements: int) -> dict[str, Any]:
    """Of a kernel that waits for its predecessors, for a tile of so many elements."""
    warps = min(max(elements // (32 * ELEMENTS_PER_THREAD), 1), MAX_WARPS)
    options: dict[str, Any] = {"num_warps": warps, "DEPENDENT": dependent(device)}
    if options["DEPENDENT"]:
        options["launch_pdl"] = True
    return options


def power_of_two(n: int) -> int:
    """The least that is not below `n`; Triton's tiles are powers of two."""
    return 1 << max(n - 1, 0).bit_length()
