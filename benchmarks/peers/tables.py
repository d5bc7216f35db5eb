"""The result as tables: Markdown for the folder, rich for the terminal, from the same rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from .catalogue import STORES
from .results import NOT_MEASURED, Cell, Result


class Sheet(NamedTuple):
    """A table's title, a sentence on it, its columns and rows."""

    title: str
    about: str
    columns: list[str]
    rows: list[list[str]]


def sheets(result: Result) -> Iterator[Sheet]:
    """Return the tables. A number is the rounds' median, its spread in brackets."""
    lengths = result.sizes("append")
    yield _sheet(
        result,
        "Append one turn, alone, µs (median; spread of the rounds)",
        "One caller; by the number of turns that the session has.",
        {f"{size:,} turns": (f"append {size}", "p50_us", 1) for size in lengths}
        | {f"client CPU at {lengths[0]}": (f"append {lengths[0]}", "client_us", 1)}
        if lengths
        else {},
    )
    if lengths:
        yield _sheet(
            result,
            "Append: server's CPU, µs",
            "INFO's used_cpu, all of the server's work for the call, by the number of turns that the session has.",
            {f"{size:,} turns": (f"append {size}", "server_us", 1) for size in lengths},
        )
    loads = result.sizes("load")
    yield _sheet(
        result,
        "Load, alone, µs",
        "Whole, decoded into what the store's users work with, and the last 20 turns without loading all.",
        {f"{size:,} turns": (f"load {size}", "p50_us", 1) for size in loads}
        | {f"last 20 of {size:,}": (f"load {size}", "tail_us", 1) for size in loads[-1:]},
    )
    yield _sheet(
        result,
        "The newest 50 sessions, ms",
        "By how many there are. Where the answer was wrong, that is said below.",
        {f"of {size:,}": (f"newest {size}", "p50_us", 1e-3) for size in result.sizes("newest")},
    )
    yield _sheet(
        result,
        "50 tasks in one process, operations a second",
        "Each on a session of its own, of 50 turns to begin with; a blocking store has 50 threads.",
        {
            "append": ("tasks", "append_per_s", 1),
            "load": ("tasks", "load_per_s", 1),
            "append: client CPU, µs": ("tasks", "append_client_us", 1),
            "append: server CPU, µs": ("tasks", "append_server_us", 1),
            "load: client CPU, µs": ("tasks", "load_client_us", 1),
        },
    )
    yield _sheet(
        result,
        "A fleet of 4 processes with 25 tasks each: load and append, one in five on 4 shared sessions",
        "What was acknowledged, held against what is stored afterwards. Sums of a round.",
        {
            "pairs a second": ("fleet", "pairs_per_s", 1),
            "acknowledged": ("fleet", "acknowledged", 1),
            "lost": ("fleet", "lost", 1),
            "doubled": ("fleet", "doubled", 1),
            "failed": ("fleet", "failed", 1),
        },
    )
    yield _sheet(
        result,
        "Memory, notification and start",
        "Server's memory (files: on disk) of a session of 50 turns against its compact JSON; from the call of a write "
        "to its arrival at a watching process (bare redis-py: PUBLISH alone); a process' first load.",
        {
            "memory / JSON": ("memory", "against_json", 1),
            "told of a change, ms": ("notify", "p50_us", 1e-3),
            "import, ms": ("fleet", "import_ms", 1),
            "connect, ms": ("fleet", "open_ms", 1),
            "first load, ms": ("fleet", "first_load_ms", 1),
        },
    )


def _sheet(result: Result, title: str, about: str, columns: Mapping[str, tuple[str, str, float]]) -> Sheet:
    rows, reasons = [], dict[str, list[str]]()
    for store in result.stores():
        cells = [result.cell(workload, store, name) for workload, name, _ in columns.values()]
        if all(cell.reason == NOT_MEASURED for cell in cells):
            continue
        row = [store]
        for cell, (_, _, factor) in zip(cells, columns.values(), strict=True):
            if cell.median is None:
                note = reasons.setdefault(cell.reason, [])
                note.append(store)
                row.append(f"— [{list(reasons).index(cell.reason) + 1}]")
            else:
                row.append(_text(cell, factor))
        rows.append(row)
    notes = [
        f"[{n}] {', '.join(dict.fromkeys(stores))}: {reason}." for n, (reason, stores) in enumerate(reasons.items(), 1)
    ]
    failures = {
        store: ", ".join(sorted({numbers["failures"] for numbers in rounds if numbers.get("failures")}))
        for workload in dict.fromkeys(workload for workload, _, _ in columns.values())
        for store, rounds in result.samples.get(workload, {}).items()
    }
    if "failed" in columns and any(failures.values()):
        notes.append(
            "Failed with " + "; ".join(f"{kinds} ({store})" for store, kinds in failures.items() if kinds) + "."
        )
    wrong = sorted(
        {
            store
            for workload, _, _ in columns.values()
            for store, rounds in result.samples.get(workload, {}).items()
            if any(numbers.get("answer") == "wrong" for numbers in rounds)
        }
    )
    if wrong:
        notes.append(f"Wrong answer (not the 50 changed last, newest first): {', '.join(wrong)}.")
    return Sheet(title, " ".join([about, *notes]), ["store", *columns], rows)


def _told(sheet: Sheet) -> bool:
    return any(
        any(character.isdigit() for character in cell.partition("[")[0]) for row in sheet.rows for cell in row[1:]
    )


def _text(cell: Cell, factor: float) -> str:
    assert cell.median is not None
    assert cell.least is not None
    assert cell.most is not None
    median, least, most = (_number(value * factor) for value in (cell.median, cell.least, cell.most))
    return median if least == most else f"{median} ({least}–{most})"


def _number(value: float) -> str:
    return (
        f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2g}" if value < 1 else f"{value:.3g}"
    )


def heading(result: Result) -> list[str]:
    """Return where, when and with what it was measured."""
    machine = result.machine
    lines = [
        f"{result.date[:10]}; {machine['cpu']}, {machine['cores']} cores, {machine['system']}; {machine['server']}; "
        f"Python {machine['python']}; {result.rounds} rounds in which the stores took turns"
        + ("." if result.full else ", short run."),
        "",
    ]
    for store, found in result.versions.items():
        what = ", ".join(f"{package} {version}" for package, version in found.items())
        lines.append(
            f"- {store}: {STORES[store].about} ({what})"
            if store in STORES
            else f"- {store}: limit: the server's own tool, RPUSH and LRANGE over 50 connections"
        )
    lines += [f"- {store}: not measured: {reason}" for store, reason in result.absent.items()]
    return lines


def markdown(result: Result) -> str:
    """Return the tables as Markdown."""
    lines = ["# Against what a user would pick instead", "", *heading(result)]
    for sheet in filter(_told, sheets(result)):
        lines += ["", f"## {sheet.title}", "", sheet.about, ""]
        lines += [_row(sheet.columns), _row(["---", *["---:"] * (len(sheet.columns) - 1)]), *map(_row, sheet.rows)]
    return "\n".join(lines) + "\n"


_row: Callable[[list[str]], str] = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731  # as short as it is


def show(result: Result, console: Console) -> None:
    """Print the tables."""
    for line in heading(result):
        console.print(line, markup=False)
    for sheet in filter(_told, sheets(result)):
        table = Table(title=sheet.title, title_justify="left", caption=sheet.about, caption_justify="left")
        for n, column in enumerate(sheet.columns):
            table.add_column(column, justify="right" if n else "left")
        for row in sheet.rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        console.print(table)
