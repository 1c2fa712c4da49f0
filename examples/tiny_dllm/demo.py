"""Watch the tiny model solve held-out problems, and see what each way of decoding costs.

`python -m examples.tiny_dllm.demo` decodes the same problems by each method and prints a table;
`--prompt "..."` solves one problem and shows the order in which its text is filled.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import lopa_kernels as lk
from examples.tiny_dllm.decode import Decoder
from examples.tiny_dllm.methods import (
    PAPER_TAU,
    Method,
    Outcome,
    entropy,
    lopa,
    run,
    vanilla,
)
from examples.tiny_dllm.model import NAMED, TinyConfig, TinyDLLM
from examples.tiny_dllm.problems import problems
from examples.tiny_dllm.tokenizer import CharTokenizer

#: thresholds chosen on training problems, see README.md beside this file
TAU_CONF = {1: 0.95, 2: 0.99, 4: 0.98, 8: 0.98, 14: 0.98}

#: the table of `table.py`, which names the distilled model's thresholds
TABLE = Path(__file__).with_name("results") / "table.json"

# Ten colours that read on dark and light terminals, cycled over the rounds.
COLOURS = ("red", "dark_orange", "yellow3", "green", "spring_green3", "cyan", "dodger_blue1",
           "blue_violet", "magenta", "deep_pink3")  # fmt: skip


def distilled_methods(config: TinyConfig, branches: int) -> list[Method]:
    """The distilled model's rows: dParallel's rule, and lookahead over `branches` branches, at the
    table's thresholds, or the published ones of both where there is no table."""
    table = json.loads(TABLE.read_text())["chosen"] if TABLE.exists() else {}
    own = {name: entry["tau"] for name, entry in table.get("distilled", {}).items()}
    methods = [
        entropy(config, own.get("entropy", 0.5)),
        lopa(config, branches, own.get(f"LoPA K={branches}", PAPER_TAU)),
    ]
    return [replace(method, name=f"distilled, {method.name}") for method in methods]


