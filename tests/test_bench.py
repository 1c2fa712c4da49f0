"""The benchmark program: what it refuses, what it writes. Never how fast anything is."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

pytest.importorskip("rich")
pytest.importorskip("tabulate")

from bench import all_cases, report, runner, select, step  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.case import Case  # noqa: E402

ROW_KEYS = {
    "provider",
    "ours",
    "check",
    "microseconds",
    "samples",
    "bytes_per_s",
    "flops_per_s",
    "roofline",
    "ratio_to_best_peer",
    "extra_memory_bytes",
}


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.allclose(result, expected), "sums differ"


def sum_case(op: str = "sum", name: str = "1000 float32", **fields: Any) -> Case:
    def make(buffers: int) -> list[tuple[torch.Tensor]]:
        return [(torch.arange(1000.0) + i,) for i in range(buffers)]

    made: dict[str, Any] = {
        "providers": {
            "lopa": torch.sum,
            "lopa, twice": lambda x: (torch.sum(x) + torch.sum(x)) / 2,
            "peer": lambda x: x.cumsum(0)[-1],
            "read": lambda x: x.amax(),
        },
        "reference": "peer",
        "check": close,
        "bytes": 4000,
        "flops": 1000,
        "unchecked": ("read",),
    }
    return Case(op=op, name=name, make=make, **{**made, **fields})


def wrong_case(op: str = "sum", **fields: Any) -> Case:
    return sum_case(
        op,
        "planted",
        providers={"lopa": lambda x: torch.sum(x) + 1e3, "peer": torch.sum},
        unchecked=(),
        **fields,
    )


def run(cases: list[Case], tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "out.json"
    status = main(["--quick", "--json", str(path), *arguments], cases)
    return status, json.loads(path.read_text())


def test_program_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "bench", "--quick", "--op", "branch_step", "--threads", "1"]
    command += ["--case", "B 1 K 8", "--json", str(path)]
    # The package is found wherever the tests run from.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "## branch_step" in done.stdout
    assert "- threads: 1" in done.stdout
    written = json.loads(path.read_text())
    assert written["schema"] == report.SCHEMA
    assert {"torch", "cpu", "cpu kernels", "threads", "device"} <= set(written["environment"])
    assert all(value > 0 for value in written["roofline"].values())
    (case,) = written["cases"]
    assert (case["op"], case["failed"], case["buffers"]) == ("branch_step", False, 8)
    assert [row["provider"] for row in case["measurements"]] == [
        "lopa",
        "lopa, out",
        "reference",
        "published loop",
    ]
    for row in case["measurements"]:
        assert set(row) == ROW_KEYS
        assert row["check"] in ("ok", "reference")
        assert row["microseconds"]["low"] <= row["microseconds"]["median"]
        assert row["microseconds"]["median"] <= row["microseconds"]["high"]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    # With a failed operator, and with nothing at all to draw.
    for cases in ([sum_case(), wrong_case("other")], [wrong_case()]):
        run(cases, tmp_path, "--plot", str(path))
        assert path.read_bytes().startswith(b"\x89PNG")
        path.unlink()


def test_figures_follow_from_the_median(tmp_path: Path) -> None:
    status, written = run([sum_case()], tmp_path)
    assert status == 0
    rows = {row["provider"]: row for row in written["cases"][0]["measurements"]}
    assert [row["ours"] for row in rows.values()] == [True, True, False, False]
    assert [row["check"] for row in rows.values()] == ["ok", "ok", "reference", "unchecked"]
    assert rows["read"]["ratio_to_best_peer"] is None
    seconds = {name: row["microseconds"]["median"] * 1e-6 for name, row in rows.items()}
    for name in ("lopa", "lopa, twice", "peer"):
        row = rows[name]
        # The unchecked read, however fast, is nobody's peer.
        assert math.isclose(row["ratio_to_best_peer"], seconds["peer"] / seconds[name])
        assert math.isclose(row["bytes_per_s"], 4000 / seconds[name])
        assert math.isclose(row["flops_per_s"], 1000 / seconds[name])
    roof = written["roofline"]
    least = max(4000 / roof["read_bytes_per_s"], 1000 / roof["flops_per_s"])
    assert math.isclose(rows["lopa"]["roofline"], least / seconds["lopa"])


def test_a_wrong_result_has_no_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [sum_case(), wrong_case(), sum_case(name="after"), sum_case("other")]
    status, written = run(cases, tmp_path)
    assert status == 1
    assert [case["failed"] for case in written["cases"]] == [False, True, False, False]
    for case in written["cases"]:
        told = case["op"] == "other"
        for row in case["measurements"]:
            for key in ("microseconds", "bytes_per_s", "flops_per_s", "roofline"):
                assert (row[key] is not None) == told
    planted = written["cases"][1]["measurements"]
    assert [row["check"].startswith("FAILED: AssertionError: sums") for row in planted] == [
        True,
        False,
    ]
    printed = capsys.readouterr().out
    # Three cases of the operator, four, two and four providers; and the planted one's verdict.
    assert printed.count("| FAILED") == 4 + 2 + 4 + 1
    assert printed.count("sums differ") == 1


def test_a_provider_that_raises_has_failed(tmp_path: Path) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    case = sum_case(providers={"lopa": torch.sum, "peer": torch.sum, "read": broken})
    status, written = run([case], tmp_path)
    assert status == 1
    assert written["cases"][0]["measurements"][2]["check"] == "FAILED: RuntimeError: no such kernel"


def test_providers_that_write_to_their_inputs_are_checked_on_copies() -> None:
    def add(x: torch.Tensor) -> torch.Tensor:
        return x.add_(1)

    def forget(x: torch.Tensor) -> torch.Tensor:
        return x

    case = sum_case(providers={"peer": add, "lopa": add, "lopa, idle": forget}, unchecked=())
    inputs = case.make(1)[0]
    verdicts = [m.check.partition(":")[0] for m in runner.check_providers(case, inputs)]
    assert verdicts == ["reference", "ok", "FAILED"]
    assert torch.equal(inputs[0], torch.arange(1000.0))


def test_inputs_rotate_and_exceed_the_cache() -> None:
    settings = runner.Settings(cache_bytes=100_000)
    assert len(runner.rotation(sum_case(), settings)) == 26
    assert len(runner.rotation(sum_case(buffers=3), settings)) == 3
    inputs = [(index,) for index in range(5)]
    seen: list[int] = []
    samples = runner.time_providers({"one": seen.append}, inputs, runner.QUICK)
    assert seen == [index % 5 for index in range(len(seen))]
    assert len(seen) >= runner.QUICK.least
    assert runner.QUICK.least <= len(samples["one"]) <= runner.QUICK.most


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_extra_memory_sees_what_a_call_takes_and_returns() -> None:
    size = 64 << 20
    taken = runner.extra_memory(lambda: torch.ones(size // 4).sum())
    assert taken is not None
    assert 0.9 * size < taken < 1.3 * size
    idle = runner.extra_memory(lambda: None)
    assert idle is not None
    assert idle < size // 16


def test_select() -> None:
    cases = [sum_case("kv_commit_"), sum_case("token_confidence"), sum_case("sum", "tiny")]
    assert select(cases, ["confidence"]) == [cases[1]]
    assert select(cases, ["kv", "sum"], "tiny") == [cases[2]]
    assert select(cases) == cases
    with pytest.raises(ValueError, match="'nothing'.*kv_commit_, token_confidence, sum"):
        select(cases, ["nothing"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nothing"], "no case has op"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments, [sum_case()])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_every_case_names_its_reference_and_is_told_apart() -> None:
    cases = all_cases()
    assert len({(case.op, case.name) for case in cases}) == len(cases)
    for case in cases:
        assert case.reference in case.providers
        assert set(case.unchecked) < set(case.providers)
        assert "lopa" in case.providers
        assert case.bytes > 0


@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 3, 64), (1, 5, 96)])
def test_the_restated_loop_agrees_with_the_operator(shape: tuple[int, int, int]) -> None:
    case = step.branch_step_case(step.Shape(*shape), "cpu")
    for inputs in case.make(5):
        verdicts = [m.check for m in runner.check_providers(case, inputs)]
        assert verdicts == ["ok", "ok", "reference", "ok"]
        result = case.providers["lopa"](*inputs)
        assert (result.filled > 0).all()
        assert result.status.count_nonzero() == 0
        shifted = result._replace(filled=result.filled + 1)
        with pytest.raises(AssertionError):
            case.check(shifted, case.providers["published loop"](*inputs))


def test_lopa_step_case_with_a_small_vocabulary() -> None:
    config = step.make_config(16)
    make = step.make_logits(step.Shape(2, 3, 48), config, 500, torch.float32, "cpu", 2)
    for inputs in make:
        expected = step.eager_and_loop(*inputs)
        for ours in (step.one_call(*inputs), step.two_calls(*inputs)):
            step.check(ours, expected)
            assert ours.status.count_nonzero() == 0
