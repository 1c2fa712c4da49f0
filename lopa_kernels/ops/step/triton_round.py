"""Device code of a round: one program a sequence (LoPA, arXiv 2512.16229, Algorithm 1).

The numbered comments are the steps of docs/operators.md. The branches are scored together, a tile
of them at a time; the winner's window is then a tile of its blocks.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from lopa_kernels.ops.branch.triton import (
    LOWEST_KEY,
    NO_COLUMN,
    as_double,
    blend,
    block_columns,
    fill_columns,
    lookahead_slots,
    rankable,
    reduce_scores,
)
from lopa_kernels.status import Status

NONFINITE = tl.constexpr(int(Status.NONFINITE))
WINDOW_FULL = tl.constexpr(int(Status.WINDOW_FULL))
BAD_STATE = tl.constexpr(int(Status.BAD_STATE))
MISSING_ROW = tl.constexpr(int(Status.MISSING_ROW))
STALLED = tl.constexpr(int(Status.STALLED))

# Flags of a row's statistics, as the vocabulary pass sets them.
ROW_UNUSABLE = tl.constexpr(1 | 2)  # a NaN, or no finite logit
ROW_MISSING = tl.constexpr(4)


@triton.jit
def live_branches(
    b: Any,
    branches: Any,
    cache_len: Any,
    commit_len: Any,
    prompt_len: Any,
    done: Any,
    slots: Any,
    window: Any,
) -> Any:
    """Live branches of sequence b, or 0 where it is done or its numbers are out of range."""
    live = tl.load(branches + b)
    cache = tl.load(cache_len + b)
    commits = tl.load(commit_len + b)
    prompt = tl.load(prompt_len + b)
    sound = (live >= 1) & (live <= slots) & (cache >= 0) & (commits >= 0) & (prompt >= 0)
    sound = sound & (cache <= 2147483647 - window) & (tl.load(done + b) == 0)
    return tl.where(sound, live, 0), cache, commits, prompt


@triton.jit
def is_bad_length(columns: Any, cache: Any, commits: Any, prompt: Any, window: Any) -> Any:
    # The window reaches past the prompt: blocks are counted from there. Where the sum overflows,
    # the length alone is out of range.
    bad = (columns < 0) | (columns > window) | (commits > columns)
    return bad | (cache + columns < prompt)


@triton.jit(
    do_not_specialize=[
        "slots",
        "window",
        "next_slots",
        "next_window",
        "block_size",
        "mask_id",
        "eos_id",
        "tau_conf",
        "act_count",
        "add_count",
        "max_blocks",
        "group",
        "fraction_bits",
        "alpha_bits",
        "by_score",
        "by_window",
        "shift",
        "force_anchor",
    ]
)
def round_kernel(
    tokens: Any,
    length: Any,
    creation: Any,
    eos: Any,
    branches: Any,
    cache_len: Any,
    commit_len: Any,
    prompt_len: Any,
    carry_token: Any,
    carry_prob: Any,
    carry_score: Any,
    done: Any,
    token: Any,
    prob: Any,
    score: Any,
    flags: Any,
    next_tokens: Any,
    next_length: Any,
    next_creation: Any,
    next_eos: Any,
    next_branches: Any,
    next_cache_len: Any,
    next_commit_len: Any,
    next_prompt_len: Any,
    next_carry_token: Any,
    next_carry_prob: Any,
    next_carry_score: Any,
    next_done: Any,
    winner_out: Any,
    filled_out: Any,
    confidence: Any,
    committed: Any,
    status_out: Any,
    scratch: Any,
    slots: tl.int32,
    window: tl.int32,
    next_slots: tl.int32,
    next_window: tl.int32,
    block_size: tl.int32,
    mask_id: tl.int64,
    eos_id: tl.int64,
    tau_conf: Any,
    act_count: tl.int32,
    add_count: tl.int32,
    max_blocks: tl.int32,
    group: tl.int32,
    fraction_bits: tl.int64,
    alpha_bits: tl.int64,
    by_score: tl.int32,
    by_window: tl.int32,
    shift: tl.int32,
    force_anchor: tl.int32,
    HAS_FLAGS: tl.constexpr,
    REDUCTION: tl.constexpr,
    SLOTS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPAN: tl.constexpr,
    ALL_SLOTS: tl.constexpr,
    NEXT_SLOTS: tl.constexpr,
    NEXT_WINDOW: tl.constexpr,
) -> None:
    """A round from statistics by logits row.

    Tiles: [SLOTS, WINDOW] of this state, [BLOCKS, SPAN] of its winner, [NEXT_SLOTS, NEXT_WINDOW] of
    the next state; ALL_SLOTS is above the slots of both. The next state may be this state's
    memory: everything is read before a barrier, and written after it.
    """
    b = tl.program_id(0).to(tl.int64)
    live, cache_in, commits_in, prompt_in = live_branches(
        b, branches, cache_len, commit_len, prompt_len, done, slots, window
    )
    is_done = tl.load(done + b) != 0
    live_in = tl.load(branches + b)
    carried_token = tl.load(carry_token + b)
    carried_prob = tl.load(carry_prob + b)
    carried_score = tl.load(carry_score + b)
    cache = tl.where(live > 0, cache_in, 0)
    commits = tl.where(live > 0, commits_in, 0)
    prompt = tl.where(live > 0, prompt_in, 0)
    first = tl.maximum(prompt - cache, 0)

    # 2. Branch confidence, and 3. the winner among the lookahead branches.
    status = 0
    malformed = 0
    lookahead = 0
    best = float("-inf")
    anchor = float("-inf")
    for k0 in range(0, slots, SLOTS):
        k = k0 + tl.arange(0, SLOTS)
        row = b * slots + k
        c = tl.arange(0, WINDOW)[None, :]
        in_slots = k < slots
        in_tile = in_slots[:, None] & (c < window)
        at = (row * window)[:, None] + c
        # Columns that turn out not to be open are read too: it saves waiting for the tokens.
        tile = tl.load(tokens + at, in_tile, 0)
        has_row = in_tile & (c - shift >= 0)
        value = tl.load(score + at - shift, has_row, 0.0)
        columns = tl.load(length + row, in_slots, 0)
        created = tl.load(creation + row, in_slots, 0.0)

        is_live = k < live
        is_mask = is_live[:, None] & (tile == mask_id) & (c >= first)
        is_open = is_mask & (c < columns[:, None])
        value = tl.where(c - shift >= 0, value, carried_score)
        # A score that is infinite or NaN comes from a row without a usable distribution.
        unusable = is_open & ~(tl.abs(value) < float("inf"))
        bad = is_live & is_bad_length(columns, cache, commits, prompt, window)
        bad_tile = bad[:, None] | (is_mask & (c < commits))
        counts = tl.sum(bad_tile.to(tl.int32) + (unusable.to(tl.int32) << 16))
        malformed = malformed | (counts & 0xFFFF)
        status = status | tl.where((counts >> 16) != 0, NONFINITE, 0)
        if HAS_FLAGS:
            # Of the open columns' rows, and of the last committed row, which becomes the carry.
            flag = tl.load(flags + at - shift, has_row, 0).to(tl.int32)
            is_carry = is_live[:, None] & (c == commits * shift - 1)
            carry_flag = tl.load(flags + at, in_tile & is_carry, 0).to(tl.int32)
            flag = tl.where(is_open, flag, 0) | carry_flag
            missing = (flag & ROW_MISSING) != 0
            broken = ((flag & ROW_UNUSABLE) != 0) & ~missing
            counts = tl.sum(missing.to(tl.int32) + (broken.to(tl.int32) << 16))
            status = status | tl.where((counts & 0xFFFF) != 0, MISSING_ROW, 0)
            status = status | tl.where((counts >> 16) != 0, NONFINITE, 0)

        reduced = reduce_scores(
            rankable(value),
            is_open,
            scratch + row * window,
            group,
            as_double(fraction_bits),
            REDUCTION,
        )
        own = blend(rankable(created), reduced, as_double(alpha_bits))
        own = tl.where(columns == 0, 1.0, own)
        tl.store(confidence + row, tl.where(is_live, own, float("-inf")), in_slots)
        # The first lookahead needs not beat anything: where its confidence is NaN, none beats it.
        own = tl.where(own == own, own, tl.where(k == 1, float("inf"), float("-inf")))
        is_lookahead = is_live & (k > 0)
        highest = tl.max(tl.where(is_lookahead, own, float("-inf")), 0)
        slot = tl.min(tl.where(is_lookahead & (own == highest), k, NO_COLUMN), 0)
        better = (slot < NO_COLUMN) & ((lookahead == 0) | (highest > best))
        lookahead = tl.where(better, slot, lookahead)
        best = tl.where(better, highest, best)
        anchor = tl.maximum(anchor, tl.max(tl.where(k == 0, own, float("-inf")), 0))

    if (live > 0) & (malformed == 0):
        # Equal confidence: the anchor comes last.
        winner = tl.where((anchor > best) | (force_anchor != 0), 0, lookahead)
        window_row = (b * slots + winner) * window
        columns = tl.load(length + b * slots + winner)
        has_eos = tl.load(eos + b * slots + winner) != 0
        column, span = block_columns(cache - prompt, block_size, window, BLOCKS, SPAN)
        before = column - span
        at = window_row + column
        inside = (column >= 0) & (column < window)
        old = tl.load(tokens + at, inside, 0)
        has_before = (before >= first) & (before < window)
        old_before = tl.load(tokens + at - span, has_before, 0)
        has_row = inside & (column - shift >= 0)
        own_token = tl.load(token + at - shift, has_row, carried_token)
        own_prob = tl.load(prob + at - shift, has_row, carried_prob)
        own_score = tl.load(score + at - shift, has_row, carried_score)
        # 4. With shifted logits the last committed row becomes the carry.
        last = window_row + commits - 1
        moves = (shift != 0) & (commits > 0)
        carried_token = tl.where(moves, tl.load(token + last, moves, 0), carried_token)
        carried_prob = tl.where(moves, tl.load(prob + last, moves, 0.0), carried_prob)
        carried_score = tl.where(moves, tl.load(score + last, moves, 0.0), carried_score)

        # 5. Fill, block by block.
        is_open = inside & (column >= first) & (column < columns) & (old == mask_id)
        fill, key = fill_columns(
            column,
            is_open,
            has_before & (old_before == mask_id),
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
        is_eos = (own_token == eos_id) & (own_token >= 0)
        still_open = is_open & ~fill
        offset = cache - prompt
        generated = columns + offset  # positions
        last_block = (generated - 1) // block_size * block_size - offset  # its first column
        counts = tl.sum(fill.to(tl.int32) + ((key > LOWEST_KEY).to(tl.int32) << 16))
        filled = counts & 0xFFFF
        rankable_left = (counts >> 16) & 0xFFFF
        in_last = still_open & (column >= last_block)
        counts = tl.sum(in_last.to(tl.int32) + ((fill & is_eos).to(tl.int32) << 16))
        last_open = counts & 0xFFFF
        has_eos = has_eos | ((counts >> 16) != 0)
        first_open = tl.min(tl.where(still_open, column, NO_COLUMN))
        had_open = (filled > 0) | (first_open < NO_COLUMN)

        # 7. Leading complete blocks; 8. all columns below are counted after the slide.
        next_cache = cache + commits
        next_columns = columns - commits
        next_offset = next_cache - prompt
        complete = tl.minimum(next_columns, first_open - commits)
        next_commits = (complete + next_offset) // block_size * block_size - next_offset
        next_commits = tl.maximum(next_commits, tl.maximum(-next_offset, 0))
        is_full = next_columns > next_window
        kept = tl.minimum(next_columns, next_window)
        next_commits = tl.minimum(next_commits, kept)
        spawned = tl.where(is_full, 0, tl.minimum(next_slots - 1, rankable_left))

        # 9. Which branches open a block.
        blocks = tl.where(generated > 0, (generated - 1) // block_size + 1, 0)
        may_open = (blocks < max_blocks) & ~is_full
        always = (generated <= 0) | (next_columns == 0)
        last_filled = columns - last_block - last_open
        wants = may_open & ~has_eos & (always | (last_filled >= add_count))
        fits = kept + block_size <= next_window
        opens = wants & fits

        # 10. Done, and the two ways in which a sequence cannot go on.
        is_stalled = had_open & (filled == 0) & (spawned == 0) & (commits == 0)
        is_stalled = is_stalled & (next_commits == 0) & ~opens
        is_over = (first_open - commits >= kept) & ~wants
        status = status | tl.where(is_full, WINDOW_FULL, 0) | tl.where(is_stalled, STALLED, 0)

        # 6. Spawn.
        slot = lookahead_slots(column, key, spawned)
        is_spawned = slot > 0
        branch_eos = has_eos | is_eos
        branch_filled = last_filled + (column >= last_block).to(tl.int32)
        branch_opens = ~branch_eos & (always | (branch_filled >= add_count))
        branch_opens = branch_opens & (may_open & fits)
        branch_columns = kept + tl.where(branch_opens, block_size, 0)

        tl.debug_barrier()
        next_row = b * next_slots
        new = tl.where(fill, own_token, old)
        stays = (column >= commits) & (column < commits + kept)
        to = next_tokens + next_row * next_window + column - commits
        for k in range(spawned + 1):
            tl.store(to + k * next_window, tl.where(slot == k, own_token, new), stays)
        tl.store(next_length + next_row + slot, branch_columns, is_spawned)
        tl.store(next_creation + next_row + slot, rankable(own_score), is_spawned)
        tl.store(next_eos + next_row + slot, branch_eos, is_spawned)
        k = tl.arange(0, ALL_SLOTS)
        is_anchor = k == 0
        others = (k < next_slots) & (is_anchor | (k > spawned))
        anchor_columns = kept + tl.where(opens, block_size, 0)
        tl.store(next_length + next_row + k, tl.where(is_anchor, anchor_columns, 0), others)
        tl.store(next_creation + next_row + k, tl.where(is_anchor, 1.0, 0.0), others)
        tl.store(next_eos + next_row + k, is_anchor & has_eos, others)
        for k0 in range(0, next_slots, NEXT_SLOTS):
            k = k0 + tl.arange(0, NEXT_SLOTS)
            c = tl.arange(0, NEXT_WINDOW)[None, :]
            blank = (k > spawned)[:, None] | (c >= kept)
            blank = blank & (k < next_slots)[:, None] & (c < next_window)
            to = next_tokens + ((next_row + k) * next_window)[:, None] + c
            tl.store(to, tl.zeros([NEXT_SLOTS, NEXT_WINDOW], tl.int64) + mask_id, blank)
        tl.store(committed + b * window + column, tl.where(column < commits, old, -1), inside)
        tl.store(winner_out + b, winner)
        tl.store(filled_out + b, filled)
        tl.store(status_out + b, status)
        tl.store(next_branches + b, 1 + spawned)
        tl.store(next_cache_len + b, next_cache)
        tl.store(next_commit_len + b, next_commits)
        tl.store(next_prompt_len + b, prompt)
        tl.store(next_carry_token + b, carried_token)
        tl.store(next_carry_prob + b, carried_prob)
        tl.store(next_carry_score + b, carried_score)
        tl.store(next_done + b, is_over | is_stalled | is_full)
    else:
        # A sequence that is done, or cannot be worked on, keeps its state.
        row = b * slots
        next_row = b * next_slots
        columns = tl.minimum(window, next_window)
        k = tl.arange(0, ALL_SLOTS)
        exists = (k < slots) & (k < next_slots)
        old_columns = tl.load(length + row + k, exists, 0)
        old_creation = tl.load(creation + row + k, exists, 0.0)
        old_eos = tl.load(eos + row + k, exists, 0)
        tl.debug_barrier()
        kept_columns = tl.minimum(tl.maximum(old_columns, 0), columns)
        tl.store(next_length + next_row + k, kept_columns, k < next_slots)
        tl.store(next_creation + next_row + k, old_creation, k < next_slots)
        tl.store(next_eos + next_row + k, old_eos, k < next_slots)
        tl.store(confidence + row + k, tl.full([ALL_SLOTS], float("-inf"), tl.float32), k < slots)
        for k0 in range(0, next_slots, NEXT_SLOTS):
            # In place, every element is read and written as it is: no order is needed.
            k = k0 + tl.arange(0, NEXT_SLOTS)
            c = tl.arange(0, NEXT_WINDOW)[None, :]
            is_old = (k < slots)[:, None] & (c < columns)
            at = ((row + k) * window)[:, None] + c
            kept_tokens = tl.load(tokens + at, is_old, mask_id)
            to = next_tokens + ((next_row + k) * next_window)[:, None] + c
            tl.store(to, kept_tokens, (k < next_slots)[:, None] & (c < next_window))
        c = tl.arange(0, WINDOW)
        tl.store(committed + b * window + c, tl.full([WINDOW], -1, tl.int64), c < window)
        tl.store(winner_out + b, 0)
        tl.store(filled_out + b, 0)
        tl.store(status_out + b, tl.where(is_done, 0, BAD_STATE))
        live_slots = tl.minimum(slots, next_slots)
        tl.store(next_branches + b, tl.minimum(tl.maximum(live_in, 1), live_slots))
        tl.store(next_cache_len + b, cache_in)
        tl.store(next_commit_len + b, commits_in)
        tl.store(next_prompt_len + b, prompt_in)
        tl.store(next_carry_token + b, carried_token)
        tl.store(next_carry_prob + b, carried_prob)
        tl.store(next_carry_score + b, carried_score)
        tl.store(next_done + b, True)
