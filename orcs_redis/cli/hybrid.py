"""Commands of a folder of orcs that has a shared store: sync, status, resolve, kept.

Only sync, resolve and status --fresh ask the server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Annotated, Any, Literal, NoReturn, TypeAlias

import typer
from rich.text import Text

from ..errors import StorageError, StoreResetError, SyncStoppedError, UnavailableError
from ..model.asset import SessionAsset
from ..model.meta import SessionMeta, SyncMode, SyncState, SyncStatus
from ..names import Kept, SyncReport
from ..sync import HybridSessionStore
from .common import (
    CONFLICTS,
    DONE,
    FAILED,
    Absent,
    Commands,
    CommonOptions,
    IdArgument,
    failure,
    finish,
)
from .terminal import Column, age, complain, output, print_json, print_line, print_table, print_text, progress_of, safe

__all__ = ["commands"]

commands = Commands("A folder with a shared store")

Store: TypeAlias = HybridSessionStore[SessionAsset]

_TICK = 0.2  # seconds between looks at a live store's state
_SHOWN = 20  # sessions of a kind that the table of a round has
_KINDS = ("uploaded", "downloaded", "merged", "deleted", "revived")  # lists of ids in a report

FolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="The folder of orcs' session files.")
]
NewFolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", file_okay=False, help="The folder of orcs' session files; it may be new.")
]


class Side(StrEnum):
    """Whose version holds."""

    LOCAL = "local"
    REMOTE = "remote"


@commands.command("sync")
def sync(
    options: CommonOptions,
    folder: NewFolderArgument,
    live: Annotated[bool, typer.Option("--live", help="Go on until Ctrl-C or SIGTERM.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")] = False,
    adopt: Annotated[bool, typer.Option("--adopt", help="Take a store that was wiped, or another, as it is.")] = False,
    deletions: Annotated[bool, typer.Option("--deletions", help="Delete, even if that is most sessions.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file, changed or not.")] = False,
    prefer: Annotated[Side | None, typer.Option(help="Whose version holds of a part that both changed.")] = None,
) -> int:
    """Bring a folder of orcs' files and the shared store to the same state.

    What differs is uploaded, downloaded, or merged by parts. If both changed one part differently, the session stays
    as it is on either side until resolve, or --prefer decides. What loses is kept: see kept. With --live it goes on
    after that, with a line for each thing done.
    """
    if live and dry_run:
        raise ValueError("--live and --dry-run exclude each other")
    if live:
        _follow(options, folder, prefer, adopt=adopt, deletions=deletions, verify=verify)
    with _open(options, folder, prefer) as store:
        with progress_of("comparing" if dry_run else "syncing") as progress:
            report = _round(store, dry_run=dry_run, adopt=adopt, deletions=deletions, verify=verify, progress=progress)
        failed = [failure(id, error) for id, error in report.failed]
        if options.json:
            print_json(_report_json(report, failed))
        else:
            _print_report(store, report, dry_run=dry_run)
    if failed:
        return FAILED
    return CONFLICTS if report.conflicts else DONE


@commands.command("status")
def status(
    options: CommonOptions,
    folder: FolderArgument,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compare with the shared store first.")] = False,
) -> None:
    """List the sessions that differ from those in the shared store, as far as is known here.

    Without --fresh it asks no server, and what others did since the last round is not known.
    """
    with _open(options, folder) as store:
        if fresh:
            _round(store, dry_run=True)
        metas, status = store.list(), store.sync_status()
        differing = [meta for meta in metas if meta.sync_state is not SyncState.SYNCED]
        reasons = {id: _collision(store, id) for id in status.conflicts}
    synced = len(metas) - len(differing)
    if options.json:
        print_json(_status_json(status, synced, differing, reasons))
        return
    if differing:
        _print_states(differing, reasons)
    print_text(_status_line(status, synced))


@commands.command("resolve")
def resolve(
    options: CommonOptions,
    folder: FolderArgument,
    id: IdArgument,
    keep: Annotated[str, typer.Option(metavar="local|remote|FILE", help="Whose version holds, or a session file.")],
) -> None:
    """Decide a conflict: of the parts that collide that version holds, all else is merged. A file is taken as it is.

    Both versions are kept before that: see kept.
    """
    chosen: Literal["local", "remote"] | SessionAsset
    match keep:
        case "local" | "remote":
            chosen = keep
        case _:
            chosen = _session_of(Path(keep), id)
    with _open(options, folder) as store:
        store.resolve(id, keep=chosen)
    finish(options, f"resolved {id}: {keep}", {"id": id, "keep": keep})


@commands.command("kept")
def kept(
    options: CommonOptions,
    folder: FolderArgument,
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="Only those of this session.")] = None,
    restore: Annotated[str | None, typer.Option(metavar="COPY", help="Make this copy the session here.")] = None,
) -> None:
    """List the copies of what lost, the newest first, or restore one.

    What a restored copy replaces is kept as well; the next round brings it to the shared store.
    """
    with _open(options, folder) as store:
        copies = store.kept(id)
        if restore is not None:
            copy = _named(copies, restore)
            store.save(store.load_kept(copy), overwrite=True)
            finish(options, f"restored {copy.id}", {"id": copy.id, "restored": str(copy.path)})
            return
    if options.json:
        print_json([_kept_json(copy) for copy in copies])
    elif copies:
        _print_kept(copies)
    else:
        complain("no copies are kept")


def _open(
    options: CommonOptions,
    folder: Path,
    prefer: Side | None = None,
    *,
    on_sync: Callable[[SyncReport], object] | None = None,
) -> Store:
    """Open a folder; a live store if someone is to be called."""
    side: Literal["local", "remote"] | None = None if prefer is None else prefer.value
    namespace = options.namespace or "orcs"
    live = on_sync is not None
    return HybridSessionStore(folder, options.url, live=live, prefer=side, on_sync=on_sync, namespace=namespace)


# Rounds


def _round(store: Store, **arguments: Any) -> SyncReport:
    """Make a round; what stops it says which option goes on."""
    try:
        return store.sync(**arguments)
    except StoreResetError as error:
        raise StorageError(f"{_sentence(error)} Nothing was done; with --adopt what is here goes there") from error
    except SyncStoppedError as error:
        raise StorageError(f"{_sentence(error)} With --deletions they are made") from error


def _sentence(error: StorageError) -> str:
    return f"{str(error).rstrip('.')}."


def _report_json(report: SyncReport, failed: list[dict[str, str]]) -> dict[str, object]:
    kinds = {kind: getattr(report, kind) for kind in (*_KINDS, "conflicts")}
    return {**kinds, "failed": failed, "kept": [str(path) for path in report.kept]}


def _print_report(store: Store, report: SyncReport, *, dry_run: bool) -> None:
    """Print a line for each session, of many of a kind for the first ones, then one with the numbers."""
    rows = list[Sequence[str]]()
    for kind in _KINDS:
        ids: list[str] = getattr(report, kind)
        rows += [(id, kind, "") for id in ids[:_SHOWN]]
        rows += [(f"... {len(ids) - _SHOWN} more", kind, "")] * (len(ids) > _SHOWN)
    rows += [(id, "conflict", _collision(store, id)) for id in report.conflicts]
    if rows:
        print_table((Column("session"), Column("to be" if dry_run else "done", whole=True), Column("why")), rows)
    counts = {kind: len(getattr(report, kind)) for kind in (*_KINDS, "conflicts", "failed", "kept")}
    named = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "nothing to do"
    print_text(f"dry run: {named}" if dry_run else named)


# Live


def _follow(options: CommonOptions, folder: Path, prefer: Side | None, **first: bool) -> NoReturn:
    """Print what a live store does, until a signal ends it, or what waiting does not mend."""
    lines = _Lines(options)
    with suppress(UnavailableError), _open(options, folder, prefer) as once, progress_of("syncing") as progress:
        lines.print(_round(once, **first, progress=progress))
    reports = SimpleQueue[SyncReport]()
    with _open(options, folder, prefer, on_sync=reports.put) as store:
        reached = True
        while True:
            with suppress(Empty):
                lines.print(reports.get(timeout=_TICK))
            mode = store.sync_status().mode
            if mode is SyncMode.ERROR:
                lines.print(_round(store))  # it raises, or was mended
            if mode is not SyncMode.SYNCING and reached != (mode is SyncMode.ONLINE):
                reached = not reached
                complain("the server is reached" if reached else "the server can't be reached: waiting for it")


class _Lines:
    """Prints a line for each thing done; what can't be done is said once."""

    def __init__(self, options: CommonOptions) -> None:
        self._json = options.json
        self._open: dict[str, str] = {}  # sessions that wait for something

    def print(self, report: SyncReport) -> None:
        """Print what a round did."""
        for kind in _KINDS:
            for id in getattr(report, kind):
                self._open.pop(id, None)
                self._line(kind, id)
        for path in report.kept:
            self._line("kept", path.parent.name, copy=path.name)
        for id, error in report.failed:
            if self._is_new(id, str(error)):
                self._line("failed", id, why=str(error))
        for id in report.conflicts:
            if self._is_new(id, "conflict"):
                self._line("conflict", id)

    def _is_new(self, id: str, problem: str) -> bool:
        before = self._open.get(id)
        self._open[id] = problem
        return problem != before

    def _line(self, kind: str, id: str, **more: str) -> None:
        now = datetime.now(UTC)
        if self._json:
            print_line({"at": now.isoformat(), "kind": kind, "id": id, **more})
            return
        colour = {"deleted": "red", "failed": "red", "conflict": "red", "kept": "yellow"}.get(kind, "green")
        text = Text.assemble((f"{now:%Y-%m-%d %H:%M:%S} ", "dim"), (f"{kind:<10} ", colour), (safe(id), "bold"))
        print_text(text.append("".join(f" {safe(each)}" for each in more.values())))


