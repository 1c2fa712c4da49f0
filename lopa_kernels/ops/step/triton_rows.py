"""Device code that finds the rows of logits that a round reads."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from lopa_kernels.ops.branch.triton import begin
from lopa_kernels.ops.step.triton_round import check_columns, live_branches


@triton.jit
def is_needed(
    c: tl.tensor,
    columns: tl.tensor,
    first: tl.tensor,
    commits: tl.tensor,
    shift: tl.tensor,
    target_token: tl.tensor,
    mask_id: tl.tensor,
) -> Any:
    """Does the round read row c? With a shift it predicts column c + 1.

    The last committed row becomes the carry then.
    """
    target = c + shift
    is_open = (target < columns) & (target >= first) & (target_token == mask_id)
    return is_open | (c == commits * shift - 1)


@triton.jit
def needed_tile(
    b: tl.tensor,
    k: tl.tensor,
    live: tl.tensor,
    cache: tl.tensor,
    commits: tl.tensor,
    prompt: tl.tensor,
    fields: tl.tensor,
    slots: tl.tensor,
    window: tl.tensor,
    mask_id: tl.tensor,
    shift: tl.tensor,
    WINDOW: tl.constexpr,
) -> Any:
    """Columns [WINDOW, k] of the branches k that need a row; and what puts them out of range."""
    tokens, length, _, _, _, _, _ = fields
    c = tl.arange(0, WINDOW)[:, None]
    row = b * slots + k
    at = (row * window)[None, :] + c
    is_live = k < live
    columns = tl.load(length + row, is_live, 0)
    in_tile = is_live[None, :] & (c < window)
    own = tl.load(tokens + at, in_tile, 0)
    has_target = is_live[None, :] & (c + shift < window)
    target_token = tl.load(tokens + at + shift, has_target, 0)
    first = tl.maximum(prompt - cache, 0)
    _, bad = check_columns(c, own, columns, is_live, first, cache, commits, prompt, window, mask_id)
    needed = is_needed(c, columns[None, :], first, commits, shift, target_token, mask_id)
    return in_tile & needed, bad


@triton.jit
def live_branches_of(b: tl.tensor, fields: tl.tensor, slots: tl.tensor, window: tl.tensor) -> Any:
    _, _, branches, cache_len, commit_len, prompt_len, done = fields
    return live_branches(b, branches, cache_len, commit_len, prompt_len, done, slots, window)


@triton.jit
def count_needed(
    b: tl.tensor,
    fields: tl.tensor,
    slots: tl.tensor,
    window: tl.tensor,
    mask_id: tl.tensor,
    shift: tl.tensor,
    SLOTS: tl.constexpr,
    WINDOW: tl.constexpr,
) -> Any:
    """Rows that sequence b needs: none where it is done or out of range."""
    live, cache, commits, prompt = live_branches_of(b, fields, slots, window)
    count = 0
    malformed = 0
    for k0 in range(0, live, SLOTS):
        k = k0 + tl.arange(0, SLOTS)
        needed, bad = needed_tile(
            b, k, live, cache, commits, prompt, fields, slots, window, mask_id, shift, WINDOW
        )
        count += tl.sum(needed.to(tl.int32))
        malformed += tl.sum(bad.to(tl.int32))
    return tl.where(malformed == 0, count, 0)


@triton.jit(do_not_specialize=["slots", "window", "mask_id", "shift"])
def count_needed_kernel(
    fields: tl.tensor,
    counts: tl.tensor,
    slots: tl.int32,
    window: tl.int32,
    mask_id: tl.int64,
    shift: tl.int32,
    SLOTS: tl.constexpr,
    WINDOW: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    begin(DEPENDENT)
    b = tl.program_id(0).to(tl.int64)
    count = count_needed(b, fields, slots, window, mask_id, shift, SLOTS, WINDOW)
    tl.store(counts + b, count)


@triton.jit(
    do_not_specialize=["batch", "slots", "window", "mask_id", "shift", "capacity", "logits_rows"]
)
def list_needed_kernel(
    fields: tl.tensor,
    counts: tl.tensor,
    named: tl.tensor,
    listed: tl.tensor,
    places: tl.tensor,
    count_out: tl.tensor,
    batch: tl.int32,
    slots: tl.int32,
    window: tl.int32,
    mask_id: tl.int64,
    shift: tl.int32,
    capacity: tl.int64,
    logits_rows: tl.int64,
    SLOTS: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    COUNTED: tl.constexpr,
    SLOT_LIST: tl.constexpr,
    NAMED: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """Lists the needed rows in order, and the place of each, -1 for the others.

    `fields` are tokens, length, branches, cache_len, commit_len, prompt_len and done.

    Without COUNTED there is one sequence, and `counts` is not read. With SLOT_LIST the list has the
    slots, and is 0 beyond them; otherwise the rows of logits, which `named` gives where NAMED, with
    -1 for those out of range.
    """
    begin(DEPENDENT)
    b = tl.program_id(0).to(tl.int64)
    before = 0
    total = 0
    own = 0
    if COUNTED:
        for i0 in range(0, batch, TILE):
            i = i0 + tl.arange(0, TILE)
            count = tl.load(counts + i, i < batch, 0)
            total += tl.sum(count)
            before += tl.sum(tl.where(i < b, count, 0))
            own += tl.sum(tl.where(i == b, count, 0))
    else:
        own = count_needed(b, fields, slots, window, mask_id, shift, SLOTS, WINDOW)
        total = own
    tl.store(count_out, total, b == 0)
    if SLOT_LIST:
        # Index 0 exists wherever there is a row to gather, so that all `capacity` can be gathered.
        for i0 in range(total + b * TILE, capacity, tl.num_programs(0) * TILE):
            i = i0 + tl.arange(0, TILE)
            tl.store(listed + i, tl.zeros([TILE], tl.int64), i < capacity)
    if b < batch:
        live, cache, commits, prompt = live_branches_of(b, fields, slots, window)
        live = tl.where(own > 0, live, 0)
        for k0 in range(0, slots, SLOTS):
            k = k0 + tl.arange(0, SLOTS)
            needed, _ = needed_tile(
                b, k, live, cache, commits, prompt, fields, slots, window, mask_id, shift, WINDOW
            )
            number = needed.to(tl.int32)
            of_branch = tl.sum(number, 0)
            place = before + (tl.cumsum(of_branch, 0) - of_branch)[None, :]
            place += tl.cumsum(number, 0) - number
            before += tl.sum(of_branch, 0)
            c = tl.arange(0, WINDOW)[:, None]
            at = ((b * slots + k) * window)[None, :] + c
            fits = needed & (place < capacity)
            if SLOT_LIST:
                tl.store(listed + place, at, fits)
            else:
                row = at
                if NAMED:
                    row = tl.load(named + at, fits, -1).to(tl.int64)
                row = tl.where((row >= 0) & (row < logits_rows), row, -1)
                tl.store(listed + place, row.to(tl.int32), fits)
            inside = (k < slots)[None, :] & (c < window)
            tl.store(places + at, tl.where(fits, place, -1), inside)
