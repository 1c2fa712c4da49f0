"""The base and the distilled model under every way of decoding, in one table.

    python -m examples.tiny_dllm.table --out results --device cuda --workers 6

decodes training problems over a grid of thresholds, chooses one for each model and method, decodes
held-out problems with it, and then the ablations of LoPA at K = 8. `--out` receives table.json,
table.md and table.png. Rows already in table.json are not decoded again, so that an interrupted
run goes on where it stopped, and a finished one only writes the table and the plot.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from examples.tiny_dllm.evaluate import DECODERS, bootstrap, decoder_of, default_precision
from examples.tiny_dllm.methods import Method, entropy, lopa, run, vanilla
from examples.tiny_dllm.model import NAMED, TinyConfig, TinyDLLM, weights_of
from examples.tiny_dllm.problems import Split, problems
from examples.tiny_dllm.table_report import draw, markdown

LEAST_ACCURACY = 0.95
ABLATED = 8
"""K of the ablations."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One row to decode."""

    model: str
    weights: str
    """Digest of the model's files."""
    method: Method
    tau: float | None
    """The threshold as the method states it: of probability, or of entropy in nats."""
    split: Split
    problems: int
    seed: int
    mask: str = "block_causal"
    change: str | None = None
    """What an ablation differs in."""

    def key(self, decoder: str, precision: str) -> str:
        """Equal for rows that are the same measurement."""
        settings = asdict(self) | {"decoder": decoder, "precision": precision}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Machine:
    """How rows are decoded."""

    device: str
    decoder: str
    precision: str
    columns: int
    """Branch columns decoded together at most, which bounds the memory of a process."""


def digest(directory: Path) -> str:
    """Of a model's weights and shape."""
    found = hashlib.sha256()
    for file in sorted([*directory.glob("*.safetensors"), directory / "config.json"]):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def family(config: TinyConfig, name: str, tau: float | None, **changes: Any) -> Method:
    """A method by name: vanilla, confidence, entropy or "LoPA K=4"."""
    if tau is None:
        return vanilla(config)
    if name == "entropy":
        return entropy(config, tau, **changes)
    branches = 1 if name == "confidence" else int(name.removeprefix("LoPA K="))
    return lopa(config, branches, tau, **changes)


def families(args: argparse.Namespace) -> dict[str, list[float]]:
    """The methods with a threshold, each with its grid."""
    lookahead = {f"LoPA K={k}": args.tau for k in args.branches}
    return {"confidence": args.tau, "entropy": args.tau_entropy, **lookahead}


def choose(rows: Iterable[Row]) -> Row:
    """The row of the grid whose threshold the table takes: most tokens a pass among those that
    solve at least 95 %, or the most accurate (then most tokens a pass) where none does."""
    rows = list(rows)
    enough = [row for row in rows if row["accuracy"] >= LEAST_ACCURACY]
    if enough:
        return max(enough, key=lambda row: row["tpf"])
    return max(rows, key=lambda row: (row["accuracy"], row["tpf"]))


def ablations(config: TinyConfig, tau: float) -> list[tuple[str, Method, str]]:
    """(what differs, method, mask); K, threshold and the rest are the table's."""
    changes: dict[str, dict[str, Any]] = {
        "reduction: bottom 25 %": {"reduction": "bottom", "fraction": 0.25},
        "reduction: lowest group of 8": {"reduction": "group", "group": 8},
        "reduction: min": {"reduction": "min"},
        "metric: prob": {"metric": "prob"},
        "metric: margin": {"metric": "margin"},
    }
    made = [
        (name, lopa(config, ABLATED, tau, **change), "block_causal")
        for name, change in changes.items()
    ]
    return [*made, ("window: full", lopa(config, ABLATED, tau), "full")]


@cache
def _load(model: str, device: str) -> TinyDLLM:
    return TinyDLLM.load(model, device=device)


def _start_worker() -> None:
    torch.set_num_threads(1)


