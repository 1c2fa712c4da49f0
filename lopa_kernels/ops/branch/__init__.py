"""Branch confidence, position selection and spawning: the parts of a LoPA round."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lopa_kernels import _dispatch
from lopa_kernels._checks import check_choice, check_device, check_dtype, check_rank, check_shape
from lopa_kernels._interop import accepts_dlpack
from lopa_kernels.config import REDUCTIONS, LopaConfig
from lopa_kernels.ops.branch import fake as _fake
from lopa_kernels.ops.branch import reference as _reference

__all__ = ["Selection", "Spawned", "branch_confidence", "select_positions", "spawn_branches"]

_dispatch.native("branch_confidence", "select_positions", "spawn_branches")


class Selection(NamedTuple):
    """What steps 5 and 6 of the round choose."""

    fill: torch.Tensor
    """bool [B, W]: open columns to fill with their token now."""
    columns: torch.Tensor
    """int32 [B, K - 1]: the other open columns by score, best first, -1 where there are fewer."""
    filled: torch.Tensor
    """int32 [B]: number of columns to fill."""


class Spawned(NamedTuple):
    """The next anchor (slot 0) and the lookahead branches made from it."""

    tokens: torch.Tensor
    """int64 [B, K, W]; dead slots repeat the anchor."""
    creation: torch.Tensor
    """fp32 [B, K]: score of the token that made the branch; 1 for the anchor, 0 in dead slots."""
    eos: torch.Tensor
    """bool [B, K]"""
    branches: torch.Tensor
    """int32 [B]: live slots."""


def _check(
    op: str,
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    check_dtype(op, name, tensor, dtype)
    check_shape(op, name, tensor, shape)
    check_device(op, name, tensor, device)


@accepts_dlpack
def branch_confidence(
    score: torch.Tensor,
    open: torch.Tensor,
    creation: torch.Tensor,
    *,
    branches: torch.Tensor | None = None,
    length: torch.Tensor | None = None,
    reduction: str = "mean",
    fraction: float = 1.0,
    group: int | None = None,
    alpha: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """How sure a branch is of its open columns: ``alpha * creation + (1 - alpha) * F``.

    F reduces the scores of the n open columns of a branch: "mean" (LoPA's Eq. 2); "bottom", the
    mean of the lowest ``max(1, floor(n * fraction))``; "group", the lowest mean over `group`
    consecutive open columns (the mean when n < group; DeepConf, arXiv 2508.15260); "min".
    n = 0 gives F = 1. Sums are formed in double and rounded once.

    Args:
        score: fp32 [B, K, W]; NaN counts as -inf.
        open: bool [B, K, W].
        creation: fp32 [B, K].
        branches: int32 [B], live slots; slots beyond get -inf. None: all live.
        length: int32 [B, K], window columns of the branch; columns beyond are not read, and a
            branch with an empty window gets 1. None: W.
        reduction, fraction, group, alpha: see :class:`lopa_kernels.LopaConfig`.
        backend: None for the default.

    Returns:
        fp32 [B, K].

    Raises:
        TypeError, ValueError: dtype, shape, device or range of an argument.
    """
    op = "branch_confidence"
    check_rank(op, "score", score, 3)
    batch, slots, window = score.shape
    device = score.device
    check_dtype(op, "score", score, torch.float32)
    _check(op, "open", open, torch.bool, (batch, slots, window), device)
    _check(op, "creation", creation, torch.float32, (batch, slots), device)
    if branches is not None:
        _check(op, "branches", branches, torch.int32, (batch,), device)
    if length is not None:
        _check(op, "length", length, torch.int32, (batch, slots), device)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    if not 0 < fraction <= 1:
        raise ValueError(f"{op}: fraction: expected a number in (0, 1], got {fraction!r}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"{op}: alpha: expected a number in [0, 1], got {alpha!r}")
    if group is None and reduction == "group":
        raise ValueError(f"{op}: group: expected a number of columns with reduction='group'")
    if group is not None and group < 1:
        raise ValueError(f"{op}: group: expected at least 1, got {group!r}")
    run = _dispatch.implementation(op, device.type, backend)
    return run(score, open, creation, branches, length, reduction, fraction, group, alpha)


@accepts_dlpack
def select_positions(
    token: torch.Tensor,
    prob: torch.Tensor,
    score: torch.Tensor,
    tokens: torch.Tensor,
    length: torch.Tensor,
    cache_len: torch.Tensor,
    prompt_len: torch.Tensor,
    config: LopaConfig,
    *,
    lookahead: int | None = None,
    backend: str | None = None,
) -> Selection:
    """Which open columns of a window are filled, and the ranking of the others.

    Block by block: columns whose accept value is above ``tau_conf``; where a block has none, its
    column of highest score if the block is activated (``fallback="block"``), or the window's best
    if no block has any (``"window"``). The other open columns are ranked by score, ties to the
    lowest column. A column that predicts ``mask_id`` is neither filled nor ranked.

    Args:
        token: int64 [B, W], predicted token of each column (shifted models: of that column).
        prob, score: fp32 [B, W], its statistics.
        tokens: int64 [B, W], the window.
        length: int32 [B], valid columns.
        cache_len, prompt_len: int32 [B].
        config: thresholds and block structure.
        lookahead: number of ranked columns; None: ``config.branches - 1``.
        backend: None for the default.

    Raises:
        TypeError, ValueError: dtype, shape, device or range of an argument.

    Source: LoPA, arXiv 2512.16229, Algorithm 1 and Eq. 1; D2F, arXiv 2508.09192.
    """
    op = "select_positions"
    check_rank(op, "tokens", tokens, 2)
    batch, window = tokens.shape
    device = tokens.device
    check_dtype(op, "tokens", tokens, torch.int64)
    _check(op, "token", token, torch.int64, (batch, window), device)
    _check(op, "prob", prob, torch.float32, (batch, window), device)
    _check(op, "score", score, torch.float32, (batch, window), device)
    for name, value in (("length", length), ("cache_len", cache_len), ("prompt_len", prompt_len)):
        _check(op, name, value, torch.int32, (batch,), device)
    if lookahead is None:
        if config.branches is None:
            raise ValueError(f"{op}: lookahead: expected a number, or config.branches set")
        lookahead = config.branches - 1
    if lookahead < 0:
        raise ValueError(f"{op}: lookahead: expected at least 0, got {lookahead!r}")
    run = _dispatch.implementation(op, device.type, backend)
    return Selection(
        *run(
            token,
            prob,
            score,
            tokens,
            length,
            cache_len,
            prompt_len,
            lookahead,
            config.tau_conf,
            config.tau_act,
            config.block_size,
            config.mask_id,
            config.accept,
            config.fallback,
        )
    )


@accepts_dlpack
def spawn_branches(
    tokens: torch.Tensor,
    eos: torch.Tensor,
    token: torch.Tensor,
    score: torch.Tensor,
    columns: torch.Tensor,
    *,
    eos_id: int | None = None,
    backend: str | None = None,
) -> Spawned:
    """Lookahead branches: the anchor plus one more token each (step 6 of the round).

    Args:
        tokens: int64 [B, W], the next anchor's window.
        eos: bool [B], an EOS has been filled in it.
        token: int64 [B, W], predicted tokens.
        score: fp32 [B, W], their scores.
        columns: int32 [B, K - 1], from :func:`select_positions`; the first -1 ends the list.
        eos_id: None for none.
        backend: None for the default.

    Raises:
        TypeError, ValueError: dtype, shape or device of an argument.
        RuntimeError: a column outside [-1, W), on the CPU.
    """
    op = "spawn_branches"
    check_rank(op, "tokens", tokens, 2)
    check_rank(op, "columns", columns, 2)
    batch, window = tokens.shape
    device = tokens.device
    check_dtype(op, "tokens", tokens, torch.int64)
    _check(op, "eos", eos, torch.bool, (batch,), device)
    _check(op, "token", token, torch.int64, (batch, window), device)
    _check(op, "score", score, torch.float32, (batch, window), device)
    _check(op, "columns", columns, torch.int32, (batch, columns.shape[1]), device)
    run = _dispatch.implementation(op, device.type, backend)
    return Spawned(*run(tokens, eos, token, score, columns, -1 if eos_id is None else eos_id))