# States


def _collision(store: Store, id: str) -> str:
    """Return why a session is in conflict, as it was last found; without the server."""
    journal = store._journal
    row, seen = journal.rows.get(id), journal.seen.get(id)
    reasons = [", ".join(row.parts) or row.reason] if row is not None else []
    return next(filter(None, [*reasons, seen.reason if seen is not None else ""]), "")


def _print_states(metas: Sequence[SessionMeta], reasons: dict[str, str]) -> None:
    named = output().width >= 100 or not any(reasons.values())  # else a reason has no room
    columns = {
        "session": Column("session", whole=all(len(meta.id) <= 36 for meta in metas)),
        "name": Column("name"),
        "state": Column("state", whole=True),
        "why": Column("why"),
    }
    absent = {"name": not named, "why": not any(reasons.values())}
    names = [name for name in columns if not absent.get(name)]

    def row(meta: SessionMeta) -> list[str]:
        cells = {
            "session": meta.id,
            "name": meta.name or "",
            "state": meta.sync_state.value,
            "why": reasons.get(meta.id, ""),
        }
        return [cells[name] for name in names]

    print_table([columns[name] for name in names], map(row, metas))


def _status_line(status: SyncStatus, synced: int) -> str:
    counts = {
        "synced": synced,
        "to upload": status.pending_uploads,
        "to download": status.pending_downloads,
        "in conflict": len(status.conflicts),
    }
    text = ", ".join(f"{count} {name}" for name, count in counts.items() if count or name == "synced")
    return text + (f"; last synced {age(status.last_sync)}" if status.last_sync else "")


