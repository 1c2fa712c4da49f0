"""The static KV cache against PyTorch's indexing: the commit of a round, a layer's Pre-Write."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from bench import peers
from bench.case import Case
from lopa_kernels import kv_commit_, qkv_prewrite_


class Shape(NamedTuple):
    """Letters of the contract; U positions are committed behind a prefix of P in each sequence."""

    L: int
    K: int
    W: int
    U: int
    P: int
    Hq: int
    Hk: int
    D: int
    S: int = 1024
    B: int = 1


TINY = Shape(8, 8, 96, 32, 200, 6, 2, 64)
DREAM = Shape(28, 8, 96, 32, 512, 28, 4, 128)

#: SDAR-8B, of Qwen3's shapes, whose queries and keys are normalised
SDAR = Shape(36, 8, 96, 32, 512, 32, 8, 128)

#: LLaDA-8B's cache, with a smaller window: a commit of 16.8 MB
LLADA = Shape(32, 4, 64, 32, 256, 32, 32, 128, S=512)

Result = tuple[torch.Tensor, ...]


def make_commit(shape: Shape, dtype: torch.dtype, device: str, buffers: int) -> list[Any]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    def int32(value: int) -> torch.Tensor:
        return torch.full((shape.B,), value, dtype=torch.int32, device=device)

    torch.compiler.reset()
    positions = torch.arange(shape.P, shape.P + shape.U, device=device)
    sequences = torch.arange(shape.B, device=device)
    lengths = (int32(shape.K - 1), int32(shape.P), int32(shape.U))
    window = (shape.L, shape.B, shape.K, shape.W, shape.Hk, shape.D)
    tuples = []
    for _ in range(buffers):
        caches = [normal(shape.L, shape.B, shape.S, shape.Hk, shape.D) for _ in range(2)]
        windows = [normal(*window) for _ in range(2)]
        tuples.append((*caches, *windows, *lengths, positions, sequences))
    return tuples


def commit(*inputs: Any) -> Result:
    kv_commit_(*inputs[:7])
    return inputs[:2]


def commit_on_triton(*inputs: Any) -> Result:
    kv_commit_(*inputs[:7], backend="triton")
    return inputs[:2]


def commit_by_layer(shape: Shape, *inputs: Any) -> Result:
    """As the published branch-parallel code: layer by layer, keys and values apart.

    The batches that it does not know select by index; their sequences have one length.
    """
    caches, windows, (positions, sequences) = inputs[:2], inputs[2:4], inputs[7:]
    winner = inputs[4] if shape.B == 1 else inputs[4].long()
    for cache, window in zip(caches, windows, strict=True):
        for layer in range(shape.L):
            if shape.B == 1:
                rows = window[layer, 0].index_select(0, winner)[0, : shape.U]
                cache[layer, 0].index_copy_(0, positions, rows)
            else:
                rows = window[layer, sequences, winner, : shape.U]
                cache[layer].index_copy_(1, positions, rows)
    return caches


def commit_stacked(shape: Shape, *inputs: Any) -> Result:
    k_cache, v_cache, k_window, v_window, winner, _, _, positions, sequences = inputs
    if shape.B > 1:
        winner = winner.long()
    for cache, window in ((k_cache, k_window), (v_cache, v_window)):
        if shape.B == 1:
            rows = window[:, 0, :, : shape.U].index_select(1, winner)[:, 0]
            cache[:, 0].index_copy_(1, positions, rows)
        else:
            rows = window[:, sequences, winner, : shape.U]
            cache.index_copy_(2, positions, rows)
    return k_cache, v_cache


def commit_compiled(shape: Shape, *inputs: Any) -> Result:
    result: Result = peers.compiled(commit_stacked)(shape, *inputs)
    return result


def copy_kernel(shape: Shape, *inputs: Any) -> None:
    """As much memory as a commit moves, in one piece: the floor. It overwrites the cache."""
    moved = 2 * shape.L * shape.B * shape.U * shape.Hk * shape.D
    # Not copy_, which a graph holds as a memcpy instead of a kernel.
    torch.neg(inputs[2].view(-1)[:moved], out=inputs[0].view(-1)[:moved])


def make_prewrite(shape: Shape, dtype: torch.dtype, device: str, buffers: int) -> list[Any]:
    generator = torch.Generator(device).manual_seed(0)
    heads = shape.Hq + 2 * shape.Hk
    cos_sin = torch.rand((shape.S, shape.D), generator=generator, device=device) * 2 - 1
    cache_len = torch.full((shape.B,), shape.P, dtype=torch.int32, device=device)
    torch.compiler.reset()
    tuples = []
    for _ in range(buffers):
        window = (shape.L, shape.B, shape.K, shape.W, shape.Hk, shape.D)
        windows = [torch.zeros(window, dtype=dtype, device=device) for _ in range(2)]
        packed = (shape.B, shape.K, shape.W, heads * shape.D)
        qkv = torch.randn(packed, generator=generator, device=device).to(dtype)
        tuples.append((*windows, qkv, cos_sin, cache_len))
    return tuples


def make_normed(shape: Shape, dtype: torch.dtype, device: str, buffers: int) -> list[Any]:
    generator = torch.Generator(device).manual_seed(1)
    norms = torch.rand((2, shape.D), generator=generator, device=device) + 0.5
    q_norm, k_norm = norms.to(dtype)
    return [(*case, q_norm, k_norm) for case in make_prewrite(shape, dtype, device, buffers)]


def prewrite(shape: Shape, *inputs: Any, backend: str | None = None) -> Result:
    k_window, v_window, qkv, cos_sin, cache_len, *norms = inputs
    q_norm, k_norm = norms or (None, None)
    q = qkv_prewrite_(
        k_window, v_window, 1, qkv, cos_sin, cache_len, num_heads=shape.Hq, q_norm=q_norm,
        k_norm=k_norm, backend=backend,
    )  # fmt: skip
    return q, k_window[1], v_window[1]


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As the published models have it, the normalised row rounded to the dtype of the weights."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6)


def eager_prewrite(shape: Shape, *inputs: Any) -> Result:
    """Split, rotate by halves, copy: the decoder's own PyTorch, the position known on the host."""
    k_window, v_window, qkv, cos_sin, _, *norms = inputs
    rows = qkv.unflatten(-1, (-1, shape.D))
    q, k, v = rows.split([shape.Hq, shape.Hk, shape.Hk], dim=3)
    if norms:
        q, k = (rms_norm(x, weight) for x, weight in zip((q, k), norms, strict=True))
    cosine, sine = cos_sin[shape.P : shape.P + shape.W].chunk(2, dim=-1)
    cosine, sine = (torch.cat([half, half], -1)[:, None] for half in (cosine, sine))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        low, high = x.float().chunk(2, dim=-1)
        return (x * cosine + torch.cat([-high, low], -1) * sine).to(x.dtype)

    k_window[1].copy_(rotate(k))
    v_window[1].copy_(v)
    return rotate(q), k_window[1], v_window[1]


def compiled_prewrite(shape: Shape, *inputs: Any) -> Result:
    result: Result = peers.compiled(eager_prewrite)(shape, *inputs)
    return result


def check_equal(result: Any, expected: Any) -> None:
    for got, want in zip(result, expected, strict=True):
        assert torch.equal(got, want)


def check_rotated(result: Any, expected: Any) -> None:
    """Values are copied; the rotated may differ by a rounding where a compiler fuses products."""
    for got, want in zip(result[:2], expected[:2], strict=True):
        unit = 2 * torch.finfo(want.dtype).eps
        torch.testing.assert_close(got, want, rtol=unit, atol=unit * 1e-2)
    assert torch.equal(result[2], expected[2])


def check_normed(result: Any, expected: Any) -> None:
    """The peers round the normalised row as well, by at most half a unit of its largest element."""
    for got, want in zip(result[:2], expected[:2], strict=True):
        unit = torch.finfo(want.dtype).eps
        error = (got.float() - want.float()).abs()
        # A rotation's result has that of both elements, and the last rounding of each side.
        largest = want.float().abs().amax(-1, keepdim=True)
        assert (error <= 3 * unit * largest + 1e-5).all()
    assert torch.equal(result[2], expected[2])


def _name(name: str, shape: Shape) -> str:
    return name if shape.B == 1 else f"{name}, B {shape.B}"


