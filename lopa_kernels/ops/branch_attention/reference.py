"""branch_attention written for reading: scores of all keys, an explicit mask, one softmax.

The oracle of every other backend, on any device. It forms the score matrix over the whole
capacity of the cache, so its memory is [B, K, Hq, W, S + W].
"""

from __future__ import annotations

import math

import torch

from lopa_kernels._dispatch import implements


def window_mask(
    cache_len: torch.Tensor,
    length: torch.Tensor,
    window: int,
    prompt_len: torch.Tensor | None,
    block_size: int | None,
) -> torch.Tensor:
    """bool [B, K, W, W]: which window column (last) a query column sees; None, None: "full"."""
    column = torch.arange(window, device=length.device)
    live = column < length[..., None]
    seen = live[:, :, None, :].expand(-1, -1, window, -1)
    if prompt_len is None or block_size is None:
        return seen
    position = cache_len[:, None] + column
    block = torch.div(position - prompt_len[:, None], block_size, rounding_mode="floor")
    block = block.clamp(min=-1)
    return seen & (block[:, None, :] <= block[:, :, None])[:, None]


def gather_pages(
    pool: torch.Tensor, block_table: torch.Tensor, cache_len: torch.Tensor
) -> torch.Tensor:
    """[B, P * page, Hk, D], a cache as if it were not paged; 0 in the pages that nobody needs."""
    page = pool.shape[1]
    first = page * torch.arange(block_table.shape[1], device=pool.device)
    needed = first < cache_len[:, None]
    cache = pool.new_zeros((*block_table.shape, *pool.shape[1:]))
    cache[needed] = pool[block_table[needed]]
    return cache.flatten(1, 2)


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    cache_len: torch.Tensor,
    length: torch.Tensor,
    prompt_len: torch.Tensor | None = None,
    mask: str = "full",
    block_size: int | None = None,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    block_table: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [B, K, W, Hq, D] and lse [B, K, Hq, W], both computed and returned in `dtype`.

    `dtype` is float32, or float64 for float64 inputs, unless it is given.
    """
    if block_table is not None:
        k_cache = gather_pages(k_cache, block_table, cache_len)
        v_cache = gather_pages(v_cache, block_table, cache_len)
    if dtype is None:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    branches, window, _, head_dim = q.shape[1:]
    capacity, kv_heads = k_cache.shape[1:3]
    if scale is None:
        scale = 1 / math.sqrt(head_dim)

    cached = torch.arange(capacity, device=q.device) < cache_len[:, None]
    live = torch.arange(window, device=q.device) < length[..., None]
    causal = (prompt_len, block_size) if mask == "block_causal" else (None, None)
    seen = torch.cat(
        [
            cached[:, None, None, :].expand(-1, branches, window, -1),
            window_mask(cache_len, length, window, *causal),
        ],
        dim=-1,
    )[:, :, None, None]

    # A weight of 0 does not remove a NaN, so values that nobody sees become 0 first.
    def clean(tensor: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return torch.where(keep[..., None, None], tensor.to(dtype), 0)

    queries = clean(q, live).unflatten(3, (kv_heads, -1))
    scores = scale * torch.cat(
        [
            torch.einsum("bkwhgd,bshd->bkhgws", queries, clean(k_cache, cached)),
            torch.einsum("bkwhgd,bkchd->bkhgwc", queries, clean(k_window, live)),
        ],
        dim=-1,
    )
    scores = scores.masked_fill(~seen, -math.inf)
    weights = torch.softmax(scores, dim=-1)
    out = torch.einsum("bkhgws,bshd->bkwhgd", weights[..., :capacity], clean(v_cache, cached))
    out = out + torch.einsum("bkhgwc,bkchd->bkwhgd", weights[..., capacity:], clean(v_window, live))
    out = torch.where(live[..., None, None], out.flatten(3, 4), 0)
    lse = torch.logsumexp(scores, dim=-1).flatten(2, 3)
    return out, torch.where(live[:, :, None], lse, -math.inf)


def _check_lengths(
    cache_len: torch.Tensor,
    length: torch.Tensor,
    prompt_len: torch.Tensor | None,
    capacity: int,
    window: int,
) -> None:
    for b, value in enumerate(cache_len.tolist()):
        if not 0 <= value <= capacity:
            raise RuntimeError(
                f"branch_attention: cache_len: expected 0 to {capacity}, the cache's capacity, "
                f"got {value} in sequence {b}"
            )
    for b, value in enumerate([] if prompt_len is None else prompt_len.tolist()):
        if value < 0:
            raise RuntimeError(
                f"branch_attention: prompt_len: expected 0 or more, got {value} in sequence {b}"
            )
    for b, row in enumerate(length.tolist()):
        for k, value in enumerate(row):
            if not 0 <= value <= window:
                raise RuntimeError(
                    f"branch_attention: length: expected 0 to {window}, the window, "
                    f"got {value} in sequence {b}, branch {k}"
                )


def _check_pages(
    block_table: torch.Tensor, cache_len: torch.Tensor, pages: int, page_size: int
) -> None:
    needed = ((length + page_size - 1) // page_size for length in cache_len.tolist())
    for b, (row, count) in enumerate(zip(block_table.tolist(), needed, strict=True)):
        for i, value in enumerate(row[:count]):
            if not 0 <= value < pages:
                raise RuntimeError(
                    f"branch_attention: block_table: expected at least 0 and less than {pages}, "
                    f"the pages of k_cache, got {value} in sequence {b}, entry {i}"
                )


@implements("branch_attention_lse", "reference")
def branch_attention_lse(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    cache_len: torch.Tensor,
    length: torch.Tensor,
    prompt_len: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    mask: str = "full",
    block_size: int | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    bound = prompt_len if mask == "block_causal" else None
    pages, capacity = k_cache.shape[:2]
    if block_table is not None:
        capacity *= block_table.shape[1]
    _check_lengths(cache_len, length, bound, capacity, q.shape[2])
    if block_table is not None:
        _check_pages(block_table, cache_len, pages, k_cache.shape[1])
    out, lse = attend(
        q, k_cache, v_cache, k_window, v_window, cache_len, length, prompt_len, mask, block_size,
        scale, block_table=block_table,
    )  # fmt: skip
    return out.to(q.dtype), lse


@implements("branch_attention", "reference")
def branch_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    cache_len: torch.Tensor,
    length: torch.Tensor,
    prompt_len: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    mask: str = "full",
    block_size: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    return branch_attention_lse(
        q, k_cache, v_cache, k_window, v_window, cache_len, length, prompt_len, block_table, mask,
        block_size, scale,
    )[0]  # fmt: skip


@implements("branch_attention_out", "reference")
def branch_attention_out(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    cache_len: torch.Tensor,
    length: torch.Tensor,
    prompt_len: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    mask: str = "full",
    block_size: int | None = None,
    scale: float | None = None,
    *,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    result, result_lse = branch_attention_lse(
        q, k_cache, v_cache, k_window, v_window, cache_len, length, prompt_len, block_table, mask,
        block_size, scale,
    )  # fmt: skip
    out.copy_(result)
    if lse is not None:
        lse.copy_(result_lse)
