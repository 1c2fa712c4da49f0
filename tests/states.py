"""Random states, settings and statistics of a round, for the tests of `branch` and `step`."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from targets import Target, cpu

from lopa_kernels import LopaConfig, LopaState, LopaStep

MASK = 9
VOCAB = 10


class Drawn(NamedTuple):
    token: torch.Tensor
    prob: torch.Tensor
    score: torch.Tensor
    state: LopaState
    config: LopaConfig


#: settings that Triton's kernels are compiled for
FORMS: dict[str, list[Any]] = {
    "reduction": ["mean", "bottom", "group", "min"],
    "shift": [False, True],
    "branches": [None, 1, 3, 7],
}


def random_config(rng: random.Random, block_size: int, **fixed: Any) -> LopaConfig:
    drawn: dict[str, Any] = {
        "mask_id": MASK,
        "max_new_tokens": block_size * rng.randint(1, 6) + rng.randint(0, block_size - 1),
        "block_size": block_size,
        "eos_id": rng.choice([None, 3]),
        "tau_conf": rng.choice([0.0, 0.3, 0.5, 0.9, 1.0]),
        "tau_add": rng.choice([0.0, 0.1, 0.5, 1.0]),
        "tau_act": rng.choice([0.0, 0.5, 0.95, 1.0]),
        "accept": rng.choice(["prob", "score"]),
        "fallback": rng.choice(["block", "window"]),
        "reduction": rng.choice(FORMS["reduction"]),
        "fraction": rng.choice([0.1, 0.3, 0.7, 1.0]),
        "group": rng.randint(1, 5),
        "alpha": rng.choice([0.0, 0.3, 0.5, 1.0]),
        "shift": rng.random() < 0.5,
        "force_anchor": rng.random() < 0.2,
        "branches": rng.choice(FORMS["branches"]),
    }
    return LopaConfig(**{**drawn, **fixed})


def random_stats(
    rng: random.Random, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Few distinct values, so that ties are everywhere; sometimes NaN and -inf."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    levels = rng.choice([2, 4, 1000])

    def levelled() -> torch.Tensor:
        return torch.round(torch.rand(shape, generator=generator) * levels) / levels

    highest = rng.choice([VOCAB, VOCAB - 1])  # with and without predictions of the mask
    token = torch.randint(0, highest, shape, generator=generator)
    prob, score = levelled(), levelled()
    for bad in (float("-inf"), float("nan")):
        if rng.random() < 0.2:
            score[torch.rand(shape, generator=generator) < 0.2] = bad
    return token, prob, score


def random_state(
    rng: random.Random, batch: int, branches: int, window: int, block_size: int
) -> LopaState:
    """Sequences that differ in everything: prefill or not, blocks open, complete, to commit."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    shape = (batch, branches)
    tokens = torch.full((*shape, window), MASK)
    length = torch.zeros(shape, dtype=torch.int32)
    live = torch.zeros(batch, dtype=torch.int32)
    cache_len, commit_len, prompt_len = (torch.zeros_like(live) for _ in range(3))
    for b in range(batch):
        blocks = rng.randint(0, window // block_size)
        room = window - blocks * block_size
        prefill = rng.random() < 0.3
        prompt = rng.randint(0, min(room, 40)) if prefill else rng.randint(0, 6)
        start = prompt if prefill else 0
        columns = start + blocks * block_size
        complete = rng.randint(0, blocks)
        commits = rng.random() < 0.8
        prompt_len[b] = prompt
        cache_len[b] = 0 if prefill else prompt + block_size * rng.randint(0, 3)
        commit_len[b] = start + complete * block_size if commits else 0
        live[b] = rng.randint(1, branches)
        settled = max(int(commit_len[b]), start)
        base = [
            rng.randint(0, VOCAB - 2) if c < settled or rng.random() < 0.4 else MASK
            for c in range(columns)
        ]
        for k in range(branches):
            own = list(base)
            masks = [c for c, token in enumerate(own) if token == MASK]
            if k > 0 and masks:
                own[rng.choice(masks)] = rng.randint(0, VOCAB - 2)
            if rng.random() < 0.3 and columns + block_size <= window:
                own += [MASK] * block_size
            tokens[b, k, : len(own)] = torch.tensor(own, dtype=torch.int64)
            length[b, k] = len(own)
    return LopaState(
        tokens,
        length,
        creation=torch.rand(shape, generator=generator) * 2 - 1,
        eos=torch.rand(shape, generator=generator) < 0.2,
        branches=live,
        cache_len=cache_len,
        commit_len=commit_len,
        prompt_len=prompt_len,
        carry_token=torch.randint(0, VOCAB, (batch,), generator=generator),
        carry_prob=torch.rand(batch, generator=generator),
        carry_score=torch.rand(batch, generator=generator),
        done=torch.rand(batch, generator=generator) < 0.05,
    )


@st.composite
def rounds(
    draw: st.DrawFn, max_branches: int = 16, max_window: int = 512, forms: int | None = None
) -> Drawn:
    """Random rounds; with `forms`, of so many combinations of what a kernel is compiled for."""
    fixed: dict[str, Any] = {}
    if forms is None:
        block_size = draw(st.sampled_from([1, 2, 3, 4, 8, 32]))
        branches = draw(st.integers(1, max_branches))
        window = draw(st.one_of(st.integers(1, 40), st.integers(1, max_window)))
        window = max(window, block_size)
        rng = random.Random(draw(st.integers(0, 2**32 - 1)))
        next_window = rng.choice([None, window + block_size, max(block_size, window - 2)])
    else:
        form = random.Random(draw(st.integers(0, forms - 1)))
        block_size = form.choice([1, 2, 3, 4, 8, 32])
        branches = form.randint(1, max_branches)
        window = max(form.choice([form.randint(1, 40), form.randint(1, max_window)]), block_size)
        next_window = form.choice([None, window + block_size, max(block_size, window - 2)])
        for name, choices in FORMS.items():
            fixed[name] = form.choice(choices)
        rng = random.Random(draw(st.integers(0, 2**32 - 1)))
    batch = draw(st.integers(0, 3))
    return Drawn(
        *random_stats(rng, (batch, branches, window)),
        random_state(rng, batch, branches, window, block_size),
        random_config(rng, block_size, window=next_window, **fixed),
    )


def examples(target: Target, number: int) -> int:
    """Examples of a property test: few in Triton's interpreter, where each takes a second."""
    return max(number // 50, 3) if target.interpreted else number


def rounds_on(target: Target, max_branches: int = 16, max_window: int = 512) -> Any:
    """Rounds of a size for the target: Triton compiles for a shape, or interprets each column."""
    if target.interpreted:
        return rounds(min(max_branches, 4), min(max_window, 24))
    forms = 16 if target.backend == "triton" else None
    return rounds(max_branches, max_window, forms)


def clone(state: LopaState) -> LopaState:
    return LopaState(*(tensor.clone() for tensor in state))


def fields(step: LopaStep) -> dict[str, torch.Tensor]:
    return {**step.state._asdict(), **{k: v for k, v in step._asdict().items() if k != "state"}}


def assert_same(actual: LopaStep, expected: LopaStep) -> None:
    """Every field equal to the bit, NaN equal to NaN, on whatever devices they are."""
    pairs = zip(fields(cpu(actual)).items(), fields(cpu(expected)).items(), strict=True)
    for (name, a), (_, b) in pairs:
        torch.testing.assert_close(
            a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_close(actual: LopaStep, expected: LopaStep, tolerance: float) -> None:
    """Floats within the tolerance, all else equal."""
    for name, a in fields(actual).items():
        torch.testing.assert_close(
            a,
            fields(expected)[name],
            rtol=tolerance if a.is_floating_point() else 0,
            atol=tolerance if a.is_floating_point() else 0,
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def sample_inputs(seed: int = 0) -> tuple[torch.Tensor, LopaState, LopaConfig]:
    rng = random.Random(seed)
    state = random_state(rng, 2, 3, 16, 4)._replace(done=torch.zeros(2, dtype=torch.bool))
    config = random_config(rng, 4, branches=3)
    logits = torch.randn(2, 3, 16, VOCAB, generator=torch.Generator().manual_seed(seed))
    return logits, state, config


def op_args(logits: torch.Tensor, state: LopaState, config: LopaConfig) -> tuple[object, ...]:
    slots, window = state.tokens.shape[1:]
    tail = (*config.step_args(slots, window), *config.sampling_args())
    return (logits, None, None, None, *state, *tail)
