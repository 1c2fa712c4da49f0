# mypy: allow-untyped-defs
"""The kernels of branch_attention in Triton: an online softmax over tiles of keys, and its merge.

The rows of a tile are branch x column x query head of one KV head, in this order, so that a tile of
the prefix is loaded once for all of them. Rows of a sequence see the prefix alike; the keys of the
windows lie in one list, branch after branch, of which a row sees one run. A tile of rows goes
through the tiles of the prefix, then through those of the windows of its own branches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lopa_kernels._triton_math import INTERPRETED, narrow

__all__ = ["attend_kernel", "merge_kernel"]

_INF = tl.constexpr(float("inf"))
_LN_2 = tl.constexpr(0.6931471805599453)
_MAX_INT32 = tl.constexpr(2**31 - 1)


@triton.jit
def _operand(x):
    """Of a product; the interpreter would multiply the bits of bf16."""
    return x.to(tl.float32) if INTERPRETED else x


@triton.jit
def _load_rows(
    base, at, seen, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Rows of HEAD_DIM elements at offsets `at`; 0 where not `seen` and beyond HEAD_DIM."""
    d = tl.arange(0, BLOCK_D)[None, :]
    pointers = base + at[:, None] + d
    if MASKED:
        result = tl.load(pointers, mask=seen[:, None] & (d < HEAD_DIM), other=0.0)
    elif HEAD_DIM < BLOCK_D:
        result = tl.load(pointers, mask=d < HEAD_DIM, other=0.0)
    else:
        result = tl.load(pointers)
    return result


@triton.jit
def _scores(q, keys):
    return tl.dot(_operand(q), tl.trans(_operand(keys)), input_precision="ieee")


@triton.jit
def _fold(scores, values, largest, total, accumulator, scale):
    """Takes a tile of keys into the running softmax.

    Scores are products of queries and keys; `scale`, which is positive, makes logarithms to base 2
    of them. `largest` is one of those, and -inf as long as a row has seen nothing.
    """
    raised = tl.maximum(largest, tl.max(scores, 1) * scale)
    base = tl.where(raised == -_INF, 0.0, raised)
    weights = tl.exp2(scores * scale - base[:, None])
    keep = tl.exp2(largest - base)
    total = total * keep + tl.sum(weights, 1)
    accumulator = tl.dot(
        _operand(narrow(weights, values.dtype)), _operand(values), accumulator * keep[:, None],
        input_precision="ieee",
    )  # fmt: skip
    return raised, total, accumulator, weights


