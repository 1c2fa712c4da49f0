"""A round whose branches are spread over ranks, for ``torchrun ... -m bench.round``.

With ``--tp`` several ranks divide the matrices, and have the same branches. All ranks replay the
same graphs in lockstep, and a time is the largest median of all ranks. The cost of the exchange is
a difference of graphs that alternate: the round, and a rank's own work in it, with the statistics
of all branches already there and its own window in the winner's place.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate

import lopa_kernels as lk
from bench.round_parts import (
    Clock,
    Shape,
    as_step,
    bars,
    check,
    check_equal,
    check_model_pass,
    model_pass,
    outcome,
    products,
    steady_state,
)
from examples.dream.model import DiffusionLM
from examples.dream.round import Runner
from examples.dream.tensor_parallel import ShardedLM
from lopa_kernels.distributed import BranchParallel, Groups, make_groups

TRANSPORTS = ("collective", "symmetric")

#: bounds every wait for another rank, the one while rank 0 measures alone included
TIMEOUT = timedelta(minutes=10)

#: seconds without a sign of life after which a rank is lost; a rank may compile kernels meanwhile
LOST = 120.0


@dataclass(frozen=True)
class Ranks:
    """The processes of a run; `host` is their group for what is on the CPU, None if alone."""

    rank: int = 0
    count: int = 1
    host: dist.ProcessGroup | None = None

    def meet(self) -> None:
        """Waits for all, on the host."""
        if self.host is not None:
            dist.barrier(self.host)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value."""
        values = [value] * self.count
        if self.host is not None:
            dist.all_gather_object(values, value, group=self.host)
        return values


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started, one a device; without it this process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        host = dist.new_group(backend="gloo", timeout=TIMEOUT)
        yield Ranks(dist.get_rank(), dist.get_world_size(), host)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # A communicator does not end while a graph holds its kernels, and a frame the graph.
        gc.collect()
        dist.destroy_process_group()


