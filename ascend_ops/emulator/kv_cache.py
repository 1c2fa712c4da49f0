"""The operators of the KV cache on emulated cores, with the arguments of their schemas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ascend_ops.emulator import Tensor, launch, module

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

Report = Mapping[str, Any]


def _shape(window: torch.Tensor, cache: torch.Tensor | None, q_heads: int) -> tuple[int, ...]:
    layers, batch, branches, columns, kv_heads, head_dim = window.shape
    capacity = 0 if cache is None else cache.shape[2]
    return layers, batch, branches, columns, kv_heads, q_heads, head_dim, capacity


def _launch(
    kernel: str,
    inputs: dict[str, torch.Tensor | None],
    written: tuple[str, ...],
    plan: Mapping[str, Any],
    outputs: tuple[str, ...] = (),
) -> Report:
    """An operand that is `written` in place is an input, which the kernel leaves alone, and an
    output of the same name; of `outputs` among those every element has to be written.
    """
    tensors = [Tensor(n, "in", None if n in written else t) for n, t in inputs.items()]
    for name in written:
        access = "out" if name in outputs else "inout"
        tensors.append(Tensor(name, access, inputs[name]))
    return launch(kernel, tensors, plan["data"], blocks=plan["cores"])


def _prewrite(
    op: str,
    inputs: dict[str, torch.Tensor | None],
    written: tuple[str, ...],
    layer: int,
    q_heads: int,
    cores: int,
    norm_eps: float | None = None,
) -> Report:
    window, cos_sin = inputs["k_window"], inputs["cos_sin"]
    assert window is not None
    if op.endswith("direct") and inputs["status"] is None:
        inputs["status"] = torch.zeros(window.shape[1], dtype=torch.int32)
    plan = module().kv_prewrite_tiling(
        _shape(window, inputs.get("k_cache"), q_heads),
        window.element_size(),
        layer=layer,
        positions=0 if cos_sin is None else cos_sin.shape[0],
        rotates=cos_sin is not None,
        has_cache_len=inputs["cache_len"] is not None,
        norm_eps=norm_eps,
        cores=cores,
    )
    kernel = f"lopa_{op}_{_TYPES[window.dtype]}"
    return _launch(kernel, inputs, written, plan, outputs=("q",))


def kv_prewrite_(
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    layer: int,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor | None = None,
    cache_len: torch.Tensor | None = None,
    *,
    cores: int = 40,
) -> Report:
    """``torch.ops.lopa.kv_prewrite_``; returns what the cores did."""
    inputs = {
        "k_window": k_window,
        "v_window": v_window,
        "k": k.contiguous(),
        "v": v.contiguous(),
        "cos_sin": cos_sin,
        "cache_len": cache_len,
    }
    return _prewrite("kv_prewrite", inputs, ("k_window", "v_window"), layer, 0, cores)


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
    *,
    cores: int = 40,
) -> Report:
    """``torch.ops.lopa.kv_prewrite_direct_``; returns what the cores did."""
    inputs = {
        "k_window": k_window,
        "v_window": v_window,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": k.contiguous(),
        "v": v.contiguous(),
        "cache_len": cache_len,
        "commit_len": commit_len,
        "cos_sin": cos_sin,
        "status": status,
    }
    written = ("k_window", "v_window", "k_cache", "v_cache", "status")
    return _prewrite("kv_prewrite_direct", inputs, written, layer, 0, cores)


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
    *,
    cores: int = 40,
) -> Report:
    """``torch.ops.lopa.qkv_prewrite_``; returns what the cores did."""
    inputs: dict[str, torch.Tensor | None] = {
        "q": q,
        "k_window": k_window,
        "v_window": v_window,
        "qkv": qkv.contiguous(),
        "cos_sin": cos_sin,
        "cache_len": cache_len,
        "q_norm": q_norm,
        "k_norm": k_norm,
    }
    written = ("q", "k_window", "v_window")
    eps = None if q_norm is None else norm_eps
    return _prewrite("qkv_prewrite", inputs, written, layer, q.shape[3], cores, eps)


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
    *,
    cores: int = 40,
) -> Report:
    """``torch.ops.lopa.qkv_prewrite_direct_``; returns what the cores did."""
    inputs = {
        "q": q,
        "k_window": k_window,
        "v_window": v_window,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "qkv": qkv.contiguous(),
        "cos_sin": cos_sin,
        "cache_len": cache_len,
        "commit_len": commit_len,
        "status": status,
        "q_norm": q_norm,
        "k_norm": k_norm,
    }
    written = ("q", "k_window", "v_window", "k_cache", "v_cache", "status")
    eps = None if q_norm is None else norm_eps
    return _prewrite("qkv_prewrite_direct", inputs, written, layer, q.shape[3], cores, eps)


def kv_commit_(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    winner: torch.Tensor,
    cache_len: torch.Tensor,
    commit_len: torch.Tensor,
    status: torch.Tensor | None = None,
    *,
    cores: int = 40,
) -> Report:
    """``torch.ops.lopa.kv_commit_``; returns what the cores did."""
    if status is None:
        status = torch.zeros(k_window.shape[1], dtype=torch.int32)
    plan = module().kv_commit_tiling(
        _shape(k_window, k_cache, 0), k_window.element_size(), cores=cores
    )
    inputs: dict[str, torch.Tensor | None] = {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k_window": k_window,
        "v_window": v_window,
        "winner": winner,
        "cache_len": cache_len,
        "commit_len": commit_len,
        "status": status,
    }
    return _launch("lopa_kv_commit", inputs, ("k_cache", "v_cache", "status"), plan)
