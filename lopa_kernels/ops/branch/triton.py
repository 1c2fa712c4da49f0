"""The branch room in Triton, and the device functions that a round shares with it.

A window is worked on as a tile of its blocks (:func:`block_columns`), so that what the rules ask of
a block is a reduction. Columns run along the first dimension of a tile, branches or blocks along
the second: for indirect loads too the compiler then gives neighbouring columns to the lanes of a
warp, and one layout serves all. Integers that only say how large something is, and switches, are
arguments; constants of the compilation are the sizes of tiles, so that states of many shapes share
few kernels.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from typing import Any

import torch
import triton
import triton.language as tl

from lopa_kernels._dispatch import implements_triton
from lopa_kernels._triton import (
    MAX_WINDOW,
    check_at_least,
    check_share,
    check_tensor,
    fail,
    launch_options,
    on_device,
    power_of_two,
)
from lopa_kernels.config import ACCEPTS, FALLBACKS, REDUCTIONS

# Above every column, and below the key of every score.
NO_COLUMN = tl.constexpr(2**31 - 1)
LOWEST_KEY = tl.constexpr(-(2**31))

BOTTOM = tl.constexpr(REDUCTIONS.index("bottom"))
GROUP = tl.constexpr(REDUCTIONS.index("group"))
MIN = tl.constexpr(REDUCTIONS.index("min"))


@triton.jit
def begin(DEPENDENT: tl.constexpr) -> None:
    """Waits for the kernels before this one, if it was launched before they ended."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def rankable(score: tl.tensor) -> Any:
    """NaN ranks below every number."""
    return tl.where(score == score, score, float("-inf"))


