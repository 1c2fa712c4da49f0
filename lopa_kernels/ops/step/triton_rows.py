"""Device code that finds the rows of logits that a round reads."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from lopa_kernels.ops.step.triton_round import is_bad_length, live_branches


@triton.jit
def is_needed(
    c: Any, columns: Any, first: Any, commits: Any, shift: Any, target_token: Any, mask_id: Any
) -> Any:
    """Does the round read row c? With a shift it predicts column c + 1.

    The last committed row becomes the carry then.
    """
    target = c + shift
    is_open = (target < columns) & (target >= first) & (target_token == mask_id)
    return is_open | ((c == commits * shift - 1) & (c < columns))


@triton.jit(do_not_specialize=["total", "logits_rows", "slots", "window", "mask_id", "shift"])
def step_rows_kernel(
    tokens: Any,
    length: Any,
    branches: Any,
    cache_len: Any,
    commit_len: Any,
    prompt_len: Any,
    done: Any,
    rows: Any,
    out: Any,
    total: tl.int64,
    logits_rows: tl.int64,
    slots: tl.int32,
    window: tl.int32,
    mask_id: tl.int64,
    shift: tl.int32,
    HAS_ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The row of logits of each column of [B, K, W] that the round reads, -1 elsewhere.

    Of a sequence out of range, which the round leaves alone, some rows may be named.
    """
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < total
    row = at // window
    c = (at - row * window).to(tl.int32)
    b = row // slots
    k = (row - b * slots).to(tl.int32)
    live = tl.load(branches + b, inside, 0)
    cache = tl.load(cache_len + b, inside, 0)
    commits = tl.load(commit_len + b, inside, 0)
    prompt = tl.load(prompt_len + b, inside, 0)
    is_done = tl.load(done + b, inside, 0) != 0
    columns = tl.load(length + row, inside, 0)
    named = at
    if HAS_ROWS:
        named = tl.load(rows + at, inside, -1).to(tl.int64)
    sound = inside & ~is_done & (k < live) & (live <= slots)
    sound = sound & (cache >= 0) & (commits >= 0) & (prompt >= 0)
    sound = sound & (cache <= 2147483647 - window)
    sound = sound & ~is_bad_length(columns, cache, commits, prompt, window)
    has_target = sound & (c + shift < columns)
    target_token = tl.load(tokens + at + shift, has_target, 0)
    first = tl.maximum(prompt - cache, 0)
    needed = sound & is_needed(c, columns, first, commits, shift, target_token, mask_id)
    named = tl.where(needed & (named >= 0) & (named < logits_rows), named, -1)
    tl.store(out + at, named.to(tl.int32), inside)


@triton.jit
def needed_tile(
    b: Any,
    k: Any,
    live: Any,
    cache: Any,
    commits: Any,
    prompt: Any,
    tokens: Any,
    length: Any,
    slots: Any,
    window: Any,
    mask_id: Any,
    shift: Any,
    WINDOW: tl.constexpr,
) -> Any:
    """Columns [k, WINDOW] of the branches k that need a row; and what puts them out of range."""
    c = tl.arange(0, WINDOW)[None, :]
    row = b * slots + k
    at = (row * window)[:, None] + c
    is_live = k < live
    columns = tl.load(length + row, is_live, 0)
    bad = is_live & is_bad_length(columns, cache, commits, prompt, window)
    in_tile = is_live[:, None] & (c < window)
    own = tl.load(tokens + at, in_tile, 0)
    has_target = is_live[:, None] & (c + shift < window)
    target_token = tl.load(tokens + at + shift, has_target, 0)
    first = tl.maximum(prompt - cache, 0)
    bad_tile = bad[:, None] | (in_tile & (own == mask_id) & (c >= first) & (c < commits))
    needed = is_needed(c, columns[:, None], first, commits, shift, target_token, mask_id)
    return in_tile & needed, bad_tile


@triton.jit(do_not_specialize=["slots", "window", "mask_id", "shift"])
def count_needed_kernel(
    tokens: Any,
    length: Any,
    branches: Any,
    cache_len: Any,
    commit_len: Any,
    prompt_len: Any,
    done: Any,
    counts: Any,
    slots: tl.int32,
    window: tl.int32,
    mask_id: tl.int64,
    shift: tl.int32,
    SLOTS: tl.constexpr,
    WINDOW: tl.constexpr,
) -> None:
    """Rows that each sequence needs: none where it is done or out of range."""
    b = tl.program_id(0).to(tl.int64)
    live, cache, commits, prompt = live_branches(
        b, branches, cache_len, commit_len, prompt_len, done, slots, window
    )
    count = 0
    malformed = 0
    for k0 in range(0, live, SLOTS):
        needed, bad = needed_tile(
            b,
            k0 + tl.arange(0, SLOTS),
            live,
            cache,
            commits,
            prompt,
            tokens,
            length,
            slots,
            window,
            mask_id,
            shift,
            WINDOW,
        )
        count += tl.sum(needed.to(tl.int32))
        malformed += tl.sum(bad.to(tl.int32))
    tl.store(counts + b, tl.where(malformed == 0, count, 0))


@triton.jit(do_not_specialize=["batch", "slots", "window", "mask_id", "shift", "capacity"])
def list_needed_kernel(
    tokens: Any,
    length: Any,
    branches: Any,
    cache_len: Any,
    commit_len: Any,
    prompt_len: Any,
    done: Any,
    counts: Any,
    index: Any,
    rows: Any,
    count_out: Any,
    batch: tl.int32,
    slots: tl.int32,
    window: tl.int32,
    mask_id: tl.int64,
    shift: tl.int32,
    capacity: tl.int64,
    SLOTS: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Lists the needed rows in order, each sequence's after those of the sequences before it."""
    b = tl.program_id(0).to(tl.int64)
    before = 0
    total = 0
    for i0 in range(0, batch, TILE):
        i = i0 + tl.arange(0, TILE)
        count = tl.load(counts + i, i < batch, 0)
        total += tl.sum(count)
        before += tl.sum(tl.where(i < b, count, 0))
    tl.store(count_out, total, b == 0)
    # Index 0 exists wherever there is a row to gather, so that all `capacity` can be gathered.
    for i0 in range(total + b * TILE, capacity, tl.num_programs(0) * TILE):
        i = i0 + tl.arange(0, TILE)
        tl.store(index + i, tl.zeros([TILE], tl.int64), i < capacity)
    if b < batch:
        live, cache, commits, prompt = live_branches(
            b, branches, cache_len, commit_len, prompt_len, done, slots, window
        )
        live = tl.where(tl.load(counts + b) > 0, live, 0)
        for k0 in range(0, slots, SLOTS):
            k = k0 + tl.arange(0, SLOTS)
            needed, _ = needed_tile(
                b,
                k,
                live,
                cache,
                commits,
                prompt,
                tokens,
                length,
                slots,
                window,
                mask_id,
                shift,
                WINDOW,
            )
            number = needed.to(tl.int32)
            of_branch = tl.sum(number, 1)
            place = before + (tl.cumsum(of_branch, 0) - of_branch)[:, None]
            place += tl.cumsum(number, 1) - number
            before += tl.sum(of_branch, 0)
            c = tl.arange(0, WINDOW)[None, :]
            at = ((b * slots + k) * window)[:, None] + c
            fits = needed & (place < capacity)
            tl.store(index + place, at, fits)
            inside = (k < slots)[:, None] & (c < window)
            tl.store(rows + at, tl.where(fits, place, -1), inside)
