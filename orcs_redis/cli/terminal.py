"""What the command line prints, and how: sessions, changes, documents, complaints.

What sessions contain is shown, never obeyed: control characters are escaped, markup is text.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from io import TextIOWrapper
from typing import Literal, NamedTuple

import msgspec
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from ..model.asset import SessionAsset, to_datetime
from ..model.labels import labels_of
from ..model.meta import SessionMeta
from ..model.sections import ConversationHistory, ConversationTurn
from ..protocol.changes import Change

__all__ = [
    "Column",
    "age",
    "change_line",
    "complain",
    "describe_session",
    "describe_turns",
    "output",
    "print_bytes",
    "print_document",
    "print_json",
    "print_line",
    "print_list",
    "print_records",
    "print_table",
    "print_text",
    "progress_bar",
    "progress_of",
    "records_json",
    "safe",
    "turns_json",
]

_EXCERPT = 200  # characters shown of a tool call's arguments or result

# What can move the cursor, recolour or reorder a line: C0, DEL, C1, directions, line separators. And lone
# surrogates, which can't be printed.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@cache  # one for each stream: what is printed while a bar moves must go above it
def output(*, stderr: bool = False) -> Console:
    """Return the console of standard output or standard error."""
    console = Console(stderr=stderr, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 100_000  # for a program or a file nothing is cut off
    return console


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on standard error if that is a terminal; what it yields advances it by one."""
    with _progress() as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


