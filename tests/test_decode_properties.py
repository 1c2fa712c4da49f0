"""Whole decodes over a made-up model: what holds from the first round to the last."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
from cases import run_on
from hypothesis import given, settings
from hypothesis import strategies as st
from states import MASK, VOCAB, assert_same, examples
from targets import KERNELS, Target, over

from lopa_kernels import (
    LopaConfig,
    LopaState,
    LopaStep,
    branch_step,
    initial_state,
    lopa_step,
    token_confidence,
)

Model = Callable[[LopaState], torch.Tensor]


def hashed_model(seed: int, sharpness: float) -> Model:
    """Logits that depend on a branch's own tokens and the position, and on nothing else."""
    table = torch.randn(4096, VOCAB, generator=torch.Generator().manual_seed(seed)) * sharpness
    table[:, MASK] = float("-inf")

    def logits(state: LopaState) -> torch.Tensor:
        window = state.tokens.shape[2]
        position = state.cache_len[:, None, None] + torch.arange(window)
        weights = 31 + 7 * position
        valid = torch.arange(window) < state.length[..., None]
        whole = (state.tokens * weights * valid).sum(-1, keepdim=True)
        return table[(whole * 17 + position * 101) % len(table)]

    return logits


def draw_config(rng: random.Random, target: Target, **fixed: object) -> LopaConfig:
    # What Triton compiles for comes in few combinations, and in its interpreter small.
    form = random.Random(rng.randrange(8)) if target.backend == "triton" else rng
    small = target.interpreted
    block_size = form.choice([1, 2, 4] if small else [1, 2, 4, 8])
    blocks = form.randint(1, 2 if small else 6)
    values: dict[str, object] = {
        "mask_id": MASK,
        "max_new_tokens": block_size * blocks,
        "block_size": block_size,
        "eos_id": rng.choice([None, 3]),
        "tau_conf": rng.choice([0.3, 0.6, 0.9, 1.0]),
        "tau_add": rng.choice([0.1, 0.5, 1.0]),
        "tau_act": rng.choice([0.5, 0.95, 1.0]),
        "metric": form.choice(["prob", "margin", "neg_entropy"]),
        "fallback": rng.choice(["block", "window"]),
        "reduction": form.choice(["mean", "min"]),
        "alpha": rng.choice([0.0, 0.4]),
        "branches": form.randint(1, 3 if small else 6),
        "window": block_size * form.randint(2, 3 if small else 6),
    }
    return LopaConfig(**{**values, **fixed})  # type: ignore[arg-type]


def draw_prompt(rng: random.Random, target: Target) -> torch.Tensor:
    length = rng.choice([1, 4, 9]) if target.backend == "triton" else rng.randint(1, 9)
    return torch.tensor([[rng.randint(0, 8) for _ in range(length)]])


def step_on(target: Target, logits: torch.Tensor, state: LopaState, config: LopaConfig) -> LopaStep:
    """lopa_step; in Triton's interpreter, where a row of logits takes a while, its second half."""
    if target.interpreted:
        statistics = token_confidence(logits, metric=config.metric, backend="cpu")
        return run_on(target, branch_step, *statistics, state, config)
    return run_on(target, lopa_step, logits, state, config)


def decode(
    prompt: torch.Tensor,
    config: LopaConfig,
    model: Model,
    limit: int,
    check: Callable[[LopaState, LopaStep], None],
    target: Target,
) -> tuple[list[int], int]:
    """Decodes one sequence; returns its text and the number of rounds."""
    state = initial_state(prompt, config)
    text: list[int] = []
    for n in range(1, limit + 1):
        out = step_on(target, model(state), state, config)
        check(state, out)
        committed = out.committed[0]
        text += committed[committed >= 0].tolist()
        state = out.state
        if bool(state.done):
            return text + state.tokens[0, 0, : int(state.length[0, 0])].tolist(), n
    raise AssertionError(f"not done after {limit} rounds")


def check_round(config: LopaConfig) -> Callable[[LopaState, LopaStep], None]:
    def check(state: LopaState, out: LopaStep) -> None:
        assert int(out.status) == 0
        old_length = int(state.length[0, int(out.winner)])
        old = state.tokens[0, int(out.winner), :old_length]
        new = out.state
        slid = int(new.cache_len - state.cache_len)
        assert slid == int(state.commit_len)
        anchor = torch.cat([out.committed[0, :slid], new.tokens[0, 0, : int(new.length[0, 0])]])
        # A token once filled never changes.
        assert bool(((anchor[:old_length] == old) | (old == MASK)).all())
        # Filled tokens are what the number of masks lost.
        opened = len(anchor) - old_length
        assert opened in (0, config.block_size)
        lost = int((old == MASK).sum()) + opened - int((anchor == MASK).sum())
        assert int(out.filled) == lost
        assert int(out.filled) > 0 or not bool((old == MASK).any())
        # The anchor's tokens are a subset of every lookahead's, which adds one.
        for k in range(1, int(new.branches)):
            branch, base = new.tokens[0, k], new.tokens[0, 0]
            assert bool(((branch == base) | (base == MASK)).all())
            assert int((branch != base).sum()) == 1
        # What the next round commits is complete.
        assert MASK not in new.tokens[0, 0, : int(new.commit_len)].tolist()

    return check


