"""What a run says: Markdown tables, JSON, a plot."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from bench.case import Case
from bench.runner import Measurement, Result, Roofline
from lopa_kernels.collect_env import cpu_isa, cpu_name, versions

#: of the JSON file; raised when a key changes its meaning or goes away
SCHEMA = 1

HEADERS = (
    "provider",
    "us",
    "quartiles",
    "GB/s (of read)",
    "GFLOP/s (of matmul)",
    "to best peer",
    "extra MB",
    "check",
)

CUDA_HEADERS = (
    "provider",
    "us",
    "quartiles",
    "moved or done",
    "of roofline",
    "to best peer",
    "extra MB",
    "timed",
    "check",
)


def environment(device: str) -> dict[str, str]:
    return {
        **dict(versions()),
        "device": device,
        "cpu": cpu_name(),
        "cpu kernels": cpu_isa(),
        "threads": str(torch.get_num_threads()),
    }


def failed_ops(results: list[Result]) -> set[str]:
    """Operators for which no speed is told: a provider's result was wrong in some case."""
    return {result.case.op for result in results if result.failed}


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _rate(amount: int, seconds: float, ceiling: float) -> str:
    rate = amount / seconds
    return f"{_number(rate / 1e9)} ({rate / ceiling:.1%})" if amount else ""


def _cuda_rate(case: Case, seconds: float, roofline: Roofline) -> list[str]:
    """What bounds the case, by the second; and the least time by what was taken."""
    if case.bytes == 0 and case.flops == 0:
        return ["", ""]
    memory = case.bytes / roofline.bytes_per_s >= case.flops / roofline.flops_per_s
    rate = f"{_number(case.bytes / seconds / 1e9)} GB/s"
    if not memory:
        rate = f"{_number(case.flops / seconds / 1e12)} TFLOP/s"
    return [rate, f"{roofline.seconds(case) / seconds:.1%}"]


def _row(result: Result, measurement: Measurement, roofline: Roofline, told: bool) -> list[str]:
    case = result.case
    blank = len(CUDA_HEADERS if case.device == "cuda" else HEADERS) - 3
    median, low, high = measurement.median, measurement.low, measurement.high
    if measurement.left_out:
        return [measurement.provider, "", *[""] * blank, measurement.check]
    if not told or median is None or low is None or high is None:
        verdict = measurement.check if measurement.failed else f"{measurement.check}, withheld"
        return [measurement.provider, "FAILED", *[""] * blank, verdict]
    ratio = result.ratio(measurement)
    memory = measurement.extra_memory
    if case.device == "cuda":
        rates = _cuda_rate(case, median * 1e-6, roofline)
    else:
        rates = [
            _rate(case.bytes, median * 1e-6, roofline.read_bytes_per_s),
            _rate(case.flops, median * 1e-6, roofline.flops_per_s),
        ]
    return [
        measurement.provider,
        _number(median),
        f"{_number(low)} .. {_number(high)}",
        *rates,
        "" if ratio is None or measurement.check == "unchecked" else f"{_number(ratio)}x",
        "" if memory is None else f"{memory / 1e6:.2f}",
        *([measurement.timing] if case.device == "cuda" else []),
        measurement.check,
    ]


def sizes_of(name: str) -> dict[str, int]:
    """The letters of a case's name: "B1 K8 W64" or "B 1 K 8 W 64"."""
    return {letter: int(size) for letter, size in re.findall(r"\b([A-Z][a-z]?) ?(\d+)\b", name)}


def _is_swept(case: Case) -> bool:
    return "sweep" in case.name.split(", ")


def _looks_ahead(case: Case) -> bool:
    sizes = sizes_of(case.name)
    return sizes.get("K", 0) >= 2 and sizes.get("P", 0) >= 256


#: what cases of an operator a summary is about
SUBSETS: dict[str, Callable[[Case], bool]] = {
    "all": lambda case: True,
    "sweep": _is_swept,
    "K >= 2 and P >= 256": _looks_ahead,
}


@dataclasses.dataclass(frozen=True)
class Summary:
    """How many times as fast as its best peer `lopa` is, over cases of one operator."""

    op: str
    subset: str
    cases: int
    geometric_mean: float
    lowest: float
    lowest_case: str
    below_one: list[str]

    def line(self) -> str:
        slower = f"slower than it in {len(self.below_one)}: " + "; ".join(self.below_one)
        return (
            f"- {self.subset}, {self.cases} cases: {self.geometric_mean:.2f}x the best peer in the "
            f"geometric mean, at least {self.lowest:.2f}x ({self.lowest_case}); "
            + (slower if self.below_one else "slower than it in none")
        )


