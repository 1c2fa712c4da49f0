"""What a launch would take on an NPU at least: a model from the counters of an emulated run.

Nothing here was measured on an NPU. Each engine is taken at its peak and alone: no latencies, no
waits between pipes or cores, no bank conflicts; what is left is where the time cannot go below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rates:
    """Peak rates of a device, with where they come from.

    Attributes:
        cores: AI cores, each one cube core and two vector cores.
        clock: Hz of either.
        macs: multiply-accumulates of a cube core in a cycle, 16-bit operands.
        repeats: vector repeats of 256 bytes of a vector core in a cycle.
        scalars: reads and writes of local memory by a core's scalar unit in a cycle.
        l2: bytes a second, reads and writes together, of what fits the L2 cache; cores share it
            evenly.
        memory: bytes a second of the global memory.
    """

    cores: int
    clock: float
    macs: int
    repeats: float
    scalars: float
    l2: float
    memory: float


#: Ascend 910B. asc-devkit's guide: 11.06 TOPS of fp32 on the vector cores ("Analysing performance
#: data"), which is 48 cores x 64 lanes x 2 operations x 1.8 GHz; 7 TB/s of L2 (192 MB) and 1.6 TB/s
#: of global memory ("L2 cache tiling"). A cube core multiplies 16 x 16 x 16 fractals, one a cycle.
#: A scalar unit issues at most one instruction a cycle.
ASCEND_910B = Rates(
    cores=24, clock=1.8e9, macs=16**3, repeats=1.0, scalars=1.0, l2=7e12, memory=1.6e12
)


@dataclass(frozen=True)
class Cost:
    """Microseconds that each engine needs at its peak; the longest bounds the launch from below.

    `l2`, `cube`, `vector` and `scalar` are those of the core with the most to do.
    """

    memory: float
    l2: float
    cube: float
    vector: float
    scalar: float

    @property
    def bound(self) -> tuple[str, float]:
        """The engine that needs the most time, and that time."""
        return max(vars(self).items(), key=lambda item: item[1])


def model(report: Mapping[str, Any], operands: int, rates: Rates = ASCEND_910B) -> Cost:
    """The model's times of a run.

    Args:
        report: of :func:`ascend_ops.emulator.launch`.
        operands: bytes of the launch's inputs and outputs, each once: what global memory moves
            where the rest stays in L2.
    """
    cores = report["cores"]
    cube = max(core["cube_macs"] for core in cores)
    vector = max(core["vector_repeats"] for core in cores)
    scalar = max(core["scalar_accesses"] for core in cores)
    moved = [core["gm_to_local"] + core["local_to_gm"] for core in cores]
    if any(core["cube"] for core in cores) and not all(core["cube"] for core in cores):
        # Mixed: a cube core and its two vector cores follow each other.
        moved = [sum(moved[at : at + 3]) for at in range(0, len(moved), 3)]
        sharers = rates.cores
    else:
        sharers = rates.cores if cores[0]["cube"] else 2 * rates.cores
    return Cost(
        memory=operands / rates.memory * 1e6,
        l2=max(moved) / (rates.l2 / sharers) * 1e6,
        cube=cube / (rates.macs * rates.clock) * 1e6,
        vector=vector / (rates.repeats * rates.clock) * 1e6,
        scalar=scalar / (rates.scalars * rates.clock) * 1e6,
    )
