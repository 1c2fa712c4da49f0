"""Shapes and dtypes of the step room, for compilers."""

from __future__ import annotations

from typing import Any

import torch


def _step(state: tuple[torch.Tensor, ...], branches: int, window: int) -> tuple[torch.Tensor, ...]:
    batch, slots, columns = state[0].shape
    new = state[0].new_empty
    return (
        new((batch, branches, window)),
        new((batch, branches), dtype=torch.int32),
        new((batch, branches), dtype=torch.float32),
        new((batch, branches), dtype=torch.bool),
        *(new((batch,), dtype=field.dtype) for field in state[4:]),
        new((batch,), dtype=torch.int32),
        new((batch,), dtype=torch.int32),
        new((batch, slots), dtype=torch.float32),
        new((batch, columns)),
        new((batch,), dtype=torch.int32),
    )


@torch.library.register_fake("lopa::lopa_step")
def lopa_step(*args: Any) -> tuple[torch.Tensor, ...]:
    return _step(args[4:16], args[16], args[17])


@torch.library.register_fake("lopa::branch_step")
def branch_step(*args: Any) -> tuple[torch.Tensor, ...]:
    return _step(args[3:15], args[15], args[16])


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The mutating forms write existing tensors and return nothing."""


for _op in ("lopa_step_out", "lopa_step_", "branch_step_out", "branch_step_"):
    torch.library.register_fake(f"lopa::{_op}", _nothing)


@torch.library.register_fake("lopa::needed_rows")
def needed_rows(tokens: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    return (
        tokens.new_empty((args[-1],)),
        tokens.new_empty(tokens.shape, dtype=torch.int32),
        tokens.new_empty((1,), dtype=torch.int32),
    )
