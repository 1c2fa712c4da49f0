"""The merge of a row's tiles in Triton, and the draw of its token."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from lopa_kernels.ops.confidence.triton_filter import GROUP, sanitized, select_kept

#: tokens of a tile: the unit of the scan, and of the draw
TILE = tl.constexpr(2048)

# What the scan says of a tile.
NAN = tl.constexpr(1)
FINITE = tl.constexpr(2)

#: flags of a row: a NaN among the logits, no finite logit, a row outside [0, R)
ROW_NAN = tl.constexpr(1)
ROW_EMPTY = tl.constexpr(2)
ROW_MISSING = tl.constexpr(4)

#: what `score` is; MARGIN too where everything is wanted
PROB = tl.constexpr(0)
MARGIN = tl.constexpr(1)
NEG_ENTROPY = tl.constexpr(2)
EVERYTHING = tl.constexpr(3)

_INF = tl.constexpr(float("inf"))
_FLT_MAX = tl.constexpr(3.4028234663852886e38)
_LN2 = tl.constexpr(math.log(2))


@triton.jit
def offset_of(index: tl.tensor, sizes: tl.tensor, strides: tl.tensor) -> tl.tensor:
    """Where element `index`, in row-major order, is; dimensions are innermost first."""
    rest = index
    offset = tl.cast(index * 0, tl.int64)
    for d in tl.static_range(len(sizes)):
        offset += (rest % sizes[d]).to(tl.int64) * strides[d]
        rest = rest // sizes[d]
    return offset + rest.to(tl.int64) * strides[len(sizes)]


@triton.jit
def listed_row(
    position: tl.tensor, rows: tl.tensor, sizes: tl.tensor, strides: tl.tensor
) -> tl.tensor:
    row = position
    if rows is not None:
        row = tl.load(rows + offset_of(position, sizes, strides))
    return row


@triton.jit
def _gumbel(word: tl.tensor) -> tl.tensor:
    """The Gumbel number -log(-log(1 - v)), v = (word + 1/2) / 2^32, in fp32.

    In the lower half log(1 - v) is made good for what rounding took from u = 1 - v (W. Kahan's
    log1p); in the upper half 1 - v comes from the complement of the word.
    """
    low = word < 0x80000000
    v = (tl.where(low, word, 0xFFFFFFFF - word).to(tl.float32) + 0.5) * 2.0**-32
    u = 1.0 - v
    log = tl.log(tl.where(low, u, v))
    lower = tl.where(u == 1.0, v, log * v / (u - 1.0))
    return -tl.log(tl.where(low, lower, -log))


@triton.jit
def _gumbels(
    first_group: tl.tensor, row: tl.tensor, seed: tl.tensor, step: tl.tensor, N: tl.constexpr
) -> tl.tensor:
    """The N numbers of the Philox groups from `first_group` on, in a row's stream."""
    group = tl.arange(0, N // 4).to(tl.uint32) + first_group
    zero = tl.zeros_like(group)
    low = zero + (step & 0xFFFFFFFF).to(tl.uint32)
    high = zero + ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, group, zero + row.to(tl.uint32), low, high)
    return _gumbel(tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [N]))


@triton.jit
def _first(hits: tl.tensor, index: tl.tensor) -> tl.tensor:
    """The lowest index of a hit."""
    return tl.min(tl.where(hits, index, 0x7FFFFFFF))


@triton.jit
def _expm1(y: tl.tensor) -> tl.tensor:
    """e^y - 1, y <= 0; the quotient takes back what rounding e^y did (W. Kahan)."""
    u = tl.exp(y)
    near = tl.where(u == 1.0, y, (u - 1.0) * y / tl.log(tl.maximum(u, 1e-30)))
    return tl.where(y < -1.0, u - 1.0, near)


