# mypy: allow-untyped-defs
"""Commit-Winner-Cache from the windows of several devices, in Triton.

The winner is read on the device, and a table of addresses says where its slot is: in this device's
memory or, over NVLink, in a peer's. All layers are one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lopa_kernels._triton import check_shape, check_tensor, fail, on_device
from lopa_kernels.ops.kv_cache.triton import _programs
from lopa_kernels.status import Status

_BAD_STATE = tl.constexpr(int(Status.BAD_STATE))
_CACHE_FULL = tl.constexpr(int(Status.CACHE_FULL))

#: words that a program copies at a time
_BLOCK = 1024


@triton.jit(do_not_specialize=["status_stride", "batch", "slots", "columns", "capacity"])
def _peer_commit_kernel(
    k_cache, v_cache, k_slots, v_slots, winner, cache_len, commit_len, status, status_stride,
    k_layer, k_batch, k_position, k_row, v_layer, v_batch, v_position, v_row,
    window_layer, window_batch, window_column, window_row, batch, slots, columns, capacity,
    ROWS: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (parts, 2 * layers * batch): the programs of a layer's K or V of a sequence share its
    committed columns."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    unit = tl.program_id(1) // batch
    b = (tl.program_id(1) % batch).to(tl.int64)
    layer = (unit // 2).to(tl.int64)
    slot = tl.load(winner + b).to(tl.int64)
    start = tl.load(cache_len + b).to(tl.int64)
    count = tl.load(commit_len + b).to(tl.int64)
    bad = (start < 0) | (count < 0) | (count > columns)
    full = start + count > capacity
    missing = (count > 0) & ((slot < 0) | (slot >= slots))
    fault = tl.where(bad, _BAD_STATE, tl.where(full, _CACHE_FULL, tl.where(missing, _BAD_STATE, 0)))
    if status is not None:
        word = status + b * status_stride
        faulty = (part + unit == 0) & (fault != 0)
        tl.store(word, tl.load(word, mask=faulty, other=0) | fault, mask=faulty)
    # Without a fault the slot is in range wherever there is something to copy.
    items = tl.where(fault == 0, count, 0) * (ROWS * ROW)
    slot = tl.where((slot < 0) | (slot >= slots), 0, slot)
    # Selected, not branched over: the strides of K and V may come as integers of different types.
    keys = unit % 2 == 0
    address = tl.load(tl.where(keys, k_slots, v_slots) + slot)
    position_stride = tl.where(keys, k_position, v_position).to(tl.int64)
    row_stride = tl.where(keys, k_row, v_row).to(tl.int64)
    target = tl.where(keys, k_cache, v_cache) + start * position_stride
    target += layer * tl.where(keys, k_layer, v_layer) + b * tl.where(keys, k_batch, v_batch)
    source = address.to(tl.pointer_type(k_cache.dtype.element_ty))
    source += layer * window_layer + b * window_batch
    for tile in range(part, tl.cdiv(items, BLOCK), parts):
        item = tile * BLOCK + tl.arange(0, BLOCK)
        inside = item < items
        column = item // (ROWS * ROW)
        row = item // ROW % ROWS
        element = item % ROW
        words = tl.load(
            source + column * window_column + row * window_row + element, mask=inside, other=0
        )
        tl.store(target + column * position_stride + row * row_stride + element, words, mask=inside)


def _word(tensors: list[torch.Tensor]) -> torch.dtype:
    """The widest integer that the rows of all tensors are made of, their alignment included."""
    size = tensors[0].element_size()
    for dtype in (torch.int64, torch.int32, torch.int16):
        factor = dtype.itemsize // size
        if factor and all(
            t.shape[-1] % factor == 0
            and t.data_ptr() % dtype.itemsize == 0
            and t.storage_offset() % factor == 0
            and all(stride % factor == 0 for stride in t.stride()[:-1])
            for t in tensors
        ):
            return dtype
    raise AssertionError("every element is a word")


def peer_commit_(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    window: torch.Tensor,
    k_slots: torch.Tensor,
    v_slots: torch.Tensor,
    winner: torch.Tensor,
    cache_len: torch.Tensor,
    commit_len: torch.Tensor,
    status: torch.Tensor | None = None,
) -> None:
    """:func:`lopa_kernels.kv_commit_` where each branch slot has an address of its own.

    Args:
        k_cache, v_cache: bf16, fp16 or fp32 [L, B, S, Hk, D], unit stride on D; written.
        window: [L, B, places, W, Hk, D], this rank's K windows: their strides are those of all
            ranks' K and V windows. Not read.
        k_slots, v_slots: int64 [K], the address of ``window[0, 0, place]`` of each slot, on the
            device that owns it.
        winner, cache_len, commit_len, status: as for kv_commit_, int32 [B].

    A commit that does not fit is dropped, and reported in `status`. The caller orders the reads
    after the writes of the other devices.

    Raises:
        RuntimeError: dtype, shape, device or stride of an argument.
    """
    op = "peer_commit_"
    layers, batch, _, columns, heads, head_dim = window.shape
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        shape = (layers, batch, k_cache.shape[2], heads, head_dim)
        check_tensor(op, name, cache, window.dtype, shape, window.device)
        if cache.stride(-1) != 1:
            fail(op, name, "unit stride in the last dimension", f"strides {list(cache.stride())}")
    for name, table in (("k_slots", k_slots), ("v_slots", v_slots)):
        check_tensor(op, name, table, torch.int64, k_slots.shape, window.device)
        check_shape(op, name, table, (k_slots.numel(),))
    for name, lengths in (("winner", winner), ("cache_len", cache_len), ("commit_len", commit_len)):
        check_tensor(op, name, lengths, torch.int32, (batch,), window.device)
    if status is not None:
        check_tensor(op, "status", status, torch.int32, (batch,), window.device)
    if window.numel() == 0:
        return
    word = _word([k_cache, v_cache, window])
    k_words, v_words, window_words = (t.view(word) for t in (k_cache, v_cache, window))
    rows, row = heads, k_words.shape[-1]
    strides = window_words.stride()
    if all(t.stride(-2) == row for t in (k_words, v_words, window_words)):
        rows, row = 1, heads * row
    units = 2 * layers * batch
    tiles = triton.cdiv(columns * rows * row, _BLOCK)
    parts = max(min(tiles, triton.cdiv(_programs(window.device), units)), 1)
    with on_device(window):
        _peer_commit_kernel[(parts, units)](
            k_words, v_words, k_slots, v_slots,
            winner.contiguous(), cache_len.contiguous(), commit_len.contiguous(), status,
            0 if status is None else status.stride(0), *k_words.stride()[:4], *v_words.stride()[:4],
            strides[0], strides[1], strides[3], strides[4],
            batch, k_slots.numel(), columns, k_cache.shape[2], ROWS=rows, ROW=row, BLOCK=_BLOCK,
        )  # fmt: skip
