"""``python -m bench.round``: a whole round of a 7-8B model, and where its time goes.

Random weights. The round is one graph over a state that stays as it is, so that every replay does
the same work: all branches live, the first block complete and to be committed, the others open. The
matrix products alone, its floor, are a graph over the same buffers, whose bursts alternate with
those of the round. Step, commit and the time between rounds are read from the profiler's record of
that graph; the model's other parts are timed alone.

Under torchrun the branches are spread over the ranks, one process a device, and each transport's
round is measured beside that of one device:
``torchrun --standalone --nproc-per-node 2 -m bench.round --branches 2 8``. ``--tp 1 2`` does so
with whole matrices on every rank, and with matrices that two ranks share.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import lopa_kernels as lk
from bench import cuda_runner, report, round_ranks
from bench.round_parts import (
    OUTSIDE,
    PARTS,
    Clock,
    Shape,
    bars,
    check,
    parts,
    products,
    steady_state,
)
from examples.dream import config as shapes
from examples.dream.model import DiffusionLM, random_weights

MODELS: dict[str, Callable[[], shapes.ModelConfig]] = {
    "dream-7b": shapes.dream_7b,
    "llada-8b": shapes.llada_8b,
    "small-dream": shapes.small_dream,
    "small-llada": shapes.small_llada,
}

REPLAYS = 20

#: of the JSON file; raised when a key changes its meaning or goes away
SCHEMA = 4

#: what stands behind the times, by device
METHOD = {
    "cpu": "wall time of eager calls; skipped on a CPU: graphs, and their check",
    "cuda": "replays of CUDA graphs by events, in bursts that alternate between the round and its "
    "products; step, commit and idle by the profiler's record of replays; a replayed round equals "
    "an eager one exactly",
}


@dataclass(frozen=True)
class RoundTimes:
    """Microseconds, medians.

    Attributes:
        model, branches, window, prefix, head_rows: the round's shape.
        round: the whole of it.
        products: its matrix products alone.
        parts: the model's others (PARTS), each alone; those outside the model (OUTSIDE) in their
            places, "idle" between a round and the next; "rest" is what the sum of all leaves of the
            round, negative where parts that are timed alone cost more than in their places.
        ratio: of the round to its products.
        outside: step, commit and idle together.
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
        return sum(self.parts[part] for part in OUTSIDE)

    def tokens_per_s(self, tpf: float) -> float:
        """A projection: so many tokens of one sequence in a round of this time."""
        return tpf / (self.round * 1e-6)


@torch.no_grad()
def measure(
    name: str, model: DiffusionLM, shape: Shape, replays: int = REPLAYS
) -> tuple[RoundTimes, lk.LopaStep]:
    """Checks and times one shape of a round, of one sequence.

    Returns:
        its times, and the step that it gave.

    Raises:
        AssertionError: a replayed round differs from an eager one.
    """
    runner, head_rows = shape.runner(model), shape.head_rows(shape.branches)
    state = steady_state(runner, shape.prefix)
    clock = Clock(runner.device, replays)
    alternating: dict[str, Callable[[], object]] = {
        "round": clock.ready(lambda: runner._decode_round(shape.window, 1)),
        "products": clock.ready(products(runner, head_rows)),
    }
    step = check(runner, shape.prefix, alternating["round"])
    whole = clock.medians(alternating)
    split = {
        part: clock.medians({part: clock.ready(call)})[part]
        for part, call in parts(runner, state, head_rows).items()
    }
    split |= clock.outside(alternating["round"], runner, state, head_rows)
    split["rest"] = whole["round"] - whole["products"] - sum(split.values())
    times = RoundTimes(
        model=name, branches=shape.branches, window=shape.window, prefix=shape.prefix,
        head_rows=head_rows, parts=split, **whole,
    )  # fmt: skip
    return times, step


def table(times: Sequence[RoundTimes], tpf: Sequence[float]) -> str:
    headers = [
        "model", "K", "W", "P", "round, ms", "products, ms", "ratio",
        "outside the model, us", *(f"{part}, us" for part in OUTSIDE),
        *(f"{part} alone, us" for part in PARTS), "rest, us",
        *(f"tokens/s at {value:g} a pass (projected)" for value in tpf),
    ]  # fmt: skip
    rows = [
        [
            t.model, t.branches, t.window, t.prefix, f"{t.round / 1e3:.2f}",
            f"{t.products / 1e3:.2f}", f"{t.ratio:.2f}x",
            f"{t.outside:.0f}", *(f"{t.parts[part]:.0f}" for part in (*OUTSIDE, *PARTS, "rest")),
            *(f"{t.tokens_per_s(value):.0f}" for value in tpf),
        ]
        for t in times
    ]  # fmt: skip
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def as_dict(
    times: Sequence[RoundTimes],
    tpf: Sequence[float],
    header: dict[str, str],
    spread: Sequence[round_ranks.RankTimes] = (),
) -> dict[str, Any]:
    """The same for machines, in microseconds; projections by their tokens a pass.

    The keys are those of RoundTimes and RankTimes.
    """
    rounds = [
        {
            **asdict(t),
            "ratio": t.ratio,
            "outside": t.outside,
            "projected_tokens_per_s": {f"{value:g}": t.tokens_per_s(value) for value in tpf},
        }
        for t in times
    ]
    return {
        "schema": SCHEMA,
        "environment": header,
        "rounds": rounds,
        "ranks": [t.as_dict() for t in spread],
    }


