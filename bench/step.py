"""A round of LoPA against loops in Python: from ready statistics, and from logits.

On a GPU also what a call of ``lopa_step`` costs the host.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from bench import peers
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
    lopa_step_out,
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


def check(result: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Equal winner, fill count and windows; every other field too where both have it.

    Args:
        tolerance: relative, of fp32 fields, where the two have summed in different orders.
    """
    whole = isinstance(result, LopaStep) and isinstance(expected, LopaStep)
    for got, want in zip(_compared(result, whole), _compared(expected, whole), strict=True):
        if tolerance and got.is_floating_point():
            torch.testing.assert_close(got.cpu(), want.cpu(), rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(got.cpu(), want.cpu())


#: what the contract leaves to fp32 statistics of different backends
TOLERANCE = 1e-5
check_closely = functools.partial(check, tolerance=TOLERANCE)


def to(device: str, values: Any) -> Any:
    """Tensors, those of a state too, on the device."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), values)


def _compared(result: LopaStep | Round, whole: bool) -> tuple[torch.Tensor, ...]:
    if isinstance(result, Round):
        return result
    if whole:
        return (*result.state, *result[1:])
    return result.winner, result.state.tokens, result.filled


def make_statistics(
    shape: Shape, config: LopaConfig, device: str, buffers: int
) -> list[tuple[Any, ...]]:
    # On the CPU, so that a GPU's rounds are the same.
    generator = torch.Generator().manual_seed(0)
    tuples = []
    for _ in range(buffers):
        state = to(device, make_state(shape, config.block_size, generator))
        token = to(device, torch.randint(MASK, shape, generator=generator))
        prob, score = (to(device, torch.rand(shape, generator=generator)) for _ in range(2))
        tuples.append((token, prob, -score, state, config, empty_step(state, config)))
    return tuples


def functional(*inputs: Any) -> LopaStep:
    return branch_step(*inputs[:5])


def on_triton(*inputs: Any) -> LopaStep:
    return branch_step(*inputs[:5], backend="triton")


def into_buffers(*inputs: Any) -> LopaStep:
    branch_step_out(*inputs)
    out: LopaStep = inputs[5]
    return out


def reference_loop(*inputs: Any) -> LopaStep:
    return branch_step(*inputs[:5], backend="reference")


def reference_on_cpu(*inputs: Any) -> LopaStep:
    """The reference waits for the device at every value, so that a GPU's goes to the CPU."""
    return reference_loop(*to("cpu", inputs))


def published_loop(*inputs: Any) -> Round:
    return published(*inputs[:5])


def branch_step_case(shape: Shape, device: str) -> Case:
    config = make_config(32)
    columns = shape.B * shape.K * shape.W
    gpu = device != "cpu"
    providers: dict[str, Any] = {"lopa": functional, "lopa, out": into_buffers}
    if gpu and peers.has_triton("branch_step"):
        providers["lopa, triton"] = on_triton
    if not gpu:
        providers["reference"] = reference_loop
    providers["published loop"] = published_loop
    return Case(
        op="branch_step",
        name=f"B {shape.B} K {shape.K} W {shape.W}",
        make=functools.partial(make_statistics, shape, config, device),
        providers=providers,
        reference=None if gpu else "reference",
        check=check_closely if gpu else check,
        # Tokens in and out, the statistics, the committed tokens.
        bytes=columns * (8 + 8 + 8 + 4 + 4) + shape.B * shape.W * 8,
        flops=0,
        buffers=WARM_BUFFERS,
        device=device,
        oracle=reference_on_cpu if gpu else None,
        eager=("published loop",),
    )


def make_logits(
    shape: Shape, config: LopaConfig, vocab: int, dtype: torch.dtype, device: str, buffers: int
) -> list[tuple[Any, ...]]:
    """Logits of the needed rows alone, each with one token raised to a probability of 0 to 1.

    Behind them the state, the settings, the rows, and buffers for the results: beside the state,
    and with the state itself in them.
    """
    generator = torch.Generator().manual_seed(0)
    # Of many logits on their own device: the CPU would take seconds.
    normal = generator if device == "cpu" else torch.Generator(device).manual_seed(0)
    tuples = []
    for _ in range(buffers):
        state = make_state(shape, config.block_size, generator)
        needed = needed_rows(state, config)
        rows = int(needed.count)
        logits = torch.randn((rows, vocab), generator=normal, device=device) * 3
        raised = torch.randint(MASK if vocab > MASK else vocab, (rows, 1), generator=generator)
        height = torch.rand((rows, 1), generator=generator) * 20 + 10
        logits.scatter_(1, raised.to(device), height.to(device))
        state = to(device, state)
        out = empty_step(state, config)
        row_map = needed.rows.to(device)
        tuples.append((logits.to(dtype), state, config, row_map, out, out._replace(state=state)))
    return tuples


def one_call(
    logits: torch.Tensor, state: LopaState, config: LopaConfig, rows: torch.Tensor, *_: LopaStep
) -> LopaStep:
    return lopa_step(logits, state, config, rows)


def one_call_on_triton(
    logits: torch.Tensor, state: LopaState, config: LopaConfig, rows: torch.Tensor, *_: LopaStep
) -> LopaStep:
    return lopa_step(logits, state, config, rows, backend="triton")


def one_call_out(
    logits: torch.Tensor,
    state: LopaState,
    config: LopaConfig,
    rows: torch.Tensor,
    out: LopaStep,
    *_: LopaStep,
) -> LopaStep:
    lopa_step_out(logits, state, config, out, rows)
    return out


def one_call_in_place(
    logits: torch.Tensor,
    state: LopaState,
    config: LopaConfig,
    rows: torch.Tensor,
    _: LopaStep,
    in_place: LopaStep,
) -> LopaStep:
    lopa_step_out(logits, state, config, in_place, rows)
    return in_place


def one_call_reference(*inputs: Any) -> LopaStep:
    """The reference on the CPU."""
    return lopa_step(*to("cpu", inputs[:4]), backend="reference")


def two_calls(
    logits: torch.Tensor, state: LopaState, config: LopaConfig, rows: torch.Tensor, *_: LopaStep
) -> LopaStep:
    return branch_step(*token_confidence(logits, metric=config.metric, rows=rows), state, config)


def eager_and_loop(
    logits: torch.Tensor, state: LopaState, config: LopaConfig, rows: torch.Tensor, *_: LopaStep
) -> Round:
    statistics = eager(logits, config.metric)
    gather = rows.clamp(min=0).long()
    token, prob, score = (statistic[gather] for statistic in statistics)
    return published(token, prob, score, state, config)


def lopa_step_case(shape: Shape, device: str) -> Case:
    config = make_config(16)
    # The number of open columns is drawn: from the generator's first state, as `make` begins.
    state = make_state(shape, config.block_size, torch.Generator().manual_seed(0))
    rows = int((state.tokens == MASK).sum())
    gpu = device != "cpu"
    providers: dict[str, Any] = {"lopa": one_call, "lopa, two calls": two_calls}
    if gpu:
        providers["lopa, out"] = one_call_out
    if gpu and peers.has_triton("lopa_step"):
        providers["lopa, triton"] = one_call_on_triton
    providers["eager, published loop"] = eager_and_loop
    return Case(
        op="lopa_step",
        name=f"B {shape.B} K {shape.K} W {shape.W} V {VOCAB} bfloat16, {rows} rows",
        make=functools.partial(make_logits, shape, config, VOCAB, torch.bfloat16, device),
        providers=providers,
        reference="eager, published loop",
        check=check,
        bytes=rows * VOCAB * 2,
        flops=rows * VOCAB * FLOPS_PER_LOGIT,
        device=device,
        eager=("eager, published loop",),
    )


def host_case(device: str) -> Case:
    """The host's time for one call; few logits, so that the device keeps up with it."""
    shape, vocab = Shape(1, 4, 32), 64
    providers: dict[str, Any] = {
        "lopa": one_call,
        "lopa, out": one_call_out,
        "lopa, in place": one_call_in_place,
    }
    if peers.has_triton("lopa_step"):
        providers["lopa, triton"] = one_call_on_triton
    return Case(
        op="lopa_step eager call",
        name=f"B {shape.B} K {shape.K} W {shape.W} V {vocab}, the host's time",
        make=functools.partial(make_logits, shape, make_config(16), vocab, torch.bfloat16, device),
        providers=providers,
        reference=None,
        check=check_closely,
        bytes=0,
        flops=0,
        buffers=WARM_BUFFERS,
        device=device,
        oracle=one_call_reference,
        host=True,
    )


def cases(device: str = "cpu") -> list[Case]:
    """Every case on one device."""
    if device != "cpu":
        return [
            branch_step_case(Shape(1, 8, 128), device),
            branch_step_case(Shape(32, 8, 128), device),
            branch_step_case(Shape(1, 16, 512), device),
            lopa_step_case(Shape(1, 4, 64), device),
            lopa_step_case(Shape(1, 8, 128), device),
            host_case(device),
        ]
    return [
        branch_step_case(Shape(1, 8, 128), device),
        branch_step_case(Shape(8, 8, 128), device),
        branch_step_case(Shape(1, 16, 512), device),
        branch_step_case(Shape(8, 16, 512), device),
        lopa_step_case(Shape(1, 4, 64), device),
    ]


CASES = cases()
