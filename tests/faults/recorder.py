"""The log of a worker: a line before each call of the store, a line after."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

from orcs_redis import ConflictError, ConversationTurn, NotFoundError, SessionAsset, StorageError
from orcs_redis.protocol.commands import Reply
from orcs_redis.protocol.writes import Write, Written

from .signals import STRUCK, Swallowed

__all__ = [
    "LISTED",
    "Call",
    "Recorder",
    "Recording",
    "digest",
    "listen_to_revisions",
    "made",
    "new_session",
    "observed",
    "told_revisions",
]

LISTED = 100  # ids of histories up to this length are logged one by one
Call: TypeAlias = tuple[str, str, dict[str, Any]]  # uid, session, arguments
_told: ContextVar[list[int]] = ContextVar("told")


class Recorder:
    """The log of one process; what is written to it survives the process's kill."""

    def __init__(self, path: str, name: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._name = name
        self._number = 0

    def uid(self) -> str:
        self._number += 1
        return f"{self._name}-{self._number}"

    def call(self, uid: str, kind: str, session: str, **arguments: Any) -> None:
        self._line({"call": uid, "at": time.monotonic_ns(), "kind": kind, "session": session, **arguments})

    def done(self, uid: str, outcome: str, **result: Any) -> None:
        self._line({"return": uid, "at": time.monotonic_ns(), "outcome": outcome, **result})

    def note(self, uid: str, **facts: Any) -> None:
        """Add to the arguments of a call."""
        self._line({"note": uid, "at": time.monotonic_ns(), **facts})

    def close(self) -> None:
        os.close(self._file)

    def _line(self, line: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")


def digest(ids: Iterable[str]) -> str:
    """Return a fingerprint of a history."""
    return hashlib.sha1("".join(f"{id}\n" for id in ids).encode()).hexdigest()[:16]


def observed(asset: SessionAsset, revision: int) -> dict[str, Any]:
    """Return what the log tells of a session that was read."""
    ids = [turn.id for turn in asset.history.turns]
    seen: dict[str, Any] = {"revision": revision, "n": len(ids), "sum": digest(ids)}
    seen |= {key: asset.metadata.get(key) for key in ("born", "counter", "mark")}
    if len(ids) <= LISTED:
        seen["all"] = ids
    return seen


def made(uid: str, ids: list[str]) -> list[ConversationTurn]:
    """Return turns of these ids."""
    turns = []
    for id in ids:
        turn = ConversationTurn.user(f"of {uid}")
        turn.id = id
        turns.append(turn)
    return turns


def new_session(id: str, uid: str, ids: list[str]) -> SessionAsset:
    """Return a session that says who created it."""
    asset = SessionAsset(id=id)
    asset.metadata = {"born": uid, "counter": 0, "mark": uid}
    for turn in made(uid, ids):
        asset.add_turn(turn)
    return asset


def listen_to_revisions() -> None:
    """Let a task learn what its writes came to, since not all methods tell."""
    decode = Write.decode

    def telling(self: Write, replies: Sequence[Reply]) -> Written:
        written = decode(self, replies)
        if written.revision != written.before:  # else it changed nothing
            _told.get([]).append(written.revision)
        return written

    Write.decode = telling  # type: ignore[method-assign]


@contextlib.contextmanager
def told_revisions() -> Iterator[list[int]]:
    """Collect the revisions that writes of this task make."""
    revisions: list[int] = []
    token = _told.set(revisions)
    try:
        yield revisions
    finally:
        _told.reset(token)


class Recording:
    """Calls of a store that are logged. Tasks share it, and what they know of the sessions."""

    def __init__(self, store: Any, log: Recorder, seed: int) -> None:
        self._store = store
        self._incarnation: bytes = store._core.changes.namespace.incarnation
        self._log = log
        self._rng = random.Random(seed)
        self._known: dict[str, int] = {}  # revisions last heard of

    @asynccontextmanager
    async def _recorded(self, uid: str, kind: str, session: str, **arguments: Any) -> AsyncIterator[dict[str, Any]]:
        """Log a call, and how it ends. Now and then the caller loses patience and cancels it."""
        async with self._recorded_all(kind, [(uid, session, arguments)]) as (result,):
            yield result

    @asynccontextmanager
    async def _recorded_all(self, kind: str, calls: Sequence[Call]) -> AsyncIterator[Sequence[dict[str, Any]]]:
        """The same of a call for several sessions. A result is the item's own "error", or what it came to."""
        results: Sequence[dict[str, Any]] = [{} for _ in calls]
        patience = self._rng.uniform(0, 0.01) if self._rng.random() < 0.02 else None
        for uid, session, arguments in calls:
            self._log.call(uid, kind, session, **arguments)
        ended = {"outcome": "ok"}
        try:
            async with asyncio.timeout(patience) as timeout:
                yield results
        except STRUCK:
            ended = {"outcome": "Interrupted"}
        except Swallowed as error:
            ended = {"outcome": "Swallowed", "text": str(error)[:200]}
        except StorageError as error:
            ended = refusal(error) if len(calls) == 1 else {"outcome": f"raised {error!r}"[:300]}
        except TimeoutError as error:
            ended = {"outcome": "Cancelled" if timeout.expired() else repr(error)}
        except Exception as error:
            ended = {"outcome": repr(error)[:300]}
        for (uid, session, _), result in zip(calls, results, strict=True):
            told: dict[str, Any] = ended
            if ended["outcome"] == "ok":
                told = refusal(result["error"]) if "error" in result else ended | result
            self._log.done(uid, **told)
            result |= told
            if kind == "delete":
                self._known.pop(session, None)
            elif "revision" in told:
                self._known[session] = told["revision"]


def refusal(error: StorageError) -> dict[str, Any]:
    """Return what the log tells of a call that failed."""
    told: dict[str, Any] = {"outcome": type(error).__name__}
    if isinstance(error, ConflictError):
        told |= {"actual": error.actual, "parts": list(error.parts)}
    return told if isinstance(error, NotFoundError) else told | {"text": str(error)[:200]}
