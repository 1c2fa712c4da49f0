"""The markdown and the plot of `table`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

Row = dict[str, Any]


def interval(value: float, pair: Sequence[float], form: str) -> str:
    return f"{value:{form}} [{pair[0]:{form}}, {pair[1]:{form}}]"


def measures(row: Row) -> list[str]:
    return [
        interval(row["accuracy"], row["accuracy_interval"], ".1%"),
        f"{row['forwards']:,}",
        interval(row["tpf"], row["tpf_interval"], ".2f"),
        interval(row["text_tpf"], row["text_tpf_interval"], ".2f"),
    ]


MEASURES = ["accuracy", "forward passes", "TPF", "text TPF"]


def threshold(row: Row, chosen: dict[str, dict[str, Any]]) -> str:
    """The row's threshold; a star where it does not solve what the rule asks for."""
    if row["tau"] is None:
        return ""
    unit = " nats" if row["method"] == "entropy" else ""
    star = "" if chosen[row["model"]][row["method"]]["reached"] else " *"
    return f"{row['tau']:g}{unit}{star}"


def grid_table(headers: list[str], rows: list[list[str]]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def markdown(
    table: Sequence[Row],
    ablated: Sequence[Row],
    chosen: dict[str, dict[str, Any]],
    train_problems: int,
) -> str:
    """The table and the ablations, with what their columns mean."""
    first = table[0]
    lines = [
        f"{first['problems']:,} held-out problems; brackets are 95 % bootstrap intervals over "
        f"problems. TPF counts every position filled, text TPF the text alone. Each threshold has "
        f"the most tokens a pass among those of its grid that solve at least 95 % of "
        f"{train_problems:,} training problems; * marks the most accurate where none does.",
        "",
        grid_table(
            ["model", "method", "threshold", *MEASURES],
            [[r["model"], r["method"], threshold(r, chosen), *measures(r)] for r in table],
        ),
        "",
    ]
    if ablated:
        branches = ablated[0]["config"]["branches"]
        rows = []
        for model in dict.fromkeys(row["model"] for row in ablated):
            own = [r for r in ablated if r["model"] == model]
            as_above = [r for r in table if (r["model"], r["method"]) == (model, own[0]["method"])]
            rows += [[model, "as above", *measures(r)] for r in as_above]
            rows += [[model, r["change"], *measures(r)] for r in own]
        lines += [
            f"LoPA K = {branches} with one thing changed, at the threshold above. There the "
            "reduction is the mean, the metric neg_entropy, and the window block-causal.",
            "",
            grid_table(["model", "change", *MEASURES], rows),
            "",
        ]
    return "\n".join(lines)


#: colours of Okabe and Ito, for the methods in the order of the table
COLOURS = ("#000000", "#0072B2", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7")
MARKERS = ("o", "s", "^", "D")


def draw(grid: Sequence[Row], table: Sequence[Row], path: Path) -> None:
    """Accuracy over TPF: the grid on training problems faint, the table's rows with their
    intervals."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    methods = list(dict.fromkeys(row["method"] for row in table))
    models = list(dict.fromkeys(row["model"] for row in table))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(methods)}
    marker = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(models)}
    dashes = {name: ("--", "-", ":", "-.")[i % 4] for i, name in enumerate(models)}
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for model in models:
        for method in methods:
            points = sorted(
                (row["tpf"], 100 * row["accuracy"])
                for row in grid
                if (row["model"], row["method"], row["split"]) == (model, method, "train")
            )
            if points:
                axes.plot(*zip(*points, strict=True), linestyle=dashes[model], linewidth=1,
                          marker=marker[model], markersize=3.5, color=colour[method],
                          alpha=0.3)  # fmt: skip
    for row in table:
        x, y = row["tpf"], 100 * row["accuracy"]
        low_x, high_x = row["tpf_interval"]
        low_y, high_y = (100 * edge for edge in row["accuracy_interval"])
        # A bootstrap interval need not hold the value where all resamples agree.
        error = [[[max(0.0, x - low_x)], [max(0.0, high_x - x)]],
                 [[max(0.0, y - low_y)], [max(0.0, high_y - y)]]]  # fmt: skip
        axes.errorbar(x, y, xerr=error[0], yerr=error[1], color=colour[row["method"]],
                      marker=marker[row["model"]], markersize=8, markeredgecolor="white",
                      linestyle="none", elinewidth=1, capsize=2, zorder=3)  # fmt: skip
    handles = [Line2D([], [], color=colour[name], marker="o", linestyle="none", label=name)
               for name in methods]  # fmt: skip
    handles += [Line2D([], [], color="grey", marker=marker[name], linestyle=dashes[name],
                       label=name) for name in models]  # fmt: skip
    axes.legend(handles=handles, fontsize=9)
    axes.set(xlabel="TPF, positions filled a forward pass", ylabel="accuracy, %",
             title="Held-out problems; faint: the grid, on training problems")  # fmt: skip
    least = min(100 * row["accuracy_interval"][0] for row in table)
    axes.set_ylim(bottom=max(0, least - 12))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
