"""pytest-benchmark entries, one a case and provider: ``pytest bench --benchmark-enable``."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import all_cases
from bench.case import Case
from bench.runner import Settings, check_providers, rotation

CASES = all_cases()


@functools.lru_cache(maxsize=1)
def prepared(index: int) -> tuple[list[tuple[Any, ...]], dict[str, str]]:
    """A case's rotating inputs, and what its check says of each provider."""
    case = CASES[index]
    inputs = rotation(case, Settings())
    return inputs, {m.provider: m.check for m in check_providers(case, inputs[0])}


def entries() -> list[Any]:
    return [
        pytest.param(index, name, id=f"{case.op}-{case.name}-{name}")
        for index, case in enumerate(CASES)
        for name in case.providers
    ]


@pytest.mark.parametrize(("index", "provider"), entries())
def test_bench(benchmark: BenchmarkFixture, index: int, provider: str) -> None:
    case: Case = CASES[index]
    inputs, verdicts = prepared(index)
    wrong = {name: verdict for name, verdict in verdicts.items() if verdict.startswith("FAILED")}
    assert not wrong
    benchmark.group = f"{case.op}: {case.name}"
    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops)
    rotating = itertools.cycle(inputs)
    call = case.providers[provider]
    benchmark(lambda: call(*next(rotating)))
