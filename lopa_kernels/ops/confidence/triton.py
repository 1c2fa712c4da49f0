"""The vocabulary pass in Triton.

Two launches. `_scan_kernel` reduces tiles of 2048 tokens, one warp a tile, to their maximum and
their sums relative to it; `finish_kernel` merges the tiles of a row, and where filters are set or a
token is drawn reads again what little of the row that takes. What a tile gives depends on its
values alone, and a row is merged in one order: results do not depend on the grid, on the other rows
or on alignment.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lopa_kernels._dispatch import implements_triton
from lopa_kernels._triton import (
    MAX_INT32,
    check_at_least,
    check_device,
    check_dtype,
    check_floating,
    check_tensor,
    dependent,
    fail,
    on_device,
)
from lopa_kernels.ops.confidence import METRICS
from lopa_kernels.ops.confidence.triton_filter import GROUP, SMALLEST_EXPONENT, sanitized
from lopa_kernels.ops.confidence.triton_merge import (
    EVERYTHING,
    FINITE,
    MARGIN,
    NAN,
    NEG_ENTROPY,
    PROB,
    TILE,
    finish_kernel,
    listed_row,
    offset_of,
)

__all__ = ["check_vocabulary", "device_of", "layout", "pairwise_sum", "vocabulary_statistics"]

# The careful way through a tile goes in steps of this.
_STEP = tl.constexpr(256)
_INF = tl.constexpr(float("inf"))

_FLOAT32 = torch.finfo(torch.float32)

_METRICS = {
    "prob": PROB.value,
    "margin": MARGIN.value,
    "neg_entropy": NEG_ENTROPY.value,
    "everything": EVERYTHING.value,
}

# Programs a multiprocessor. The scan's are as many as run at a time, times some waves, so that they
# even out; but where the device knows how long the list is, most may find nothing to do.
_SCAN_PROGRAMS = 20
_SCAN_WAVES = 4
_FINISH_PROGRAMS = 16
_FINISH_WARPS = 4
_FILTER_PROGRAMS = 4
_FILTER_WARPS = 8


@triton.jit
def pairwise_sum(v: tl.tensor, HALVINGS: tl.constexpr) -> tl.tensor:
    """Sum of 256 * 2^HALVINGS numbers in pairs: in one order, whatever layout the compiler chooses.

    It chooses by the alignment of the logits. In the layout of aligned ones a lane has vectors of
    up to eight neighbours, so that all but the last five steps stay in its registers.
    """
    for _ in tl.static_range(HALVINGS):
        v = tl.sum(tl.reshape(v, [2, v.shape[0] // 2]), axis=0)
    v = tl.reshape(v, [32, 8])
    for _ in tl.static_range(3):
        v = tl.sum(tl.reshape(v, [32, 2, v.shape[1] // 2]), axis=1)
    v = tl.reshape(v, [32])
    for _ in tl.static_range(5):
        v = tl.sum(tl.reshape(v, [2, v.shape[0] // 2]), axis=0)
    return tl.sum(v)


# Sizes make no kernels of their own.
@triton.jit(do_not_specialize=["vocab", "tiles", "capacity", "table_rows"])
def _scan_kernel(
    logits: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    weighted_sums: tl.tensor,
    marks: tl.tensor,
    group_maxima: tl.tensor,
    rows: tl.tensor,
    count: tl.tensor,
    sizes: tl.tensor,
    strides: tl.tensor,
    row_sizes: tl.tensor,
    row_strides: tl.tensor,
    vocab: tl.tensor,
    tiles: tl.tensor,
    capacity: tl.tensor,
    table_rows: tl.tensor,
    scale: tl.tensor,
    BY_ROW: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """Of every tile of the listed rows: maximum, sum of w = 2^t, of w * t, and its marks.

    t = (x - maximum) * scale. A clean, whole tile is read once and kept in registers. Whatever is
    wrong with a tile makes its sum NaN, and it is done again with care.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    listed = capacity
    if count is not None:
        listed = tl.minimum(tl.load(count), capacity)
    lane = tl.arange(0, TILE)
    for item in range(tl.program_id(0), listed * tiles, tl.num_programs(0)):
        position = item // tiles
        tile = item % tiles
        row = listed_row(position, rows, row_sizes, row_strides)
        if (row >= 0) & (row < table_rows):
            begin = tile * TILE
            source = logits + (offset_of(row, sizes, strides) + begin)
            at = row.to(tl.int64) * tiles + tile if BY_ROW else tl.cast(item, tl.int64)
            groups = at * (TILE // GROUP)
            mark = FINITE
            largest = -_INF
            total = float("nan")
            weighted = 0.0
            if begin + TILE <= vocab:
                x = tl.load(source + lane).to(tl.float32)
                if group_maxima is not None:
                    in_group = tl.max(tl.reshape(x, [TILE // GROUP, GROUP]), axis=1)
                    tl.store(group_maxima + groups + tl.arange(0, TILE // GROUP), in_group)
                    largest = tl.max(in_group)
                else:
                    largest = tl.max(x)
                t = (x - largest) * scale
                if WEIGHTED:
                    t = tl.maximum(t, SMALLEST_EXPONENT, propagate_nan=tl.PropagateNan.ALL)
                weight = tl.exp2(t)
                total = pairwise_sum(weight, 3)
                if WEIGHTED:
                    weighted = pairwise_sum(weight * t, 3)
            if total != total:
                limit = vocab - begin
                nan = 0
                finite = 0
                largest = -_INF
                for first in range(0, TILE, _STEP):
                    index = first + tl.arange(0, _STEP)
                    x = tl.load(source + index, mask=index < limit, other=-float("inf"))
                    x = x.to(tl.float32)
                    nan |= tl.max((x != x).to(tl.int32))
                    finite |= tl.max((tl.abs(x) < _INF).to(tl.int32))
                    x = sanitized(x)
                    largest = tl.maximum(largest, tl.max(x))
                    if group_maxima is not None:
                        in_group = tl.max(tl.reshape(x, [_STEP // GROUP, GROUP]), axis=1)
                        place = groups + first // GROUP + tl.arange(0, _STEP // GROUP)
                        tl.store(group_maxima + place, in_group)
                mark = nan * NAN + finite * FINITE
                total = 0.0
                weighted = 0.0
                if largest > -_INF:
                    for first in range(0, TILE, _STEP):
                        index = first + tl.arange(0, _STEP)
                        x = tl.load(source + index, mask=index < limit, other=-float("inf"))
                        t = (sanitized(x.to(tl.float32)) - largest) * scale
                        t = tl.maximum(t, SMALLEST_EXPONENT)
                        weight = tl.exp2(t)
                        total += pairwise_sum(weight, 0)
                        if WEIGHTED:
                            weighted += pairwise_sum(weight * t, 0)
            tl.store(maxima + at, largest)
            tl.store(sums + at, total)
            tl.store(marks + at, tl.cast(mark, tl.uint8))
            if WEIGHTED:
                tl.store(weighted_sums + at, weighted)


class _Outputs(NamedTuple):
    """Of each listed row; `scores` are the margins where all metrics are wanted."""

    tokens: torch.Tensor
    probs: torch.Tensor
    scores: torch.Tensor
    neg_entropies: torch.Tensor | None = None
    lses: torch.Tensor | None = None
    flags: torch.Tensor | None = None


def layout(shape: torch.Size | tuple[int, ...], *strides: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Sizes (the outermost is not needed) and strides of tensors of one shape, innermost first.

    Dimensions of one element are left out, and neighbours merged that lie together in every tensor.
    """
    dimensions: list[tuple[int, ...]] = []
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if dimensions and all(
            outer == size * step for outer, step in zip(dimensions[-1][1:], steps, strict=True)
        ):
            dimensions[-1] = (dimensions[-1][0] * size, *steps)
        else:
            dimensions.append((size, *steps))
    if not dimensions:
        dimensions.append((1,) * (1 + len(strides)))
    sizes, *steps = zip(*reversed(dimensions), strict=True)
    return [sizes[:-1], *steps]


class _Device(NamedTuple):
    multiprocessors: int
    dependent: bool  # programmatic dependent launch


@functools.cache
def device_of(device: torch.device) -> _Device:
    multiprocessors = 1
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    elif device.type == "xpu":
        multiprocessors = torch.xpu.get_device_properties(device).max_compute_units
    return _Device(multiprocessors, dependent(device))


@functools.lru_cache
def _check_options(
    op: str, metric: str, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if metric not in METRICS:
        fail(op, "metric", f"one of {', '.join(METRICS)}", metric)
    if not 0 <= temperature < math.inf:
        fail(op, "temperature", "a finite number >= 0", f"{temperature:g}")
    if top_k is not None:
        check_at_least(op, "top_k", top_k, 1)
    if top_p is not None and not 0 < top_p <= 1:
        fail(op, "top_p", "a number in (0, 1]", f"{top_p:g}")


def check_vocabulary(
    op: str,
    device: torch.device,
    logits: torch.Tensor,
    rows: torch.Tensor | None,
    seed: torch.Tensor | None,
    step: torch.Tensor | None,
    metric: str,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    """Raises RuntimeError for what the kernels cannot work on."""
    if rows is not None:
        check_device(op, "rows", rows, device)
        check_dtype(op, "rows", rows, torch.int32)
    check_device(op, "logits", logits, device)
    check_floating(op, "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] < 1:
        fail(op, "logits", "shape [..., V] with V >= 1", f"shape {list(logits.shape)}")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        fail(op, "logits", "unit stride in the last dimension", f"stride {logits.stride(-1)}")
    _check_options(op, metric, temperature, top_k, top_p)
    if temperature > 0 and seed is None:
        fail(op, "seed", "an int64 tensor, since temperature > 0", "None")
    for name, tensor in (("seed", seed), ("step", step)):
        if tensor is not None:
            check_device(op, name, tensor, device)
            check_dtype(op, name, tensor, torch.int64)
            if tensor.numel() != 1:
                fail(op, name, "one element", f"shape {list(tensor.shape)}")


def _run(
    op: str,
    logits: torch.Tensor,
    rows: torch.Tensor | None,
    count: torch.Tensor | None,
    seed: torch.Tensor | None,
    step: torch.Tensor | None,
    metric: str,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    out: _Outputs,
) -> None:
    """Evaluates the rows of the list into `out`, of the shape of the list."""
    vocab = logits.shape[-1]
    table_rows = math.prod(logits.shape[:-1])
    capacity = out.tokens.numel()
    if capacity == 0:
        return
    tiles = triton.cdiv(vocab, TILE.value)
    if max(vocab, table_rows, capacity * tiles) > MAX_INT32:
        expected = f"less than 2^31 rows times tiles of {TILE.value} tokens"
        fail(op, "logits", expected, f"shape {list(logits.shape)} and {capacity} rows")
    greedy_limit = vocab if top_k is None else min(top_k, vocab)
    nucleus = top_p is not None and top_p < 1
    filtered = nucleus or greedy_limit < vocab
    weighted = metric in ("neg_entropy", "everything") and not filtered
    by_row = table_rows < capacity
    slots = min(capacity, table_rows)
    padded = max(16, triton.next_power_of_2(tiles))
    inverse = 1 / temperature if temperature > 0 else 1.0
    # Beyond these every weight but the maximum's is 0, or every weight is 1.
    inverse = min(max(inverse, _FLOAT32.tiny), _FLOAT32.max)
    scale = min(inverse / math.log(2), _FLOAT32.max)
    device = device_of(logits.device)
    waves = _SCAN_WAVES if count is None else 1
    scan_programs = min(capacity * tiles, _SCAN_PROGRAMS * waves * device.multiprocessors)
    per_device = _FILTER_PROGRAMS if filtered else _FINISH_PROGRAMS
    finish_programs = min(capacity, per_device * device.multiprocessors)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    maxima, sums = scratch(slots, tiles), scratch(slots, tiles)
    weighted_sums = scratch(slots, tiles) if weighted else None
    marks = scratch(slots, tiles, dtype=torch.uint8)
    groups = TILE.value // GROUP.value
    group_maxima = scratch(slots, tiles, groups) if filtered else None
    listed = scratch(finish_programs, padded, groups, dtype=torch.int32) if filtered else None
    masses = scratch(finish_programs, padded, groups) if filtered else None

    partials = (maxima, sums, weighted_sums, marks, group_maxima)
    table = layout(logits.shape[:-1], logits.stride()[:-1])
    row_list = [(), (1,)] if rows is None else layout(rows.shape, rows.stride())
    result = layout(out.tokens.shape, out.tokens.stride(), out.probs.stride(), out.scores.stride())
    # Without fused operations, so that the same arithmetic in two compilations gives the same bits.
    launch = {"enable_fp_fusion": False}
    if device.dependent:
        launch["launch_pdl"] = True
    with on_device(logits):
        _scan_kernel[(scan_programs,)](
            logits,
            *partials,
            rows,
            count,
            *table,
            *row_list,
            vocab,
            tiles,
            capacity,
            table_rows,
            scale,
            BY_ROW=by_row,
            WEIGHTED=weighted,
            DEPENDENT=device.dependent,
            num_warps=1,
            **launch,
        )
        finish_kernel[(finish_programs,)](
            logits,
            *partials,
            listed,
            masses,
            rows,
            count,
            seed if temperature > 0 else None,
            step if temperature > 0 else None,
            *out,
            *table,
            *row_list,
            *result,
            vocab,
            tiles,
            capacity,
            table_rows,
            scale,
            inverse,
            greedy_limit,
            top_p if nucleus else 1.0,
            (1 - top_p) / (4 * vocab) if top_p is not None else 0.0,
            BY_ROW=by_row,
            METRIC=_METRICS[metric],
            MARGINS=metric in ("margin", "everything"),
            SAMPLED=temperature > 0,
            FILTERED=filtered,
            TOP_P=nucleus,
            TILES=padded,
            DEPENDENT=device.dependent,
            num_warps=_FILTER_WARPS if filtered else _FINISH_WARPS,
            **launch,
        )


def vocabulary_statistics(
    op: str,
    logits: torch.Tensor,
    rows: torch.Tensor | None,
    count: torch.Tensor | None,
    capacity: int,
    seed: torch.Tensor | None,
    step: torch.Tensor | None,
    metric: str,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Statistics of a list of rows that the device made, for `op`, which has checked the arguments.

    Args:
        logits: [..., V], seen as R rows.
        rows: int32[capacity], the list; None: row i at position i.
        count: int32[1], its length, read on the device; None: `capacity`.

    Returns:
        token int64, prob fp32, score fp32 and flags uint8 (ROW_NAN, ROW_EMPTY, ROW_MISSING of
        triton_merge), all [capacity]; positions from `count` on are not written. A row outside
        [0, R) is missing: it gives (0, 0, -inf).
    """
    dtypes = (torch.int64, torch.float32, torch.float32, torch.uint8)
    token, prob, score, flags = (
        torch.empty(capacity, dtype=dtype, device=logits.device) for dtype in dtypes
    )
    out = _Outputs(token, prob, score, flags=flags)
    _run(op, logits, rows, count, seed, step, metric, temperature, top_k, top_p, out)
    return token, prob, score, flags


def _empty_outputs(
    logits: torch.Tensor, rows: torch.Tensor | None, floats: int
) -> list[torch.Tensor]:
    shape = logits.shape[:-1] if rows is None else rows.shape
    token = logits.new_empty(shape, dtype=torch.int64)
    return [token, *(logits.new_empty(shape, dtype=torch.float32) for _ in range(floats))]


@implements_triton("token_confidence")
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
    op = "token_confidence"
    check_vocabulary(op, logits.device, logits, rows, seed, step, metric, temperature, top_k, top_p)
    outputs = _empty_outputs(logits, rows, 2)
    out = _Outputs(*outputs)
    _run(op, logits, rows, None, seed, step, metric, temperature, top_k, top_p, out)
    return tuple(outputs)


@implements_triton("token_confidence_out")
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
    op = "token_confidence_out"
    check_vocabulary(op, logits.device, logits, rows, seed, step, metric, temperature, top_k, top_p)
    shape = logits.shape[:-1] if rows is None else rows.shape
    out = _Outputs(token, prob, score)
    dtypes = (torch.int64, torch.float32, torch.float32)
    for fields in zip(("token", "prob", "score"), (token, prob, score), dtypes, strict=True):
        check_tensor(op, *fields, shape, logits.device)
    _run(op, logits, rows, None, seed, step, metric, temperature, top_k, top_p, out)


@implements_triton("softmax_stats")
def _softmax_stats(
    logits: torch.Tensor,
    rows: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[torch.Tensor, ...]:
    op = "softmax_stats"
    check_vocabulary(op, logits.device, logits, rows, seed, step, "prob", temperature, top_k, top_p)
    outputs = _empty_outputs(logits, rows, 4)
    out = _Outputs(*outputs)
    _run(op, logits, rows, None, seed, step, "everything", temperature, top_k, top_p, out)
    return tuple(outputs)
