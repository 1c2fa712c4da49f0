"""The vocabulary pass in Triton.

Two launches. `_scan` reduces tiles of 2048 tokens, one warp a tile, to their maximum and their sums
relative to it; `_finish` merges the tiles of a row, and where a token is drawn or filters are set
reads again what little of the row that takes. What a tile gives depends on its values alone, and a
row is merged in one order: results do not depend on the grid, the other rows or the alignment.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lopa_kernels._dispatch import implements_triton
from lopa_kernels.ops import confidence
from lopa_kernels.ops.confidence.triton_filter import GROUP, sanitized, select_kept

__all__ = ["ROW_EMPTY", "ROW_MISSING", "ROW_NAN", "vocabulary_statistics"]

#: flags of a row: a NaN among the logits, no finite logit, a row outside [0, R)
ROW_NAN, ROW_EMPTY, ROW_MISSING = 1, 2, 4

_FLOAT32 = torch.finfo(torch.float32)

_TILE = tl.constexpr(2048)
# The careful way through a tile goes in steps of this.
_STEP = tl.constexpr(256)
_INF = tl.constexpr(float("inf"))
_FLT_MAX = tl.constexpr(_FLOAT32.max)
_LN2 = tl.constexpr(math.log(2))
# Weights below it are rounded up to it: normal, and negligible beside the 1 of the maximum.
_SMALLEST_EXPONENT = tl.constexpr(-126.0)

_PROB = tl.constexpr(0)
_MARGIN = tl.constexpr(1)
_NEG_ENTROPY = tl.constexpr(2)
_ALL = tl.constexpr(3)
_METRICS = {"prob": 0, "margin": 1, "neg_entropy": 2, "all": 3}

# What `_scan` says of a tile.
_NAN = tl.constexpr(1)
_FINITE = tl.constexpr(2)

# Programs of a multiprocessor: as many as keep it busy, no more than start and find nothing to do.
_SCAN_PROGRAMS = 32
_FINISH_PROGRAMS = 16
_FINISH_WARPS = 4
_FILTER_PROGRAMS = 4
_FILTER_WARPS = 8


@triton.jit
def _offset(index: Any, sizes: Any, strides: Any) -> Any:
    """Where element `index`, in row-major order, is; dimensions are innermost first."""
    rest = index
    offset = tl.cast(index * 0, tl.int64)
    for d in tl.static_range(len(sizes) - 1):
        offset += (rest % sizes[d]).to(tl.int64) * strides[d]
        rest = rest // sizes[d]
    return offset + rest.to(tl.int64) * strides[len(sizes) - 1]


@triton.jit
def _listed_row(position: Any, rows: Any, sizes: Any, strides: Any) -> Any:
    row = position
    if rows is not None:
        row = tl.load(rows + _offset(position, sizes, strides))
    return row


@triton.jit
def _tile_sum(v: Any) -> Any:
    """Sum of a tile in pairs, in an order that does not hang on the layout the compiler chose.

    It chooses by the alignment of the logits. Of the aligned layout a lane holds vectors of eight
    tokens, 256 apart: the halving by eights, then of eights, stays in its registers.
    """
    for _ in tl.static_range(3):
        v = tl.sum(tl.reshape(v, [2, v.shape[0] // 2]), axis=0)
    v = tl.reshape(v, [v.shape[0] // 8, 8])
    for _ in tl.static_range(3):
        v = tl.sum(tl.reshape(v, [v.shape[0], 2, v.shape[1] // 2]), axis=1)
    v = tl.reshape(v, [v.shape[0]])
    for _ in tl.static_range(5):
        v = tl.sum(tl.reshape(v, [2, v.shape[0] // 2]), axis=0)
    return tl.sum(v)


# Sizes that change from call to call make no kernels of their own; nor does the vocabulary, whose
# divisors would decide how the last tile is read, and with that the order of its sum.
_SIZES = ["vocab", "tiles", "capacity", "table_rows", "top_k"]


@triton.jit(do_not_specialize=_SIZES[:-1])
def _scan(
    logits: Any,
    maxima: Any,
    sums: Any,
    weighted_sums: Any,
    marks: Any,
    group_maxima: Any,
    rows: Any,
    count: Any,
    sizes: Any,
    strides: Any,
    row_sizes: Any,
    row_strides: Any,
    vocab: Any,
    tiles: Any,
    capacity: Any,
    table_rows: Any,
    scale: Any,
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
    lane = tl.arange(0, _TILE)
    for item in range(tl.program_id(0), listed * tiles, tl.num_programs(0)):
        position = item // tiles
        tile = item % tiles
        row = _listed_row(position, rows, row_sizes, row_strides)
        if (row >= 0) & (row < table_rows):
            begin = tile * _TILE
            source = logits + (_offset(row, sizes, strides) + begin)
            if BY_ROW:
                at = row.to(tl.int64) * tiles + tile
            else:
                at = tl.cast(item, tl.int64)
            groups = at * (_TILE // GROUP)
            mark = 2
            largest = -_INF
            total = float("nan")
            weighted = 0.0
            if begin + _TILE <= vocab:
                x = tl.load(source + lane).to(tl.float32)
                if group_maxima is not None:
                    in_group = tl.max(tl.reshape(x, [_TILE // GROUP, GROUP]), axis=1)
                    tl.store(group_maxima + groups + tl.arange(0, _TILE // GROUP), in_group)
                    largest = tl.max(in_group)
                else:
                    largest = tl.max(x)
                t = (x - largest) * scale
                if WEIGHTED:
                    t = tl.maximum(t, _SMALLEST_EXPONENT, propagate_nan=tl.PropagateNan.ALL)
                weight = tl.exp2(t)
                total = _tile_sum(weight)
                if WEIGHTED:
                    weighted = _tile_sum(weight * t)
            if total != total:
                limit = vocab - begin
                nan = 0
                finite = 0
                largest = -_INF
                for first in range(0, _TILE, _STEP):
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
                mark = nan * _NAN + finite * _FINITE
                total = 0.0
                weighted = 0.0
                if largest > -_INF:
                    for first in range(0, _TILE, _STEP):
                        index = first + tl.arange(0, _STEP)
                        x = tl.load(source + index, mask=index < limit, other=-float("inf"))
                        t = (sanitized(x.to(tl.float32)) - largest) * scale
                        t = tl.maximum(t, _SMALLEST_EXPONENT)
                        weight = tl.exp2(t)
                        total += tl.sum(weight)
                        if WEIGHTED:
                            weighted += tl.sum(weight * t)
            tl.store(maxima + at, largest)
            tl.store(sums + at, total)
            tl.store(marks + at, mark.to(tl.uint8))
            if WEIGHTED:
                tl.store(weighted_sums + at, weighted)


@triton.jit
def _gumbel(word: Any) -> Any:
    """The Gumbel number -log(-log(1 - v)), v = (word + 1/2) / 2^32, in fp32.

    In the lower half log(1 - v) is made good for what rounding takes from 1 - v (W. Kahan's
    log1p); in the upper half 1 - v comes from the complement of the word.
    """
    low = word < 0x80000000
    v = (tl.where(low, word, 0xFFFFFFFF - word).to(tl.float32) + 0.5) * 2.0**-32
    u = 1.0 - v
    corrected = tl.where(u == 1.0, v, tl.log(u) * v / (u - 1.0))
    return -tl.log(tl.where(low, corrected, -tl.log(v)))


@triton.jit
def _gumbels(first_group: Any, row: Any, seed: Any, step: Any, N: tl.constexpr) -> Any:
    """The N numbers of the Philox groups from `first_group` on, in a row's stream."""
    group = tl.arange(0, N // 4).to(tl.uint32) + first_group
    zero = tl.zeros_like(group)
    low = zero + (step & 0xFFFFFFFF).to(tl.uint32)
    high = zero + ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, group, zero + row.to(tl.uint32), low, high)
    return _gumbel(tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [N]))


