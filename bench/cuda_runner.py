"""Timing on a GPU: every provider checked, then replayed from CUDA graphs over rotating inputs.

A graph holds calls of one provider back to back, as many times over all rotating inputs as fill
the length of a sample; its replays are timed by events, and providers take turns. What a graph
cannot hold is called from Python and timed by the same events, which then show the host's time too.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import itertools
import math
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bench.case import Case
from bench.runner import (
    Measurement,
    Result,
    Roofline,
    Settings,
    check_providers,
    rotation,
    take_turns,
    verdict_of,
)
from lopa_kernels import collect_env

#: timed replays in a row; one more goes before them, untimed, so that the host runs ahead
BURST = 3

#: of a provider in one graph
MOST_CALLS = 2048

#: enqueued in a row where the host's time is measured: few enough for the queue of launches
HOST_CALLS = 100

#: of rotating inputs, in caches; what is left of the first in L2 is then nothing
COLD_CACHES = 4


class Device(Protocol):
    """What timing needs of a GPU; the tests have one of their own."""

    def capturable(self, call: Callable[[], Any]) -> bool:
        """Warms `call` up, and tells whether it leaves the host free of waiting."""

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any] | None:
        """A function that replays what `call` launches; None where it cannot be captured."""

    def burst(self, call: Callable[[], Any], repeats: int) -> list[float]:
        """Seconds of the device for each of `repeats` calls, behind one that is not timed."""

    def enqueue(self, call: Callable[[], Any], repeats: int) -> list[float]:
        """Seconds of the host for each of `repeats` calls, the device idle before each."""


class CudaDevice:
    """The current GPU, on a stream of its own."""

    def __init__(self) -> None:
        self.stream = _stream()
        self.pool = torch.cuda.graph_pool_handle()

    def _call(self, call: Callable[[], Any]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            call()
        torch.cuda.current_stream().wait_stream(self.stream)

    def capturable(self, call: Callable[[], Any]) -> bool:
        # A first call on this stream may allocate workspaces, load modules and tune.
        self._call(call)
        torch.cuda.synchronize()
        previous = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._call(call)
        except RuntimeError:
            # The same call passed just before: what it raises now is that it waits.
            return False
        finally:
            torch.cuda.set_sync_debug_mode(previous)
            torch.cuda.synchronize()
        return True

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any] | None:
        graph = torch.cuda.CUDAGraph()
        outside = torch.cuda.current_stream()
        # A collection meanwhile could free another graph, or tensors of another stream.
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                call()
        except Exception as error:
            warnings.warn(verdict_of("not captured", error), stacklevel=2)
            torch.cuda.set_stream(outside)
            self._recover()
            return None
        finally:
            if collecting:
                gc.enable()
        return graph.replay

    def _recover(self) -> None:
        """A capture that broke has left its pool open, and the random generator capturing."""
        torch.cuda.synchronize()
        self.pool = torch.cuda.graph_pool_handle()
        one = torch.zeros(1, device="cuda")
        self._call(lambda: one.add_(1))
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream):
            one.add_(1)

    def burst(self, call: Callable[[], Any], repeats: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            call()
            events[0].record()
            for event in events[1:]:
                call()
                event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(events)]

    def enqueue(self, call: Callable[[], Any], repeats: int) -> list[float]:
        taken = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return taken


@functools.cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@dataclass(frozen=True)
class Run:
    """A provider made ready: `call` makes `calls` calls of it."""

    call: Callable[[], Any]
    calls: int
    timing: str  # "graph", "eager" or "host"


def _rotating(
    provider: Callable[..., Any], inputs: list[tuple[Any, ...]], calls: int
) -> Callable[[], None]:
    following = itertools.cycle(inputs)

    def call() -> None:
        for _ in range(calls):
            provider(*next(following))

    return call


def _repeats(target: float, seconds: float) -> int:
    return max(1, math.ceil(target / max(seconds, 1e-7)))


def prepare(
    provider: Callable[..., Any],
    inputs: list[tuple[Any, ...]],
    device: Device,
    settings: Settings,
    timing: str = "graph",
) -> Run:
    """Captures a provider, or readies it for eager calls where a graph cannot hold it."""
    if timing == "host":
        return Run(_rotating(provider, inputs, HOST_CALLS), HOST_CALLS, "host")

    def passes(times: int) -> None:
        for _ in range(times):
            for arguments in inputs:
                provider(*arguments)

    if timing == "graph" and device.capturable(lambda: provider(*inputs[0])):
        replay = device.capture(lambda: passes(1))
        if replay is not None:
            times = _repeats(settings.sample, min(device.burst(replay, BURST)))
            times = max(1, min(times, MOST_CALLS // len(inputs)))
            longer = device.capture(lambda: passes(times)) if times > 1 else None
            if longer is None:
                return Run(replay, len(inputs), "graph")
            return Run(longer, times * len(inputs), "graph")
    calls = _repeats(settings.sample, min(device.burst(_rotating(provider, inputs, 1), BURST)))
    calls = min(calls, MOST_CALLS)
    return Run(_rotating(provider, inputs, calls), calls, "eager")


def time_runs(runs: dict[str, Run], device: Device, settings: Settings) -> dict[str, list[float]]:
    """Samples, in seconds a call, taken in turns."""

    def sampler(name: str) -> tuple[list[float], float]:
        run = runs[name]
        take = device.enqueue if run.timing == "host" else device.burst
        taken = take(run.call, BURST)
        return [seconds / run.calls for seconds in taken], sum(taken)

    return take_turns(list(runs), sampler, settings)


def timing_of(case: Case, provider: str) -> str:
    if case.host:
        return "host"
    return "eager" if provider in case.eager else "graph"


def extra_memory(call: Callable[[], Any]) -> int:
    """Bytes that PyTorch's allocator holds more at the peak of one call, its result's too."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def run_case(case: Case, settings: Settings, timed: bool = True) -> Result:
    """Checks a case, and measures it where every provider passed and `timed` asks for it.

    Whatever goes wrong is told in the result, and the other cases go on.
    """
    try:
        return _run_case(case, settings, timed)
    except Exception as error:
        verdict = verdict_of("FAILED", error)
        return Result(case, 0, [Measurement(name, verdict) for name in case.providers])
    finally:
        gc.collect()
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def _run_case(case: Case, settings: Settings, timed: bool) -> Result:
    inputs = rotation(case, settings)
    result = Result(case, len(inputs), check_providers(case, inputs[0]))
    if result.failed or not timed:
        return result
    device = CudaDevice()
    present = [m for m in result.measurements if not m.left_out]
    runs = {
        m.provider: prepare(
            case.providers[m.provider], inputs, device, settings, timing_of(case, m.provider)
        )
        for m in present
    }
    samples = time_runs(runs, device, settings)
    for measurement in present:
        provider = case.providers[measurement.provider]
        measurement.record(samples[measurement.provider])
        measurement.timing = runs[measurement.provider].timing
        measurement.extra_memory = extra_memory(lambda p=provider: p(*inputs[0]))  # type: ignore[misc]
    return result