def plot(path: Path, times: Sequence[RoundTimes]) -> None:
    """A bar a shape, by what it is spent on."""
    labels = [f"{t.model}, K {t.branches}, W {t.window}, P {t.prefix}" for t in times]
    shares = {"products": [t.products for t in times]}
    shares |= {part: [t.parts[part] for t in times] for part in (*PARTS, *OUTSIDE, "rest")}
    bars(path, labels, shares, shares["products"], "floor: products alone")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m bench.round", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
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
    result.add_argument(
        "--transport", choices=round_ranks.TRANSPORTS, nargs="+",
        help="of several ranks; default: both on GPUs, collective on CPUs",
    )  # fmt: skip
    result.add_argument(
        "--tp", type=int, nargs="+", default=[1], metavar="N",
        help="of several ranks: how many share the matrices; the branches are spread over the rest",
    )  # fmt: skip
    result.add_argument(
        "--columns", type=int, metavar="U",
        help="of several ranks: committed columns at most, which size the collective's message; "
        "default: the window",
    )  # fmt: skip
    result.add_argument("--json", type=Path, metavar="PATH")
    result.add_argument("--plot", type=Path, metavar="PATH")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda: PyTorch finds no CUDA device")
    for name in ("branches", "window", "block", "replays", "tp"):
        values = getattr(options, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser().error(f"--{name}: expected at least 1")
    if any(window % options.block for window in options.window):
        parser().error(f"--window: expected multiples of {options.block}")
    if options.columns is not None and options.columns < options.block:
        parser().error(f"--columns: expected at least the block, {options.block}")
    with round_ranks.joined(options.device) as ranks:
        if any(ranks.count % tp for tp in options.tp):
            parser().error(f"--tp: expected divisors of the {ranks.count} ranks")
        return run(options, ranks)


def run(options: argparse.Namespace, ranks: round_ranks.Ranks) -> int:
    """All shapes on one device, and where there are several ranks, on all of them."""
    first = ranks.rank == 0
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = random_weights(MODELS[options.model](), options.device, dtype)
    transports = options.transport or round_ranks.TRANSPORTS[: 1 + (options.device == "cuda")]
    times: list[RoundTimes] = []
    spread: list[round_ranks.RankTimes] = []
    absent: set[str] = set()
    layouts = round_ranks.Layouts(model, ranks, options.device)
    for sizes in itertools.product(options.branches, options.window, options.prefix):
        shape, alone = Shape(*sizes, options.block), None
        if first:
            one, step = measure(options.model, model, shape, options.replays)
            times.append(one)
            alone = round_ranks.Alone(one.round, step)
        # A runner refers to itself: its buffers would stay beside those of the next.
        gc.collect()
        if ranks.count == 1:
            continue
        ranks.meet()
        for tp, transport in itertools.product(options.tp, transports):
            share, groups = layouts[tp]
            measured = round_ranks.measure(
                options.model, share, shape, ranks, transport, alone, options.columns,
                options.replays, groups.bp,
            )  # fmt: skip
            if measured is None:
                absent.add(transport)
            else:
                spread.append(measured)
            gc.collect()
    if first:
        header = report.environment(options.device) | {"rounds": METHOD[options.device]}
        if options.device == "cuda":
            header |= cuda_runner.environment()
        if ranks.count > 1:
            header |= round_ranks.header(ranks, options.device, absent)
        publish(options, times, spread, header)
    ranks.meet()
    return 0


def publish(
    options: argparse.Namespace,
    times: Sequence[RoundTimes],
    spread: Sequence[round_ranks.RankTimes],
    header: dict[str, str],
) -> None:
    """Prints the tables, and writes what was asked for."""
    print("\n".join(f"- {name}: {value}" for name, value in header.items()), end="\n\n")
    print(table(times, options.tpf), flush=True)
    if spread:
        print("", round_ranks.table(spread), sep="\n", flush=True)
    if options.json is not None:
        report.write_json(options.json, as_dict(times, options.tpf, header, spread))
    if options.plot is not None:
        if spread:
            round_ranks.plot(options.plot, spread)
        else:
            plot(options.plot, times)


if __name__ == "__main__":
    sys.exit(main())