@contextmanager
def progress_of(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error if that is a terminal; what it yields takes what is done, and of how many."""
    with _progress() as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _progress() -> Progress:
    console = output(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def safe(text: str) -> str:
    """Return text with its control characters escaped."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _block(text: str) -> str:
    return "\n".join("    " + safe(line.replace("\t", "    ")) for line in text.split("\n"))


def complain(problem: object) -> None:
    """Say in one line on standard error what is wrong, or else worth knowing."""
    text = getattr(problem, "format_message", lambda: str(problem) or type(problem).__name__)()
    output(stderr=True).print(Text(f"orcs-redis: {safe(text)}"), soft_wrap=True)


def print_text(what: str | Text) -> None:
    """Print text to standard output."""
    output().print(what, soft_wrap=True)


def print_json(document: object) -> None:
    """Print a JSON document."""
    print_document(json.dumps(document, indent=2) + "\n")


def print_line(document: object) -> None:
    """Print a JSON document in one line, at once."""
    print_document(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n")


def print_document(text: str) -> None:
    """Print JSON: to a program or a file exactly, to a terminal without what it could obey."""
    console = output()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    if console.is_terminal:
        escaped = _UNSAFE.sub(lambda m: m[0] if m[0] == "\n" else f"\\u{ord(m[0]):04x}", text)
        console.out(escaped, highlight=False, end="")
    else:
        console.out(text, highlight=False, end="")


def print_bytes(data: bytes) -> None:
    """Print bytes: to a program or a file exactly, to a terminal as text, without what it could obey."""
    if sys.stdout.isatty():
        lines = data.decode(errors="backslashreplace").split("\n")
        output().out("\n".join(map(safe, lines)), highlight=False)
        return
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    except BrokenPipeError:
        output().on_broken_pipe()


def _when(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S}"


def age(time: datetime) -> str:
    """Return how long ago that was."""
    seconds = (datetime.now(UTC) - time).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def change_line(change: Change) -> Text:
    """Return a change in one line: when, what, which session, its revision, its origin."""
    return Text.assemble(
        (f"{_when(change.updated_at)}.{change.updated_at.microsecond // 1000:03} ", "dim"),
        (f"{change.kind:<8}", "red" if change.kind == "deleted" else "green"),
        (safe(change.id), "bold"),
        (f" @{change.revision}", "cyan"),
        (f" by {change.origin[:8]}", "dim"),
    )


class Column(NamedTuple):
    """A column of a table; of the first one nothing is ever cut."""

    title: str
    justify: Literal["left", "right"] = "left"
    whole: bool = False  # it gives no room to others


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under headings: in a terminal as wide as that, a line each, cut where it must be; else whole."""
    shown = [[safe(cell) for cell in row] for row in rows]
    if output().is_terminal:
        output().print(_fitted(columns, shown))
        return
    lines = [[column.title for column in columns], *shown]
    widths = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
    text = ("  ".join(map(_padded, line, columns, widths)).rstrip() for line in lines)
    output().out("\n".join(text), highlight=False)


def _padded(cell: str, column: Column, width: int) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if column.justify == "right" else cell + space


def _fitted(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column.title, no_wrap=column.whole, overflow="fold", justify=column.justify)
    for first, *others in rows:
        table.add_row(Text(first), *(Text(cell, no_wrap=True, overflow="ellipsis") for cell in others))
    return table


def print_list(metas: Sequence[SessionMeta]) -> None:
    """Print a list of sessions: what of each, depends on the terminal's width."""
    width = output().width
    with_labels = width >= 100 and any(meta.labels for meta in metas)
    with_time = width >= (150 if with_labels else 120)  # else it leaves no room for the names
    columns = {
        "id": Column("id", whole=all(len(meta.id) <= 36 for meta in metas)),  # a UUID stays in one piece
        "name": Column("name"),
        "turns": Column("turns", justify="right", whole=True),
        "updated": Column("updated", justify="right", whole=True),
        "project": Column("project"),
        "labels": Column("labels"),
    }
    absent = {"turns": width < 70, "project": width < 80, "labels": not with_labels}
    names = [name for name in columns if not absent.get(name)]

    def row(meta: SessionMeta) -> list[str]:
        cells = {
            "id": meta.id,
            "name": meta.name or "",
            "turns": str(meta.turn_count),
            "updated": f"{_when(meta.updated_at)} UTC, " * with_time + age(meta.updated_at),
            "project": meta.project_path or "",
            "labels": _labels(meta.labels),
        }
        return [cells[name] for name in names]

    print_table([columns[name] for name in names], map(row, metas))


def print_records(records: Sequence[tuple[str, bytes]]) -> None:
    """Print the keys and sizes of records."""
    columns = (Column("key"), Column("bytes", justify="right", whole=True))
    print_table(columns, ((key, str(len(data))) for key, data in records))


def records_json(records: Sequence[tuple[str, bytes]]) -> str:
    """Return records as a JSON document: values that are JSON just as they are, others in base64."""
    items = [{"key": key, "size": len(data), **_value(data)} for key, data in records]
    return msgspec.json.format(msgspec.json.encode(items), indent=2).decode() + "\n"


def _value(data: bytes) -> dict[str, object]:
    try:
        data.decode()
        msgspec.json.decode(data)
    except (UnicodeDecodeError, msgspec.DecodeError):
        return {"base64": base64.b64encode(data).decode()}
    return {"json": msgspec.Raw(data)}


def _labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in labels.items())


def describe_session(asset: SessionAsset, turns: int) -> Text:
    """Return a session as text, with its last turns."""
    project, history = asset.project_context, asset.history
    labels = labels_of(asset)
    summarised = sum(part.turn_count for part in history.compacted)
    metadata = {key: value for key, value in asset.metadata.items() if key != "labels" or not labels}
    lines = {
        "name": project.name or "",
        "project": project.root_path or "",
        "labels": _labels(labels),
        "technologies": ", ".join(project.technologies),
        "created": f"{_when(asset.created_at)} UTC",
        "updated": f"{_when(asset.updated_at)} UTC, {age(asset.updated_at)}",
        "turns": f"{history.skipped + len(history)}, and {summarised} summarised",
        "skills": ", ".join(asset.skill_configs),
        "snapshots": ", ".join(asset.component_snapshots),
        "grants": ", ".join(grant.pattern for grant in asset.granted_commands),
        "facts": "; ".join(f"{fact.key}: {fact.value}" for fact in project.learned_facts),
        "metadata": _excerpt(metadata),
    }
    text = Text.assemble((safe(asset.id), "bold"))
    for name, value in lines.items():
        if value:
            text.append(f"\n{name:<14}", "dim").append(safe(value))
    shown = history.recent(turns)
    first = history.skipped + len(history) - len(shown)
    if first:
        text.append(f"\n\n... {first} earlier turn{'s' if first > 1 else ''}", "dim")
    for number, turn in enumerate(shown, first):
        text.append(f"\n\n#{number} ", "bold").append_text(_describe_turn(turn))
    return text


def describe_turns(turns: Sequence[ConversationTurn]) -> Text:
    """Return turns as text."""
    return Text("\n\n").join(map(_describe_turn, turns))


def _describe_turn(turn: ConversationTurn) -> Text:
    """Return a turn as text; of a raw item its format, and as content what it says."""
    text = Text.assemble((safe(turn.role), "bold"), (f" {_when(to_datetime(turn.timestamp_ms))}", "dim"))
    if turn.raw is not None:
        text.append(f" {safe(turn.raw.format)}", "cyan")
    tags = f" [{', '.join(turn.tags)}]" if turn.tags else ""
    text.append(safe(tags) + "\n" + _block(turn.content))
    for call in turn.tool_calls:
        how = "ok" if call.success else "failed"
        text.append(f"\n    {safe(call.tool_name)} ", "cyan").append(_excerpt(call.args))
        text.append(f"\n        {how} in {call.duration_ms} ms: ", "dim").append(_excerpt(call.result))
    return text


def turns_json(turns: Sequence[ConversationTurn]) -> list[object]:
    """Return turns as orcs' file has them."""
    asset = SessionAsset(history=ConversationHistory(turns=list(turns)))
    found: list[object] = json.loads(asset.to_json())["history"]["turns"]
    return found


def _excerpt(value: object) -> str:
    text = safe(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 3] + "..."
