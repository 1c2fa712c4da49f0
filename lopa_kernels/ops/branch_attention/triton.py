"""branch_attention in Triton: checks, outputs, launches.

Two launches at most: where tiles of rows are few their keys are shared among programs, and a second
kernel merges the shares. How many there are follows from shapes alone; which keys a share has
follows from lengths that the device reads.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from lopa_kernels._dispatch import implements_triton
from lopa_kernels._triton import (
    MAX_INT32,
    check_at_most,
    check_device,
    check_floating,
    check_rank,
    check_tensor,
    fail,
    on_device,
)
from lopa_kernels.ops.branch_attention import MASKS, MAX_HEAD_DIM, PAGE_SIZES
from lopa_kernels.ops.branch_attention import triton_plan as plans
from lopa_kernels.ops.branch_attention.triton_attend import attend_kernel, merge_kernel

_FLOAT32 = torch.finfo(torch.float32)


def _unit_stride(op: str, name: str, tensor: torch.Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        fail(op, name, "unit stride in the last dimension", f"strides {list(tensor.stride())}")


@functools.lru_cache
def _scale(op: str, scale: float | None, head_dim: int) -> tuple[float, int]:
    """The positive factor that makes logarithms to base 2 of products, and the queries' sign."""
    value = 1 / math.sqrt(head_dim) if scale is None else scale
    if not math.isfinite(value):
        fail(op, "scale", "a finite number", f"{value:g}")
    if value == 0:
        return 1.0, 0
    return max(abs(value) / math.log(2), _FLOAT32.tiny), 1 if value > 0 else -1


def _check(
    op: str,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    cache_len: torch.Tensor,
    length: torch.Tensor,
    prompt_len: torch.Tensor | None,
    block_table: torch.Tensor | None,
    mask: str,
    block_size: int | None,
) -> None:
    device, dtype = q.device, q.dtype
    check_floating(op, "q", q)
    check_rank(op, "q", q, 5)
    check_device(op, "k_cache", k_cache, device)
    check_rank(op, "k_cache", k_cache, 4)
    batch, branches, window, q_heads, head_dim = q.shape
    cache_rows, page, kv_heads = k_cache.shape[:3]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        fail(op, "q", f"head_dim 1 to {MAX_HEAD_DIM}", head_dim)
    if kv_heads < 1 or q_heads % kv_heads != 0:
        fail(op, "q", f"query heads a multiple of the {kv_heads} KV heads", q_heads)
    if block_table is None:
        cache_rows = batch
    else:
        if page not in PAGE_SIZES:
            expected = f"a power of two from {PAGE_SIZES[0]} to {PAGE_SIZES[-1]}"
            fail(op, "k_cache", f"pages of {expected} positions", page)
        check_device(op, "block_table", block_table, device)
        check_rank(op, "block_table", block_table, 2)
        table_shape = (batch, block_table.shape[1])
        check_tensor(op, "block_table", block_table, torch.int32, table_shape, device)
    cache_shape = (cache_rows, page, kv_heads, head_dim)
    window_shape = (batch, branches, window, kv_heads, head_dim)
    check_tensor(op, "k_cache", k_cache, dtype, cache_shape, device)
    check_tensor(op, "v_cache", v_cache, dtype, cache_shape, device)
    check_tensor(op, "k_window", k_window, dtype, window_shape, device)
    check_tensor(op, "v_window", v_window, dtype, window_shape, device)
    for name, tensor in (
        ("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k_window", k_window),
        ("v_window", v_window),
    ):  # fmt: skip
        _unit_stride(op, name, tensor)
    check_tensor(op, "cache_len", cache_len, torch.int32, (batch,), device)
    check_tensor(op, "length", length, torch.int32, (batch, branches), device)
    if mask == "block_causal":
        if block_size is None or block_size < 1:
            fail(op, "block_size", "1 or more for the mask block_causal", block_size)
        if prompt_len is None:
            fail(op, "prompt_len", "a tensor for the mask block_causal", "None")
        check_tensor(op, "prompt_len", prompt_len, torch.int32, (batch,), device)
    elif mask != "full":
        fail(op, "mask", " or ".join(MASKS), mask)


