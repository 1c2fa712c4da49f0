"""What ``python -m bench.round`` runs and times: a round over a state that stays as it is, its
parts, their check, and the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import lopa_kernels as lk
from bench import cuda_runner, timeline
from examples.dream.config import ModelConfig
from examples.dream.fused import add_rms_norm, swiglu
from examples.dream.model import DiffusionLM
from examples.dream.round import Runner
from lopa_kernels.distributed import BranchParallel

#: parts of a round beside the matrix products that are timed alone, in the order of the plot
PARTS = ("attention", "prewrite", "norms")

#: what a round has outside its model, timed in its place
OUTSIDE = ("step", "commit", "idle")

#: bursts of each call that is timed
TURNS = 3


@dataclass(frozen=True)
class Shape:
    """Of a round of one sequence: K, W, P and T.

    Raises:
        ValueError: a window that is not a multiple of the block.
    """

    branches: int
    window: int
    prefix: int
    block: int

    def __post_init__(self) -> None:
        if self.window % self.block:
            raise ValueError(f"window: expected a multiple of {self.block}, got {self.window}")

    @property
    def complete(self) -> int:
        """Columns that are complete, and committed."""
        return self.block if self.window > self.block else 0

    def config(self, model: ModelConfig) -> lk.LopaConfig:
        return model.decoding(
            max_new_tokens=self.window + 4 * self.block, block_size=self.block,
            branches=self.branches, window=self.window,
        )  # fmt: skip

    def head_rows(self, branches: int) -> int:
        """Columns of open blocks, and the one before them that a shifted model reads."""
        return branches * (self.window - self.complete + 1)

    def runner(self, model: DiffusionLM, parallel: BranchParallel | None = None) -> Runner:
        config = self.config(model.config)
        return Runner(
            model, config, capacity=self.prefix + config.max_new_tokens, windows=[self.window],
            head_rows=self.head_rows(self.branches if parallel is None else parallel.places),
            parallel=parallel,
        )  # fmt: skip


def steady_state(runner: Runner, prefix: int) -> lk.LopaState:
    """Writes the state that every replay starts from, and fills the cached prefix.

    Args:
        runner: of one sequence or more; its window is a multiple of the block and its prompt the
            whole prefix. On several ranks all get the same state and cached prefix.
        prefix: P.

    Returns:
        LopaState: the slot that the round reads.
    """
    config, device = runner.config, runner.device
    generator = torch.Generator(device).manual_seed(7)
    state = runner._slots[0].step.state
    batch, branches, window = state.tokens.shape
    block = config.block_size
    complete = block if window > block else 0
    vocabulary = min(runner.model.config.vocab_size, config.mask_id)
    first = torch.randint(0, vocabulary, (batch, 1, complete), generator=generator, device=device)
    state.tokens.fill_(config.mask_id)
    state.tokens[:, :, :complete] = first
    for branch in range(1, branches):
        state.tokens[:, branch, complete + (branch - 1) % (window - complete)] = branch
    state.length.fill_(window)
    state.creation.fill_(0.5)
    state.creation[:, 0] = 1
    state.eos.fill_(False)
    state.branches.fill_(branches)
    state.cache_len.fill_(prefix)
    state.commit_len.fill_(complete)
    state.prompt_len.fill_(prefix)
    state.carry_token.fill_(1)
    state.carry_prob.fill_(0.5)
    state.carry_score.fill_(-1)
    state.done.fill_(False)
    # What a rank of a sharded model has is its share of the whole's.
    model = runner.model
    for cache in (runner.cache.k, runner.cache.v):
        for layer in cache:
            sizes = *layer.shape[:2], layer.shape[2] * model.ranks, layer.shape[3]
            whole = layer.new_empty(sizes).normal_(generator=generator)
            layer.copy_(whole.chunk(model.ranks, 2)[model.rank])
    return state


def products(runner: Runner, head_rows: int) -> Callable[[], None]:
    """The matrix products of a round, and nothing else."""
    model, c = runner.model, runner.model.config
    # The windows are those of this rank's branches, where there are several ranks.
    rows = runner.cache.k_window.shape[1:4].numel()

    def inputs(count: int, width: int) -> torch.Tensor:
        return torch.randn(count, width, device=runner.device).to(model.embed.dtype)

    hidden, attended = inputs(rows, c.hidden), inputs(rows, c.heads * c.head_dim)
    middle, last = inputs(rows, c.intermediate), inputs(head_rows, c.hidden)

    def call() -> None:
        for number in range(c.layers):
            weights = model.weights(number)
            F.linear(hidden, weights.qkv, weights.qkv_bias)
            F.linear(attended, weights.o)
            F.linear(hidden, weights.gate_up)
            F.linear(middle, weights.down)
        F.linear(last, model.head)

    return call


def parts(runner: Runner, state: lk.LopaState, head_rows: int) -> dict[str, Callable[[], None]]:
    """The model's other parts, over the runner's own buffers."""
    model, c, config, cache = runner.model, runner.model.config, runner.config, runner.cache
    shape = state.tokens.shape
    rows = state.tokens.numel()

    def inputs(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=runner.device).to(model.embed.dtype)

    q, qkv = inputs(*shape, c.heads, c.head_dim), inputs(*shape, c.qkv_dim)
    stream, delta, gate_up = (inputs(rows, n) for n in (c.hidden, c.hidden, 2 * c.intermediate))
    # The round has this index from needed_rows, which is the step's.
    index = torch.arange(head_rows, device=runner.device) % rows

    def attention() -> None:
        for number in range(c.layers):
            lk.branch_attention(
                q, cache.k[number], cache.v[number], cache.k_window[number],
                cache.v_window[number], state.cache_len, state.length, mask=runner.mask,
                block_size=config.block_size, prompt_len=state.prompt_len,
            )  # fmt: skip

    def prewrite() -> None:
        for number in range(c.layers):
            lk.qkv_prewrite_(
                cache.k_window, cache.v_window, number, qkv, runner.cos_sin, state.cache_len,
                num_heads=c.heads,
            )  # fmt: skip

    def norms() -> None:
        add_rms_norm(model.embed, None, model.norm, c.norm_eps, state.tokens.flatten())
        for number in range(c.layers):
            add_rms_norm(stream, delta, model.weights(number).mlp_norm, c.norm_eps)
            swiglu(gate_up)
            if number:
                add_rms_norm(stream, delta, model.weights(number).attn_norm, c.norm_eps)
        add_rms_norm(stream, delta, model.norm, c.norm_eps, index)

    return dict(zip(PARTS, (attention, prewrite, norms), strict=True))


def model_pass(runner: Runner, state: lk.LopaState, head_rows: int) -> Callable[[], torch.Tensor]:
    """The model's share of a round, which gives its logits: all that is neither step nor commit.

    Args:
        state: the branches that the runner's windows hold: all, or those of its rank.
    """
    model, config, cache = runner.model, runner.config, runner.cache
    # The round has this index from needed_rows, which is the step's.
    index = lk.needed_rows(state, config, head_rows).index

    def call() -> torch.Tensor:
        residual, delta = model.hidden(
            state, cache, runner.cos_sin, mask=runner.mask, block_size=config.block_size
        )
        return model.logits(residual, delta, index)

    return call


class Marks:
    """Places in a call, and when its last run came by, by the wall's clock."""

    def __init__(self) -> None:
        self._times: dict[str, float] = {}

    def __call__(self, place: str) -> None:
        self._times[place] = time.perf_counter()

    def seconds(self, start: str, end: str) -> float:
        """Between two places of the last run, which has ended."""
        return self._times[end] - self._times[start]