def compare(
    runs: list[tuple[TinyDLLM, Method]], args: argparse.Namespace, console: Console
) -> dict[str, Outcome]:
    chosen = problems("heldout", args.problems, args.seed)
    outcomes: dict[str, Outcome] = {}
    with Progress(
        TextColumn("{task.description:>21}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        tasks = [
            progress.add_task(method.name, start=False, total=len(chosen)) for _, method in runs
        ]
        for task, (model, method) in zip(tasks, runs, strict=True):
            progress.start_task(task)
            decoder = Decoder(model, method.config, mask=args.mask, compile=args.compile)
            outcomes[method.name] = run(
                decoder, chosen, args.batch, lambda n, task=task: progress.advance(task, n)
            )
    return outcomes


def table(outcomes: dict[str, Outcome]) -> Table:
    out = Table(
        box=box.SIMPLE,
        title="Held-out problems",
        caption="TPF: positions filled a forward pass. Last three: seconds inside the model, "
        "inside lopa_step with the commit, and elsewhere.",
    )
    headers = ("method", "accuracy", "passes", "TPF", "tokens/s", "model", "lopa_step", "else")
    for name in headers:
        out.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for name, outcome in outcomes.items():
        s = outcome.summary()
        out.add_row(
            name,
            f"{s['accuracy']:.1%}",
            f"{s['forwards']:,}",
            f"{s['tpf']:.2f}",
            f"{s['tokens_per_second']:.0f}",
            f"{s['seconds_model']:.2f}",
            f"{s['seconds_step']:.3f}",
            f"{s['seconds_elsewhere']:.2f}",
        )
    return out


def solve(model: TinyDLLM, prompt: str, branches: int, mask: str, console: Console) -> dict:
    """Decodes one prompt, printing each round as it happens."""
    tokenizer = CharTokenizer()
    ids = tokenizer.encode(prompt)
    method = lopa(model.config, branches, TAU_CONF.get(branches, TAU_CONF[8]))
    size = model.config.max_new_tokens
    text = torch.full((size,), model.config.mask_id)
    filled_in = torch.zeros(size, dtype=torch.int64)
    rounds: list[dict] = []

    def show(state: lk.LopaState, out: lk.LopaStep) -> None:
        number = len(rounds) + 1
        before = text.clone()
        first = int(state.cache_len) - len(ids)
        new = torch.cat([
            out.committed[0, out.committed[0] >= 0],
            out.state.tokens[0, 0, : int(out.state.length[0, 0])],
        ])  # fmt: skip
        start = max(first, 0)
        text[start : first + len(new)] = new[start - first :]
        changed = (before == model.config.mask_id) & (text != model.config.mask_id)
        filled_in[changed] = number
        winner = int(out.winner)
        rounds.append({
            "round": number,
            "winner": winner,
            "branches": int(state.branches),
            "filled": int(changed.sum()),  # with the token that made a winning lookahead branch
            "positions": changed.nonzero().flatten().tolist(),
        })  # fmt: skip
        who = "anchor" if winner == 0 else f"branch {winner}"
        line = Text(f"{number:3d} {who:>9} of {int(state.branches):2d} +{int(changed.sum()):2d} ")
        opened = first + len(new)
        for token, when in zip(text[:opened].tolist(), filled_in[:opened].tolist(), strict=True):
            if token == model.config.mask_id:
                line.append("·", style="dim")
            else:
                style = COLOURS[when % len(COLOURS)] + (" bold reverse" if when == number else "")
                line.append(tokenizer.piece(token), style=style)
        console.print(line, soft_wrap=True)

    console.print(Text(prompt, style="bold"))
    decoded = Decoder(model, method.config, mask=mask).decode([ids], show)
    solution = tokenizer.decode(decoded.tokens[0].tolist())
    final = Text()
    for token, when in zip(decoded.tokens[0].tolist(), filled_in.tolist(), strict=True):
        if token == model.config.eos_id:
            break
        final.append(tokenizer.piece(token), style=COLOURS[when % len(COLOURS)])
    legend = Text("round ")
    for entry in rounds:
        number = entry["round"]
        legend.append(f" {number} ", style=f"reverse {COLOURS[number % len(COLOURS)]}")
    console.print(final, soft_wrap=True)
    console.print(legend)
    tokens = sum(entry["filled"] for entry in rounds)
    console.print(f"{tokens} positions in {len(rounds)} forward passes: {tokens / len(rounds):.1f}")
    return {"prompt": prompt, "solution": solution, "rounds": rounds}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.tiny_dllm.demo", description=__doc__)
    parser.add_argument("--problems", type=int, default=16, help="held-out problems to decode")
    parser.add_argument("--batch", type=int, default=8, help="problems decoded together")
    parser.add_argument("--branches", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K")
    parser.add_argument("--seed", type=int, default=0, help="which problems")
    parser.add_argument("--mask", choices=("block_causal", "full"), default="block_causal")
    parser.add_argument("--compile", action="store_true", help="one torch.compile graph a round")
    parser.add_argument("--prompt", help="solve this one problem and show the order of filling")
    parser.add_argument("--weights", help="a directory of weights, or base or distilled; "
                        "default: both")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the results here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console()
    model = TinyDLLM.load(args.weights)
    if args.prompt is not None:
        try:
            result = solve(model, args.prompt, max(args.branches), args.mask, console)
        except ValueError as error:
            console.print(f"[red]{error}[/red]")
            return 2
    else:
        methods = [vanilla(model.config)]
        methods += [lopa(model.config, k, TAU_CONF.get(k, TAU_CONF[8])) for k in args.branches]
        runs = [(model, method) for method in methods]
        if args.weights is None and NAMED["distilled"].exists():
            student = TinyDLLM.load("distilled")
            runs += [(student, m) for m in distilled_methods(student.config, max(args.branches))]
        outcomes = compare(runs, args, console)
        console.print(table(outcomes))
        result = {name: outcome.summary() for name, outcome in outcomes.items()}
    if args.json is not None:
        header = {"torch": torch.__version__, "threads": torch.get_num_threads(),
                  "machine": platform.machine(), "isa": torch.ops.lopa.cpu_isa()}  # fmt: skip
        args.json.write_text(json.dumps({"environment": header, "results": result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
