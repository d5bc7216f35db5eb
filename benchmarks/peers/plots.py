"""The result as plots: SVG, for light and for dark pages."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import Result

OURS = "#d1495b"
PALETTE = ("#2e86ab", "#e09f3e", "#6a994e", "#8d6a9f", "#577590", "#bc8034", "#43aa8b", "#7a7a7a", "#9c6644", "#5e548e")
INK = {"light": "#24292f", "dark": "#e6edf3"}


def draw(result: Result, folder: Path) -> None:
    """Write each plot twice."""
    mpl.rcParams.update({"svg.hashsalt": "orcs_redis", "svg.fonttype": "none", "font.size": 9})
    for shade, ink in INK.items():
        for name, plot in (("append", _append), ("tasks", _tasks), ("newest", _newest), ("memory", _memory)):
            figure = Figure(figsize=(7.2, 3.9), layout="constrained")
            axes = figure.add_subplot()
            if not plot(result, axes):
                continue
            axes.tick_params(colors=ink, which="both")
            for part in (axes.xaxis.label, axes.yaxis.label, axes.title):
                part.set_color(ink)
            for spine in axes.spines.values():
                spine.set_color(ink)
            axes.grid(visible=True, axis="x" if name in ("tasks", "memory") else "y", color=ink, alpha=0.15)
            axes.spines[["top", "right"]].set_visible(False)
            if (legend := axes.get_legend()) is not None:
                for text in legend.get_texts():
                    text.set_color(ink)
            figure.savefig(folder / f"{name}-{shade}.svg", transparent=True, metadata={"Date": None})


def _lines(result: Result, axes: Axes, workload: str, factor: float) -> bool:
    sizes = result.sizes(workload)
    for number, store in enumerate(result.stores()):
        cells = [(size, result.cell(f"{workload} {size}", store, "p50_us").median) for size in sizes]
        points = [(size, value * factor) for size, value in cells if value is not None]
        if points:
            ours = store.startswith("orcs_redis")
            axes.plot(
                [size for size, _ in points],
                [value for _, value in points],
                marker="o",
                markersize=4,
                linewidth=2.5 if ours else 1.3,
                linestyle="--" if "blocking" in store else "-",
                color=OURS if ours else PALETTE[number % len(PALETTE)],
                label=store,
            )
    axes.set(xscale="log", yscale="log")
    axes.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return len(sizes) > 1  # one size makes no line


def _append(result: Result, axes: Axes) -> bool:
    axes.set(title="Append one turn", xlabel="turns that the session has", ylabel="ms, median")
    return _lines(result, axes, "append", 1e-3)


def _newest(result: Result, axes: Axes) -> bool:
    axes.set(title="The newest 50 sessions", xlabel="sessions that there are", ylabel="ms, median")
    return _lines(result, axes, "newest", 1e-3)


def _bars(result: Result, axes: Axes, columns: dict[str, tuple[str, str]]) -> bool:
    stores = [
        store
        for store in reversed(result.stores())
        if any(result.cell(*column[:1], store, column[1]).median is not None for column in columns.values())
    ]
    height = 0.8 / len(columns)
    for number, (label, (workload, name)) in enumerate(columns.items()):
        values = [result.cell(workload, store, name).median or 0.0 for store in stores]
        at = [place + height * (len(columns) - 1 - number) for place in range(len(stores))]
        colour = OURS if number == 0 else PALETTE[number - 1]
        bars = axes.barh(at, values, height * 0.92, color=colour, label=label)
        texts = [f"{value:,.0f}" if value >= 10 else f"{value:.2f}" for value in values]
        for text in axes.bar_label(bars, texts, padding=3, fontsize=7):
            text.set_color("#808890")  # legible on both
    axes.set_yticks([place + height * (len(columns) - 1) / 2 for place in range(len(stores))], stores)
    if len(columns) > 1:
        axes.legend(frameon=False, fontsize=8, loc="center right")
    axes.margins(x=0.12)
    return bool(stores)


def _tasks(result: Result, axes: Axes) -> bool:
    axes.set(title="50 tasks in one process, sessions of 50 turns", xlabel="operations a second")
    return _bars(result, axes, {"append": ("tasks", "append_per_s"), "load": ("tasks", "load_per_s")})


def _memory(result: Result, axes: Axes) -> bool:
    axes.set(title="Memory of a session of 50 turns", xlabel="times its compact JSON")
    return _bars(result, axes, {"memory": ("memory", "against_json")})
