"""The branch room as AscendC kernels, in the emulator: equal to the reference in every field."""

from __future__ import annotations

import dataclasses
import math
import random
import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import (
    Drawn,
    assert_close,
    assert_same,
    clone,
    random_config,
    random_state,
    random_stats,
    rounds,
)
from test_conformance import RUNS, check_next, in_slot_order, load, make_config, make_state
from test_conformance import place_logits as place

import lopa_kernels
from ascend_ops import emulator
from ascend_ops.emulator import branch as kernels


@settings(max_examples=300)
@given(drawn=rounds(8, 200))
def test_round_equals_reference(drawn: Drawn) -> None:
    if len(drawn.token) > 0:
        expected = lopa_kernels.branch_step(*drawn, backend="reference")
        assert_same(kernels.branch_step(*drawn, cores=2), expected)


@settings(max_examples=60)
@given(drawn=rounds(8, 60))
def test_round_in_place_equals_functional(drawn: Drawn) -> None:
    if len(drawn.token) == 0:
        return
    *statistics, state, config = drawn
    config = dataclasses.replace(config, branches=None, window=None)
    expected = lopa_kernels.branch_step(*statistics, state, config, backend="reference")
    own = clone(state)
    assert_same(kernels.branch_step(*statistics, own, config, in_place=True, cores=2), expected)
    assert own.tokens.equal(expected.state.tokens)


@settings(max_examples=100)
@given(drawn=rounds(8, 200))
def test_needed_rows_equal_reference(drawn: Drawn) -> None:
    state, config = drawn.state, drawn.config
    if len(drawn.token) == 0:
        return
    wanted = kernels.step_rows(state, config, cores=2)
    for capacity in (None, 10):
        expected = lopa_kernels.needed_rows(state, config, capacity, backend="reference")
        got = kernels.needed_rows(state, config, capacity, cores=2)
        for a, b in zip(got, expected, strict=True):
            assert a.equal(b)
        if capacity is None:
            columns = torch.arange(state.tokens.numel()).view(state.tokens.shape)
            assert wanted.equal(torch.where(expected.rows >= 0, columns, -1).int())


@pytest.mark.parametrize(("branches", "window", "block_size"), [(16, 300, 32), (1, 3000, 64)])
def test_many_branches_and_columns(branches: int, window: int, block_size: int) -> None:
    rng = random.Random(window)
    state = random_state(rng, 2, branches, window, block_size)
    config = random_config(rng, block_size, branches=branches)
    statistics = random_stats(rng, (2, branches, window))
    expected = lopa_kernels.branch_step(*statistics, state, config, backend="reference")
    assert_same(kernels.branch_step(*statistics, state, config), expected)


def test_cores_change_nothing() -> None:
    rng = random.Random(5)
    state = random_state(rng, 9, 4, 40, 8)
    config = random_config(rng, 8, branches=4)
    statistics = random_stats(rng, (9, 4, 40))
    expected = lopa_kernels.branch_step(*statistics, state, config, backend="reference")
    needed = lopa_kernels.needed_rows(state, config, backend="reference")
    for cores in (1, 2, 7, 20, 40):
        assert_same(kernels.branch_step(*statistics, state, config, cores=cores), expected)
        for a, b in zip(kernels.needed_rows(state, config, cores=cores), needed, strict=True):
            assert a.equal(b)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_branch_confidence_equals_reference(seed: int) -> None:
    rng = random.Random(seed)
    shape = (rng.randint(1, 3), rng.randint(1, 5), rng.choice([1, 7, 64, 200]))
    generator = torch.Generator().manual_seed(seed)
    # Scores and weights whose blends lie near halves of a last place, too.
    score = (
        random_stats(rng, shape)[2]
        if rng.random() < 0.5
        else torch.rand(shape, generator=generator)
    )
    opened = torch.rand(shape, generator=generator) < rng.random()
    creation = torch.randn(shape[:2], generator=generator)
    creation[torch.rand(shape[:2], generator=generator) < 0.1] = math.nan
    branches = torch.randint(0, shape[1] + 1, shape[:1], dtype=torch.int32, generator=generator)
    length = torch.randint(0, shape[2] + 1, shape[:2], dtype=torch.int32, generator=generator)
    given_lengths = (branches, length) if rng.random() < 0.5 else (None, None)
    options = {
        "reduction": rng.choice(kernels.REDUCTIONS),
        "fraction": rng.choice([0.01, 0.3, 0.7, 1.0]),
        "group": rng.randint(1, 9),
        "alpha": rng.choice([0.0, 0.3, 0.5, 1.0]),
    }
    expected = lopa_kernels.branch_confidence(
        score,
        opened,
        creation,
        branches=given_lengths[0],
        length=given_lengths[1],
        backend="reference",
        **options,
    )
    got = kernels.branch_confidence(
        score, opened, creation, *given_lengths, *options.values(), cores=3
    )
    assert got.equal(expected)


