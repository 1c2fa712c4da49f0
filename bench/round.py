"""``python -m bench.round``: a whole round of a 7-8B model, and where its time goes.

Random weights. The round is one graph over a state that stays as it is, so that every replay does
the same work: all branches live, the first block complete and to be committed, the others open. Its
parts are graphs of their own over the same buffers, and the matrix products alone are its floor.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate

import lopa_kernels as lk
from bench import cuda_runner, report
from examples.dream import config as shapes
from examples.dream.fused import add_rms_norm, swiglu
from examples.dream.model import DiffusionLM, random_weights
from examples.dream.round import Runner

MODELS: dict[str, Callable[[], shapes.ModelConfig]] = {
    "dream-7b": shapes.dream_7b,
    "llada-8b": shapes.llada_8b,
    "small-dream": shapes.small_dream,
    "small-llada": shapes.small_llada,
}

#: parts of a round beside the matrix products, in the order of the plot
PARTS = ("attention", "prewrite", "norms", "step", "commit")

#: what is not the model's
OUTSIDE = ("step", "commit", "rest")

REPLAYS = 20

#: of the JSON file; raised when a key changes its meaning or goes away
SCHEMA = 1

#: what stands behind the times, by device
METHOD = {
    "cpu": "wall time of eager calls; skipped on a CPU: graphs, and their check",
    "cuda": "replays of CUDA graphs by events; a replayed round equals an eager one exactly",
}


@dataclass(frozen=True)
class RoundTimes:
    """Microseconds, medians.

    Attributes:
        model, branches, window, prefix, head_rows: the round's shape.
        round: the whole of it.
        products: its matrix products alone.
        parts: the others, each alone; "rest" is what the sum of all leaves of the round, negative
            where parts that are timed alone cost more than in their places.
    """

    model: str
    branches: int
    window: int
    prefix: int
    head_rows: int
    round: float
    products: float
    parts: dict[str, float]

    @property
    def ratio(self) -> float:
        return self.round / self.products

    @property
    def outside(self) -> float:
        return sum(self.parts[name] for name in OUTSIDE)

    def tokens_per_s(self, tpf: float) -> float:
        """A projection: so many tokens of one sequence in a round of this time."""
        return tpf / (self.round * 1e-6)


def steady_state(runner: Runner, prefix: int) -> lk.LopaState:
    """Writes the state that every replay starts from, and fills the cached prefix.

    Args:
        runner: of one sequence or more; its window is a multiple of the block and its prompt the
            whole prefix.
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
    for cache in (runner.cache.k, runner.cache.v):
        cache.normal_(generator=generator)
    return state


def products(runner: Runner, head_rows: int) -> Callable[[], None]:
    """The matrix products of a round, and nothing else."""
    model, c = runner.model, runner.model.config
    assert runner.config.branches is not None
    assert runner.config.window is not None
    rows = runner.batch * runner.config.branches * runner.config.window

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
    """The rest of a round, by part, over the runner's own buffers."""
    model, c, config, cache = runner.model, runner.model.config, runner.config, runner.cache
    shape = state.tokens.shape
    rows = state.tokens.numel()

    def inputs(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=runner.device).to(model.embed.dtype)

    q, qkv = inputs(*shape, c.heads, c.head_dim), inputs(*shape, c.qkv_dim)
    stream, delta, gate_up = (inputs(rows, n) for n in (c.hidden, c.hidden, 2 * c.intermediate))
    logits, out = inputs(head_rows, c.vocab_size), runner._slots[1].step
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

    def step() -> None:
        needed = lk.needed_rows(state, config, head_rows)
        lk.lopa_step_out(logits, state, config, out, needed.rows)

    def commit() -> None:
        lk.kv_commit_(
            cache.k, cache.v, cache.k_window, cache.v_window, out.winner, state.cache_len,
            state.commit_len, status=out.status,
        )  # fmt: skip

    return dict(zip(PARTS, (attention, prewrite, norms, step, commit), strict=True))


class Clock:
    """Medians of a call: of a graph's replays on a GPU, of the wall on a CPU."""

    def __init__(self, device: torch.device, replays: int) -> None:
        self.replays = replays
        self.gpu = cuda_runner.CudaDevice() if device.type == "cuda" else None

    def __call__(self, call: Callable[[], None]) -> float:
        """Microseconds."""
        if self.gpu is None:
            call()
            taken = []
            for _ in range(self.replays):
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
            return 1e6 * statistics.median(taken)
        if not self.gpu.capturable(call):
            raise RuntimeError("bench.round: a part of the round waits for the host")
        replay = self.gpu.capture(call)
        if replay is None:
            raise RuntimeError("bench.round: a part of the round was not captured")
        return 1e6 * statistics.median(self.gpu.burst(replay, self.replays))


def outcome(runner: Runner, prefix: int, run: Callable[[], None]) -> list[torch.Tensor]:
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