class Layouts:
    """The ranks divided into TP x BP, and the model's share of this one; made once for each TP."""

    def __init__(self, model: DiffusionLM, ranks: Ranks, device: str) -> None:
        self._model, self._ranks, self._device = model, ranks, device
        self._made: dict[int, tuple[DiffusionLM, Groups]] = {}

    def __getitem__(self, tp: int) -> tuple[DiffusionLM, Groups]:
        """All ranks call this together.

        Raises:
            ValueError: the ranks, or the model, do not divide.
        """
        if tp not in self._made:
            groups = make_groups(tp, self._ranks.count // tp, self._device)
            model = self._model if tp == 1 else ShardedLM(self._model, groups.tp)
            self._made[tp] = model, groups
        return self._made[tp]


@dataclass(frozen=True)
class Alone:
    """The round of one device: its microseconds, and what it gave."""

    round: float
    step: lk.LopaStep


@dataclass(frozen=True)
class RankTimes:
    """Microseconds, each the largest median of all ranks.

    Attributes:
        model, branches, window, prefix: the round's shape.
        head_rows: of a rank.
        ranks, tp, transport: how the branches are spread: over ranks / tp shares, each of tp ranks.
        payload: bytes that a group of ranks exchanges in a round. Statistics are 12 bytes a
            column, of all places (collective) or all branches (symmetric); keys and values those of
            the buffer that is summed (collective), or of the committed columns (symmetric).
        round: the whole of it.
        one_device: the round of all branches on one device, in the same run.
        products: the matrix products of a rank alone.
        model_pass: the model's pass of a rank alone.
        local: the round of a rank that exchanges nothing: its model's pass and statistics, the step
            on statistics of all branches that are already there, a commit from its own window.
        step: exchange, step and commit between the ranks, alone.
        local_step: step and commit of `local`, alone.
        agrees: the winner and the next tokens equal those of one device. Products of another
            number of rows may round otherwise and decide near ties differently, so that they need
            not; the columns that are committed, the positions and the status are checked.
        speedup: of the round to that of one device.
        ratio: of the round to a rank's products.
        exchange: the round less `local`: exchange and commit between the ranks, in their place.
        exchange_alone: `step` less `local_step`, the same alone.
    """

    model: str
    branches: int
    window: int
    prefix: int
    head_rows: int
    ranks: int
    tp: int
    transport: str
    payload: int
    round: float
    one_device: float
    products: float
    model_pass: float
    local: float
    step: float
    local_step: float
    agrees: bool

    @property
    def speedup(self) -> float:
        return self.one_device / self.round

    @property
    def ratio(self) -> float:
        return self.round / self.products

    @property
    def exchange(self) -> float:
        return self.round - self.local

    @property
    def exchange_alone(self) -> float:
        return self.step - self.local_step

    def as_dict(self) -> dict[str, Any]:
        derived = ("speedup", "ratio", "exchange", "exchange_alone")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def payload(runner: Runner, shape: Shape, columns: int | None) -> int:
    """See RankTimes."""
    parallel, window = runner.parallel, runner.cache.k_window
    assert parallel is not None
    layers, batch, places, width, heads, head_dim = window.shape
    column = 2 * layers * batch * heads * head_dim * window.element_size()
    if parallel.transport == "symmetric":
        return 12 * batch * shape.branches * width + shape.complete * column
    summed = width if columns is None else min(columns, width)
    return 12 * batch * places * parallel.ranks * width + summed * column


def pieces(runner: Runner, state: lk.LopaState) -> dict[str, Callable[[], object]]:
    """What alternates, by its name in RankTimes. All ranks call this, and what it gives, together.

    Only "round" and "step" wait for other ranks.
    """
    parallel, config, cache, out = (
        runner.parallel,
        runner.config,
        runner.cache,
        runner._slots[1].step,
    )
    head_rows, window = runner.head_rows, config.window
    assert parallel is not None
    assert head_rows is not None
    assert window is not None
    own = parallel.local(state)
    rows = lk.needed_rows(own, config, head_rows).rows
    forward = model_pass(runner, own, head_rows)

    def statistics_of(logits: torch.Tensor, rows: torch.Tensor) -> lk.TokenConfidence:
        made = lk.token_confidence(logits, metric=config.metric, rows=rows)
        assert isinstance(made, lk.TokenConfidence)
        return made

    statistics = statistics_of(forward(), rows)
    full = parallel.exchange(*statistics, direct=True)
    # Slot 0 of this rank's windows: the time of a commit does not depend on which slot it is.
    place = torch.zeros_like(out.winner)
    caches = cache.k, cache.v, cache.k_window, cache.v_window
    lengths = state.cache_len, state.commit_len

    def local_step() -> None:
        lk.branch_step_out(*full, state, config, out)
        lk.kv_commit_(*caches, place, *lengths, status=out.status)

    def local() -> None:
        mine = parallel.local(state)
        needed = lk.needed_rows(mine, config, head_rows)
        residual, delta = runner.model.hidden(
            mine, cache, runner.cos_sin, mask=runner.mask, block_size=config.block_size
        )
        statistics_of(runner.model.logits(residual, delta, needed.index), needed.rows)
        local_step()

    def step() -> None:
        parallel.step_out(*statistics, state, out)
        parallel.commit_(*caches, out.winner, *lengths, status=out.status)

    return {
        "round": lambda: runner._decode_round(window, 1),
        "products": products(runner, head_rows),
        "model_pass": forward,
        "local": local,
        "step": step,
        "local_step": local_step,
    }


def _digest(tensors: Sequence[torch.Tensor]) -> str:
    """Of their bits."""
    made = hashlib.sha256()
    for tensor in tensors:
        made.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy())
    return made.hexdigest()


def check_ranks(
    runner: Runner, shape: Shape, ranks: Ranks, ready: dict[str, Callable[[], object]]
) -> lk.LopaStep:
    """The round repeats itself and leaves the same bits on all ranks; its pieces do what it does.

    Of the keys and values, ranks that have the same share of the model have the same.

    Returns:
        LopaStep: what it gave.

    Raises:
        AssertionError: they do not; on all ranks, where ranks differ.
    """
    step = check(runner, shape.prefix, ready["round"])
    check_model_pass(runner, ready["model_pass"])
    written = outcome(runner, shape.prefix, ready["round"])
    digests = ranks.gather((_digest(written[:-2]), _digest(written[-2:])))
    differ = [
        rank
        for rank, (state, kept) in enumerate(digests)
        if state != digests[0][0] or kept != digests[rank % runner.model.ranks][1]
    ]
    assert not differ, f"ranks {differ} have another state, step or K/V than rank 0 or its share"
    check_equal(outcome(runner, shape.prefix, ready["step"]), written)
    for name in ("local", "local_step"):
        # The K/V that these commit need not be the winner's.
        got = as_step(outcome(runner, shape.prefix, ready[name]))
        check_equal((*got.state, *got[1:]), (*step.state, *step[1:]))
    return step


