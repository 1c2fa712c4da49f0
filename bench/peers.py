"""Peers that need more than PyTorch's eager mode: torch.compile, FlashInfer; and our Triton."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from lopa_kernels import _dispatch

#: what FlashInfer's functions give: a token, a probability where there is one, and no score
Drawn = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile with static shapes; a shape's first call compiles.

    Dynamo falls back to eager in silence after eight shapes of one function: `make` of a case
    that uses this calls ``torch.compiler.reset()``.
    """
    return torch.compile(function, dynamic=False)


def has_triton(op: str) -> bool:
    """Whether our Triton kernels run `op` here."""
    return _dispatch.why_absent("triton", op) is None


def has_flashinfer() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


@functools.cache
def _sampling() -> Any:
    # Its kernels are compiled at the first call of any of them.
    return importlib.import_module("flashinfer.sampling")


def softmax_max(logits: torch.Tensor, *_: torch.Tensor) -> Drawn:
    """The whole softmax in memory, then PyTorch's maximum of it."""
    prob, token = _sampling().softmax(logits).max(-1)
    return token, prob, None


def softmax_sampling(logits: torch.Tensor, seed: torch.Tensor, step: torch.Tensor) -> Drawn:
    """The whole softmax in memory, a draw from it, and its probability."""
    probs = _sampling().softmax(logits)
    token = _sampling().sampling_from_probs(probs, seed=seed, offset=step).long()
    return token, probs.gather(-1, token[:, None])[:, 0], None


def sampling_from_logits(logits: torch.Tensor, seed: torch.Tensor, step: torch.Tensor) -> Drawn:
    """Gumbel-max over the logits: a token alone."""
    return _sampling().sampling_from_logits(logits, seed=seed, offset=step), None, None


def top_k_top_p(
    order: str,
    top_k: int,
    top_p: float,
    logits: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
) -> Drawn:
    """Rejection sampling without a sort: a token alone. It is documented for float32 logits."""
    token = _sampling().top_k_top_p_sampling_from_logits(
        logits.float(), top_k, top_p, filter_apply_order=order, seed=seed, offset=step
    )
    return token, None, None
