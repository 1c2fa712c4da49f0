"""Recorded rounds of the published LoPA loop, reproduced through the public `lopa_step`.

tests/data/conformance/README.md describes the records. Each round's state is built from its
record, and what the round makes of it is compared with the next record.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from targets import TARGETS, Target, cpu, over

from lopa_kernels import (
    LopaConfig,
    LopaState,
    LopaStep,
    branch_step,
    lopa_step,
    needed_rows,
    token_confidence,
)

DATA = Path(__file__).parent / "data" / "conformance"
RUNS = sorted(path.stem for path in DATA.glob("run*.npz"))
METRICS = {"default": "prob", "margin": "margin", "neg_entropy": "neg_entropy"}


@functools.cache
def load(run: str) -> tuple[dict[str, Any], list[np.ndarray], np.ndarray]:
    record = np.load(DATA / f"{run}.npz")
    trace = json.loads(bytes(record["trace"]))
    logits = [record[f"logits_{i}"] for i in range(len(trace["rounds"]))]
    return trace, logits, record["output"]


def make_config(trace: dict[str, Any], window: int) -> LopaConfig:
    return LopaConfig(
        mask_id=trace["mask_token_id"],
        eos_id=trace["eos"] if trace["eos"] >= 0 else None,
        max_new_tokens=trace["max_new_tokens"],
        block_size=trace["block_size"],
        tau_conf=trace["skip_threshold"],
        tau_add=trace["block_add_threshold"],
        tau_act=trace["decoded_token_threshold"],
        metric=METRICS[trace["sampling_strategy"]],
        reduction="bottom",
        fraction=trace["branch_topp"],
        alpha=trace["selection_conf_alpha"],
        force_anchor=trace["verification_force_base_winner"],
        branches=trace["branching_factor"] + 1,
        window=window,
    )


def in_slot_order(record: dict[str, Any]) -> list[int]:
    """Indices into record["branches"]: the anchor, then the lookahead branches.

    Where the published loop finds no candidate it holds its anchor twice; the copy is no branch.
    """
    branches = record["branches"]
    anchor = max(i for i, branch in enumerate(branches) if branch["base"])
    lookahead = [i for i, branch in enumerate(branches) if not branch["base"]]
    return [anchor, *lookahead]


def make_state(record: dict[str, Any], trace: dict[str, Any], slots: int, window: int) -> LopaState:
    order = in_slot_order(record)
    cache_len = record["cache_len"]
    tokens = torch.full((1, slots, window), trace["mask_token_id"], dtype=torch.int64)
    length = torch.zeros(1, slots, dtype=torch.int32)
    creation = torch.zeros(1, slots)
    eos = torch.zeros(1, slots, dtype=torch.bool)
    for slot, index in enumerate(order):
        branch = record["branches"][index]
        own = torch.tensor(branch["tokens"][cache_len:], dtype=torch.int64)
        tokens[0, slot, : len(own)] = own
        length[0, slot] = len(own)
        creation[0, slot] = branch["creation"]
        eos[0, slot] = bool(branch["eos"])

    def number(value: int) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.int32)

    return LopaState(
        tokens,
        length,
        creation,
        eos,
        branches=number(len(order)),
        cache_len=number(cache_len),
        commit_len=number(record["shared_prefix_end"] - cache_len),
        prompt_len=number(trace["prompt_len"]),
        carry_token=torch.zeros(1, dtype=torch.int64),
        carry_prob=torch.zeros(1),
        carry_score=torch.zeros(1),
        done=torch.zeros(1, dtype=torch.bool),
    )


def place_logits(
    record: dict[str, Any], logits: np.ndarray, slots: int, window: int
) -> torch.Tensor:
    """The record's logits start at column commit_len; rows that no round may read are NaN."""
    out = torch.full((1, slots, window, logits.shape[-1]), float("nan"))
    start = record["shared_prefix_end"] - record["cache_len"]
    for slot, index in enumerate(in_slot_order(record)):
        columns = len(record["branches"][index]["tokens"]) - record["shared_prefix_end"]
        out[0, slot, start : start + columns] = torch.from_numpy(logits[index, :columns])
    return out


def open_columns(record: dict[str, Any], mask_id: int) -> int:
    return sum(b["tokens"][record["cache_len"] :].count(mask_id) for b in record["branches"])


#: a round from the logits of every column, of the needed columns, and from ready statistics
FORMS = ("dense", "gathered", "statistics")


