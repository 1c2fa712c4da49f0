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
from bench_cases import ROOT, run, sum_case, verdicts_of, wrong_case

from bench import all_cases, confidence, kv_cache, peers, report, runner, select, step
from bench.__main__ import main

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
    "timing",
}


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


def test_an_interrupted_run_tells_of_the_complete_cases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    cases = [sum_case(), sum_case(providers={"lopa": torch.sum, "peer": interrupt}), sum_case()]
    status, written = run(cases, tmp_path)
    assert status == 0
    assert [case["name"] for case in written["cases"]] == [cases[0].name]
    assert "interrupted after 1 of 3 cases" in capsys.readouterr().err


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


def test_copies_keep_what_is_one_tensor() -> None:
    """A state in its own buffers for results is updated in place in a copy, too."""

    def check(x: torch.Tensor, y: tuple[torch.Tensor, ...]) -> torch.Tensor:
        assert x is y[0]
        return x.add_(1)

    tensor = torch.zeros(3)
    case = sum_case(providers={"lopa": check, "peer": check}, unchecked=())
    assert not any(m.failed for m in runner.check_providers(case, (tensor, (tensor,))))
    assert not tensor.any()


def test_results_are_held_to_the_oracle_and_to_a_provider_s_own_check() -> None:
    def within_a_hundred(result: torch.Tensor, expected: torch.Tensor) -> None:
        assert (result - expected).abs() <= 100

    case = sum_case(
        providers={
            "lopa": torch.sum,
            "peer": lambda x: x.sum() + 100,
            "wrong": lambda x: x.sum() + 100,
        },
        reference=None,
        oracle=torch.sum,
        checks={"peer": within_a_hundred},
        unchecked=(),
    )
    verdicts = [m.check.partition(":")[0] for m in runner.check_providers(case, case.make(1)[0])]
    assert verdicts == ["ok", "ok", "FAILED"]