def check_decode(target: Target, seed: int) -> None:
    rng = random.Random(seed)
    config = draw_config(rng, target)
    prompt = draw_prompt(rng, target)
    model = hashed_model(rng.getrandbits(30), rng.choice([0.5, 2.0, 6.0]))
    # In a narrow window, a round may only commit, to make room for a block: once a block at most.
    waits = 0 if rng.random() < 0.5 else config.max_new_tokens // config.block_size
    if waits == 0:
        config = dataclasses.replace(config, window=config.max_new_tokens + config.block_size)
    limit = config.max_new_tokens + waits
    text, _ = decode(prompt, config, model, limit, check_round(config), target)
    generated = text[prompt.shape[1] :]
    assert text[: prompt.shape[1]] == prompt[0].tolist()
    assert MASK not in generated
    assert len(generated) % config.block_size == 0
    assert config.block_size <= len(generated) <= config.max_new_tokens
    if len(generated) < config.max_new_tokens:
        assert config.eos_id in generated


@over(KERNELS)
def test_invariants_of_a_decode(target: Target) -> None:
    @settings(max_examples=examples(target, 150))
    @given(seed=st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        check_decode(target, seed)

    check()


def check_forced_anchor(target: Target, seed: int) -> None:
    rng = random.Random(seed)
    forced = draw_config(rng, target, force_anchor=True)
    forced = dataclasses.replace(forced, branches=max(forced.branches or 0, 2))
    single = dataclasses.replace(forced, branches=1, force_anchor=False)
    prompt = torch.tensor([[rng.randint(0, 8) for _ in range(5)]])
    model = hashed_model(rng.getrandbits(30), 3.0)
    states = [initial_state(prompt, config) for config in (forced, single)]
    # A narrow window adds a round that only commits, once a block at most.
    for _ in range(forced.max_new_tokens + forced.max_new_tokens // forced.block_size):
        outs = [
            step_on(target, model(state), state, config)
            for state, config in zip(states, (forced, single), strict=True)
        ]
        for name in ("filled", "committed", "status"):
            assert torch.equal(getattr(outs[0], name), getattr(outs[1], name)), name
        for name, tensor in outs[1].state._asdict().items():
            if name == "branches":
                continue
            other = getattr(outs[0].state, name)
            assert torch.equal(other[:, :1] if tensor.dim() > 1 else other, tensor), name
        states = [out.state for out in outs]
        if bool(states[0].done):
            return
    raise AssertionError("not done")


@over(KERNELS)
def test_force_anchor_equals_one_branch_round_for_round(target: Target) -> None:
    @settings(max_examples=examples(target, 60))
    @given(seed=st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        check_forced_anchor(target, seed)

    check()


@over(KERNELS)
@pytest.mark.parametrize("seed", range(8))
def test_backends_decode_alike(seed: int, target: Target) -> None:
    rng = random.Random(seed)
    config = draw_config(rng, target)
    prompt = torch.tensor([[1, 2, 3]])
    model = hashed_model(seed, 2.0)
    reference = Target("reference", "cpu")
    results = [decode(prompt, config, model, 200, lambda *_: None, t) for t in (reference, target)]
    assert results[0] == results[1]


@over(KERNELS)
def test_a_batch_decodes_like_its_sequences(target: Target) -> None:
    rng = random.Random(5)
    config = draw_config(rng, target, branches=4)
    model = hashed_model(9, 2.0)
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8, 1]]
    padded = torch.zeros(3, 5, dtype=torch.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    state = initial_state(padded, config, torch.tensor([5, 1, 3], dtype=torch.int32))
    alone = [initial_state(torch.tensor([prompt]), config) for prompt in prompts]
    for _ in range(config.max_new_tokens):
        out = step_on(target, model(state), state, config)
        for b, own in enumerate(alone):
            single = step_on(target, model(own), own, config)
            assert torch.equal(out.state.tokens[b], single.state.tokens[0])
            assert int(out.filled[b]) == int(single.filled[0])
            assert bool(out.state.done[b]) == bool(single.state.done[0])
            alone[b] = single.state
        state = out.state
        if bool(state.done.all()):
            # A further round changes nothing.
            again = step_on(target, model(state), state, config)
            assert_same(again._replace(state=state), again)
            assert torch.equal(again.filled, torch.zeros_like(again.filled))
            return
    raise AssertionError("not done")


@over(KERNELS)
def test_prefill_in_a_window_of_its_own(target: Target) -> None:
    config = LopaConfig(
        mask_id=MASK, max_new_tokens=8, block_size=4, branches=3, window=8, metric="prob"
    )
    state = initial_state(torch.tensor([[1, 2, 3, 4, 5, 6]]), config)
    assert state.tokens.shape == (1, 1, 10)
    assert state.commit_len.tolist() == [6]
    out = run_on(target, lopa_step, hashed_model(1, 1.0)(state), state, config)
    assert out.state.tokens.shape == (1, 3, 8)
    assert out.committed[0, :6].tolist() == [1, 2, 3, 4, 5, 6]
    assert out.state.cache_len.tolist() == [6]