def _status_json(
    status: SyncStatus, synced: int, metas: Sequence[SessionMeta], reasons: dict[str, str]
) -> dict[str, object]:
    return {
        "synced": synced,
        "pending_uploads": status.pending_uploads,
        "pending_downloads": status.pending_downloads,
        "conflicts": status.conflicts,
        "last_sync": status.last_sync and status.last_sync.isoformat(),
        "sessions": [
            {"id": meta.id, "name": meta.name, "state": meta.sync_state.value, "why": reasons.get(meta.id, "")}
            for meta in metas
        ],
    }


def _session_of(path: Path, id: str) -> SessionAsset:
    """Read the file that is to be a session; ValueError if it is that of another."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"--keep {path}: {error.strerror or error}; or is it local, or remote?") from None
    asset = SessionAsset.from_json(data)
    if asset.id != id:
        raise ValueError(f"--keep {path}: that is session {asset.id}, not {id}")
    return asset


# Copies


def _named(copies: Sequence[Kept], name: str) -> Kept:
    """Find a copy by its file's name or path."""
    found = [copy for copy in copies if copy.path == Path(name) or name in (copy.path.name, copy.path.stem)]
    if not found:
        raise Absent(f"there is no copy {name}")
    if len(found) > 1:
        raise ValueError(
            f"--restore {name}: sessions {', '.join(copy.id for copy in found)} have one: name the session"
        )
    return found[0]


def _print_kept(copies: Sequence[Kept]) -> None:
    columns = (Column("copy"), Column("session"), Column("of", whole=True), Column("kept", whole=True), Column("why"))
    print_table(columns, ((c.path.name, c.id, c.side, age(c.at), c.why) for c in copies))


def _kept_json(copy: Kept) -> dict[str, str]:
    return {
        "id": copy.id,
        "copy": copy.path.name,
        "side": copy.side,
        "at": copy.at.isoformat(),
        "why": copy.why,
        "path": str(copy.path),
    }