def settings(quick: bool) -> Settings:
    if quick:
        return Settings(budget=0.02, sample=2e-4, least=3, most=12, cache_bytes=1 << 20)
    cold = COLD_CACHES * _properties().L2_cache_size
    return Settings(
        budget=0.2, sample=1e-3, least=6, most=60, cache_bytes=cold, input_bytes=8 << 30
    )


@dataclass(frozen=True)
class CudaRoofline(Roofline):
    """What the GPU does at best."""

    copy_bytes_per_s: float
    launch_seconds: float

    def best_of(self, other: Roofline) -> CudaRoofline:
        assert isinstance(other, CudaRoofline)
        return CudaRoofline(
            max(self.read_bytes_per_s, other.read_bytes_per_s),
            max(self.flops_per_s, other.flops_per_s),
            max(self.copy_bytes_per_s, other.copy_bytes_per_s),
            min(self.launch_seconds, other.launch_seconds),
        )

    @property
    def bytes_per_s(self) -> float:
        return self.copy_bytes_per_s

    def header(self) -> dict[str, str]:
        return {
            "copy bandwidth (read and written)": f"{self.copy_bytes_per_s / 1e9:.0f} GB/s",
            "read bandwidth": f"{self.read_bytes_per_s / 1e9:.0f} GB/s",
            "bf16 matmul": f"{self.flops_per_s / 1e12:.0f} TFLOP/s",
            "smallest kernel in a graph": f"{self.launch_seconds * 1e6:.2f} us",
        }


