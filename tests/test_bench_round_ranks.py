"""The benchmark of rounds on several ranks: what it checks, counts and writes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_bench_round import multiplied
from test_distributed import run_ranks, values

import lopa_kernels as lk
from bench import round as bench_round
from bench import round_ranks
from bench.round_parts import Clock, Shape, products, steady_state
from examples.dream.model import DiffusionLM, random_weights
from lopa_kernels.distributed import BranchParallel

RANKS = 2
#: family, K, columns of a commit; a rank without a branch, and an uneven spread
CASES = (("small-dream", 1, None), ("small-dream", 3, None), ("small-llada", 4, 8))
SHAPE = Shape(branches=3, window=24, prefix=20, block=8)


def ranks_of(rank: int) -> round_ranks.Ranks:
    return round_ranks.Ranks(rank, RANKS, dist.new_group(backend="gloo"))


def weights(family: str) -> DiffusionLM:
    return random_weights(bench_round.MODELS[family](), dtype=torch.float32)


def known_medians(rank: int) -> Callable[..., dict[str, float]]:
    """By place in `pieces`: 100, 200, ... of rank 0, and more of rank 1 by its place."""

    def medians(clock: Clock, calls: dict[str, Any]) -> dict[str, float]:
        for call in calls.values():
            clock._burst(call, clock.replays)
        return {name: 100.0 * n + rank * n for n, name in enumerate(calls, 1)}

    return medians


def measured(rank: int) -> list[Any]:
    ranks = ranks_of(rank)
    results = []
    Clock.medians = known_medians(rank)  # type: ignore[method-assign]
    for family, branches, columns in CASES:
        model, shape = weights(family), Shape(branches, 24, 20, 8)
        step = None
        if rank == 0:
            _, step = bench_round.measure(family, model, shape, 1)
        alone = None if step is None else round_ranks.Alone(777.0, step)
        times = round_ranks.measure(family, model, shape, ranks, "collective", alone, columns)
        assert times is not None
        results.append((times.as_dict(), *sent_and_multiplied(model, shape, columns)))
    absent = round_ranks.measure(family, model, SHAPE, ranks, "symmetric", alone)
    return [results, absent]


def sent_and_multiplied(
    model: DiffusionLM, shape: Shape, columns: int | None
) -> tuple[int, list[Any], list[Any]]:
    """Of a round: bytes of what is gathered or summed, and sizes of its matrix products; of the
    products alone the same sizes."""
    with BranchParallel(shape.config(model.config), timeout=60.0, columns=columns) as parallel:
        runner = shape.runner(model, parallel)
        steady_state(runner, shape.prefix)
        of_round = multiplied(lambda: runner._decode_round(shape.window, 1))
        assert runner.head_rows is not None
        alone = multiplied(products(runner, runner.head_rows))
        moves = parallel._moves
        gathered = sum(buffers.gathered.nbytes for buffers in moves._buffers.values())
        summed = sum(words.nbytes for words in moves._words.values())
        return gathered + summed, of_round, alone


def test_measured_on_two_ranks(tmp_path: Path) -> None:
    first, second = values(run_ranks(measured, RANKS, tmp_path))
    assert first == second
    results, absent = first
    assert absent is None
    for (times, buffers, of_round, alone), places in zip(results, (1, 2, 2), strict=True):
        assert times["agrees"] is True
        assert times["payload"] == buffers
        assert alone == of_round
        assert times["head_rows"] == 17 * places
        assert times["one_device"] == 777.0
        # The largest of both ranks: round, products, model_pass, local, step, local_step.
        names = ("round", "products", "model_pass", "local", "step", "local_step")
        assert [times[name] for name in names] == [101.0 * n for n in range(1, 7)]
        assert times["exchange"] == pytest.approx(101.0 - 404.0)
        assert times["exchange_alone"] == pytest.approx(505.0 - 606.0)
        assert times["speedup"] == pytest.approx(777.0 / 101.0)
        assert times["ratio"] == pytest.approx(0.5)


def other_token(own: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """Rank 1 sees other tokens than rank 0."""

    def exchange(self: BranchParallel, *inputs: Any, **options: Any) -> lk.TokenConfidence:
        made = own(self, *inputs, **options)
        return made._replace(token=(made.token + rank) % 90)

    return exchange


def other_score_alone(own: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """The statistics that are already there are not those of the round."""

    def exchange(
        self: BranchParallel, *inputs: Any, direct: bool = False, **options: Any
    ) -> lk.TokenConfidence:
        made = own(self, *inputs, direct=direct, **options)
        return made._replace(prob=made.prob / 2, score=made.score / 2) if direct else made

    return exchange


def other_value(own: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """Rank 1 writes one value too many, beyond the committed columns."""

    def commit_(self: BranchParallel, k_cache: torch.Tensor, *inputs: Any, **options: Any) -> None:
        own(self, k_cache, *inputs, **options)
        k_cache[-1, 0, SHAPE.prefix + SHAPE.complete, 0, 0] = rank

    return commit_


def no_commit(own: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """No rank commits anything. The winner's sees it, and its end ends the other."""
    return lambda self, *inputs, **options: None


def idle(piece: str) -> Callable[..., Any]:
    """A piece that does nothing."""

    def fault(own: Callable[..., Any], rank: int) -> Callable[..., Any]:
        return lambda *inputs: {**own(*inputs), piece: lambda: None}

    return fault


