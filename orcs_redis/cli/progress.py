"""How the demo goes: the workers' logs as they grow, the changes as they come, and what is shown of them."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime

import msgspec
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..errors import StorageError
from ..model.asset import SessionAsset
from ..model.meta import SessionMeta
from ..protocol.changes import Change
from ..sync import RedisSessionStore as BlockingStore
from .terminal import change_line
from .verdict import KINDS, Entry, Kind, Seen
from .worker import Job

__all__ = ["Logbook", "Watching", "progress_line", "view"]

_SHOWN_CHANGES = 8
_NEWS_TIME = 10.0  # seconds the last changes may take to the watcher
_GROUPS: dict[str, tuple[Kind, ...]] = {
    "appends": ("append",),
    "pops": ("pop",),
    "parts": ("rename", "label", "note"),
    "counts": ("count",),
    "refreshes": ("refresh",),
}


class Logbook:
    """A worker's log, read as it grows."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.entries: list[Entry] = []
        self.counts: Counter[str] = Counter()  # like "append done"
        self._position = 0
        self._past: deque[tuple[float, Counter[str]]] = deque(maxlen=8)
        job.log.touch()

    def read(self) -> None:
        """Read what is new."""
        with self.job.log.open("rb") as file:
            file.seek(self._position)
            *lines, rest = file.read().split(b"\n")
            self._position = file.tell() - len(rest)  # which is a line half-written
        new = [msgspec.json.decode(line, type=Entry) for line in lines]
        self.entries += new
        self._past.append((time.monotonic(), self.counts.copy()))
        self.counts.update(f"{entry.kind} {entry.outcome}" for entry in new)

    def done(self, kinds: Iterable[Kind]) -> int:
        """Return how many operations were acknowledged."""
        return sum(self.counts[f"{kind} done"] for kind in kinds)

    def rate(self, kinds: Sequence[Kind]) -> float:
        """Return how many operations a second were acknowledged lately."""
        then, counts = self._past[0]
        passed = max(time.monotonic() - then, 0.001)
        return (self.done(kinds) - sum(counts[f"{kind} done"] for kind in kinds)) / passed


class Watching:
    """A thread that watches all changes."""

    def __init__(self, store: BlockingStore[SessionAsset], since: str) -> None:
        self.seen = Seen()
        self._store = store
        self._since = since
        self._last: deque[Change] = deque(maxlen=_SHOWN_CHANGES)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="demo-watch", daemon=True)
        self._thread.start()

    def last(self) -> list[Change]:
        """Return the last changes."""
        with self._lock:
            return list(self._last)

    def wait_until_told(self, final: Mapping[str, int]) -> None:
        """Wait until each session was seen at its final revision, but not for ever."""
        until = time.monotonic() + _NEWS_TIME
        while self.seen.missing(final) and self._thread.is_alive() and time.monotonic() < until:
            time.sleep(0.02)

    def _run(self) -> None:
        with suppress(StorageError):  # it has not seen the last revisions then
            for change in self._store.watch(since=self._since):
                with self._lock:
                    self._last.append(change)
                self.seen.add(change.id, change.revision)


def view(metas: Sequence[SessionMeta], logs: Sequence[Logbook], watching: Watching, width: int) -> Group:
    """Return what a terminal of this width shows: sessions, workers and changes."""
    return Group(
        Text("sessions, newest first", "italic"),
        _sessions_table(metas, wide=width >= 80),
        Text("\nworkers: operations a second; refused: another was faster", "italic"),
        _workers_table(logs),
        Text("\nchanges as they come", "italic"),
        Text("\n", no_wrap=True, overflow="ellipsis").join(map(change_line, watching.last())),
    )


def _sessions_table(metas: Sequence[SessionMeta], *, wide: bool) -> Table:
    named = ("name", "phase", "revision") if wide else ()
    table = _table("session", *named, "turns", "updated")
    now = datetime.now(UTC)
    for meta in metas:
        names = (meta.name, meta.labels.get("phase", ""), f"{meta.revision:,}")[: len(named)]
        age = f"{(now - meta.updated_at).total_seconds() * 1000:,.0f} ms ago"
        table.add_row(meta.id, *names, f"{meta.turn_count:,}", age)
    return table


def _workers_table(logs: Sequence[Logbook]) -> Table:
    table = _table("worker", *_GROUPS, "refused")
    for log in logs:
        refused = sum(count for name, count in log.counts.items() if name.endswith("refused"))
        form = "threads" if log.job.blocking else "asyncio"
        table.add_row(form, *(f"{log.rate(kinds):,.0f}" for kinds in _GROUPS.values()), f"{refused:,}")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        numeric = column not in ("session", "name", "phase", "worker")
        table.add_column(column, no_wrap=True, justify="right" if numeric else "left")
    return table


def progress_line(seconds: float, logs: Sequence[Logbook], watching: Watching) -> str:
    """Return what a program or a file is told each second."""
    done = ", ".join(f"{sum(log.done(kinds) for log in logs):,} {name}" for name, kinds in _GROUPS.items())
    each = " ".join(f"{log.rate(KINDS):,.0f}" for log in logs)
    return f"{seconds:4.1f} s: {done}; operations/s per worker: {each}; {watching.seen.changes:,} changes watched"