def measure_roofline(quick: bool = False) -> CudaRoofline:
    """Bandwidths over a large buffer, FLOP rate by a bf16 matmul, and the time of a launch.

    All on random data: zeros run faster than what is measured here.
    """
    device = CudaDevice()
    repeats = 3 if quick else 10
    source = torch.empty((128 if quick else 2048) << 17, dtype=torch.int64, device="cuda").random_()
    target = torch.empty_like(source)
    copies: list[Callable[[], Any]] = [
        lambda: target.copy_(source),
        lambda: torch.bitwise_not(source, out=target),
    ]
    reads: list[Callable[[], Any]] = [
        source.amax,
        source.sum,
        source.view(torch.int32).amax,
    ]
    copy = min(min(device.burst(call, repeats)) for call in copies)
    read = min(min(device.burst(call, repeats)) for call in reads)
    size = 2048 if quick else 8192
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    multiply = min(device.burst(lambda: torch.mm(a, b), repeats))
    return CudaRoofline(
        read_bytes_per_s=source.nbytes / read,
        flops_per_s=2 * size**3 / multiply,
        copy_bytes_per_s=2 * source.nbytes / copy,
        launch_seconds=_launch_seconds(device, repeats),
    )


def _launch_seconds(device: CudaDevice, repeats: int) -> float:
    one = torch.zeros(1, device="cuda")
    launches = 1000

    def launch() -> None:
        for _ in range(launches):
            one.add_(1)

    device.capturable(lambda: one.add_(1))
    replay = device.capture(launch)
    assert replay is not None, "a graph of additions was not captured"
    return min(device.burst(replay, repeats)) / launches


def environment() -> dict[str, str]:
    """Of the header: the GPU, what drives it, and which backends and peers there are."""
    properties = _properties()
    rows = {
        "gpu": f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
        f"{properties.total_memory / 2**30:.0f} GiB, L2 {properties.L2_cache_size / 2**20:.0f} MiB",
        "cuda": str(torch.version.cuda),
        **_driver(str(getattr(properties, "uuid", ""))),
        **{name: _version(package) for name, package in PACKAGES.items()},
    }
    for name, state in collect_env.backends():
        rows[f"backend {name}"] = state
    return rows


def _properties() -> Any:
    return torch.cuda.get_device_properties(torch.cuda.current_device())


#: peers' packages by the name that the header has for them
PACKAGES = {"triton": "triton", "flashinfer": "flashinfer-python"}

#: nvidia-smi's name of a field -> the header's
DRIVER_FIELDS = {
    "driver_version": "driver",
    "clocks.sm": "SM clock under load",
    "clocks.max.sm": "SM clock, largest",
    "clocks.mem": "memory clock under load",
    "power.limit": "power limit",
}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver(uuid: str) -> dict[str, str]:
    """What nvidia-smi tells of the GPU while it multiplies; nothing where there is no such tool."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(DRIVER_FIELDS)}", "--format=csv,noheader"]
    if uuid:
        command.append(f"--id=GPU-{uuid}")
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    for _ in range(500):
        torch.mm(a, a)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    finally:
        torch.cuda.synchronize()
    values = (value.strip() for value in done.stdout.partition("\n")[0].split(","))
    return dict(zip(DRIVER_FIELDS.values(), values, strict=False))
