"""The benchmark program on a GPU: what is captured, what is timed, what is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import run, sum_case, wrong_case
from targets import needs_gpu

from bench import cuda_runner, report, runner
from bench.case import Case


class FakeDevice:
    """Takes a millisecond for every call of a provider, and notes what it is asked."""

    def __init__(self, capturable: bool = True, captured: bool = True) -> None:
        self.is_capturable, self.captured = capturable, captured
        self.calls: list[Any] = []  # of providers, by their argument
        self.graphs: list[list[Any]] = []
        self.bursts: list[Any] = []

    def provider(self, name: str) -> Any:
        return lambda argument: self.calls.append((name, argument))

    def capturable(self, call: Any) -> bool:
        call()
        return self.is_capturable

    def capture(self, call: Any) -> Any:
        if not self.captured:
            return None
        before = len(self.calls)
        call()
        held = self.calls[before:]
        self.graphs.append(held)
        return lambda: self.calls.extend(held)

    def burst(self, call: Any, repeats: int) -> list[float]:
        taken = []
        for _ in range(repeats):
            before = len(self.calls)
            call()
            taken.append((len(self.calls) - before) * 1e-3)
        self.bursts.append(call)
        return taken

    def enqueue(self, call: Any, repeats: int) -> list[float]:
        return [seconds / 10 for seconds in self.burst(call, repeats)]


def test_a_graph_holds_whole_passes_as_long_as_a_sample() -> None:
    inputs = [(index,) for index in range(4)]
    for sample, passes in ((1e-3, 1), (9e-3, 3), (1e3, cuda_runner.MOST_CALLS // 4)):
        device = FakeDevice()
        settings = runner.Settings(sample=sample)
        ready = cuda_runner.prepare(device.provider("p"), inputs, device, settings)
        assert (ready.timing, ready.calls) == ("graph", 4 * passes)
        assert device.graphs[-1] == [("p", index) for index in range(4)] * passes
        assert len(device.graphs) == (1 if passes == 1 else 2)


@pytest.mark.parametrize(
    ("device", "timing"),
    [
        (FakeDevice(), "eager"),
        (FakeDevice(capturable=False), "graph"),
        (FakeDevice(captured=False), "graph"),
    ],
    ids=["declared", "waits", "refused"],
)
def test_what_a_graph_cannot_hold_is_called_eagerly(device: FakeDevice, timing: str) -> None:
    inputs = [(index,) for index in range(4)]
    settings = runner.Settings(sample=6e-3)
    ready = cuda_runner.prepare(device.provider("p"), inputs, device, settings, timing)
    assert (ready.timing, ready.calls) == ("eager", 6)
    assert device.graphs == []
    device.calls.clear()
    ready.call()
    ready.call()
    assert [argument for _, argument in device.calls] == [index % 4 for index in range(12)]


def test_providers_take_turns_on_a_gpu_too() -> None:
    device = FakeDevice()
    inputs = [(index,) for index in range(2)]
    settings = runner.Settings(budget=0.0, sample=1e-3, least=7, most=100)
    runs = {
        name: cuda_runner.prepare(device.provider(name), inputs, device, settings, timing)
        for name, timing in (("a", "graph"), ("b", "eager"), ("c", "host"))
    }
    device.bursts.clear()
    samples = cuda_runner.time_runs(runs, device, settings)
    # Seven samples are three bursts.
    assert device.bursts == [runs[name].call for name in "abc"] * 3
    for name, seconds in (("a", 1e-3), ("b", 1e-3), ("c", 1e-4)):
        assert samples[name] == pytest.approx([seconds] * 9)


def gpu_report(*cases: Case) -> tuple[list[runner.Result], cuda_runner.CudaRoofline]:
    results = []
    for case in cases:
        rows = [
            runner.Measurement(name, "unchecked" if name in case.unchecked else "ok")
            for name in case.providers
        ]
        for index, row in enumerate(rows):
            row.record([(index + 1) * 1e-6] * 3)
            row.timing = cuda_runner.timing_of(case, row.provider)
        results.append(runner.Result(case, 2, rows))
    return results, cuda_runner.CudaRoofline(3e12, 1e15, 4e12, 1e-6)


def test_what_is_told_of_a_gpu() -> None:
    busy = sum_case("matmul", bytes=4, flops=500_000_000, device="cuda", eager=("peer",))
    moving = sum_case(bytes=2_000_000, device="cuda")
    host = sum_case("host", bytes=0, flops=0, host=True, device="cuda")
    results, roofline = gpu_report(busy, moving, host)
    again = cuda_runner.CudaRoofline(2e12, 2e15, 1e12, 2e-6)
    assert roofline.best_of(again) == cuda_runner.CudaRoofline(3e12, 2e15, 4e12, 1e-6)
    text = report.markdown(results, roofline, {"gpu": "none"})
    assert "- gpu: none\n- copy bandwidth (read and written): 4000 GB/s" in text
    assert "- smallest kernel in a graph: 1.00 us" in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    by_op = {row[0]: row for row in cells if len(row) == 10 and row[1] == "lopa"}
    assert len(by_op) == 1  # all have one name
    ours = [row[2:] for row in cells if len(row) == 10 and row[1] == "lopa"]
    # The third provider, at 3 us, is the best peer.
    assert ours[0] == ["1", "1 .. 1", "500 TFLOP/s", "50.0%", "3x", "", "graph", "ok"]
    assert ours[1] == ["1", "1 .. 1", "2000 GB/s", "50.0%", "3x", "", "graph", "ok"]
    assert ours[2] == ["1", "1 .. 1", "", "", "3x", "", "host", "ok"]
    written = report.as_dict(results, roofline, {})
    assert written["roofline"]["copy_bytes_per_s"] == 4e12
    rows = [case["measurements"] for case in written["cases"]]
    assert [row["timing"] for row in rows[0]] == ["graph", "graph", "eager", "graph"]
    assert rows[1][0]["roofline"] == pytest.approx(0.5)
    assert rows[2][0]["microseconds"]["median"] == pytest.approx(1.0)
    assert rows[2][0]["roofline"] is None


def test_plot_against_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = [f"{rows} x 10 float32, prob" for rows in (4, 1, 16)]
    results, _ = gpu_report(*(sum_case(name=name) for name in names))
    (label, points), *others = report._series(results).items()
    assert (label, [rows for rows, _ in points]) == ("sum: 10 float32, prob", [1, 4, 16])
    assert not others
    assert report._series(results[:2]) == {}
    report.plot(tmp_path / "out.png", results)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def any_algorithm() -> None:
    """The ceilings multiply matrices, which the other tests' deterministic mode refuses."""
    torch.use_deterministic_algorithms(False)


