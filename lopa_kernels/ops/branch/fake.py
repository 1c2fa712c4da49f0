"""Shapes and dtypes of the branch room, for compilers."""

from __future__ import annotations

import torch


@torch.library.register_fake("lopa::branch_confidence")
def branch_confidence(
    score, open, creation, branches=None, length=None, reduction="mean", fraction=1.0, group=None,
    alpha=0.0,
):  # type: ignore[no-untyped-def]  # fmt: skip
    return score.new_empty(score.shape[:2])


@torch.library.register_fake("lopa::select_positions")
def select_positions(
    token, prob, score, tokens, length, cache_len, prompt_len, lookahead, *config
):  # type: ignore[no-untyped-def]  # fmt: skip
    batch = tokens.shape[0]
    return (
        tokens.new_empty(tokens.shape, dtype=torch.bool),
        tokens.new_empty((batch, lookahead), dtype=torch.int32),
        tokens.new_empty((batch,), dtype=torch.int32),
    )


@torch.library.register_fake("lopa::spawn_branches")
def spawn_branches(tokens, eos, token, score, columns, eos_id):  # type: ignore[no-untyped-def]
    batch, window = tokens.shape
    slots = columns.shape[1] + 1
    return (
        tokens.new_empty((batch, slots, window)),
        score.new_empty((batch, slots)),
        eos.new_empty((batch, slots)),
        columns.new_empty((batch,)),
    )
