"""branch_attention's AscendC kernel in the emulator, against a float64 computation."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from ascend import ascend  # noqa: F401
from torch.nn.functional import scaled_dot_product_attention

from ascend_ops.emulator.branch_attention import Result, branch_attention
from lopa_kernels.ops.branch_attention import reference

pytestmark = pytest.mark.usefixtures("ascend")

HALF, BFLOAT = torch.float16, torch.bfloat16
# A few units in the last place of a value near one, as in test_branch_attention.py.
TOLERANCE = {BFLOAT: 1.6e-2, HALF: 2e-3}


class Case(NamedTuple):
    """Sizes; what is None is drawn."""

    branches: int
    window: int
    query_heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    batch: int = 1
    cache_len: list[int] | None = None
    length: list[list[int]] | None = None
    block_size: int | None = None
    prompt_len: list[int] | None = None
    dtype: torch.dtype = BFLOAT
    cores: int = 3


CASES = {
    "one": Case(1, 1, 1, 1, 16, 1, cache_len=[0], length=[[1]]),
    "gqa_28_4": Case(3, 7, 28, 4, 128, 140, batch=2, dtype=HALF),
    "heads_32_32": Case(2, 20, 32, 32, 64, 40, cores=7),
    "no_prefix": Case(3, 5, 4, 2, 64, 64, batch=2, cache_len=[0, 0]),
    "full_cache": Case(2, 5, 4, 2, 64, 256, cache_len=[256]),
    "a_key_over": Case(2, 5, 4, 2, 64, 300, cache_len=[257]),
    "nothing_live": Case(2, 5, 4, 2, 64, 64, batch=2, length=[[0, 0], [0, 3]]),
    "anchor_alone": Case(4, 9, 14, 2, 64, 100, length=[[9, 0, 0, 0]]),
    "ragged": Case(9, 5, 6, 2, 48, 70, length=[[5, 0, 1, 4, 0, 2, 3, 5, 1]]),
    "many_short_branches": Case(40, 2, 2, 1, 32, 30, dtype=HALF),
    "one_branch_of_many_rows": Case(2, 45, 7, 1, 32, 40, dtype=HALF),
    "long_window": Case(1, 300, 2, 1, 64, 60, dtype=HALF),
    "large_group": Case(2, 2, 96, 1, 32, 40),
    "split_prefix": Case(2, 3, 4, 2, 64, 1500, cache_len=[1400]),
    "split_prefixes_of_all_lengths": Case(2, 3, 4, 1, 16, 2600, 4, cache_len=[0, 2600, 129, 1]),
    "causal": Case(2, 40, 7, 1, 128, 130, block_size=8, prompt_len=[100], cache_len=[122]),
    "causal_prefill": Case(
        1, 70, 4, 2, 64, 80, block_size=16, prompt_len=[50], cache_len=[0], length=[[66]]
    ),
    "causal_inside_a_block": Case(
        2, 12, 4, 2, 64, 80, block_size=5, prompt_len=[30], cache_len=[43], length=[[12, 7]]
    ),
    "causal_one_block": Case(
        2, 5, 4, 2, 64, 80, block_size=2**31 - 1, prompt_len=[70], cache_len=[68], dtype=HALF
    ),
    "causal_long": Case(
        1, 290, 2, 1, 32, 40, block_size=32, prompt_len=[150], cache_len=[20], dtype=HALF
    ),
    "causal_split": Case(2, 9, 2, 1, 64, 1100, block_size=4, prompt_len=[1000], cache_len=[1001]),
}


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make(case: Case, seed: int = 0) -> dict[str, Any]:
    """Arguments; every value that nobody may see is NaN."""
    generator = torch.Generator().manual_seed(seed)
    b, k, w = case.batch, case.branches, case.window

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(case.dtype)

    def lengths(given: Any, most: int, *sizes: int) -> torch.Tensor:
        if given is not None:
            return int32(given)
        return torch.randint(0, most + 1, sizes, generator=generator, dtype=torch.int32)

    inputs: dict[str, Any] = {
        "q": draw(b, k, w, case.query_heads, case.head_dim),
        "k_cache": draw(b, case.capacity, case.kv_heads, case.head_dim),
        "v_cache": draw(b, case.capacity, case.kv_heads, case.head_dim),
        "k_window": draw(b, k, w, case.kv_heads, case.head_dim),
        "v_window": draw(b, k, w, case.kv_heads, case.head_dim),
        "cache_len": lengths(case.cache_len, case.capacity, b),
        "length": lengths(case.length, w, b, k),
    }
    stale = torch.arange(case.capacity) >= inputs["cache_len"][:, None]
    dead = torch.arange(w) >= inputs["length"][..., None]
    for name in ("k_cache", "v_cache"):
        inputs[name][stale] = math.nan
    for name in ("q", "k_window", "v_window"):
        inputs[name][dead] = math.nan
    if case.block_size is not None:
        inputs["mask"] = "block_causal"
        inputs["block_size"] = case.block_size
        inputs["prompt_len"] = int32(case.prompt_len)
    return inputs


def expected_of(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    options = {n: v for n, v in inputs.items() if n not in ("scale", "cores", "cache_layout")}
    return reference.attend(**options, scale=inputs.get("scale"), dtype=torch.float64)


def check(result: Result, inputs: dict[str, Any], scale: float = 1.0) -> None:
    out, lse = expected_of(inputs)
    tolerance = TOLERANCE[result.out.dtype] * scale
    torch.testing.assert_close(result.out.double(), out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.lse.double(), lse, rtol=2e-6, atol=2e-6)
    dead = torch.arange(out.shape[2]) >= inputs["length"][..., None]
    assert (result.out[dead] == 0).all()


@pytest.mark.parametrize("name", CASES)
def test_reference(name: str) -> None:
    inputs = make(CASES[name])
    check(branch_attention(**inputs, cores=CASES[name].cores), inputs)


@pytest.mark.parametrize("scale", [0.5, -0.3])
def test_scale(scale: float) -> None:
    inputs = {**make(CASES["ragged"]), "scale": scale}
    check(branch_attention(**inputs), inputs)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(28, 4), (32, 32)])
def test_error_is_at_most_twice_that_of_pytorch(
    query_heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    prefix, window, branches = 200, 9, 2
    case = Case(
        branches,
        window,
        query_heads,
        kv_heads,
        128,
        prefix,
        cache_len=[prefix],
        length=[[window] * branches],
        dtype=dtype,
    )
    inputs = make(case)
    prefixes = (inputs[n].expand(branches, -1, -1, -1) for n in ("k_cache", "v_cache"))
    windows = (inputs[n][0] for n in ("k_window", "v_window"))
    k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(prefixes, windows, strict=True))
    sdpa = scaled_dot_product_attention(inputs["q"][0].transpose(1, 2), k, v, enable_gqa=True)
    expected, _ = expected_of(inputs)
    error = branch_attention(**inputs).out.double() - expected
    peer = sdpa.transpose(1, 2).double() - expected[0]
    assert error.square().mean().sqrt() <= 2 * peer.square().mean().sqrt()
    unit = torch.finfo(dtype).eps * expected.abs().max()
    assert error.abs().max() <= 2 * peer.abs().max() + unit


@pytest.mark.parametrize("name", ["gqa_28_4", "split_prefixes_of_all_lengths", "causal_split"])
def test_results_do_not_depend_on_cores(name: str) -> None:
    inputs = make(CASES[name])
    first = branch_attention(**inputs, cores=1)
    assert (first.tiling["splits"] > 1) == name.count("split")
    for cores in (1, 2, 7, 20):
        other = branch_attention(**inputs, cores=cores)
        assert other.tiling["cores"] == min(cores, other.tiling["jobs"])
        assert other.out.equal(first.out)
        assert other.lse.equal(first.lse)


@pytest.mark.parametrize("name", ["ragged", "gqa_28_4", "causal_inside_a_block"])
def test_branches_are_isolated(name: str) -> None:
    """NaN and infinities in all that is live of one branch leave the others bit for bit."""
    inputs = make(CASES[name])
    clean = branch_attention(**inputs)
    victim = int(inputs["length"][0].argmax())
    poisoned = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    for tensor in ("q", "k_window", "v_window"):
        poisoned[tensor][:, victim] = math.nan
    poisoned["v_window"][:, victim, :, :, ::2] = math.inf
    result = branch_attention(**poisoned)
    others = [k for k in range(CASES[name].branches) if k != victim]
    assert result.out[:, others].equal(clean.out[:, others])
    assert result.lse[:, others].equal(clean.lse[:, others])
    assert result.out[0, victim, : inputs["length"][0, victim]].isnan().all()


@pytest.mark.parametrize("name", ["gqa_28_4", "split_prefix", "causal"])
def test_heads_first_caches(name: str) -> None:
    inputs = make(CASES[name])
    expected = branch_attention(**inputs)
    for cache in ("k_cache", "v_cache"):
        inputs[cache] = inputs[cache].transpose(1, 2).contiguous()
    result = branch_attention(**inputs, cache_layout="BNSD")
    assert result.out.equal(expected.out)
    assert result.lse.equal(expected.lse)


def scattered(inputs: dict[str, Any], page: int, spare: int = 2) -> dict[str, Any]:
    """The prefix in pages in any order; entries that no position needs are no pages."""
    batch, capacity = inputs["k_cache"].shape[:2]
    pages = -(-capacity // page)
    order = torch.randperm(batch * pages + spare, generator=torch.Generator().manual_seed(1))
    table = order[: batch * pages].view(batch, pages)
    paged = dict(inputs)
    for name in ("k_cache", "v_cache"):
        cache = inputs[name]
        pool = torch.full((len(order), page, *cache.shape[2:]), math.nan, dtype=cache.dtype)
        for at in range(0, capacity, page):
            part = cache[:, at : at + page]
            pool[table[:, at // page], : part.shape[1]] = part
        paged[name] = pool
    needed = page * torch.arange(pages) < inputs["cache_len"][:, None]
    paged["block_table"] = torch.where(needed, table, -7).to(torch.int32)
    return paged


@pytest.mark.parametrize("page", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("name", ["gqa_28_4", "split_prefix"])
def test_paged_prefix(name: str, page: int) -> None:
    inputs = make(CASES[name])
    expected = branch_attention(**inputs)
    paged = scattered(inputs, page)
    result = branch_attention(**paged)
    if result.tiling["splits"] == expected.tiling["splits"]:
        assert result.out.equal(expected.out)
        assert result.lse.equal(expected.lse)
    check(result, inputs)
    for pool in ("k_cache", "v_cache"):
        paged[pool] = paged[pool].transpose(1, 2).contiguous()
    assert branch_attention(**paged, cache_layout="BNSD").out.equal(result.out)


def test_keys_of_a_page_that_is_none_are_not_seen() -> None:
    inputs = make(Case(2, 5, 4, 2, 64, 96, cache_len=[90]))
    paged = scattered(inputs, 32)
    paged["block_table"][0, 1] = len(paged["k_cache"])
    result = branch_attention(**paged)
    for name in ("k_cache", "v_cache"):
        inputs[name] = torch.cat([inputs[name][:, :32], inputs[name][:, 64:]], 1)
    inputs["cache_len"] = int32([58])
    check(result, inputs)


def test_lengths_out_of_range_are_cut() -> None:
    case = Case(2, 5, 4, 2, 64, 40, batch=2, cache_len=[40, 0], length=[[5, 0], [5, 5]])
    inputs = make(case)
    expected = branch_attention(**inputs)
    inputs["cache_len"] = int32([1000, -3])
    inputs["length"] = int32([[2**30, -1], [6, 5]])
    result = branch_attention(**inputs)
    assert result.out.equal(expected.out)
    assert result.lse.equal(expected.lse)


def test_large_scores() -> None:
    """Scores beyond what exp takes: the maximum is subtracted first, in every step."""
    inputs = make(CASES["a_key_over"])
    inputs["scale"] = 30.0
    check(branch_attention(**inputs), inputs, scale=2)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"head_dim": 24}, "head_dim must be a multiple of 16 up to 128"),
        ({"head_dim": 144}, "head_dim must be a multiple of 16 up to 128"),
        ({"query_heads": 3}, "multiple of the number of KV heads"),
        ({"query_heads": 514}, "at most 256 query heads"),
        ({"window": 0}, "must be positive"),
        ({"query_heads": 1024, "kv_heads": 512, "head_dim": 128}, "at most 65535"),
        ({"block_causal": True}, "needs a positive block_size"),
        ({"table_pages": 2, "pages": 3, "capacity": 48}, "16, 32, 64, 128 or 256"),
    ],
)
def test_unsupported_shapes(ascend: ModuleType, sizes: dict[str, Any], reason: str) -> None:  # noqa: F811
    shape = {
        "batch": 1,
        "branches": 2,
        "window": 4,
        "query_heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "capacity": 64,
        "scale": 1.0,
        "cores": 20,
    }
    ascend.branch_attention_tiling(**shape)
    with pytest.raises(ValueError, match=reason):
        ascend.branch_attention_tiling(**{**shape, **sizes})


def test_a_tile_reads_the_prefix_once() -> None:
    """For all its branches and query heads: keys and values come from global memory once a tile."""
    case = Case(4, 4, 8, 1, 64, 512, cache_len=[512], length=[[4] * 4])
    result = branch_attention(**make(case))
    assert result.tiling["tiles_per_head"] == 1
    rows, keys, dim = 4 * 4 * 8, 512 + 4 * 4, 64
    queries = rows * dim * 2
    steps = 4 * (rows * 128) + 4 * (32 * 16)  # elements of S: four of the prefix, one a window
    cube = sum(core["gm_to_local"] for core in result.report["cores"] if core["cube"])
    assert cube == queries * result.tiling["splits"] + keys * dim * 2 * 2 + steps * 2
    macs = (rows * 512 + 4 * 32 * 16) * dim * 2
    assert result.report["cube_macs"] == macs