@needs_gpu
@pytest.mark.usefixtures("any_algorithm")
def test_program_on_a_gpu(tmp_path: Path) -> None:
    def waits(x: torch.Tensor) -> torch.Tensor:
        return torch.full((), x.sum().item(), device="cuda")

    providers = {
        "lopa": torch.sum,
        "peer": lambda x: x.cumsum(0)[-1],
        "waits": waits,
        "declared": torch.sum,
        "drawn": lambda x: x.sum() + 0 * torch.rand((), device="cuda"),
    }
    cases = [
        sum_case(providers=providers, unchecked=(), device="cuda", eager=("declared",)),
        wrong_case("other", device="cuda"),
        sum_case("host", device="cuda", host=True),
    ]
    status, written = run(cases, tmp_path, "--device", "cuda")
    assert status == 1
    assert [case["failed"] for case in written["cases"]] == [False, True, False]
    rows = {row["provider"]: row for row in written["cases"][0]["measurements"]}
    timings = {name: row["timing"] for name, row in rows.items()}
    assert timings == {
        "lopa": "graph",
        "peer": "graph",
        "waits": "eager",
        "declared": "eager",
        "drawn": "graph",
    }
    assert all(row["microseconds"]["median"] > 0 for row in rows.values())
    assert all(row["timing"] == "host" for row in written["cases"][2]["measurements"])
    assert {"gpu", "cuda", "triton", "flashinfer", "backend cuda"} <= set(written["environment"])
    assert all(value > 0 for value in written["roofline"].values())


@needs_gpu
@pytest.mark.usefixtures("any_algorithm")
def test_a_broken_capture_leaves_the_gpu_usable() -> None:
    device = cuda_runner.CudaDevice()
    x = torch.zeros(8, device="cuda")
    outside = torch.cuda.current_stream()

    def breaks() -> None:
        x.normal_()
        torch.cuda.synchronize()

    with pytest.warns(UserWarning, match="not captured"):
        assert device.capture(breaks) is None
    assert torch.cuda.current_stream() == outside
    replay = device.capture(lambda: x.add_(1))
    assert replay is not None
    x.normal_()
    expected = x + 4
    assert len(device.burst(replay, 3)) == 3
    torch.testing.assert_close(x, expected)


@needs_gpu
@pytest.mark.usefixtures("any_algorithm")
def test_a_gpu_s_errors_are_told_in_the_result() -> None:
    def make(buffers: int) -> list[tuple[Any, ...]]:
        raise torch.OutOfMemoryError("too large")

    case = sum_case(device="cuda")
    case = Case(**{**vars(case), "make": make})
    result = cuda_runner.run_case(case, cuda_runner.settings(quick=True))
    assert result.failed
    assert result.measurements[0].check == "FAILED: OutOfMemoryError: too large"
