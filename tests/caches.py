"""Caches, windows and projections for the tests of the KV cache."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from cases import moved

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: (layers, batch, branches, window, kv_heads, q_heads, head_dim, capacity), for bad input
BAD = (2, 3, 4, 16, 2, 4, 8, 128)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Caches(NamedTuple):
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k_window: torch.Tensor
    v_window: torch.Tensor

    def clone(self) -> Caches:
        """A copy that keeps the strides."""
        copies = []
        for tensor in self:
            size = tensor.untyped_storage().nbytes() // tensor.element_size()
            whole = tensor.as_strided((size,), (1,), 0).clone()
            copies.append(whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()))
        return Caches(*copies)

    def same(self, other: Caches) -> bool:
        """Equal, NaN to NaN, in everything that the storage holds."""
        for a, b in zip(moved(self, "cpu"), moved(other, "cpu"), strict=True):
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
            x, y = (torch.tensor(t.untyped_storage(), dtype=torch.uint8).view(bits) for t in (a, b))
            if not torch.equal(x, y):
                return False
        return True


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with heads before positions and gaps after each row."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan, dtype=tensor.dtype)
    wide = wide.transpose(-2, -3).contiguous().transpose(-2, -3)
    view = wide[..., : tensor.shape[-1]]
    view.copy_(tensor)
    return view


def make_caches(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Caches:
    layers, batch, branches, window, kv_heads, _, head_dim, capacity = shape
    g = torch.Generator().manual_seed(0)
    cache = (layers, batch, capacity, kv_heads, head_dim)
    windows = (layers, batch, branches, window, kv_heads, head_dim)
    tensors = [torch.randn(s, generator=g).to(dtype) for s in (cache, cache, windows, windows)]
    if layout == "strided":
        tensors = [strided(t) for t in tensors]
    return Caches(*tensors)


class Rows(NamedTuple):
    qkv: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cos_sin: torch.Tensor
    cache_len: torch.Tensor
    commit_len: torch.Tensor


def rope_table(positions: int, head_dim: int) -> torch.Tensor:
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def make_rows(shape: tuple[int, ...], dtype: torch.dtype) -> Rows:
    _, batch, branches, window, kv_heads, q_heads, head_dim, capacity = shape
    g = torch.Generator().manual_seed(1)
    heads = q_heads + 2 * kv_heads
    qkv = torch.randn((batch, branches, window, heads * head_dim), generator=g).to(dtype)
    q, k, v = qkv.unflatten(-1, (heads, head_dim)).split([q_heads, kv_heads, kv_heads], 3)
    cache_len = torch.randint(0, capacity + 1, (batch,), generator=g, dtype=torch.int32)
    room = (capacity - cache_len).clamp(max=window)
    commit_len = (torch.rand((batch,), generator=g) * (room + 1)).int()
    return Rows(qkv, q, k, v, rope_table(capacity + window, head_dim), cache_len, commit_len)


def rotated(x: torch.Tensor, cos_sin: torch.Tensor, cache_len: torch.Tensor) -> torch.Tensor:
    """The rotation as complex multiplication in float64, from the definition."""
    half = x.shape[-1] // 2
    number = torch.complex(x.double()[..., :half], x.double()[..., half:])
    position = cache_len[:, None] + torch.arange(x.shape[2])
    turn = cos_sin.double()[position.long()]
    turn = torch.complex(turn[..., :half], turn[..., half:])[:, None, :, None]
    return torch.cat([(number * turn).real, (number * turn).imag], -1)