@triton.jit
def _pages(table, start, cache_len, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of a tile of the prefix, or of each of its keys if pages are shorter than tiles."""
    if PAGE >= BLOCK_N:
        result = tl.load(table + start // PAGE, mask=start < cache_len, other=-1)
    else:
        position = start + tl.arange(0, BLOCK_N)
        result = tl.load(table + position // PAGE, mask=position < cache_len, other=-1)
    return result


@triton.jit
def _common_tile(
    q, largest, total, accumulator, scale, k_cache, v_cache,
    k_cache_page, k_cache_position, v_cache_page, v_cache_position,
    start, cache_len, page, pages,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Keys that all rows see alike: start..start + BLOCK_N, those below `cache_len`.

    All of them are if WHOLE. They are the prefix's, or a window's that has no pages.
    """
    MASKED: tl.constexpr = (not WHOLE) or PAGE > 0
    n = tl.arange(0, BLOCK_N)
    seen = n >= 0 if WHOLE else start + n < cache_len
    position = n
    k_first = tl.cast(start, tl.int64) * k_cache_position
    v_first = tl.cast(start, tl.int64) * v_cache_position
    if PAGE > 0:
        # Of each key; the interpreter does not broadcast conditions.
        own_page = tl.zeros([BLOCK_N], tl.int32) + page
        seen = seen & (own_page >= 0) & (own_page < pages)
        number = tl.where((page >= 0) & (page < pages), page, 0).to(tl.int64)
        # Tiles and pages begin at multiples of their sizes, which are powers of two.
        position = n % PAGE
        begin = tl.cast(start % PAGE, tl.int64)
        if PAGE < BLOCK_N:
            begin = tl.cast(0, tl.int64)
        k_first = number * k_cache_page + begin * k_cache_position
        v_first = number * v_cache_page + begin * v_cache_position
    k_at = k_first + position.to(tl.int64) * k_cache_position
    v_at = v_first + position.to(tl.int64) * v_cache_position
    keys = _load_rows(k_cache, k_at, seen, HEAD_DIM, BLOCK_D, MASKED)
    scores = _scores(q, keys)
    if MASKED:
        scores = tl.where(seen[None, :], scores, -_INF)
    values = _load_rows(v_cache, v_at, seen, HEAD_DIM, BLOCK_D, MASKED)
    largest, total, accumulator, _ = _fold(scores, values, largest, total, accumulator, scale)
    return largest, total, accumulator


@triton.jit
def _add_nonfinite(
    accumulator, weights, first, last, start, end, v_window, v_window_branch, v_window_column,
    length, window, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What a tile's NaN and infinite values add to the rows that see them, key by key."""
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    for i in range(BLOCK_N):
        key = start + i
        branch = key // window
        column = key - branch * window
        columns = tl.load(length + branch, mask=key < end, other=0)
        elements = tl.where((key < end) & (column < columns), HEAD_DIM, 0)
        at = branch.to(tl.int64) * v_window_branch + column.to(tl.int64) * v_window_column
        value = tl.load(v_window + at + d, mask=d < elements, other=0.0).to(tl.float32)
        value = tl.where(tl.abs(value) < _INF, 0.0, value)
        weight = tl.sum(tl.where((n == i)[None, :], weights, 0.0), 1)
        sees = (key >= first) & (key < last)
        accumulator += tl.where(sees[:, None], weight[:, None] * value[None, :], 0.0)
    return accumulator


@triton.jit
def _rows_of(index, rows, length, window, GROUP: tl.constexpr):
    """Branch, column and head of the group of rows, and whether they are queries."""
    branch = index // (window * GROUP)
    place = index - branch * (window * GROUP)
    column = place // GROUP
    columns = tl.load(length + branch, mask=index < rows, other=0)
    return branch, column, place - column * GROUP, (index < rows) & (column < columns)


@triton.jit
def _store(
    out, lse, b, branch, column, head, inside, live, largest, total, accumulator,
    out_batch, out_branch, out_column, out_head, branches, window, q_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)[None, :]
    total = tl.where(live, total, 1.0)
    result = tl.where(live[:, None], accumulator / total[:, None], 0.0)
    at = branch.to(tl.int64) * out_branch + column.to(tl.int64) * out_column
    at += b * out_batch + head.to(tl.int64) * out_head
    mask = inside[:, None] & (d < HEAD_DIM)
    tl.store(out + at[:, None] + d, narrow(result, out.dtype.element_ty), mask=mask)
    if lse is not None:
        row = (b * branches + branch) * q_heads + head
        logarithm = tl.where(live, (largest + tl.log2(total)) * _LN_2, -_INF)
        tl.store(lse + row * window + column, logarithm, mask=inside)


@triton.jit(
    do_not_specialize=[
        "branches", "window", "rows", "capacity", "pages", "kv_heads", "tiles", "table_stride",
        "block_size",
    ]
)  # fmt: skip
def attend_kernel(
    q, k_cache, v_cache, k_window, v_window, cache_len, length, prompt_len, block_table, out, lse,
    maxima, sums, sums_of_values,
    q_batch, q_branch, q_column, q_head,
    k_cache_batch, k_cache_position, k_cache_head,
    v_cache_batch, v_cache_position, v_cache_head,
    k_window_batch, k_window_branch, k_window_column, k_window_head,
    v_window_batch, v_window_branch, v_window_column, v_window_head,
    out_batch, out_branch, out_column, out_head,
    table_stride, branches, window, rows, capacity, pages, kv_heads, tiles, block_size, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE: tl.constexpr, SIGN: tl.constexpr, SPLITS: tl.constexpr,
    MIN_SHARE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program a tile of rows and share of its tiles of keys: grid (batch, head, share, tile).

    With SPLITS > 1 a program leaves what it has for `merge_kernel`, and a sum of 0 where its share
    is empty.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0) % tiles
    unit = tl.program_id(0) // tiles
    share = unit % SPLITS
    unit = unit // SPLITS
    b = (unit // kv_heads).to(tl.int64)
    kv_head = (unit % kv_heads).to(tl.int64)
    length += b * branches
    cached = tl.minimum(tl.maximum(tl.load(cache_len + b), 0), capacity)

    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = index < rows
    branch, column, member, live = _rows_of(index, rows, length, window, GROUP)
    head = kv_head * GROUP + member
    # Each row sees one run of the list of all the windows' columns.
    columns = tl.minimum(tl.load(length + branch, mask=inside, other=0), window)
    if prompt_len is not None:
        prompt = tl.load(prompt_len + b).to(tl.int64) - tl.load(cache_len + b)
        block = tl.maximum(column - prompt, 0) // block_size + 1
        block_end = tl.where(column < prompt, prompt, prompt + block * block_size)
        columns = tl.minimum(columns.to(tl.int64), block_end).to(tl.int32)
    first = branch * window
    last = first + columns
    begin = tl.min(tl.where(live, first, _MAX_INT32), 0)
    end = tl.max(tl.where(live, last, 0), 0)
    latest_first = tl.max(tl.where(live, first, 0), 0)
    earliest_last = tl.min(tl.where(live, last, _MAX_INT32), 0)

    prefix_tiles = tl.where(end > 0, (cached + BLOCK_N - 1) // BLOCK_N, 0)
    window_tiles = tl.where(end > 0, (end - begin + BLOCK_N - 1) // BLOCK_N, 0)
    all_tiles = prefix_tiles + window_tiles
    per_share = tl.maximum((all_tiles + SPLITS - 1) // SPLITS, MIN_SHARE)
    from_tile = tl.minimum(share * per_share, all_tiles)
    to_tile = tl.minimum(from_tile + per_share, all_tiles)

    q_at = branch.to(tl.int64) * q_branch + column.to(tl.int64) * q_column
    q_at += b * q_batch + head * q_head
    queries = _load_rows(q, q_at, live, HEAD_DIM, BLOCK_D, True)
    if SIGN != 1:
        queries = narrow(queries.to(tl.float32) * SIGN, queries.dtype)
    largest = tl.full([BLOCK_M], -_INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    table = block_table
    k_cache += kv_head * k_cache_head
    v_cache += kv_head * v_cache_head
    if PAGE > 0:
        table += b * table_stride
    else:
        k_cache += b * k_cache_batch
        v_cache += b * v_cache_batch
    whole = tl.minimum(cached // BLOCK_N, to_tile)
    page = 0
    if PAGE > 0:
        page = _pages(table, from_tile * BLOCK_N, cached, PAGE, BLOCK_N)
    for i in tl.range(from_tile, whole):
        start = i * BLOCK_N
        # A tile ahead, so that nobody waits for the page before asking for its keys.
        next_page = page
        if PAGE > 0:
            next_page = _pages(table, start + BLOCK_N, cached, PAGE, BLOCK_N)
        largest, total, accumulator = _common_tile(
            queries, largest, total, accumulator, scale, k_cache, v_cache,
            k_cache_batch, k_cache_position, v_cache_batch, v_cache_position,
            start, cached, page, pages, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE, True,
        )  # fmt: skip
        page = next_page
    # The last tile of the prefix, if it is not whole and in this share.
    if (from_tile <= cached // BLOCK_N) & (cached // BLOCK_N < tl.minimum(prefix_tiles, to_tile)):
        largest, total, accumulator = _common_tile(
            queries, largest, total, accumulator, scale, k_cache, v_cache,
            k_cache_batch, k_cache_position, v_cache_batch, v_cache_position,
            cached // BLOCK_N * BLOCK_N, cached, page, pages,
            HEAD_DIM, BLOCK_D, BLOCK_N, PAGE, False,
        )  # fmt: skip

    k_window += b * k_window_batch + kv_head * k_window_head
    v_window += b * v_window_batch + kv_head * v_window_head
    from_window = tl.maximum(from_tile - prefix_tiles, 0)
    to_window = tl.maximum(to_tile - prefix_tiles, 0)
    # Whole tiles that all rows see, which are of one branch then: most of a long window.
    common = tl.where(latest_first == begin, (earliest_last - begin) // BLOCK_N, 0)
    common = tl.minimum(common, to_window)
    own_branch = (begin // window).to(tl.int64)
    k_own = k_window + own_branch * k_window_branch
    v_own = v_window + own_branch * v_window_branch
    for i in tl.range(from_window, common):
        largest, total, accumulator = _common_tile(
            queries, largest, total, accumulator, scale, k_own, v_own,
            0, k_window_column, 0, v_window_column, i * BLOCK_N, window, 0, 0,
            HEAD_DIM, BLOCK_D, BLOCK_N, 0, True,
        )  # fmt: skip
    for i in tl.range(tl.maximum(from_window, common), to_window, num_stages=1):
        start = begin + i * BLOCK_N
        key = start + tl.arange(0, BLOCK_N)
        key_branch = key // window
        key_column = key - key_branch * window
        limit = tl.load(length + key_branch, mask=key < end, other=0)
        there = (key < end) & (key_column < limit)
        k_at = key_branch.to(tl.int64) * k_window_branch
        k_at += key_column.to(tl.int64) * k_window_column
        v_at = key_branch.to(tl.int64) * v_window_branch
        v_at += key_column.to(tl.int64) * v_window_column
        keys = _load_rows(k_window, k_at, there, HEAD_DIM, BLOCK_D, True)
        values = _load_rows(v_window, v_at, there, HEAD_DIM, BLOCK_D, True)
        # Where rows see different keys, a weight of 0 must not meet another row's NaN.
        mixed = (latest_first > start) | (earliest_last < tl.minimum(start + BLOCK_N, end))
        nonfinite = 0
        if mixed:
            finite = tl.abs(values.to(tl.float32)) < _INF
            nonfinite = tl.max(tl.max((finite == 0).to(tl.int32), 1), 0)
            values = tl.where(finite, values, 0.0)
        scores = _scores(queries, keys)
        seen = (key[None, :] >= first[:, None]) & (key[None, :] < last[:, None])
        scores = tl.where(seen, scores, -_INF)
        largest, total, accumulator, weights = _fold(
            scores, values, largest, total, accumulator, scale
        )
        if nonfinite != 0:
            accumulator = _add_nonfinite(
                accumulator, weights, first, last, start, end, v_window, v_window_branch,
                v_window_column, length, window, HEAD_DIM, BLOCK_D, BLOCK_N,
            )  # fmt: skip

    if SPLITS == 1:
        _store(
            out, lse, b, branch, column, head, inside, live, largest, total, accumulator,
            out_batch, out_branch, out_column, out_head, branches, window, kv_heads * GROUP,
            HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    else:
        row = (unit.to(tl.int64) * SPLITS + share) * rows + index
        tl.store(maxima + row, largest, mask=inside)
        tl.store(sums + row, total, mask=inside)
        if from_tile < to_tile:
            d = tl.arange(0, BLOCK_D)[None, :]
            mask = live[:, None] & (d < HEAD_DIM)
            tl.store(sums_of_values + row[:, None] * HEAD_DIM + d, accumulator, mask=mask)


@triton.jit(do_not_specialize=["branches", "window", "rows", "kv_heads", "tiles"])
def merge_kernel(
    maxima, sums, sums_of_values, length, out, lse,
    out_batch, out_branch, out_column, out_head,
    branches, window, rows, kv_heads, tiles,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The shares of `attend_kernel` in their order: grid (batch, head, tile of BLOCK_M rows)."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0) % tiles
    unit = tl.program_id(0) // tiles
    b = (unit // kv_heads).to(tl.int64)
    length += b * branches
    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = index < rows
    branch, column, member, live = _rows_of(index, rows, length, window, GROUP)
    row = unit.to(tl.int64) * SPLITS * rows + index

    # A share that saw nothing has a sum of 0, and perhaps no values; one that saw NaN has not.
    largest = tl.full([BLOCK_M], -_INF, tl.float32)
    for share in tl.static_range(SPLITS):
        at = row + tl.cast(rows, tl.int64) * share
        there = tl.load(sums + at, mask=live, other=0.0) != 0
        largest = tl.maximum(largest, tl.load(maxima + at, mask=there, other=-float("inf")))
    base = tl.where(largest == -_INF, 0.0, largest)
    d = tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for share in tl.range(SPLITS, loop_unroll_factor=4):
        at = row + tl.cast(rows, tl.int64) * share
        part = tl.load(sums + at, mask=live, other=0.0)
        there = part != 0
        weight = tl.exp2(tl.load(maxima + at, mask=there, other=-float("inf")) - base)
        values = tl.load(
            sums_of_values + at[:, None] * HEAD_DIM + d, mask=there[:, None] & (d < HEAD_DIM),
            other=0.0,
        )  # fmt: skip
        total += weight * part
        accumulator += weight[:, None] * values
    head = (unit % kv_heads).to(tl.int64) * GROUP + member
    _store(
        out, lse, b, branch, column, head, inside, live, largest, total, accumulator,
        out_batch, out_branch, out_column, out_head, branches, window, kv_heads * GROUP,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip
