"""branch_attention against PyTorch's attention, the prefix copied to every branch or not; paged.

On a GPU also against FlashInfer's cascade.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend

from bench import peers
from bench.attention_peers import (
    Shape,
    block_mask_of,
    cascade,
    flex,
    prepared,
    sdpa_copied,
    sdpa_with_copy,
)
from bench.case import Case
from lopa_kernels import branch_attention
from lopa_kernels.ops.branch_attention import reference


class Paged(NamedTuple):
    """The cached prefix in pages, scattered over pools in random order."""

    k_pool: torch.Tensor
    v_pool: torch.Tensor
    block_table: torch.Tensor


def scattered(
    k_cache: torch.Tensor, v_cache: torch.Tensor, prefix: int, page: int, generator: torch.Generator
) -> Paged:
    """Pools of twice the pages that the prefix needs."""
    batch, device = k_cache.shape[0], k_cache.device
    width = -(-prefix // page)
    pages = 2 * batch * width
    order = torch.randperm(pages, generator=generator, device=device)
    table = order[: batch * width].view(batch, width)

    def scatter(cache: torch.Tensor) -> torch.Tensor:
        pool = cache.new_zeros(pages, page, *cache.shape[2:])
        for first in range(0, prefix, page):
            part = cache[:, first : min(first + page, prefix)]
            pool[table[:, first // page], : part.shape[1]] = part
        return pool

    return Paged(scatter(k_cache), scatter(v_cache), table.int())


def operands(
    shape: Shape, dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """What branch_attention takes, the prefix not paged."""
    capacity = shape.P + 64

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    q = normal(shape.B, shape.K, shape.W, shape.Hq, shape.D)
    k_cache, v_cache = (normal(shape.B, capacity, shape.Hk, shape.D) for _ in range(2))
    k_window, v_window = (normal(shape.B, shape.K, shape.W, shape.Hk, shape.D) for _ in range(2))
    cache_len = torch.full((shape.B,), shape.P, dtype=torch.int32, device=device)
    length = torch.full((shape.B, shape.K), shape.W, dtype=torch.int32, device=device)
    return q, k_cache, v_cache, k_window, v_window, cache_len, length


def make_paged(
    shape: Shape, dtype: torch.dtype, device: str, page: int, buffers: int
) -> list[tuple[Any, ...]]:
    generator = torch.Generator(device).manual_seed(0)
    tuples = []
    for _ in range(buffers):
        inputs = operands(shape, dtype, device, generator)
        _, k_cache, v_cache, *_ = inputs
        tuples.append((*inputs, scattered(k_cache, v_cache, shape.P, page, generator)))
    return tuples


def make(
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    pools: bool,
    page: int | None,
    buffers: int,
) -> list[tuple[Any, ...]]:
    """Operands and what the peers want of them, FlashInfer's `pools` too; and with a `page` the
    prefix in such pages.
    """
    generator = torch.Generator(device).manual_seed(0)
    # Each shape is compiled for itself; without this the eighth falls back to eager.
    torch.compiler.reset()
    block_mask = block_mask_of(shape, device)
    tuples = []
    for _ in range(buffers):
        inputs = operands(shape, dtype, device, generator)
        made: tuple[Any, ...] = (*inputs, prepared(shape, inputs, block_mask, pools))
        if page is not None:
            _, k_cache, v_cache, *_ = inputs
            made += (scattered(k_cache, v_cache, shape.P, page, generator),)
        tuples.append(made)
    return tuples


def lopa(*inputs: Any, backend: str | None = None) -> torch.Tensor:
    result = branch_attention(*inputs[:7], backend=backend)
    assert isinstance(result, torch.Tensor)
    return result


def lopa_paged(*inputs: Any) -> torch.Tensor:
    paged = inputs[-1]
    result = branch_attention(
        inputs[0], paged.k_pool, paged.v_pool, *inputs[3:7], block_table=paged.block_table
    )
    assert isinstance(result, torch.Tensor)
    return result


def eager(*inputs: Any) -> torch.Tensor:
    q = inputs[0]
    return reference.attend(*inputs[:7])[0].to(q.dtype)


def oracle(shape: Shape, *inputs: Any) -> torch.Tensor:
    """float64 [B, K, W, Hq, D] of full windows, a branch and a KV head at a time.

    The scores of all heads at once would not fit beside the inputs of the longest prefix.
    """
    q, k_cache, v_cache, k_window, v_window = inputs[:5]
    result = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for b in range(shape.B):
        for head in range(shape.Hk):
            prefix = [cache[b, : shape.P, head].double() for cache in (k_cache, v_cache)]
            for branch in range(shape.K):
                own = [window[b, branch, :, head].double() for window in (k_window, v_window)]
                k, v = (torch.cat(parts) for parts in zip(prefix, own, strict=True))
                queries, out = (
                    rows[b, branch].unflatten(1, (shape.Hk, -1))[:, head] for rows in (q, result)
                )
                scores = queries.double().flatten(0, 1) @ k.T * shape.D**-0.5
                out.copy_((scores.softmax(-1) @ v).view(out.shape))
    return result


def check(dtype: torch.dtype, result: Any, expected: Any) -> None:
    """Within a tolerance that falls with the results, which long prefixes average away."""
    atol = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    if dtype != torch.float32:
        atol *= min(1.0, 10 * expected.double().square().mean().sqrt().item())
    torch.testing.assert_close(result.float(), expected.float(), rtol=0, atol=atol)


def name_of(shape: Shape, dtype: torch.dtype) -> str:
    sizes = " ".join(f"{letter}{size}" for letter, size in shape._asdict().items())
    return f"{sizes} {str(dtype).removeprefix('torch.')}"


def least_bytes(shape: Shape, dtype: torch.dtype) -> int:
    rows = shape.B * shape.K * shape.W
    elements = 2 * rows * shape.Hq + 2 * rows * shape.Hk + 2 * shape.B * shape.P * shape.Hk
    return elements * shape.D * dtype.itemsize


def least_flops(shape: Shape) -> int:
    return 4 * shape.B * shape.K * shape.W * shape.Hq * shape.D * (shape.P + shape.W)


def case(shape: Shape, dtype: torch.dtype, device: str = "cpu", page: int | None = None) -> Case:
    """Full windows behind one prefix length; `eager` forms the scores of the whole capacity.

    With a `page`, the prefix in pages beside the same one that is not.
    """
    name = name_of(shape, dtype)
    providers: dict[str, Callable[..., Any]] = {"lopa": lopa}
    if page is None:
        maker = functools.partial(make, shape, dtype, device, False, None)
        providers |= {
            "SDPA, prefix copied before": functools.partial(sdpa_copied, shape, None),
            "SDPA with the copy": functools.partial(sdpa_with_copy, shape, None),
            "FlexAttention": functools.partial(flex, shape),
        }
    else:
        name += f" page {page}"
        maker = functools.partial(make_paged, shape, dtype, device, page)
        providers = {"lopa": lopa_paged, "lopa, not paged": lopa}
    return Case(
        op="branch_attention",
        name=name,
        make=maker,
        providers={**providers, "eager": eager},
        reference="eager",
        check=functools.partial(check, dtype),
        bytes=least_bytes(shape, dtype),
        flops=least_flops(shape),
    )


def gpu_case(
    shape: Shape,
    dtype: torch.dtype,
    device: str = "cuda",
    page: int | None = None,
    tags: tuple[str, ...] = (),
) -> Case:
    """The same against the kernels that a GPU has; with a `page` ours on such pages too.

    `tags` go into the name, where ``--case`` finds them.
    """
    ours: dict[str, Callable[..., Any]] = {"lopa": lopa}
    if peers.has_triton("branch_attention"):
        ours["lopa, triton"] = functools.partial(lopa, backend="triton")
    if page is not None:
        ours[f"lopa, paged {page}"] = lopa_paged
    cudnn, flash = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    others: dict[str, Callable[..., Any]] = {
        "FlexAttention": functools.partial(flex, shape),
        "cuDNN SDPA, prefix copied before": functools.partial(sdpa_copied, shape, cudnn),
        "cuDNN SDPA with the copy": functools.partial(sdpa_with_copy, shape, cudnn),
        "FlashAttention-2 SDPA, prefix copied before": functools.partial(sdpa_copied, shape, flash),
    }
    flashinfer = peers.has_flashinfer()
    if flashinfer:
        for backend in ("fa2", "fa3"):
            others[f"FlashInfer cascade, {backend}"] = functools.partial(cascade, shape, backend)
    return Case(
        op="branch_attention",
        name=", ".join([name_of(shape, dtype), *tags]),
        make=functools.partial(make, shape, dtype, device, flashinfer, page),
        providers={**ours, **others},
        reference=None,
        check=functools.partial(check, dtype),
        bytes=least_bytes(shape, dtype),
        flops=least_flops(shape),
        device=device,
        oracle=functools.partial(oracle, shape),
        optional=tuple(others),
    )


#: the tiny model's rounds: prefill, few and many branches, a batch
TINY = (
    Shape(1, 1, 96, 64),
    Shape(1, 1, 32, 64),
    Shape(1, 4, 64, 200),
    Shape(1, 8, 96, 256),
    Shape(1, 14, 128, 400),
    Shape(8, 4, 64, 200),
)

#: Dream-7B's heads
DREAM = Shape(1, 4, 64, 1024, 28, 4, 128)

#: positions of a page
PAGES = (16, 64, 256)


#: query and KV heads of Dream-7B and of LLaDA-8B
HEADS = ((28, 4), (32, 32))

#: rounds with a time of their own to reach
GOALS = (
    Shape(1, 4, 64, 1024, 28, 4, 128),
    Shape(1, 8, 64, 1024, 28, 4, 128),
    Shape(1, 8, 64, 4096, 28, 4, 128),
    Shape(1, 8, 128, 2048, 28, 4, 128),
    Shape(1, 8, 64, 1024, 32, 32, 128),
    Shape(1, 11, 96, 1024, 28, 4, 128),
    Shape(1, 4, 32, 8192, 28, 4, 128),
    Shape(1, 8, 32, 512, 28, 4, 128),
)


def sweep() -> list[Shape]:
    """The design: a centre, each axis through it, and the corners; for either layout of heads."""
    sizes = [
        (8, 64, 1024),
        *((k, 64, 1024) for k in (1, 2, 4, 16)),
        *((8, w, 1024) for w in (16, 32, 128, 256)),
        *((8, 64, p) for p in (0, 256, 4096, 32768)),
        *itertools.product((2, 16), (16, 256), (256, 32768)),
    ]
    return [Shape(1, k, w, p, *heads, 128) for heads in HEADS for k, w, p in sizes]


def gpu_cases(device: str) -> list[Case]:
    """The goals, then the sweep; what is in both is one case with both tags."""
    swept = sweep()
    found = []
    for shape in dict.fromkeys([*GOALS, *swept]):
        tags = [tag for tag, members in (("goal", GOALS), ("sweep", swept)) if shape in members]
        page = 64 if shape in GOALS else None
        found.append(gpu_case(shape, torch.bfloat16, device, page, tuple(tags)))
    return found


def cases(device: str = "cpu") -> list[Case]:
    """Every case on one device."""
    if device != "cpu":
        return gpu_cases(device)
    return [
        *(case(shape, torch.float32, device) for shape in TINY),
        case(TINY[2], torch.bfloat16, device),
        case(TINY[2], torch.float16, device),
        case(DREAM, torch.bfloat16, device),
        *(case(TINY[4], torch.float32, device, page) for page in PAGES),
        *(case(DREAM, torch.bfloat16, device, page) for page in PAGES),
    ]


CASES = cases()
