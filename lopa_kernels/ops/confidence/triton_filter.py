"""What top-k and top-p leave of a row, found exactly: device functions of the Triton backend.

Tokens pass in the order of descending logit, then ascending index, and pass while fewer than top_k
tokens, with at most top_p of the mass, come before. So what is left ends at one logit, the
threshold, and among the tokens equal to it at one index. The threshold is searched by bisection
over the floats of the logits' dtype, each step a count and a mass of what lies above. The maxima of
groups of 64 tokens come first: they are a part of the tokens, so that their threshold is a lower
bound, and only the groups that reach it are read.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: tokens of a group
GROUP = tl.constexpr(64)
# Groups read at a time; fewer where the order of tokens matters, which takes registers.
_CHUNK = tl.constexpr(64)
_TIES_CHUNK = tl.constexpr(16)

_INF = tl.constexpr(float("inf"))
_FLT_MAX = tl.constexpr(3.4028234663852886e38)
# Weights below it are rounded up to it: normal, and negligible beside the 1 of the maximum.
SMALLEST_EXPONENT = tl.constexpr(-126.0)


@triton.jit
def sanitized(x: tl.tensor) -> tl.tensor:
    """NaN as -inf, +inf as the largest float."""
    return tl.minimum(tl.where(x != x, -_INF, x), _FLT_MAX)


@triton.jit
def key_of(value: tl.tensor, logits: tl.tensor) -> tl.tensor:
    """An int64 that orders as the floats of the logits' dtype; `value` is fp32, no NaN."""
    if logits.dtype.element_ty == tl.float32:
        bits = (value + 0.0).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        key = tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)
    else:
        # The largest float stands for +inf, whichever way the conversion rounds.
        value = tl.where(value < _FLT_MAX, value + 0.0, _INF)
        bits = value.to(logits.dtype.element_ty).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
        key = tl.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)
    return key


@triton.jit
def value_of(key: tl.tensor, logits: tl.tensor) -> tl.tensor:
    """The fp32 value with that key; +inf as the largest float."""
    if logits.dtype.element_ty == tl.float32:
        bits = tl.where(key >= 0x80000000, key - 0x80000000, 0xFFFFFFFF - key)
        value = bits.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        bits = tl.where(key >= 0x8000, key - 0x8000, 0xFFFF - key)
        value = bits.to(tl.int16).to(logits.dtype.element_ty, bitcast=True).to(tl.float32)
    return tl.minimum(value, _FLT_MAX)


@triton.jit
def _lowest_of_maxima(
    maxima: tl.tensor,
    largest: tl.tensor,
    scale: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    top_k: tl.tensor,
    mass_limit: tl.tensor,
    logits: tl.tensor,
    TOP_P: tl.constexpr,
) -> tl.tensor:
    """The key of the threshold, were the maxima all there is; it lies in (low, high]."""
    weight = tl.exp2((maxima - largest) * scale)
    while high - low > 1:
        middle = (low + high) // 2
        above = maxima > value_of(middle, logits)
        passes = tl.sum(above.to(tl.int32)) < top_k
        if TOP_P:
            # Sums of different order differ in their last bits; this one must not be the larger.
            passes = passes & (tl.sum(tl.where(above, weight, 0.0)) <= mass_limit * 1.00001)
        high = tl.where(passes, middle, high)
        low = tl.where(passes, low, middle)
    return high


