"""The result as tables: Markdown for the folder, and for the terminal, from the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..report import Sheet, number
from .catalogue import STORES
from .results import NOT_MEASURED, Result


def sheets(result: Result) -> Iterator[Sheet]:
    """Return the tables in which there is a number: the rounds' median, its spread in brackets."""
    for sheet in _sheets(result):
        if any(character.isdigit() for row in sheet.rows for cell in row[1:] for character in cell.partition("[")[0]):
            yield sheet


def _sheets(result: Result) -> Iterator[Sheet]:
    lengths, loads = result.sizes("append"), result.sizes("load")
    yield _sheet(
        result,
        "Append one turn, alone, µs (median; spread of the rounds)",
        "One caller; by the number of turns that the session has.",
        {f"{size:,} turns": (f"append {size}", "p50_us", 1) for size in lengths}
        | {f"client CPU at {size}": (f"append {size}", "client_us", 1) for size in lengths[:1]},
    )
    yield _sheet(
        result,
        "Append: server's CPU, µs",
        "INFO's used_cpu, all of the server's work for the call, by the number of turns that the session has.",
        {f"{size:,} turns": (f"append {size}", "server_us", 1) for size in lengths},
    )
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
        {"pairs a second": ("fleet", "pairs_per_s", 1)}
        | {name: ("fleet", name, 1) for name in ("acknowledged", "lost", "doubled", "failed")},
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
    rows: list[list[str]] = []
    reasons: dict[str, dict[str, None]] = {}
    for store in result.stores():
        cells = [(result.cell(workload, store, name), factor) for workload, name, factor in columns.values()]
        if all(cell == NOT_MEASURED for cell, _ in cells):
            continue
        row = [store]
        for cell, factor in cells:
            if isinstance(cell, str):
                reasons.setdefault(cell, {})[store] = None
                row.append(f"— [{list(reasons).index(cell) + 1}]")
            else:
                median, least, most = (number(value * factor) for value in cell)
                row.append(median if least == most else f"{median} ({least}–{most})")
        rows.append(row)
    notes = [f"[{n}] {', '.join(stores)}: {reason}." for n, (reason, stores) in enumerate(reasons.items(), 1)]
    failures, wrong = [], []
    workloads = dict.fromkeys(workload for workload, _, _ in columns.values())
    for store, rounds in ((s, r) for workload in workloads for s, r in result.samples.get(workload, {}).items()):
        kinds = sorted({numbers["failures"] for numbers in rounds if numbers.get("failures")})
        if kinds and "failed" in columns:
            failures.append(f"{', '.join(kinds)} ({store})")
        if any(numbers.get("answer") == "wrong" for numbers in rounds):
            wrong.append(store)
    if failures:
        notes.append(f"Failed with {'; '.join(failures)}.")
    if wrong:
        notes.append(f"Wrong answer (not the 50 changed last, newest first): {', '.join(sorted(set(wrong)))}.")
    return Sheet(title, " ".join([about, *notes]), ["store", *columns], rows)


def heading(result: Result) -> Iterator[str]:
    """Return where, when and with what it was measured."""
    machine = result.machine
    yield (
        f"{result.date[:10]}; {machine['cpu']}, {machine['cores']} cores, {machine['system']}; {machine['server']}; "
        f"Python {machine['python']}; {result.rounds} rounds in which the stores took turns"
        + ("." if result.full else ", short run.")
    )
    yield ""
    for store, found in result.versions.items():
        what = ", ".join(f"{package} {version}" for package, version in found.items())
        if store in STORES:
            yield f"- {store}: {STORES[store].about} ({what})"
        else:
            yield f"- {store}: limit: the server's own tool, RPUSH and LRANGE over 50 connections"
    for store, reason in result.absent.items():
        yield f"- {store}: not measured: {reason}"


def markdown(result: Result) -> str:
    """Return the tables as Markdown."""
    lines = ["# Against what a user would pick instead", "", *heading(result)]
    for sheet in sheets(result):
        lines += ["", f"## {sheet.title}", "", sheet.about, ""]
        lines += map(_row, [sheet.columns, ["---", *["---:"] * (len(sheet.columns) - 1)], *sheet.rows])
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
