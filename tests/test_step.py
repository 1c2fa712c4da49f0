"""A round as a whole: equal to the reference, in every form, whatever the state holds."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from cases import run_on
from hypothesis import given, settings
from hypothesis import strategies as st
from states import (
    FORMS,
    Drawn,
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
    LopaState,
    LopaStep,
    Status,
    branch_step,
    branch_step_out,
    empty_step,
    lopa_step,
    needed_rows,
)


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
