"""lopa_step, branch_step and needed_rows: one round."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import (
    MASK,
    VOCAB,
    Drawn,
    assert_same,
    clone,
    fields,
    random_config,
    random_state,
    random_stats,
    rounds,
    sample_inputs,
)

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

BACKENDS = ["reference", "cpu"]


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


@pytest.mark.parametrize("backend", BACKENDS)
class TestRules:
    """The rules of a round, each on a state small enough to follow by eye."""

    def test_accepts_above_threshold_strictly(self, backend: str) -> None:
        state = make_state([[M, M, M, M]], columns=8)
        out = branch_step(
            *stats([[0.5, 0.6, 0.7, 0.1] + [0.0] * 4]), state, CONFIG, backend=backend
        )
        assert out.state.tokens[0, 0, :4].tolist() == [M, 1, 1, M]
        assert int(out.filled) == 2

    def test_activated_block_forces_its_best_and_ties_go_left(self, backend: str) -> None:
        state = make_state([[M, M, M, M, M, M, M, M]])
        out = branch_step(
            *stats([[0.1, 0.4, 0.4, 0.2, 0.5, 0.5, 0.1, 0.1]]), state, CONFIG, backend=backend
        )
        # The second block is not activated: the first is not filled to tau_act.
        assert out.state.tokens[0, 0].tolist() == [M, 1, M, M, M, M, M, M]

    def test_unactivated_block_accepts_by_confidence(self, backend: str) -> None:
        state = make_state([[M, M, M, M, M, M, M, M]])
        out = branch_step(
            *stats([[0.1, 0.4, 0.3, 0.2, 0.9, 0.5, 0.1, 0.1]]), state, CONFIG, backend=backend
        )
        assert out.state.tokens[0, 0].tolist() == [M, 1, M, M, 1, M, M, M]

    def test_window_fallback_fills_one_column_of_all(self, backend: str) -> None:
        state = make_state([[M, M, M, M, M, M, M, M]])
        config = LopaConfig(**{**CONFIG.__dict__, "fallback": "window"})
        out = branch_step(
            *stats([[0.1, 0.4, 0.3, 0.2, 0.45, 0.5, 0.1, 0.1]]), state, config, backend=backend
        )
        assert out.state.tokens[0, 0].tolist() == [M, M, M, M, M, 1, M, M]

    def test_winner_ties_prefer_lookahead_and_the_lowest_slot(self, backend: str) -> None:
        state = make_state([[M, M, M, M], [2, M, M, M], [3, M, M, M]])
        out = branch_step(*stats([[0.4] * 4] * 3), state, CONFIG, backend=backend)
        assert int(out.winner) == 1
        assert out.confidence.tolist() == [[pytest.approx(0.4)] * 3]

    def test_anchor_wins_when_better_or_forced(self, backend: str) -> None:
        state = make_state([[M, M, M, M], [2, M, M, M]])
        better = stats([[0.4] * 4, [0.3] * 4])
        assert int(branch_step(*better, state, CONFIG, backend=backend).winner) == 0
        forced = LopaConfig(**{**CONFIG.__dict__, "force_anchor": True})
        worse = stats([[0.3] * 4, [0.4] * 4])
        assert int(branch_step(*worse, state, forced, backend=backend).winner) == 0

    def test_spawns_the_best_open_columns(self, backend: str) -> None:
        state = make_state([[M, M, M, M], [2, M, M, M], [3, M, M, M]], columns=8)
        scores = [0.2, 0.3, 0.1, 0.3] + [0.0] * 4
        out = branch_step(*stats([scores, [0.0] * 8, [0.0] * 8]), state, CONFIG, backend=backend)
        # Column 1 is forced; 3, then 0, make lookahead branches.
        assert out.state.tokens[0, :, :4].tolist() == [[M, 1, M, M], [M, 1, M, 1], [1, 1, M, M]]
        assert out.state.creation[0].tolist() == [1.0, pytest.approx(0.3), pytest.approx(0.2)]
        assert int(out.state.branches) == 3

    def test_opens_blocks_branch_by_branch(self, backend: str) -> None:
        state = make_state([[M, M, M, M], [M, M, M, M]], columns=8)
        scores = [0.9, 0.3, 0.1, 0.2] + [0.0] * 4
        out = branch_step(*stats([scores, scores]), state, CONFIG, backend=backend)
        # tau_add = 0.5 of 4: the anchor has one token, the lookahead two.
        assert out.state.length[0].tolist() == [4, 8]

    def test_commits_slides_and_opens(self, backend: str) -> None:
        state = make_state(
            [[1, 2, 3, 4, M, 5, 6, 7]], cache_len=4, commit_len=4, prompt_len=4, columns=8
        )
        out = branch_step(*stats([[0.0] * 4 + [0.9] + [0.0] * 3]), state, CONFIG, backend=backend)
        assert out.committed.tolist() == [[1, 2, 3, 4, -1, -1, -1, -1]]
        assert int(out.state.cache_len) == 8
        assert int(out.state.commit_len) == 4
        assert out.state.tokens[0, 0].tolist() == [1, 5, 6, 7, M, M, M, M]
        assert int(out.state.length) == 8

    def test_a_block_waits_for_room_and_the_sequence_is_not_done(self, backend: str) -> None:
        state = make_state([[1, 1, 1, M]], columns=4)
        config = LopaConfig(**{**CONFIG.__dict__, "tau_add": 1.0, "max_new_tokens": 8})
        out = branch_step(*stats([[0.0, 0.0, 0.0, 0.9]]), state, config, backend=backend)
        assert (int(out.state.length), bool(out.state.done)) == (4, False)
        out = branch_step(*stats([[0.0] * 4]), out.state, config, backend=backend)
        assert out.committed.tolist() == [[1, 1, 1, 1]]
        assert (int(out.filled), int(out.state.length), bool(out.state.done)) == (0, 4, False)

    def test_eos_stops_opening_but_not_filling(self, backend: str) -> None:
        config = LopaConfig(**{**CONFIG.__dict__, "eos_id": 1})
        state = make_state([[2, 2, M, M]], columns=8)
        out = branch_step(
            *stats([[0.0, 0.0, 0.9, 0.2] + [0.0] * 4]), state, config, backend=backend
        )
        assert bool(out.state.eos[0, 0])
        assert (int(out.state.length[0, 0]), bool(out.state.done)) == (4, False)
        out = branch_step(*stats([[0.9] * 8]), out.state, config, backend=backend)
        assert bool(out.state.done)

    def test_block_completed_by_lookahead_only_is_not_committed(self, backend: str) -> None:
        config = LopaConfig(**{**CONFIG.__dict__, "branches": 2, "tau_conf": 0.95})
        state = make_state([[1, 1, M, M]], columns=8)
        out = branch_step(*stats([[0, 0, 0.9, 0.8, 0, 0, 0, 0.0]]), state, config, backend=backend)
        assert out.state.tokens[0, 1, :4].tolist() == [1, 1, 1, 1]
        assert int(out.state.commit_len) == 0

    def test_shift_moves_statistics_and_the_carry(self, backend: str) -> None:
        config = LopaConfig(**{**CONFIG.__dict__, "shift": True, "tau_conf": 0.2})
        state = make_state([[M, M, M, M]], columns=8)
        token = torch.arange(8).view(1, 1, 8)
        score = torch.tensor([[[0.3, 0.1, 0.6] + [0.0] * 5]])
        out = branch_step(token, score, score, state, config, backend=backend)
        # Column 0 takes the carried token (0.25 > 0.2), column 1 row 0's, column 3 row 2's.
        assert out.state.tokens[0, 0, :4].tolist() == [7, 0, M, 2]
        assert int(out.state.carry_token) == 7  # no commit: the carry stays

    def test_carry_is_the_last_committed_row(self, backend: str) -> None:
        config = LopaConfig(**{**CONFIG.__dict__, "shift": True})
        state = make_state([[1, 2, 3, 4, M, M, M, M]], commit_len=4, columns=8)
        token = torch.arange(8).view(1, 1, 8)
        score = torch.linspace(0.1, 0.8, 8).view(1, 1, 8)
        out = branch_step(token, score, score, state, config, backend=backend)
        assert int(out.state.carry_token) == 3
        assert float(out.state.carry_score) == pytest.approx(0.4)

    def test_a_prediction_of_the_mask_fills_nothing(self, backend: str) -> None:
        state = make_state([[M, M, M, M]], columns=8)
        out = branch_step(*stats([[0.9] * 8], token=MASK), state, CONFIG, backend=backend)
        assert (int(out.filled), bool(out.state.done)) == (0, True)
        assert int(out.status) == Status.STALLED

    def test_prompt_may_hold_the_mask_id(self, backend: str) -> None:
        prompt = torch.tensor([[1, MASK, 2]])
        config = LopaConfig(**{**CONFIG.__dict__, "branches": 2, "window": 8})
        state = initial_state(prompt, config)
        out = branch_step(*stats([[0.9] * 7]), state, config, backend=backend)
        assert out.committed[0, :3].tolist() == [1, MASK, 2]
        assert (int(out.filled), int(out.state.cache_len)) == (4, 3)

    def test_next_window_too_small(self, backend: str) -> None:
        config = LopaConfig(**{**CONFIG.__dict__, "window": 4})
        state = make_state([[M] * 8])
        out = branch_step(*stats([[0.3] * 8]), state, config, backend=backend)
        assert (int(out.status), bool(out.state.done)) == (Status.WINDOW_FULL, True)
        assert out.state.length.tolist() == [[4]]

    def test_done_sequences_pass_through(self, backend: str) -> None:
        state = make_state([[1, 2, 3, 4]], columns=8)._replace(done=torch.tensor([True]))
        out = branch_step(*stats([[0.9] * 8]), state, CONFIG, backend=backend)
        assert int(out.filled) == 0
        for name, tensor in state._asdict().items():
            assert torch.equal(getattr(out.state, name), tensor), name


@settings(max_examples=400)
@given(drawn=rounds())
def test_cpu_equals_reference(drawn: Drawn) -> None:
    expected = branch_step(*drawn, backend="reference")
    actual = branch_step(*drawn)
    assert_same(actual, expected)
    needed = needed_rows(drawn.state, drawn.config, backend="reference")
    for a, b in zip(needed_rows(drawn.state, drawn.config), needed, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=100)
@given(drawn=rounds(max_branches=4, max_window=40))
def test_out_and_in_place_equal_functional(drawn: Drawn) -> None:
    *statistics, state, config = drawn
    before = clone(state)
    expected = branch_step(*statistics, state, config)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    for backend in BACKENDS:
        out = empty_step(state, config)
        branch_step_out(*statistics, state, config, out, backend=backend)
        assert_same(out, expected)
        slots, window = state.tokens.shape[1:]
        if config.branches in (None, slots) and config.window in (None, window):
            own = clone(state)
            buffers = LopaStep(own, *empty_step(state, config)[1:])
            branch_step_out(*statistics, own, config, buffers, backend=backend)
            assert_same(buffers, expected)


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32 - 1))
def test_garbage_states_stay_in_bounds(seed: int) -> None:
    rng = random.Random(seed)
    batch, slots, window = rng.randint(1, 3), rng.randint(1, 5), rng.randint(4, 20)
    state = random_state(rng, batch, slots, window, 4)
    config = random_config(rng, 4)
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
    outs = [branch_step(*statistics, spoiled, config, backend=b) for b in BACKENDS]
    assert_same(outs[1], outs[0])
    new = outs[1].state
    assert bool((new.length >= 0).all())
    assert bool((new.length <= new.tokens.shape[2]).all())
    assert bool((new.branches >= 1).all())
    assert bool((new.branches <= new.tokens.shape[1]).all())
    assert bool((outs[1].winner >= 0).all())
    assert bool((outs[1].winner < slots).all())


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


@settings(max_examples=100)
@given(
    drawn=rounds(max_branches=5, max_window=60),
    seed=st.integers(0, 1000),
    metric=st.sampled_from(["prob", "margin", "neg_entropy"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_step_from_logits(drawn: Drawn, seed: int, metric: str, dtype: torch.dtype) -> None:
    state = drawn.state
    config = LopaConfig(**{**drawn.config.__dict__, "metric": metric})
    logits = logits_for(drawn, seed, dtype)
    step = lopa_step(logits, state, config)

    # The same round from its parts.
    confidence = token_confidence(logits, metric=metric)
    parts = branch_step(*confidence, state, config)
    # A NaN beside finite logits is only visible to the pass over the vocabulary.
    assert_same(step._replace(status=parts.status), parts)
    assert bool(((step.status & ~Status.NONFINITE) == (parts.status & ~Status.NONFINITE)).all())

    # The same round from the needed rows alone, the others NaN.
    needed = needed_rows(state, config)
    count = int(needed.count)
    gathered = logits.flatten(0, 2)[needed.index[:count]]
    assert_same(lopa_step(gathered, state, config, needed.rows), step)

    # Strided logits are read in place.
    wide = torch.full((*logits.shape[:-1], VOCAB + 3), float("nan"), dtype=dtype)
    wide[..., :VOCAB] = logits
    assert_same(lopa_step(wide[..., :VOCAB], state, config), step)


@settings(max_examples=50)
@given(drawn=rounds(max_branches=4, max_window=30), seed=st.integers(0, 1000))
def test_step_equals_reference_where_decisions_are_clear(drawn: Drawn, seed: int) -> None:
    """Against the float64 statistics of the reference; decisions at fp32 distance may differ."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((*drawn.state.tokens.shape, VOCAB), generator=generator) * 3
    actual = lopa_step(logits, drawn.state, drawn.config)
    expected = lopa_step(logits, drawn.state, drawn.config, backend="reference")
    for name, a in fields(actual).items():
        b = fields(expected)[name]
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_shift_equals_rolled_logits(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    state = make_state([[1, 2, 3, 4, M, M, 5, M]] * 2, cache_len=4, commit_len=4, columns=12)
    logits = torch.randn(1, 2, 12, VOCAB, generator=generator) * 4
    config = LopaConfig(**{**CONFIG.__dict__, "shift": True})
    shifted = lopa_step(logits, state, config, backend=backend)
    plain = lopa_step(logits.roll(1, dims=2), state, CONFIG, backend=backend)
    for name in ("tokens", "length", "creation", "branches", "commit_len"):
        assert torch.equal(getattr(shifted.state, name), getattr(plain.state, name)), name
    assert torch.equal(shifted.confidence, plain.confidence)
    row = token_confidence(logits[0, int(shifted.winner), 3], metric="prob")
    assert int(shifted.state.carry_token) == int(row.token)
    assert float(shifted.state.carry_prob) == pytest.approx(float(row.prob))


@pytest.mark.parametrize("backend", BACKENDS)
class TestStatus:
    def test_nan_in_a_needed_row_is_reported(self, backend: str) -> None:
        state = make_state([[M, 1, M, M]], columns=4)
        logits = torch.zeros(1, 1, 4, VOCAB)
        logits[..., 2] = 5.0
        clean = lopa_step(logits, state, CONFIG, backend=backend)
        assert int(clean.status) == 0
        logits[0, 0, 1] = float("nan")  # column 1 is not open
        assert int(lopa_step(logits, state, CONFIG, backend=backend).status) == 0
        logits[0, 0, 2, 4] = float("nan")
        out = lopa_step(logits, state, CONFIG, backend=backend)
        assert int(out.status) == Status.NONFINITE
        assert torch.equal(out.state.tokens, clean.state.tokens)

    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    def test_rows_without_finite_logits_still_decode(self, backend: str, value: float) -> None:
        state = make_state([[M, M, M, M]], columns=4)
        config = LopaConfig(**{**CONFIG.__dict__, "max_new_tokens": 4})
        logits = torch.full((1, 1, 4, VOCAB), value)
        for filled in range(1, 5):
            out = lopa_step(logits, state, config, backend=backend)
            assert int(out.status) == Status.NONFINITE
            state = out.state
            assert int((state.tokens != MASK).sum()) == filled
        assert bool(state.done)
        assert state.tokens.tolist() == [[[0, 0, 0, 0]]]

    def test_rows_missing_or_out_of_range(self, backend: str) -> None:
        state = make_state([[M, M, 1, M]], columns=4)
        logits = torch.zeros(2, VOCAB)
        logits[:, 2] = 5.0
        for bad in (-1, 2, 2**31 - 1):
            rows = torch.tensor([[[0, bad, -1, 1]]], dtype=torch.int32)
            out = lopa_step(logits, state, CONFIG, rows, backend=backend)
            assert int(out.status) == Status.MISSING_ROW | Status.NONFINITE
            assert out.state.tokens.tolist() == [[[2, M, 1, 2]]]

    @pytest.mark.parametrize("live", [0, -1, 3, 2**31 - 1])
    def test_more_branches_than_slots(self, backend: str, live: int) -> None:
        state = make_state([[M, M, 1, M], [M, 2, 1, M]], columns=4)
        bad = state._replace(branches=torch.tensor([live], dtype=torch.int32))
        out = lopa_step(torch.zeros(1, 2, 4, VOCAB), bad, CONFIG, backend=backend)
        assert (int(out.status), bool(out.state.done)) == (Status.BAD_STATE, True)
        assert (int(out.winner), int(out.filled)) == (0, 0)
        assert torch.equal(out.state.tokens, state.tokens)
        assert int(needed_rows(bad, CONFIG, backend=backend).count) == 0

    def test_capacity_of_needed_rows(self, backend: str) -> None:
        state = make_state([[M, M, 1, M]], columns=4)
        needed = needed_rows(state, CONFIG, capacity=2, backend=backend)
        assert (needed.index.tolist(), int(needed.count)) == ([0, 1], 3)
        assert needed.rows.tolist() == [[[0, 1, -1, -1]]]
        wide = needed_rows(state, CONFIG, capacity=6, backend=backend)
        assert wide.index.tolist() == [0, 1, 3, 0, 0, 0]


def test_status_bits_of_one_sequence_leave_others_alone() -> None:
    rng = random.Random(3)
    state = random_state(rng, 4, 3, 16, 4)._replace(done=torch.zeros(4, dtype=torch.bool))
    config = random_config(rng, 4, shift=False)
    statistics = random_stats(random.Random(5), (4, 3, 16))
    alone = branch_step(*statistics, state, config)
    length = state.length.clone()
    length[1] = 99
    out = branch_step(*statistics, state._replace(length=length), config)
    assert int(out.status[1]) == Status.BAD_STATE
    for name, tensor in fields(out).items():
        keep = torch.tensor([0, 2, 3])
        expected = fields(alone)[name][keep]
        torch.testing.assert_close(tensor[keep], expected, rtol=0, atol=0, equal_nan=True)


def test_batch_is_independent_of_threads_and_order() -> None:
    rng = random.Random(11)
    state = random_state(rng, 64, 8, 128, 32)
    statistics = random_stats(rng, (64, 8, 128))
    config = random_config(rng, 32, branches=None)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = branch_step(*statistics, state, config)
        torch.set_num_threads(2)
        two = branch_step(*statistics, state, config)
    finally:
        torch.set_num_threads(threads)
    assert_same(two, one)
    flipped = branch_step(
        *(t.flip(0) for t in statistics), LopaState(*(t.flip(0) for t in state)), config
    )
    for name, tensor in fields(flipped).items():
        torch.testing.assert_close(
            tensor.flip(0), fields(one)[name], rtol=0, atol=0, equal_nan=True
        )


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


def test_sampled_round_is_keyed_by_seed_and_step() -> None:
    logits, state, config = sample_inputs()
    sampled = LopaConfig(**{**config.__dict__, "temperature": 1.5})
    seed = torch.tensor(7)

    def run(step: int) -> LopaStep:
        return lopa_step(logits, state, sampled, seed=seed, step=torch.tensor(step))

    assert_same(run(0), run(0))
    tokens = [token_confidence(logits, metric=config.metric, temperature=1.5, seed=seed,
                               step=torch.tensor(s)) for s in range(2)]  # fmt: skip
    assert not torch.equal(tokens[0].token, tokens[1].token)
    assert_same(run(1), branch_step(*tokens[1], state, sampled))
