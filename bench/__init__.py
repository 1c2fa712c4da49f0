"""Microbenchmarks of every operator beside its peers: ``python -m bench``."""

from __future__ import annotations

import importlib

from bench.case import Case

#: the rooms with a file of cases each
ROOMS = ("confidence", "branch_attention", "kv_cache", "step", "certainty_loss")


def all_cases(device: str = "cpu") -> list[Case]:
    """Every case of every room on one device."""
    cases: list[Case] = []
    for room in ROOMS:
        cases += importlib.import_module(f"bench.{room}").cases(device)
    return cases


def select(cases: list[Case], ops: list[str] | None = None, name: str | None = None) -> list[Case]:
    """Cases whose op contains one of `ops` and whose name contains `name`.

    Raises:
        ValueError: no case is left; the message names the operators there are.
    """
    chosen = [
        case
        for case in cases
        if (not ops or any(op in case.op for op in ops)) and (name is None or name in case.name)
    ]
    if not chosen:
        known = ", ".join(dict.fromkeys(case.op for case in cases))
        raise ValueError(f"no case has op {ops} and name {name!r}; operators: {known}")
    return chosen
