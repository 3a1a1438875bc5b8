"""Draws what `rivals.py` has measured: how many times less CPU time than ksmd it takes.

Ratios on a logarithmic scale, since twice as much is as far from even as half. A whisker goes from
the least to the greatest of the repeats, the bar to their median.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator
from rivals import ratios, spread

LABELS = {
    "scattered": "scattered duplicates",
    "runs16": "runs of 16 pages",
    "runs512": "runs of 512 pages",
    "unique": "all unique",
    "zero": "half zero pages",
    "arcangeli": "equal but for the last word",
    "instagram": "32 workers, 61 % volatile",
    "demo": "real files (the demo)",
}
INK, GREY, GRID = "#24292f", "#6e7781", "#d8dee4"
BLUE, ORANGE = "#0969da", "#bf5700"

Bars = list[tuple[str, list[float]]]


def _panel(axes: Axes, title: str, names: list[str], groups: list[tuple[str, str, Bars]]) -> None:
    height = 0.72 / len(groups)
    most = 1.0
    for number, (label, colour, bars) in enumerate(groups):
        for name, values in bars:
            if not values:
                continue
            middle, least, greatest = spread(values)
            most = max(most, greatest)
            y = names.index(name) + (number - (len(groups) - 1) / 2) * height
            axes.barh(
                y,
                middle - 1,
                left=1,
                height=height * 0.86,
                color=colour,
                label=label if name == bars[0][0] else None,
            )
            axes.plot([least, greatest], [y, y], color=INK, linewidth=1, solid_capstyle="butt")
            axes.annotate(
                f"{middle:.2g}" if middle < 10 else f"{middle:,.0f}",
                (max(greatest, 1), y),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=INK,
            )
    axes.set_xscale("log")
    axes.set_xlim(right=most * 2.2)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=8)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    if len(groups) > 1:
        axes.legend(
            frameon=False,
            fontsize=8.5,
            loc="lower right",
            labelcolor=INK,
            ncols=2,
            bbox_to_anchor=(1.02, 0.995),
            borderaxespad=0.3,
            columnspacing=1.2,
            handlelength=1.2,
        )


def draw(measured: dict[str, Any], folder: Path) -> list[Path]:
    """Draws bench.png and bench.svg into a folder; returns their paths. Nothing without ksmd."""
    cases: dict[str, list[dict[str, Any]]] = measured["cases"]
    names = [name for name, rows in cases.items() if ratios(rows, "pagemerge", "")]
    if not names:
        return []
    still = [name for name in names if name != "instagram"]

    def bars(chosen: list[str], find: Callable[[list[dict[str, Any]]], list[float]]) -> Bars:
        return [(name, find(cases[name])) for name in chosen]

    converge = [("pagemerge", BLUE, bars(names, lambda rows: ratios(rows, "pagemerge", "")))]
    if any(ratios(cases[name], "threads", "") for name in names):
        threads = bars(names, lambda rows: ratios(rows, "threads", ""))
        converge.append(("threads=2", "#80b3f0", threads))
    later = [
        ("nothing changed", BLUE, bars(still, lambda rows: ratios(rows, "pagemerge", "rest"))),
        ("1 % changed", ORANGE, bars(still, lambda rows: ratios(rows, "pagemerge", "changed"))),
    ]
    with mpl.rc_context({"font.family": "DejaVu Sans", "svg.hashsalt": "pagemerge"}):
        figure, axes = plt.subplots(
            1, 2 if still else 1, figsize=(11, 0.9 + 0.5 * len(names)), squeeze=False
        )
        _panel(axes[0][0], "until everything is merged", names, converge)
        if still:
            _panel(axes[0][1], "each further pass", still, later)
            axes[0][1].set_yticklabels([LABELS[name] for name in still])
        figure.suptitle(
            f"CPU time of the kernel's ksmd / CPU time of pagemerge ({measured['mib']:,} MiB)",
            x=0.008,
            y=0.985,
            ha="left",
            fontsize=12,
            color=INK,
            weight="bold",
        )
        figure.tight_layout(rect=(0, 0, 1, 0.985), w_pad=3)
        paths = []
        for kind, extra in (("png", {"Software": None}), ("svg", {"Date": None})):
            path = folder / f"bench.{kind}"
            figure.savefig(path, dpi=150, facecolor="white", metadata=extra)
            paths.append(path)
        plt.close(figure)
    return paths
