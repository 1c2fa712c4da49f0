"""Timing on the CPU: every provider checked, then called in turn over rotating inputs.

What a GPU's timing shares with it is here too.
"""

from __future__ import annotations

import ctypes
import math
import os
import statistics
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.case import Case

MOST_BUFFERS = 4096


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        budget: seconds for one provider's samples; the least number of samples comes first.
        sample: seconds that one sample lasts at least, by repeated calls.
        least, most: samples of one provider.
        cache_bytes: memory that a rotation must exceed for its inputs to leave the caches.
        input_bytes: of inputs in memory at once, as far as two of them fit.
    """

    budget: float = 1.0
    sample: float = 1e-3
    least: int = 5
    most: int = 200
    cache_bytes: int = 64 << 20
    input_bytes: int = 1 << 30


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

    @property
    def bytes_per_s(self) -> float:
        """The ceiling of what a case moves."""
        return self.read_bytes_per_s

    def seconds(self, case: Case) -> float:
        """The least time for a case's memory and arithmetic."""
        return max(case.bytes / self.bytes_per_s, case.flops / self.flops_per_s)

    def header(self) -> dict[str, str]:
        return {
            "read bandwidth": f"{self.read_bytes_per_s / 1e9:.1f} GB/s",
            "fp32 matmul": f"{self.flops_per_s / 1e9:.0f} GFLOP/s",
        }


@dataclass
class Measurement:
    """One provider of a case. Times are microseconds a call; None where nothing may be said."""

    provider: str
    check: str  # "ok", "reference", "unchecked"; "FAILED: ", or of a peer "absent: ", "wrong: "
    median: float | None = None
    low: float | None = None  # lower and upper quartile
    high: float | None = None
    samples: int = 0
    extra_memory: int | None = None  # bytes at the peak of one call
    timing: str = "wall"  # on a GPU "graph", "eager", or "host": what the time is of

    @property
    def ours(self) -> bool:
        return self.provider.partition(",")[0] == "lopa"

    @property
    def failed(self) -> bool:
        return self.check.startswith("FAILED")

    @property
    def left_out(self) -> bool:
        """An optional peer that does not run here, or errs: it alone has no speed."""
        return self.check.startswith(("absent", "wrong"))

    def record(self, samples: list[float]) -> None:
        """Takes the median and the quartiles of samples in seconds a call."""
        quartiles = statistics.quantiles(samples, n=4, method="inclusive")
        self.low, self.median, self.high = (q * 1e6 for q in quartiles)
        self.samples = len(samples)


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
        count = max(2, min(count, MOST_BUFFERS, settings.input_bytes // max(1, size)))
    return case.make(count)


def _fresh(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies, for providers that write to their inputs; what is one tensor stays one."""
    copies: dict[int, torch.Tensor] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.clone()
        return copies[id(tensor)]

    return tree_map_only(torch.Tensor, copy, inputs)


def verdict_of(kind: str, error: Exception) -> str:
    """`kind`, and what was raised in a line that fits into a table's cell."""
    line = textwrap.shorten(str(error).replace("|", "/"), 200, placeholder=" ...")
    return f"{kind}: {type(error).__name__}: {line}"


def check_providers(case: Case, inputs: tuple[Any, ...]) -> list[Measurement]:
    """Calls every provider once and compares its result with what is expected of it."""
    oracle = case.oracle
    if oracle is None:
        assert case.reference is not None, f"{case.name}: neither a reference nor an oracle"
        oracle = case.providers[case.reference]
    expected = oracle(*_fresh(inputs))
    return [Measurement(name, _check(case, name, inputs, expected)) for name in case.providers]


def _check(case: Case, name: str, inputs: tuple[Any, ...], expected: Any) -> str:
    """The verdict of one provider. One that raises is as unfit for a speed as one that errs."""
    try:
        result = case.providers[name](*_fresh(inputs))
        if case.device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return verdict_of("absent" if name in case.optional else "FAILED", error)
    if name == case.reference:
        return "reference"
    if name in case.unchecked:
        return "unchecked"
    try:
        case.checks.get(name, case.check)(result, expected)
    except Exception as error:
        return verdict_of("wrong" if name in case.optional else "FAILED", error)
    return "ok"


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

    def sampler(name: str) -> tuple[list[float], float]:
        seconds = sample(providers[name], calls[name])
        return [seconds / calls[name]], seconds

    return take_turns(list(providers), sampler, settings)


def take_turns(
    names: list[str], sampler: Callable[[str], tuple[list[float], float]], settings: Settings
) -> dict[str, list[float]]:
    """Samples of everybody, in turns, until each has enough.

    Args:
        names: of the providers.
        sampler: takes some samples of one of them: seconds a call, and the seconds it took.
    """
    samples: dict[str, list[float]] = {name: [] for name in names}
    spent = dict.fromkeys(names, 0.0)
    active = list(names)
    while active:
        for name in active:
            taken, seconds = sampler(name)
            samples[name] += taken
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
    present = [m for m in result.measurements if not m.left_out]
    providers = {m.provider: case.providers[m.provider] for m in present}
    samples = time_providers(providers, inputs, settings)
    for measurement in present:
        measurement.record(samples[measurement.provider])
        provider = providers[measurement.provider]
        repeats = 3 if (measurement.median or 0.0) < 1e5 else 1
        measurement.extra_memory = extra_memory(lambda p=provider: p(*inputs[0]), repeats)  # type: ignore[misc]
    return result


def settings(quick: bool) -> Settings:
    return QUICK if quick else Settings()