def summaries(results: list[Result]) -> list[Summary]:
    """Of every operator of which speed is told, for each subset that has two cases or more."""
    ratios: dict[str, list[tuple[Case, float]]] = {}
    for result in results:
        for measurement in result.measurements:
            ratio = result.ratio(measurement)
            if measurement.provider == "lopa" and ratio is not None:
                ratios.setdefault(result.case.op, []).append((result.case, ratio))
    found = []
    for op, pairs in ratios.items():
        if op in failed_ops(results):
            continue
        for subset, belongs in SUBSETS.items():
            chosen = [(ratio, case.name) for case, ratio in pairs if belongs(case)]
            if len(chosen) < 2:
                continue
            lowest, lowest_case = min(chosen)
            mean = statistics.geometric_mean(ratio for ratio, _ in chosen)
            below = [name for ratio, name in chosen if ratio < 1]
            found.append(Summary(op, subset, len(chosen), mean, lowest, lowest_case, below))
    return found


def markdown(results: list[Result], roofline: Roofline, header: dict[str, str]) -> str:
    """The environment, then for each operator a table and what it comes to."""
    facts = {**header, **roofline.header()}
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    on_gpu = any(result.case.device == "cuda" for result in results)
    headers = CUDA_HEADERS if on_gpu else HEADERS
    withheld = failed_ops(results)
    for op in dict.fromkeys(result.case.op for result in results):
        rows = []
        for result in results:
            if result.case.op != op:
                continue
            for index, measurement in enumerate(result.measurements):
                name = result.case.name if index == 0 else ""
                rows.append([name, *_row(result, measurement, roofline, op not in withheld)])
        table = tabulate(rows, ("case", *headers), tablefmt="github", disable_numparse=True)
        lines += ["", f"## {op}", "", table]
        told = [summary.line() for summary in summaries(results) if summary.op == op]
        if told:
            lines += ["", "Times as fast as the best peer:", "", *told]
    return "\n".join(lines)


def as_dict(results: list[Result], roofline: Roofline, header: dict[str, str]) -> dict[str, Any]:
    """The same for machines. Times are microseconds; null where nothing may be said."""
    withheld = failed_ops(results)
    cases = []
    for result in results:
        case = result.case
        told = case.op not in withheld
        rows = []
        for m in result.measurements:
            row: dict[str, Any] = {
                "provider": m.provider,
                "ours": m.ours,
                "check": m.check,
                "microseconds": None,
                "samples": m.samples,
                "bytes_per_s": None,
                "flops_per_s": None,
                "roofline": None,
                "ratio_to_best_peer": None,
                "extra_memory_bytes": m.extra_memory,
                "timing": m.timing,
            }
            if told and m.median is not None:
                seconds = m.median * 1e-6
                row["microseconds"] = {"median": m.median, "low": m.low, "high": m.high}
                if not case.host:
                    row["bytes_per_s"] = case.bytes / seconds
                    row["flops_per_s"] = case.flops / seconds
                    row["roofline"] = roofline.seconds(case) / seconds
                row["ratio_to_best_peer"] = None if m.check == "unchecked" else result.ratio(m)
            rows.append(row)
        cases.append(
            {
                "op": case.op,
                "name": case.name,
                "bytes": case.bytes,
                "flops": case.flops,
                "buffers": result.buffers,
                "failed": result.failed,
                "measurements": rows,
            }
        )
    return {
        "schema": SCHEMA,
        "environment": header,
        "roofline": dataclasses.asdict(roofline),
        "cases": cases,
        "summaries": [dataclasses.asdict(summary) for summary in summaries(results)],
    }


