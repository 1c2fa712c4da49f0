"""The benchmark of whole rounds: what it runs, what it writes. Never how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lopa_kernels as lk
from bench import round as bench_round
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
    rounds = report["rounds"]
    assert [(r["branches"], r["window"]) for r in rounds] == [(1, 8), (1, 24), (3, 8), (3, 24)]
    for r in rounds:
        assert set(r["parts"]) == {*bench_round.PARTS, "rest"}
        assert r["round"] > 0 < r["products"]
        total = r["products"] + sum(r["parts"].values())
        assert total == pytest.approx(r["round"])
        assert r["outside"] == pytest.approx(sum(r["parts"][p] for p in bench_round.OUTSIDE))
        assert f"{r['ratio']:.2f}x" in printed
        projected = r["projected_tokens_per_s"]
        assert projected == {"2.5": pytest.approx(2.5e6 / r["round"])}


PREFIX, WINDOW = 20, 24


def steady(family: str) -> tuple[Runner, lk.LopaState]:
    model = random_weights(bench_round.MODELS[family](), dtype=torch.float32)
    config = model.config.decoding(max_new_tokens=64, block_size=8, branches=3, window=WINDOW)
    runner = Runner(model, config, capacity=100, windows=[WINDOW], head_rows=3 * 17)
    return runner, bench_round.steady_state(runner, PREFIX)


@pytest.mark.parametrize("family", ["small-dream", "small-llada"])
def test_every_replay_does_the_same_round(family: str) -> None:
    runner, state = steady(family)
    before = [tensor.clone() for tensor in state]
    bench_round.check(runner, PREFIX)
    bench_round.check_equal(state, before)
    out = runner._slots[1].step
    assert out.state.cache_len.tolist() == [PREFIX + 8]  # a block was committed
    assert int((out.committed >= 0).sum()) == 8
    assert runner.cache.k[:, :, PREFIX : PREFIX + 8].any(-1).all()


def test_a_replay_that_does_nothing_is_seen() -> None:
    runner, _ = steady("small-dream")
    expected = bench_round.outcome(runner, PREFIX, lambda: runner._decode_round(WINDOW, 1))
    with pytest.raises(AssertionError):
        bench_round.check_equal(bench_round.outcome(runner, PREFIX, lambda: None), expected)


def test_projection() -> None:
    times = bench_round.RoundTimes("m", 4, 64, 1024, 128, 5000.0, 4000.0, {})
    assert times.tokens_per_s(10.0) == pytest.approx(2000.0)
    assert times.ratio == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "12"], "--window: expected multiples of 8"),
        (["--branches", "0"], "--branches: expected at least 1"),
        (["--replays", "0"], "--replays: expected at least 1"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_round.main([*SMALL, "--model", "small-dream", *arguments])
    assert message in capsys.readouterr().err