def cases() -> list[Any]:
    """Every round in every form, on every target.

    A row of logits takes a while in Triton's interpreter: there rounds of few rows, a form each.
    """
    params = []
    for run in RUNS:
        trace, _, _ = load(run)
        for i, record in enumerate(trace["rounds"]):
            is_short = open_columns(record, trace["mask_token_id"]) <= 33 and i % 4 < 2
            for target in TARGETS:
                for n, form in enumerate(FORMS):
                    if not target.interpreted or form == "statistics" or (is_short and i % 2 == n):
                        case = f"{run}-{i}-{target}-{form}"
                        params.append(pytest.param(target, run, i, form, id=case))
    return params


def run_round(run: str, index: int, target: Target, form: str) -> tuple[LopaStep, LopaState]:
    trace, logits, _ = load(run)
    record = trace["rounds"][index]
    slots = trace["branching_factor"] + 1
    longest = max(
        len(branch["tokens"]) - r["cache_len"] for r in trace["rounds"] for branch in r["branches"]
    )
    # A window too small for the longest round would make blocks wait.
    window = longest + trace["block_size"]
    config = make_config(trace, window)
    state = make_state(record, trace, slots, window)
    rows = None
    scores = target.to(place_logits(record, logits[index], slots, window))
    here = target.to(state)
    if form == "statistics":
        by_row = "cpu" if target.interpreted else target.backend
        statistics = token_confidence(scores, metric=config.metric, backend=by_row)
        return cpu(branch_step(*statistics, here, config, backend=target.backend)), state
    if form == "gathered":
        needed = needed_rows(here, config, backend=target.backend)
        scores = scores.flatten(0, 2)[needed.index[: int(needed.count)]]
        rows = needed.rows
    return cpu(lopa_step(scores, here, config, rows, backend=target.backend)), state


@pytest.mark.parametrize(("target", "run", "index", "form"), cases())
def test_recorded_round(target: Target, run: str, index: int, form: str) -> None:
    trace, _, _ = load(run)
    record = trace["rounds"][index]
    order = in_slot_order(record)
    out, state = run_round(run, index, target, form)

    assert int(out.status) == 0
    # A duplicate of the anchor has the anchor's tokens, so its victory is the anchor's.
    winner = record["winner"]
    assert int(out.winner) == (order.index(winner) if winner in order else 0)
    expected = torch.tensor([record["score"][i] for i in order])
    torch.testing.assert_close(out.confidence[0, : len(order)], expected, rtol=1e-4, atol=2e-5)
    assert int(out.filled) == len(record["filled_positions"])

    cache_len, U = record["cache_len"], int(state.commit_len)
    committed = record["winner_tokens_after_fill"][cache_len : cache_len + U]
    assert out.committed[0, :U].tolist() == committed
    assert bool((out.committed[0, U:] == -1).all())

    if index + 1 == len(trace["rounds"]):
        return
    check_next(out.state, trace["rounds"][index + 1])


def check_next(state: LopaState, record: dict[str, Any]) -> None:
    order = in_slot_order(record)
    assert int(state.branches) == len(order)
    assert int(state.cache_len) == record["cache_len"]
    assert int(state.commit_len) == record["shared_prefix_end"] - record["cache_len"]
    assert not bool(state.done)
    for slot, index in enumerate(order):
        branch = record["branches"][index]
        own = branch["tokens"][record["cache_len"] :]
        assert int(state.length[0, slot]) == len(own)
        assert state.tokens[0, slot, : len(own)].tolist() == own
        assert bool(state.eos[0, slot]) == bool(branch["eos"])
        assert float(state.creation[0, slot]) == pytest.approx(
            branch["creation"], rel=1e-4, abs=2e-5
        )


@over(TARGETS)
@pytest.mark.parametrize("run", RUNS)
def test_last_round_is_done(run: str, target: Target) -> None:
    trace, _, output = load(run)
    index = len(trace["rounds"]) - 1
    out, _ = run_round(run, index, target, "statistics" if target.interpreted else "dense")
    generated = trace["rounds"][index]["winner_tokens_after_fill"][trace["prompt_len"] :]
    assert generated[: len(output)] == output[: len(generated)].tolist()
    own = trace["rounds"][index]["winner_tokens_after_fill"][int(out.state.cache_len) :]
    length = int(out.state.length[0, 0])
    assert out.state.tokens[0, 0, : min(length, len(own))].tolist() == own[:length]
    if trace["mask_token_id"] not in generated:
        assert bool(out.state.done) or length > len(own)
