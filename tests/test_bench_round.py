"""The benchmark of whole rounds: what it runs, what it writes. Never how fast anything is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import lopa_kernels as lk
from bench import round as bench_round
from bench import round_parts, timeline
from examples.dream.model import random_weights
from examples.dream.round import Runner

SMALL = ["--device", "cpu", "--block", "8", "--replays", "2", "--prefix", "20"]


def test_program_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, drawn = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--model", "small-dream", "--branches", "1", "3", "--window", "8", "24"]
    arguments += ["--tpf", "2.5", "--json", str(written), "--plot", str(drawn)]
    assert bench_round.main([*SMALL, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "tokens/s at 2.5 a pass (projected)" in printed
    assert drawn.stat().st_size > 1000
    report = json.loads(written.read_text())
    assert report["schema"] == bench_round.SCHEMA
    assert report["environment"]["device"] == "cpu"
    assert "skipped on a CPU: graphs" in printed
    assert report["ranks"] == []
    rounds = report["rounds"]
    assert [(r["branches"], r["window"]) for r in rounds] == [(1, 8), (1, 24), (3, 8), (3, 24)]
    for r in rounds:
        assert set(r["parts"]) == {*round_parts.PARTS, *round_parts.OUTSIDE, "rest"}
        assert r["round"] > 0 < r["products"]
        total = r["products"] + sum(r["parts"].values())
        assert total == pytest.approx(r["round"])
        assert r["outside"] == pytest.approx(sum(r["parts"][p] for p in round_parts.OUTSIDE))
        assert f" {r['outside']:.0f} " in printed
        assert f"{r['ratio']:.2f}x" in printed
        projected = r["projected_tokens_per_s"]
        assert projected == {"2.5": pytest.approx(2.5e6 / r["round"])}


SHAPE = round_parts.Shape(branches=3, window=24, prefix=20, block=8)


def steady(family: str) -> tuple[Runner, lk.LopaState]:
    model = random_weights(bench_round.MODELS[family](), dtype=torch.float32)
    runner = SHAPE.runner(model)
    return runner, round_parts.steady_state(runner, SHAPE.prefix)


def whole(runner: Runner) -> None:
    runner._decode_round(SHAPE.window, 1)


@pytest.mark.parametrize("family", ["small-dream", "small-llada"])
def test_every_replay_does_the_same_round(family: str) -> None:
    runner, state = steady(family)
    before = [tensor.clone() for tensor in state]
    step = round_parts.check(runner, SHAPE.prefix, lambda: whole(runner))
    round_parts.check_equal(state, before)
    assert step.state.cache_len.tolist() == [SHAPE.prefix + 8]  # a block was committed
    assert int((step.committed >= 0).sum()) == 8
    assert runner.cache.k[:, :, SHAPE.prefix : SHAPE.prefix + 8].any(-1).all()


def test_a_replay_that_does_nothing_is_seen() -> None:
    runner, _ = steady("small-dream")
    with pytest.raises(AssertionError):
        round_parts.check(runner, SHAPE.prefix, lambda: None)


def test_a_commit_of_something_else_is_seen() -> None:
    runner, _ = steady("small-dream")
    step = round_parts.check(runner, SHAPE.prefix, lambda: whole(runner))
    runner.cache.v[-1, 0, SHAPE.prefix + 7] += 1
    with pytest.raises(AssertionError):
        round_parts.check_commit(runner, SHAPE.prefix, step)


def test_the_models_pass_is_that_of_the_round() -> None:
    runner, state = steady("small-dream")
    whole(runner)
    logits, compute = [], runner.model.logits
    call = round_parts.model_pass(runner, state, SHAPE.head_rows(3))
    round_parts.check_model_pass(runner, call)
    runner.model.logits = lambda *inputs: logits.append(compute(*inputs)) or logits[-1]  # type: ignore[method-assign]
    whole(runner)
    assert call().equal(logits[0])
    assert logits[0].shape == (3 * 17, runner.model.config.vocab_size)
    with pytest.raises(AssertionError):
        round_parts.check_model_pass(runner, lambda: None)


def test_a_marked_round_is_the_round() -> None:
    runner, state = steady("small-dream")
    places: list[str] = []
    call = round_parts.marked_round(runner, state, SHAPE.head_rows(3), places.append)
    round_parts.check(runner, SHAPE.prefix, call)
    assert places == ["start", "rows", "logits", "step", "end"]


def test_outside_is_read_from_the_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, (runner, state) = round_parts.Clock(torch.device("cpu"), 1), steady("small-dream")
    times = {"start": 1.0, "rows": 1.25, "logits": 4.0, "step": 4.5, "end": 4.625}

    def marked(*inputs: Any) -> Callable[[], None]:
        def call() -> None:
            for place, now in times.items():
                monkeypatch.setattr(round_parts.time, "perf_counter", lambda now=now: now)
                inputs[-1](place)

        return call

    def burst(call: Callable[[], object], replays: int) -> list[float]:
        call()
        return [4.0]

    monkeypatch.setattr(round_parts, "marked_round", marked)
    monkeypatch.setattr(clock, "_burst", burst)
    expected = {"step": 0.75e6, "commit": 0.125e6, "idle": 0.375e6}
    assert clock.outside(lambda: None, runner, state, SHAPE.head_rows(3)) == expected


def a_round(at: float) -> list[timeline.Kernel]:
    """Kernels as a GPU runs them, each launched while the one before it still runs."""
    return [
        timeline.Kernel("lopa::step::rows_kernel(lopa::step::RowsArgs)", at, at + 4),
        timeline.Kernel("nvjet_product", at + 3, at + 900),
        timeline.Kernel("lopa::attention::attention_sm90_kernel", at + 899, at + 950),
        timeline.Kernel("nvjet_product", at + 951, at + 1000),
        timeline.Kernel("lopa::step::rows_kernel(lopa::step::RowsArgs)", at + 1000, at + 1005),
        timeline.Kernel("void lopa::confidence::vocabulary_pass_kernel<T>", at + 1001, at + 1020),
        timeline.Kernel("void lopa::step::finish_kernel<Merge>", at + 1006, at + 1030),
        timeline.Kernel("void lopa::kv_cache::kv_commit_kernel<Copy>", at + 1021, at + 1033),
    ]


def test_outside_is_read_from_the_record_of_kernels() -> None:
    # The last round's end is not known.
    kernels = [kernel for at in (0.0, 1035.0, 2070.0) for kernel in a_round(at)]
    assert timeline.outside(kernels) == {"step": 34.0, "commit": 3.0, "idle": 2.0}


@pytest.mark.parametrize("missing", ["rows_kernel", "kv_commit", "step|confidence"])
def test_a_record_without_rounds_is_an_error(missing: str) -> None:
    kernels = [kernel for at in (0.0, 1035.0) for kernel in a_round(at)]
    with pytest.raises(RuntimeError, match="no round's step and commit"):
        timeline.outside([kernel for kernel in kernels if not re.search(missing, kernel.name)])


def multiplied(call: Callable[[], object]) -> list[tuple[torch.Size, torch.Size]]:
    """Sizes of the matrix products that `call` computes, in their order."""
    sizes, linear = [], functional.linear

    def record(rows: torch.Tensor, weights: torch.Tensor, *bias: Any) -> torch.Tensor:
        sizes.append((rows.shape, weights.shape))
        return linear(rows, weights, *bias)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(functional, "linear", record)
        call()
    return sizes


def test_the_products_are_those_of_the_round() -> None:
    runner, _ = steady("small-dream")
    expected = multiplied(lambda: whole(runner))
    assert len(expected) == 4 * 3 + 1
    assert multiplied(round_parts.products(runner, SHAPE.head_rows(3))) == expected


def test_bursts_alternate() -> None:
    order: list[str] = []
    clock = round_parts.Clock(torch.device("cpu"), 4, meet=lambda: order.append("meet"))
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    medians = clock.medians(calls)
    # An untimed call and four timed ones a burst.
    assert order == round_parts.TURNS * ["meet", *"aaaaa", "meet", *"bbbbb"]
    assert set(medians) == {"a", "b"}


def test_medians_are_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = round_parts.Clock(torch.device("cpu"), 3)
    bursts = iter([[1e-3, 2e-3, 9e-3], [4e-3, 3e-3, 2e-3]])
    monkeypatch.setattr(round_parts, "TURNS", 2)
    monkeypatch.setattr(clock, "_burst", lambda call, replays: next(bursts))
    assert clock.medians({"x": lambda: None}) == {"x": pytest.approx(2500.0)}


class Gpu:
    """A device that may wait for the host, or capture nothing."""

    def __init__(self, capturable: bool, graph: Callable[[], None] | None) -> None:
        self.graph, self.answer = graph, capturable

    def capturable(self, call: Callable[[], object]) -> bool:
        return self.answer

    def capture(self, call: Callable[[], object]) -> Callable[[], None] | None:
        return self.graph

    def burst(self, call: Callable[[], object], repeats: int) -> list[float]:
        return [1e-6 if call is self.graph else 1.0] * repeats


def test_a_graph_is_timed_or_nothing() -> None:
    clock = round_parts.Clock(torch.device("cpu"), 3)
    clock.gpu = Gpu(False, lambda: None)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="waits for the host"):
        clock.ready(lambda: None)
    clock.gpu = Gpu(True, None)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="was not captured"):
        clock.ready(lambda: None)
    clock.gpu = Gpu(True, lambda: None)  # type: ignore[assignment]
    assert clock.medians({"x": clock.ready(lambda: None)}) == {"x": pytest.approx(1.0)}


def test_projection() -> None:
    parts = {"norms": 900.0, "step": 40.0, "commit": 10.0, "idle": 5.0, "rest": 45.0}
    times = bench_round.RoundTimes("m", 4, 64, 1024, 128, 5000.0, 4000.0, parts)
    assert times.tokens_per_s(10.0) == pytest.approx(2000.0)
    assert times.ratio == pytest.approx(1.25)
    assert times.outside == pytest.approx(55.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "12"], "--window: expected multiples of 8"),
        (["--branches", "0"], "--branches: expected at least 1"),
        (["--replays", "0"], "--replays: expected at least 1"),
        (["--tp", "2"], "--tp: expected divisors of the 1 ranks"),
        (["--columns", "7"], "--columns: expected at least the block, 8"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_round.main([*SMALL, "--model", "small-dream", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["small-dream", "small-llada"])
def test_graphs(family: str, tmp_path: Path) -> None:
    written = tmp_path / "out.json"
    arguments = ["--device", "cuda", "--model", family, "--block", "8", "--window", "24"]
    arguments += ["--prefix", "20", "--branches", "3", "--replays", "4", "--json", str(written)]
    assert bench_round.main(arguments) == 0
    (measured,) = json.loads(written.read_text())["rounds"]
    assert 0 not in (measured["round"], measured["products"])
    assert set(measured["parts"]) == {*round_parts.PARTS, *round_parts.OUTSIDE, "rest"}
    assert all(measured["parts"][part] > 0 for part in round_parts.OUTSIDE)
