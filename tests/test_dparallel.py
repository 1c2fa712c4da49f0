"""LopaConfig.dparallel against the published rule, restated over whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from targets import KERNELS, Target, over

import lopa_kernels as lk

VOCAB, MASK, ROWS = 61, 60, 509
PROMPT = [7, 3, 50, 11, 29]


def made_up_model(sharpness: float) -> torch.Tensor:
    """Logits of made-up contexts, from nearly certain to nearly uniform."""
    g = torch.Generator().manual_seed(5)
    table = torch.randn(ROWS, VOCAB, generator=g) * torch.rand(ROWS, 1, generator=g) * sharpness
    table[:, MASK] = -torch.inf
    return table


def context(text: torch.Tensor, end: int) -> torch.Tensor:
    """int64 [end]: the row of the table for each position, by all tokens before `end`."""
    position = torch.arange(end)
    return (text[:end].sum() * 17 + text[:end] * 31 + position * 101) % ROWS


def published_steps(
    table: torch.Tensor, max_new_tokens: int, block: int, threshold: float
) -> list[torch.Tensor]:
    """The text after each forward pass: in the current block the position of lowest entropy, and
    all others whose entropy is not above the threshold."""
    text = torch.cat([torch.tensor(PROMPT), torch.full((max_new_tokens,), MASK)])
    steps = []
    for end in range(len(PROMPT) + block, len(text) + 1, block):
        while (text[:end] == MASK).any():
            p = table[context(text, end)].double().softmax(-1)
            entropy = -torch.special.xlogy(p, p).sum(-1)
            masked = text[:end] == MASK
            order = torch.where(masked, entropy, torch.inf).argsort(stable=True)[: masked.sum()]
            chosen = [int(order[0]), *(int(i) for i in order[1:] if entropy[i] <= threshold)]
            text = text.clone()
            text[chosen] = p[chosen].argmax(-1)
            steps.append(text)
    return steps


@over(KERNELS)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.5, 10.0])
@pytest.mark.parametrize("block", [4, 12])
def test_steps_are_those_of_the_published_rule(
    block: int, threshold: float, target: Target
) -> None:
    table = made_up_model(sharpness=12.0)
    new = 24 if not target.interpreted else block
    config = lk.LopaConfig.dparallel(
        mask_id=MASK, max_new_tokens=new, tau_entropy=threshold, block_size=block,
        window=2 * block,
    )  # fmt: skip
    expected = published_steps(table, new, block, threshold)
    text = torch.cat([torch.tensor(PROMPT), torch.full((new,), MASK)])
    state = lk.initial_state(torch.tensor([PROMPT]), config)
    steps = []
    with lk.use_backend(target.backend):
        while not bool(state.done.all()):
            start, length = int(state.cache_len), int(state.length)
            rows = context(text, start + length)[start:]
            window = torch.zeros(1, 1, state.tokens.shape[2], VOCAB)
            window[0, 0, :length] = table[rows]
            out = lk.lopa_step(target.to(window), target.to(state), config)
            assert not out.status.any()
            state = lk.LopaState(*(tensor.cpu() for tensor in out.state))
            committed = out.committed[0].cpu()
            committed = committed[committed >= 0]
            text[start : start + len(committed)] = committed
            start, length = int(state.cache_len), int(state.length)
            text[start : start + length] = state.tokens[0, 0, :length]
            steps.append(text.clone())
            assert len(steps) <= len(expected)
    assert len(steps) == len(expected)
    for number, (got, want) in enumerate(zip(steps, expected, strict=True)):
        assert torch.equal(got, want), f"forward pass {number}"
    if threshold == 0:
        assert len(steps) == new
    if threshold == 10:
        assert len(steps) == new // block


def test_other_fields_pass_through() -> None:
    config = lk.LopaConfig.dparallel(
        mask_id=9, max_new_tokens=8, block_size=4, branches=3, alpha=0.5
    )
    assert (config.branches, config.alpha, config.tau_conf, config.tau_add) == (3, 0.5, -0.5, 1.0)
    assert (config.metric, config.accept, config.fallback) == ("neg_entropy", "score", "window")


@pytest.mark.parametrize("tau_entropy", [-0.1, float("nan"), True])
def test_a_threshold_out_of_range(tau_entropy: Any) -> None:
    with pytest.raises(ValueError, match=r"tau_entropy: expected a number >= 0"):
        lk.LopaConfig.dparallel(mask_id=9, max_new_tokens=8, block_size=4, tau_entropy=tau_entropy)