def test_a_peer_that_is_missing_or_wrong_costs_nobody_else_the_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(x: torch.Tensor) -> torch.Tensor:
        raise ImportError("no module | of that name\nand more")

    providers = {"lopa": torch.sum, "peer": torch.sum, "library": missing}
    case = sum_case(providers=providers, unchecked=(), optional=("library",))
    status, written = run([case], tmp_path)
    assert status == 0
    rows = {row["provider"]: row for row in written["cases"][0]["measurements"]}
    assert rows["lopa"]["ratio_to_best_peer"] > 0
    assert rows["library"]["microseconds"] is None
    assert rows["library"]["check"] == "absent: ImportError: no module / of that name and more"
    assert "FAILED" not in capsys.readouterr().out

    providers["library"] = torch.mean
    case = sum_case(providers=providers, unchecked=(), optional=("library",))
    status, written = run([case], tmp_path)
    assert status == 1
    rows = {row["provider"]: row for row in written["cases"][0]["measurements"]}
    assert rows["lopa"]["ratio_to_best_peer"] > 0
    assert rows["library"]["microseconds"] is None
    assert rows["library"]["check"] == "wrong: AssertionError: sums differ"


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
        (["--device", "cuda"], "--device cuda: PyTorch finds no CUDA device"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_:
        main(arguments, [sum_case()])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_names_its_reference_and_is_told_apart(device: str) -> None:
    """A GPU's cases are made where there is none: their tensors come later."""
    cases = all_cases(device)
    assert len({(case.op, case.name) for case in cases}) == len(cases)
    for case in cases:
        assert case.device == device
        assert case.oracle is not None or case.reference in case.providers
        for named in (case.unchecked, case.optional, case.eager, case.checks):
            assert set(named) < set(case.providers)
        assert "lopa" in case.providers
        assert case.bytes > 0 or case.host


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


class Sampler:
    """FlashInfer's functions in PyTorch, by their documentation."""

    @staticmethod
    def softmax(logits: torch.Tensor) -> torch.Tensor:
        return logits.float().softmax(-1)

    @staticmethod
    def sampling_from_probs(
        probs: torch.Tensor, *, seed: torch.Tensor, offset: torch.Tensor
    ) -> torch.Tensor:
        assert seed.shape == offset.shape == (1,)
        return torch.multinomial(probs, 1)[:, 0].int()

    @staticmethod
    def sampling_from_logits(logits: torch.Tensor, **key: torch.Tensor) -> torch.Tensor:
        return Sampler.sampling_from_probs(Sampler.softmax(logits), **key)

    @staticmethod
    def top_k_top_p_sampling_from_logits(
        logits: torch.Tensor,
        top_k: int,
        top_p: float,
        *,
        filter_apply_order: str,
        **key: torch.Tensor,
    ) -> torch.Tensor:
        assert logits.dtype == torch.float32
        if filter_apply_order == "top_k_first":
            least = logits.topk(top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        left = confidence.filtered(logits, 1.0, top_k, top_p)
        return Sampler.sampling_from_logits(left, **key)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 9, "top_p": 0.9}]
)
@pytest.mark.parametrize("metric", ["neg_entropy", "margin"])
def test_a_gpu_s_peers_do_the_same_job(
    options: dict[str, Any], metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "has_flashinfer", lambda: True)
    monkeypatch.setattr(peers, "_sampling", lambda: Sampler)
    monkeypatch.setattr(peers, "compiled", lambda function: function)
    torch.manual_seed(0)
    case = confidence.case(32, 2048, torch.bfloat16, metric, gpu_peers=True, **options)
    verdicts = verdicts_of(case)
    assert set(verdicts.values()) <= {"ok", "reference", "unchecked"}
    assert any("FlashInfer" in name for name in verdicts) == (metric != "margin" or bool(options))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda token, prob, score: (token * 0, None, None), "deviations|filters take out"),
        (lambda token, prob, score: (token - 5000, prob, score), "outside the vocabulary"),
        (lambda token, prob, score: (token, prob * 1.01, score), "not close"),
        (lambda token, prob, score: (token, prob, score - 0.01), "not close"),
    ],
)
@pytest.mark.parametrize("filters", [{}, {"top_k": 50, "top_p": 0.9}])
def test_wrong_draws_are_seen(wrong: Any, message: str, filters: dict[str, Any]) -> None:
    case = confidence.case(64, 4000, torch.float32, "neg_entropy", temperature=1.0, **filters)
    inputs = case.make(1)[0]
    assert case.oracle is not None
    expected = case.oracle(*inputs)
    result = case.providers["lopa"](*inputs)
    case.checks["lopa"](result, expected)
    with pytest.raises(AssertionError, match=message):
        case.checks["lopa"](wrong(*result), expected)
    most_likely = expected[0].argmax(-1)
    with pytest.raises(AssertionError, match="miss the distribution"):
        case.checks["lopa"]((most_likely, None, None), expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_peers_of_the_cache_s_gpu_cases(batch: int) -> None:
    shape = kv_cache.Shape(2, 4, 16, 8, 20, 4, 2, 8, S=64, B=batch)
    case = kv_cache.commit_case("small", shape, torch.bfloat16, "cpu")
    assert set(verdicts_of(case).values()) == {"ok", "reference"}
    inputs = case.make(1)[0]
    kv_cache.copy_kernel(shape, *inputs)
    moved = 2 * 2 * batch * 8 * 2 * 8
    assert torch.equal(inputs[0].flatten()[:moved], -inputs[2].flatten()[:moved])
    assert case.bytes == 2 * moved * 2
    case = kv_cache.prewrite_case("small", shape, torch.bfloat16, "cpu")
    assert set(verdicts_of(case).values()) == {"ok", "reference"}
    inputs = case.make(1)[0]
    result, expected = (case.providers[name](*inputs) for name in ("lopa", "eager"))
    kv_cache.check_rotated(result, expected)
    with pytest.raises(AssertionError):
        kv_cache.check_rotated((result[0] * 1.1, *result[1:]), expected)
    for dtype in (torch.bfloat16, torch.float32):
        case = kv_cache.prewrite_case("small", shape, dtype, "cpu", normed=True)
        assert set(verdicts_of(case).values()) == {"ok", "reference"}
        inputs = case.make(1)[0]
        q, *windows = case.providers["eager"](*inputs)
        for wrong in (q * 1.1, case.providers["eager"](*inputs[:-2])[0]):
            with pytest.raises(AssertionError):
                kv_cache.check_normed((wrong, *windows), (q, *windows))


def test_the_host_s_case_and_the_oracles_on_the_cpu() -> None:
    assert set(verdicts_of(step.host_case("cpu")).values()) == {"ok"}
    case = step.branch_step_case(step.Shape(2, 3, 64), "cpu")
    inputs = case.make(1)[0]
    result, expected = step.functional(*inputs), step.reference_on_cpu(*inputs)
    step.check_closely(result, expected)
    with pytest.raises(AssertionError):
        step.check_closely(result._replace(confidence=result.confidence + 1e-3), expected)
