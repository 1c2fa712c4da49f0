"""Branch parallelism over gloo: equal tokens and caches on any number of ranks; failures."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import lopa_kernels as lk
from examples.tiny_dllm.decode import Cache, Decoder
from examples.tiny_dllm.methods import lopa
from examples.tiny_dllm.model import TinyDLLM
from examples.tiny_dllm.problems import problems
from examples.tiny_dllm.tokenizer import CharTokenizer
from lopa_kernels.distributed import BranchParallel, BranchParallelError, Partition, make_groups
from lopa_kernels.distributed.partition import local_state
from lopa_kernels.distributed.watch import differences

WORLD = 8
CONFIG = lk.LopaConfig(mask_id=9, max_new_tokens=8, block_size=4, branches=4, window=8)


def _rank_main(body: Any, backend: str, rank: int, ranks: int, file: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        backend, init_method=f"file://{file}", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    try:
        results.put((rank, True, body(rank)))
    except Exception as error:
        note = traceback.format_exc() if not isinstance(error, BranchParallelError) else ""
        results.put((rank, False, (type(error).__name__, str(error), note)))
    # A leaving rank must not wait for those that died.
    results.close()
    results.join_thread()
    os._exit(0)


def run_ranks(
    body: Callable[[int], Any],
    ranks: int,
    folder: Path,
    expected: int | None = None,
    backend: str = "gloo",
) -> dict[int, Any]:
    """What `body(rank)` gives in each of `ranks` processes; waits for `expected` of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "lopa_kernels.distributed"])
    results: Any = context.Queue()
    file = str(folder / f"store{time.monotonic_ns()}")
    processes = [
        context.Process(
            target=_rank_main, args=(body, backend, rank, ranks, file, results), daemon=True
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    outcomes: dict[int, Any] = {}
    try:
        while len(outcomes) < (ranks if expected is None else expected):
            rank, good, value = results.get(timeout=120)
            outcomes[rank] = (good, value)
    except queue.Empty:
        raise AssertionError(f"only ranks {sorted(outcomes)} answered: {outcomes}") from None
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return outcomes


def values(outcomes: dict[int, Any]) -> list[Any]:
    """The results of ranks that must all have succeeded."""
    for rank, (good, value) in sorted(outcomes.items()):
        assert good, f"rank {rank}: {value[0]}: {value[1]}\n{value[2]}"
    return [value for _, (_, value) in sorted(outcomes.items())]


class ParallelDecoder(Decoder):
    """The tiny model's decoder, its branches on the ranks of a group."""

    def __init__(
        self, model: TinyDLLM, config: lk.LopaConfig, bp: BranchParallel, mask: str, direct: bool
    ) -> None:
        super().__init__(model, config, mask=mask)
        self.bp, self.direct = bp, direct
        self.cache: Cache | None = None
        self.states: list[lk.LopaState] = []

    def advance(
        self, state: lk.LopaState, cache: Cache, cos_sin: torch.Tensor, direct: bool
    ) -> lk.LopaStep:
        self.states.append(state)
        local = self.bp.local(state)
        logits = self.forward(local, cache, cos_sin, direct=direct)
        needed = lk.needed_rows(local, self.config)
        statistics = lk.token_confidence(
            logits.flatten(0, 2)[needed.index], metric=self.config.metric, rows=needed.rows
        )
        out = self.bp.step(*statistics, state, direct=direct)
        if not direct:
            self.bp.commit_(
                cache.k, cache.v, cache.k_window, cache.v_window,
                out.winner, state.cache_len, state.commit_len,
            )  # fmt: skip
        return out

    def prefill(self, state: lk.LopaState, cache: Cache, cos_sin: torch.Tensor) -> lk.LopaStep:
        batch, _, window = state.tokens.shape
        self.cache = cache
        own = Cache.empty(self.model, batch, 1, window, 0)
        return self.advance(state, replace(own, k=cache.k, v=cache.v), cos_sin, True)

    def round(self, state: lk.LopaState, cache: Cache, cos_sin: torch.Tensor) -> lk.LopaStep:
        slots = cache.k_window.shape[2]
        assert self.bp.places <= slots
        places = replace(
            cache,
            k_window=cache.k_window[:, :, : self.bp.places],
            v_window=cache.v_window[:, :, : self.bp.places],
        )
        return self.advance(state, places, cos_sin, self.direct)


PROMPTS = 2
CASES = {
    # name: (K, mask, single phase)
    "two-phase, K 8": (8, "block_causal", False),
    "two-phase, K 5": (5, "full", False),
    "single-phase, K 8": (8, "block_causal", True),
}


def tiny_config(model: TinyDLLM, branches: int) -> lk.LopaConfig:
    config = lopa(model.config, branches, 0.9, window=64).config
    return replace(config, max_new_tokens=64)


def decode_everywhere(rank: int) -> dict[tuple[str, int], Any]:
    """Every case on 1, 2, 4 and 8 of the ranks: tokens, forwards and the cache's committed part."""
    model = TinyDLLM.load()
    prompts = [CharTokenizer().encode(p.prompt) for p in problems("heldout", PROMPTS, 3)]
    groups = {n: dist.new_group(list(range(n))) for n in (1, 2, 4, 8)}
    results = {}
    for name, (branches, mask, direct) in CASES.items():
        config = tiny_config(model, branches)
        for ranks, group in groups.items():
            if rank >= ranks or (ranks == 4 and branches == 5):
                continue
            with BranchParallel(config, group, timeout=60.0) as bp:
                decoder = ParallelDecoder(model, config, bp, mask, direct)
                decoded = decoder.decode(prompts)
                assert decoder.cache is not None
                last = decoder.states[-1].cache_len.tolist()
                cache = [
                    torch.stack([decoder.cache.k[:, b, :n], decoder.cache.v[:, b, :n]]).numpy()
                    for b, n in enumerate(last)
                ]
                results[name, ranks] = (decoded.tokens.tolist(), decoded.forwards.tolist(), cache)
    return results


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int], Any]]:
    return values(run_ranks(decode_everywhere, WORLD, tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("name", CASES)
def test_tokens_do_not_depend_on_the_ranks(everywhere: list[Any], name: str) -> None:
    branches, mask, _ = CASES[name]
    model = TinyDLLM.load()
    prompts = [CharTokenizer().encode(p.prompt) for p in problems("heldout", PROMPTS, 3)]
    alone = Decoder(model, tiny_config(model, branches), mask=mask).decode(prompts)
    assert (alone.tokens != model.config.mask_id).any()
    sizes = {ranks for case, ranks in everywhere[0] if case == name}
    assert sizes == ({1, 2, 8} if branches == 5 else {1, 2, 4, 8})
    for ranks in sizes:
        for rank in range(ranks):
            tokens, forwards, _ = everywhere[rank][name, ranks]
            assert tokens == alone.tokens.tolist(), f"rank {rank} of {ranks}"
            assert forwards == alone.forwards.tolist()


@pytest.mark.parametrize("name", CASES)
def test_caches_are_equal_on_all_ranks(everywhere: list[Any], name: str) -> None:
    """Bit for bit, in the single-phase protocol too, where nobody sends keys or values."""
    for ranks in {ranks for case, ranks in everywhere[0] if case == name}:
        first = everywhere[0][name, ranks][2]
        assert all(part.shape[2] > 0 and part.any() for part in first)
        for rank in range(1, ranks):
            for got, expected in zip(everywhere[rank][name, ranks][2], first, strict=True):
                assert got.tobytes() == expected.tobytes(), f"rank {rank} of {ranks}"


@pytest.mark.parametrize("ranks", range(1, 10))
@pytest.mark.parametrize("branches", range(1, 10))
def test_partition(branches: int, ranks: int) -> None:
    partition = Partition(branches, ranks)
    runs = [partition.slots(rank) for rank in range(ranks)]
    assert [slot for run in runs for slot in run] == list(range(branches))
    assert max(map(len, runs)) == partition.places
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
    for slot in range(branches):
        rank, place = partition.owner(slot)
        assert runs[rank][place] == slot
    for rank, run in enumerate(runs):
        assert partition.sources(rank) == list(run) + [0] * (partition.places - len(run))


def random_state(batch: int, branches: int, window: int) -> lk.LopaState:
    state = lk.initial_state(torch.zeros(batch, 1, dtype=torch.int64), CONFIG)
    shape = (batch, branches)
    return state._replace(
        tokens=torch.randint(0, 9, (*shape, window)),
        length=torch.randint(1, window + 1, shape, dtype=torch.int32),
        creation=torch.rand(shape),
        eos=torch.rand(shape) < 0.5,
        branches=torch.randint(1, branches + 1, (batch,), dtype=torch.int32),
    )


@pytest.mark.parametrize(("branches", "ranks"), [(5, 2), (5, 8), (8, 3), (1, 4)])
def test_local_states_cover_the_state(branches: int, ranks: int) -> None:
    state = random_state(6, branches, 7)
    partition = Partition(branches, ranks)
    for rank in range(ranks):
        own = partition.slots(rank)
        local = local_state(state, own, torch.tensor(partition.sources(rank)))
        assert local.tokens.shape == (6, partition.places, 7)
        for b in range(6):
            alive = int(state.branches[b])
            live = len([slot for slot in own if slot < alive])
            assert int(local.branches[b]) == max(live, 1)
            assert bool(local.done[b]) == (live == 0)
            for place in range(partition.places):
                slot = own[place] if place < live else 0  # the anchor stands in
                for name in ("tokens", "length", "creation", "eos"):
                    assert getattr(local, name)[b, place].equal(getattr(state, name)[b, slot])


def exchange_and_commit(rank: int) -> None:
    """Bits of every kind, NaN and -0 among them, on four ranks with K = 5."""
    config = replace(CONFIG, branches=5)
    generator = torch.Generator().manual_seed(1)  # the same on every rank
    bp = BranchParallel(config, timeout=30.0, columns=3)
    partition, own = bp.partition(5), bp.slots
    batch, window, shape = 2, 8, (3, 2, 5, 8, 1, 6)

    def mine(full: torch.Tensor, dim: int) -> torch.Tensor:
        index = torch.tensor(list(own) + [0] * (partition.places - len(own)))
        part = full.index_select(dim, index)
        part.narrow(dim, len(own), partition.places - len(own)).fill_(7)  # nobody asks for it
        return part

    for _ in range(2):
        token = torch.randint(0, 2**31, (batch, 5, window), generator=generator)
        bits = torch.randint(-(2**31), 2**31, (2, batch, 5, window), generator=generator)
        prob, score = bits.int().view(torch.float32)
        full = bp.exchange(mine(token, 1), mine(prob, 1), mine(score, 1))
        assert full.token.equal(token)
        for got, expected in ((full.prob, prob), (full.score, score)):
            assert got.view(torch.int32).equal(expected.view(torch.int32))

    for dtype, words in ((torch.bfloat16, torch.int16), (torch.float32, torch.int32)):
        size = 2 ** (8 * dtype.itemsize - 1)
        raw = torch.randint(-size, size, (2, *shape), generator=generator).to(words)
        windows = [mine(part.view(dtype), 2) for part in raw]
        for winner in (0, 2, 4):
            winners = torch.tensor([winner, 4 - winner], dtype=torch.int32)
            cache_len = torch.tensor([1, 4], dtype=torch.int32)
            commit_len = torch.tensor([3, winner // 2], dtype=torch.int32)
            caches = [torch.full((3, 2, 9, 1, 6), 5.0, dtype=dtype) for _ in range(2)]
            expected = [cache.clone() for cache in caches]
            lk.kv_commit_(
                *expected, *(part.view(dtype) for part in raw), winners, cache_len, commit_len
            )
            bp.commit_(*caches, *windows, winners, cache_len, commit_len)
            for got, cache in zip(caches, expected, strict=True):
                assert got.view(words).equal(cache.view(words))
    status = torch.zeros(2, dtype=torch.int32)
    longer = torch.tensor([4, 1], dtype=torch.int32)  # than `columns`
    bp.commit_(*caches, *windows, winners, cache_len, longer, status=status)
    assert status.tolist() == [lk.Status.BAD_STATE, 0]
    bp.close()


def test_exchange_and_commit_move_bits(tmp_path: Path) -> None:
    values(run_ranks(exchange_and_commit, 4, tmp_path))


def tensor_times_branch(rank: int) -> list[Any]:
    """A column- then row-parallel model on 2 x 2 ranks; its sums are exact, so in any order."""
    groups = make_groups(2, 2, "cpu")
    assert dist.get_rank(groups.tp) == rank % 2
    assert dist.get_rank(groups.bp) == rank // 2
    generator = torch.Generator().manual_seed(3)
    embed = torch.randint(-2, 3, (10, 8), generator=generator).float()
    up = torch.randint(-2, 3, (8, 16), generator=generator).float()
    down = torch.randint(-2, 3, (16, 9), generator=generator).float()
    shard = slice(8 * (rank % 2), 8 * (rank % 2) + 8)

    def logits(tokens: torch.Tensor, parallel: bool) -> torch.Tensor:
        if not parallel:
            return (embed[tokens] @ up).relu() @ down / 8
        out = (embed[tokens] @ up[:, shard]).relu() @ down[shard] / 8
        dist.all_reduce(out, group=groups.tp)
        return out

    config = replace(CONFIG, branches=3, max_new_tokens=16, window=12, tau_conf=0.6)
    state = expected = lk.initial_state(torch.tensor([[1, 2, 3], [4, 5, 6]]), config)
    seen = []
    with BranchParallel(config, groups.bp, timeout=30.0, watch=dist.group.WORLD) as bp:
        for _ in range(40):
            local = bp.local(state)
            own = lk.token_confidence(logits(local.tokens, True), metric=config.metric)
            state = bp.step(*own, state).state
            expected = lk.lopa_step(logits(expected.tokens, False), expected, config).state
            assert state.tokens.equal(expected.tokens)
            assert state.branches.equal(expected.branches)
            seen.append(state.tokens.tolist())
            if state.done.all():
                break
    assert state.done.all()
    return seen


def test_tensor_and_branch_parallel_together(tmp_path: Path) -> None:
    seen = values(run_ranks(tensor_times_branch, 4, tmp_path))
    assert seen[0] == seen[1] == seen[2] == seen[3]


def bad_groups(rank: int) -> str:
    with pytest.raises(ValueError, match=r"tp \* bp: expected 2, .* got 2 \* 2"):
        make_groups(2, 2)
    with pytest.raises(ValueError, match="bp: expected 1 or more, got 0"):
        make_groups(2, 0)
    with pytest.raises(ValueError, match="config: expected branches and window to be set"):
        BranchParallel(replace(CONFIG, branches=None))
    with pytest.raises(ValueError, match="transport: expected one of .*, got 'pigeon'"):
        BranchParallel(CONFIG, transport="pigeon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout: expected more than 0"):
        BranchParallel(CONFIG, timeout=0)
    with pytest.raises(BranchParallelError, match="cannot read their peers' memory"):
        BranchParallel(CONFIG, transport="symmetric", timeout=30.0)
    with BranchParallel(CONFIG, timeout=30.0) as bp:
        token = torch.zeros(1, 2, 8, dtype=torch.int64)
        prob = torch.zeros(1, 2, 8)
        with pytest.raises(TypeError, match="exchange: token: expected dtype torch.int64"):
            bp.exchange(prob, prob, prob)
        with pytest.raises(ValueError, match="exchange: prob: expected shape"):
            bp.exchange(token, prob[:, :1], prob)
        window = torch.zeros(1, 1, 4, 8, 1, 4)
        lengths = torch.zeros(1, dtype=torch.int32)
        with pytest.raises(ValueError, match=r"commit_: k_window: expected shape \[L, B, 2,"):
            bp.commit_(*torch.zeros(2, 1, 1, 8, 1, 4), window, window, *[lengths] * 3)
        return bp.transport


def test_bad_arguments_raise(tmp_path: Path) -> None:
    assert values(run_ranks(bad_groups, 2, tmp_path)) == ["collective"] * 2


def mismatch(field: str, rank: int) -> None:
    config, model = CONFIG, "weights 1"
    if rank == 2:
        config = replace(CONFIG, **({field: 3} if field in ("branches", "max_new_tokens") else {}))
        model = "weights 2" if field == "model" else model
    bp = BranchParallel(config, timeout=30.0, model=model)
    dtype = torch.float16 if rank == 2 else torch.bfloat16
    bp.windows(1, 1, 1, 8 if rank < 2 else 16, dtype)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("branches", "config.branches: ranks 0, 1: 4; rank 2: 3"),
        ("model", 'model: ranks 0, 1: "weights 1"; rank 2: "weights 2"'),
        ("windows", "shape: ranks 0, 1: [1, 1, 2, 8, 1, 8]; rank 2: [1, 1, 2, 8, 1, 16]"),
    ],
)
def test_mismatches_are_refused_by_all(field: str, message: str, tmp_path: Path) -> None:
    outcomes = run_ranks(partial(mismatch, field), 3, tmp_path)
    for good, value in outcomes.values():
        assert not good
        assert value[0] == "BranchParallelError"
        assert message in value[1]


def test_differences_name_fields_and_ranks() -> None:
    assert differences([{"a": 1, "b": None}, {"a": 1, "b": None}]) == []
    assert differences([{"a": 1}, {"a": 1, "b": 2}, {"a": 3}]) == [
        "a: ranks 0, 1: 1; rank 2: 3",
        "b: ranks 0, 2: nothing; rank 1: 2",
    ]


TIMEOUT = 3.0


def lose_a_rank(how: str, lost: int, rank: int) -> float:
    bp = BranchParallel(CONFIG, timeout=TIMEOUT)
    statistics = (torch.zeros(1, bp.places, 8, dtype=torch.int64), *torch.zeros(2, 1, bp.places, 8))
    bp.exchange(*statistics)
    if rank == lost:
        if how == "raises":
            with bp:
                raise ArithmeticError("no such token")
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    start = time.monotonic()
    try:
        while time.monotonic() < start + 60:
            bp.exchange(*statistics)
    except BranchParallelError as error:
        raise BranchParallelError(f"{time.monotonic() - start:.2f}|{error}") from None
    return -1.0


@pytest.mark.parametrize(
    ("how", "lost"), [("killed", 2), ("killed", 0), ("stopped", 3), ("raises", 1)]
)
def test_a_lost_rank_ends_the_others(how: str, lost: int, tmp_path: Path) -> None:
    gone = how != "raises"
    outcomes = run_ranks(partial(lose_a_rank, how, lost), 4, tmp_path, expected=3 if gone else 4)
    for rank, (good, value) in outcomes.items():
        assert not good
        if rank == lost:
            assert value[0] == "ArithmeticError"
            continue
        assert value[0] == "BranchParallelError", value
        seconds, _, message = value[1].partition("|")
        reason = "is gone (no heartbeat for 3.0 s)" if gone else "ended with ArithmeticError"
        assert message.startswith(f"rank {lost} of 4 {reason}"), message
        assert float(seconds) < 2 * TIMEOUT + 2


def one_comes_late(rank: int) -> None:
    if rank == 1:
        time.sleep(3 * TIMEOUT)
    BranchParallel(CONFIG, timeout=1.0)


def test_a_rank_that_does_not_start_is_named(tmp_path: Path) -> None:
    good, value = run_ranks(one_comes_late, 3, tmp_path, expected=2)[0]
    assert not good
    assert "rank 1 of 3 did not come within 1.0 s" in value[1]


def slow_round(rank: int) -> None:
    """A rank that computes for longer than the time-out is alive."""
    with BranchParallel(CONFIG, timeout=1.0) as bp:
        token = torch.full((1, bp.places, 8), rank)
        if rank == 1:
            time.sleep(3.0)
        full = bp.exchange(token, *torch.zeros(2, 1, bp.places, 8))
        assert full.token[0, :, 0].tolist() == [0, 0, 1, 1]


def test_a_slow_rank_is_not_gone(tmp_path: Path) -> None:
    values(run_ranks(slow_round, 2, tmp_path))
