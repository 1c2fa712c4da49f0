"""pytest-benchmark entries, one a case and provider: ``pytest bench --benchmark-enable``.

Of every device that is present. On a GPU a round is one replay of a graph, or some eager calls,
and the wait for it; `extra_info` has the number of calls in it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import all_cases, cuda_runner, runner
from bench.case import Case
from bench.runner import Measurement, check_providers, rotation

CASES = [*all_cases("cpu"), *(all_cases("cuda") if torch.cuda.is_available() else ())]


@functools.lru_cache(maxsize=1)
def prepared(index: int) -> tuple[list[tuple[Any, ...]], dict[str, Measurement]]:
    """A case's rotating inputs, and what its check says of each provider."""
    case = CASES[index]
    inputs = rotation(case, _timing(case).settings(quick=False))
    return inputs, {m.provider: m for m in check_providers(case, inputs[0])}


def _timing(case: Case) -> Any:
    return cuda_runner if case.device == "cuda" else runner


def entries() -> list[Any]:
    return [
        pytest.param(index, name, id=f"{case.op}-{case.name}-{name}")
        for index, case in enumerate(CASES)
        for name in case.providers
    ]


def gpu_round(
    case: Case, provider: str, inputs: list[tuple[Any, ...]]
) -> tuple[Callable[[], None], int, str]:
    """What a round calls, the calls in it, and their kind."""
    run = cuda_runner.prepare(
        case.providers[provider],
        inputs,
        cuda_runner.CudaDevice(),
        cuda_runner.settings(quick=False),
        cuda_runner.timing_of(case, provider),
    )

    def call() -> None:
        run.call()
        torch.cuda.synchronize()

    return call, run.calls, run.timing


@pytest.mark.parametrize(("index", "provider"), entries())
def test_bench(benchmark: BenchmarkFixture, index: int, provider: str) -> None:
    case: Case = CASES[index]
    inputs, measurements = prepared(index)
    wrong = {name: m.check for name, m in measurements.items() if m.failed}
    assert not wrong
    if measurements[provider].left_out:
        pytest.skip(measurements[provider].check)
    benchmark.group = f"{case.op}: {case.name}"
    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops)
    if case.device == "cuda":
        call, calls, timing = gpu_round(case, provider, inputs)
        benchmark.extra_info.update(calls=calls, timing=timing)
        benchmark(call)
        return
    rotating = itertools.cycle(inputs)
    provide = case.providers[provider]
    benchmark(lambda: provide(*next(rotating)))
