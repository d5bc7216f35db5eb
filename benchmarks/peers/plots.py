"""The result as plots: SVG, for light and for dark pages."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import Result

OURS = "#d1495b"
PALETTE = ("#2e86ab", "#e09f3e", "#6a994e", "#8d6a9f", "#577590", "#bc8034", "#43aa8b", "#7a7a7a", "#9c6644", "#5e548e")
INK = {"light": "#24292f", "dark": "#e6edf3"}


def draw(result: Result) -> Iterator[tuple[str, str]]:
    """Yield each plot's file name and SVG, once for each shade."""
    for shade, ink in INK.items():
        style: dict[Any, Any] = {
            "svg.hashsalt": "orcs_redis", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
            "axes.spines.right": False, "grid.alpha": 0.15, "axes.axisbelow": True,
            **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], ink),
            "grid.color": ink,
        }  # fmt: skip
        for name, plot in PLOTS.items():
            with mpl.rc_context(style):
                figure = Figure(figsize=(7.2, 3.9), layout="constrained")
                if not plot(result, figure.add_subplot()):
                    continue
                svg = io.StringIO()
                figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
                yield f"{name}-{shade}.svg", svg.getvalue()


def _append(result: Result, axes: Axes) -> bool:
    axes.set(title="Append one turn", xlabel="turns that the session has", ylabel="ms, median")
    return _lines(result, axes, "append")


def _newest(result: Result, axes: Axes) -> bool:
    axes.set(title="The newest 50 sessions", xlabel="sessions that there are", ylabel="ms, median")
    return _lines(result, axes, "newest")


def _tasks(result: Result, axes: Axes) -> bool:
    axes.set(title="50 tasks in one process, sessions of 50 turns", xlabel="operations a second")
    return _bars(result, axes, "tasks", {"append": "append_per_s", "load": "load_per_s"})


def _memory(result: Result, axes: Axes) -> bool:
    axes.set(title="Memory of a session of 50 turns", xlabel="times its compact JSON")
    return _bars(result, axes, "memory", {"memory": "against_json"})


PLOTS = {"append": _append, "tasks": _tasks, "newest": _newest, "memory": _memory}


def _lines(result: Result, axes: Axes, workload: str) -> bool:
    sizes = result.sizes(workload)
    if len(sizes) < 2:
        return False
    for number, store in enumerate(result.stores()):
        medians = [(size, result.median(f"{workload} {size}", store, "p50_us")) for size in sizes]
        points = [(size, median / 1000) for size, median in medians if median is not None]
        if points:
            ours = store.startswith("orcs_redis")
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=4,
                linewidth=2.5 if ours else 1.3,
                linestyle="--" if "blocking" in store else "-",
                color=OURS if ours else PALETTE[number % len(PALETTE)],
                label=store,
            )
    axes.set(xscale="log", yscale="log")
    axes.grid(axis="y")
    axes.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return True


def _bars(result: Result, axes: Axes, workload: str, columns: dict[str, str]) -> bool:
    rows = {store: [result.median(workload, store, name) for name in columns.values()] for store in result.stores()}
    rows = {store: row for store, row in reversed(rows.items()) if any(row)}
    height = 0.8 / len(columns)
    for number, label in enumerate(columns):
        values = [row[number] or 0.0 for row in rows.values()]
        at = [place + height * (len(columns) - 1 - number) for place in range(len(rows))]
        colour = OURS if number == 0 else PALETTE[number - 1]
        bars = axes.barh(at, values, height * 0.92, color=colour, label=label)
        texts = [f"{value:,.0f}" if value >= 10 else f"{value:.2f}" for value in values]
        axes.bar_label(bars, texts, padding=3, fontsize=7)
    axes.set_yticks([place + height * (len(columns) - 1) / 2 for place in range(len(rows))], list(rows))
    axes.grid(axis="x")
    if len(columns) > 1:
        axes.legend(frameon=False, fontsize=8, loc="center right")
    axes.margins(x=0.12)
    return bool(rows)
