"""Shapes and dtypes of the branch_attention room, for compilers."""

from __future__ import annotations

from typing import Any

import torch


@torch.library.register_fake("lopa::branch_attention")
def branch_attention(q: torch.Tensor, *inputs: Any, **options: Any) -> torch.Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("lopa::branch_attention_lse")
def branch_attention_lse(
    q: torch.Tensor, *inputs: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, branches, window, q_heads, _ = q.shape
    lse = q.new_empty((batch, branches, q_heads, window), dtype=torch.float32)
    return q.new_empty(q.shape), lse


@torch.library.register_fake("lopa::branch_attention_out")
def branch_attention_out(*inputs: Any, **options: Any) -> None:
    return None