def check_equal(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Exactly, value for value.

    Raises:
        AssertionError: they are not.
    """
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def check(runner: Runner, prefix: int) -> None:
    """A round succeeds and repeats itself; on a GPU the second one is a replay of its graph.

    Raises:
        AssertionError: it does not.
    """
    window = runner.config.window
    assert window is not None

    def run() -> None:
        runner._decode_round(window, 1)

    expected = outcome(runner, prefix, run)
    again: Callable[[], None] = run
    if runner.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        again = graph.replay
    check_equal(outcome(runner, prefix, again), expected)
    out = runner._slots[1].step
    # Of logits without a finite value the status tells.
    assert not out.status.any(), f"status {out.status.tolist()}"
    assert (out.filled > 0).all()
    assert all(tensor.isfinite().all() for tensor in expected[-2:]), "K/V that are not finite"


@torch.no_grad()
def measure(
    name: str, model: DiffusionLM, branches: int, window: int, prefix: int, block: int,
    replays: int = REPLAYS,
) -> RoundTimes:  # fmt: skip
    """Checks and times one shape of a round, of one sequence.

    Raises:
        ValueError: a window that is not a multiple of the block.
        AssertionError: a replayed round differs from an eager one.
    """
    if window % block:
        raise ValueError(f"window: expected a multiple of {block}, got {window}")
    config = model.config.decoding(
        max_new_tokens=window + 4 * block, block_size=block, branches=branches, window=window
    )
    # Columns of open blocks, and the one before them that a shifted model reads.
    head_rows = branches * (window - (block if window > block else 0) + 1)
    runner = Runner(
        model, config, capacity=prefix + config.max_new_tokens, windows=[window],
        head_rows=head_rows,
    )  # fmt: skip
    state = steady_state(runner, prefix)
    check(runner, prefix)
    clock = Clock(runner.device, replays)
    whole = clock(lambda: runner._decode_round(window, 1))
    floor = clock(products(runner, head_rows))
    split = {part: clock(call) for part, call in parts(runner, state, head_rows).items()}
    split["rest"] = whole - floor - sum(split.values())
    return RoundTimes(name, branches, window, prefix, head_rows, whole, floor, split)


def table(times: Sequence[RoundTimes], tpf: Sequence[float]) -> str:
    headers = [
        "model", "K", "W", "P", "round, ms", "products, ms", "ratio",
        *(f"{part}, us" for part in (*PARTS, "rest")), "step + commit + rest, us",
        *(f"tokens/s at {value:g} a pass (projected)" for value in tpf),
    ]  # fmt: skip
    rows = [
        [
            t.model, t.branches, t.window, t.prefix, f"{t.round / 1e3:.2f}",
            f"{t.products / 1e3:.2f}", f"{t.ratio:.2f}x",
            *(f"{t.parts[part]:.0f}" for part in (*PARTS, "rest")), f"{t.outside:.0f}",
            *(f"{t.tokens_per_s(value):.0f}" for value in tpf),
        ]
        for t in times
    ]  # fmt: skip
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def as_dict(
    times: Sequence[RoundTimes], tpf: Sequence[float], header: dict[str, str]
) -> dict[str, Any]:
    """The same for machines, in microseconds; projections by their tokens a pass."""
    rounds = [
        {
            **asdict(t),
            "ratio": t.ratio,
            "outside": t.outside,
            "projected_tokens_per_s": {f"{value:g}": t.tokens_per_s(value) for value in tpf},
        }
        for t in times
    ]
    return {"schema": SCHEMA, "environment": header, "rounds": rounds}


def plot(path: Path, times: Sequence[RoundTimes]) -> None:
    """A bar a shape, by what it is spent on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.6 * len(times)), layout="constrained")
    labels = [f"{t.model}, K {t.branches}, W {t.window}, P {t.prefix}" for t in times]
    left = [0.0] * len(times)
    for name in ("products", *PARTS, "rest"):
        width = [max(0.0, t.products if name == "products" else t.parts[name]) / 1e3 for t in times]
        axes.barh(labels, width, left=left, label=name)
        left = [a + b for a, b in zip(left, width, strict=True)]
    floor = [t.products / 1e3 for t in times]
    axes.plot(floor, labels, "k|", markersize=12, label="floor: products alone")
    axes.invert_yaxis()
    axes.set_xlabel("ms a round")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m bench.round", description=__doc__)
    result.add_argument("--model", choices=MODELS, default="dream-7b")
    result.add_argument("--branches", type=int, nargs="+", default=[4, 8], metavar="K")
    result.add_argument("--window", type=int, nargs="+", default=[64], metavar="W")
    result.add_argument("--prefix", type=int, nargs="+", default=[1024], metavar="P")
    result.add_argument("--block", type=int, default=32, metavar="T")
    result.add_argument(
        "--tpf", type=float, nargs="*", default=[3.1, 10.1], metavar="TPF",
        help="tokens a pass of the projection; default: greedy and LoPA on GSM8K, arXiv 2512.16229",
    )  # fmt: skip
    result.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    result.add_argument("--replays", type=int, default=REPLAYS, metavar="N")
    result.add_argument("--json", type=Path, metavar="PATH")
    result.add_argument("--plot", type=Path, metavar="PATH")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda: PyTorch finds no CUDA device")
    for name in ("branches", "window", "block", "replays"):
        values = getattr(options, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser().error(f"--{name}: expected at least 1")
    if any(window % options.block for window in options.window):
        parser().error(f"--window: expected multiples of {options.block}")
    header = report.environment(options.device) | {"rounds": METHOD[options.device]}
    if options.device == "cuda":
        header |= cuda_runner.environment()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = random_weights(MODELS[options.model](), options.device, dtype)
    times = [
        measure(options.model, model, k, w, p, options.block, options.replays)
        for k, w, p in itertools.product(options.branches, options.window, options.prefix)
    ]
    print("\n".join(f"- {name}: {value}" for name, value in header.items()), end="\n\n")
    print(table(times, options.tpf))
    if options.json is not None:
        report.write_json(options.json, as_dict(times, options.tpf, header))
    if options.plot is not None:
        plot(options.plot, times)
    return 0


if __name__ == "__main__":
    sys.exit(main())
