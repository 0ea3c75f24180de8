"""The table and the plots of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from d2ext.tools.compare.comparison import Comparison, Plot


def format_table(comparison: Comparison, runs: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a row for each arm: means, and deviations over several seeds."""
    rows = []
    for name, arm in comparison.arms.items():
        own = [run for run in runs if run["arm"] == name]
        if not own:
            continue
        row = {"": arm.title}
        for key, title in comparison.columns.items():
            row[title] = _mean([run["results"].get(key) for run in own], ".2f")
        row["parameters"] = f"{own[0]['parameters'] / 1000:,.0f} k"
        row["training s"] = _mean([run["seconds"] for run in own], ".0f")
        rows.append(row)
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True) + "\n"


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.mean(known):{form}}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):{form}}"


def draw_plots(comparison: Comparison, runs: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write a PNG for each plot that has points; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first = next(iter(comparison.columns.values()))
    plots = {"time": Plot("training time, s", first), **comparison.plots}
    arms = list(comparison.arms)
    written = []
    for name, plot in plots.items():
        figure, axes = plt.subplots(figsize=(7, 4.2))
        labelled: set[str] = set()
        for run in runs:
            points = run["series"].get(name, [])
            if not points:
                continue
            x, y, error = zip(*points, strict=True)
            arm = run["arm"]
            axes.errorbar(
                x,
                y,
                error if any(error) else None,
                marker="o" if len(points) < 30 else "",
                markersize=3,
                capsize=2,
                color=f"C{arms.index(arm)}",
                label=None if arm in labelled else comparison.arms[arm].title,
            )
            labelled.add(arm)
        if labelled:
            axes.set(xlabel=plot.x, ylabel=plot.y, yscale="log" if plot.log else "linear")
            axes.grid(alpha=0.3, which="both")
            axes.legend(fontsize=8)
            figure.tight_layout()
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=100)
        plt.close(figure)
    return written