@triton.jit(
    # What a row gives must not depend on how it is aligned.
    do_not_specialize=["vocab", "tiles", "capacity", "table_rows", "top_k"],
    do_not_specialize_on_alignment=["logits", "tokens", "probs", "scores"],
)
def finish_kernel(
    logits: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    weighted_sums: tl.tensor,
    marks: tl.tensor,
    group_maxima: tl.tensor,
    listed_groups: tl.tensor,
    group_masses: tl.tensor,
    rows: tl.tensor,
    count: tl.tensor,
    seed: tl.tensor,
    step: tl.tensor,
    tokens: tl.tensor,
    probs: tl.tensor,
    scores: tl.tensor,
    neg_entropies: tl.tensor,
    lses: tl.tensor,
    flags: tl.tensor,
    sizes: tl.tensor,
    strides: tl.tensor,
    row_sizes: tl.tensor,
    row_strides: tl.tensor,
    out_sizes: tl.tensor,
    token_strides: tl.tensor,
    prob_strides: tl.tensor,
    score_strides: tl.tensor,
    vocab: tl.tensor,
    tiles: tl.tensor,
    capacity: tl.tensor,
    table_rows: tl.tensor,
    scale: tl.tensor,
    inverse_temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    tail: tl.tensor,
    BY_ROW: tl.constexpr,
    METRIC: tl.constexpr,
    MARGINS: tl.constexpr,
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
    GROUPS: tl.constexpr = TILES * (TILE // GROUP)
    program = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    lane = tl.arange(0, TILE)
    for item in range(tl.program_id(0), listed, tl.num_programs(0)):
        position = tl.cast(item, tl.int32)
        row = listed_row(position, rows, row_sizes, row_strides)
        token = 0
        prob = 0.0
        margin = 0.0
        neg_entropy = -_INF
        lse = -_INF
        score = -_INF
        flag = ROW_MISSING
        if (row >= 0) & (row < table_rows):
            source = logits + offset_of(row, sizes, strides)
            at = (row if BY_ROW else position).to(tl.int64) * tiles
            live = tile < tiles
            tile_largest = tl.load(maxima + at + tile, mask=live, other=-float("inf"))
            tile_total = tl.load(sums + at + tile, mask=live, other=0.0)
            mark = tl.load(marks + at + tile, mask=live, other=0).to(tl.int32)
            nan = tl.max(mark & NAN) // NAN
            finite = tl.max(mark & FINITE)
            flag = nan * ROW_NAN + tl.where(finite > 0, 0, ROW_EMPTY)
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
                        group_maxima + at * (TILE // GROUP),
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
                elif METRIC >= NEG_ENTROPY:
                    tile_weighted = tl.load(weighted_sums + at + tile, mask=live, other=0.0)
                    weighted = tl.sum(factor * (tile_weighted + shift * tile_total))

                if not SAMPLED or MARGINS:
                    best_tile = _first(tile_largest == largest, tile)
                    index = best_tile * TILE + lane
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
                        mass = tl.sum(tl.reshape(mass, [TILES, TILE // GROUP]), axis=1)
                        log_mass = tl.log(mass)
                    else:
                        distance = (tile_largest - largest) * inverse_temperature
                        mass = tile_total
                        log_mass = tl.log(tile_total) + distance
                    noise = _gumbels(0x80000000, row, stream, counter, TILES)
                    drawn = tl.where(live & (mass > 0.0), log_mass + noise, -_INF)
                    drawn_tile = _first(drawn == tl.max(drawn), tile)

                    index = drawn_tile * TILE + lane
                    x = tl.load(source + index, mask=index < vocab, other=-float("inf"))
                    x = sanitized(x.to(tl.float32))
                    kept = (x > threshold) | ((x == threshold) & (index < tie_limit))
                    kept = kept & (x > -_INF)
                    noise = _gumbels(drawn_tile * (TILE // 4), row, stream, counter, TILE)
                    drawn = (x - largest) * inverse_temperature + noise
                    drawn = tl.where(kept, drawn, -_INF)
                    token = _first(kept & (drawn == tl.max(drawn)), index)
                    x = tl.max(tl.where(index == token, x, -_INF))
                    prob = tl.exp2((x - largest) * scale) / total

                if METRIC >= NEG_ENTROPY:
                    neg_entropy = tl.minimum(_LN2 * weighted / total - tl.log(total), 0.0)
                if METRIC == EVERYTHING:
                    lse = largest * inverse_temperature + tl.log(total)
                    lse = tl.minimum(tl.maximum(lse, -_FLT_MAX), _FLT_MAX)
                if METRIC == PROB:
                    score = prob
                elif METRIC == NEG_ENTROPY:
                    score = neg_entropy
                else:
                    score = margin
        if METRIC == EVERYTHING:
            tl.store(neg_entropies + position, neg_entropy)
            tl.store(lses + position, lse)
            score = margin
        tl.store(tokens + offset_of(position, out_sizes, token_strides), tl.cast(token, tl.int64))
        tl.store(probs + offset_of(position, out_sizes, prob_strides), prob)
        tl.store(scores + offset_of(position, out_sizes, score_strides), score)
        if flags is not None:
            tl.store(flags + position, tl.cast(flag, tl.uint8))
