"""Branch parallelism on two GPUs: both transports, captured rounds, a rank that is lost."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import run_ranks, values

import lopa_kernels as lk
from lopa_kernels.distributed import BranchParallel, BranchParallelError

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

TRANSPORTS = ("collective", "symmetric")
LAYERS, BATCH, PROMPT, HEADS, HEAD_DIM, VOCABULARY = 3, 2, 5, 2, 64, 97
CONFIG = lk.LopaConfig(
    mask_id=VOCABULARY, max_new_tokens=64, block_size=8, branches=5, window=32, tau_conf=0.55,
    metric="neg_entropy",
)  # fmt: skip
CAPACITY = PROMPT + CONFIG.max_new_tokens + 32


class Toy:
    """Logits and K/V from tables, elementwise: the same bits whatever else is in the batch."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(5)
        self.table = 3 * torch.randn(VOCABULARY + 1, VOCABULARY, generator=generator).to(device)
        self.places = torch.randn(CAPACITY + 64, VOCABULARY, generator=generator).to(device)
        self.keys = torch.randn(2, LAYERS, 1024, HEADS, HEAD_DIM, generator=generator).to(
            device, torch.bfloat16
        )

    def logits(self, state: lk.LopaState) -> torch.Tensor:
        column = torch.arange(state.tokens.shape[2], device=state.tokens.device)
        before = state.tokens.roll(1, dims=2)
        position = (state.cache_len[:, None] + column).long()
        return self.table[state.tokens] + self.table[before] + 3 * self.places[position][:, None]

    def keys_and_values(self, state: lk.LopaState) -> torch.Tensor:
        """[2, L, B, K, W, Hk, D]; every column depends on the whole branch, as in a window whose
        columns see each other."""
        branch = state.tokens.sum(2, keepdim=True)
        return self.keys[:, :, (31 * state.tokens + branch) % 1024]


def rounds_alone(toy: Toy, state: lk.LopaState, caches: torch.Tensor) -> list[Any]:
    seen = []
    for _ in range(CONFIG.max_new_tokens + 2):
        out = lk.lopa_step(toy.logits(state), state, CONFIG)
        windows = toy.keys_and_values(state)
        lk.kv_commit_(*caches, *windows, out.winner, state.cache_len, state.commit_len)
        state = out.state
        seen.append([state.tokens.tolist(), out.winner.tolist(), caches.float().sum().item()])
        if state.done.all():
            break
    assert state.done.all()
    return seen


def graphed_rounds(transport: Any, rank: int) -> list[Any]:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    toy = Toy(device)
    prompt = torch.randint(
        0, VOCABULARY, (BATCH, PROMPT), generator=torch.Generator().manual_seed(2)
    )
    first = lk.initial_state(prompt.to(device), CONFIG)

    def caches() -> torch.Tensor:
        return torch.zeros(
            2, LAYERS, BATCH, CAPACITY, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device
        )

    expected_cache = caches()
    expected = rounds_alone(toy, first, expected_cache)

    with BranchParallel(CONFIG, transport=transport, timeout=60.0) as bp:
        assert bp.transport == transport
        assert bp.device == device
        cache = caches()
        windows = bp.windows(LAYERS, BATCH, HEADS, HEAD_DIM, torch.bfloat16)

        def prefill() -> lk.LopaState:
            local = bp.local(first)
            statistics = lk.token_confidence(toy.logits(local), metric=CONFIG.metric)
            out = bp.step(*statistics, first, direct=True)
            own = toy.keys_and_values(local)
            lk.kv_commit_(*cache, *own, out.winner, first.cache_len, first.commit_len)
            return out.state

        state = lk.LopaState(*(tensor.clone() for tensor in prefill()))
        start = [tensor.clone() for tensor in state]
        winner = torch.zeros(BATCH, dtype=torch.int32, device=device)

        def round() -> None:
            local = bp.local(state)
            for window, made in zip(windows, toy.keys_and_values(local), strict=True):
                window.copy_(made)
            statistics = lk.token_confidence(toy.logits(local), metric=CONFIG.metric)
            out = bp.step(*statistics, state)
            bp.commit_(*cache, *windows, out.winner, state.cache_len, state.commit_len)
            winner.copy_(out.winner)
            for old, new in zip(state, out.state, strict=True):
                old.copy_(new)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            round()  # makes what is made once: buffers, tables, communicators, kernels
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            round()
        for _ in range(2):  # the same graph decodes twice
            for old, new in zip(state, start, strict=True):
                old.copy_(new)
            cache.zero_()
            prefill()
            for tokens, won, total in expected[1:]:
                graph.replay()
                assert state.tokens.tolist() == tokens
                assert winner.tolist() == won
                assert cache.float().sum().item() == total
                bp.check()
            assert cache.equal(expected_cache)
        assert len({w for _, won, _ in expected for w in won}) > 1
        graph.reset()
        return expected


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_captured_rounds_equal_one_device(transport: str, tmp_path: Path) -> None:
    first, second = values(
        run_ranks(partial(graphed_rounds, transport), 2, tmp_path, backend="nccl")
    )
    assert first == second
    assert len(first) > 3


