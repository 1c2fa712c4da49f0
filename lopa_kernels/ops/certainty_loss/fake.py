"""Shapes and dtypes of the loss, for compilers."""

from __future__ import annotations

import torch


@torch.library.register_fake("lopa::certainty_forcing_loss")
def certainty_forcing_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    masked: torch.Tensor,
    temperature: float = 0.5,
    beta: float = 2.0,
    inplace_backward: bool = False,
) -> tuple[torch.Tensor, ...]:
    rows = labels.numel()
    return (
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty((2,), dtype=torch.float32),
        logits.new_empty((rows, 4), dtype=torch.float32),
        logits.new_empty((rows + 1,), dtype=torch.int32),
        logits.new_empty((2,), dtype=torch.int32),
    )


@torch.library.register_fake("lopa::certainty_forcing_loss_backward")
def certainty_forcing_loss_backward(
    grad_loss: torch.Tensor, logits: torch.Tensor, *_: object, **__: object
) -> torch.Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("lopa::certainty_forcing_loss_backward_")
def certainty_forcing_loss_backward_(*_: object, **__: object) -> None:
    return None
