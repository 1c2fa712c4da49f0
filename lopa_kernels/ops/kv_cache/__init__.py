"""The static KV cache: Pre-Write of a forward pass, Commit-Winner-Cache of a round."""

from __future__ import annotations

import torch

from lopa_kernels import _dispatch
from lopa_kernels._checks import (
    FLOATING,
    check_device,
    check_dtype,
    check_rank,
    check_shape,
    check_unit_stride,
)
from lopa_kernels._interop import accepts_dlpack
from lopa_kernels.ops.kv_cache import fake as _fake
from lopa_kernels.ops.kv_cache import reference as _reference

__all__ = ["kv_commit_", "kv_prewrite_", "qkv_prewrite_"]

_OPERATORS = (
    "kv_prewrite_",
    "kv_prewrite_direct_",
    "qkv_prewrite_",
    "qkv_prewrite_direct_",
    "kv_commit_",
)
_dispatch.native(*_OPERATORS)
_dispatch.eager("kv_prewrite_", "kv_commit_")
# The norms keep their defaults, which a plain call without them leaves to the dispatcher.
_dispatch.eager(
    "qkv_prewrite_",
    change=lambda schema: (
        schema.replace(" q_norm", " q_norm=None")
        .replace(" k_norm", " k_norm=None")
        .replace(" norm_eps", " norm_eps=1e-6")
    ),
)


def _run_plain(op: str, like: torch.Tensor, backend: str | None, *arguments: object) -> bool:
    """Whether a plain call has done it (see :func:`_dispatch.plain_call`)."""
    run = _dispatch.plain_call(op, like, backend)
    if run is None:
        return False
    try:
        run(*arguments)
    except RuntimeError:
        return False  # worded by the checks, or raised once more
    return True


def _status_words(status: torch.Tensor | None, lengths: torch.Tensor) -> torch.Tensor | None:
    """On an NPU there are always status words: torchair converts no absent mutable argument."""
    if status is None and lengths.device.type == "npu":
        return torch.zeros_like(lengths)
    return status


