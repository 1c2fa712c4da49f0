"""Peers of branch_attention, and the layouts that each of them wants its operands in."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention


class Shape(NamedTuple):
    """Letters of the contract, P being the cached prefix."""

    B: int
    K: int
    W: int
    P: int
    Hq: int = 6
    Hk: int = 2
    D: int = 64


class Peer(NamedTuple):
    """What the peers want ready made, outside the timing.

    Attributes:
        q, k_copied, v_copied: heads before positions, the prefix before every branch's window.
        q_packed, k_packed, v_packed: heads before positions, one prefix before all windows.
        block_mask: of the packed form.
        k_pool, v_pool: pages of FlashInfer; None where it is no peer.
    """

    q: torch.Tensor
    k_copied: torch.Tensor
    v_copied: torch.Tensor
    q_packed: torch.Tensor
    k_packed: torch.Tensor
    v_packed: torch.Tensor
    block_mask: BlockMask
    k_pool: torch.Tensor | None = None
    v_pool: torch.Tensor | None = None


#: positions of a page of FlashInfer's pools
PAGE = 16

#: rows and keys of a block of the block mask, FlexAttention's default
BLOCK = 128

#: bytes of FlashInfer's workspace: more than the 128 MiB that it recommends, for split prefixes of
#: many grouped heads
WORKSPACE = 512 << 20


def copied(cache: torch.Tensor, window: torch.Tensor, prefix: int) -> torch.Tensor:
    """[B * K, Hk, P + W, D]: every branch has the prefix before its window."""
    branches = window.shape[1]
    expanded = cache[:, None, :prefix].expand(-1, branches, -1, -1, -1)
    return torch.cat([expanded, window], dim=2).flatten(0, 1).transpose(1, 2)


def packed(cache: torch.Tensor, window: torch.Tensor, prefix: int) -> torch.Tensor:
    """[B, Hk, P + K * W, D]: one prefix, then the branches one after another."""
    return torch.cat([cache[:, :prefix], window.flatten(1, 2)], dim=1).transpose(1, 2).contiguous()


def pooled(cache: torch.Tensor, window: torch.Tensor, prefix: int) -> torch.Tensor:
    """[pages, PAGE, Hk, D]: the sequences' prefixes, then all windows, each in pages of its own."""

    def pages(rows: torch.Tensor) -> torch.Tensor:
        filled = pad(rows, (0, 0, 0, 0, 0, -rows.shape[1] % PAGE))
        return filled.unflatten(1, (-1, PAGE)).flatten(0, 1)

    parts = [pages(window.flatten(0, 1))]
    if prefix:
        parts.insert(0, pages(cache[:, :prefix]))
    return torch.cat(parts)


def prepared(
    shape: Shape, operands: tuple[torch.Tensor, ...], block_mask: BlockMask, pools: bool = False
) -> Peer:
    """The layouts of every peer from what branch_attention takes; FlashInfer's with `pools`."""
    q, k_cache, v_cache, k_window, v_window = operands[:5]
    keys, values = (k_cache, k_window, shape.P), (v_cache, v_window, shape.P)
    return Peer(
        q.flatten(0, 1).transpose(1, 2).contiguous(),
        copied(*keys).contiguous(),
        copied(*values).contiguous(),
        q.flatten(1, 2).transpose(1, 2).contiguous(),
        packed(*keys),
        packed(*values),
        block_mask,
        *((pooled(*keys), pooled(*values)) if pools else ()),
    )