def write_json(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


def plot(path: Path, results: list[Result]) -> None:
    """How many times as fast as the best peer ours is, a bar a case; and times against rows.

    A sweep has a panel for each layout of heads; its cases have a bar where they are goals too.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    withheld = failed_ops(results)
    told = [result for result in results if result.case.op not in withheld]
    bars = [
        (result.case.op, f"{result.case.op}: {result.case.name}", ratio)
        for result in told
        for measurement in result.measurements
        if measurement.provider == "lopa" and (ratio := result.ratio(measurement)) is not None
        if "goal" in result.case.name or not _is_swept(result.case)
    ]
    series, sweeps = _series(told), _sweeps(told)
    heights = [1.5 + 0.3 * len(bars), *[4.0] * len(series), *[5.0] * len(sweeps)]
    figure, panels = pyplot.subplots(
        len(heights),
        figsize=(10, sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    _draw_bars(panels[0, 0], bars[::-1])
    following = iter(panels[1:, 0])
    for label, points in series.items():
        _draw_series(next(following), label, points)
    for label, swept in sweeps.items():
        _draw_sweep(next(following), label, swept)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_bars(axes: Any, bars: list[tuple[str, str, float]]) -> None:
    ops = list(dict.fromkeys(op for op, _, _ in bars))
    colours = [f"C{ops.index(op)}" for op, _, _ in bars]
    # From 1, to the left where a peer is faster.
    ratios = [ratio for _, _, ratio in bars]
    drawn = axes.barh(range(len(bars)), [ratio - 1 for ratio in ratios], left=1, color=colours)
    axes.bar_label(drawn, labels=[f"{_number(ratio)}x" for ratio in ratios], padding=3)
    axes.set_yticks(range(len(bars)), [label for _, label, _ in bars])
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("times as fast as the best peer")


def _series(results: list[Result]) -> dict[str, list[tuple[int, Result]]]:
    """Cases that differ in their rows alone, "<rows> x <the rest>", where there are three."""
    found: dict[str, list[tuple[int, Result]]] = {}
    for result in results:
        match = re.fullmatch(r"(\d+) x (.*)", result.case.name)
        if match is not None:
            label = f"{result.case.op}: {match[2]}"
            found.setdefault(label, []).append((int(match[1]), result))
    return {
        label: sorted(points, key=lambda point: point[0])
        for label, points in found.items()
        if len(points) >= 3
    }


def _draw_series(axes: Any, label: str, points: list[tuple[int, Result]]) -> None:
    names = dict.fromkeys(m.provider for _, result in points for m in result.measurements)
    for name in names:
        line = [
            (rows, m.median)
            for rows, result in points
            for m in result.measurements
            if m.provider == name and m.median is not None
        ]
        if line:
            ours = name.partition(",")[0] == "lopa"
            axes.plot(*zip(*line, strict=True), "o-" if ours else "x--", label=name)
    axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="us")
    axes.set_xticks([rows for rows, _ in points], [str(rows) for rows, _ in points])
    axes.minorticks_off()
    # Title and legend run into the room that the bars' labels take on the left.
    axes.set_title(label, loc="right", fontsize="medium")
    axes.legend(fontsize="small", loc="center right", bbox_to_anchor=(-0.15, 0.5))


def _sweeps(results: list[Result]) -> dict[str, dict[tuple[int, int], dict[int, float]]]:
    """Of each layout of heads the ratios by (K, W), then by P."""
    found: dict[str, dict[tuple[int, int], dict[int, float]]] = {}
    for result in results:
        sizes = sizes_of(result.case.name)
        if not _is_swept(result.case) or not {"K", "W", "P", "Hq", "Hk"} <= set(sizes):
            continue
        label = f"{result.case.op}, {sizes['Hq']}/{sizes['Hk']} heads"
        for measurement in result.measurements:
            ratio = result.ratio(measurement)
            if measurement.provider == "lopa" and ratio is not None:
                lines = found.setdefault(label, {})
                lines.setdefault((sizes["K"], sizes["W"]), {})[sizes["P"]] = ratio
    return found


def _draw_sweep(axes: Any, label: str, lines: dict[tuple[int, int], dict[int, float]]) -> None:
    """A line for each (K, W), K by its colour and W by its marker, side by side at every P."""
    from matplotlib import ticker

    prefixes = sorted({prefix for points in lines.values() for prefix in points})
    branches = sorted({k for k, _ in lines})
    windows = sorted({w for _, w in lines})
    for index, (k, w) in enumerate(sorted(lines)):
        aside = 0.6 * ((index + 0.5) / len(lines) - 0.5)
        points = sorted(lines[k, w].items())
        axes.plot(
            [prefixes.index(prefix) + aside for prefix, _ in points],
            [ratio for _, ratio in points],
            color=f"C{branches.index(k)}",
            marker="osD^vPX*"[windows.index(w) % 8],
            linewidth=1,
            label=f"K {k}, W {w}",
        )
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set(yscale="log", xlabel="P", ylabel="times as fast as the best peer")
    axes.set_xticks(range(len(prefixes)), [str(prefix) for prefix in prefixes])
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7, 8)))
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.yaxis.set_minor_formatter("")
    axes.grid(axis="y", alpha=0.3)
    axes.set_title(label, loc="right", fontsize="medium")
    axes.legend(fontsize="small", loc="center right", bbox_to_anchor=(-0.15, 0.5))
