"""States of a round small enough to follow by eye: a list of tokens for each branch."""

from __future__ import annotations

import torch
from states import MASK

from lopa_kernels import LopaConfig, LopaState

M = MASK
CONFIG = LopaConfig(
    mask_id=MASK, max_new_tokens=12, block_size=4, tau_conf=0.5, metric="prob", tau_add=0.5
)


def make_state(
    windows: list[list[int]],
    *,
    cache_len: int = 0,
    commit_len: int = 0,
    prompt_len: int = 0,
    columns: int | None = None,
    creation: list[float] | None = None,
) -> LopaState:
    """One sequence whose live branches hold `windows`."""
    columns = columns or max(len(w) for w in windows)
    tokens = torch.full((1, len(windows), columns), MASK)
    for k, window in enumerate(windows):
        tokens[0, k, : len(window)] = torch.tensor(window)

    def number(value: int) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.int32)

    return LopaState(
        tokens,
        torch.tensor([[len(w) for w in windows]], dtype=torch.int32),
        torch.tensor([creation or [1.0] * len(windows)]),
        torch.zeros(1, len(windows), dtype=torch.bool),
        number(len(windows)),
        number(cache_len),
        number(commit_len),
        number(prompt_len),
        torch.tensor([7]),
        torch.tensor([0.25]),
        torch.tensor([0.125]),
        torch.tensor([False]),
    )


def stats(scores: list[list[float]], token: int = 1) -> tuple[torch.Tensor, ...]:
    score = torch.tensor([scores])
    return torch.full(score.shape, token), score.clone(), score