def check_alone(step: lk.LopaStep, alone: lk.LopaStep) -> bool:
    """What has to be as on one device, whoever wins: committed columns, positions, status.

    Returns:
        Are the winner and the next tokens too?

    Raises:
        AssertionError: a round of one device gives something else.
    """
    fixed = [
        (s.committed, s.status, s.state.cache_len, s.state.prompt_len) for s in (step, alone)
    ]  # fmt: skip
    check_equal(*fixed)
    return step.winner.equal(alone.winner) and step.state.tokens.equal(alone.state.tokens)


@torch.no_grad()
def measure(
    name: str,
    model: DiffusionLM,
    shape: Shape,
    ranks: Ranks,
    transport: str,
    alone: Alone | None,
    columns: int | None = None,
    replays: int = 20,
    group: dist.ProcessGroup | None = None,
) -> RankTimes | None:
    """Checks and times one shape of a round on all ranks, which call this together.

    Args:
        model: the whole, or this rank's share of it.
        alone: the same round on one device, on rank 0.
        columns: of BranchParallel.
        group: the ranks over which the branches are spread; None: all.

    Returns:
        the same on all ranks; None where this transport is not to be had.

    Raises:
        AssertionError: a result is wrong.
        BranchParallelError: a rank is gone.
    """
    with BranchParallel(
        shape.config(model.config),
        group,
        watch=dist.group.WORLD,
        # A transport that is not to be had is then no error.
        transport="auto" if transport == "symmetric" else "collective",
        columns=columns,
        timeout=LOST,
        model=name,
    ) as parallel:
        if parallel.transport != transport:
            return None
        runner = shape.runner(model, parallel)
        state = steady_state(runner, shape.prefix)
        clock = Clock(runner.device, replays, ranks.meet)
        # Buffers and communicators are made outside of captures.
        runner._decode_round(shape.window, 1)
        ready = {piece: clock.ready(call) for piece, call in pieces(runner, state).items()}
        step = check_ranks(runner, shape, ranks, ready)
        agrees = alone is not None and check_alone(step, alone.step)
        measured = ranks.gather((clock.medians(ready), agrees, alone and alone.round))
        largest = {piece: max(medians[piece] for medians, _, _ in measured) for piece in ready}
        head_rows = runner.head_rows
        assert head_rows is not None
        return RankTimes(
            model=name, branches=shape.branches, window=shape.window, prefix=shape.prefix,
            head_rows=head_rows, ranks=ranks.count, tp=model.ranks, transport=transport,
            payload=payload(runner, shape, columns), one_device=measured[0][2],
            agrees=measured[0][1], **largest,
        )  # fmt: skip


def header(ranks: Ranks, device: str, absent: set[str]) -> dict[str, str]:
    """Of the report: how the ranks were run, and which transports they lack."""
    rows = {
        "ranks": f"{ranks.count}, {'nccl' if device == 'cuda' else 'gloo'}, in lockstep; the "
        "largest median of all ranks; state, step and committed K/V the same bits on all ranks"
    }
    return rows | {f"transport {name}": "not to be had on these devices" for name in sorted(absent)}


def table(times: Sequence[RankTimes]) -> str:
    headers = [
        "model", "TP x BP", "transport", "K", "W", "P", "round, ms", "one device, ms",
        "one device / round", "products of a rank, ms", "round / products",
        "exchange + commit, us", "the same alone, us", "bytes exchanged", "winner as on one device",
    ]  # fmt: skip
    rows = [
        [
            t.model, f"{t.tp} x {t.ranks // t.tp}", t.transport, t.branches, t.window, t.prefix,
            f"{t.round / 1e3:.2f}", f"{t.one_device / 1e3:.2f}", f"{t.speedup:.2f}x",
            f"{t.products / 1e3:.2f}", f"{t.ratio:.2f}x", f"{t.exchange:.0f}",
            f"{t.exchange_alone:.0f}", t.payload, "yes" if t.agrees else "no",
        ]
        for t in times
    ]  # fmt: skip
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def plot(path: Path, times: Sequence[RankTimes]) -> None:
    """A bar a shape and transport, by what it is spent on, beside the round of one device."""
    labels = [
        f"{t.model}, K {t.branches}, W {t.window}, P {t.prefix}\n"
        f"TP {t.tp} x BP {t.ranks // t.tp}, {t.transport}"
        for t in times
    ]
    shares = {
        "products of a rank": [t.products for t in times],
        "the model's other parts": [t.model_pass - t.products for t in times],
        "statistics, step and commit of a rank": [t.local - t.model_pass for t in times],
        "exchange and commit between the ranks": [t.exchange for t in times],
    }
    bars(path, labels, shares, [t.one_device for t in times], "one device, all branches")
