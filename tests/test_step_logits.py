"""lopa_step from logits: its parts, the rows it reads, what it draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import run_on
from hypothesis import given, settings
from hypothesis import strategies as st
from small_states import CONFIG, M, make_state
from states import VOCAB, Drawn, assert_close, assert_same, examples, rounds_on, sample_inputs
from targets import KERNELS, TARGETS, Target, over

from lopa_kernels import LopaStep, Status, branch_step, lopa_step, needed_rows, token_confidence

METRICS = st.sampled_from(["prob", "margin", "neg_entropy"])


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
