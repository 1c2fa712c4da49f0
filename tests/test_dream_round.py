"""Rounds over static buffers against a decode that recomputes whole sequences; graphs; compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from targets import GPU_TARGETS, KERNELS, Target, over
from test_dream_model import SMALL, Plain, both
from torch import Tensor

import lopa_kernels as lk
from examples.dream.config import ModelConfig, small_dream, small_llada
from examples.dream.load import published
from examples.dream.model import DiffusionLM, random_weights
from examples.dream.round import Runner

BLOCK, NEW = 8, 32
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]


def settings(config: ModelConfig, **changed: Any) -> lk.LopaConfig:
    fixed = {"max_new_tokens": NEW, "block_size": BLOCK, "window": 24, "branches": 3}
    return config.decoding(**{**fixed, "tau_conf": 0.3, **changed})


def small(family: str, device: str = "cpu") -> DiffusionLM:
    return random_weights(SMALL[family](), "cpu", torch.float32, seed=1).to(device)


def slow_logits(plain: Plain, prefix: Tensor, state: lk.LopaState) -> Tensor:
    """[1, K, W, V] of one sequence: every branch from position 0, the mask block by block."""
    _, branches, columns = state.tokens.shape
    logits = torch.zeros(1, branches, columns, plain.c.vocab_size)
    for branch in range(int(state.branches)):
        length = int(state.length[0, branch])
        tokens = torch.cat([prefix, state.tokens[0, branch, :length]])
        position = torch.arange(len(tokens)) - int(state.prompt_len)
        block = torch.where(position < 0, -1, position.clamp(min=0) // BLOCK)
        _, rows = plain(tokens, block[None, :] <= block[:, None])
        logits[0, branch, :length] = rows[len(prefix) :].float()
    return logits


def slow_decode(
    model: DiffusionLM, config: lk.LopaConfig, prompt: Sequence[int]
) -> tuple[Tensor, int]:
    """Tokens and rounds of one prompt, without any cache and with PyTorch's reference rounds."""
    plain = Plain(model.config, published(model))
    state = lk.initial_state(torch.tensor([prompt]), config)
    prefix, rounds = torch.empty(0, dtype=torch.int64), 0
    while not state.done:
        logits = slow_logits(plain, prefix, state)
        step = lk.lopa_step(logits, state, config, backend="reference")
        assert not step.status
        prefix = torch.cat([prefix, step.committed[step.committed >= 0]])
        state, rounds = step.state, rounds + 1
    text = torch.cat([prefix, state.tokens[0, 0, : int(state.length[0, 0])]])[len(prompt) :]
    padding = torch.full((config.max_new_tokens - len(text),), config.mask_id)
    return torch.cat([text, padding]), rounds


@both
@pytest.mark.parametrize("single_phase", [False, True])
def test_a_decode_is_the_one_that_recomputes_everything(family: str, single_phase: bool) -> None:
    model = small(family)
    config = settings(model.config)
    runner = Runner(
        model, config, batch=2, capacity=48, mask="block_causal", single_phase=single_phase
    )
    steps: list[lk.LopaStep] = []
    decoded = runner.decode(
        PROMPTS, lambda step: steps.append(torch.utils._pytree.tree_map(torch.Tensor.clone, step))
    )
    won: set[int] = set()
    for row, prompt in enumerate(PROMPTS):
        tokens, rounds = slow_decode(model, config, prompt)
        assert decoded.tokens[row].equal(tokens)
        assert decoded.rounds[row] == rounds
        committed = torch.cat([step.committed[row] for step in steps])
        committed = committed[committed >= 0]
        assert len(committed) >= BLOCK
        assert committed.equal(tokens[: len(committed)])
        won |= {int(step.winner[row]) for step in steps}
    assert won == {0, 1, 2}  # else lookahead was not tried
    assert int(decoded.rounds.max()) >= 5


def test_the_shift_moves_predictions_to_the_right() -> None:
    """A head that copies its input's token: Dream puts it one position later, LLaDA on it."""
    for config, expected in ((small_dream(), 7), (small_llada(), None)):
        model = random_weights(config, dtype=torch.float32, seed=1)
        for number in range(config.layers):
            model.weights(number).o.zero_()
            model.weights(number).down.zero_()
        model.norm.fill_(1)
        model.head.copy_(model.embed)
        lopa = settings(config, branches=1, tau_conf=0.0, max_new_tokens=8, eos_id=None)
        runner = Runner(model, lopa, capacity=16)
        if expected is None:
            # Every column predicts the mask that it holds, which cannot be filled.
            with pytest.raises(RuntimeError, match="STALLED"):
                runner.decode([[3, 7]])
            continue
        # The first column copies the prompt's last token; each next one waits for its neighbour.
        decoded = runner.decode([[3, 7]])
        assert decoded.tokens.tolist() == [[expected] * 8]


@both
def test_buffers_outlive_a_decode(family: str) -> None:
    model = small(family)
    runner = Runner(model, settings(model.config), batch=2, capacity=48)
    first = runner.decode(PROMPTS)
    runner.decode([[20] * 9, [21]])
    again = runner.decode(PROMPTS)
    assert again.tokens.equal(first.tokens)
    assert again.rounds.equal(first.rounds)


