"""Checks of arguments, in one wording: operator, argument, expected, got.

They read shapes, dtypes, strides and devices, never values, so that they cost no synchronisation
and hold for fake tensors too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATING = (torch.bfloat16, torch.float16, torch.float32)


def check_dtype(
    op: str, name: str, tensor: torch.Tensor, expected: torch.dtype | Sequence[torch.dtype]
) -> None:
    allowed = (expected,) if isinstance(expected, torch.dtype) else tuple(expected)
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"{op}: {name}: expected dtype {names}, got {tensor.dtype}")


def check_rank(op: str, name: str, tensor: torch.Tensor, rank: int) -> None:
    if tensor.dim() != rank:
        raise ValueError(
            f"{op}: {name}: expected {rank} dimensions, got shape {list(tensor.shape)}"
        )


def check_shape(op: str, name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    if tensor.dim() != len(shape) or any(
        got != want for got, want in zip(tensor.shape, shape, strict=True)
    ):
        raise ValueError(f"{op}: {name}: expected shape {list(shape)}, got {list(tensor.shape)}")


def check_device(op: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{op}: {name}: expected a tensor on {device}, got {tensor.device}")


def check_unit_stride(op: str, name: str, tensor: torch.Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name}: expected unit stride in the last dimension, "
            f"got strides {list(tensor.stride())}"
        )


def check_choice(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name}: expected one of {', '.join(choices)}, got {value!r}")


def shares_memory(tensor: torch.Tensor) -> bool:
    """Whether two elements may be one: what must not be written."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return tensor.numel() > 0
            extent = stride * size
    return False
