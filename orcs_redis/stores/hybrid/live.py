"""Live synchronisation: one plan that follows both sides, and runs a round for what has changed."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ...errors import StorageError, StoreResetError, SyncStoppedError
from ...interrupts import raise_interruption
from ...model.asset import SessionAsset
from ...protocol.changes import Change
from ...protocol.watching import Watcher
from .installing import SyncOptions
from .local import Local
from .results import SyncReport
from .rounds import Rounds
from .shared import Shared
from .steps import Connect, Here, Listen, Pause, Plan, There

__all__ = ["Live"]

A = TypeVar("A", bound=SessionAsset)

_log = logging.getLogger("orcs_redis")
_DEBOUNCE = 0.05  # seconds: saves that follow each other go out as one
_FIRST_DELAY, _LAST_DELAY = 0.1, 30.0  # seconds between attempts to reach the server
_SCAN_SHARE = 20  # a scan of the folder may take one part of so many of the time
_MANY = 500  # sessions: beyond that all are compared


class Live(Generic[A]):
    """What follows both sides. `wake` is an asyncio.Event or threading.Event, of the form of the store."""

    def __init__(
        self,
        local: Local[A],
        rounds: Rounds[A],
        scan: float,
        wake: Any,
        on_sync: Callable[[SyncReport], object] | None,
    ) -> None:
        self._local = local
        self._rounds = rounds
        self._scan = scan
        self._wake = wake
        self._on_sync = on_sync
        self._closed = False
        self._saved: dict[str, float] = {}  # sessions that were written here, and when they are due
        self._failed = False  # whether something was left that no change will bring up again

    def note_saved(self, id: str) -> None:
        """Note that a session was written here."""
        self._saved.setdefault(id, time.monotonic() + _DEBOUNCE)
        self._wake.set()

    def close(self) -> None:
        """End after what is under way."""
        self._closed = True
        self._wake.set()

    def run(self) -> Plan[None]:
        """Synchronise until it is closed, whatever happens to the server."""
        delay = _FIRST_DELAY
        while True:  # once at least: what was written is sent, if it is closed at once
            try:
                yield from self._follow()
                delay = _FIRST_DELAY
            except StorageError as error:
                raise_interruption(error)
                self._rounds.note_failure(error)
                _log.debug("live synchronisation goes on in %.1f s at most: %s", delay, error)
                yield from self._wait(random.uniform(delay / 2, delay))
                delay = min(2 * delay, _LAST_DELAY)
            except Exception as error:  # whatever it is: else this would end unnoticed
                raise_interruption(error)
                self._rounds.note_failure(error)
                _log.exception("live synchronisation failed, and begins anew")
                yield from self._wait(_LAST_DELAY)
            if self._closed:
                return

    def _wait(self, seconds: float, *, for_save: bool = False) -> Plan[None]:
        """Wait, but not for a store that is being closed; `for_save`: until a session that was written here is due."""
        expires = time.monotonic() + seconds
        while not self._closed:
            left = min(expires - time.monotonic(), self._next_due() if for_save else math.inf)
            if left <= 0:
                break
            self._wake.clear()
            if not self._closed:
                yield Pause(left, self._wake)

    def _follow(self) -> Plan[None]:
        """Compare all, then follow what changes on both sides, until something has to begin anew."""
        shared: Shared[A] = yield Connect()
        try:
            cursor = yield There(shared.cursor)
        except StoreResetError:
            yield from self._compare_all()  # raises it again, unless another process has adopted what is there now
            return
        yield from self._compare_all()
        if not shared.incarnation:  # it has no sessions yet
            yield from self._wait(self._scan, for_save=True)
            return
        watcher: Watcher = shared.watcher(self._wake)
        yield There(watcher.start, (cursor,))
        leave = yield Listen(watcher.listeners())
        try:
            yield from self._follow_changes(watcher)
        finally:
            leave()

    def _follow_changes(self, watcher: Watcher) -> Plan[None]:
        compared = time.monotonic()
        scan_due = compared + self._scan
        while not self._closed:
            self._wake.clear()
            ids = self._due()
            while (change := watcher.pop()) is not None:
                if self._is_news(change):
                    ids.add(change.id)
            if time.monotonic() >= scan_due:
                began = time.monotonic()
                ids.update((yield Here(self._local.changed)))
                scan_due = time.monotonic() + max(self._scan, _SCAN_SHARE * (time.monotonic() - began))
            if len(ids) > _MANY or (self._failed and time.monotonic() > compared + _LAST_DELAY):
                yield from self._compare_all()
                compared = time.monotonic()
            elif ids:
                yield from self._bring_together(ids)
                yield Pause(self._rounds.gap)
            yield There(watcher.catch_up)
            if not watcher.has_pending:
                yield Pause(
                    max(0.0, min(self._next_due(), scan_due - time.monotonic(), watcher.seconds_left)), self._wake
                )
        if self._saved:
            yield from self._bring_together({*self._saved})

    def _compare_all(self) -> Plan[None]:
        self._saved.clear()
        self._failed = False
        yield from self._bring_together(None)

    def _bring_together(self, ids: set[str] | None) -> Plan[None]:
        try:
            self._note((yield from self._rounds.sync(ids, SyncOptions())))
        except SyncStoppedError as error:
            raise_interruption(error)
            self._failed = True
            self._call_back(error.report)
            _log.warning("%s", error)

    def _note(self, report: SyncReport) -> None:
        self._failed |= bool(report.failed)  # until all are compared again
        self._call_back(report)
        done = {name: len(ids) for name in report.__struct_fields__ if (ids := getattr(report, name))}
        if done:
            _log.info("synchronised: %s", ", ".join(f"{number} {name}" for name, number in done.items()))

    def _call_back(self, report: SyncReport) -> None:
        if self._on_sync is None:
            return
        try:
            self._on_sync(report)
        except Exception as error:  # the caller's
            raise_interruption(error)
            _log.exception("on_sync failed")

    def _due(self) -> set[str]:
        """Return the sessions that were written here some time ago."""
        now = time.monotonic()
        ids = {id for id, due in [*self._saved.items()] if due <= now}
        for id in ids:
            self._saved.pop(id, None)
        return ids

    def _next_due(self) -> float:
        return min(self._saved.values(), default=math.inf) - time.monotonic()

    def _is_news(self, change: Change) -> bool:
        """Whether a change is not of this folder's own making."""
        row = self._local.journal.rows.get(change.id)
        if change.kind == "deleted":
            return row is not None
        return row is None or not row.has_revision(change.revision, bytes.fromhex(change.origin))