@both
def test_the_window_sizes_do_not_change_a_decode(family: str) -> None:
    model = small(family)
    config = settings(model.config)
    cut = Runner(model, config, batch=2, capacity=48)
    assert cut.windows == [8, 16, 24]
    whole = Runner(model, config, batch=2, capacity=48, windows=[24])
    got, expected = cut.decode(PROMPTS), whole.decode(PROMPTS)
    assert got.tokens.equal(expected.tokens)
    assert got.rounds.equal(expected.rounds)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_round_is_the_round(backend: str) -> None:
    model = small("dream")
    config = settings(model.config)
    expected = Runner(model, config, batch=2, capacity=48).decode(PROMPTS)
    torch._dynamo.reset()
    runner = Runner(
        model, config, batch=2, capacity=48, capture=False, compile=True, compile_backend=backend
    )
    got = runner.decode(PROMPTS)
    assert got.tokens.equal(expected.tokens)
    assert got.rounds.equal(expected.rounds)


def test_sampling_follows_its_seed() -> None:
    model = small("llada")
    config = settings(model.config, temperature=1.0)
    first, again, other = (
        Runner(model, config, batch=2, capacity=48, seed=seed).decode(PROMPTS).tokens
        for seed in (1, 1, 2)
    )
    assert first.equal(again)
    assert not first.equal(other)


@over([target for target in KERNELS if not target.interpreted])
@both
def test_every_backend_decodes_the_same(target: Target, family: str) -> None:
    """On a GPU: replayed graphs against the CPU's plain rounds."""
    config = settings(SMALL[family]())
    expected = Runner(small(family), config, batch=2, capacity=48).decode(PROMPTS)
    with lk.use_backend(target.backend):
        runner = Runner(small(family, target.device), config, batch=2, capacity=48)
        assert runner.capture == target.gpu
        runner.prepare()
        for _ in range(2):
            got = runner.decode(PROMPTS)
            assert got.tokens.equal(expected.tokens)
            assert got.rounds.equal(expected.rounds)


@over(GPU_TARGETS)
def test_graphs_captured_on_the_way_give_the_same(target: Target) -> None:
    config = settings(small_dream())
    model = small("dream", target.device)
    with lk.use_backend(target.backend):
        eager = Runner(model, config, batch=2, capacity=48, capture=False).decode(PROMPTS)
        runner = Runner(model, config, batch=2, capacity=48)
        for _ in range(2):
            assert runner.decode(PROMPTS).tokens.equal(eager.tokens)
        torch._dynamo.reset()
        compiled = Runner(model, config, batch=2, capacity=48, compile=True)
        assert compiled.decode(PROMPTS).tokens.equal(eager.tokens)


def test_too_few_rows_of_the_head_are_an_error() -> None:
    model = small("llada")
    runner = Runner(model, settings(model.config), batch=2, capacity=48, head_rows=3)
    with pytest.raises(RuntimeError, match=r"sequence \d: round 1 ended with.*MISSING_ROW"):
        runner.decode(PROMPTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": [8, 16]}, "windows: expected ascending up to 24"),
        ({"windows": [16, 8, 24]}, "windows: expected ascending up to 24"),
        ({"single_phase": True}, "single_phase: needs mask='block_causal'"),
        ({"capture": True}, "capture: needs a GPU"),
        ({"config": {"branches": None}}, "expected branches and window"),
        ({"config": {"shift": False}}, "expected shift=True"),
        ({"config": {"window": 128}, "compile": True}, "windows: compile takes 8"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    model = small("dream")
    config = settings(model.config, **options.pop("config", {}))
    with pytest.raises(ValueError, match=message):
        Runner(model, config, batch=2, capacity=48, **options)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1]], "prompts: expected 2, got 1"),
        ([[1], []], r"prompts\[1\]: expected 1 to 16 tokens, got 0"),
        ([[1] * 17, [1]], r"prompts\[0\]: expected 1 to 16 tokens, got 17"),
        ([[1], [96]], r"prompts\[1\]: expected ids below 96"),
    ],
)
def test_prompts_that_do_not_fit(prompts: list[list[int]], message: str) -> None:
    model = small("dream")
    runner = Runner(model, settings(model.config), batch=2, capacity=48)
    with pytest.raises(ValueError, match=message):
        runner.decode(prompts)


def test_the_order_of_calls_is_checked() -> None:
    model = small("dream")
    runner = Runner(model, settings(model.config), batch=2, capacity=48)
    with pytest.raises(RuntimeError, match=r"expected start\(\) before it"):
        runner.launch(8)
    runner.start(PROMPTS)
    with pytest.raises(ValueError, match="columns: expected one of"):
        runner.launch(9)
    with pytest.raises(ValueError, match="one of the last two rounds, got 1"):
        runner.result(1)
    with pytest.raises(RuntimeError, match="expected no decode before it"):
        runner.prepare()
