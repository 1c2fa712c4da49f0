"""What a GPU ran between the products of one round and those of the next, from CUPTI's records.

Events within a round's graph would part its kernels, which overlap by programmatic dependent
launch; the profiler records when each began and ended and leaves the graph as it is.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

#: kernels of lopa_step and needed_rows, and the one of kv_commit_, on backend "cuda"
STEP = re.compile(r"lopa::(step|confidence)::")
COMMIT = re.compile(r"lopa::kv_cache::kv_commit_kernel")


class Kernel(NamedTuple):
    """Microseconds of the profiler's clock."""

    name: str
    start: float
    end: float


def record(call: Callable[[], object], repeats: int) -> list[Kernel]:
    """All that the current GPU runs in `repeats` calls, by start."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sorted(kernels, key=lambda kernel: kernel.start)


def outside(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Microseconds of a round that are not its model's, medians over the whole rounds in `kernels`.

    A round begins with needed_rows and ends with its step and its commit. "step" is from the end of
    the last product to that of the step, and needed_rows; "commit" from there to the commit's end;
    "idle" from there to the start of the next round.

    Raises:
        RuntimeError: there is no such round.
    """
    taken: dict[str, list[float]] = {"step": [], "commit": [], "idle": []}
    is_step = [STEP.search(kernel.name) is not None for kernel in kernels]
    # Of all kernels up to each: one that began earlier may end later.
    ended = list(itertools.accumulate((kernel.end for kernel in kernels), max))
    for commit, kernel in enumerate(kernels):
        if COMMIT.search(kernel.name) is None:
            continue
        first, after = commit, commit + 1
        while first > 0 and is_step[first - 1]:
            first -= 1
        while after < len(kernels) and is_step[after]:
            after += 1
        if first in (0, commit) or after in (commit + 1, len(kernels)):
            continue
        stepped, committed = ended[commit - 1], ended[commit]
        begun, needed = kernels[commit + 1].start, ended[after - 1]
        taken["step"].append(stepped - ended[first - 1] + needed - begun)
        taken["commit"].append(committed - stepped)
        taken["idle"].append(begun - committed)
    if not taken["step"]:
        raise RuntimeError("bench: the profiler saw no round's step and commit")
    return {name: statistics.median(times) for name, times in taken.items()}
