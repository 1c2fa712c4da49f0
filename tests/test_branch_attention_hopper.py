"""branch_attention's kernel of compute capability 9.0: every cut, and when it stands back.

What a user can see of it, tests/test_branch_attention.py and test_branch_attention_paged.py show of
backend "cuda"; here the kernel is called itself, so that nothing else can have answered.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from gpu import capture, device_events
from targets import needs_gpu
from torch.nn.functional import scaled_dot_product_attention

import lopa_kernels as lk
from lopa_kernels.ops.branch_attention import reference

pytestmark = [
    needs_gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="needs compute capability 9.0",
    ),
]

DTYPES = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
#: CTAs of a cluster, tiles of rows that they share, rows of a tile; 0: chosen
CUTS = [
    (0, 0, 0), (1, 1, 64), (1, 1, 128), (2, 1, 64), (2, 1, 128), (4, 1, 128), (8, 1, 64),
    (8, 1, 128), (2, 2, 128), (4, 3, 64), (4, 7, 64), (4, 7, 128), (8, 3, 128), (8, 31, 64),
    (2, 5, 64),
]  # fmt: skip


class Inputs(NamedTuple):
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k_window: torch.Tensor
    v_window: torch.Tensor
    cache_len: torch.Tensor
    length: torch.Tensor


def make(shape: tuple[int, ...], dtype: torch.dtype, cache_len: Any, length: Any) -> Inputs:
    """Random inputs, NaN in every slot that must not be read."""
    B, K, W, Hq, Hk, D, S = shape
    g = torch.Generator("cuda").manual_seed(sum(shape))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g, device="cuda").to(dtype)

    lengths = [
        torch.tensor(x, dtype=torch.int32, device="cuda").view(s)
        for x, s in ((cache_len, (B,)), (length, (B, K)))
    ]
    made = Inputs(
        normal(B, K, W, Hq, D), normal(B, S, Hk, D), normal(B, S, Hk, D), normal(B, K, W, Hk, D),
        normal(B, K, W, Hk, D), *lengths,
    )  # fmt: skip
    for t in (made.k_cache, made.v_cache):
        t[torch.arange(S, device="cuda") >= made.cache_len[:, None]] = math.nan
    for t in (made.q, made.k_window, made.v_window):
        t[torch.arange(W, device="cuda") >= made.length[..., None]] = math.nan
    return made


def run(inputs: Inputs, cut: tuple[int, int, int], **options: Any) -> list[torch.Tensor]:
    B, K, W, Hq, _ = inputs.q.shape
    out = torch.full_like(inputs.q, math.nan)
    lse = torch.full((B, K, Hq, W), math.nan, device="cuda")
    assert torch.ops.lopa_cuda.branch_attention_out(
        *inputs, options.get("prompt_len"), options.get("block_table"),
        options.get("mask", "full"), options.get("block_size"), options.get("scale"), 2, *cut,
        out=out, lse=lse,
    )  # fmt: skip
    return [out, lse]


def check(
    inputs: Inputs, cut: tuple[int, int, int], static: Inputs | None = None, **options: Any
) -> None:
    out, lse = run(inputs, cut, **options)
    again = run(inputs, cut, **options)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])
    expected, expected_lse = reference.attend(
        *(static or inputs),
        **{k: v for k, v in options.items() if k != "block_table"},
        dtype=torch.float64,
    )
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[out.dtype])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-5)


#: shape, cache_len, length
CASES = {
    "one row": ((1, 1, 1, 1, 1, 64, 1), [1], [1]),
    "no prefix": ((1, 2, 16, 4, 2, 64, 0), [0], [16, 5]),
    "Dream": ((1, 4, 64, 28, 4, 64, 1100), [1024], [64] * 4),
    "LLaDA": ((1, 4, 64, 8, 8, 64, 1100), [1024], [64, 33, 64, 1]),
    "ragged": (
        (3, 5, 33, 14, 2, 64, 517), [517, 0, 130],
        [33, 0, 1, 17, 32, 0, 0, 0, 0, 0, 5, 33, 33, 2, 9],
    ),
    "dead": ((2, 3, 40, 7, 1, 64, 300), [300, 0], [0] * 6),
    "many branches": ((1, 32, 3, 2, 1, 64, 200), [190], [3, 1, 2, 0] * 8),
    "long": ((1, 4, 32, 28, 4, 64, 4200), [4111], [32] * 4),
}  # fmt: skip


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("case", CASES)
def test_numbers(case: str, head_dim: int, dtype: torch.dtype, cut: tuple[int, int, int]) -> None:
    shape, cache_len, length = CASES[case]
    check(make((*shape[:5], head_dim, shape[6]), dtype, cache_len, length), cut)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("block_size", "prompt"), [(1, 295), (4, 280), (32, 310), (1000, 0)])
def test_block_causal(
    block_size: int, prompt: int, head_dim: int, cut: tuple[int, int, int]
) -> None:
    inputs = make((1, 3, 70, 7, 1, head_dim, 300), torch.bfloat16, [290], [70, 64, 3])
    prompt_len = torch.tensor([prompt], dtype=torch.int32, device="cuda")
    check(inputs, cut, mask="block_causal", block_size=block_size, prompt_len=prompt_len)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page", [16, 32, 64, 128, 256])
def test_pages(page: int, head_dim: int, cut: tuple[int, int, int]) -> None:
    """What the static cache gives, from pages in any order; entries that nobody needs are bad."""
    B, S = 2, 900
    inputs = make((B, 3, 40, 7, 1, head_dim, S), torch.bfloat16, [871, 64], [40, 3, 40, 1, 0, 40])
    width = -(-S // page)
    g = torch.Generator("cuda").manual_seed(page)
    table = torch.randperm(B * width, generator=g, device="cuda").int().view(B, width)

    def pool(cache: torch.Tensor) -> torch.Tensor:
        rest = cache.shape[2:]
        pages = cache.new_full((B * width + 3, page, *rest), math.nan)
        padded = cache.new_full((B, width * page, *rest), math.nan)
        padded[:, :S] = cache
        pages[table.flatten().long()] = padded.view(B * width, page, *rest)
        return pages

    needed = -(-inputs.cache_len // page)
    dealt = torch.where(torch.arange(width, device="cuda") < needed[:, None], table, 1 << 30).int()
    paged = inputs._replace(k_cache=pool(inputs.k_cache), v_cache=pool(inputs.v_cache))
    check(paged, cut, static=inputs, block_table=dealt)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_branches_do_not_see_each_other(head_dim: int, cut: tuple[int, int, int]) -> None:
    """Infinite and missing numbers of one branch do not change a bit of the others."""
    inputs = make((1, 5, 24, 2, 1, head_dim, 200), torch.bfloat16, [190], [24, 20, 24, 3, 24])
    clean, _ = run(inputs, cut)
    v_window, k_window = inputs.v_window.clone(), inputs.k_window.clone()
    v_window[0, 2, 3, 0, ::3] = math.inf
    v_window[0, 2, 5] = math.nan
    k_window[0, 2, 5] = math.nan
    strange, _ = run(inputs._replace(v_window=v_window, k_window=k_window), cut)
    others = [0, 1, 3, 4]
    assert torch.equal(strange[:, others], clean[:, others])
    assert strange[0, 2].isnan().any()


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_replays_with_other_lengths(cut: tuple[int, int, int]) -> None:
    inputs = make((1, 4, 64, 28, 4, 128, 1100), torch.bfloat16, [1100], [64] * 4)
    run(inputs, cut)
    graph, replayed = capture(lambda: run(inputs, cut))
    for cache_len, length in (
        (1024, [64] * 4),
        (0, [1, 2, 3, 4]),
        (1100, [64, 0, 64, 0]),
        (77, [0] * 4),
    ):
        inputs.cache_len.fill_(cache_len)
        inputs.length.copy_(torch.tensor([length], dtype=torch.int32))
        graph.replay()
        expected = run(inputs, cut)
        assert torch.equal(replayed[0], expected[0])
        assert torch.equal(replayed[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_error_is_at_most_twice_that_of_pytorch(head_dim: int, dtype: torch.dtype) -> None:
    inputs = make((1, 4, 64, 28, 4, head_dim, 1024), dtype, [1024], [64] * 4)
    expected, _ = reference.attend(*inputs, dtype=torch.float64)
    out, _ = run(inputs, (0, 0, 0))
    keys, values = (
        torch.cat([cache.expand(4, -1, -1, -1), window[0]], 1).transpose(1, 2)
        for cache, window in (
            (inputs.k_cache, inputs.k_window), (inputs.v_cache, inputs.v_window),
        )
    )  # fmt: skip
    theirs = scaled_dot_product_attention(
        inputs.q[0].transpose(1, 2), keys, values, enable_gqa=True
    ).transpose(1, 2)[None]
    errors = [(x.double() - expected).square().mean().sqrt() for x in (out, theirs)]
    assert errors[0] <= 2 * errors[1]


def test_scale_of_any_sign() -> None:
    inputs = make((1, 2, 40, 6, 2, 128, 300), torch.bfloat16, [290], [40, 3])
    for scale in (-0.3, 0.0, 0.7):
        check(inputs, (0, 0, 0), scale=scale)


def test_one_launch() -> None:
    inputs = make((1, 4, 32, 28, 4, 128, 4200), torch.bfloat16, [4111], [32] * 4)
    lk.branch_attention(*inputs)
    torch.cuda.synchronize()
    names = [event.name for event in device_events(lambda: lk.branch_attention(*inputs))]
    # Tests fill what torch.empty gives.
    (name,) = (name for name in names if "FillFunctor" not in name)
    assert "attention_sm90_kernel" in name


@pytest.mark.parametrize("why", ["dtype", "head_dim", "strides", "branches"])
def test_stands_back(why: str) -> None:
    """What it does not take is answered by Triton's kernel, through the same operator."""
    shape = {"head_dim": (1, 2, 20, 4, 2, 96, 100), "branches": (1, 33, 3, 4, 2, 64, 100)}
    inputs = make(
        shape.get(why, (1, 2, 20, 4, 2, 64, 100)),
        torch.float32 if why == "dtype" else torch.bfloat16,
        [90],
        [3] * 33 if why == "branches" else [20, 7],
    )
    if why == "strides":
        wide = torch.cat([inputs.k_cache, inputs.k_cache[..., :1]], -1)
        inputs = inputs._replace(k_cache=wide[..., :64])
    out = torch.full_like(inputs.q, 7.0)
    nothing = (None, None, "full", None, None, 2, 0, 0, 0)
    assert not torch.ops.lopa_cuda.branch_attention_out(*inputs, *nothing, out=out, lse=None)
    assert (out == 7).all()
    expected, _ = reference.attend(*inputs, dtype=torch.float64)
    got = lk.branch_attention(*inputs, backend="cuda")
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE.get(out.dtype, 4e-6))