def block_mask_of(shape: Shape, device: str) -> BlockMask:
    """Who sees whom in the packed form.

    By arithmetic on blocks: `create_block_mask` would form the mask of every row and key. Rows
    beyond the last are nobody's, so that they keep no block from being a full one.
    """
    prefix, window = shape.P, shape.W
    rows = shape.K * window
    keys = prefix + rows

    def visible(b: Any, h: Any, query: Any, key: Any) -> Any:
        return (key < prefix) | ((key - prefix) // window == query // window)

    row = torch.arange(0, rows, BLOCK, device=device)[:, None]
    key = torch.arange(0, keys, BLOCK, device=device)
    last_row, last_key = (row + BLOCK).clamp(max=rows) - 1, (key + BLOCK).clamp(max=keys) - 1
    first, last = row // window, last_row // window
    first_seen = (key - prefix).clamp(min=0) // window
    last_seen = (last_key - prefix).clamp(min=0) // window
    of_windows = (last_key >= prefix) & (first_seen <= last) & (last_seen >= first)
    seen = (key < prefix) | of_windows
    one_branch = (first == last) & (first_seen == first) & (last_seen == first)
    # A block with keys beyond the last is masked in every row.
    full = ((last_key < prefix) | one_branch) & (key + BLOCK <= keys)

    def ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = blocks.sum(-1, dtype=torch.int32)
        order = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
        return count[None, None], order[None, None].contiguous()

    return BlockMask.from_kv_blocks(
        *ordered(seen & ~full),
        *ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(rows, keys),
    )


@functools.cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    """FlexAttention as it is meant to be used; the first call compiles."""
    return torch.compile(flex_attention, dynamic=False)


def flex(shape: Shape, *inputs: Any) -> torch.Tensor:
    peer = inputs[7]
    out = compiled_flex()(
        peer.q_packed, peer.k_packed, peer.v_packed, block_mask=peer.block_mask, enable_gqa=True
    )
    return out.transpose(1, 2).unflatten(1, (shape.K, shape.W))


def only(backend: SDPBackend | None) -> contextlib.AbstractContextManager[Any]:
    """PyTorch's attention by this backend or not at all; None: by its own choice."""
    return contextlib.nullcontext() if backend is None else sdpa_kernel(backend)


def sdpa(
    shape: Shape,
    backend: SDPBackend | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    """Grouped heads stay grouped: KV heads are not expanded for any backend."""
    with only(backend):
        out = scaled_dot_product_attention(q, k, v, enable_gqa=shape.Hq != shape.Hk)
    return out.transpose(1, 2).unflatten(0, (shape.B, shape.K))


def sdpa_copied(shape: Shape, backend: SDPBackend | None, *inputs: Any) -> torch.Tensor:
    peer = inputs[7]
    return sdpa(shape, backend, peer.q, peer.k_copied, peer.v_copied)


def sdpa_with_copy(shape: Shape, backend: SDPBackend | None, *inputs: Any) -> torch.Tensor:
    _, k_cache, v_cache, k_window, v_window, _, _, peer = inputs[:8]
    k, v = copied(k_cache, k_window, shape.P), copied(v_cache, v_window, shape.P)
    return sdpa(shape, backend, peer.q, k, v)


class Level(NamedTuple):
    """Requests as FlashInfer's plan takes them: int32, on the host."""

    query_indptr: torch.Tensor
    page_indptr: torch.Tensor
    pages: torch.Tensor
    last_page_len: torch.Tensor


def _level(requests: int, rows: int, keys: int, first_page: int) -> Level:
    pages = -(-keys // PAGE)
    order = torch.arange(requests + 1, dtype=torch.int32)
    return Level(
        order * rows,
        order * pages,
        torch.arange(first_page, first_page + requests * pages, dtype=torch.int32),
        torch.full((requests,), (keys - 1) % PAGE + 1, dtype=torch.int32),
    )


def levels(shape: Shape) -> list[Level]:
    """All rows of a sequence on its prefix, where there is one; then each branch on itself."""
    prefix_pages = shape.B * -(-shape.P // PAGE)
    windows = _level(shape.B * shape.K, shape.W, shape.W, prefix_pages)
    if shape.P == 0:
        return [windows]
    return [_level(shape.B, shape.K * shape.W, shape.P, 0), windows]


@functools.cache
def _flashinfer() -> Any:
    # Its kernels are compiled at the first plan.
    return importlib.import_module("flashinfer")


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(WORKSPACE, dtype=torch.uint8, device=device)


# The two backends of one case: a captured graph keeps reading what its plan has written.
@functools.lru_cache(maxsize=2)
def planned(shape: Shape, dtype: torch.dtype, device: torch.device, backend: str) -> list[Any]:
    """A wrapper for each level; planning is the host's work, and outside the timing."""
    wrappers = []
    for level in levels(shape):
        wrapper = _flashinfer().BatchPrefillWithPagedKVCacheWrapper(
            _workspace(device), "NHD", backend=backend
        )
        wrapper.plan(
            *level,
            shape.Hq,
            shape.Hk,
            shape.D,
            PAGE,
            causal=False,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        wrappers.append(wrapper)
    return wrappers


def cascade(shape: Shape, backend: str, *inputs: Any) -> torch.Tensor:
    """What FlashInfer's MultiLevelCascadeAttentionWrapper runs, which has no choice of backend."""
    q, peer = inputs[0], inputs[7]
    rows = q.flatten(0, 2)
    *above, windows = planned(shape, q.dtype, q.device, backend)

    def run(wrapper: Any, return_lse: bool = True) -> Any:
        # Without `out` it fills its result with zeros first.
        out = torch.empty_like(rows)
        return wrapper.run(rows, (peer.k_pool, peer.v_pool), out=out, return_lse=return_lse)

    if not above:
        return run(windows, return_lse=False).view_as(q)
    out, lse = run(windows)
    for wrapper in above:
        _flashinfer().merge_state_in_place(out, lse, *run(wrapper))
    return out.view_as(q)
