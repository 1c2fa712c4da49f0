"""The GPU cases of branch_attention's benchmark, on a CPU; and what the report makes of a sweep."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from bench_cases import sum_case, verdicts_of
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench import all_cases, attention_peers, branch_attention, peers, report, runner
from bench.attention_peers import BLOCK, PAGE, Shape
from bench.runner import Measurement, Result

#: prefixes and windows that fill no page and no block, one block, several; no prefix; a batch
SHAPES = (
    Shape(1, 3, 20, 37, 6, 2, 16),
    Shape(2, 4, 16, 128, 4, 4, 16),
    Shape(1, 2, 160, 300, 4, 1, 16),
    Shape(2, 3, 17, 0, 4, 2, 16),
    Shape(1, 1, 9, 16, 2, 1, 16),
)


class FlashInfer:
    """Its wrapper in PyTorch, by its documentation: pages in NHD order, base-2 lse."""

    planned: ClassVar[list[Any]] = []

    class BatchPrefillWithPagedKVCacheWrapper:
        def __init__(self, workspace: torch.Tensor, layout: str, *, backend: str) -> None:
            assert workspace.dtype == torch.uint8
            assert layout == "NHD"
            assert backend in ("fa2", "fa3")

        def plan(self, *args: Any, causal: bool, **dtypes: torch.dtype) -> None:
            self.level = args[:4]
            assert all(tensor.dtype == torch.int32 for tensor in self.level)
            self.heads, self.page = args[4:7], args[7]
            assert not causal
            self.dtypes = dtypes
            FlashInfer.planned.append(self)

        def run(
            self,
            q: torch.Tensor,
            pools: tuple[torch.Tensor, torch.Tensor],
            *,
            out: torch.Tensor,
            return_lse: bool,
        ) -> Any:
            assert set(self.dtypes.values()) == {q.dtype}
            assert self.heads == (q.shape[1], pools[0].shape[2], q.shape[2])
            rows, pages, order, last = (tensor.tolist() for tensor in self.level)
            assert rows[-1] == len(q)
            lse = q.new_zeros(q.shape[:2], dtype=torch.float32)
            for i, tail in enumerate(last):
                taken = order[pages[i] : pages[i + 1]]
                keys = (len(taken) - 1) * self.page + tail
                k, v = (
                    pool[taken]
                    .flatten(0, 1)[:keys]
                    .float()
                    .repeat_interleave(q.shape[1] // pool.shape[2], dim=1)
                    for pool in pools
                )
                part = slice(rows[i], rows[i + 1])
                scores = torch.einsum("qhd,khd->qhk", q[part].float(), k) * q.shape[2] ** -0.5
                out[part] = torch.einsum("qhk,khd->qhd", scores.softmax(-1), v).to(q.dtype)
                lse[part] = scores.logsumexp(-1) * torch.tensor(2.0).log().reciprocal()
            return (out, lse) if return_lse else out

    @staticmethod
    def merge_state_in_place(
        out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
    ) -> None:
        weights = torch.stack([lse, other_lse]).exp2()
        weights = (weights / weights.sum(0))[..., None]
        out.copy_(weights[0] * out + weights[1] * other)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(peers, "has_flashinfer", lambda: True)
    monkeypatch.setattr(peers, "has_triton", lambda op: False)
    monkeypatch.setattr(attention_peers, "_flashinfer", lambda: FlashInfer)
    monkeypatch.setattr(attention_peers, "WORKSPACE", 1024)
    monkeypatch.setattr(attention_peers, "compiled_flex", lambda: flex_attention)
    monkeypatch.setattr(attention_peers, "only", lambda backend: contextlib.nullcontext())
    attention_peers.planned.cache_clear()
    FlashInfer.planned.clear()
    yield FlashInfer
    attention_peers.planned.cache_clear()


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_provider_of_a_gpu_case_does_the_same_job(shape: Shape, dtype: torch.dtype) -> None:
    case = branch_attention.gpu_case(shape, dtype, "cpu", page=16)
    verdicts = verdicts_of(case)
    assert list(verdicts) == [
        "lopa",
        "lopa, paged 16",
        "FlexAttention",
        "cuDNN SDPA, prefix copied before",
        "cuDNN SDPA with the copy",
        "FlashAttention-2 SDPA, prefix copied before",
        "FlashInfer cascade, fa2",
        "FlashInfer cascade, fa3",
    ]
    assert set(verdicts.values()) == {"ok"}
    assert len(FlashInfer.planned) == 2 * (1 if shape.P == 0 else 2)


def test_another_branch_s_keys_are_seen_by_the_check_behind_a_long_prefix() -> None:
    shape = Shape(1, 4, 64, 4096, 2, 1, 64)
    inputs = branch_attention.operands(
        shape, torch.bfloat16, "cpu", torch.Generator().manual_seed(0)
    )
    expected = branch_attention.oracle(shape, *inputs)
    right = branch_attention.lopa(*inputs)
    branch_attention.check(torch.bfloat16, right, expected)
    q, k_cache, v_cache, k_window, v_window, *lengths = inputs
    v_window = v_window.roll(1, dims=1)
    wrong = branch_attention.lopa(q, k_cache, v_cache, k_window, v_window, *lengths)
    with pytest.raises(AssertionError):
        branch_attention.check(torch.bfloat16, wrong, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pools_hold_the_prefixes_and_the_windows(shape: Shape) -> None:
    inputs = branch_attention.operands(
        shape, torch.float32, "cpu", torch.Generator().manual_seed(0)
    )
    cache, window = inputs[1], inputs[3]
    pool = attention_peers.pooled(cache, window, shape.P)
    assert pool.shape[1:] == (PAGE, shape.Hk, shape.D)

    def requests(level: attention_peers.Level) -> list[torch.Tensor]:
        found = []
        for i, tail in enumerate(level.last_page_len.tolist()):
            taken = level.pages[level.page_indptr[i] : level.page_indptr[i + 1]]
            found.append(pool[taken].flatten(0, 1)[: (len(taken) - 1) * PAGE + tail])
        return found

    *above, windows = attention_peers.levels(shape)
    assert torch.equal(torch.stack(requests(windows)), window.flatten(0, 1))
    assert len(above) == (shape.P > 0)
    for level in above:
        assert torch.equal(torch.stack(requests(level)), cache[:, : shape.P])
    every_page = torch.cat([level.pages for level in (*above, windows)])
    assert torch.equal(every_page, torch.arange(len(pool), dtype=torch.int32))


@pytest.mark.parametrize(
    "shape",
    [
        *SHAPES,
        Shape(1, 8, 64, 256),
        Shape(1, 2, 128, 128),
        Shape(1, 3, 256, 200),
        Shape(1, 2, 256, 0),
        Shape(1, 1, 96, 100),
        Shape(1, 11, 96, 64),
    ],
    ids=str,
)
def test_the_block_mask_has_the_blocks_of_the_whole_mask(shape: Shape) -> None:
    mask = attention_peers.block_mask_of(shape, "cpu")
    rows = shape.K * shape.W
    keys = shape.P + rows
    assert mask.seq_lengths == (rows, keys)
    whole = create_block_mask(mask.mask_mod, None, None, rows, keys, device="cpu")

    def blocks(count: Any, order: Any) -> list[set[int]]:
        pairs = zip(count[0, 0].tolist(), order[0, 0].tolist(), strict=True)
        return [set(row[:number]) for number, row in pairs]

    partial = blocks(mask.kv_num_blocks, mask.kv_indices)
    full = blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    expected_partial = blocks(whole.kv_num_blocks, whole.kv_indices)
    expected_full = blocks(whole.full_kv_num_blocks, whole.full_kv_indices)
    assert len(partial) == len(expected_partial) == -(-rows // BLOCK)
    for index, (a, b) in enumerate(zip(partial, full, strict=True)):
        assert not a & b
        assert a | b == expected_partial[index] | expected_full[index]
        assert b >= expected_full[index]
        if (index + 1) * BLOCK <= rows:
            assert b == expected_full[index]
    row = torch.arange(rows)[:, None]
    key = torch.arange(keys)[None]
    zero = torch.zeros((), dtype=torch.int64)
    seen = mask.mask_mod(zero, zero, row, key)
    for index, b in enumerate(full):
        for block in b:
            part = seen[index * BLOCK : (index + 1) * BLOCK, block * BLOCK : (block + 1) * BLOCK]
            assert part.all()
            assert part.shape[1] == BLOCK


def test_the_design_of_the_sweep() -> None:
    cases = [case for case in all_cases("cuda") if case.op == "branch_attention"]
    swept = [case for case in cases if report._is_swept(case)]
    goals = [case for case in cases if "goal" in case.name.split(", ")]
    assert (len(cases), len(swept), len(goals)) == (46, 42, 8)
    assert goals == cases[:8]
    assert cases[0].name == "B1 K4 W64 P1024 Hq28 Hk4 D128 bfloat16, goal, sweep"
    for heads in branch_attention.HEADS:
        sizes = [report.sizes_of(case.name) for case in swept]
        mine = [size for size in sizes if (size["Hq"], size["Hk"]) == heads]
        assert len(mine) == 21
        for letter, values in (
            ("K", {1, 2, 4, 8, 16}),
            ("W", {16, 32, 64, 128, 256}),
            ("P", {0, 256, 1024, 4096, 32768}),
        ):
            assert {size[letter] for size in mine} == values
    for case in cases:
        size = report.sizes_of(case.name)
        rows, keys = size["K"] * size["W"], size["P"] + size["W"]
        assert case.flops == 4 * rows * keys * size["Hq"] * 128
        assert ("lopa, paged 64" in case.providers) == (case in goals)


def result_of(name: str, ours: float, peer: float, **fields: Any) -> Result:
    providers = {"lopa": torch.sum, "lopa, triton": torch.sum, "peer": torch.sum}
    case = sum_case(
        "branch_attention", name, providers=providers, unchecked=(), device="cuda", **fields
    )
    rows = [Measurement(provider, "ok") for provider in providers]
    # Our other backend is faster than the peer, and no peer.
    for row, microseconds in zip(rows, (ours, peer / 100, peer), strict=True):
        row.record([microseconds * 1e-6] * 3)
    return Result(case, 2, rows)


def name_of(k: int, w: int, p: int, tag: str, heads: str = "Hq28 Hk4") -> str:
    return f"B1 K{k} W{w} P{p} {heads} D128 bfloat16{tag}"


def test_a_summary_of_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [
        result_of(name_of(8, 64, 1024, ", goal, sweep"), 10, 40),
        result_of(name_of(1, 64, 1024, ", sweep"), 10, 5),
        result_of(name_of(8, 64, 0, ", sweep"), 10, 20),
        result_of(name_of(4, 32, 8192, ", goal"), 10, 8),
    ]
    every, sweep, ahead = report.summaries(results)
    assert (every.subset, every.cases, every.op) == ("all", 4, "branch_attention")
    assert every.geometric_mean == pytest.approx((4 * 0.5 * 2 * 0.8) ** 0.25)
    assert every.lowest == pytest.approx(0.5)
    assert every.below_one == [results[1].case.name, results[3].case.name]
    assert (sweep.subset, sweep.cases) == ("sweep", 3)
    assert sweep.geometric_mean == pytest.approx(4 ** (1 / 3))
    assert (ahead.subset, ahead.cases) == ("K >= 2 and P >= 256", 2)
    assert ahead.below_one == [ahead.lowest_case] == [results[3].case.name]
    roofline = runner.Roofline(1e12, 1e15)
    monkeypatch.setattr(report, "_cuda_rate", lambda *_: ["", ""])
    text = report.markdown(results, roofline, {})
    assert (
        "- K >= 2 and P >= 256, 2 cases: 1.79x the best peer in the geometric mean, at least "
        f"0.80x ({results[3].case.name}); slower than it in 1: {results[3].case.name}" in text
    )
    written = report.as_dict(results, roofline, {})["summaries"]
    assert [summary["subset"] for summary in written] == ["all", "sweep", "K >= 2 and P >= 256"]
    assert written[1]["below_one"] == [results[1].case.name]
    assert "slower than it in none" in report.summaries(results[:1] + results[2:3])[0].line()
    # Nothing is said of one case, nor of an operator that was wrong in any.
    assert report.summaries(results[:1]) == []
    results[1].measurements[0].check = "FAILED: AssertionError"
    assert report.summaries(results) == []


def test_a_sweep_is_drawn_by_its_prefixes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = []
    for heads in ("Hq28 Hk4", "Hq32 Hk32"):
        for k, w, p in ((8, 64, 1024), (8, 64, 0), (2, 16, 256), (2, 16, 32768)):
            results.append(result_of(name_of(k, w, p, ", sweep", heads), 10, 10 + k + w))
    results.append(result_of(name_of(11, 96, 1024, ", goal"), 10, 20))
    assert report._sweeps(results) == {
        f"branch_attention, {heads} heads": {
            (8, 64): {1024: pytest.approx(8.2), 0: pytest.approx(8.2)},
            (2, 16): {256: pytest.approx(2.8), 32768: pytest.approx(2.8)},
        }
        for heads in ("28/4", "32/32")
    }
    assert report._sweeps(results[-1:]) == {}
    report.plot(tmp_path / "out.png", results)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
