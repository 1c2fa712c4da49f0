"""lopa_step, branch_step and needed_rows: one round."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import run_on
from hypothesis import given, settings
from hypothesis import strategies as st
from states import (
    FORMS,
    MASK,
    VOCAB,
    Drawn,
    assert_close,
    assert_same,
    clone,
    examples,
    fields,
    random_config,
    random_state,
    random_stats,
    rounds_on,
    sample_inputs,
)
from targets import KERNELS, TARGETS, Target, over

import lopa_kernels
from lopa_kernels import (
    LopaConfig,
    LopaState,
    LopaStep,
    Status,
    branch_step,
    branch_step_out,
    empty_step,
    initial_state,
    lopa_step,
    needed_rows,
    token_confidence,
)


def make_state(
    windows: list[list[int]],
    *,
    cache_len: int = 0,
    commit_len: int = 0,
    prompt_len: int = 0,
    columns: int | None = None,
    creation: list[float] | None = None,
) -> LopaState:
    """One sequence whose live branches hold `windows`."""
    columns = columns or max(len(w) for w in windows)
    tokens = torch.full((1, len(windows), columns), MASK)
    for k, window in enumerate(windows):
        tokens[0, k, : len(window)] = torch.tensor(window)

    def number(value: int) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.int32)

    return LopaState(
        tokens,
        torch.tensor([[len(w) for w in windows]], dtype=torch.int32),
        torch.tensor([creation or [1.0] * len(windows)]),
        torch.zeros(1, len(windows), dtype=torch.bool),
        number(len(windows)),
        number(cache_len),
        number(commit_len),
        number(prompt_len),
        torch.tensor([7]),
        torch.tensor([0.25]),
        torch.tensor([0.125]),
        torch.tensor([False]),
    )


def stats(scores: list[list[float]], token: int = 1) -> tuple[torch.Tensor, ...]:
    score = torch.tensor([scores])
    return torch.full(score.shape, token), score.clone(), score


CONFIG = LopaConfig(
    mask_id=MASK, max_new_tokens=12, block_size=4, tau_conf=0.5, metric="prob", tau_add=0.5
)
M = MASK


@over(TARGETS)
class TestRules:
    """The rules of a round, each on a state small enough to follow by eye."""

    def test_accepts_above_threshold_strictly(self, target: Target) -> None:
        state = make_state([[M, M, M, M]], columns=8)
        out = run_on(target, branch_step, *stats([[0.5, 0.6, 0.7, 0.1] + [0.0] * 4]), state, CONFIG)
        assert out.state.tokens[0, 0, :4].tolist() == [M, 1, 1, M]
        assert int(out.filled) == 2

    def test_activated_block_forces_its_best_and_ties_go_left(self, target: Target) -> None:
        state = make_state([[M, M, M, M, M, M, M, M]])
        out = run_on(
            target, branch_step, *stats([[0.1, 0.4, 0.4, 0.2, 0.5, 0.5, 0.1, 0.1]]), state, CONFIG
        )
        # The second block is not activated: the first is not filled to tau_act.
        assert out.state.tokens[0, 0].tolist() == [M, 1, M, M, M, M, M, M]

    def test_unactivated_block_accepts_by_confidence(self, target: Target) -> None:
        state = make_state([[M, M, M, M, M, M, M, M]])
        out = run_on(
            target, branch_step, *stats([[0.1, 0.4, 0.3, 0.2, 0.9, 0.5, 0.1, 0.1]]), state, CONFIG
        )
        assert out.state.tokens[0, 0].tolist() == [M, 1, M, M, 1, M, M, M]

    def test_window_fallback_fills_one_column_of_all(self, target: Target) -> None:
        state = make_state([[M, M, M, M, M, M, M, M]])
        config = replace(CONFIG, fallback="window")
        out = run_on(
            target, branch_step, *stats([[0.1, 0.4, 0.3, 0.2, 0.45, 0.5, 0.1, 0.1]]), state, config
        )
        assert out.state.tokens[0, 0].tolist() == [M, M, M, M, M, 1, M, M]

    def test_winner_ties_prefer_lookahead_and_the_lowest_slot(self, target: Target) -> None:
        state = make_state([[M, M, M, M], [2, M, M, M], [3, M, M, M]])
        out = run_on(target, branch_step, *stats([[0.4] * 4] * 3), state, CONFIG)
        assert int(out.winner) == 1
        assert out.confidence.tolist() == [[pytest.approx(0.4)] * 3]

    def test_anchor_wins_when_better_or_forced(self, target: Target) -> None:
        state = make_state([[M, M, M, M], [2, M, M, M]])
        better = stats([[0.4] * 4, [0.3] * 4])
        assert int(run_on(target, branch_step, *better, state, CONFIG).winner) == 0
        forced = replace(CONFIG, force_anchor=True)
        worse = stats([[0.3] * 4, [0.4] * 4])
        assert int(run_on(target, branch_step, *worse, state, forced).winner) == 0

    def test_spawns_the_best_open_columns(self, target: Target) -> None:
        state = make_state([[M, M, M, M], [2, M, M, M], [3, M, M, M]], columns=8)
        scores = [0.2, 0.3, 0.1, 0.3] + [0.0] * 4
        out = run_on(target, branch_step, *stats([scores, [0.0] * 8, [0.0] * 8]), state, CONFIG)
        # Column 1 is forced; 3, then 0, make lookahead branches.
        assert out.state.tokens[0, :, :4].tolist() == [[M, 1, M, M], [M, 1, M, 1], [1, 1, M, M]]
        assert out.state.creation[0].tolist() == [1.0, pytest.approx(0.3), pytest.approx(0.2)]
        assert int(out.state.branches) == 3

    def test_opens_blocks_branch_by_branch(self, target: Target) -> None:
        state = make_state([[M, M, M, M], [M, M, M, M]], columns=8)
        scores = [0.9, 0.3, 0.1, 0.2] + [0.0] * 4
        out = run_on(target, branch_step, *stats([scores, scores]), state, CONFIG)
        # tau_add = 0.5 of 4: the anchor has one token, the lookahead two.
        assert out.state.length[0].tolist() == [4, 8]

    def test_commits_slides_and_opens(self, target: Target) -> None:
        state = make_state(
            [[1, 2, 3, 4, M, 5, 6, 7]], cache_len=4, commit_len=4, prompt_len=4, columns=8
        )
        out = run_on(target, branch_step, *stats([[0.0] * 4 + [0.9] + [0.0] * 3]), state, CONFIG)
        assert out.committed.tolist() == [[1, 2, 3, 4, -1, -1, -1, -1]]
        assert int(out.state.cache_len) == 8
        assert int(out.state.commit_len) == 4
        assert out.state.tokens[0, 0].tolist() == [1, 5, 6, 7, M, M, M, M]
        assert int(out.state.length) == 8

    def test_a_block_waits_for_room_and_the_sequence_is_not_done(self, target: Target) -> None:
        state = make_state([[1, 1, 1, M]], columns=4)
        config = replace(CONFIG, tau_add=1.0, max_new_tokens=8)
        out = run_on(target, branch_step, *stats([[0.0, 0.0, 0.0, 0.9]]), state, config)
        assert (int(out.state.length), bool(out.state.done)) == (4, False)
        out = run_on(target, branch_step, *stats([[0.0] * 4]), out.state, config)
        assert out.committed.tolist() == [[1, 1, 1, 1]]
        assert (int(out.filled), int(out.state.length), bool(out.state.done)) == (0, 4, False)

    def test_eos_stops_opening_but_not_filling(self, target: Target) -> None:
        config = replace(CONFIG, eos_id=1)
        state = make_state([[2, 2, M, M]], columns=8)
        out = run_on(target, branch_step, *stats([[0.0, 0.0, 0.9, 0.2] + [0.0] * 4]), state, config)
        assert bool(out.state.eos[0, 0])
        assert (int(out.state.length[0, 0]), bool(out.state.done)) == (4, False)
        out = run_on(target, branch_step, *stats([[0.9] * 8]), out.state, config)
        assert bool(out.state.done)

    def test_block_completed_by_lookahead_only_is_not_committed(self, target: Target) -> None:
        config = replace(CONFIG, branches=2, tau_conf=0.95)
        state = make_state([[1, 1, M, M]], columns=8)
        out = run_on(target, branch_step, *stats([[0, 0, 0.9, 0.8, 0, 0, 0, 0.0]]), state, config)
        assert out.state.tokens[0, 1, :4].tolist() == [1, 1, 1, 1]
        assert int(out.state.commit_len) == 0

    def test_shift_moves_statistics_and_the_carry(self, target: Target) -> None:
        config = replace(CONFIG, shift=True, tau_conf=0.2)
        state = make_state([[M, M, M, M]], columns=8)
        token = torch.arange(8).view(1, 1, 8)
        score = torch.tensor([[[0.3, 0.1, 0.6] + [0.0] * 5]])
        out = run_on(target, branch_step, token, score, score, state, config)
        # Column 0 takes the carried token (0.25 > 0.2), column 1 row 0's, column 3 row 2's.
        assert out.state.tokens[0, 0, :4].tolist() == [7, 0, M, 2]
        assert int(out.state.carry_token) == 7  # no commit: the carry stays

    def test_carry_is_the_last_committed_row(self, target: Target) -> None:
        config = replace(CONFIG, shift=True)
        state = make_state([[1, 2, 3, 4, M, M, M, M]], commit_len=4, columns=8)
        token = torch.arange(8).view(1, 1, 8)
        score = torch.linspace(0.1, 0.8, 8).view(1, 1, 8)
        out = run_on(target, branch_step, token, score, score, state, config)
        assert int(out.state.carry_token) == 3
        assert float(out.state.carry_score) == pytest.approx(0.4)

    def test_a_prediction_of_the_mask_fills_nothing(self, target: Target) -> None:
        state = make_state([[M, M, M, M]], columns=8)
        out = run_on(target, branch_step, *stats([[0.9] * 8], token=MASK), state, CONFIG)
        assert (int(out.filled), bool(out.state.done)) == (0, True)
        assert int(out.status) == Status.STALLED

    def test_prompt_may_hold_the_mask_id(self, target: Target) -> None:
        prompt = torch.tensor([[1, MASK, 2]])
        config = replace(CONFIG, branches=2, window=8)
        state = initial_state(prompt, config)
        out = run_on(target, branch_step, *stats([[0.9] * 7]), state, config)
        assert out.committed[0, :3].tolist() == [1, MASK, 2]
        assert (int(out.filled), int(out.state.cache_len)) == (4, 3)

    def test_next_window_too_small(self, target: Target) -> None:
        config = replace(CONFIG, window=4)
        state = make_state([[M] * 8])
        out = run_on(target, branch_step, *stats([[0.3] * 8]), state, config)
        assert (int(out.status), bool(out.state.done)) == (Status.WINDOW_FULL, True)
        assert out.state.length.tolist() == [[4]]

    def test_done_sequences_pass_through(self, target: Target) -> None:
        state = make_state([[1, 2, 3, 4]], columns=8)._replace(done=torch.tensor([True]))
        out = run_on(target, branch_step, *stats([[0.9] * 8]), state, CONFIG)
        assert int(out.filled) == 0
        for name, tensor in state._asdict().items():
            assert torch.equal(getattr(out.state, name), tensor), name


@over(KERNELS)
def test_equals_reference(target: Target) -> None:
    @settings(max_examples=examples(target, 400))
    @given(drawn=rounds_on(target))
    def check(drawn: Drawn) -> None:
        expected = branch_step(*drawn, backend="reference")
        assert_same(run_on(target, branch_step, *drawn), expected)
        needed = needed_rows(drawn.state, drawn.config, backend="reference")
        got = run_on(target, needed_rows, drawn.state, drawn.config)
        for a, b in zip(got, needed, strict=True):
            assert torch.equal(a, b)

    check()


@pytest.mark.parametrize(
    ("branches", "window", "block_size"), [(64, 300, 32), (3, 4096, 64), (17, 1023, 1)]
)
@over(KERNELS)
def test_many_branches_and_columns(
    target: Target, branches: int, window: int, block_size: int
) -> None:
    """More of each than a kernel works on at once."""
    rng = random.Random(window)
    state = random_state(rng, 2, branches, window, block_size)
    config = random_config(rng, block_size, branches=branches)
    statistics = random_stats(rng, (2, branches, window))
    expected = branch_step(*statistics, state, config, backend="reference")
    assert_same(run_on(target, branch_step, *statistics, state, config), expected)
    for capacity in (10, None):
        needed = needed_rows(state, config, capacity, backend="reference")
        got = run_on(target, needed_rows, state, config, capacity)
        for a, b in zip(got, needed, strict=True):
            assert torch.equal(a, b)


@over(TARGETS)
def test_out_and_in_place_equal_functional(target: Target) -> None:
    backend = target.backend

    @settings(max_examples=examples(target, 100))
    @given(drawn=rounds_on(target, max_branches=4, max_window=40))
    def check(drawn: Drawn) -> None:
        *statistics, state, config = target.to(drawn)
        before = clone(state)
        expected = branch_step(*statistics, state, config, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
        out = empty_step(state, config)
        branch_step_out(*statistics, state, config, out, backend=backend)
        assert_same(out, expected)
        slots, window = state.tokens.shape[1:]
        if config.branches in (None, slots) and config.window in (None, window):
            own = clone(state)
            buffers = LopaStep(own, *empty_step(state, config)[1:])
            branch_step_out(*statistics, own, config, buffers, backend=backend)
            assert_same(buffers, expected)

    check()


def check_garbage(target: Target, seed: int) -> None:
    form = random.Random(seed % 16)
    rng = random.Random(seed)
    batch, slots, window = rng.randint(1, 3), form.randint(1, 5), form.randint(4, 20)
    state = random_state(rng, batch, slots, window, 4)
    config = random_config(rng, 4, **{name: form.choice(FORMS[name]) for name in FORMS})
    extremes = [-(2**31), -1, 0, 1, 3, window, window + 1, 2**31 - 1]
    spoiled = state._replace(
        **{
            name: torch.tensor(
                [rng.choice(extremes) for _ in range(tensor.numel())], dtype=torch.int32
            ).view(tensor.shape)
            for name, tensor in state._asdict().items()
            if tensor.dtype == torch.int32 and rng.random() < 0.5
        }
    )
    statistics = random_stats(rng, (batch, slots, window))
    out = run_on(target, branch_step, *statistics, spoiled, config)
    assert_same(out, branch_step(*statistics, spoiled, config, backend="reference"))
    new = out.state
    assert bool((new.length >= 0).all())
    assert bool((new.length <= new.tokens.shape[2]).all())
    assert bool((new.branches >= 1).all())
    assert bool((new.branches <= new.tokens.shape[1]).all())
    assert bool((out.winner >= 0).all())
    assert bool((out.winner < slots).all())
    needed = needed_rows(spoiled, config, backend="reference")
    for a, b in zip(run_on(target, needed_rows, spoiled, config), needed, strict=True):
        assert torch.equal(a, b)


@over(KERNELS)
def test_garbage_states_stay_in_bounds(target: Target) -> None:
    @settings(max_examples=examples(target, 200))
    @given(seed=st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        check_garbage(target, seed)

    check()


def logits_for(drawn: Drawn, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (*drawn.state.tokens.shape, VOCAB)
    logits = torch.randn(shape, generator=generator) * 3
    # Ties within rows, and whole rows that tie with others.
    logits = torch.round(logits) if seed % 3 == 0 else logits
    if seed % 5 == 0:
        logits[torch.rand(shape[:-1], generator=generator) < 0.1] = float("nan")
        logits[torch.rand(shape, generator=generator) < 0.02] = float("-inf")
    return logits.to(dtype)


def check_step_from_logits(
    target: Target, drawn: Drawn, seed: int, metric: str, dtype: torch.dtype
) -> None:
    backend = target.backend
    state = target.to(drawn.state)
    config = replace(drawn.config, metric=metric)
    logits = target.to(logits_for(drawn, seed, dtype))
    step = lopa_step(logits, state, config, backend=backend)

    # The same round from its parts.
    confidence = token_confidence(logits, metric=metric, backend=backend)
    parts = branch_step(*confidence, state, config, backend=backend)
    # A NaN beside finite logits is only visible to the pass over the vocabulary.
    assert_same(step._replace(status=parts.status), parts)
    assert bool(((step.status & ~Status.NONFINITE) == (parts.status & ~Status.NONFINITE)).all())

    # The same round from the needed rows alone, the others NaN.
    needed = needed_rows(state, config, backend=backend)
    count = int(needed.count)
    gathered = logits.flatten(0, 2)[needed.index[:count]]
    assert_same(lopa_step(gathered, state, config, needed.rows, backend=backend), step)

    # Strided logits are read in place.
    shape = (*logits.shape[:-1], VOCAB + 3)
    wide = torch.full(shape, float("nan"), dtype=dtype, device=logits.device)
    wide[..., :VOCAB] = logits
    assert_same(lopa_step(wide[..., :VOCAB], state, config, backend=backend), step)


METRICS = st.sampled_from(["prob", "margin", "neg_entropy"])


@over(KERNELS)
def test_step_from_logits(target: Target) -> None:
    sizes = (2, 8) if target.interpreted else (5, 60)

    @settings(max_examples=examples(target, 100))
    @given(
        drawn=rounds_on(target, *sizes),
        seed=st.integers(0, 1000),
        metric=METRICS,
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    )
    def check(drawn: Drawn, seed: int, metric: str, dtype: torch.dtype) -> None:
        check_step_from_logits(target, drawn, seed, metric, dtype)

    check()


@over(KERNELS)
def test_step_equals_reference_where_decisions_are_clear(target: Target) -> None:
    """Against the float64 statistics of the reference; decisions at fp32 distance may differ."""
    sizes = (2, 12) if target.interpreted else (4, 30)

    @settings(max_examples=examples(target, 50))
    @given(drawn=rounds_on(target, *sizes), seed=st.integers(0, 1000))
    def check(drawn: Drawn, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn((*drawn.state.tokens.shape, VOCAB), generator=generator) * 3
        actual = run_on(target, lopa_step, logits, drawn.state, drawn.config)
        expected = lopa_step(logits, drawn.state, drawn.config, backend="reference")
        assert_close(actual, expected, 2e-5)

    check()


@over([target for target in KERNELS if target.backend != "cpu"])
def test_step_equals_the_cpu(target: Target) -> None:
    sizes = (2, 12) if target.interpreted else (5, 60)

    @settings(max_examples=examples(target, 100))
    @given(
        drawn=rounds_on(target, *sizes),
        seed=st.integers(0, 1000),
        metric=METRICS,
        named=st.booleans(),
    )
    def check(drawn: Drawn, seed: int, metric: str, named: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        state, config = drawn.state, replace(drawn.config, metric=metric)
        logits = torch.randn((*state.tokens.shape, VOCAB), generator=generator) * 3
        rows = None
        if named:
            needed = needed_rows(state, config, backend="cpu")
            logits = logits.flatten(0, 2)[needed.index[: int(needed.count)]]
            missing = torch.rand(needed.rows.shape, generator=generator) < 0.1
            rows = torch.where(missing, -1, needed.rows)
        actual = run_on(target, lopa_step, logits, state, config, rows)
        assert_close(actual, lopa_step(logits, state, config, rows, backend="cpu"), 1e-5)

    check()


@over(TARGETS)
def test_shift_equals_rolled_logits(target: Target) -> None:
    generator = torch.Generator().manual_seed(0)
    state = make_state([[1, 2, 3, 4, M, M, 5, M]] * 2, cache_len=4, commit_len=4, columns=12)
    logits = torch.randn(1, 2, 12, VOCAB, generator=generator) * 4
    config = replace(CONFIG, shift=True)
    shifted = run_on(target, lopa_step, logits, state, config)
    plain = run_on(target, lopa_step, logits.roll(1, dims=2), state, CONFIG)
    for name in ("tokens", "length", "creation", "branches", "commit_len"):
        assert torch.equal(getattr(shifted.state, name), getattr(plain.state, name)), name
    assert torch.equal(shifted.confidence, plain.confidence)
    row = token_confidence(logits[0, int(shifted.winner), 3], metric="prob", backend="cpu")
    assert int(shifted.state.carry_token) == int(row.token)
    assert float(shifted.state.carry_prob) == pytest.approx(float(row.prob))


@over(TARGETS)
class TestStatus:
    def test_nan_in_a_needed_row_is_reported(self, target: Target) -> None:
        state = make_state([[M, 1, M, M]], columns=4)
        logits = torch.zeros(1, 1, 4, VOCAB)
        logits[..., 2] = 5.0
        clean = run_on(target, lopa_step, logits, state, CONFIG)
        assert int(clean.status) == 0
        logits[0, 0, 1] = float("nan")  # column 1 is not open
        assert int(run_on(target, lopa_step, logits, state, CONFIG).status) == 0
        logits[0, 0, 2, 4] = float("nan")
        out = run_on(target, lopa_step, logits, state, CONFIG)
        assert int(out.status) == Status.NONFINITE
        assert torch.equal(out.state.tokens, clean.state.tokens)

    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    def test_rows_without_finite_logits_still_decode(self, target: Target, value: float) -> None:
        state = make_state([[M, M, M, M]], columns=4)
        config = replace(CONFIG, max_new_tokens=4)
        logits = torch.full((1, 1, 4, VOCAB), value)
        for filled in range(1, 5):
            out = run_on(target, lopa_step, logits, state, config)
            assert int(out.status) == Status.NONFINITE
            state = out.state
            assert int((state.tokens != MASK).sum()) == filled
        assert bool(state.done)
        assert state.tokens.tolist() == [[[0, 0, 0, 0]]]

    def test_rows_missing_or_out_of_range(self, target: Target) -> None:
        state = make_state([[M, M, 1, M]], columns=4)
        logits = torch.zeros(2, VOCAB)
        logits[:, 2] = 5.0
        for bad in (-1, 2, 2**31 - 1):
            rows = torch.tensor([[[0, bad, -1, 1]]], dtype=torch.int32)
            out = run_on(target, lopa_step, logits, state, CONFIG, rows)
            assert int(out.status) == Status.MISSING_ROW | Status.NONFINITE
            assert out.state.tokens.tolist() == [[[2, M, 1, 2]]]

    @pytest.mark.parametrize("live", [0, -1, 3, 2**31 - 1])
    def test_more_branches_than_slots(self, target: Target, live: int) -> None:
        state = make_state([[M, M, 1, M], [M, 2, 1, M]], columns=4)
        bad = state._replace(branches=torch.tensor([live], dtype=torch.int32))
        out = run_on(target, lopa_step, torch.zeros(1, 2, 4, VOCAB), bad, CONFIG)
        assert (int(out.status), bool(out.state.done)) == (Status.BAD_STATE, True)
        assert (int(out.winner), int(out.filled)) == (0, 0)
        assert torch.equal(out.state.tokens, state.tokens)
        assert int(run_on(target, needed_rows, bad, CONFIG).count) == 0

    def test_capacity_of_needed_rows(self, target: Target) -> None:
        state = make_state([[M, M, 1, M]], columns=4)
        needed = run_on(target, needed_rows, state, CONFIG, capacity=2)
        assert (needed.index.tolist(), int(needed.count)) == ([0, 1], 3)
        assert needed.rows.tolist() == [[[0, 1, -1, -1]]]
        wide = run_on(target, needed_rows, state, CONFIG, capacity=6)
        assert wide.index.tolist() == [0, 1, 3, 0, 0, 0]


@over(KERNELS)
def test_status_bits_of_one_sequence_leave_others_alone(target: Target) -> None:
    rng = random.Random(3)
    state = random_state(rng, 4, 3, 16, 4)._replace(done=torch.zeros(4, dtype=torch.bool))
    config = random_config(rng, 4, shift=False)
    statistics = random_stats(random.Random(5), (4, 3, 16))
    alone = run_on(target, branch_step, *statistics, state, config)
    length = state.length.clone()
    length[1] = 99
    out = run_on(target, branch_step, *statistics, state._replace(length=length), config)
    assert int(out.status[1]) == Status.BAD_STATE
    for name, tensor in fields(out).items():
        keep = torch.tensor([0, 2, 3])
        expected = fields(alone)[name][keep]
        torch.testing.assert_close(tensor[keep], expected, rtol=0, atol=0, equal_nan=True)


@over(KERNELS)
def test_batch_is_independent_of_threads_and_order(target: Target, restore_threads: None) -> None:
    rng = random.Random(11)
    batch, window = (8, 64) if target.interpreted else (64, 128)
    state = random_state(rng, batch, 8, window, 32)
    statistics = random_stats(rng, (batch, 8, window))
    config = random_config(rng, 32, branches=None)
    torch.set_num_threads(1)
    one = run_on(target, branch_step, *statistics, state, config)
    torch.set_num_threads(2)
    assert_same(run_on(target, branch_step, *statistics, state, config), one)
    backwards = (*(t.flip(0) for t in statistics), LopaState(*(t.flip(0) for t in state)))
    flipped = run_on(target, branch_step, *backwards, config)
    for name, tensor in fields(flipped).items():
        torch.testing.assert_close(
            tensor.flip(0), fields(one)[name], rtol=0, atol=0, equal_nan=True
        )


@over(KERNELS)
def test_outputs_are_checked_before_anything_is_written(target: Target) -> None:
    _, state, config = target.to(sample_inputs())
    statistics = target.to(random_stats(random.Random(0), tuple(state.tokens.shape)))
    for spoil, message in (
        (torch.Tensor.double, "next_creation: expected"),
        (lambda t: t[:, :-1], "next_creation: expected shape"),
        (lambda t: t.repeat(1, 2)[:, ::2], "contiguous"),
    ):
        out = empty_step(state, config)
        before = clone(out.state)
        bad = out.state._replace(creation=spoil(out.state.creation))
        with pytest.raises(RuntimeError, match=message):
            branch_step_out(
                *statistics, state, config, out._replace(state=bad), backend=target.backend
            )
        assert torch.equal(out.state.tokens, before.tokens)


def test_backend_selection() -> None:
    assert lopa_kernels.get_backend() == "auto"
    with lopa_kernels.use_backend("reference"):
        assert lopa_kernels.get_backend() == "reference"
        with pytest.raises(ValueError, match="set_backend: expected one of"):
            lopa_kernels.set_backend("none")
    assert lopa_kernels.get_backend() == "auto"


def test_numpy_in_numpy_out() -> None:
    logits, state, config = sample_inputs()
    expected = lopa_step(logits, state, config)
    arrays = LopaState(*(t.numpy() for t in state))
    out = lopa_step(logits.numpy(), arrays, config)
    for name, tensor in fields(expected).items():
        array = fields(out)[name]
        assert isinstance(array, np.ndarray), name
        np.testing.assert_array_equal(array, tensor.numpy(), err_msg=name)


@over(KERNELS)
def test_sampled_round_is_keyed_by_seed_and_step(target: Target) -> None:
    logits, state, config = sample_inputs()
    if target.interpreted:  # a second for a row
        logits, state = logits[:1, :1, :4], make_state([[M, M, 1, M]])
    sampled = replace(config, temperature=1.5)
    keys = [{"seed": torch.tensor(7), "step": torch.tensor(step)} for step in range(2)]

    def run(step: int) -> LopaStep:
        return run_on(target, lopa_step, logits, state, sampled, **keys[step])

    assert_same(run(0), run(0))
    options = {"metric": config.metric, "temperature": 1.5}
    tokens = [run_on(target, token_confidence, logits, **options, **key) for key in keys]
    assert not torch.equal(tokens[0].token, tokens[1].token)
    assert_same(run(1), run_on(target, branch_step, *tokens[1], state, sampled))
