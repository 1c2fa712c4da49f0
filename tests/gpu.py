"""What the GPU tests look through: captured graphs, profiles, the allocator's counters."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

#: CUgraphNodeType of the driver's API
_NODE_TYPES = (
    "kernel", "memcpy", "memset", "host", "graph", "empty", "wait for event", "record event",
    "signal semaphore", "wait for semaphore", "allocate", "free", "memory operations",
    "conditional",
)  # fmt: skip

#: what a profile may show on the device's timeline besides its work
_WAITS = ("Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event")


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `call` that has not run yet, and what `call` gave: the tensors of a replay."""
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1":
        pytest.skip("a capture takes its memory from the caching allocator")
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        result = call()
    graph.instantiate()
    return graph, result


def node_types(graph: torch.cuda.CUDAGraph) -> list[str]:
    """The nodes of a graph of :func:`capture`."""
    driver = ctypes.CDLL("libcuda.so.1")
    raw, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()

    def check(name: str, *arguments: Any) -> None:
        error = getattr(driver, name)(*arguments)
        assert error == 0, f"{name}: error {error}"

    check("cuGraphGetNodes", raw, None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    check("cuGraphGetNodes", raw, nodes, ctypes.byref(count))
    types = []
    for node in nodes:
        kind = ctypes.c_int()
        check("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
        known = kind.value < len(_NODE_TYPES)
        types.append(_NODE_TYPES[kind.value] if known else f"type {kind.value}")
    return types


class Event(NamedTuple):
    """A kernel, a copy or a fill that ran on the device."""

    name: str
    microseconds: float


def _profiled(call: Callable[[], Any]) -> list[Event]:
    torch.cuda.synchronize()
    # The CPU's activities are left out: they would bring annotations of ranges on the device.
    with profile(activities=[ProfilerActivity.CUDA]) as result:
        call()
        torch.cuda.synchronize()
    return [
        Event(event.name, event.time_range.elapsed_us())
        for event in result.events()
        if event.device_type == DeviceType.CUDA and event.name not in _WAITS
    ]


@functools.cache
def _can_profile() -> bool:
    # The first profile of a process starts the tracing and may come too late to see anything.
    values = torch.zeros(8, device="cuda")
    return bool([_profiled(lambda: values.add_(1)) for _ in range(2)][1])


def device_events(call: Callable[[], Any]) -> list[Event]:
    """What one `call` runs on the device, after a first one that is not looked at."""
    if not _can_profile():
        pytest.skip("the profiler sees no kernels on this machine")
    call()
    return _profiled(call)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Device memory that PyTorch's allocator hands out at most while `call` runs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def needs_memory(gigabytes: float) -> None:
    """Skips the test where the device has less that is free."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of device memory, {free / 1e9:.1f} are free")