def _run(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    cache_len: torch.Tensor,
    length: torch.Tensor,
    prompt_len: torch.Tensor | None,
    block_table: torch.Tensor | None,
    mask: str,
    block_size: int | None,
    scale: tuple[float, int],
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    if q.numel() == 0:
        return
    batch, branches, window, q_heads, head_dim = q.shape
    pages, page, kv_heads = k_cache.shape[:3]
    group, heads = q_heads // kv_heads, batch * kv_heads
    rows = branches * window * group
    capacity = page if block_table is None else page * block_table.shape[1]
    op, device = "branch_attention", q.device
    check_at_most(op, "positions of the prefix", capacity, MAX_INT32 // 2)
    check_at_most(op, "rows of a KV head", rows, MAX_INT32 // 2)
    plan = plans.make_plan(
        device, q.element_size(), heads, rows, head_dim, capacity, window, group, branches
    )
    programs = plan.tiles * plan.splits * heads
    check_at_most(op, "tiles", programs, MAX_INT32)
    about = plans.device_of(device)
    # Fused operations are more exact here, as of the scores less their maximum.
    options: dict[str, Any] = {"DEPENDENT": about.dependent, "enable_fp_fusion": True}
    if about.dependent:
        options["launch_pdl"] = True
    causal = mask == "block_causal"
    table = None if block_table is None else block_table.contiguous()
    shares: tuple[torch.Tensor | None, ...] = (None, None, None)
    if plan.splits > 1:
        sizes = (heads, plan.splits, rows)
        shares = tuple(
            torch.empty(size, dtype=torch.float32, device=device)
            for size in (sizes, sizes, (*sizes, head_dim))
        )
    lengths = length.contiguous()
    factor, sign = scale
    with on_device(q):
        attend_kernel[(programs,)](
            q, k_cache, v_cache, k_window, v_window, cache_len.contiguous(), lengths,
            prompt_len.contiguous() if causal and prompt_len is not None else None, table,
            out, lse, *shares,
            *q.stride()[:4], *k_cache.stride()[:3], *v_cache.stride()[:3],
            *k_window.stride()[:4], *v_window.stride()[:4], *out.stride()[:4],
            0 if table is None else table.shape[1], branches, window, rows, capacity, pages,
            kv_heads, plan.tiles, min(block_size or 1, MAX_INT32), factor,
            GROUP=group, HEAD_DIM=head_dim, BLOCK_D=plan.block_d, BLOCK_M=plan.tile.rows,
            BLOCK_N=plan.tile.keys, PAGE=0 if table is None else page, SIGN=sign,
            SPLITS=plan.splits, MIN_SHARE=plans.MIN_SHARE,
            num_warps=plan.tile.warps, num_stages=plan.tile.stages, **options,
        )  # fmt: skip
        if plan.splits > 1:
            merge_rows = max(plans.MERGE_ELEMENTS // plan.block_d, 1)
            tiles = -(-rows // merge_rows)
            merge_kernel[(tiles * heads,)](
                *shares, lengths, out, lse, *out.stride()[:4],
                branches, window, rows, kv_heads, tiles,
                GROUP=group, HEAD_DIM=head_dim, BLOCK_D=plan.block_d, BLOCK_M=merge_rows,
                SPLITS=plan.splits, num_warps=4, **options,
            )  # fmt: skip


def _empty_lse(q: torch.Tensor) -> torch.Tensor:
    batch, branches, window, q_heads, _ = q.shape
    return q.new_empty((batch, branches, q_heads, window), dtype=torch.float32)


@implements_triton("branch_attention")
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
    inputs = (q, k_cache, v_cache, k_window, v_window, cache_len, length)
    options = (prompt_len, block_table, mask, block_size)
    _check("branch_attention", *inputs, *options)
    factor = _scale("branch_attention", scale, q.shape[-1])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _run(*inputs, *options, factor, out, None)
    return out


@implements_triton("branch_attention_lse")
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
    inputs = (q, k_cache, v_cache, k_window, v_window, cache_len, length)
    options = (prompt_len, block_table, mask, block_size)
    _check("branch_attention_lse", *inputs, *options)
    factor = _scale("branch_attention_lse", scale, q.shape[-1])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = _empty_lse(q)
    _run(*inputs, *options, factor, out, lse)
    return out, lse


@implements_triton("branch_attention_out")
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
    op = "branch_attention_out"
    inputs = (q, k_cache, v_cache, k_window, v_window, cache_len, length)
    options = (prompt_len, block_table, mask, block_size)
    _check(op, *inputs, *options)
    factor = _scale(op, scale, q.shape[-1])
    check_tensor(op, "out", out, q.dtype, tuple(q.shape), q.device)
    _unit_stride(op, "out", out)
    if lse is not None:
        batch, branches, window, q_heads, _ = q.shape
        lse_shape = (batch, branches, q_heads, window)
        check_tensor(op, "lse", lse, torch.float32, lse_shape, q.device)
        if not lse.is_contiguous():
            fail(op, "lse", "a contiguous tensor", "strides")
    _run(*inputs, *options, factor, out, lse)