DIFFER = r"ranks \[1\] have another state, step or K/V than rank 0 or its share"
FAULTS: tuple[tuple[Any, str, Callable[..., Any], str], ...] = (
    (BranchParallel, "exchange", other_token, DIFFER),
    (BranchParallel, "exchange", other_score_alone, "not equal"),
    (BranchParallel, "commit_", other_value, DIFFER),
    *(
        (round_ranks, "pieces", idle(piece), "not (equal|close)")
        for piece in ("round", "model_pass", "local", "step", "local_step")
    ),
    (BranchParallel, "commit_", no_commit, "not equal"),
)


def faulty(rank: int) -> list[str]:
    ranks = ranks_of(rank)
    model = weights("small-dream")
    messages = []
    for owner, name, fault, _ in FAULTS:
        own = getattr(owner, name)
        setattr(owner, name, fault(own, rank))
        try:
            round_ranks.measure("small-dream", model, SHAPE, ranks, "collective", None, replays=1)
            messages.append("nothing was seen")
        except (AssertionError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
        setattr(owner, name, own)
    return messages


def test_wrong_results_are_seen(tmp_path: Path) -> None:
    said = values(run_ranks(faulty, RANKS, tmp_path))
    for fault, by_rank in zip(FAULTS, zip(*said, strict=True), strict=True):
        assert "nothing was seen" not in by_rank, fault
        seen = [m for m in by_rank if re.match(f"AssertionError: .*{fault[3]}", m, re.DOTALL)]
        assert len(seen) == (1 if fault[2] is no_commit else RANKS), by_rank


def test_another_commit_than_on_one_device_is_seen() -> None:
    _, step = bench_round.measure("small-dream", weights("small-dream"), SHAPE, 1)
    assert round_ranks.check_alone(step, step)
    winner = step._replace(winner=step.winner + 1)
    assert not round_ranks.check_alone(winner, step)
    tokens = step._replace(state=step.state._replace(tokens=step.state.tokens + 1))
    assert not round_ranks.check_alone(tokens, step)
    for wrong in (
        step._replace(committed=step.committed + 1),
        step._replace(status=step.status + 1),
        step._replace(state=step.state._replace(cache_len=step.state.cache_len + 1)),
    ):
        with pytest.raises(AssertionError):
            round_ranks.check_alone(wrong, step)


def launched(device: str, *arguments: str, ranks: int = RANKS) -> subprocess.CompletedProcess[str]:
    """The program under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "bench.round", "--device", device]
    command += ["--model", "small-llada", "--block", "8", "--window", "24", "--prefix", "20"]
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], cwd=root, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def test_program_end_to_end(tmp_path: Path) -> None:
    written, drawn = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--branches", "3", "--replays", "2", "--transport", "collective", "symmetric"]
    arguments += ["--json", str(written), "--plot", str(drawn)]
    done = launched("cpu", *arguments)
    assert done.returncode == 0, done.stderr
    assert drawn.stat().st_size > 1000
    assert "- transport symmetric: not to be had on these devices" in done.stdout
    # One header of each table: rank 0 alone prints.
    assert done.stdout.count("| outside the model, us ") == 1
    assert done.stdout.count("| exchange + commit, us ") == 1
    report = json.loads(written.read_text())
    (alone,), (spread,) = report["rounds"], report["ranks"]
    assert (spread["transport"], spread["ranks"], spread["branches"]) == ("collective", RANKS, 3)
    assert spread["one_device"] == alone["round"]
    assert spread["agrees"] is True
    assert f"{spread['speedup']:.2f}x" in done.stdout
    assert f" {spread['exchange']:.0f} " in done.stdout
    assert f" {spread['payload']} " in done.stdout


def test_matrices_on_several_ranks(tmp_path: Path) -> None:
    written, drawn = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--branches", "3", "--replays", "1", "--tp", "2", "1"]
    arguments += ["--json", str(written), "--plot", str(drawn), "--model", "small-dream"]
    done = launched("cpu", *arguments, ranks=4)
    assert done.returncode == 0, done.stderr
    assert drawn.stat().st_size > 1000
    spread = json.loads(written.read_text())["ranks"]
    assert [(t["tp"], t["ranks"], t["head_rows"]) for t in spread] == [(2, 4, 34), (1, 4, 17)]
    assert all(t["agrees"] for t in spread)
    assert "| 2 x 2 " in done.stdout
    assert "| 1 x 4 " in done.stdout


def test_a_rank_that_fails_ends_all(tmp_path: Path) -> None:
    # Rank 0 cannot write there; rank 1 has nothing to do but to wait for it.
    nowhere = tmp_path / "no such folder" / "out.json"
    done = launched("cpu", "--branches", "1", "--replays", "1", "--json", str(nowhere))
    assert done.returncode != 0
    assert "FileNotFoundError" in done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_graphs_on_two_gpus(tmp_path: Path) -> None:
    written = tmp_path / "out.json"
    done = launched("cuda", "--branches", "1", "3", "--replays", "4", "--json", str(written))
    assert done.returncode == 0, done.stderr
    spread = json.loads(written.read_text())["ranks"]
    assert [(t["branches"], t["transport"]) for t in spread] == [
        (k, transport) for k in (1, 3) for transport in round_ranks.TRANSPORTS
    ]
    for t in spread:
        assert t["round"] > 0 < t["one_device"]
        assert 0 not in (t["products"], t["model_pass"], t["local"], t["step"], t["local_step"])
