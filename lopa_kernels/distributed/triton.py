# mypy: allow-untyped-defs
"""What a rank does around an exchange, in Triton: one launch each instead of a dozen copies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lopa_kernels._triton import on_device
from lopa_kernels.state import LopaState

_BLOCK = 256


@triton.jit(do_not_specialize=["count"])
def _pack_kernel(token, prob, score, packed, count, BLOCK: tl.constexpr):
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = item < count
    tl.store(packed + item, tl.load(token + item, mask=inside).to(tl.int32), mask=inside)
    bits = tl.load(prob + item, mask=inside).to(tl.int32, bitcast=True)
    tl.store(packed + count + item, bits, mask=inside)
    bits = tl.load(score + item, mask=inside).to(tl.int32, bitcast=True)
    tl.store(packed + 2 * count + item, bits, mask=inside)


def pack(
    token: torch.Tensor, prob: torch.Tensor, score: torch.Tensor, packed: torch.Tensor
) -> None:
    """Statistics [B, places, W] into `packed`, int32 [3, B, places, W]."""
    count = token.numel()
    if count == 0:
        return
    with on_device(packed):
        _pack_kernel[(triton.cdiv(count, _BLOCK),)](
            token.contiguous(), prob.contiguous(), score.contiguous(), packed, count, BLOCK=_BLOCK
        )


@triton.jit(do_not_specialize=["window", "places", "plane"])
def _unpack_kernel(
    slots, token, prob, score, window, places, plane, tiles, branches, BLOCK: tl.constexpr
):
    """grid (B * K * tiles): a tile of the columns of one slot."""
    row = tl.program_id(0) // tiles
    b = (row // branches).to(tl.int64)
    slot = row % branches
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = column < window
    address = tl.load(slots + slot)
    source = address.to(tl.pointer_type(tl.int32)) + b * places * window + column
    target = row.to(tl.int64) * window + column
    tl.store(token + target, tl.load(source, mask=inside).to(tl.int64), mask=inside)
    bits = tl.load(source + plane, mask=inside)
    tl.store(prob + target, bits.to(tl.float32, bitcast=True), mask=inside)
    bits = tl.load(source + 2 * plane, mask=inside)
    tl.store(score + target, bits.to(tl.float32, bitcast=True), mask=inside)


def unpack(
    slots: torch.Tensor, places: int, token: torch.Tensor, prob: torch.Tensor, score: torch.Tensor
) -> None:
    """Statistics [B, K, W] of all slots, from the packed ones of the ranks that own them.

    `slots` is int64 [K], the address of ``packed[0, 0, place]`` of each slot.
    """
    batch, branches, window = token.shape
    if token.numel() == 0:
        return
    tiles = triton.cdiv(window, _BLOCK)
    with on_device(token):
        _unpack_kernel[(batch * branches * tiles,)](
            slots, token, prob, score, window, places, batch * places * window, tiles, branches,
            BLOCK=_BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["own_start", "own_count", "slots", "places", "window"])
def _local_kernel(
    source, tokens, length, creation, eos, branches, done,
    own_tokens, own_length, own_creation, own_eos, own_branches, own_done,
    own_start, own_count, slots, places, window, tiles, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (B * places * tiles)."""
    row = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    b = row // places
    place = row % places
    alive = tl.load(branches + b)
    slot = tl.load(source + place).to(tl.int32)
    slot = tl.where(slot < alive, slot, 0)
    old = (b * slots + slot).to(tl.int64)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    inside = column < window
    held = tl.load(tokens + old * window + column, mask=inside)
    tl.store(own_tokens + row.to(tl.int64) * window + column, held, mask=inside)
    if tile == 0:
        tl.store(own_length + row, tl.load(length + old))
        tl.store(own_creation + row, tl.load(creation + old))
        tl.store(own_eos + row, tl.load(eos + old))
        if place == 0:
            live = tl.minimum(tl.maximum(alive - own_start, 0), own_count)
            tl.store(own_branches + b, tl.maximum(live, 1))
            ended = tl.load(done + b).to(tl.int32) | (live == 0).to(tl.int32)
            tl.store(own_done + b, ended.to(tl.uint8))


def local_state(state: LopaState, own: range, source: torch.Tensor) -> LopaState:
    """As :func:`lopa_kernels.distributed.partition.local_state`, in one launch."""
    batch, slots, window = state.tokens.shape
    places = source.numel()
    made = state._replace(
        tokens=state.tokens.new_empty(batch, places, window),
        length=state.length.new_empty(batch, places),
        creation=state.creation.new_empty(batch, places),
        eos=state.eos.new_empty(batch, places),
        branches=torch.empty_like(state.branches),
        done=torch.empty_like(state.done),
    )
    if batch == 0:
        return made
    tiles = triton.cdiv(window, _BLOCK)
    with on_device(state.tokens):
        _local_kernel[(batch * places * tiles,)](
            source, state.tokens.contiguous(), state.length.contiguous(),
            state.creation.contiguous(), state.eos.contiguous().view(torch.uint8),
            state.branches.contiguous(), state.done.contiguous().view(torch.uint8),
            made.tokens, made.length, made.creation, made.eos.view(torch.uint8), made.branches,
            made.done.view(torch.uint8), own.start, len(own), slots, places, window, tiles,
            BLOCK=_BLOCK,
        )  # fmt: skip
    return made