class _Checker:
    """Checks of one call: everything is held to the dtype and device of `k_window`."""

    def __init__(self, op: str, k_window: torch.Tensor, backend: str | None) -> None:
        self.op = op
        self.device = k_window.device
        self.dtype = k_window.dtype
        check_rank(op, "k_window", k_window, 6)
        if (backend or _dispatch.get_backend()) != "reference" or self.dtype != torch.float64:
            check_dtype(op, "k_window", k_window, FLOATING)
        check_unit_stride(op, "k_window", k_window)

    def tensor(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        # One comparison where all is well: the wording below costs as much as a small launch.
        if (
            tensor.dtype == self.dtype
            and tensor.shape == shape
            and tensor.device == self.device
            and tensor.stride(-1) == 1
        ):
            return
        check_dtype(self.op, name, tensor, self.dtype)
        check_shape(self.op, name, tensor, shape)
        check_device(self.op, name, tensor, self.device)
        check_unit_stride(self.op, name, tensor)

    def lengths(self, name: str, tensor: torch.Tensor, batch: int) -> None:
        check_dtype(self.op, name, tensor, torch.int32)
        check_shape(self.op, name, tensor, (batch,))
        check_device(self.op, name, tensor, self.device)

    def layer(self, layer: int, layers: int) -> None:
        if not 0 <= layer < layers:
            raise ValueError(f"{self.op}: layer: expected 0 to {layers - 1}, got {layer}")

    def cos_sin(self, cos_sin: torch.Tensor, head_dim: int) -> None:
        if head_dim % 2 != 0:
            raise ValueError(f"{self.op}: cos_sin: expected an even head_dim, got {head_dim}")
        check_rank(self.op, "cos_sin", cos_sin, 2)
        if self.dtype != torch.float64:
            check_dtype(self.op, "cos_sin", cos_sin, torch.float32)
        check_shape(self.op, "cos_sin", cos_sin, (cos_sin.shape[0], head_dim))
        check_device(self.op, "cos_sin", cos_sin, self.device)
        check_unit_stride(self.op, "cos_sin", cos_sin)

    def norms(
        self, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float, head_dim: int
    ) -> None:
        given = {"q_norm": q_norm, "k_norm": k_norm}
        if q_norm is None and k_norm is None:
            return
        for name, weight in given.items():
            if weight is None:
                (other,) = given.keys() - {name}
                raise ValueError(f"{self.op}: {name}: expected a tensor, since {other} is given")
            check_dtype(self.op, name, weight, self.dtype)
            check_shape(self.op, name, weight, (head_dim,))
            check_device(self.op, name, weight, self.device)
        if not 0 <= eps <= torch.finfo(torch.float32).max:
            raise ValueError(f"{self.op}: norm_eps: expected a finite number, 0 or more, got {eps}")

    def cache(self, k_cache: torch.Tensor, v_cache: torch.Tensor, window: torch.Size) -> None:
        check_rank(self.op, "k_cache", k_cache, 5)
        shape = (window[0], window[1], k_cache.shape[2], window[4], window[5])
        self.tensor("k_cache", k_cache, shape)
        self.tensor("v_cache", v_cache, shape)

    def direct(
        self,
        direct: bool,
        k_cache: torch.Tensor | None,
        v_cache: torch.Tensor | None,
        cache_len: torch.Tensor | None,
        commit_len: torch.Tensor | None,
        status: torch.Tensor | None,
        window: torch.Size,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The operands of the direct form, all of which it needs; None for the two-phase form."""
        given = {"k_cache": k_cache, "v_cache": v_cache, "commit_len": commit_len}
        if not direct:
            for name, tensor in {**given, "status": status}.items():
                if tensor is not None:
                    raise ValueError(f"{self.op}: {name}: only for direct=True")
            return None
        if k_cache is None or v_cache is None or cache_len is None or commit_len is None:
            absent = [n for n, t in {**given, "cache_len": cache_len}.items() if t is None]
            raise ValueError(f"{self.op}: {', '.join(absent)}: needed for direct=True")
        self.cache(k_cache, v_cache, window)
        self.lengths("commit_len", commit_len, window[1])
        if status is not None:
            self.lengths("status", status, window[1])
        return k_cache, v_cache, cache_len, commit_len


@accepts_dlpack
def kv_prewrite_(
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    layer: int,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor | None = None,
    cache_len: torch.Tensor | None = None,
    *,
    direct: bool = False,
    k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None,
    commit_len: torch.Tensor | None = None,
    status: torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Phase 1, Pre-Write: a layer's new keys and values go to the branches' windows.

    With `cos_sin` the keys are rotated on the way (rotary embedding, arXiv 2104.09864, NeoX's
    rotate-half order, in fp32); column c is position ``cache_len + c``. All W columns are written,
    so `cos_sin` needs a row for each position up to ``cache_len + W - 1``: S + W rows suffice.

    `direct` is the single-phase protocol (LoPA section 3.4, arXiv 2512.16229): besides the
    windows, columns below `commit_len` of branch slot 0 go to cache positions ``cache_len + c``,
    and the round needs no :func:`kv_commit_`. That is only right where committed K/V are the same
    in every branch: with the mask "block_causal", or with one live branch (prefill).

    Args:
        k_window, v_window: bf16, fp16 or fp32 [L, B, K, W, Hk, D], written.
        layer: which of the L layers.
        k, v: [B, K, W, Hk, D], strided views of a packed projection too.
        cos_sin: fp32 [positions, D], D/2 cosines, then D/2 sines; None: keys are copied as they
            are.
        cache_len: int32 [B], the position of column 0; needed with `cos_sin` and `direct`.
        direct: write to the cache as well.
        k_cache, v_cache: [L, B, S, Hk, D], written; only for `direct`.
        commit_len: int32 [B], 0 to W; only for `direct`.
        status: int32 [B]; only for `direct`. A sequence that does not fit has
            ``Status.CACHE_FULL`` or ``Status.BAD_STATE`` ORed into its word: the first leaves its
            cache as it is, the second its windows too. None: on the CPU it is an error, on a GPU,
            whose lengths the host never sees, it is dropped all the same.
        backend: None for the default.

    All tensors of K and V have one dtype and any strides with unit stride on D.

    Raises:
        TypeError, ValueError: dtype, shape, device or stride of an argument.
        RuntimeError: on the CPU and without `status`, a position past `cos_sin`, or a write past
            the capacity; it names sequence, length and capacity, and nothing has been written. (On
            a GPU a sequence with a position past `cos_sin` is dropped.)
    """
    op = "kv_prewrite_"
    two_phase = not direct and k_cache is v_cache is commit_len is status is None
    if two_phase and _run_plain(
        op, k_window, backend, k_window, v_window, layer, k, v, cos_sin, cache_len
    ):
        return
    check = _Checker(op, k_window, backend)
    layers, batch, branches, window, kv_heads, head_dim = k_window.shape
    check.tensor("v_window", v_window, (layers, batch, branches, window, kv_heads, head_dim))
    check.layer(layer, layers)
    check.tensor("k", k, (batch, branches, window, kv_heads, head_dim))
    check.tensor("v", v, (batch, branches, window, kv_heads, head_dim))
    if cache_len is not None:
        check.lengths("cache_len", cache_len, batch)
    if cos_sin is not None:
        check.cos_sin(cos_sin, head_dim)
        if cache_len is None:
            raise ValueError(f"{op}: cache_len: expected a tensor, since cos_sin is given")
    cache = check.direct(direct, k_cache, v_cache, cache_len, commit_len, status, k_window.shape)
    device = k_window.device.type
    if cache is None:
        run = _dispatch.implementation("kv_prewrite_", device, backend)
        run(k_window, v_window, layer, k, v, cos_sin, cache_len)
        return
    run = _dispatch.implementation("kv_prewrite_direct_", device, backend)
    status = _status_words(status, cache[3])
    run(k_window, v_window, *cache[:2], layer, k, v, *cache[2:], cos_sin, status)


@accepts_dlpack
def qkv_prewrite_(
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    layer: int,
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    cache_len: torch.Tensor,
    *,
    num_heads: int,
    q: torch.Tensor | None = None,
    direct: bool = False,
    k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None,
    commit_len: torch.Tensor | None = None,
    status: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """Pre-Write fused with the rotation of queries and keys, straight from the packed projection.

    As :func:`kv_prewrite_`, whose other arguments mean the same here, so that rotary embedding
    costs no pass of its own; nor does RMSNorm (arXiv 1910.07467) over the head dimension ahead of
    it, where a model has such weights for its queries and keys (Qwen3, SDAR, LLaDA 2):
    ``x / sqrt(mean(x**2) + norm_eps) * weight`` of each head of q and k. The values are copied.

    All of it is in fp32: between the load and the store nothing is rounded to the dtype of `qkv`,
    the normalised head included. All backends add the squares in one order: the results are equal
    bit for bit, but for the roots and quotients of an NPU.

    Args:
        qkv: [B, K, W, (Hq + 2 Hk) * D] or [B, K, W, Hq + 2 Hk, D]: heads of q, then k, then v.
        num_heads: Hq.
        q: [B, K, W, Hq, D], where the rotated queries go; None: a new tensor.
        q_norm, k_norm: [D] of the dtype of `qkv`, any stride, RMSNorm's weights; both or neither.
        norm_eps: added to the mean of squares, finite and 0 or more; rounded to fp32.

    Returns:
        `q`, the rotated queries [B, K, W, Hq, D]; 0 for a sequence with ``Status.BAD_STATE``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`kv_prewrite_`.
    """
    op = "qkv_prewrite_"
    plain = _dispatch.plain_call(op, k_window, backend)
    two_phase = not direct and k_cache is v_cache is commit_len is status is None
    known = num_heads > 0 and k_window.dim() == 6 and qkv.dim() in (4, 5)
    if plain is not None and two_phase and known:
        head_dim, packed, rotated = k_window.shape[5], qkv, q
        if qkv.dim() == 4 and qkv.shape[3] % max(head_dim, 1) == 0 < qkv.shape[3]:
            packed = qkv.unflatten(3, (-1, head_dim))
        if rotated is None:
            rotated = packed.new_empty((*packed.shape[:3], num_heads, head_dim))
        try:
            if q_norm is None and k_norm is None:
                plain(rotated, k_window, v_window, layer, packed, cos_sin, cache_len)
            else:
                plain(
                    rotated, k_window, v_window, layer, packed, cos_sin, cache_len,
                    q_norm, k_norm, norm_eps,
                )  # fmt: skip
            return rotated
        except RuntimeError:
            pass  # worded by the checks, or raised once more
    check = _Checker(op, k_window, backend)
    layers, batch, branches, window, kv_heads, head_dim = k_window.shape
    check.tensor("v_window", v_window, (layers, batch, branches, window, kv_heads, head_dim))
    check.layer(layer, layers)
    if num_heads < 1:
        raise ValueError(f"{op}: num_heads: expected 1 or more, got {num_heads}")
    heads = num_heads + 2 * kv_heads
    if qkv.dim() == 4:
        check_shape(op, "qkv", qkv, (batch, branches, window, heads * head_dim))
        check_unit_stride(op, "qkv", qkv)
        qkv = qkv.unflatten(3, (heads, head_dim))
    check.tensor("qkv", qkv, (batch, branches, window, heads, head_dim))
    check.lengths("cache_len", cache_len, batch)
    check.cos_sin(cos_sin, head_dim)
    check.norms(q_norm, k_norm, norm_eps, head_dim)
    cache = check.direct(direct, k_cache, v_cache, cache_len, commit_len, status, k_window.shape)
    if q is None:
        q = qkv.new_empty((batch, branches, window, num_heads, head_dim))
    else:
        check.tensor("q", q, (batch, branches, window, num_heads, head_dim))
    norms = (q_norm, k_norm, norm_eps)
    device = k_window.device.type
    if cache is None:
        run = _dispatch.implementation("qkv_prewrite_", device, backend)
        run(q, k_window, v_window, layer, qkv, cos_sin, cache_len, *norms)
        return q
    run = _dispatch.implementation("qkv_prewrite_direct_", device, backend)
    status = _status_words(status, cache[3])
    run(q, k_window, v_window, *cache[:2], layer, qkv, cos_sin, *cache[2:], status, *norms)
    return q


@accepts_dlpack
def kv_commit_(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    winner: torch.Tensor,
    cache_len: torch.Tensor,
    commit_len: torch.Tensor,
    *,
    status: torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Phase 2, Commit-Winner-Cache: the winner's leading columns go to the cache, all layers.

    Columns below ``commit_len`` of the winner become cache positions ``cache_len + c``
    (LoPA section 3.4, arXiv 2512.16229). Later columns and other positions are not touched.

    Args:
        k_cache, v_cache: bf16, fp16 or fp32 [L, B, S, Hk, D], written.
        k_window, v_window: [L, B, K, W, Hk, D].
        winner: int32 [B], the branch slot, 0 to K - 1; read where ``commit_len > 0``.
        cache_len: int32 [B], cached positions before the commit.
        commit_len: int32 [B], 0 to W.
        status: int32 [B]. A sequence whose commit does not fit is dropped and has
            ``Status.CACHE_FULL`` (past S) or ``Status.BAD_STATE`` (a value out of range) ORed into
            its word; the others proceed. None: on the CPU it is an error, on a GPU, whose lengths
            the host never sees, it is dropped all the same.
        backend: None for the default.

    All tensors of K and V have one dtype and any strides with unit stride on D.

    Raises:
        TypeError, ValueError: dtype, shape, device or stride of an argument.
        RuntimeError: on the CPU and without `status`, a commit that does not fit; it names
            sequence, length and capacity, and nothing has been written.
    """
    op = "kv_commit_"
    lengths = (winner, cache_len, commit_len)
    if _run_plain(op, k_window, backend, k_cache, v_cache, k_window, v_window, *lengths, status):
        return
    check = _Checker(op, k_window, backend)
    layers, batch, branches, window, kv_heads, head_dim = k_window.shape
    check.tensor("v_window", v_window, (layers, batch, branches, window, kv_heads, head_dim))
    check.cache(k_cache, v_cache, k_window.shape)
    check.lengths("winner", winner, batch)
    check.lengths("cache_len", cache_len, batch)
    check.lengths("commit_len", commit_len, batch)
    if status is not None:
        check.lengths("status", status, batch)
    run = _dispatch.implementation(op, k_window.device.type, backend)
    status = _status_words(status, commit_len)
    run(k_cache, v_cache, k_window, v_window, winner, cache_len, commit_len, status)