@triton.jit
def score_key(score: tl.tensor) -> Any:
    """int32 in the order of the scores: NaN is -inf, and -0 equals +0."""
    value = rankable(score)
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_score(key: tl.tensor) -> Any:
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def as_double(bits: tl.tensor) -> Any:
    """A double that came as its bits: Triton passes Python floats in single precision."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def reduce_scores(
    score: tl.tensor,
    is_open: tl.tensor,
    scratch: tl.tensor,
    group: tl.tensor,
    fraction: tl.tensor,
    REDUCTION: tl.constexpr,
) -> Any:
    """F of each branch of a tile [columns, branches], in double; `score` rankable.

    `scratch` points to a row of fp32 for each branch, used by "group".
    """
    n = tl.sum(is_open.to(tl.int32), 0)
    divisor = tl.maximum(n, 1).to(tl.float64)
    lowest = tl.min(tl.where(is_open, score, float("inf")), 0)
    reduced = lowest.to(tl.float64)
    if REDUCTION != MIN:
        reduced = tl.sum(tl.where(is_open, score, 0.0).to(tl.float64), 0) / divisor
    if REDUCTION == BOTTOM:
        m = (n.to(tl.float64) * fraction).to(tl.int32)
        m = tl.maximum(tl.minimum(m, n), 1)
        # The key of the m-th lowest score, bit by bit: the largest with fewer than m below it.
        key = tl.where(is_open, score_key(score), NO_COLUMN)
        below = tl.sum((key < 0).to(tl.int32), 0)
        bound = tl.where(below < m, 0, LOWEST_KEY)
        for i in range(31):
            higher = bound + (1 << (30 - i))
            below = tl.sum((key < higher[None, :]).to(tl.int32), 0)
            bound = tl.where(below < m, higher, bound)
        is_below = key < bound[None, :]
        equal = m - tl.sum(is_below.to(tl.int32), 0)
        total = tl.sum(tl.where(is_below, score, 0.0).to(tl.float64), 0)
        total += equal.to(tl.float64) * key_score(bound).to(tl.float64)
        reduced = total / m.to(tl.float64)
    if REDUCTION == GROUP:
        # One after another, as the rolling sum's rounding is part of the result.
        at = tl.cumsum(is_open.to(tl.int32), 0) - 1
        tl.store(scratch[None, :] + at, score, is_open)
        tl.debug_barrier()
        rolling = tl.zeros_like(reduced)
        least = tl.zeros_like(reduced)
        for i in range(tl.max(n, 0)):
            past = tl.zeros_like(n) + i - group
            entering = tl.load(scratch + i, i < n, 0.0).to(tl.float64)
            leaving = tl.load(scratch + past, (past >= 0) & (i < n), 0.0).to(tl.float64)
            rolling += entering - leaving
            least = tl.where((past < 0) | (rolling < least), rolling, least)
        reduced = tl.where(n < group, reduced, least / group.to(tl.float64))
    # A -inf lies in some group and in every bottom share, and would turn sums into NaN.
    reduced = tl.where(lowest == float("-inf"), float("-inf"), reduced)
    return tl.where(n == 0, 1.0, reduced)


@triton.jit
def blend(creation: tl.tensor, reduced: tl.tensor, alpha: tl.tensor) -> Any:
    """C = alpha * creation + (1 - alpha) * F; a term of weight 0 is left out, infinite or not."""
    other = rankable(creation).to(tl.float64)
    mixed = alpha * other + (1.0 - alpha) * reduced
    return tl.where(alpha <= 0.0, reduced, tl.where(alpha >= 1.0, other, mixed)).to(tl.float32)


@triton.jit
def block_columns(
    offset: tl.tensor,
    block_size: tl.tensor,
    window: tl.tensor,
    BLOCKS: tl.constexpr,
    SPAN: tl.constexpr,
) -> Any:
    """Columns of a window as a tile of its blocks [SPAN, BLOCKS].

    Column c is generated position c + offset. Of the blocks that the tile holds, the first and the
    last may lie outside the window; beyond a block are some columns of the next. A window narrower
    than a block is in two blocks at most, which then begin where they meet.

    Returns:
        The columns; how many a block has in the tile; and which elements are those.
    """
    phase = (offset % block_size).to(tl.int32)
    phase = tl.where(phase < 0, phase + block_size, phase)
    span = tl.minimum(block_size, window)
    phase = tl.where(block_size > window, tl.maximum(window - block_size + phase, 0), phase)
    at = tl.arange(0, SPAN)[:, None]
    block = tl.arange(0, BLOCKS)[None, :]
    return block * span - phase + at, span, (at < span) & (block >= 0)


@triton.jit
def fill_columns(
    column: tl.tensor,
    is_open: tl.tensor,
    open_before: tl.tensor,
    token: tl.tensor,
    prob: tl.tensor,
    score: tl.tensor,
    block_size: tl.tensor,
    act_count: tl.tensor,
    mask_id: tl.tensor,
    tau_conf: tl.tensor,
    by_score: tl.tensor,
    by_window: tl.tensor,
) -> Any:
    """Step 5 of the round on a tile of blocks: the columns to fill, and the keys of the others.

    `open_before` marks the open columns of the block before each. A column that is filled or cannot
    be has the lowest key.
    """
    # A prediction of the mask itself, or of no token, fills nothing.
    fillable = is_open & (token >= 0) & (token != mask_id)
    key = tl.where(fillable, score_key(score), LOWEST_KEY)
    accepted = fillable & (tl.where(by_score != 0, score, prob) > tau_conf)
    accepts = tl.max(accepted.to(tl.int32), 0)
    activated = block_size - tl.sum(open_before.to(tl.int32), 0) >= act_count
    best_key = tl.max(key, 0)
    best = tl.min(tl.where(fillable & (key == best_key[None, :]), column, NO_COLUMN), 0)
    forced = tl.where((accepts == 0) & activated, best, NO_COLUMN)
    if by_window != 0:
        top = tl.min(tl.where(best_key == tl.max(best_key, 0), best, NO_COLUMN), 0)
        forced = tl.where((best == top) & (tl.max(accepts, 0) == 0), best, NO_COLUMN)
    fill = accepted | (column == forced[None, :])
    return fill, tl.where(fill, LOWEST_KEY, key)


@triton.jit
def lookahead_slots(column: tl.tensor, key: tl.tensor, count: tl.tensor) -> Any:
    """Step 6: slot 1..count of the best columns by key, ties to the lowest column; -1 elsewhere.

    At least `count` keys are above the lowest.
    """
    slot = tl.full(column.shape, -1, tl.int32)
    for k in range(1, count + 1):
        top = tl.max(key)
        best = (key == top) & (column == tl.min(tl.where(key == top, column, NO_COLUMN)))
        slot = tl.where(best, k, slot)
        key = tl.where(best, LOWEST_KEY, key)
    return slot


@triton.jit(do_not_specialize=["slots", "window", "group", "fraction_bits", "alpha_bits"])
def _branch_confidence_kernel(
    score: tl.tensor,
    opened: tl.tensor,
    creation: tl.tensor,
    branches: tl.tensor,
    length: tl.tensor,
    out: tl.tensor,
    scratch: tl.tensor,
    slots: tl.int32,
    window: tl.int32,
    group: tl.int32,
    fraction_bits: tl.int64,
    alpha_bits: tl.int64,
    HAS_BRANCHES: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    REDUCTION: tl.constexpr,
    WINDOW: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    begin(DEPENDENT)
    i = tl.program_id(0).to(tl.int64)
    columns = window
    if HAS_LENGTH:
        columns = tl.minimum(tl.load(length + i), window)
    at = i * window + tl.arange(0, WINDOW)[:, None]
    inside = tl.arange(0, WINDOW)[:, None] < columns
    is_open = tl.load(opened + at, inside, 0) != 0
    value = rankable(tl.load(score + at, is_open, 0.0))
    row = i * window + tl.arange(0, 1)
    fraction = as_double(fraction_bits)
    reduced = reduce_scores(value, is_open, scratch + row, group, fraction, REDUCTION)
    confidence = blend(tl.load(creation + i), reduced, as_double(alpha_bits))
    confidence = tl.where(columns <= 0, 1.0, confidence)
    if HAS_BRANCHES:
        live = i % slots < tl.load(branches + i // slots)
        confidence = tl.where(live, confidence, float("-inf"))
    tl.store(out + i + tl.arange(0, 1), confidence)


@triton.jit(
    do_not_specialize=[
        "window",
        "lookahead",
        "block_size",
        "act_count",
        "mask_id",
        "tau_conf",
        "by_score",
        "by_window",
    ]
)
def _select_positions_kernel(
    token: tl.tensor,
    prob: tl.tensor,
    score: tl.tensor,
    tokens: tl.tensor,
    length: tl.tensor,
    cache_len: tl.tensor,
    prompt_len: tl.tensor,
    fill_out: tl.tensor,
    columns_out: tl.tensor,
    filled_out: tl.tensor,
    window: tl.int32,
    lookahead: tl.int32,
    block_size: tl.int32,
    act_count: tl.int32,
    mask_id: tl.int64,
    tau_conf: tl.tensor,
    by_score: tl.int32,
    by_window: tl.int32,
    BLOCKS: tl.constexpr,
    SPAN: tl.constexpr,
    LOOKAHEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    begin(DEPENDENT)
    b = tl.program_id(0).to(tl.int64)
    columns = tl.load(length + b)
    # The CPU raises; here such a sequence selects nothing.
    columns = tl.where((columns < 0) | (columns > window), 0, columns)
    offset = tl.load(cache_len + b).to(tl.int64) - tl.load(prompt_len + b).to(tl.int64)
    first = tl.maximum(-offset, 0)
    column, span, in_block = block_columns(offset, block_size, window, BLOCKS, SPAN)
    before = column - span
    at = b * window + column
    inside = in_block & (column >= 0) & (column < window)
    generated = inside & (column >= first) & (column < columns)
    is_open = generated & (tl.load(tokens + at, generated, 0) == mask_id)
    has_before = in_block & (before >= first) & (before < columns)
    open_before = has_before & (tl.load(tokens + at - span, has_before, 0) == mask_id)
    own_token = tl.load(token + at, is_open, 0)
    own_prob = tl.load(prob + at, is_open, 0.0)
    own_score = tl.load(score + at, is_open, 0.0)
    fill, key = fill_columns(
        column,
        is_open,
        open_before,
        own_token,
        own_prob,
        own_score,
        block_size,
        act_count,
        mask_id,
        tau_conf,
        by_score,
        by_window,
    )
    ranked = tl.minimum(tl.sum((key > LOWEST_KEY).to(tl.int32)), lookahead)
    slot = lookahead_slots(column, key, ranked)
    tl.store(fill_out + at, fill, inside)
    tl.store(filled_out + b, tl.sum(fill.to(tl.int32)))
    tl.store(columns_out + b * lookahead + slot - 1, column, slot > 0)
    rank = tl.arange(0, LOOKAHEAD)
    none = (rank >= ranked) & (rank < lookahead)
    tl.store(columns_out + b * lookahead + rank, tl.full([LOOKAHEAD], -1, tl.int32), none)


@triton.jit(do_not_specialize=["slots", "window", "eos_id"])
def _spawn_branches_kernel(
    tokens: tl.tensor,
    eos: tl.tensor,
    token: tl.tensor,
    score: tl.tensor,
    columns: tl.tensor,
    out_tokens: tl.tensor,
    out_creation: tl.tensor,
    out_eos: tl.tensor,
    out_branches: tl.tensor,
    slots: tl.int32,
    window: tl.int32,
    eos_id: tl.int64,
    WINDOW: tl.constexpr,
    LOOKAHEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    begin(DEPENDENT)
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1)
    rank = tl.arange(0, LOOKAHEAD)
    listed = tl.load(columns + b * (slots - 1) + rank, rank < slots - 1, -1)
    # The first -1 ends the ranking: live slots are contiguous. The CPU raises on a column beyond
    # the window, which here ends it too.
    ends = (listed < 0) | (listed >= window)
    live = 1 + tl.min(tl.where(ends, tl.minimum(rank, slots - 1), slots - 1), 0)
    spawned = (k > 0) & (k < live)
    column = tl.load(columns + b * (slots - 1) + k - 1, spawned, -1)
    own_token = tl.load(token + b * window + column, spawned, 0)
    creation = tl.load(score + b * window + column, spawned, 0.0)
    has_eos = tl.load(eos + b) != 0
    at = tl.arange(0, WINDOW)
    window_tokens = tl.load(tokens + b * window + at, at < window, 0)
    window_tokens = tl.where(at == column, own_token, window_tokens)
    row = b * slots + k
    tl.store(out_tokens + row * window + at, window_tokens, at < window)
    tl.store(out_creation + row, tl.where(k == 0, 1.0, creation))
    is_eos = (eos_id >= 0) & (own_token == eos_id)
    tl.store(out_eos + row, (has_eos & (k < live)) | (is_eos & spawned))
    tl.store(out_branches + b, live, k == 0)


def block_tile(block_size: int, window: int) -> tuple[int, int]:
    """BLOCKS and SPAN of :func:`block_columns`, for any position of the blocks."""
    span = max(min(block_size, window), 1)
    return power_of_two(-(-(window + span - 1) // span)), power_of_two(span)


def double_bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def single(value: float) -> float:
    """Rounded to single precision, beyond its range to infinity."""
    return ctypes.c_float(value).value


def least_count(share: float, block_size: int) -> int:
    """The least n with n / block_size >= share, in double as everywhere."""
    n = max(int(share * block_size) - 1, 0)
    while n <= block_size and n / block_size < share:
        n += 1
    return n


def reduction_code(reduction: str, fraction: float) -> int:
    # All of the lowest scores are all scores.
    return REDUCTIONS.index("mean" if reduction == "bottom" and fraction >= 1.0 else reduction)


def check_window(op: str, name: str, columns: int) -> None:
    if columns > MAX_WINDOW:
        fail(op, name, f"at most {MAX_WINDOW} columns", columns)


@functools.lru_cache
def check_reduction(
    op: str, reduction: str, fraction: float, group: int | None, alpha: float
) -> None:
    if reduction not in REDUCTIONS:
        fail(op, "reduction", "mean, bottom, group or min", reduction)
    if reduction == "group" and group is None:
        fail(op, "group", "a number of columns with reduction=group", "none")
    if not 0.0 < fraction <= 1.0:
        fail(op, "fraction", "a number in (0, 1]", f"{fraction:g}")
    if group is not None:
        check_at_least(op, "group", group, 1)
    check_share(op, "alpha", alpha)


@functools.lru_cache
def check_selection(
    op: str, tau_conf: float, tau_act: float, block_size: int, accept: str, fallback: str
) -> None:
    check_at_least(op, "block_size", block_size, 1)
    check_share(op, "tau_act", tau_act)
    if math.isnan(tau_conf):
        fail(op, "tau_conf", "a number", "NaN")
    if accept not in ACCEPTS:
        fail(op, "accept", "prob or score", accept)
    if fallback not in FALLBACKS:
        fail(op, "fallback", "block or window", fallback)


@implements_triton("branch_confidence")
def branch_confidence(
    score: torch.Tensor,
    open: torch.Tensor,
    creation: torch.Tensor,
    branches: torch.Tensor | None = None,
    length: torch.Tensor | None = None,
    reduction: str = "mean",
    fraction: float = 1.0,
    group: int | None = None,
    alpha: float = 0.0,
) -> torch.Tensor:
    op = "branch_confidence"
    check_reduction(op, reduction, fraction, group, alpha)
    if score.dim() != 3:
        fail(op, "score", "shape [B, K, W]", list(score.shape))
    batch, slots, window = score.shape
    device = score.device
    check_tensor(op, "score", score, torch.float32, (batch, slots, window), device)
    check_tensor(op, "open", open, torch.bool, (batch, slots, window), device)
    check_tensor(op, "creation", creation, torch.float32, (batch, slots), device)
    if branches is not None:
        check_tensor(op, "branches", branches, torch.int32, (batch,), device)
    if length is not None:
        check_tensor(op, "length", length, torch.int32, (batch, slots), device)
    check_window(op, "score", window)
    score, open, creation = score.contiguous(), open.contiguous(), creation.contiguous()
    out = torch.empty_like(creation)
    if out.numel() == 0:
        return out
    scratch = torch.empty_like(score) if reduction == "group" else out
    columns = power_of_two(window)
    with on_device(score):
        _branch_confidence_kernel[(batch * slots,)](
            score,
            open,
            creation,
            out if branches is None else branches.contiguous(),
            out if length is None else length.contiguous(),
            out,
            scratch,
            slots,
            window,
            group or 1,
            double_bits(fraction),
            double_bits(alpha),
            HAS_BRANCHES=branches is not None,
            HAS_LENGTH=length is not None,
            REDUCTION=reduction_code(reduction, fraction),
            WINDOW=columns,
            enable_fp_fusion=False,
            **launch_options(device, columns),
        )
    return out


@implements_triton("select_positions")
def select_positions(
    token: torch.Tensor,
    prob: torch.Tensor,
    score: torch.Tensor,
    tokens: torch.Tensor,
    length: torch.Tensor,
    cache_len: torch.Tensor,
    prompt_len: torch.Tensor,
    lookahead: int,
    tau_conf: float,
    tau_act: float,
    block_size: int,
    mask_id: int,
    accept: str,
    fallback: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    op = "select_positions"
    if tokens.dim() != 2:
        fail(op, "tokens", "shape [B, W]", list(tokens.shape))
    batch, window = tokens.shape
    device = tokens.device
    inputs = (token, prob, score, tokens, length, cache_len, prompt_len)
    check_tensor(op, "tokens", tokens, torch.int64, (batch, window), device)
    check_tensor(op, "token", token, torch.int64, (batch, window), device)
    check_tensor(op, "prob", prob, torch.float32, (batch, window), device)
    check_tensor(op, "score", score, torch.float32, (batch, window), device)
    check_tensor(op, "length", length, torch.int32, (batch,), device)
    check_tensor(op, "cache_len", cache_len, torch.int32, (batch,), device)
    check_tensor(op, "prompt_len", prompt_len, torch.int32, (batch,), device)
    check_at_least(op, "lookahead", lookahead, 0)
    check_selection(op, tau_conf, tau_act, block_size, accept, fallback)
    check_window(op, "tokens", window)
    fill = torch.empty((batch, window), dtype=torch.bool, device=device)
    columns = torch.empty((batch, lookahead), dtype=torch.int32, device=device)
    filled = torch.empty((batch,), dtype=torch.int32, device=device)
    if batch == 0:
        return fill, columns, filled
    blocks, span = block_tile(block_size, window)
    with on_device(tokens):
        _select_positions_kernel[(batch,)](
            *(tensor.contiguous() for tensor in inputs),
            fill,
            columns,
            filled,
            window,
            lookahead,
            block_size,
            least_count(tau_act, block_size),
            mask_id,
            single(tau_conf),
            ACCEPTS.index(accept),
            FALLBACKS.index(fallback),
            BLOCKS=blocks,
            SPAN=span,
            LOOKAHEAD=power_of_two(lookahead),
            **launch_options(device, blocks * span),
        )
    return fill, columns, filled


@implements_triton("spawn_branches")
def spawn_branches(
    tokens: torch.Tensor,
    eos: torch.Tensor,
    token: torch.Tensor,
    score: torch.Tensor,
    columns: torch.Tensor,
    eos_id: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    op = "spawn_branches"
    if tokens.dim() != 2:
        fail(op, "tokens", "shape [B, W]", list(tokens.shape))
    if columns.dim() != 2:
        fail(op, "columns", "shape [B, K - 1]", list(columns.shape))
    batch, window = tokens.shape
    slots = columns.shape[1] + 1
    device = tokens.device
    inputs = (tokens, eos, token, score, columns)
    check_tensor(op, "tokens", tokens, torch.int64, (batch, window), device)
    check_tensor(op, "eos", eos, torch.bool, (batch,), device)
    check_tensor(op, "token", token, torch.int64, (batch, window), device)
    check_tensor(op, "score", score, torch.float32, (batch, window), device)
    check_tensor(op, "columns", columns, torch.int32, (batch, slots - 1), device)
    check_window(op, "tokens", window)
    out_tokens = torch.empty((batch, slots, window), dtype=torch.int64, device=device)
    creation = torch.empty((batch, slots), dtype=torch.float32, device=device)
    out_eos = torch.empty((batch, slots), dtype=torch.bool, device=device)
    branches = torch.empty((batch,), dtype=torch.int32, device=device)
    if batch > 0:
        with on_device(tokens):
            _spawn_branches_kernel[(batch, slots)](
                *(tensor.contiguous() for tensor in inputs),
                out_tokens,
                creation,
                out_eos,
                branches,
                slots,
                window,
                eos_id,
                WINDOW=power_of_two(window),
                LOOKAHEAD=power_of_two(slots - 1),
                **launch_options(device, window),
            )
    return out_tokens, creation, out_eos, branches
