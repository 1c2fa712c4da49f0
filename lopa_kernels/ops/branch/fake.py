"""Shapes and dtypes of the branch room, for compilers."""

from __future__ import annotations

import torch


@torch.library.register_fake("lopa::branch_confidence")
def branch_confidence(score: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return score.new_empty(score.shape[:2])


@torch.library.register_fake("lopa::select_positions")
def select_positions(
    token: torch.Tensor,
    prob: torch.Tensor,
    score: torch.Tensor,
    tokens: torch.Tensor,
    length: torch.Tensor,
    cache_len: torch.Tensor,
    prompt_len: torch.Tensor,
    lookahead: int,
    *config: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = tokens.shape[0]
    return (
        tokens.new_empty(tokens.shape, dtype=torch.bool),
        tokens.new_empty((batch, lookahead), dtype=torch.int32),
        tokens.new_empty((batch,), dtype=torch.int32),
    )


@torch.library.register_fake("lopa::spawn_branches")
def spawn_branches(
    tokens: torch.Tensor,
    eos: torch.Tensor,
    token: torch.Tensor,
    score: torch.Tensor,
    columns: torch.Tensor,
    eos_id: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, window = tokens.shape
    slots = columns.shape[1] + 1
    return (
        tokens.new_empty((batch, slots, window)),
        score.new_empty((batch, slots)),
        eos.new_empty((batch, slots)),
        columns.new_empty((batch,)),
    )
