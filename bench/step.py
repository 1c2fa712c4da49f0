"""A round of LoPA against loops in Python: from ready statistics, and from logits."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from bench.case import Case
from bench.confidence import FLOPS_PER_LOGIT, eager
from lopa_kernels import (
    LopaConfig,
    LopaState,
    LopaStep,
    branch_step,
    branch_step_out,
    empty_step,
    lopa_step,
    needed_rows,
    token_confidence,
)

#: Dream's vocabulary
VOCAB, MASK = 152064, 151666

#: of rotating inputs: a round's state and statistics were written just before it, so they are warm
WARM_BUFFERS = 8


class Shape(NamedTuple):
    """Letters of the contract."""

    B: int
    K: int
    W: int


class Round(NamedTuple):
    """What a published decoder keeps of a round, for comparison."""

    winner: torch.Tensor
    tokens: torch.Tensor
    filled: torch.Tensor


def make_config(block_size: int) -> LopaConfig:
    return LopaConfig(mask_id=MASK, max_new_tokens=4096, block_size=block_size)


def make_state(shape: Shape, block_size: int, generator: torch.Generator) -> LopaState:
    """Full windows: one complete block to commit, half of the rest open, lookaheads one less."""
    B, K, W = shape
    device = generator.device
    anchor = torch.randint(MASK, (B, 1, W), generator=generator, device=device)
    opened = torch.rand((B, 1, W), generator=generator, device=device) < 0.5
    opened[..., :block_size] = False
    tokens = torch.where(opened, MASK, anchor).repeat(1, K, 1)
    for b in range(B):
        columns = opened[b, 0].nonzero().flatten()
        for k in range(1, K):
            tokens[b, k, columns[-k]] = k

    def int32(value: int, *size: int) -> torch.Tensor:
        return torch.full((B, *size), value, dtype=torch.int32, device=device)

    creation = torch.rand((B, K), generator=generator, device=device)
    creation[:, 0] = 1
    return LopaState(
        tokens=tokens,
        length=int32(W, K),
        creation=creation,
        eos=torch.zeros((B, K), dtype=torch.bool, device=device),
        branches=int32(K),
        cache_len=int32(800),
        commit_len=int32(block_size),
        prompt_len=int32(800),
        carry_token=torch.zeros(B, dtype=torch.int64, device=device),
        carry_prob=torch.zeros(B, device=device),
        carry_score=torch.zeros(B, device=device),
        done=torch.zeros(B, dtype=torch.bool, device=device),
    )


def published(
    token: torch.Tensor,
    prob: torch.Tensor,
    score: torch.Tensor,
    state: LopaState,
    config: LopaConfig,
) -> Round:
    """The round as the published single-device decoder goes about it, restated.

    One branch after another, one candidate after another, each read from its tensor by `.item()`
    and written by an indexed assignment; on an accelerator each of them waits for the device.
    """
    batch, slots, window = state.tokens.shape
    T = config.block_size
    result = Round(
        torch.zeros_like(state.branches),
        torch.full_like(state.tokens, config.mask_id),
        torch.zeros_like(state.branches),
    )
    for b in range(batch):
        winner, best = 0, -float("inf")
        for k in [*range(1, int(state.branches[b].item())), 0]:
            masked = (state.tokens[b, k] == config.mask_id).nonzero().flatten()
            values = [score[b, k, column].item() for column in masked]
            confidence = sum(values) / len(values) if values else 1.0
            if confidence > best:
                winner, best = k, confidence
        anchor = state.tokens[b, winner].clone()
        slide = int(state.commit_len[b].item())
        previous = 1.0
        filled = 0
        rest: list[tuple[float, int]] = []
        for start in range(0, window, T):
            masked = (anchor[start : start + T] == config.mask_id).nonzero().flatten() + start
            share = 1.0 - len(masked) / T
            accepted = [c for c in masked if prob[b, winner, c].item() > config.tau_conf]
            if not accepted and len(masked) > 0 and previous >= config.tau_act:
                accepted = [masked[int(score[b, winner, masked].argmax().item())]]
            taken = {int(column.item()) for column in accepted}
            for column in taken:
                anchor[column] = token[b, winner, column]
            filled += len(taken)
            rest += [
                (score[b, winner, column].item(), int(column.item()))
                for column in masked
                if int(column.item()) not in taken
            ]
            previous = share
        rest.sort(key=lambda candidate: (-candidate[0], candidate[1]))
        branches = [anchor]
        for _, column in rest[: slots - 1]:
            lookahead = anchor.clone()
            lookahead[column] = token[b, winner, column]
            branches.append(lookahead)
        for k, tokens in enumerate(branches):
            result.tokens[b, k, : window - slide] = tokens[slide:]
        result.winner[b], result.filled[b] = winner, filled
    return result


def check(result: Any, expected: Any) -> None:
    """Equal winner, fill count and windows; every other field too where both have it."""
    whole = isinstance(result, LopaStep) and isinstance(expected, LopaStep)
    for got, want in zip(_compared(result, whole), _compared(expected, whole), strict=True):
        assert torch.equal(got, want)


def _compared(result: LopaStep | Round, whole: bool) -> tuple[torch.Tensor, ...]:
    if isinstance(result, Round):
        return result
    if whole:
        return (*result.state, *result[1:])
    return result.winner, result.state.tokens, result.filled


def make_statistics(
    shape: Shape, config: LopaConfig, device: str, buffers: int
) -> list[tuple[Any, ...]]:
    generator = torch.Generator(device).manual_seed(0)
    tuples = []
    for _ in range(buffers):
        state = make_state(shape, config.block_size, generator)
        token = torch.randint(MASK, shape, generator=generator, device=device)
        prob, score = (torch.rand(shape, generator=generator, device=device) for _ in range(2))
        tuples.append((token, prob, -score, state, config, empty_step(state, config)))
    return tuples


def functional(*inputs: Any) -> LopaStep:
    return branch_step(*inputs[:5])


def into_buffers(*inputs: Any) -> LopaStep:
    branch_step_out(*inputs)
    out: LopaStep = inputs[5]
    return out


def reference_loop(*inputs: Any) -> LopaStep:
    return branch_step(*inputs[:5], backend="reference")


def published_loop(*inputs: Any) -> Round:
    return published(*inputs[:5])


def branch_step_case(shape: Shape, device: str) -> Case:
    config = make_config(32)
    columns = shape.B * shape.K * shape.W
    return Case(
        op="branch_step",
        name=f"B {shape.B} K {shape.K} W {shape.W}",
        make=functools.partial(make_statistics, shape, config, device),
        providers={
            "lopa": functional,
            "lopa, out": into_buffers,
            "reference": reference_loop,
            "published loop": published_loop,
        },
        reference="reference",
        check=check,
        # Tokens in and out, the statistics, the committed tokens.
        bytes=columns * (8 + 8 + 8 + 4 + 4) + shape.B * shape.W * 8,
        flops=0,
        buffers=WARM_BUFFERS,
    )


def make_logits(
    shape: Shape, config: LopaConfig, vocab: int, dtype: torch.dtype, device: str, buffers: int
) -> list[tuple[Any, ...]]:
    """Logits of the needed rows alone, each with one token raised to a probability of 0 to 1."""
    generator = torch.Generator(device).manual_seed(0)
    tuples = []
    for _ in range(buffers):
        state = make_state(shape, config.block_size, generator)
        needed = needed_rows(state, config)
        rows = int(needed.count)
        logits = torch.randn((rows, vocab), generator=generator, device=device) * 3
        raised = torch.randint(MASK if vocab > MASK else vocab, (rows, 1), generator=generator)
        height = torch.rand((rows, 1), generator=generator, device=device) * 20 + 10
        logits.scatter_(1, raised.to(device), height)
        tuples.append((logits.to(dtype), state, config, needed.rows))
    return tuples


def one_call(
    logits: torch.Tensor, state: LopaState, config: LopaConfig, rows: torch.Tensor
) -> LopaStep:
    return lopa_step(logits, state, config, rows)


def two_calls(
    logits: torch.Tensor, state: LopaState, config: LopaConfig, rows: torch.Tensor
) -> LopaStep:
    return branch_step(*token_confidence(logits, metric=config.metric, rows=rows), state, config)


def eager_and_loop(
    logits: torch.Tensor, state: LopaState, config: LopaConfig, rows: torch.Tensor
) -> Round:
    statistics = eager(logits, config.metric)
    gather = rows.clamp(min=0).long()
    token, prob, score = (statistic[gather] for statistic in statistics)
    return published(token, prob, score, state, config)


def lopa_step_case(shape: Shape, device: str) -> Case:
    config = make_config(16)
    # The number of open columns is drawn: from the generator's first state, as `make` begins.
    state = make_state(shape, config.block_size, torch.Generator(device).manual_seed(0))
    rows = int((state.tokens == MASK).sum())
    return Case(
        op="lopa_step",
        name=f"B {shape.B} K {shape.K} W {shape.W} V {VOCAB} bfloat16, {rows} rows",
        make=functools.partial(make_logits, shape, config, VOCAB, torch.bfloat16, device),
        providers={
            "lopa": one_call,
            "lopa, two calls": two_calls,
            "eager, published loop": eager_and_loop,
        },
        reference="eager, published loop",
        check=check,
        bytes=rows * VOCAB * 2,
        flops=rows * VOCAB * FLOPS_PER_LOGIT,
    )


def cases(device: str = "cpu") -> list[Case]:
    """Every case on one device."""
    return [
        branch_step_case(Shape(1, 8, 128), device),
        branch_step_case(Shape(8, 8, 128), device),
        branch_step_case(Shape(1, 16, 512), device),
        branch_step_case(Shape(8, 16, 512), device),
        lopa_step_case(Shape(1, 4, 64), device),
    ]


CASES = cases()
