"""Timing on the CPU: every provider checked, then called in turn over rotating inputs."""

from __future__ import annotations

import ctypes
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.case import Case

#: of inputs in memory at once
MOST_INPUT_BYTES = 1 << 30
MOST_BUFFERS = 4096


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        budget: seconds for one provider's samples; the least number of samples comes first.
        sample: seconds that one sample lasts at least, by repeated calls.
        least, most: samples of one provider.
        cache_bytes: memory that a rotation must exceed for its inputs to leave the caches.
    """

    budget: float = 1.0
    sample: float = 1e-3
    least: int = 5
    most: int = 200
    cache_bytes: int = 64 << 20


QUICK = Settings(budget=0.02, sample=1e-4, least=3, most=10, cache_bytes=1 << 20)


@dataclass(frozen=True)
class Roofline:
    """What the machine does at best, with the threads of this run."""

    read_bytes_per_s: float
    flops_per_s: float

    def best_of(self, other: Roofline) -> Roofline:
        return Roofline(
            max(self.read_bytes_per_s, other.read_bytes_per_s),
            max(self.flops_per_s, other.flops_per_s),
        )

    def seconds(self, case: Case) -> float:
        """The least time for a case's memory and arithmetic."""
        return max(case.bytes / self.read_bytes_per_s, case.flops / self.flops_per_s)


@dataclass
class Measurement:
    """One provider of a case. Times are microseconds a call; None where nothing may be said."""

    provider: str
    check: str  # "ok", "reference", "unchecked", or "FAILED: " and why
    median: float | None = None
    low: float | None = None  # lower and upper quartile
    high: float | None = None
    samples: int = 0
    extra_memory: int | None = None  # bytes at the peak of one call

    @property
    def ours(self) -> bool:
        return self.provider.partition(",")[0] == "lopa"

    @property
    def failed(self) -> bool:
        return self.check.startswith("FAILED")


@dataclass
class Result:
    """A case and its measurements."""

    case: Case
    buffers: int
    measurements: list[Measurement] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(measurement.failed for measurement in self.measurements)

    def best_peer(self) -> Measurement | None:
        """The fastest provider that computes the same and is not ours."""
        peers = [
            m
            for m in self.measurements
            if not m.ours and m.check != "unchecked" and m.median is not None
        ]
        return min(peers, key=lambda m: m.median or math.inf, default=None)

    def ratio(self, measurement: Measurement) -> float | None:
        """Times as fast as the best peer."""
        best = self.best_peer()
        if best is None or best.median is None or measurement.median is None:
            return None
        return best.median / measurement.median


def measure_roofline(quick: bool = False) -> Roofline:
    """Read bandwidth by streaming sums over a large buffer, FLOP rate by an fp32 matmul."""
    buffer = torch.ones((64 if quick else 512) << 18)  # 64 or 512 MiB
    size = 1024 if quick else 2048
    a = torch.ones(size, size)
    repeats = 3 if quick else 10
    integers = buffer.view(torch.int64)
    # Whichever reduction PyTorch streams faster is nearer to what the memory does.
    read = min(_best(buffer.sum, repeats), _best(integers.amax, repeats))
    multiply = _best(lambda: a @ a, repeats)
    return Roofline(buffer.nbytes / read, 2 * size**3 / multiply)


def _best(call: Callable[[], Any], repeats: int) -> float:
    call()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def rotation(case: Case, settings: Settings) -> list[tuple[Any, ...]]:
    """Argument tuples to rotate over."""
    count = case.buffers
    if count is None:
        inputs = case.make(1)[0]
        size = sum(leaf.nbytes for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor))
        touched = max(1, min(size, case.bytes))
        count = math.ceil(settings.cache_bytes / touched) + 1
        count = max(2, min(count, MOST_BUFFERS, MOST_INPUT_BYTES // max(1, size)))
    return case.make(count)


def _fresh(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies, for providers that write to their inputs."""
    return tree_map_only(torch.Tensor, torch.clone, inputs)


def check_providers(case: Case, inputs: tuple[Any, ...]) -> list[Measurement]:
    """Calls every provider once and compares its result with the reference's."""
    expected = case.providers[case.reference](*_fresh(inputs))
    measurements = []
    for name, provider in case.providers.items():
        verdict = "ok"
        if name == case.reference:
            verdict = "reference"
        elif name in case.unchecked:
            verdict = "unchecked"
        try:
            result = provider(*_fresh(inputs))
            if verdict == "ok":
                case.check(result, expected)
        except Exception as error:
            # A provider that raises is as unfit for a speed as one that errs.
            line = str(error).strip().partition("\n")[0]
            verdict = f"FAILED: {type(error).__name__}: {line}"
        measurements.append(Measurement(name, verdict))
    return measurements


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}")


def extra_memory(call: Callable[[], Any], repeats: int = 3) -> int | None:
    """Bytes by which one call raises the process's resident memory at its peak, the result's too.

    The kernel's high-water mark (proc(5), clear_refs) sees every allocator. None where there is
    no such mark. The least of some calls, since other threads' pages count as well.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    least = None
    for _ in range(repeats):
        # Free memory that the allocator keeps would hide what the call takes.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        result = call()
        grown = max(0, _status_bytes("VmHWM") - before)
        del result
        least = grown if least is None else min(least, grown)
    return least


def time_providers(
    providers: dict[str, Callable[..., Any]],
    inputs: list[tuple[Any, ...]],
    settings: Settings,
) -> dict[str, list[float]]:
    """Samples, in seconds a call. Providers take turns: the machine's noise hits them alike."""
    position = 0
    samples: dict[str, list[float]] = {name: [] for name in providers}

    def sample(provider: Callable[..., Any], calls: int) -> float:
        nonlocal position
        start = time.perf_counter_ns()
        for _ in range(calls):
            provider(*inputs[position])
            position = (position + 1) % len(inputs)
        return (time.perf_counter_ns() - start) * 1e-9

    calls = {}
    for name, provider in providers.items():
        one = max(sample(provider, 1), 1e-7)
        calls[name] = max(1, math.ceil(settings.sample / one))
        if one < settings.sample:
            # The first call was cold; what a sample lasts is known after some more.
            calls[name] = max(1, math.ceil(settings.sample * 10 / max(sample(provider, 10), 1e-7)))
    spent = dict.fromkeys(providers, 0.0)
    active = list(providers)
    while active:
        for name in active:
            seconds = sample(providers[name], calls[name])
            samples[name].append(seconds / calls[name])
            spent[name] += seconds
        active = [
            name
            for name in active
            if len(samples[name]) < settings.least
            or (spent[name] < settings.budget and len(samples[name]) < settings.most)
        ]
    return samples


def run_case(case: Case, settings: Settings, timed: bool = True) -> Result:
    """Checks a case, and measures it where every provider passed and `timed` asks for it."""
    inputs = rotation(case, settings)
    result = Result(case, len(inputs), check_providers(case, inputs[0]))
    if result.failed or not timed:
        return result
    samples = time_providers(case.providers, inputs, settings)
    for measurement in result.measurements:
        taken = samples[measurement.provider]
        quartiles = statistics.quantiles(taken, n=4, method="inclusive")
        measurement.low, measurement.median, measurement.high = (q * 1e6 for q in quartiles)
        measurement.samples = len(taken)
        provider = case.providers[measurement.provider]
        repeats = 3 if measurement.median < 1e5 else 1
        measurement.extra_memory = extra_memory(lambda p=provider: p(*inputs[0]), repeats)  # type: ignore[misc]
    return result