@triton.jit
def _read_groups(
    source: tl.tensor,
    listed: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    vocab: tl.tensor,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """(group[C], live[C], index[C, 64], logit[C, 64]) of the list from `first` on."""
    slot = first + tl.arange(0, CHUNK)
    live = slot < count
    group = tl.load(listed + slot, mask=live, other=0)
    index = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = live[:, None] & (index < vocab)
    x = tl.load(source + index, mask=inside, other=-float("inf"))
    return group, live, index, sanitized(x.to(tl.float32))


@triton.jit
def _threshold(
    source: tl.tensor,
    listed: tl.tensor,
    count: tl.tensor,
    vocab: tl.tensor,
    largest: tl.tensor,
    scale: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    top_k: tl.tensor,
    mass_limit: tl.tensor,
    logits: tl.tensor,
    TOP_P: tl.constexpr,
) -> tl.tensor:
    """(threshold, tokens above it, their mass) in the listed groups; its key is in (low, high]."""
    before = 0
    mass_before = 0.0
    while high - low > 1:
        middle = (low + high) // 2
        pivot = value_of(middle, logits)
        tokens = 0
        mass = 0.0
        for first in range(0, count, _CHUNK):
            _, _, _, x = _read_groups(source, listed, first, count, vocab, _CHUNK)
            above = x > pivot
            tokens += tl.sum(above.to(tl.int32))
            if TOP_P:
                mass += tl.sum(tl.where(above, tl.exp2((x - largest) * scale), 0.0))
        passes = tokens < top_k
        if TOP_P:
            passes = passes & (mass <= mass_limit)
        high = tl.where(passes, middle, high)
        low = tl.where(passes, low, middle)
        before = tl.where(passes, tokens, before)
        mass_before = tl.where(passes, mass, mass_before)
    return value_of(high, logits), before, mass_before


@triton.jit
def _index_after_ties(
    source: tl.tensor,
    listed: tl.tensor,
    count: tl.tensor,
    vocab: tl.tensor,
    threshold: tl.tensor,
    ties: tl.tensor,
) -> tl.tensor:
    """One more than the index of tie number `ties` (from 1) in the order of the vocabulary."""
    limit = vocab
    seen = 0
    for first in range(0, count, _TIES_CHUNK):
        _, _, index, x = _read_groups(source, listed, first, count, vocab, _TIES_CHUNK)
        equal = (x == threshold).to(tl.int32)
        in_group = tl.sum(equal, axis=1)
        rank = (seen + tl.cumsum(in_group) - in_group)[:, None] + tl.cumsum(equal, axis=1)
        last = (equal > 0) & (rank == ties)
        limit = tl.minimum(limit, tl.min(tl.where(last, index + 1, vocab)))
        seen += tl.sum(in_group)
    return limit


@triton.jit
def select_kept(
    logits: tl.tensor,
    source: tl.tensor,
    group_maxima: tl.tensor,
    listed: tl.tensor,
    masses: tl.tensor,
    vocab: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    scale: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    tail: tl.tensor,
    TOP_P: tl.constexpr,
    MASSES: tl.constexpr,
    GROUPS: tl.constexpr,
) -> tl.tensor:
    """What the filters leave of a row.

    Args:
        logits: names the dtype. `source`: the row's first logit.
        group_maxima: of every 64 tokens.
        listed: int32[GROUPS], scratch. `masses`: fp32[GROUPS], gets the kept mass of every group.
        largest, total: maximum of the row and sum of 2^((x - largest) * scale).
        tail: (1 - top_p) / (4 * vocab).

    Returns:
        (threshold, tie_limit, total, weighted, several): kept is what is larger than the threshold,
        or equal to it and of an index below the limit; the sums over it of w = 2^t and of w * t,
        t = (x - largest) * scale; whether it is more than one token.
    """
    group = tl.arange(0, GROUPS)
    inside = group * GROUP < vocab
    maxima = tl.load(group_maxima + group, mask=inside, other=-float("inf"))
    high = key_of(largest, logits)
    low = key_of(largest * 0.0 - _INF, logits) - 1
    mass_limit = total * top_p
    if TOP_P:
        # Tokens below this value have less than half of the mass 1 - top_p together: the mass that
        # would have to be theirs, were the threshold among them. The rest is room for rounding.
        hopeless = largest + tl.log2(tail * total) / scale
        low = tl.maximum(low, key_of(hopeless, logits) - 2)
    floor = _lowest_of_maxima(maxima, largest, scale, low, high, top_k, mass_limit, logits, TOP_P)
    wanted = (maxima >= value_of(floor, logits)) & inside

    # Other warps may still read the list and the masses of the row before.
    tl.debug_barrier()
    tl.store(listed + tl.cumsum(wanted.to(tl.int32)) - 1, group, mask=wanted)
    if MASSES:
        tl.store(masses + group, tl.zeros([GROUPS], tl.float32))
    tl.debug_barrier()
    count = tl.sum(wanted.to(tl.int32))

    threshold, before, mass_before = _threshold(
        source,
        listed,
        count,
        vocab,
        largest,
        scale,
        floor - 1,
        high,
        top_k,
        mass_limit,
        logits,
        TOP_P,
    )
    ties = 0
    for first in range(0, count, _CHUNK):
        _, _, _, x = _read_groups(source, listed, first, count, vocab, _CHUNK)
        ties += tl.sum((x == threshold).to(tl.int32))
    kept_ties = tl.minimum(ties, top_k - before)
    if TOP_P:
        each = tl.exp2((threshold - largest) * scale)
        fitting = tl.floor((mass_limit - mass_before) / each) + 1.0
        if fitting < kept_ties.to(tl.float32):
            kept_ties = tl.maximum(fitting.to(tl.int32), 1)
    tie_limit = vocab
    if kept_ties < ties:
        tie_limit = _index_after_ties(source, listed, count, vocab, threshold, kept_ties)

    kept_total = 0.0
    weighted = 0.0
    for first in range(0, count, _CHUNK):
        number, live, index, x = _read_groups(source, listed, first, count, vocab, _CHUNK)
        kept = (x > threshold) | ((x == threshold) & (index < tie_limit))
        t = tl.maximum((x - largest) * scale, SMALLEST_EXPONENT)
        weight = tl.where(kept, tl.exp2(t), 0.0)
        in_group = tl.sum(weight, axis=1)
        kept_total += tl.sum(in_group)
        weighted += tl.sum(weight * t)
        if MASSES:
            tl.store(masses + number, in_group, mask=live)
    return threshold, tie_limit, kept_total, weighted, before + kept_ties > 1
