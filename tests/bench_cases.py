"""Small cases of the benchmark program, and a run of it, for its tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

pytest.importorskip("rich")
pytest.importorskip("tabulate")

from bench import runner  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.case import Case  # noqa: E402


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.allclose(result, expected), "sums differ"


def sum_case(op: str = "sum", name: str = "1000 float32", **fields: Any) -> Case:
    def make(buffers: int) -> list[tuple[torch.Tensor]]:
        device = fields.get("device", "cpu")
        return [(torch.arange(1000.0, device=device) + i,) for i in range(buffers)]

    made: dict[str, Any] = {
        "providers": {
            "lopa": torch.sum,
            "lopa, twice": lambda x: (torch.sum(x) + torch.sum(x)) / 2,
            "peer": lambda x: x.cumsum(0)[-1],
            "read": lambda x: x.amax(),
        },
        "reference": "peer",
        "check": close,
        "bytes": 4000,
        "flops": 1000,
        "unchecked": ("read",),
    }
    return Case(op=op, name=name, make=make, **{**made, **fields})


def wrong_case(op: str = "sum", **fields: Any) -> Case:
    return sum_case(
        op,
        "planted",
        providers={"lopa": lambda x: torch.sum(x) + 1e3, "peer": torch.sum},
        unchecked=(),
        **fields,
    )


def run(cases: list[Case], tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "out.json"
    status = main(["--quick", "--json", str(path), *arguments], cases)
    return status, json.loads(path.read_text())


def verdicts_of(case: Case) -> dict[str, str]:
    return {m.provider: m.check for m in runner.check_providers(case, case.make(1)[0])}
