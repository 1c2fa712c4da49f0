"""``python -m bench``: every operator beside its peers, checked and timed in one run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import all_cases, cuda_runner, report, runner, select
from bench.case import Case
from bench.runner import Result, Roofline, Settings


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    result.add_argument(
        "--op", action="append", metavar="NAME", help="operators whose name contains this"
    )
    result.add_argument("--case", metavar="SUBSTRING", help="cases whose name contains this")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    result.add_argument("--threads", type=int, metavar="N", help="default: PyTorch's")
    result.add_argument("--json", type=Path, metavar="PATH")
    result.add_argument("--plot", type=Path, metavar="PATH")
    result.add_argument("--quick", action="store_true", help="few samples, warm caches")
    return result


def run(
    cases: list[Case],
    settings: Settings,
    run_case: Callable[[Case, Settings, bool], Result] = runner.run_case,
) -> list[Result]:
    """Runs the cases under a live progress bar; an operator that failed is timed no further.

    Interrupted (Ctrl-C), it tells of the cases that are complete.
    """
    results: list[Result] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=f"{case.op}: {case.name}")
            timed = case.op not in report.failed_ops(results)
            try:
                results.append(run_case(case, settings, timed))
            except KeyboardInterrupt:
                print(f"interrupted after {len(results)} of {len(cases)} cases", file=sys.stderr)
                break
            progress.advance(task)
    return results


def main(arguments: Sequence[str] | None = None, cases: list[Case] | None = None) -> int:
    """The program; `cases` replaces the suite's own. Returns 1 where a check failed, else 0."""
    options = parser().parse_args(arguments)
    if options.threads is not None:
        if options.threads < 1:
            parser().error(f"--threads: expected at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda: PyTorch finds no CUDA device")
    try:
        chosen = select(
            all_cases(options.device) if cases is None else cases, options.op, options.case
        )
    except ValueError as error:
        parser().error(str(error))
    timing = cuda_runner if options.device == "cuda" else runner
    header = report.environment(options.device)
    if options.device == "cuda":
        header |= cuda_runner.environment()
    roofline: Roofline = timing.measure_roofline(options.quick)
    results = run(chosen, timing.settings(options.quick), timing.run_case)
    try:
        # Other programs' load hides the ceiling: the better of before and after.
        roofline = roofline.best_of(timing.measure_roofline(options.quick))
    except RuntimeError as error:
        # A GPU that a kernel has brought down: what was measured before is told.
        print(f"the ceilings were measured once: {error}", file=sys.stderr)
    print(report.markdown(results, roofline, header))
    if options.json is not None:
        report.write_json(options.json, report.as_dict(results, roofline, header))
    if options.plot is not None:
        report.plot(options.plot, results)
    wrong = any(m.check.startswith("wrong") for result in results for m in result.measurements)
    return 1 if wrong or report.failed_ops(results) else 0


if __name__ == "__main__":
    sys.exit(main())