def commit_case(name: str, shape: Shape, dtype: torch.dtype, device: str) -> Case:
    moved = 2 * shape.L * shape.B * shape.U * shape.Hk * shape.D
    gpu = device != "cpu"
    providers: dict[str, Any] = {"lopa": commit}
    if gpu and peers.has_triton("kv_commit_"):
        providers["lopa, triton"] = commit_on_triton
    providers["index_copy_ by layer"] = functools.partial(commit_by_layer, shape)
    providers["stacked index_select, index_copy_"] = functools.partial(commit_stacked, shape)
    if gpu:
        providers["stacked, torch.compile"] = functools.partial(commit_compiled, shape)
        providers["copy kernel"] = functools.partial(copy_kernel, shape)
    return Case(
        op="kv_commit_",
        name=f"{_name(name, shape)}, {shape.U} positions, {str(dtype).removeprefix('torch.')}",
        make=functools.partial(make_commit, shape, dtype, device),
        providers=providers,
        reference="index_copy_ by layer",
        check=check_equal,
        bytes=2 * moved * dtype.itemsize,
        flops=0,
        unchecked=("copy kernel",) if gpu else (),
        device=device,
        optional=("stacked, torch.compile",) if gpu else (),
    )


def prewrite_case(
    name: str, shape: Shape, dtype: torch.dtype, device: str, normed: bool = False
) -> Case:
    rows = shape.B * shape.K * shape.W * shape.D
    gpu = device != "cpu"
    providers: dict[str, Any] = {"lopa": functools.partial(prewrite, shape)}
    if gpu and peers.has_triton("qkv_prewrite_"):
        providers["lopa, triton"] = functools.partial(prewrite, shape, backend="triton")
    providers["eager"] = functools.partial(eager_prewrite, shape)
    if gpu:
        providers["torch.compile"] = functools.partial(compiled_prewrite, shape)
    return Case(
        op="qkv_prewrite_",
        name=f"{_name(name, shape)}{', RMSNorm' * normed}, K {shape.K} W {shape.W}, "
        f"{str(dtype).removeprefix('torch.')}",
        make=functools.partial(make_normed if normed else make_prewrite, shape, dtype, device),
        providers=providers,
        reference="eager",
        check=check_normed if normed else check_rotated if gpu else check_equal,
        bytes=2 * rows * (shape.Hq + 2 * shape.Hk) * dtype.itemsize,
        flops=(7 if normed else 3) * rows * (shape.Hq + shape.Hk),
        device=device,
        optional=("torch.compile",) if gpu else (),
    )


def cases(device: str = "cpu") -> list[Case]:
    """Every case on one device."""
    if device != "cpu":
        bf16 = torch.bfloat16
        return [
            commit_case("Dream-7B", DREAM, bf16, device),
            commit_case("Dream-7B", DREAM._replace(B=8), bf16, device),
            commit_case("LLaDA-8B", LLADA, bf16, device),
            commit_case("LLaDA-8B", LLADA._replace(B=8, S=320), bf16, device),
            prewrite_case("Dream-7B", DREAM, bf16, device),
            prewrite_case("Dream-7B", DREAM._replace(B=8, L=2), bf16, device),
            prewrite_case("SDAR-8B", SDAR, bf16, device, normed=True),
        ]
    return [
        commit_case("tiny", TINY, torch.float32, device),
        commit_case("Dream-7B", DREAM, torch.bfloat16, device),
        prewrite_case("tiny", TINY, torch.float32, device),
        prewrite_case("Dream-7B", DREAM, torch.bfloat16, device),
        prewrite_case("SDAR-8B", SDAR, torch.bfloat16, device, normed=True),
    ]


CASES = cases()
