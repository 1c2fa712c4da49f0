"""Shapes and dtypes of the vocabulary pass, for compilers."""

from __future__ import annotations

import torch


def _outputs(logits: torch.Tensor, rows: torch.Tensor | None, floats: int) -> list[torch.Tensor]:
    shape = logits.shape[:-1] if rows is None else rows.shape
    token = logits.new_empty(shape, dtype=torch.int64)
    return [token, *(logits.new_empty(shape, dtype=torch.float32) for _ in range(floats))]


@torch.library.register_fake("lopa::token_confidence")
def _token_confidence(
    logits: torch.Tensor,
    rows: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    metric: str = "prob",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[torch.Tensor, ...]:
    return tuple(_outputs(logits, rows, 2))


@torch.library.register_fake("lopa::token_confidence_out")
def _token_confidence_out(
    logits: torch.Tensor,
    rows: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    metric: str = "prob",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    *,
    token: torch.Tensor,
    prob: torch.Tensor,
    score: torch.Tensor,
) -> None:
    return None


@torch.library.register_fake("lopa::softmax_stats")
def _softmax_stats(
    logits: torch.Tensor,
    rows: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[torch.Tensor, ...]:
    return tuple(_outputs(logits, rows, 4))
