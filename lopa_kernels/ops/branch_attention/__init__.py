"""Attention of a window's branches over the shared prefix and each over itself."""

from __future__ import annotations

import math

import torch

from lopa_kernels import _dispatch
from lopa_kernels._checks import (
    FLOATING,
    check_choice,
    check_device,
    check_dtype,
    check_rank,
    check_shape,
    check_unit_stride,
)
from lopa_kernels._interop import accepts_dlpack
from lopa_kernels.ops.branch_attention import cuda as _cuda
from lopa_kernels.ops.branch_attention import fake as _fake
from lopa_kernels.ops.branch_attention import reference as _reference

__all__ = ["MASKS", "PAGE_SIZES", "branch_attention"]

_dispatch.native("branch_attention", "branch_attention_lse", "branch_attention_out")

MASKS = ("full", "block_causal")

MAX_HEAD_DIM = 256

#: positions of a page that a block_table can refer to
PAGE_SIZES = (16, 32, 64, 128, 256)


def _check_operand(
    op: str,
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    # One comparison where all is well: the wording below costs as much as a small launch.
    if (
        tensor.dtype == dtype
        and tensor.shape == shape
        and tensor.device == device
        and tensor.stride(-1) == 1
    ):
        return
    check_dtype(op, name, tensor, dtype)
    check_shape(op, name, tensor, shape)
    check_device(op, name, tensor, device)
    check_unit_stride(op, name, tensor)


def _check_int32(
    op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    if tensor.dtype == torch.int32 and tensor.shape == shape and tensor.device == device:
        return
    check_dtype(op, name, tensor, torch.int32)
    check_shape(op, name, tensor, shape)
    check_device(op, name, tensor, device)


def _check_pages(
    op: str, k_cache: torch.Tensor, block_table: torch.Tensor, batch: int, device: torch.device
) -> None:
    page = k_cache.shape[1]
    if page not in PAGE_SIZES:
        raise ValueError(
            f"{op}: k_cache: expected pages of a power of two from {PAGE_SIZES[0]} to "
            f"{PAGE_SIZES[-1]} positions, got {page}"
        )
    check_rank(op, "block_table", block_table, 2)
    _check_int32(op, "block_table", block_table, (batch, block_table.shape[1]), device)


@accepts_dlpack
def branch_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    cache_len: torch.Tensor,
    length: torch.Tensor,
    *,
    mask: str = "full",
    block_size: int | None = None,
    prompt_len: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of every branch's window over the cached prefix and over the branch itself.

    A query of branch k sees each cached position below `cache_len` and, of its own branch only,
    the columns below `length` that `mask` admits: "full", all of them (D2F's window,
    arXiv 2508.09192); "block_causal", those of its own and earlier blocks (LoPA section 3.4,
    arXiv 2512.16229). Column c is position ``cache_len + c``; blocks are runs of `block_size`
    positions counted from `prompt_len`, and all positions before it are one block.

    Grouped heads: query head h uses KV head ``h // (Hq / Hk)``. The prefix is read once for all
    branches and all query heads of a KV head. What lies beyond `cache_len` or `length` never
    reaches a result, NaN included. Sums are formed in fp32.

    With a `block_table` the caches are pools of pages, as engines with paged caches keep them:
    position p of sequence b is ``k_cache[block_table[b, p // page], p % page]``, and the prefix
    holds up to P * page positions. Entries beyond the pages that `cache_len` needs are never read.

    Args:
        q: bf16, fp16 or fp32 [B, K, W, Hq, D]; D from 1 to 256.
        k_cache, v_cache: [B, S, Hk, D], one layer's cache; ``[B, Hk, S, D]`` caches come in as
            ``.transpose(1, 2)`` views. With a `block_table`, pools [N, page, Hk, D] of pages of
            16, 32, 64, 128 or 256 positions.
        k_window, v_window: [B, K, W, Hk, D].
        cache_len: int32 [B], cached positions, 0 to S (P * page with a `block_table`).
        length: int32 [B, K], columns of each branch, 0 to W.
        mask: "full" or "block_causal".
        block_size: positions of a block; needed for "block_causal".
        prompt_len: int32 [B], positions before the first block; needed for "block_causal".
        block_table: int32 [B, P], the pages of each sequence in order, any strides; None: the
            caches are not paged.
        scale: factor of the scores; None: ``D ** -0.5``.
        return_lse: also return the natural logarithm of the sum of exponentials of each row.
        out: where to write the result, like `q`.
        backend: None for the default.

    `q`, the caches, the windows and `out` have one dtype and any strides with unit stride on D.

    Returns:
        [B, K, W, Hq, D] in the dtype of `q` (`out` if given), 0 in columns at or beyond `length`;
        with `return_lse` also fp32 [B, K, Hq, W], -inf in those columns.

    Raises:
        TypeError, ValueError: dtype, shape, device or stride of an argument.
        RuntimeError: on the CPU, a value of `cache_len`, `length` or `prompt_len` out of range, or
            a needed entry of `block_table`. (On a GPU nobody sees the keys of such a page.) On a
            GPU without Triton, what the CUDA kernel does not take.
    """
    op = "branch_attention"
    check_rank(op, "q", q, 5)
    check_rank(op, "k_cache", k_cache, 4)
    batch, branches, window, q_heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    device, dtype = q.device, q.dtype
    if (backend or _dispatch.get_backend()) != "reference" or dtype != torch.float64:
        check_dtype(op, "q", q, FLOATING)
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: q: expected head_dim 1 to {MAX_HEAD_DIM}, got {head_dim}")
    if kv_heads < 1 or q_heads % kv_heads != 0:
        raise ValueError(
            f"{op}: q: expected query heads a multiple of the {kv_heads} KV heads, got {q_heads}"
        )
    if block_table is not None:
        _check_pages(op, k_cache, block_table, batch, device)
    rows = batch if block_table is None else k_cache.shape[0]
    cache_shape = (rows, k_cache.shape[1], kv_heads, head_dim)
    window_shape = (batch, branches, window, kv_heads, head_dim)
    check_unit_stride(op, "q", q)
    _check_operand(op, "k_cache", k_cache, dtype, cache_shape, device)
    _check_operand(op, "v_cache", v_cache, dtype, cache_shape, device)
    _check_operand(op, "k_window", k_window, dtype, window_shape, device)
    _check_operand(op, "v_window", v_window, dtype, window_shape, device)
    _check_int32(op, "cache_len", cache_len, (batch,), device)
    _check_int32(op, "length", length, (batch, branches), device)
    check_choice(op, "mask", mask, MASKS)
    if mask == "block_causal":
        if block_size is None or block_size < 1:
            raise ValueError(
                f"{op}: block_size: expected 1 or more for mask='block_causal', got {block_size!r}"
            )
        if prompt_len is None:
            raise ValueError(f"{op}: prompt_len: expected a tensor for mask='block_causal'")
        _check_int32(op, "prompt_len", prompt_len, (batch,), device)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{op}: scale: expected a finite number, got {scale!r}")

    inputs = (q, k_cache, v_cache, k_window, v_window, cache_len, length)
    options = (prompt_len, block_table, mask, block_size, scale)
    if out is not None:
        _check_operand(op, "out", out, dtype, q.shape, device)
        run = _dispatch.implementation("branch_attention_out", device.type, backend)
        lse = None
        if return_lse:
            lse = q.new_empty((batch, branches, q_heads, window), dtype=torch.float32)
        run(*inputs, *options, out=out, lse=lse)
        return out if lse is None else (out, lse)
    if return_lse:
        run = _dispatch.implementation("branch_attention_lse", device.type, backend)
    else:
        run = _dispatch.implementation("branch_attention", device.type, backend)
    return run(*inputs, *options)
