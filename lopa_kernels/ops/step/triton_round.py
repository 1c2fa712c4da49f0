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
    begin,
    blend,
    block_columns,
    fill_columns,
    lookahead_slots,
    rankable,
    reduce_scores,
    score_key,
)
from lopa_kernels.status import Status

NONFINITE = tl.constexpr(int(Status.NONFINITE))
WINDOW_FULL = tl.constexpr(int(Status.WINDOW_FULL))
BAD_STATE = tl.constexpr(int(Status.BAD_STATE))
MISSING_ROW = tl.constexpr(int(Status.MISSING_ROW))
STALLED = tl.constexpr(int(Status.STALLED))

# Below the key of every branch.
NO_BRANCH = tl.constexpr(-(2**63))

# Flags of a row's statistics, as the vocabulary pass sets them.
ROW_UNUSABLE = tl.constexpr(1 | 2)  # a NaN, or no finite logit
ROW_MISSING = tl.constexpr(4)


@triton.jit
def live_branches(
    b: tl.tensor,
    branches: tl.tensor,
    cache_len: tl.tensor,
    commit_len: tl.tensor,
    prompt_len: tl.tensor,
    done: tl.tensor,
    slots: tl.tensor,
    window: tl.tensor,
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
def is_bad_length(
    columns: tl.tensor, cache: tl.tensor, commits: tl.tensor, prompt: tl.tensor, window: tl.tensor
) -> Any:
    # The window reaches past the prompt: blocks are counted from there. Where the sum overflows,
    # the length alone is out of range.
    bad = (columns < 0) | (columns > window) | (commits > columns)
    return bad | (cache + columns < prompt)


@triton.jit
def check_columns(
    c: tl.tensor,
    tile: tl.tensor,
    columns: tl.tensor,
    is_live: tl.tensor,
    first: tl.tensor,
    cache: tl.tensor,
    commits: tl.tensor,
    prompt: tl.tensor,
    window: tl.tensor,
    mask_id: tl.tensor,
) -> Any:
    """Masked columns of a tile of branches; and what puts the sequence out of range.

    That is a length, or a mask among the columns that are to be committed.
    """
    is_mask = is_live[None, :] & (tile == mask_id) & (c >= first)
    bad = is_live & is_bad_length(columns, cache, commits, prompt, window)
    return is_mask, bad[None, :] | (is_mask & (c < commits))


@triton.jit
def place_of(places: tl.tensor, at: tl.tensor, has_row: tl.tensor, LISTED: tl.constexpr) -> Any:
    """Where the statistics of a row are, and whether there are any.

    At its slot, or at its place in the list of needed rows.
    """
    place = at
    found = has_row
    if LISTED:
        place = tl.load(places + at, has_row, -1)
        found = place >= 0
    return place, found


@triton.jit(
    do_not_specialize=[
        "slots",
        "next_slots",
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
        "force_anchor",
    ]
)
def round_kernel(
    tokens: tl.tensor,
    length: tl.tensor,
    creation: tl.tensor,
    eos: tl.tensor,
    branches: tl.tensor,
    cache_len: tl.tensor,
    commit_len: tl.tensor,
    prompt_len: tl.tensor,
    carry_token: tl.tensor,
    carry_prob: tl.tensor,
    carry_score: tl.tensor,
    done: tl.tensor,
    token: tl.tensor,
    prob: tl.tensor,
    score: tl.tensor,
    flags: tl.tensor,
    places: tl.tensor,
    next_tokens: tl.tensor,
    next_length: tl.tensor,
    next_creation: tl.tensor,
    next_eos: tl.tensor,
    next_branches: tl.tensor,
    next_cache_len: tl.tensor,
    next_commit_len: tl.tensor,
    next_prompt_len: tl.tensor,
    next_carry_token: tl.tensor,
    next_carry_prob: tl.tensor,
    next_carry_score: tl.tensor,
    next_done: tl.tensor,
    winner_out: tl.tensor,
    filled_out: tl.tensor,
    confidence: tl.tensor,
    committed: tl.tensor,
    status_out: tl.tensor,
    scratch: tl.tensor,
    slots: tl.int32,
    window: tl.int32,
    next_slots: tl.int32,
    next_window: tl.int32,
    block_size: tl.int32,
    mask_id: tl.int64,
    eos_id: tl.int64,
    tau_conf: tl.tensor,
    act_count: tl.int32,
    add_count: tl.int32,
    max_blocks: tl.int32,
    group: tl.int32,
    fraction_bits: tl.int64,
    alpha_bits: tl.int64,
    by_score: tl.int32,
    by_window: tl.int32,
    force_anchor: tl.int32,
    SHIFT: tl.constexpr,
    LISTED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    REDUCTION: tl.constexpr,
    SLOTS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPAN: tl.constexpr,
    ALL_SLOTS: tl.constexpr,
    NEXT_SLOTS: tl.constexpr,
    NEXT_WINDOW: tl.constexpr,
) -> None:
    """A round from statistics by logits row, [B, K, W], or of a list of rows (`places`) with flags.

    Tiles: [WINDOW, SLOTS] of this state, [SPAN, BLOCKS] of its winner, [NEXT_WINDOW, NEXT_SLOTS] of
    the next state; ALL_SLOTS is not below the slots of both. The next state may be this state's
    memory: everything is read before a barrier, and written after it.
    """
    begin(DEPENDENT)
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

    # From here on all offsets are the sequence's own.
    tokens += b * slots * window
    length += b * slots
    creation += b * slots
    eos += b * slots
    confidence += b * slots
    committed += b * window
    if LISTED:
        places += b * slots * window
    else:
        token += b * slots * window
        prob += b * slots * window
        score += b * slots * window
    next_tokens += b * next_slots * next_window
    next_length += b * next_slots
    next_creation += b * next_slots
    next_eos += b * next_slots

    # 2. Branch confidence, and 3. the winner.
    status = 0
    malformed = 0
    best = tl.full([], NO_BRANCH, tl.int64)
    for k0 in range(0, slots, SLOTS):
        k = k0 + tl.arange(0, SLOTS)
        c = tl.arange(0, WINDOW)[:, None]
        in_slots = k < slots
        in_tile = in_slots[None, :] & (c < window)
        at = (k * window)[None, :] + c
        # Columns that turn out not to be open are read too: it saves waiting for the tokens.
        tile = tl.load(tokens + at, in_tile, 0)
        place, found = place_of(places, at - SHIFT, in_tile & (c >= SHIFT), LISTED)
        value = tl.load(score + place, found, 0.0)
        if SHIFT == 1:
            value = tl.where(c == 0, carried_score, value)
        columns = tl.load(length + k, in_slots, 0)
        created = tl.load(creation + k, in_slots, 0.0)

        is_live = k < live
        is_mask, bad_tile = check_columns(
            c, tile, columns, is_live, first, cache, commits, prompt, window, mask_id
        )
        is_open = is_mask & (c < columns[None, :])
        # A score that is infinite or NaN comes from a row without a usable distribution.
        unusable = is_open & ~(tl.abs(value) < float("inf"))
        counts = tl.sum(bad_tile.to(tl.int32) + (unusable.to(tl.int32) << 16))
        malformed = malformed | (counts & 0xFFFF)
        status = status | tl.where((counts >> 16) != 0, NONFINITE, 0)
        if LISTED:
            flag = tl.load(flags + place, found & is_open, 0).to(tl.int32)
            if SHIFT == 1:
                # The last committed row, which becomes the carry.
                is_last = in_tile & is_live[None, :] & (c == commits - 1)
                place, found = place_of(places, at, is_last, LISTED)
                flag = flag | tl.load(flags + place, found, 0).to(tl.int32)
            missing = (flag & ROW_MISSING) != 0
            broken = ((flag & ROW_UNUSABLE) != 0) & ~missing
            counts = tl.sum(missing.to(tl.int32) + (broken.to(tl.int32) << 16))
            status = status | tl.where((counts & 0xFFFF) != 0, MISSING_ROW, 0)
            status = status | tl.where((counts >> 16) != 0, NONFINITE, 0)

        reduced = reduce_scores(
            rankable(value),
            is_open,
            scratch + (b * slots + k) * window,
            group,
            as_double(fraction_bits),
            REDUCTION,
        )
        own = blend(created, reduced, as_double(alpha_bits))
        own = tl.where(columns == 0, 1.0, own)
        tl.store(confidence + k, tl.where(is_live, own, float("-inf")), in_slots)
        # Equal confidence: the lowest lookahead slot, and the anchor last. Nothing beats a first
        # lookahead whose confidence is NaN, as the comparisons are false.
        key = tl.where((k == 1) & (own != own), NO_COLUMN, score_key(own)).to(tl.int64)
        key = (key << 32) + tl.where(k == 0, 0, NO_COLUMN - k)
        best = tl.maximum(best, tl.max(tl.where(is_live, key, NO_BRANCH), 0))

    if (live > 0) & (malformed == 0):
        priority = (best & 0xFFFFFFFF).to(tl.int32)
        winner = tl.where((priority == 0) | (force_anchor != 0), 0, NO_COLUMN - priority)
        columns = tl.load(length + winner)
        has_eos = tl.load(eos + winner) != 0
        offset = cache - prompt
        column, span, in_block = block_columns(offset, block_size, window, BLOCKS, SPAN)
        before = column - span
        at = winner * window + column
        inside = in_block & (column >= 0) & (column < window)
        old = tl.load(tokens + at, inside, 0)
        has_before = in_block & (before >= first) & (before < window)
        old_before = tl.load(tokens + at - span, has_before, 0)
        place, found = place_of(places, at - SHIFT, inside & (column >= SHIFT), LISTED)
        own_token = tl.load(token + place, found, carried_token)
        own_prob = tl.load(prob + place, found, carried_prob)
        own_score = tl.load(score + place, found, carried_score)
        if SHIFT == 1:
            # 4. The last committed row becomes the carry.
            last = winner * window + commits - 1
            last_place, moves = place_of(places, last, commits > 0, LISTED)
            carried_token = tl.load(token + last_place, moves, carried_token)
            carried_prob = tl.load(prob + last_place, moves, carried_prob)
            carried_score = tl.load(score + last_place, moves, carried_score)

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
        new = tl.where(fill, own_token, old)
        stays = inside & (column >= commits) & (column < commits + kept)
        to = next_tokens + (column - commits)
        for branch in range(spawned + 1):
            tl.store(to + branch * next_window, tl.where(slot == branch, own_token, new), stays)
        tl.store(next_length + slot, branch_columns, is_spawned)
        tl.store(next_creation + slot, rankable(own_score), is_spawned)
        tl.store(next_eos + slot, branch_eos, is_spawned)
        k = tl.arange(0, ALL_SLOTS)
        is_anchor = k == 0
        others = (k < next_slots) & (is_anchor | (k > spawned))
        anchor_columns = kept + tl.where(opens, block_size, 0)
        tl.store(next_length + k, tl.where(is_anchor, anchor_columns, 0), others)
        tl.store(next_creation + k, tl.where(is_anchor, 1.0, 0.0), others)
        tl.store(next_eos + k, is_anchor & has_eos, others)
        for k0 in range(0, next_slots, NEXT_SLOTS):
            next_k = k0 + tl.arange(0, NEXT_SLOTS)
            next_c = tl.arange(0, NEXT_WINDOW)[:, None]
            blank = (next_k > spawned)[None, :] | (next_c >= kept)
            blank = blank & (next_k < next_slots)[None, :] & (next_c < next_window)
            blank_at = next_tokens + (next_k * next_window)[None, :] + next_c
            tl.store(blank_at, tl.zeros([NEXT_WINDOW, NEXT_SLOTS], tl.int64) + mask_id, blank)
        tl.store(committed + column, tl.where(column < commits, old, -1), inside)
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
        columns = tl.minimum(window, next_window)
        k = tl.arange(0, ALL_SLOTS)
        exists = (k < slots) & (k < next_slots)
        old_columns = tl.load(length + k, exists, 0)
        old_creation = tl.load(creation + k, exists, 0.0)
        old_eos = tl.load(eos + k, exists, 0)
        tl.debug_barrier()
        kept_columns = tl.minimum(tl.maximum(old_columns, 0), columns)
        tl.store(next_length + k, kept_columns, k < next_slots)
        tl.store(next_creation + k, old_creation, k < next_slots)
        tl.store(next_eos + k, old_eos, k < next_slots)
        tl.store(confidence + k, tl.full([ALL_SLOTS], float("-inf"), tl.float32), k < slots)
        for k0 in range(0, next_slots, NEXT_SLOTS):
            # In place, every element is read and written as it is: no order is needed.
            next_k = k0 + tl.arange(0, NEXT_SLOTS)
            next_c = tl.arange(0, NEXT_WINDOW)[:, None]
            is_old = (next_k < slots)[None, :] & (next_c < columns)
            kept_tokens = tl.load(tokens + (next_k * window)[None, :] + next_c, is_old, mask_id)
            is_next = (next_k < next_slots)[None, :] & (next_c < next_window)
            kept_at = next_tokens + (next_k * next_window)[None, :] + next_c
            tl.store(kept_at, kept_tokens, is_next)
        all_columns = tl.arange(0, WINDOW)
        nothing = tl.full([WINDOW], -1, tl.int64)
        tl.store(committed + all_columns, nothing, all_columns < window)
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