def test_sums_are_those_of_doubles() -> None:
    """Bit by bit: the kernel's doubles in integers against the host's."""
    soft = emulator.module().soft_double
    rng = random.Random(0)
    special = [0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, 5e-324, 2.2e-308, 1.7e308]

    def draw() -> float:
        kind = rng.random()
        if kind < 0.1:
            return rng.choice(special)
        if kind < 0.3:
            return float(struct.unpack("<d", rng.randbytes(8))[0])
        return float(np.float32(rng.uniform(-1, 1))) if kind < 0.6 else rng.uniform(-2, 2)

    def same(a: float, b: float) -> bool:
        return (math.isnan(a) and math.isnan(b)) or struct.pack("<d", a) == struct.pack("<d", b)

    with np.errstate(all="ignore"):
        for _ in range(5000):
            a, b = draw(), draw()
            x, y = np.float64(a), np.float64(b)
            assert same(soft(a, b, "+"), float(x + y)), (a, b)
            assert same(soft(a, b, "*"), float(x * y)), (a, b)
            assert same(soft(a, b, "float"), float(np.float32(x))), a
            if b != 0 and math.isfinite(b):
                assert same(soft(a, b, "/"), float(x / y)), (a, b)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_select_and_spawn_equal_reference(seed: int) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([1, 3, 8])
    window, batch, lookahead = block_size * rng.randint(1, 6), rng.randint(1, 4), rng.randint(0, 5)
    state = random_state(rng, batch, 1, window, block_size)
    config = random_config(rng, block_size, branches=lookahead + 1)
    token, prob, score = (values[:, 0] for values in random_stats(rng, (batch, 1, window)))
    given_state = (state.tokens[:, 0].contiguous(), state.length[:, 0].contiguous())
    given_state += (state.cache_len, state.prompt_len)
    chosen = lopa_kernels.select_positions(
        token, prob, score, *given_state, config, backend="reference"
    )
    got = kernels.select_positions(token, prob, score, *given_state, lookahead, config, cores=2)
    for a, b in zip(got, chosen, strict=True):
        assert a.equal(b)
    eos = state.eos[:, 0].contiguous()
    spawned = lopa_kernels.spawn_branches(
        given_state[0], eos, token, score, chosen.columns, eos_id=config.eos_id, backend="reference"
    )
    eos_id = -1 if config.eos_id is None else config.eos_id
    branches = kernels.spawn_branches(
        given_state[0], eos, token, score, chosen.columns, eos_id, cores=2
    )
    for a, b in zip(branches, spawned, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("run", RUNS)
def test_recorded_rounds(run: str) -> None:
    """The published loop's rounds from their logits: confidence and branch kernels, end to end."""
    trace, logits, _ = load(run)
    slots, columns = trace["branching_factor"] + 1, 0
    for record in trace["rounds"]:
        lengths = [len(branch["tokens"]) - record["cache_len"] for branch in record["branches"]]
        columns = max(columns, *lengths)
    config = make_config(trace, columns + trace["block_size"])
    for index, record in enumerate(trace["rounds"]):
        window = columns + trace["block_size"]
        state = make_state(record, trace, slots, window)
        scores = place(record, logits[index], slots, window)
        out = kernels.lopa_step(scores, state, config, cores=7)
        order = in_slot_order(record)
        assert int(out.status) == 0
        winner = record["winner"]
        assert int(out.winner) == (order.index(winner) if winner in order else 0)
        expected = torch.tensor([record["score"][i] for i in order])
        torch.testing.assert_close(out.confidence[0, : len(order)], expected, rtol=1e-4, atol=2e-5)
        assert int(out.filled) == len(record["filled_positions"])
        cache_len, U = record["cache_len"], int(state.commit_len)
        committed = record["winner_tokens_after_fill"][cache_len : cache_len + U]
        assert out.committed[0, :U].tolist() == committed
        assert bool((out.committed[0, U:] == -1).all())
        if index + 1 < len(trace["rounds"]):
            check_next(out.state, trace["rounds"][index + 1])


@pytest.mark.parametrize("shift", [False, True])
def test_step_from_gathered_rows_with_faults(shift: bool) -> None:
    """Rows by a map; one missing, one without a finite logit, one with a NaN: see the status."""
    rng = random.Random(3)
    state = random_state(rng, 4, 3, 16, 4)
    state = state._replace(done=torch.zeros_like(state.done))
    config = random_config(rng, 4, branches=3, shift=shift, metric="margin", eos_id=None)
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(4, 3, 16, 10, generator=generator)
    needed = lopa_kernels.needed_rows(state, config, backend="reference")
    gathered = dense.flatten(0, 2)[needed.index]
    count = int(needed.count)
    assert count > 4
    gathered[1] = -math.inf
    gathered[count - 1, 3] = math.nan
    rows = needed.rows.clone()
    rows[rows == count // 2] = -1
    for given_rows in (needed.rows, rows):
        expected = lopa_kernels.lopa_step(gathered, state, config, given_rows, backend="cpu")
        actual = kernels.lopa_step(gathered, state, config, given_rows, cores=3)
        assert_close(actual, expected, 1e-5)
        assert int(expected.status.sum()) > 0


def test_window_beyond_the_memory_is_refused() -> None:
    rng = random.Random(1)
    state = random_state(rng, 1, 1, 6000, 8)
    config = random_config(rng, 8, branches=1)
    with pytest.raises(ValueError, match=r"a window of W columns needs"):
        kernels.branch_step(*random_stats(rng, (1, 1, 6000)), state, config)


def test_results_do_not_depend_on_order_of_sequences() -> None:
    rng = random.Random(11)
    state = random_state(rng, 3, 3, 24, 4)
    config = random_config(rng, 4, branches=3)
    statistics = random_stats(rng, (3, 3, 24))
    whole = kernels.branch_step(*statistics, state, config)
    alone = [
        kernels.branch_step(
            *(values[b : b + 1] for values in statistics),
            type(state)(*(field[b : b + 1] for field in state)),
            config,
        )
        for b in range(3)
    ]
    for b, one in enumerate(alone):
        assert one.confidence[0].equal(whole.confidence[b])
        assert one.state.tokens[0].equal(whole.state.tokens[b])
    assert all(a.winner.shape == b.winner.shape for a, b in pairwise(alone))
