"""What a run says: Markdown tables, JSON, a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

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


def _row(result: Result, measurement: Measurement, roofline: Roofline, told: bool) -> list[str]:
    median, low, high = measurement.median, measurement.low, measurement.high
    if not told or median is None or low is None or high is None:
        verdict = measurement.check if measurement.failed else f"{measurement.check}, withheld"
        return [measurement.provider, "FAILED", "", "", "", "", "", verdict]
    ratio = result.ratio(measurement)
    memory = measurement.extra_memory
    return [
        measurement.provider,
        _number(median),
        f"{_number(low)} .. {_number(high)}",
        _rate(result.case.bytes, median * 1e-6, roofline.read_bytes_per_s),
        _rate(result.case.flops, median * 1e-6, roofline.flops_per_s),
        "" if ratio is None or measurement.check == "unchecked" else f"{_number(ratio)}x",
        "" if memory is None else f"{memory / 1e6:.2f}",
        measurement.check,
    ]


def markdown(results: list[Result], roofline: Roofline, header: dict[str, str]) -> str:
    """The environment, then a table for each operator."""
    lines = [f"- {name}: {value}" for name, value in header.items()]
    lines.append(f"- read bandwidth: {roofline.read_bytes_per_s / 1e9:.1f} GB/s")
    lines.append(f"- fp32 matmul: {roofline.flops_per_s / 1e9:.0f} GFLOP/s")
    withheld = failed_ops(results)
    for op in dict.fromkeys(result.case.op for result in results):
        rows = []
        for result in results:
            if result.case.op != op:
                continue
            for index, measurement in enumerate(result.measurements):
                name = result.case.name if index == 0 else ""
                rows.append([name, *_row(result, measurement, roofline, op not in withheld)])
        table = tabulate(rows, ("case", *HEADERS), tablefmt="github", disable_numparse=True)
        lines += ["", f"## {op}", "", table]
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
            }
            if told and m.median is not None:
                seconds = m.median * 1e-6
                row["microseconds"] = {"median": m.median, "low": m.low, "high": m.high}
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
        "roofline": {
            "read_bytes_per_s": roofline.read_bytes_per_s,
            "flops_per_s": roofline.flops_per_s,
        },
        "cases": cases,
    }


def write_json(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


def plot(path: Path, results: list[Result]) -> None:
    """Bars: how many times as fast as the best peer ours is, a case each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    withheld = failed_ops(results)
    bars = [
        (result.case.op, f"{result.case.op}: {result.case.name}", ratio)
        for result in results
        if result.case.op not in withheld
        for measurement in result.measurements
        if measurement.provider == "lopa" and (ratio := result.ratio(measurement)) is not None
    ]
    bars.reverse()
    ops = list(dict.fromkeys(op for op, _, _ in bars))
    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.3 * len(bars)), layout="constrained")
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
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
