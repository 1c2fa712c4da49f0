"""The model of a launch's cost, on counters by hand."""

from __future__ import annotations

from typing import Any

import pytest

from ascend_ops.emulator.cost import ASCEND_910B, Rates, model

RATES = Rates(cores=2, clock=1e9, macs=4096, repeats=0.5, scalars=0.25, l2=4e12, memory=1e12)


def core(cube: bool, moved: int, macs: int = 0, repeats: int = 0) -> dict[str, Any]:
    return {
        "cube": cube,
        "gm_to_local": moved,
        "local_to_gm": 2 * moved,
        "cube_macs": macs,
        "vector_repeats": repeats,
        "scalar_accesses": moved // 50,
    }


def test_mixed() -> None:
    """The block with the most to do decides, at its half of the L2's rate."""
    cores = [core(True, 10, macs=8192), core(False, 20, repeats=7), core(False, 30, repeats=3)]
    cores += [core(True, 100, macs=4096), core(False, 0, repeats=9), core(False, 0)]
    cost = model({"cores": cores}, operands=500, rates=RATES)
    assert cost.memory == pytest.approx(500e-6)
    assert cost.l2 == pytest.approx(3 * 100 / 2e12 * 1e6)
    assert cost.cube == pytest.approx(2 / 1e9 * 1e6)
    assert cost.vector == pytest.approx(9 / 0.5e9 * 1e6)
    assert cost.scalar == pytest.approx(2 / 0.25e9 * 1e6)
    assert cost.bound == ("vector", cost.vector)


def test_vector_cores_alone() -> None:
    cost = model({"cores": [core(False, 40, repeats=1), core(False, 8)]}, 0, RATES)
    assert cost.l2 == pytest.approx(3 * 40 / 1e12 * 1e6)
    assert cost.cube == 0


def test_rates_agree_with_their_source() -> None:
    """11.06 TOPS: a multiply and an add of 64 lanes in each vector core and cycle."""
    rates = ASCEND_910B
    assert 2 * rates.cores * 64 * 2 * rates.clock * rates.repeats == pytest.approx(11.06e12, 1e-3)