def measure(job: Job, machine: Machine) -> Row:
    """Decodes a job's problems."""
    torch.backends.cuda.matmul.allow_tf32 = True
    model = _load(job.model, machine.device)
    config = job.method.config
    assert config.branches is not None
    assert config.window is not None
    batch = max(1, min(job.problems, machine.columns // (config.branches * config.window)))
    decoder = decoder_of(machine.decoder, model, config, machine.precision, job.mask)
    outcome = run(decoder, problems(job.split, job.problems, job.seed), batch)
    one = torch.ones_like(outcome.forwards)
    # Seconds are left out: processes that share a device do not time a method.
    summary = outcome.summary()
    return {
        "key": job.key(machine.decoder, machine.precision),
        "model": job.model,
        "weights": job.weights,
        "method": job.method.name,
        "tau": job.tau,
        "change": job.change,
        "split": job.split,
        "seed": job.seed,
        "mask": job.mask,
        "decoder": machine.decoder,
        "precision": machine.precision,
        "batch": batch,
        "config": asdict(config),
        **{key: summary[key] for key in ("problems", "accuracy", "forwards", "tpf", "text_tpf")},
        "accuracy_interval": bootstrap(outcome.correct, one),
        "tpf_interval": bootstrap(outcome.filled, outcome.forwards),
        "text_tpf_interval": bootstrap(outcome.written, outcome.forwards),
    }


class Results:
    """The rows measured so far, in a file that is replaced whole after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        self.chosen: dict[str, dict[str, Any]] = {}
        if path.exists():
            saved = json.loads(path.read_text())
            self.rows = {row["key"]: row for row in saved["rows"]}
            self.chosen = saved["chosen"]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        content = {"chosen": self.chosen, "rows": list(self.rows.values())}
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(self.path)

    def add(self, row: Row) -> None:
        self.rows[row["key"]] = row
        self.save()


def measured(
    jobs: Sequence[Job], machine: Machine, pool: ProcessPoolExecutor | None
) -> Iterator[tuple[Job, Row | Exception]]:
    """Jobs with their rows, or what stopped them, as they are finished; the longest begin first."""
    jobs = sorted(jobs, key=lambda job: -(job.method.config.branches or 1) * job.problems)
    if pool is None:
        for job in jobs:
            yield job, measure(job, machine)
        return
    futures = {pool.submit(measure, job, machine): job for job in jobs}
    for future in as_completed(futures):
        error = future.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        yield futures[future], future.result() if error is None else error


class Table:
    """The models' jobs in their two stages: the grid that chooses, and what it chose."""

    def __init__(self, args: argparse.Namespace, results: Results, console: Console) -> None:
        self.args, self.results, self.console = args, results, console
        self.machine = Machine(args.device, args.decoder, args.precision, args.columns)
        self.weights = {name: digest(weights_of(name)) for name in args.models}
        self.configs = {
            name: TinyConfig(**json.loads((weights_of(name) / "config.json").read_text())["model"])
            for name in args.models
        }
        self.began = time.monotonic()

    def job(self, model: str, method: Method, tau: float | None, split: Split, **more: Any) -> Job:
        args = self.args
        count, seed = (
            (args.train_problems, args.train_seed)
            if split == "train"
            else (args.problems, args.seed)
        )
        return Job(model, self.weights[model], method, tau, split, count, seed, **more)

    def key(self, job: Job) -> str:
        return job.key(self.machine.decoder, self.machine.precision)

    def run(self, jobs: Sequence[Job], pool: ProcessPoolExecutor | None) -> list[Row]:
        """The jobs' rows, in their order.

        Raises:
            RuntimeError: some jobs failed; the others are in the results all the same.
        """
        left = [job for job in jobs if self.key(job) not in self.results.rows]
        failed: list[Exception] = []
        for number, (job, row) in enumerate(measured(left, self.machine, pool), 1):
            if isinstance(row, Exception):
                self.console.print(f"{job.model} {job.method.name} {job.tau}: {row!r}", style="red")
                failed.append(row)
                continue
            self.results.add(row)
            self.console.print(
                f"{time.monotonic() - self.began:6.1f} s {number:3d}/{len(left)} {row['model']} "
                f"{row['split']} {row['method']} {row['tau']} {row['change'] or ''}: "
                f"{row['accuracy']:.1%} at {row['tpf']:.2f}",
                soft_wrap=True,
            )
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(left)} rows failed") from failed[0]
        return [self.results.rows[self.key(job)] for job in jobs]

    def grid(self) -> list[Job]:
        """Training problems over the thresholds, and what needs no threshold."""
        jobs = []
        for model, config in self.configs.items():
            jobs.append(self.job(model, vanilla(config), None, "heldout"))
            for name, taus in families(self.args).items():
                jobs += [self.job(model, family(config, name, t), t, "train") for t in taus]
        return jobs

    def choose(self, rows: Sequence[Row]) -> None:
        """Fills `results.chosen` from the grid's rows."""
        self.results.chosen = {}
        for model in self.configs:
            for name in families(self.args):
                row = choose(
                    row
                    for row in rows
                    if row["split"] == "train" and (row["model"], row["method"]) == (model, name)
                )
                self.results.chosen.setdefault(model, {})[name] = {
                    "tau": row["tau"],
                    "train_accuracy": row["accuracy"],
                    "train_tpf": row["tpf"],
                    "reached": row["accuracy"] >= LEAST_ACCURACY,
                }
        self.results.save()

    def final(self) -> tuple[list[Job], list[Job]]:
        """Held-out jobs: the table's at the chosen thresholds, and the ablations'."""
        jobs, changed = [], []
        for model, config in self.configs.items():
            chosen = self.results.chosen[model]
            jobs.append(self.job(model, vanilla(config), None, "heldout"))
            for name in families(self.args):
                tau = chosen[name]["tau"]
                jobs.append(self.job(model, family(config, name, tau), tau, "heldout"))
            name = f"LoPA K={ABLATED}"
            if self.args.ablations and name in chosen:
                tau = chosen[name]["tau"]
                for change, method, mask in ablations(config, tau):
                    changed.append(
                        self.job(model, method, tau, "heldout", mask=mask, change=change)
                    )
        return jobs, changed

    def make(self, pool: ProcessPoolExecutor | None) -> str:
        """Decodes what is missing, and writes table.md and table.png.

        Returns:
            The table in markdown.
        """
        grid = self.run(self.grid(), pool)
        self.choose(grid)
        jobs, changed = self.final()
        rows = self.run([*jobs, *changed], pool)
        table, ablated = rows[: len(jobs)], rows[len(jobs) :]
        text = markdown(table, ablated, self.results.chosen, self.args.train_problems)
        folder = self.results.path.parent
        (folder / "table.md").write_text(text)
        draw(grid, table, folder / "table.png")
        return text


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.tiny_dllm.table", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=Path("runs/table"))
    parser.add_argument("--models", nargs="+", metavar="MODEL",
                        default=[name for name, path in NAMED.items() if path.exists()],
                        help="names or folders of weights; default: those shipped")  # fmt: skip
    parser.add_argument("--problems", type=int, default=1000, help="held-out problems")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--train-problems", type=int, default=500)
    parser.add_argument("--train-seed", type=int, default=2)
    parser.add_argument("--branches", type=int, nargs="*", default=[2, 4, 8, 14], metavar="K")
    parser.add_argument("--tau", type=float, nargs="+", metavar="TAU",
                        default=[0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995],
                        help="grid of probabilities")  # fmt: skip
    parser.add_argument("--tau-entropy", type=float, nargs="+", metavar="TAU",
                        default=[0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8],
                        help="grid of entropies, nats")  # fmt: skip
    parser.add_argument("--no-ablations", dest="ablations", action="store_false")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--decoder", choices=tuple(DECODERS), default="operators",
                        help="operators: this library's throughout; plain: attention by PyTorch, "
                        "and lopa_step on the CPU")  # fmt: skip
    parser.add_argument("--precision", choices=("fp32", "bf16"),
                        help="of products, keys and values; default: bf16 on an accelerator, as "
                        "in training, fp32 on a CPU")  # fmt: skip
    parser.add_argument("--columns", type=int,
                        help="branch columns decoded together; default: 131072 on an accelerator, "
                        "4096 on a CPU")  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="processes, all on the device")
    args = parser.parse_args(argv)
    args.precision = args.precision or default_precision(args.device)
    args.columns = args.columns or (4096 if args.device == "cpu" else 131072)
    if len(set(args.branches)) != len(args.branches) or not all(k > 1 for k in args.branches):
        parser.error(f"--branches: expected distinct numbers above 1, got {args.branches}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console(stderr=True)
    table = Table(args, Results(args.out / "table.json"), console)
    if args.workers == 1:
        text = table.make(None)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, context, _start_worker) as pool:
            text = table.make(pool)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
