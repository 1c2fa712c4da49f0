"""The static KV cache written for reading: one sequence after another, whole rows at a time.

The oracle of every other backend, on any device. It reads lengths and winners on the host.
"""

from __future__ import annotations

import torch

from lopa_kernels._dispatch import implements
from lopa_kernels.status import Status


def rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864) of `x` [..., heads, D], GPT-NeoX's rotate-half order.

    `cos_sin` [..., D] holds D/2 cosines, then D/2 sines. Computed in its dtype, at least fp32.
    """
    half = x.shape[-1] // 2
    cosine, sine = cos_sin[..., None, :half], cos_sin[..., None, half:]
    low, high = x.to(cos_sin.dtype).split(half, dim=-1)
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1).to(x.dtype)


def normalize(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """RMSNorm (arXiv 1910.07467) of `x` [..., D] with `weight` [D], in `dtype` and returned so.

    All backends have the same bits: squares are added element d to element d + D/2, then neighbours
    to neighbours, pairs to pairs and so on, a missing one being 0.
    """
    x = x.to(dtype)
    low, high = x.square().tensor_split(2, dim=-1)
    total = low + high
    while total.shape[-1] > 1:
        if total.shape[-1] % 2 != 0:
            total = torch.nn.functional.pad(total, (0, 1))
        total = total[..., 0::2] + total[..., 1::2]
    # Divided by a tensor: by a number PyTorch multiplies on a GPU, by its reciprocal.
    mean = total / torch.full_like(total, x.shape[-1])
    # PyTorch's square root of fp32 may be the vector library's, off by a unit.
    root = (mean + eps).double().sqrt().to(dtype)
    return x * (1 / root) * weight.to(dtype)


def _fault(
    cache_len: int, commit_len: int | None, window: int, capacity: int, max_position: int | None
) -> tuple[Status, str]:
    if cache_len < 0:
        return Status.BAD_STATE, f"cache_len {cache_len} is negative"
    if commit_len is not None and not 0 <= commit_len <= window:
        return Status.BAD_STATE, f"commit_len {commit_len} is outside the window of {window}"
    if max_position is not None and cache_len + window > max_position:
        return Status.BAD_STATE, (
            f"position {cache_len + window - 1} (cache_len {cache_len} + column {window - 1}) "
            f"exceeds the capacity of cos_sin, {max_position} positions"
        )
    if commit_len is not None and cache_len + commit_len > capacity:
        return Status.CACHE_FULL, (
            f"cache_len {cache_len} + commit_len {commit_len} = {cache_len + commit_len} "
            f"exceeds the capacity {capacity}"
        )
    return Status.OK, ""


def _settle(op: str, faults: list[tuple[Status, str]], status: torch.Tensor | None) -> None:
    """Raises the first fault, or ORs all of them into `status`."""
    for b, (bit, text) in enumerate(faults):
        if bit and status is None:
            raise RuntimeError(f"{op}: sequence {b}: {text}")
        if bit and status is not None:
            status[b] |= int(bit)


def _prewrite(
    op: str,
    q: torch.Tensor | None,
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
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> None:
    batch, window = k_window.shape[1], k_window.shape[3]
    query, key, value = rows
    if cache_len is None:
        k_window[layer] = key
        v_window[layer] = value
        return
    starts = cache_len.tolist()
    commits = [None] * batch if commit_len is None else commit_len.tolist()
    capacity = 0 if k_cache is None else k_cache.shape[2]
    max_position = None if cos_sin is None else cos_sin.shape[0]
    faults = [
        _fault(start, commit, window, capacity, max_position)
        for start, commit in zip(starts, commits, strict=True)
    ]
    _settle(op, faults, status)

    def turned(
        x: torch.Tensor, turn: torch.Tensor | None, weight: torch.Tensor | None
    ) -> torch.Tensor:
        if turn is None:
            return x
        if norms is None or weight is None:
            return rotate(x, turn)
        return rotate(normalize(x, weight, norms[2], turn.dtype), turn).to(x.dtype)

    for b, (start, commit, (fault, _)) in enumerate(zip(starts, commits, faults, strict=True)):
        if fault == Status.BAD_STATE:
            if q is not None:
                q[b] = 0
            continue
        turn = None if cos_sin is None else cos_sin[start : start + window]
        k_window[layer, b] = turned(key[b], turn, None if norms is None else norms[1])
        v_window[layer, b] = value[b]
        if q is not None and query is not None:
            q[b] = turned(query[b], turn, None if norms is None else norms[0])
        if k_cache is None or v_cache is None or commit is None or fault:
            continue
        k_cache[layer, b, start : start + commit] = k_window[layer, b, 0, :commit]
        v_cache[layer, b, start : start + commit] = v_window[layer, b, 0, :commit]


@implements("kv_prewrite_", "reference")
def kv_prewrite_(
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    layer: int,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor | None = None,
    cache_len: torch.Tensor | None = None,
) -> None:
    _prewrite("kv_prewrite_", None, k_window, v_window, layer, (None, k, v), cos_sin, cache_len)


@implements("kv_prewrite_direct_", "reference")
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
    _prewrite(
        "kv_prewrite_", None, k_window, v_window, layer, (None, k, v), cos_sin, cache_len,
        k_cache, v_cache, commit_len, status,
    )  # fmt: skip


def _norms(
    q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    return None if q_norm is None or k_norm is None else (q_norm, k_norm, eps)


def _unpack(
    qkv: torch.Tensor, q_heads: int, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = qkv.split([q_heads, kv_heads, kv_heads], dim=3)
    return query, key, value


@implements("qkv_prewrite_", "reference")
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
    rows = _unpack(qkv, q.shape[3], k_window.shape[4])
    norms = _norms(q_norm, k_norm, norm_eps)
    _prewrite("qkv_prewrite_", q, k_window, v_window, layer, rows, cos_sin, cache_len, norms=norms)


@implements("qkv_prewrite_direct_", "reference")
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
    rows = _unpack(qkv, q.shape[3], k_window.shape[4])
    _prewrite(
        "qkv_prewrite_", q, k_window, v_window, layer, rows, cos_sin, cache_len, k_cache, v_cache,
        commit_len, status, _norms(q_norm, k_norm, norm_eps),
    )  # fmt: skip


@implements("kv_commit_", "reference")
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
    slots, window = k_window.shape[2:4]
    rounds = list(zip(winner.tolist(), cache_len.tolist(), commit_len.tolist(), strict=True))
    faults = []
    for slot, start, count in rounds:
        fault = _fault(start, count, window, k_cache.shape[2], None)
        if not fault[0] and count > 0 and not 0 <= slot < slots:
            fault = Status.BAD_STATE, f"winner {slot} is not one of the {slots} branch slots"
        faults.append(fault)
    _settle("kv_commit_", faults, status)
    for b, ((slot, start, count), (fault_bit, _)) in enumerate(zip(rounds, faults, strict=True)):
        if fault_bit or count == 0:
            continue
        k_cache[:, b, start : start + count] = k_window[:, b, slot, :count]
        v_cache[:, b, start : start + count] = v_window[:, b, slot, :count]
