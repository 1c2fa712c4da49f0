"""The static KV cache against PyTorch's indexing: the commit of a round, a layer's Pre-Write."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from bench.case import Case
from lopa_kernels import kv_commit_, qkv_prewrite_


class Shape(NamedTuple):
    """Letters of the contract; U positions are committed behind a prefix of P."""

    L: int
    K: int
    W: int
    U: int
    P: int
    Hq: int
    Hk: int
    D: int
    S: int = 1024


TINY = Shape(8, 8, 96, 32, 200, 6, 2, 64)
DREAM = Shape(28, 8, 96, 32, 512, 28, 4, 128)

Result = tuple[torch.Tensor, ...]


def make_commit(shape: Shape, dtype: torch.dtype, device: str, buffers: int) -> list[Any]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    def int32(value: int) -> torch.Tensor:
        return torch.full((1,), value, dtype=torch.int32, device=device)

    positions = torch.arange(shape.P, shape.P + shape.U, device=device)
    lengths = (int32(shape.K - 1), int32(shape.P), int32(shape.U))
    tuples = []
    for _ in range(buffers):
        caches = [normal(shape.L, 1, shape.S, shape.Hk, shape.D) for _ in range(2)]
        windows = [normal(shape.L, 1, shape.K, shape.W, shape.Hk, shape.D) for _ in range(2)]
        tuples.append((*caches, *windows, *lengths, positions))
    return tuples


def commit(*inputs: Any) -> Result:
    kv_commit_(*inputs[:7])
    return inputs[:2]


def commit_by_layer(shape: Shape, *inputs: Any) -> Result:
    """As the published branch-parallel code: layer by layer, keys and values apart."""
    caches, windows, winner, positions = inputs[:2], inputs[2:4], inputs[4], inputs[7]
    for cache, window in zip(caches, windows, strict=True):
        for layer in range(shape.L):
            rows = window[layer, 0].index_select(0, winner)[0, : shape.U]
            cache[layer, 0].index_copy_(0, positions, rows)
    return caches


def commit_stacked(shape: Shape, *inputs: Any) -> Result:
    caches, windows, winner, positions = inputs[:2], inputs[2:4], inputs[4], inputs[7]
    for cache, window in zip(caches, windows, strict=True):
        rows = window[:, 0, :, : shape.U].index_select(1, winner)[:, 0]
        cache[:, 0].index_copy_(1, positions, rows)
    return caches


def make_prewrite(shape: Shape, dtype: torch.dtype, device: str, buffers: int) -> list[Any]:
    generator = torch.Generator(device).manual_seed(0)
    heads = shape.Hq + 2 * shape.Hk
    cos_sin = torch.rand((shape.S, shape.D), generator=generator, device=device) * 2 - 1
    cache_len = torch.full((1,), shape.P, dtype=torch.int32, device=device)
    tuples = []
    for _ in range(buffers):
        window = (shape.L, 1, shape.K, shape.W, shape.Hk, shape.D)
        windows = [torch.zeros(window, dtype=dtype, device=device) for _ in range(2)]
        packed = (1, shape.K, shape.W, heads * shape.D)
        qkv = torch.randn(packed, generator=generator, device=device).to(dtype)
        tuples.append((*windows, qkv, cos_sin, cache_len))
    return tuples


def prewrite(shape: Shape, *inputs: Any) -> Result:
    k_window, v_window, qkv, cos_sin, cache_len = inputs
    q = qkv_prewrite_(k_window, v_window, 1, qkv, cos_sin, cache_len, num_heads=shape.Hq)
    return q, k_window[1], v_window[1]


def eager_prewrite(shape: Shape, *inputs: Any) -> Result:
    """Split, rotate by halves, copy: the decoder's own PyTorch, the position known on the host."""
    k_window, v_window, qkv, cos_sin, _ = inputs
    rows = qkv.unflatten(-1, (-1, shape.D))
    q, k, v = rows.split([shape.Hq, shape.Hk, shape.Hk], dim=3)
    cosine, sine = cos_sin[shape.P : shape.P + shape.W].chunk(2, dim=-1)
    cosine, sine = (torch.cat([half, half], -1)[:, None] for half in (cosine, sine))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        low, high = x.float().chunk(2, dim=-1)
        return (x * cosine + torch.cat([-high, low], -1) * sine).to(x.dtype)

    k_window[1].copy_(rotate(k))
    v_window[1].copy_(v)
    return rotate(q), k_window[1], v_window[1]


def check_equal(result: Any, expected: Any) -> None:
    for got, want in zip(result, expected, strict=True):
        assert torch.equal(got, want)


def commit_case(name: str, shape: Shape, dtype: torch.dtype, device: str) -> Case:
    moved = 2 * shape.L * shape.U * shape.Hk * shape.D
    return Case(
        op="kv_commit_",
        name=f"{name}, {shape.U} positions, {str(dtype).removeprefix('torch.')}",
        make=functools.partial(make_commit, shape, dtype, device),
        providers={
            "lopa": commit,
            "index_copy_ by layer": functools.partial(commit_by_layer, shape),
            "stacked index_select, index_copy_": functools.partial(commit_stacked, shape),
        },
        reference="index_copy_ by layer",
        check=check_equal,
        bytes=2 * moved * dtype.itemsize,
        flops=0,
    )


def prewrite_case(name: str, shape: Shape, dtype: torch.dtype, device: str) -> Case:
    rows = shape.K * shape.W * shape.D
    return Case(
        op="qkv_prewrite_",
        name=f"{name}, K {shape.K} W {shape.W}, {str(dtype).removeprefix('torch.')}",
        make=functools.partial(make_prewrite, shape, dtype, device),
        providers={
            "lopa": functools.partial(prewrite, shape),
            "eager": functools.partial(eager_prewrite, shape),
        },
        reference="eager",
        check=check_equal,
        bytes=2 * rows * (shape.Hq + 2 * shape.Hk) * dtype.itemsize,
        flops=3 * rows * (shape.Hq + shape.Hk),
    )


def cases(device: str = "cpu") -> list[Case]:
    """Every case on one device."""
    return [
        commit_case("tiny", TINY, torch.float32, device),
        commit_case("Dream-7B", DREAM, torch.bfloat16, device),
        prewrite_case("tiny", TINY, torch.float32, device),
        prewrite_case("Dream-7B", DREAM, torch.bfloat16, device),
    ]


CASES = cases()