def single_phase(transport: Any, rank: int) -> None:
    """Exchanges with no commit after: each waits for the readers of the last one."""
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    with BranchParallel(CONFIG, transport=transport, timeout=60.0) as bp:
        bp.windows(1, 1, 1, 64, torch.bfloat16)
        generator = torch.Generator().manual_seed(7)
        own = bp.slots
        for _ in range(50):
            token = torch.randint(0, 99, (1, 5, 32), generator=generator)
            prob = torch.rand(1, 5, 32, generator=generator)
            part = torch.zeros(2, 1, bp.places, 32)
            part[0, :, : len(own)], part[1, :, : len(own)] = token[:, own], prob[:, own]
            full = bp.exchange(
                part[0].long().to(device), part[1].to(device), -part[1].to(device), direct=True
            )
            assert full.token.cpu().equal(token)
            assert full.prob.cpu().equal(prob)
            assert full.score.cpu().equal(-prob)
        if transport == "symmetric":
            zeros = part.to(device)
            bp.exchange(zeros[0].long(), *zeros)
            with pytest.raises(RuntimeError, match="expected commit_ after the last exchange"):
                bp.exchange(zeros[0].long(), *zeros)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_exchange_without_commit(transport: str, tmp_path: Path) -> None:
    values(run_ranks(partial(single_phase, transport), 2, tmp_path, backend="nccl"))


TIMEOUT = 4.0


def lose_a_rank(transport: Any, rank: int) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    bp = BranchParallel(CONFIG, transport=transport, timeout=TIMEOUT)
    bp.windows(1, 1, 1, 64, torch.bfloat16)
    token = torch.zeros(1, bp.places, 32, dtype=torch.int64, device=device)
    prob = torch.zeros(1, bp.places, 32, device=device)
    bp.exchange(token, prob, prob, direct=True)
    torch.cuda.synchronize()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        while time.monotonic() < start + 60:
            try:
                bp.exchange(token, prob, prob, direct=True)
                torch.cuda.synchronize()
                bp.check()
            except BranchParallelError:
                raise
            except RuntimeError as error:
                raise bp.explain(error) from error
    except BranchParallelError as error:
        raise BranchParallelError(f"{time.monotonic() - start:.2f}|{error}") from None


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_lost_rank_ends_the_other(transport: str, tmp_path: Path) -> None:
    outcomes = run_ranks(partial(lose_a_rank, transport), 2, tmp_path, expected=1, backend="nccl")
    good, value = outcomes[0]
    assert not good
    assert value[0] == "BranchParallelError", value
    seconds, _, message = value[1].partition("|")
    assert message.startswith(f"rank 1 of 2 is gone (no heartbeat for {TIMEOUT} s)"), message
    assert float(seconds) < 2 * TIMEOUT + 5
