"""branch_attention in Triton: shares of the keys and their merge, tiles, lengths out of range."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import moved, run_on
from gpu import capture
from targets import KERNELS, Target, over
from test_branch_attention import TOLERANCE, Inputs, int32, make, poison

import lopa_kernels as lk
from lopa_kernels import _dispatch
from lopa_kernels.ops.branch_attention import reference
from lopa_kernels.ops.branch_attention import triton_plan as plans

TRITON = [
    target
    for target in KERNELS
    if target.backend == "triton" and _dispatch.why_absent("triton", "branch_attention") is None
]

#: a prefix of several tiles of keys, whole tiles alone, one key, none
PREFIXES = (300, 256, 1, 0)


def ragged(dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Four sequences with the prefixes of PREFIXES; three branches, which share tiles of rows."""
    inputs = make((4, 3, 9, 4, 2, 32, 300), dtype, seed)
    length = int32([[9, 4, 0], [0, 0, 0], [1, 9, 9], [3, 0, 5]])
    return inputs._replace(cache_len=int32(PREFIXES), length=length)


def causal(inputs: Inputs) -> dict[str, Any]:
    prompt_len = (inputs.cache_len - 2).clamp(min=0)
    prompt_len[-1] = 4
    return {"mask": "block_causal", "block_size": 4, "prompt_len": prompt_len}


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that has every call split its keys into so many shares of at least so many."""

    def split(count: int, least: int = 1) -> None:
        monkeypatch.setattr(plans, "splits_of", lambda *sizes: count)
        monkeypatch.setattr(plans, "MIN_SHARE", least)
        plans.make_plan.cache_clear()

    yield split
    monkeypatch.undo()
    plans.make_plan.cache_clear()


@over(TRITON)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("count", "least"), [(2, 1), (3, 4), (7, 1), (32, 1)])
@pytest.mark.parametrize("mask", ["full", "block_causal"])
def test_shares(
    mask: str, count: int, least: int, dtype: torch.dtype, target: Target, shares: Any
) -> None:
    if target.interpreted and dtype != torch.float32 and count > 3:
        pytest.skip("too long for Triton's interpreter")
    inputs = ragged(dtype)
    options = causal(inputs) if mask == "block_causal" else {}
    expected, expected_lse = reference.attend(*inputs, **options, dtype=torch.float64)
    shares(count, least)
    for value in (math.nan, math.inf):
        out, lse = run_on(
            target, lk.branch_attention, *poison(inputs, value), **options, return_lse=True
        )
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])
        torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-6)
    dead = torch.arange(9) >= inputs.length[..., None]
    assert (out[dead] == 0).all()
    again = run_on(target, lk.branch_attention, *poison(inputs, value), **options)
    assert torch.equal(again, out)


@over(TRITON)
@pytest.mark.parametrize("page", [16, 128])
def test_shares_of_a_paged_prefix(page: int, target: Target, shares: Any) -> None:
    inputs = ragged(torch.float32)
    width = -(-300 // page)
    table = torch.randperm(4 * width, generator=torch.Generator().manual_seed(1)).view(4, width)
    pools = []
    for cache in (inputs.k_cache, inputs.v_cache):
        pool = torch.full((4 * width, page, 2, 32), math.nan)
        padded = torch.nn.functional.pad(cache, (0, 0, 0, 0, 0, width * page - 300))
        pool[table] = padded.unflatten(1, (width, page))
        pools.append(pool)
    needed = page * torch.arange(width) < inputs.cache_len[:, None]
    table = torch.where(needed, table, -7).int()
    paged = inputs._replace(k_cache=pools[0], v_cache=pools[1])
    expected, expected_lse = reference.attend(*inputs, dtype=torch.float64)
    shares(3)
    out, lse = run_on(target, lk.branch_attention, *paged, block_table=table, return_lse=True)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[torch.float32])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-6)


@over(TRITON)
def test_shares_keep_nan_and_infinity_in_their_rows(target: Target, shares: Any) -> None:
    shares(4)
    inputs = make((1, 3, 8, 2, 1, 16, 200), torch.float32)
    inputs.length.fill_(8)
    clean = run_on(target, lk.branch_attention, *inputs)
    inputs.q[0, 1, 3, 1] = math.nan
    inputs.v_window[0, 2, 5] = math.nan
    out, lse = run_on(target, lk.branch_attention, *inputs, return_lse=True)
    assert out[0, 1, 3, 1].isnan().all()
    assert lse[0, 1, 1, 3].isnan()
    assert lse.isnan().sum() == 1
    assert out[0, 2].isnan().all()
    assert out.isnan().sum() == 16 + out[0, 2].numel()
    assert torch.equal(out[~out.isnan()], clean[~out.isnan()])
    inputs = make((1, 2, 8, 2, 1, 16, 200), torch.float32)
    inputs.length.fill_(8)
    inputs.v_cache[0, 130, 0, 2] = math.inf
    out = run_on(target, lk.branch_attention, *inputs)
    assert (out[..., 2] == math.inf).all()
    assert out.isinf().sum() == out[..., 2].numel()


@over(TRITON)
def test_lengths_out_of_range_are_cut(target: Target) -> None:
    """The host does not read them: the kernel takes the nearest that the memory allows."""
    inputs = ragged(torch.float32)
    cache_len, length = inputs.cache_len.clone(), inputs.length.clone()
    cache_len[0], cache_len[3] = 2**31 - 1, -5
    length[0, 0], length[1] = 1000, -3
    out, lse = run_on(
        target, lk.branch_attention, *inputs._replace(cache_len=cache_len, length=length),
        return_lse=True,
    )  # fmt: skip
    expected = run_on(target, lk.branch_attention, *inputs, return_lse=True)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_number_of_shares() -> None:
    """As many as fill the device, and no more than pay."""
    many = {"multiprocessors": 132, "resident": 2}
    assert plans.splits_of(programs=264, key_tiles=100, split_bytes=1 << 24, **many) == 1
    few = plans.splits_of(programs=4, key_tiles=128, split_bytes=1 << 18, **many)
    assert 8 <= few <= plans.MAX_SPLITS
    assert -(-128 // few) >= plans.MIN_SHARE
    assert plans.splits_of(programs=4, key_tiles=3, split_bytes=1 << 18, **many) == 1
    assert plans.splits_of(programs=4, key_tiles=128, split_bytes=1 << 30, **many) == 1


@pytest.mark.parametrize("head_dim", [1, 16, 37, 64, 80, 128, 200, 256])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 100, 5000])
def test_tiles_hold_their_rows(rows: int, element_size: int, head_dim: int) -> None:
    cpu = torch.device("cpu")
    plan = plans.make_plan(cpu, element_size, 3, rows, head_dim, 777, 5, 1, -(-rows // 5))
    for size in (plan.tile.rows, plan.tile.keys, plan.block_d):
        assert size >= 16
        assert size & (size - 1) == 0
    assert plan.block_d >= head_dim
    assert plan.tiles * plan.tile.rows >= rows > (plan.tiles - 1) * plan.tile.rows
    assert 1 <= plan.splits <= plans.MAX_SPLITS


@over([target for target in TRITON if target.gpu])
@pytest.mark.parametrize("count", [1, 5])
def test_replays_with_other_lengths(count: int, target: Target, shares: Any) -> None:
    shares(count)
    inputs = moved(ragged(torch.bfloat16), target.device)
    options = moved(causal(inputs), target.device)

    def call() -> Any:
        return lk.branch_attention(*inputs, **options, return_lse=True, backend=target.backend)

    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph, result = capture(call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        inputs.cache_len.copy_(torch.randint(0, 301, (4,), generator=generator))
        inputs.length.copy_(torch.randint(0, 10, (4, 3), generator=generator))
        graph.replay()
        for replayed, eager in zip(result, call(), strict=True):
            assert torch.equal(replayed, eager)