def marked_round(
    runner: Runner, state: lk.LopaState, head_rows: int, mark: Callable[[str], None]
) -> Callable[[], None]:
    """The round on one device, call for call, with marks where its model begins and ends."""
    config, cache, out = runner.config, runner.cache, runner._slots[1].step

    def call() -> None:
        mark("start")
        needed = lk.needed_rows(state, config, head_rows)
        mark("rows")
        residual, delta = runner.model.hidden(
            state, cache, runner.cos_sin, mask=runner.mask, block_size=config.block_size
        )
        logits = runner.model.logits(residual, delta, needed.index)
        mark("logits")
        lk.lopa_step_out(logits, state, config, out, needed.rows)
        mark("step")
        lk.kv_commit_(
            cache.k, cache.v, cache.k_window, cache.v_window, out.winner, state.cache_len,
            state.commit_len, status=out.status,
        )  # fmt: skip
        mark("end")

    return call


class Clock:
    """Medians of calls that take turns: of graphs' replays on a GPU, of the wall on a CPU.

    Args:
        device: where the calls run.
        replays: timed, of each call, in each of its TURNS turns.
        meet: comes before every burst; where ranks replay in lockstep, it lets them start together.
    """

    def __init__(
        self, device: torch.device, replays: int, meet: Callable[[], None] = lambda: None
    ) -> None:
        self.replays, self.meet = replays, meet
        self.gpu = cuda_runner.CudaDevice() if device.type == "cuda" else None
        # Graphs read tensors that nothing but the call they were made of may hold.
        self._held: list[Callable[[], object]] = []

    def ready(self, call: Callable[[], object]) -> Callable[[], object]:
        """What is timed of `call`: itself on a CPU, the replay of its graph on a GPU.

        Raises:
            RuntimeError: it waits for the host, or cannot be captured.
        """
        if self.gpu is None:
            call()
            return call
        if not self.gpu.capturable(call):
            raise RuntimeError("bench.round: a part of the round waits for the host")
        replay = self.gpu.capture(call)
        if replay is None:
            raise RuntimeError("bench.round: a part of the round was not captured")
        self._held.append(call)
        return replay

    def _burst(self, call: Callable[[], object], replays: int) -> list[float]:
        self.meet()
        if self.gpu is not None:
            return self.gpu.burst(call, replays)
        call()
        taken = []
        for _ in range(replays):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return taken

    def outside(
        self, replay: Callable[[], object], runner: Runner, state: lk.LopaState, head_rows: int
    ) -> dict[str, float]:
        """Microseconds of OUTSIDE in a round, medians.

        Args:
            replay: the round, as :meth:`ready` gave it, of which a GPU's kernels are recorded.
            runner, state, head_rows: of :func:`marked_round`, which a CPU runs instead; its "idle"
                is what the clock itself takes.
        """
        repeats = TURNS * self.replays
        if self.gpu is not None:
            return timeline.outside(timeline.record(replay, repeats))
        marks = Marks()
        call = marked_round(runner, state, head_rows, marks)
        taken: dict[str, list[float]] = {name: [] for name in OUTSIDE}
        for _ in range(repeats):
            whole = self._burst(call, 1)[0]
            taken["step"].append(marks.seconds("start", "rows") + marks.seconds("logits", "step"))
            taken["commit"].append(marks.seconds("step", "end"))
            taken["idle"].append(whole - marks.seconds("start", "end"))
        return {name: 1e6 * statistics.median(seconds) for name, seconds in taken.items()}

    def medians(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Microseconds of what :meth:`ready` gave.

        Bursts alternate, so that all calls see the same temperature, and are long, so that each
        is timed at the clock that a GPU at its power limit keeps up: a decoder's.
        """
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(TURNS):
            for name, call in calls.items():
                taken[name] += self._burst(call, self.replays)
        return {name: 1e6 * statistics.median(seconds) for name, seconds in taken.items()}


def outcome(runner: Runner, prefix: int, run: Callable[[], object]) -> list[torch.Tensor]:
    """Copies of all that `run` leaves of a round: the next state, the step, the committed K/V.

    The buffers are overwritten before, so that nothing of an earlier round passes for its own.
    """
    slot, caches = runner._slots[1], (runner.cache.k, runner.cache.v)
    slot.flat.fill_(0xFF)
    for cache in caches:
        cache[:, :, prefix:].zero_()
    run()
    written = (*slot.step.state, *slot.step[1:], *(cache[:, :, prefix:] for cache in caches))
    return [tensor.clone() for tensor in written]


def as_step(written: Sequence[torch.Tensor]) -> lk.LopaStep:
    """The step among the tensors of :func:`outcome`."""
    fields = len(lk.LopaState._fields)
    return lk.LopaStep(lk.LopaState(*written[:fields]), *written[fields:-2])


def check_equal(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Exactly, value for value.

    Raises:
        AssertionError: they are not.
    """
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def check(runner: Runner, prefix: int, again: Callable[[], object]) -> lk.LopaStep:
    """A round succeeds, and repeats itself exactly.

    Args:
        again: the same round: a replay of its graph on a GPU.

    Returns:
        LopaStep: a copy of what it gave.

    Raises:
        AssertionError: it does not.
    """
    window = runner.config.window
    assert window is not None
    expected = outcome(runner, prefix, lambda: runner._decode_round(window, 1))
    check_equal(outcome(runner, prefix, again), expected)
    step = as_step(expected)
    # Of logits without a finite value the status tells.
    assert not step.status.any(), f"status {step.status.tolist()}"
    assert (step.filled > 0).all()
    assert all(tensor.isfinite().all() for tensor in expected[-2:]), "K/V that are not finite"
    check_commit(runner, prefix, step)
    return step


def check_commit(runner: Runner, prefix: int, step: lk.LopaStep) -> None:
    """The columns that the last round committed are those of the winner's window.

    On several ranks the winner's has them in its windows: it alone compares.

    Raises:
        AssertionError: they are not.
    """
    cache, parallel = runner.cache, runner.parallel
    slots = range(cache.k_window.shape[2]) if parallel is None else parallel.slots
    for row, winner in enumerate(step.winner.tolist()):
        if winner in slots:
            end = int(step.state.cache_len[row])
            window = slice(0, end - prefix)
            check_equal(
                [kept[:, row, prefix:end] for kept in (cache.k, cache.v)],
                [w[:, row, winner - slots.start, window] for w in (cache.k_window, cache.v_window)],
            )


def check_model_pass(runner: Runner, call: Callable[[], object]) -> None:
    """The model's pass alone writes the windows that the round before it has left.

    Raises:
        AssertionError: it does not.
    """
    windows = runner.cache.k_window, runner.cache.v_window
    expected = [window.clone() for window in windows]
    for window in windows:
        window.zero_()
    call()
    check_equal(windows, expected)


def bars(
    path: Path,
    labels: Sequence[str],
    shares: Mapping[str, Sequence[float]],
    marks: Sequence[float],
    marked: str,
) -> None:
    """Draws a bar for each label, of its shares in microseconds, and a mark on each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.6 * len(labels)), layout="constrained")
    left = [0.0] * len(labels)
    for name, share in shares.items():
        width = [max(0.0, value) / 1e3 for value in share]
        axes.barh(labels, width, left=left, label=name)
        left = [a + b for a, b in zip(left, width, strict=True)]
    axes.plot([mark / 1e3 for mark in marks], labels, "k|", markersize=12, label=marked)
    axes.invert_yaxis()
    axes.set_xlabel("ms a round")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
