"""branch_attention on emulated cores: its tiling, its kernel and the report of the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ascend_ops.emulator import Tensor, launch, module

KERNELS = {
    torch.float16: "lopa_branch_attention_fp16",
    torch.bfloat16: "lopa_branch_attention_bf16",
}


class Result(NamedTuple):
    """Output, lse, the counters of the launch, and what the tiling decided."""

    out: torch.Tensor
    lse: torch.Tensor
    report: Mapping[str, Any]
    tiling: Mapping[str, Any]


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
    cache_layout: str = "BSND",
    cores: int = 20,
) -> Result:
    """The operator of docs/operators.md on contiguous CPU tensors in bf16 or fp16.

    Args:
        cache_layout: "BSND" for caches [B, S, Hk, D], "BNSD" for [B, Hk, S, D]; of pools of pages
            likewise, [N, page, Hk, D] or [N, Hk, page, D].
        cores: AI cores, each one cube core and two vector cores; results do not depend on it.

    Raises:
        ValueError: the kernel does not support the shape.
        Fault: (of ``emulator.module()``) the kernel broke a rule of the device.
    """
    batch, branches, window, query_heads, head_dim = q.shape
    heads_first = cache_layout == "BNSD"
    tiling = module().branch_attention_tiling(
        batch=batch,
        branches=branches,
        window=window,
        query_heads=query_heads,
        kv_heads=k_window.shape[3],
        head_dim=head_dim,
        capacity=k_cache.shape[2 if heads_first else 1],
        heads_first=heads_first,
        table_pages=0 if block_table is None else block_table.shape[1],
        pages=0 if block_table is None else k_cache.shape[0],
        block_size=block_size or 0,
        block_causal=mask == "block_causal",
        scale=head_dim**-0.5 if scale is None else scale,
        cores=cores,
    )
    out = torch.empty_like(q)
    lse = torch.empty(batch, branches, query_heads, window)
    tensors = [
        Tensor("q", "in", q),
        Tensor("k_cache", "in", k_cache),
        Tensor("v_cache", "in", v_cache),
        Tensor("k_window", "in", k_window),
        Tensor("v_window", "in", v_window),
        Tensor("cache_len", "in", cache_len),
        Tensor("length", "in", length),
        Tensor("prompt_len", "in", prompt_len),
        Tensor("block_table", "in", block_table),
        Tensor("out", "out", out),
        Tensor("lse", "out", lse),
    ]
    report = launch(
        KERNELS[q.dtype],
        tensors,
        tiling["data"],
        workspace=tiling["workspace"],
        blocks=tiling["cores"],
        cores="mixed",
    )
    return Result(out, lse, report, tiling)
