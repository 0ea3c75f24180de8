"""The table, the plots and the page of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from d2ext.files import atomic_write
from d2ext.tools.compare.comparison import Comparison, Plot
from d2ext.utils.html import escape, page, table


def table_rows(comparison: Comparison, runs: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """A row for each arm, by titles of columns: means, and deviations over several seeds."""
    rows = []
    for name, arm in comparison.arms.items():
        own = [run for run in runs if run["arm"] == name]
        if not own:
            continue
        row = {"": arm.title}
        for key, title in comparison.columns.items():
            row[title] = _mean([run["results"].get(key) for run in own], ".2f")
        row["ms an image"] = _mean([run["ms"] for run in own], ".1f")
        row["GFLOPs"] = f"{own[0]['flops'] / 1e9:.2f}"
        row["parameters"] = f"{own[0]['parameters'] / 1000:,.0f} k"
        row["training images"] = f"{statistics.mean(run['images'] for run in own):,.0f}"
        row["training s"] = _mean([run["seconds"] for run in own], ".0f")
        rows.append(row)
    return rows


def format_table(comparison: Comparison, runs: Sequence[dict[str, Any]]) -> str:
    """:func:`table_rows` in Markdown."""
    rows = table_rows(comparison, runs)
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


def write_page(
    comparison: Comparison, report: dict[str, Any], plots: Sequence[Path], folder: Path
) -> Path:
    """Write ``index.html`` into the folder of a comparison; returns its path.

    Args:
        report: the content of ``comparison.json``
        plots: files in ``folder``
    """
    runs = report["runs"]
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    spread = f"means and standard deviations of {len(seeds)} seeds" if seeds[1:] else "one seed"
    machine = ", ".join(f"{key} {value}" for key, value in report["environment"].items())
    parts = [
        f"<p>{escape(comparison.summary)}; {spread}. Measured on {escape(machine)}.</p>",
        table(table_rows(comparison, runs), "keys", formatted=True),
        "<p>ms an image: from bytes in memory to results at the size of the image, one image after the "
        "other. GFLOPs: of the network, for the first image; multiply and add count as two. Training s: "
        "without evaluations and without waiting for data.</p>",
        f'<p class="plots">{"".join(_image(x.name) for x in plots)}</p>',
        f"<h2>Validation images, seed {seeds[0]}</h2>",
        _pictures(comparison, [run["arm"] for run in runs], seeds[0], folder),
    ]
    target = folder / "index.html"
    with atomic_write(target, "w") as file:
        file.write(page(report["comparison"].replace("-", " ").capitalize(), parts))
    return target


def _pictures(comparison: Comparison, arms: Sequence[str], seed: int, folder: Path) -> str:
    """A column for the annotations and each arm, a row for each image."""
    columns = {"annotations": "annotations"}
    for name, arm in comparison.arms.items():
        if name in arms:
            columns[f"{name}/seed_{seed}/pictures"] = arm.title
    rows = ["".join(f"<th>{escape(title)}</th>" for title in columns.values())]
    for file in sorted((folder / "annotations").glob("*.png")):
        rows.append("".join(f"<td>{_image(f'{column}/{file.name}')}</td>" for column in columns))
    return f'<table class="pictures">{"".join(f"<tr>{row}</tr>" for row in rows)}</table>'


def _image(path: str) -> str:
    return f'<img src="{escape(path)}" alt="{escape(path)}">'
