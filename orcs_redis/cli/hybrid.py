"""Commands of a folder of orcs that has a shared store: sync, status, resolve, kept.

Only sync, resolve and status --fresh ask the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeAlias

import typer
from rich.text import Text

from ..errors import StorageError, StoreResetError, SyncStoppedError, UnavailableError
from ..model.asset import SessionAsset
from ..model.meta import SessionMeta, SyncMode, SyncState, SyncStatus
from ..names import Kept, SyncReport
from ..sync import HybridSessionStore
from ..transport.address import FileFolder
from ..transport.address import resolve as resolve_url
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
_KINDS = ("uploaded", "downloaded", "merged", "deleted", "revived")  # lists of ids in a report, of what was done
_NAMES = {kind: kind for kind in _KINDS} | {"conflicts": "in conflict", "failed": "failed", "kept": "kept"}

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
    if dry_run and not folder.exists():
        raise ValueError(f"there is no folder {folder}")
    if live:
        _follow(options, folder, prefer, adopt=adopt, deletions=deletions, verify=verify)
    stopped: StorageError | None = None
    with _open(options, folder, prefer) as store:
        with progress_of("comparing" if dry_run else "syncing") as progress:
            try:
                report = _round(
                    store, dry_run=dry_run, adopt=adopt, deletions=deletions, verify=verify, progress=progress
                )
            except StorageError as error:
                if not isinstance(error.__cause__, SyncStoppedError):
                    raise
                stopped, report = error, error.__cause__.report
        failed = [failure(id, error) for id, error in report.failed]
        if options.json:
            print_json(_report_json(report, failed))
        else:
            _print_report(store, report, dry_run=dry_run)
    if stopped is not None:
        raise stopped
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
        rows = _differing(store, metas, status)
    synced = sum(meta.sync_state is SyncState.SYNCED for meta in metas)
    if options.json:
        print_json(_status_json(status, synced, rows))
        return
    if rows:
        _print_states(rows)
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
        _print_kept(copies, of_one=id is not None)
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
    if isinstance(resolve_url(options.url), FileFolder):
        raise ValueError("the shared store is in Redis, and no folder of files")
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
        raise StorageError(f"{error}. Nothing was done: if that is as it should be, use sync --adopt") from error
    except SyncStoppedError as error:
        raise StorageError(f"{error}: if that is as it should be, use sync --deletions") from error


def _report_json(report: SyncReport, failed: list[dict[str, str]]) -> dict[str, object]:
    kinds = {kind: getattr(report, kind) for kind in (*_KINDS, "conflicts")}
    return {**kinds, "failed": failed, "kept": [str(path) for path in report.kept]}


def _print_report(store: Store, report: SyncReport, *, dry_run: bool) -> None:
    """Print a line for each session, of many of a kind for the first ones, then one with the numbers."""
    rows, counts = list[list[str]](), list[str]()
    for kind, name in _NAMES.items():
        ids: list[Any] = getattr(report, kind)
        counts += [f"{len(ids)} {name}"] * bool(ids)
        if kind in _KINDS:
            rows += [[id, kind, ""] for id in ids[:_SHOWN]]
            rows += [[f"... {len(ids) - _SHOWN} more", kind, ""]] * (len(ids) > _SHOWN)
    rows += [[id, "conflict", store.conflict_reason(id)] for id in report.conflicts]
    columns = [_ids(row[0] for row in rows), Column("to be" if dry_run else "done", whole=True), Column("why")]
    if rows:
        _print_filled(columns, rows)
    text = ", ".join(counts) or "nothing to do"
    print_text(f"dry run: {text}" if dry_run else text)


def _ids(ids: Iterable[str]) -> Column:
    return Column("session", whole=all(len(id) <= 36 for id in ids))  # a UUID stays in one piece


def _print_filled(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print a table without the columns that nothing is in."""
    filled = [n for n, cells in enumerate(zip(*rows, strict=True)) if any(cells)]
    print_table([columns[n] for n in filled], [[row[n] for n in filled] for row in rows])


# Live


def _follow(options: CommonOptions, folder: Path, prefer: Side | None, **first: bool) -> NoReturn:
    """Print what a live store does, until a signal ends it, or what waiting does not mend."""
    lines = _Lines(options)
    with suppress(UnavailableError), _open(options, folder, prefer) as once:
        with progress_of("syncing") as progress:
            report = _round(once, **first, progress=progress)
        lines.print(report)
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
            self._line("kept", path.parent.name, copy=path.stem)
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


class _Row(NamedTuple):
    """A session that is not the same on both sides."""

    id: str
    name: str | None
    state: str
    why: str  # of a conflict


def _differing(store: Store, metas: Sequence[SessionMeta], status: SyncStatus) -> list[_Row]:
    reasons = {id: store.conflict_reason(id) for id in status.conflicts}
    listed = [meta for meta in metas if meta.sync_state is not SyncState.SYNCED]
    rows = [_Row(meta.id, meta.name, meta.sync_state.value, reasons.pop(meta.id, "")) for meta in listed]
    return rows + [_Row(id, None, SyncState.CONFLICT.value, why) for id, why in reasons.items()]  # never read


def _print_states(rows: Sequence[_Row]) -> None:
    cells: list[Sequence[str]] = [(row.id, row.name or "", row.state, row.why) for row in rows]
    if any(row.why for row in rows) and output().width < 100:  # the names give room
        cells = [(row.id, "", row.state, row.why) for row in rows]
    columns = [_ids(row.id for row in rows), Column("name"), Column("state", whole=True), Column("why")]
    _print_filled(columns, cells)


def _status_line(status: SyncStatus, synced: int) -> str:
    counts = {
        "synced": synced,
        "to upload": status.pending_uploads,
        "to download": status.pending_downloads,
        "in conflict": len(status.conflicts),
    }
    text = ", ".join(f"{count} {name}" for name, count in counts.items() if count or name == "synced")
    return text + (f"; last synced {age(status.last_sync)}" if status.last_sync else "")


def _status_json(status: SyncStatus, synced: int, rows: Sequence[_Row]) -> dict[str, object]:
    return {
        "synced": synced,
        "pending_uploads": status.pending_uploads,
        "pending_downloads": status.pending_downloads,
        "conflicts": status.conflicts,
        "last_sync": status.last_sync and status.last_sync.isoformat(),
        "sessions": [row._asdict() for row in rows],
    }


# Files and copies


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


def _named(copies: Sequence[Kept], name: str) -> Kept:
    """Find a copy by its name, or the path of its file."""
    for copy in copies:
        if name in (copy.path.stem, copy.path.name) or Path(name) == copy.path:
            return copy
    raise Absent(f"there is no copy {name}")


def _print_kept(copies: Sequence[Kept], *, of_one: bool) -> None:
    """Print copies by their names, of which the first half is when, and which side lost."""
    named = Column("copy", whole=True)
    if of_one:
        print_table((named, Column("why")), ((copy.path.stem, copy.why) for copy in copies))
        return
    has_room = output().width >= 100
    rows = [[copy.id, copy.path.stem, copy.why if has_room else ""] for copy in copies]
    _print_filled((_ids(copy.id for copy in copies), named, Column("why")), rows)


def _kept_json(copy: Kept) -> dict[str, str]:
    return {
        "id": copy.id,
        "copy": copy.path.stem,
        "side": copy.side,
        "at": copy.at.isoformat(),
        "why": copy.why,
        "path": str(copy.path),
    }