@triton.jit
def _first(hits: Any, index: Any) -> Any:
    """The lowest index of a hit."""
    return tl.min(tl.where(hits, index, 0x7FFFFFFF))


@triton.jit
def _expm1(y: Any) -> Any:
    """e^y - 1, y <= 0; the quotient takes back what rounding e^y did (W. Kahan)."""
    u = tl.exp(y)
    near = tl.where(u == 1.0, y, (u - 1.0) * y / tl.log(tl.maximum(u, 1e-30)))
    return tl.where(y < -1.0, u - 1.0, near)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["logits", "strides"])
def _finish(
    logits: Any,
    maxima: Any,
    sums: Any,
    weighted_sums: Any,
    marks: Any,
    group_maxima: Any,
    listed_groups: Any,
    group_masses: Any,
    rows: Any,
    count: Any,
    seed: Any,
    step: Any,
    tokens: Any,
    probs: Any,
    scores: Any,
    neg_entropies: Any,
    lses: Any,
    flags: Any,
    sizes: Any,
    strides: Any,
    row_sizes: Any,
    row_strides: Any,
    out_sizes: Any,
    token_strides: Any,
    prob_strides: Any,
    score_strides: Any,
    vocab: Any,
    tiles: Any,
    capacity: Any,
    table_rows: Any,
    scale: Any,
    inverse_temperature: Any,
    top_k: Any,
    top_p: Any,
    tail: Any,
    BY_ROW: tl.constexpr,
    METRIC: tl.constexpr,
    SAMPLED: tl.constexpr,
    FILTERED: tl.constexpr,
    TOP_P: tl.constexpr,
    TILES: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """The listed rows, from their tiles to their outputs."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    listed = capacity
    if count is not None:
        listed = tl.minimum(tl.load(count), capacity)
    GROUPS: tl.constexpr = TILES * (_TILE // GROUP)
    program = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    lane = tl.arange(0, _TILE)
    for item in range(tl.program_id(0), listed, tl.num_programs(0)):
        position = tl.cast(item, tl.int32)
        row = _listed_row(position, rows, row_sizes, row_strides)
        token = 0
        prob = 0.0
        margin = 0.0
        neg_entropy = -_INF
        lse = -_INF
        score = -_INF
        flag = 4
        if (row >= 0) & (row < table_rows):
            source = logits + _offset(row, sizes, strides)
            at = (row if BY_ROW else position).to(tl.int64) * tiles
            live = tile < tiles
            tile_largest = tl.load(maxima + at + tile, mask=live, other=-float("inf"))
            tile_total = tl.load(sums + at + tile, mask=live, other=0.0)
            mark = tl.load(marks + at + tile, mask=live, other=0).to(tl.int32)
            nan = tl.max(mark & _NAN)
            finite = tl.max(mark & _FINITE)
            flag = nan + tl.where(finite > 0, 0, 2)
            if finite > 0:
                largest = tl.max(tile_largest)
                shift = tl.maximum((tile_largest - largest) * scale, -1000.0)
                factor = tl.exp2(shift)
                total = tl.sum(tile_total * factor)
                weighted = 0.0
                several = vocab > 1
                threshold = -_INF
                tie_limit = vocab
                if FILTERED:
                    threshold, tie_limit, total, weighted, several = select_kept(
                        logits,
                        source,
                        group_maxima + at * (_TILE // GROUP),
                        listed_groups + program * GROUPS,
                        group_masses + program * GROUPS,
                        vocab,
                        largest,
                        total,
                        scale,
                        top_k,
                        top_p,
                        tail,
                        TOP_P,
                        SAMPLED,
                        GROUPS,
                    )
                elif METRIC >= _NEG_ENTROPY:
                    tile_weighted = tl.load(weighted_sums + at + tile, mask=live, other=0.0)
                    weighted = tl.sum(factor * (tile_weighted + shift * tile_total))

                if not SAMPLED or METRIC == _MARGIN or METRIC == _ALL:
                    best_tile = _first(tile_largest == largest, tile)
                    index = best_tile * _TILE + lane
                    x = tl.load(source + index, mask=index < vocab, other=-float("inf"))
                    x = sanitized(x.to(tl.float32))
                    token = _first(x == largest, index)
                    others = tl.max(tl.where(tile == best_tile, -_INF, tile_largest))
                    second = tl.maximum(others, tl.max(tl.where(index == token, -_INF, x)))
                    gap = (second - largest) * inverse_temperature
                    margin = -_expm1(tl.where(several, gap, -_INF)) / total
                prob = 1.0 / total

                if SAMPLED:
                    stream = tl.load(seed)
                    counter = stream * 0
                    if step is not None:
                        counter = tl.load(step)
                    if FILTERED:
                        tl.debug_barrier()
                        group = tl.arange(0, GROUPS)
                        mass = tl.load(group_masses + program * GROUPS + group)
                        mass = tl.sum(tl.reshape(mass, [TILES, _TILE // GROUP]), axis=1)
                        log_mass = tl.log(mass)
                    else:
                        distance = (tile_largest - largest) * inverse_temperature
                        mass = tile_total
                        log_mass = tl.log(tile_total) + distance
                    noise = _gumbels(0x80000000, row, stream, counter, TILES)
                    drawn = tl.where(live & (mass > 0.0), log_mass + noise, -_INF)
                    drawn_tile = _first(drawn == tl.max(drawn), tile)

                    index = drawn_tile * _TILE + lane
                    x = tl.load(source + index, mask=index < vocab, other=-float("inf"))
                    x = sanitized(x.to(tl.float32))
                    kept = (x > threshold) | ((x == threshold) & (index < tie_limit))
                    kept = kept & (x > -_INF)
                    noise = _gumbels(drawn_tile * (_TILE // 4), row, stream, counter, _TILE)
                    drawn = (x - largest) * inverse_temperature + noise
                    drawn = tl.where(kept, drawn, -_INF)
                    token = _first(kept & (drawn == tl.max(drawn)), index)
                    x = tl.max(tl.where(index == token, x, -_INF))
                    prob = tl.exp2((x - largest) * scale) / total

                if METRIC >= _NEG_ENTROPY:
                    neg_entropy = tl.minimum(_LN2 * weighted / total - tl.log(total), 0.0)
                if METRIC == _ALL:
                    lse = largest * inverse_temperature + tl.log(total)
                    lse = tl.minimum(tl.maximum(lse, -_FLT_MAX), _FLT_MAX)
                if METRIC == _PROB:
                    score = prob
                elif METRIC == _NEG_ENTROPY:
                    score = neg_entropy
                else:
                    score = margin
        if METRIC == _ALL:
            tl.store(neg_entropies + position, neg_entropy)
            tl.store(lses + position, lse)
            score = margin
        tl.store(tokens + _offset(position, out_sizes, token_strides), token.to(tl.int64))
        tl.store(probs + _offset(position, out_sizes, prob_strides), prob)
        tl.store(scores + _offset(position, out_sizes, score_strides), score)
        if flags is not None:
            tl.store(flags + position, flag.to(tl.uint8))




class _Outputs(NamedTuple):
    """Of each listed row; `scores` are the margins where all metrics are wanted."""

    tokens: torch.Tensor
    probs: torch.Tensor
    scores: torch.Tensor
    neg_entropies: torch.Tensor | None = None
    lses: torch.Tensor | None = None
    flags: torch.Tensor | None = None


def _layout(
    shape: torch.Size | tuple[int, ...], *strides: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Sizes and strides of tensors of one shape, innermost dimension first.

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
    return list(zip(*reversed(dimensions), strict=True))


class _Device(NamedTuple):
    multiprocessors: int
    dependent: bool  # programmatic dependent launch


@functools.cache
def _device(device: torch.device) -> _Device:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return _Device(
            properties.multi_processor_count, torch.version.hip is None and properties.major >= 9
        )
    if device.type == "xpu":
        return _Device(torch.xpu.get_device_properties(device).max_compute_units, False)
    return _Device(1, False)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "cuda":
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return contextlib.nullcontext()


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
    table_rows = logits[..., 0].numel()
    capacity = out.tokens.numel()
    if capacity == 0:
        return
    tiles = triton.cdiv(vocab, _TILE.value)
    if max(vocab, table_rows, capacity * tiles) >= 2**31:
        raise ValueError(
            f"{op}: logits: expected less than 2^31 rows times tiles of {_TILE.value} tokens, got "
            f"shape {list(logits.shape)} and {capacity} rows to evaluate"
        )
    greedy_limit = vocab if top_k is None else min(top_k, vocab)
    nucleus = top_p is not None and top_p < 1
    filtered = nucleus or greedy_limit < vocab
    weighted = metric in ("neg_entropy", "all") and not filtered
    by_row = table_rows < capacity
    slots = min(capacity, table_rows)
    padded = max(16, triton.next_power_of_2(tiles))
    inverse = 1 / temperature if temperature > 0 else 1.0
    # Beyond these every weight but the maximum's is 0, or every weight is 1.
    inverse = min(max(inverse, _FLOAT32.tiny), _FLOAT32.max)
    scale = min(inverse / math.log(2), _FLOAT32.max)
    device = _device(logits.device)
    scan_programs = min(capacity * tiles, _SCAN_PROGRAMS * device.multiprocessors)
    per_device = _FILTER_PROGRAMS if filtered else _FINISH_PROGRAMS
    finish_programs = min(capacity, per_device * device.multiprocessors)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    maxima, sums = scratch(slots, tiles), scratch(slots, tiles)
    weighted_sums = scratch(slots, tiles) if weighted else None
    marks = scratch(slots, tiles, dtype=torch.uint8)
    groups = _TILE.value // GROUP.value
    group_maxima = scratch(slots, tiles, groups) if filtered else None
    listed = scratch(finish_programs, padded, groups, dtype=torch.int32) if filtered else None
    masses = scratch(finish_programs, padded, groups) if filtered else None

    partials = (maxima, sums, weighted_sums, marks, group_maxima)
    table = _layout(logits.shape[:-1], logits.stride()[:-1])
    row_list = ((1,), (1,)) if rows is None else _layout(rows.shape, rows.stride())
    result = _layout(
        out.tokens.shape, out.tokens.stride(), out.probs.stride(), out.scores.stride()
    )
    launch = {"launch_pdl": True} if device.dependent else {}
    with _on(logits.device):
        _scan[(scan_programs,)](
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
            enable_fp_fusion=False,  # an order of its own for each layout
            **launch,
        )
        _finish[(finish_programs,)](
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
            SAMPLED=temperature > 0,
            FILTERED=filtered,
            TOP_P=nucleus,
            TILES=padded,
            DEPENDENT=device.dependent,
            num_warps=_FILTER_WARPS if filtered else _FINISH_WARPS,
            **launch,
        )


def vocabulary_statistics(
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
    """Statistics of a list of rows that the device made, for `lopa_step`.

    Args:
        logits: [..., V], seen as R rows.
        rows: int32[capacity], the list; None: row i at position i.
        count: int32[1], its length, read on the device; None: `capacity`.

    Returns:
        token int64, prob fp32, score fp32 and flags uint8 (ROW_NAN, ROW_EMPTY, ROW_MISSING), all
        [capacity]; positions from `count` on are not written. A row outside [0, R) is missing: it
        gives (0, 0, -inf).
    """
    def empty(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(capacity, dtype=dtype, device=logits.device)

    out = _Outputs(
        empty(torch.int64),
        empty(torch.float32),
        empty(torch.float32),
        flags=empty(torch.uint8),
    )
    _run(
        "lopa_step", logits, rows, count, seed, step, metric, temperature, top_k, top_p, out
    )
    return out.tokens, out.probs, out.scores, out.flags


def _outputs(logits: torch.Tensor, rows: torch.Tensor | None, floats: int) -> list[torch.Tensor]:
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
    confidence._check(op, logits, rows, seed, step, metric, temperature, top_k, top_p)
    out = _Outputs(*_outputs(logits, rows, 2))
    _run(op, logits, rows, None, seed, step, metric, temperature, top_k, top_p, out)
    return tuple(out[:3])


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
    confidence._check(op, logits, rows, seed, step, metric, temperature, top_k, top_p)
    out = _Outputs(token, prob, score)
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
    confidence._check(op, logits, rows, seed, step, "prob", temperature, top_k, top_p)
    out = _Outputs(*_outputs(logits, rows, 4))
    _run(op, logits, rows, None, seed, step, "all", temperature, top_k, top_p, out)
    return tuple(out[:5])
