"""branch_attention against PyTorch's attention, the prefix copied to every branch or not; paged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from bench.case import Case
from lopa_kernels import branch_attention
from lopa_kernels.ops.branch_attention import reference


class Shape(NamedTuple):
    """Letters of the contract, P being the cached prefix."""

    B: int
    K: int
    W: int
    P: int
    Hq: int = 6
    Hk: int = 2
    D: int = 64


class Peer(NamedTuple):
    """What the peers want ready made, outside the timing: heads before positions, prefix copied."""

    q: torch.Tensor
    k_copied: torch.Tensor
    v_copied: torch.Tensor
    q_packed: torch.Tensor
    k_packed: torch.Tensor
    v_packed: torch.Tensor
    block_mask: Any


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


def copied(cache: torch.Tensor, window: torch.Tensor, prefix: int) -> torch.Tensor:
    """[B * K, Hk, P + W, D]: every branch has the prefix before its window."""
    branches = window.shape[1]
    expanded = cache[:, None, :prefix].expand(-1, branches, -1, -1, -1)
    return torch.cat([expanded, window], dim=2).flatten(0, 1).transpose(1, 2)


def packed(cache: torch.Tensor, window: torch.Tensor, prefix: int) -> torch.Tensor:
    """[B, Hk, P + K * W, D]: one prefix, then the branches one after another."""
    return torch.cat([cache[:, :prefix], window.flatten(1, 2)], dim=1).transpose(1, 2).contiguous()


@functools.cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    """FlexAttention as it is meant to be used; the first call compiles."""
    return torch.compile(flex_attention, dynamic=False)


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
        tuples.append((*inputs, scattered(*inputs[1:3], shape.P, page, generator)))
    return tuples


def make(shape: Shape, dtype: torch.dtype, device: str, buffers: int) -> list[tuple[Any, ...]]:
    generator = torch.Generator(device).manual_seed(0)

    def visible(b: Any, h: Any, query: Any, key: Any) -> Any:
        branch = (key - shape.P) // shape.W
        return (key < shape.P) | (branch == query // shape.W)

    # Each shape is compiled for itself; without this the eighth falls back to eager.
    torch.compiler.reset()
    rows = shape.K * shape.W
    block_mask = create_block_mask(visible, None, None, rows, shape.P + rows, device=device)
    tuples = []
    for _ in range(buffers):
        inputs = operands(shape, dtype, device, generator)
        q, k_cache, v_cache, k_window, v_window = inputs[:5]
        peer = Peer(
            q.flatten(0, 1).transpose(1, 2).contiguous(),
            copied(k_cache, k_window, shape.P).contiguous(),
            copied(v_cache, v_window, shape.P).contiguous(),
            q.flatten(1, 2).transpose(1, 2).contiguous(),
            packed(k_cache, k_window, shape.P),
            packed(v_cache, v_window, shape.P),
            block_mask,
        )
        tuples.append((*inputs, peer))
    return tuples


def lopa(*inputs: Any) -> torch.Tensor:
    result = branch_attention(*inputs[:7])
    assert isinstance(result, torch.Tensor)
    return result


def lopa_paged(*inputs: Any) -> torch.Tensor:
    q, _, _, *windows_and_lengths, paged = inputs
    result = branch_attention(
        q, paged.k_pool, paged.v_pool, *windows_and_lengths, block_table=paged.block_table
    )
    assert isinstance(result, torch.Tensor)
    return result


def sdpa_copied(shape: Shape, *inputs: Any) -> torch.Tensor:
    peer = inputs[7]
    out = scaled_dot_product_attention(peer.q, peer.k_copied, peer.v_copied, enable_gqa=True)
    return out.transpose(1, 2).unflatten(0, (shape.B, shape.K))


def sdpa_with_copy(shape: Shape, *inputs: Any) -> torch.Tensor:
    _, k_cache, v_cache, k_window, v_window, _, _, peer = inputs
    k, v = copied(k_cache, k_window, shape.P), copied(v_cache, v_window, shape.P)
    out = scaled_dot_product_attention(peer.q, k, v, enable_gqa=True)
    return out.transpose(1, 2).unflatten(0, (shape.B, shape.K))


def flex(shape: Shape, *inputs: Any) -> torch.Tensor:
    peer = inputs[7]
    out = compiled_flex()(
        peer.q_packed, peer.k_packed, peer.v_packed, block_mask=peer.block_mask, enable_gqa=True
    )
    return out.transpose(1, 2).unflatten(1, (shape.K, shape.W))


def eager(*inputs: Any) -> torch.Tensor:
    q = inputs[0]
    return reference.attend(*inputs[:7])[0].to(q.dtype)


def check(dtype: torch.dtype, result: Any, expected: Any) -> None:
    atol = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(result.float(), expected.float(), rtol=0, atol=atol)


def case(shape: Shape, dtype: torch.dtype, device: str = "cpu", page: int | None = None) -> Case:
    """Full windows behind one prefix length; `eager` forms the scores of the whole capacity.

    With a `page`, the prefix in pages beside the same one that is not.
    """
    rows = shape.B * shape.K * shape.W
    elements = (
        2 * rows * shape.Hq + 2 * rows * shape.Hk + 2 * shape.B * shape.P * shape.Hk
    ) * shape.D
    name = " ".join(f"{letter}{size}" for letter, size in shape._asdict().items())
    name += f" {str(dtype).removeprefix('torch.')}"
    providers: dict[str, Callable[..., Any]] = {"lopa": lopa}
    if page is None:
        maker = functools.partial(make, shape, dtype, device)
        providers |= {
            "SDPA, prefix copied before": functools.partial(sdpa_copied, shape),
            "SDPA with the copy": functools.partial(sdpa_with_copy, shape),
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
        bytes=elements * dtype.itemsize,
        flops=4 * rows * shape.Hq * shape.D * (shape.P + shape.W),
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


def cases(device: str = "cpu") -> list[Case]:
    """Every case on one device; there is a kernel for the CPU alone."""
    if device != "cpu":
        return []
    return [
        *(case(shape, torch.float32, device) for shape in TINY),
        case(TINY[2], torch.bfloat16, device),
        case(TINY[2], torch.float16, device),
        case(DREAM, torch.bfloat16, device),
        *(case(TINY[4], torch.float32, device, page) for page in PAGES),
        *(case(DREAM, torch.bfloat16, device, page) for page in PAGES),
    ]


CASES = cases()
