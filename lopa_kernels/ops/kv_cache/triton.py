# mypy: allow-untyped-defs
"""The static KV cache in Triton: Commit-Winner-Cache of all layers, Pre-Write of one.

Lengths, winners and faults are read on the device; grids follow from shapes alone.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from lopa_kernels import _dispatch
from lopa_kernels._dispatch import implements_triton
from lopa_kernels._triton import (
    check_floating,
    check_rank,
    check_tensor,
    fail,
    on_device,
    power_of_two,
)
from lopa_kernels._triton_math import narrow
from lopa_kernels.status import Status

_BAD_STATE = tl.constexpr(int(Status.BAD_STATE))
_CACHE_FULL = tl.constexpr(int(Status.CACHE_FULL))

# Elements of a program's tile: of bf16, four 16-byte vectors a thread. The interpreter takes its
# time by the program, whatever its size.
_TILE = 32768 if _dispatch.interpreted() else 4096
#: log2 of the longest row that Triton has tiles for
_LEVELS = tl.constexpr(20)
#: programs of a multiprocessor, each of four warps: all of a commit's are resident
_PROGRAMS = 8


@functools.cache
def _programs(device: torch.device) -> int:
    """How many programs fill the device."""
    if device.type == "cpu":
        return 12
    properties = torch.get_device_module(device).get_device_properties(device)
    return _PROGRAMS * getattr(properties, "multi_processor_count", 64)


class _Checker:
    """Checks of one call: everything is held to the dtype and device of `k_window`."""

    def __init__(self, op: str, k_window: torch.Tensor, v_window: torch.Tensor) -> None:
        self.op = op
        check_floating(op, "k_window", k_window)
        check_rank(op, "k_window", k_window, 6)
        self.dtype, self.device, self.shape = k_window.dtype, k_window.device, k_window.shape
        self.unit_stride("k_window", k_window)
        self.rows("v_window", v_window, self.shape)

    def unit_stride(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            strides = f"strides {list(tensor.stride())}"
            fail(self.op, name, "unit stride in the last dimension", strides)

    def rows(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        check_tensor(self.op, name, tensor, self.dtype, shape, self.device)
        self.unit_stride(name, tensor)

    def caches(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        check_rank(self.op, "k_cache", k_cache, 5)
        shape = (*self.shape[:2], k_cache.shape[2], *self.shape[4:])
        self.rows("k_cache", k_cache, shape)
        self.rows("v_cache", v_cache, shape)

    def lengths(self, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            shape = (self.shape[1],)
            check_tensor(self.op, name, tensor, torch.int32, shape, self.device)

    def layer(self, layer: int) -> None:
        if not 0 <= layer < self.shape[0]:
            fail(self.op, "layer", f"0 to {self.shape[0] - 1}", layer)

    def rotation(self, cos_sin: torch.Tensor | None, cache_len: torch.Tensor | None) -> None:
        self.lengths("cache_len", cache_len)
        if cos_sin is None:
            return
        head_dim = self.shape[5]
        if cache_len is None:
            fail(self.op, "cache_len", "a tensor, since cos_sin is given", "None")
        if head_dim % 2 != 0:
            fail(self.op, "cos_sin", "None, since the head dimension is odd", head_dim)
        check_rank(self.op, "cos_sin", cos_sin, 2)
        shape = (cos_sin.shape[0], head_dim)
        check_tensor(self.op, "cos_sin", cos_sin, torch.float32, shape, self.device)
        self.unit_stride("cos_sin", cos_sin)

    def norms(
        self, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, float | None]:
        """What the kernel takes: without norms no argument at all."""
        if q_norm is None and k_norm is None:
            return None, None, None
        for name, weight, other in (("q_norm", q_norm, "k_norm"), ("k_norm", k_norm, "q_norm")):
            if weight is None:
                fail(self.op, name, f"a tensor, since {other} is given", "None")
            check_tensor(self.op, name, weight, self.dtype, (self.shape[5],), self.device)
        if not 0 <= eps <= torch.finfo(torch.float32).max:
            fail(self.op, "norm_eps", "a finite number, 0 or more", eps)
        return q_norm.contiguous(), k_norm.contiguous(), eps  # type: ignore[union-attr]


@triton.jit
def _copy_rows(
    window, window_column, window_row, cache, cache_position, cache_row, item, items,
    ROWS: tl.constexpr, ROW: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Items of a list of columns: ROWS rows of ROW elements each, in CHUNKS chunks of BLOCK."""
    column = item // (ROWS * CHUNKS)
    row = item // CHUNKS % ROWS
    offset = item % CHUNKS * BLOCK
    element = tl.arange(0, BLOCK)[None, :]
    inside = (item < items)[:, None] & (offset[:, None] + element < ROW)
    source = window + (column * window_column + row * window_row + offset)[:, None] + element
    target = cache + (column * cache_position + row * cache_row + offset)[:, None] + element
    tl.store(target, tl.load(source, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["status_stride", "batch", "branches", "window", "capacity"])
def _commit_kernel(
    k_cache, v_cache, k_window, v_window, winner, cache_len, commit_len, status, status_stride,
    k_cache_layer, k_cache_batch, k_cache_position, k_cache_row,
    v_cache_layer, v_cache_batch, v_cache_position, v_cache_row,
    k_window_layer, k_window_batch, k_window_branch, k_window_column, k_window_row,
    v_window_layer, v_window_batch, v_window_branch, v_window_column, v_window_row,
    batch, branches, window, capacity,
    ROWS: tl.constexpr, ROW: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
    ITEMS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """grid (parts, 2 * layers): programs share the committed columns of all sequences.

    Their tiles of ITEMS items are one list, so that the work of a program depends on no length but
    their sum.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    unit = tl.program_id(1)
    layer = (unit // 2).to(tl.int64)
    sequence = tl.arange(0, BATCH)
    live = sequence < batch
    slot = tl.load(winner + sequence, mask=live, other=0)
    start = tl.load(cache_len + sequence, mask=live, other=0)
    count = tl.load(commit_len + sequence, mask=live, other=0)
    bad = (start < 0) | (count < 0) | (count > window)
    full = start.to(tl.int64) + count > capacity
    missing = (count > 0) & ((slot < 0) | (slot >= branches))
    fault = tl.where(bad, _BAD_STATE, tl.where(full, _CACHE_FULL, tl.where(missing, _BAD_STATE, 0)))
    if status is not None:
        word = status + sequence.to(tl.int64) * status_stride
        if part + unit == 0:
            faulty = live & (fault != 0)
            tl.store(word, tl.load(word, mask=faulty) | fault, mask=faulty)

    columns = tl.where(fault == 0, count, 0).to(tl.int64)
    tiles = tl.cdiv(columns * (ROWS * CHUNKS), ITEMS)
    end = tl.cumsum(tiles, 0) if BATCH > 1 else tiles
    for tile in range(part, tl.sum(tiles, 0), parts):
        # The sequences that end at or before this tile come before its own.
        b = tl.sum((end <= tile).to(tl.int64), 0)
        first = tl.sum(tl.where(sequence == b, end - tiles, 0), 0)
        items = tl.sum(tl.where(sequence == b, columns, 0), 0) * (ROWS * CHUNKS)
        branch = tl.load(winner + b).to(tl.int64)
        position = tl.load(cache_len + b).to(tl.int64)
        item = (tile - first) * ITEMS + tl.arange(0, ITEMS)
        if unit % 2 == 0:
            source = layer * k_window_layer + b * k_window_batch + branch * k_window_branch
            target = layer * k_cache_layer + b * k_cache_batch + position * k_cache_position
            _copy_rows(
                k_window + source, k_window_column, k_window_row,
                k_cache + target, k_cache_position, k_cache_row,
                item, items, ROWS, ROW, CHUNKS, BLOCK,
            )  # fmt: skip
        else:
            source = layer * v_window_layer + b * v_window_batch + branch * v_window_branch
            target = layer * v_cache_layer + b * v_cache_batch + position * v_cache_position
            _copy_rows(
                v_window + source, v_window_column, v_window_row,
                v_cache + target, v_cache_position, v_cache_row,
                item, items, ROWS, ROW, CHUNKS, BLOCK,
            )  # fmt: skip


@implements_triton("kv_commit_")
def kv_commit_(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    winner: torch.Tensor,
    cache_len: torch.Tensor,
    commit_len: torch.Tensor,
    status: torch.Tensor | None = None,
) -> None:
    check = _Checker("kv_commit_", k_window, v_window)
    check.caches(k_cache, v_cache)
    for name, lengths in (
        ("winner", winner), ("cache_len", cache_len), ("commit_len", commit_len), ("status", status)
    ):  # fmt: skip
        check.lengths(name, lengths)
    layers, batch, branches, window, kv_heads, head_dim = k_window.shape
    capacity = k_cache.shape[2]
    if batch == 0:
        return
    # The heads of a column as one row, where all four tensors have them so.
    dense = kv_heads == 1 or all(
        tensor.stride(-2) == head_dim for tensor in (k_cache, v_cache, k_window, v_window)
    )
    rows, row = (1, kv_heads * head_dim) if dense else (kv_heads, head_dim)
    units = 2 * layers
    if k_window.numel() == 0:  # one program looks after the status words
        rows, row, units = 1, 0, 1
    block = min(power_of_two(row), 1024)
    chunks = max(triton.cdiv(row, block), 1)
    items = _TILE // block
    tiles = batch * triton.cdiv(min(window, capacity) * rows * chunks, items)
    device = k_window.device
    parts = max(min(tiles, _programs(device) // units), 1)
    with on_device(k_window):
        _commit_kernel[(parts, units)](
            k_cache, v_cache, k_window, v_window,
            winner.contiguous(), cache_len.contiguous(), commit_len.contiguous(),
            status, 0 if status is None else status.stride(0),
            *k_cache.stride()[:4], *v_cache.stride()[:4],
            *k_window.stride()[:5], *v_window.stride()[:5],
            batch, branches, window, capacity,
            ROWS=rows, ROW=row, CHUNKS=chunks, BLOCK=block, ITEMS=items, BATCH=power_of_two(batch),
        )  # fmt: skip


@triton.jit
def _norm_scale(a, b, eps, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """What RMSNorm multiplies the rows of halves `a` and `b` by, before the weights: [ROWS, 1].

    Element d of one half goes with that of the other, then neighbours with neighbours, pairs with
    pairs and so on: the order of every backend, so that all have the same bits.
    """
    squares = a * a + b * b
    for level in tl.static_range(_LEVELS):
        if BLOCK >> level > 1:
            pairs = tl.reshape(squares, (ROWS, BLOCK >> (level + 1), 2))
            squares = tl.sum(pairs, axis=2)
    mean = tl.div_rn(squares, HALF * 2.0)
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))


@triton.jit
def _turn_rows(
    source, source_column, source_head, target, target_column, target_head,
    cache, cache_position, cache_head, cos_sin, cos_sin_stride, norm, norm_eps,
    tile, columns, cached, bad,
    HEADS: tl.constexpr, HALF: tl.constexpr, PAIRED: tl.constexpr, TURNS: tl.constexpr,
    CACHED: tl.constexpr, CLEARS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS rows of columns of HEADS rows: to the window, rotated if TURNS.

    A row is PAIRED halves of HALF elements, or HALF elements. With CACHED, columns below `cached`
    go to the cache, too. Nothing is written where `bad`, or zeros, if CLEARS. Rows that turn are
    normalised before if there are weights, `norm`.
    """
    row = tile * ROWS + tl.arange(0, ROWS)
    column, head = row // HEADS, row % HEADS
    element = tl.arange(0, BLOCK)[None, :]
    inside = (row < columns * HEADS)[:, None] & (element < HALF)
    to = target + (column * target_column + head * target_head)[:, None] + element
    if bad:
        if CLEARS:
            zero = tl.zeros((ROWS, BLOCK), target.dtype.element_ty)
            tl.store(to, zero, mask=inside)
            tl.store(to + HALF, zero, mask=inside)
    else:
        rows = source + (column * source_column + head * source_head)[:, None] + element
        low = tl.load(rows, mask=inside)
        if CACHED:
            below = inside & (column < cached)[:, None]
            copy = cache + (column * cache_position + head * cache_head)[:, None] + element
        if PAIRED:
            high = tl.load(rows + HALF, mask=inside)
            if TURNS:
                table = cos_sin + (column * cos_sin_stride)[:, None] + element
                cosine = tl.load(table, mask=inside)
                sine = tl.load(table + HALF, mask=inside)
                a, b = low.to(tl.float32), high.to(tl.float32)
                if norm is not None:
                    a, b = tl.where(inside, a, 0.0), tl.where(inside, b, 0.0)
                    scale = _norm_scale(a, b, norm_eps, HALF, ROWS, BLOCK)
                    held = element < HALF
                    a = a * scale * tl.load(norm + element, mask=held).to(tl.float32)
                    b = b * scale * tl.load(norm + HALF + element, mask=held).to(tl.float32)
                low = narrow(a * cosine - b * sine, low.dtype)
                high = narrow(b * cosine + a * sine, high.dtype)
            tl.store(to + HALF, high, mask=inside)
            if CACHED:
                tl.store(copy + HALF, high, mask=below)
        tl.store(to, low, mask=inside)
        if CACHED:
            tl.store(copy, low, mask=below)


@triton.jit(
    do_not_specialize=[
        "layer", "status_stride", "branches", "window", "columns", "capacity", "max_position",
        "q_tiles", "kv_tiles",
    ]
)  # fmt: skip
def _prewrite_kernel(
    q_out, k_window, v_window, k_cache, v_cache, layer, q, k, v, cos_sin, cache_len, commit_len,
    q_norm, k_norm, norm_eps, status, status_stride,
    q_out_batch, q_out_branch, q_out_column, q_out_head,
    k_window_layer, k_window_batch, k_window_branch, k_window_column, k_window_head,
    v_window_layer, v_window_batch, v_window_branch, v_window_column, v_window_head,
    k_cache_layer, k_cache_batch, k_cache_position, k_cache_head,
    v_cache_layer, v_cache_batch, v_cache_position, v_cache_head,
    q_batch, q_branch, q_column, q_head,
    k_batch, k_branch, k_column, k_head,
    v_batch, v_branch, v_column, v_head,
    cos_sin_stride, branches, window, columns, capacity, max_position, q_tiles, kv_tiles,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a tile of rows of queries, keys or values of one branch slot."""
    TURNS: tl.constexpr = cos_sin is not None
    CACHED: tl.constexpr = commit_len is not None
    tiles = tl.maximum(q_tiles + 2 * kv_tiles, 1)
    slot = tl.program_id(0) // tiles
    tile = (tl.program_id(0) - slot * tiles).to(tl.int64)
    b = (slot // branches).to(tl.int64)
    branch = (slot % branches).to(tl.int64)
    place = tl.cast(layer, tl.int64)
    start = tl.cast(0, tl.int64)
    count = tl.cast(0, tl.int64)
    bad = False
    if cache_len is not None:
        start = tl.load(cache_len + b).to(tl.int64)
        bad = start < 0
    full = False
    if CACHED:
        count = tl.load(commit_len + b).to(tl.int64)
        bad = bad | (count < 0) | (count > window)
        full = start + count > capacity
    if TURNS:
        bad = bad | (start + window > max_position)
    if status is not None:
        word = status + b * status_stride
        faulty = (tile == 0) & (branch == 0) & (bad | full)
        fault = tl.where(bad, _BAD_STATE, _CACHE_FULL)
        tl.store(word, tl.load(word, mask=faulty) | fault, mask=faulty)
    cached = tl.where((branch == 0) & (full == 0), count, 0)

    table = cos_sin
    k_copy = k_cache
    v_copy = v_cache
    if TURNS:
        table += start * cos_sin_stride
    if CACHED:
        k_copy += place * k_cache_layer + b * k_cache_batch + start * k_cache_position
        v_copy += place * v_cache_layer + b * v_cache_batch + start * v_cache_position
    k_to = place * k_window_layer + b * k_window_batch + branch * k_window_branch
    v_to = place * v_window_layer + b * v_window_batch + branch * v_window_branch
    if tile < q_tiles:
        if Q_HEADS > 0:
            _turn_rows(
                q + b * q_batch + branch * q_branch, q_column, q_head,
                q_out + b * q_out_batch + branch * q_out_branch, q_out_column, q_out_head,
                None, 0, 0, table, cos_sin_stride, q_norm, norm_eps, tile, columns, cached, bad,
                Q_HEADS, HALF, TURNS, TURNS, False, True, ROWS, BLOCK,
            )  # fmt: skip
    elif tile < q_tiles + kv_tiles:
        _turn_rows(
            k + b * k_batch + branch * k_branch, k_column, k_head,
            k_window + k_to, k_window_column, k_window_head, k_copy, k_cache_position, k_cache_head,
            table, cos_sin_stride, k_norm, norm_eps, tile - q_tiles, columns, cached, bad,
            KV_HEADS, HALF, TURNS, TURNS, CACHED, False, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _turn_rows(
            v + b * v_batch + branch * v_branch, v_column, v_head,
            v_window + v_to, v_window_column, v_window_head, v_copy, v_cache_position, v_cache_head,
            table, cos_sin_stride, None, None, tile - q_tiles - kv_tiles, columns, cached, bad,
            KV_HEADS, HALF, TURNS, False, CACHED, False, ROWS, BLOCK,
        )  # fmt: skip


def _prewrite(
    check: _Checker,
    q_out: torch.Tensor | None,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    layer: int,
    rows: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor],
    cos_sin: torch.Tensor | None,
    cache_len: torch.Tensor | None,
    k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None,
    commit_len: torch.Tensor | None = None,
    status: torch.Tensor | None = None,
    norms: tuple[torch.Tensor | None, torch.Tensor | None, float] = (None, None, 0),
) -> None:
    check.layer(layer)
    check.rotation(cos_sin, cache_len)
    weights = check.norms(*norms)
    if k_cache is not None and v_cache is not None:
        check.caches(k_cache, v_cache)
        check.lengths("commit_len", commit_len)
        check.lengths("status", status)
    _, batch, branches, window, kv_heads, head_dim = k_window.shape
    q, k, v = rows
    q_heads = 0 if q is None else q.shape[3]
    half = head_dim if cos_sin is None else head_dim // 2
    block = power_of_two(half)
    rows_of_tile = max(_TILE // 2 // block, 1)
    columns = window if branches * head_dim > 0 else 0
    q_tiles = triton.cdiv(columns * q_heads, rows_of_tile)
    kv_tiles = triton.cdiv(columns * kv_heads, rows_of_tile)
    # Without rows one program a sequence looks after its status word.
    slots = batch * max(branches, 1)
    programs = slots * max(q_tiles + 2 * kv_tiles, 1)
    if programs == 0:
        return

    def strides(tensor: torch.Tensor | None, count: int) -> tuple[int, ...]:
        return (0,) * count if tensor is None else tensor.stride()[:count]

    with on_device(k_window):
        # Products and sums round one by one, as on the CPU: the same bits.
        _prewrite_kernel[(programs,)](
            q_out, k_window, v_window, k_cache, v_cache, layer, q, k, v, cos_sin,
            None if cache_len is None else cache_len.contiguous(),
            None if commit_len is None else commit_len.contiguous(),
            *weights, status, *strides(status, 1),
            *strides(q_out, 4), *strides(k_window, 5), *strides(v_window, 5),
            *strides(k_cache, 4), *strides(v_cache, 4),
            *strides(q, 4), *strides(k, 4), *strides(v, 4), *strides(cos_sin, 1),
            max(branches, 1), window, columns, 0 if k_cache is None else k_cache.shape[2],
            0 if cos_sin is None else cos_sin.shape[0], q_tiles, kv_tiles,
            Q_HEADS=q_heads, KV_HEADS=max(kv_heads, 1), HALF=half, ROWS=rows_of_tile, BLOCK=block,
            enable_fp_fusion=False,
        )  # fmt: skip


def _separate(
    k_window: torch.Tensor, v_window: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[_Checker, tuple[None, torch.Tensor, torch.Tensor]]:
    check = _Checker("kv_prewrite_", k_window, v_window)
    check.rows("k", k, check.shape[1:])
    check.rows("v", v, check.shape[1:])
    return check, (None, k, v)


def _packed(
    q: torch.Tensor, k_window: torch.Tensor, v_window: torch.Tensor, qkv: torch.Tensor
) -> tuple[_Checker, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    check = _Checker("qkv_prewrite_", k_window, v_window)
    check_rank(check.op, "q", q, 5)
    q_heads, kv_heads = q.shape[3], k_window.shape[4]
    *leading, _, head_dim = check.shape[1:]
    check.rows("q", q, (*leading, q_heads, head_dim))
    check.rows("qkv", qkv, (*leading, q_heads + 2 * kv_heads, head_dim))
    query, key, value = qkv.split([q_heads, kv_heads, kv_heads], dim=3)
    return check, (query, key, value)


@implements_triton("kv_prewrite_")
def kv_prewrite_(
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    layer: int,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor | None = None,
    cache_len: torch.Tensor | None = None,
) -> None:
    check, rows = _separate(k_window, v_window, k, v)
    _prewrite(check, None, k_window, v_window, layer, rows, cos_sin, cache_len)


@implements_triton("kv_prewrite_direct_")
def kv_prewrite_direct_(
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layer: int,
    k: torch.Tensor,
    v: torch.Tensor,
    cache_len: torch.Tensor,
    commit_len: torch.Tensor,
    cos_sin: torch.Tensor | None = None,
    status: torch.Tensor | None = None,
) -> None:
    check, rows = _separate(k_window, v_window, k, v)
    _prewrite(
        check, None, k_window, v_window, layer, rows, cos_sin, cache_len,
        k_cache, v_cache, commit_len, status,
    )  # fmt: skip


@implements_triton("qkv_prewrite_")
def qkv_prewrite_(
    q: torch.Tensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    layer: int,
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    cache_len: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> None:
    check, rows = _packed(q, k_window, v_window, qkv)
    norms = (q_norm, k_norm, norm_eps)
    _prewrite(check, q, k_window, v_window, layer, rows, cos_sin, cache_len, norms=norms)


@implements_triton("qkv_prewrite_direct_")
def qkv_prewrite_direct_(
    q: torch.Tensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layer: int,
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    cache_len: torch.Tensor,
    commit_len: torch.Tensor,
    status: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> None:
    check, rows = _packed(q, k_window, v_window, qkv)
    _prewrite(
        check, q, k_window, v_window, layer, rows, cos_sin, cache_len,
        k_cache, v_cache, commit_len, status, (q_norm, k_norm, norm_eps),
    )  # fmt: skip
