# Made from ../redis.py: change that one, then run `python tools/unasync.py`.
"""The Redis store, blocking."""

from __future__ import annotations

import builtins
import contextlib
import os
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack, overload

from ...errors import StorageError
from ...model.asset import SessionAsset
from ...model.meta import Page, SessionMeta, SyncStatus, Versioned
from ...model.sections import ConversationTurn
from ...protocol.changes import Change
from ...protocol.leases import LeaseInfo
from ...protocol.request import single
from ...protocol.watching import Watcher, waking
from ...transport.address import FileFolder, Target
from ...transport.threads import Driver
from ..core import Core
from ..options import OptionArguments, Options, check_arguments
from .files import LocalFileStore
from .leasing import Lease, Leasing

if TYPE_CHECKING:
    import redis

__all__ = ["RedisSessionStore", "open_store"]

A = TypeVar("A", bound=SessionAsset)
B = TypeVar("B", bound=SessionAsset)  # for class methods, where A would be that of a class that is not known yet


class RedisSessionStore(Generic[A]):
    """Sessions in Redis or Valkey, shared by everyone who opens the same namespace.

    Any number of threads may use it; each that waits has a connection for that time. Made by `open_store` or `connect`.

    Every method may raise UnavailableError (within the deadline no server could do it; a write was certainly not
    applied), PermissionDeniedError, and RuntimeError if the store was opened before a fork;
    those with an id InvalidIdError, before anything is sent. Every write may raise OutcomeUnknownError (it may have
    been applied), StoreFullError and StoreResetError. A retry within the store never applies a write twice.
    """

    def __init__(self, core: Core[A], driver: Driver) -> None:
        self._core = core
        self._driver = driver

    @overload
    @classmethod
    def connect(
        cls,
        url: str | None = None,
        *,
        client: redis.Redis | None = None,
        **options: Unpack[OptionArguments],
    ) -> RedisSessionStore[SessionAsset]: ...

    @overload
    @classmethod
    def connect(
        cls,
        url: str | None = None,
        *,
        client: redis.Redis | None = None,
        asset_type: type[B],
        **options: Unpack[OptionArguments],
    ) -> RedisSessionStore[B]: ...

    @classmethod
    def connect(
        cls,
        url: str | None = None,
        *,
        client: redis.Redis | None = None,
        **options: Any,
    ) -> RedisSessionStore[Any]:
        """Open a store; the caller closes it with `close`. For the arguments and errors see `open_store`."""
        checked, target = check_arguments("RedisSessionStore.connect", url, client, options)
        return cls._open(checked, target, client)

    @classmethod
    def _open(cls, options: Options[Any], target: Target | None, client: redis.Redis | None) -> RedisSessionStore[Any]:
        core = Core(options)
        return cls(core, Driver.open(core.lifecycle, core.connection_spec(target, client), core.open()))

    def close(self) -> None:
        """Let what is under way end, then close the connection. Later calls raise UnavailableError."""
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} namespace={self._core.options.namespace!r}>"

    def save(self, asset: A, *, if_revision: int | None = None, lease: Lease | None = None) -> int:
        """Store the whole asset and return the new revision.

        Of an asset that was loaded from this namespace, or saved to it, only what has changed since is sent. Its
        updated_at_ms is stored as it is, at most the server's now: call `asset.touch()` to move it in lists.

        Args:
            asset: is not changed.
            if_revision: only over this revision; 0: only if the session is absent. Without it, whatever is there is
                overwritten.
            lease: only as long as it is held.

        Raises:
            LeaseLostError: the lease ended or passed to another; so for every write that takes one.
            ConflictError: the session is at another revision than if_revision.
            SerializationError: a value that would not come back, or too large; nothing was sent.
            VersionIncompatibleError: the asset or the stored session is of another version of the schema.
            CorruptSessionError: what is stored under the id is no session. `delete` removes it.

        """
        return self._driver.run(self._core.sessions.save(asset, if_revision, lease))

    def load(self, id: str) -> A:
        """Return the session.

        Raises:
            NotFoundError: there is no such session.
            CorruptSessionError: what is stored under the id is no session, or a part of it is gone.
            VersionIncompatibleError: it is of another version of the schema.

        """
        return self._driver.perform(self._core.sessions.load(id)).asset

    def load_versioned(self, id: str) -> Versioned[A]:
        """Return the session and its revision, read at one point in time. Raises what `load` raises."""
        return self._driver.perform(self._core.sessions.load(id))

    def append(
        self, id: str, *turns: ConversationTurn, if_revision: int | None = None, lease: Lease | None = None
    ) -> int:
        """Add turns at the end of a session's history and return the new revision.

        The cost does not depend on the history's length. The session's updated_at_ms moves forward to the server's now.

        Raises:
            NotFoundError: there is no such session.
            ConflictError: it is at another revision than if_revision.
            SerializationError: a value that would not come back, or too large; nothing was sent.
            ValueError: no turn was given.

        """
        return self._driver.perform(self._core.sessions.append(id, turns, if_revision, lease)).revision

    def turns(self, id: str, start: int = 0, stop: int = -1) -> builtins.list[ConversationTurn]:
        """Return part of a session's history: from index start to index stop, both included, negative from the end.

        `turns(id, -20)` is the last twenty. Raises NotFoundError, CorruptSessionError.
        """
        return self._driver.perform(self._core.sessions.turns(id, start, stop))

    def update(self, id: str, change: Callable[[A], object], *, lease: Lease | None = None) -> Versioned[A]:
        """Load a session, call `change(asset)`, and save it if no other write came between; else do it again.

        There is no bound on the number of tries; the deadline is for each of them. A change that changes nothing
        writes nothing.

        Args:
            id: the session.
            change: changes the asset in place. It may be called more than once, each time with what is stored then.
            lease: only as long as it is held.

        """
        return self._driver.run(self._core.sessions.update(id, change, lease))

    def list(
        self,
        *,
        limit: int | None = None,
        project_path: str | None = None,
        updated_after: datetime | None = None,
        updated_before: datetime | None = None,
    ) -> builtins.list[SessionMeta]:
        """Return sessions' metadata, newest first; equal times are ordered by id, descending.

        Args:
            limit: so many at most.
            project_path: only those of this project.
            updated_after: only those updated then or later. Aware, else ValueError.
            updated_before: only those updated before that. Aware, else ValueError.

        """
        plan = self._core.lists.list(limit, project_path, updated_after, updated_before)
        return self._driver.run(plan)

    def page(
        self,
        limit: int,
        cursor: str | None = None,
        *,
        project_path: str | None = None,
        updated_after: datetime | None = None,
        updated_before: datetime | None = None,
    ) -> Page[SessionMeta]:
        """Return so many sessions' metadata, newest first, and the cursor of the next page (None: this is the last).

        Whatever is written meanwhile, no session that stays unchanged is skipped or repeated. Filters are as in `list`.
        """
        plan = self._core.lists.page(limit, cursor, project_path, updated_after, updated_before)
        return self._driver.run(plan)

    def delete(self, id: str, *, if_revision: int | None = None, lease: Lease | None = None) -> None:
        """Remove a session.

        Raises:
            NotFoundError: there is no such session.
            ConflictError: it is at another revision than if_revision.

        """
        self._driver.perform(self._core.sessions.delete(id, if_revision, lease))

    def exists(self, id: str) -> bool:
        """Return whether there is a session."""
        return self._driver.perform(self._core.sessions.exists(id))

    def save_many(self, assets: Iterable[A]) -> builtins.list[int | StorageError]:
        """Save assets, in few round trips. The list has their revisions, or the error of an asset that failed."""
        save = self._core.sessions.save
        return self._driver.each([save(asset, None, None) for asset in assets])

    def load_many(self, ids: Iterable[str]) -> builtins.list[A | StorageError]:
        """Load sessions, in few round trips. The list has the error in the place of a session that failed."""
        load = self._core.sessions.load
        loaded = self._driver.each([single(load, id) for id in ids])
        return [item if isinstance(item, StorageError) else item.asset for item in loaded]

    def delete_many(self, ids: Iterable[str | SessionMeta]) -> builtins.list[StorageError | None]:
        """Delete sessions, in few round trips. The list has the error in the place of a session that failed.

        Of a `SessionMeta`, as lists have them, the session is deleted only if it is still at that revision; else the
        error is a ConflictError.
        """
        delete = self._core.sessions.delete_listed
        deleted = self._driver.each([single(delete, id) for id in ids])
        return [item if isinstance(item, StorageError) else None for item in deleted]

    def lease(self, id: str, *, ttl: float = 30.0, wait: float = 0.0) -> Leasing:
        """Return a context manager that gives the session's lease, a `Lease`.

        It is renewed in the background, and given back at the end of the block. Writes with `lease=` are refused with
        LeaseLostError once it has ended or passed to another; so a worker that was stopped can't write when it goes on.

        Args:
            id: the session, which need not exist yet.
            ttl: after so many seconds without renewal others may have it; by the server's clock.
            wait: for so many seconds wait for another to give it back.

        Raises:
            LeaseHeldError: another has it.

        """
        return Leasing(self._driver, self._core.leases, id, ttl, wait)

    def leases(self) -> builtins.list[LeaseInfo]:
        """Return all leases that are held, in the order in which they end."""
        return self._driver.run(self._core.leases.all())

    def watch(self, *, since: str | None = None, ids: Collection[str] | None = None) -> Generator[Change, None, None]:
        """Yield every peer's changes, and this store's own, until the loop is left or the store is closed.

        Of each partition they come in order, none twice; each session's latest state always comes, whatever happened
        to the connection (several changes of a session may come as the last of them).

        Args:
            since: a `Change.cursor` or `cursor()`, perhaps of another process: goes on from there, and misses nothing.
                Without it, from now.
            ids: only these sessions' changes. Up to 1,000 ids, nothing is received of other sessions.

        Raises:
            StoreResetError: the data was wiped or went back, or the cursor is older than the memory of deletions (the
                last 10,000 of a partition): list again, and watch from a cursor taken before.
            ValueError: `since` is no cursor.

        """
        wake = threading.Event()
        watcher = Watcher(self._core.changes, ids, wake)
        self._driver.run(watcher.start(since))
        leave = self._driver.listen(watcher.listeners())
        try:
            while not self._core.lifecycle.closed:
                change = watcher.pop()
                if change is not None:
                    yield change
                else:
                    self._driver.follow(watcher.wait())
        finally:
            leave()

    def cursor(self) -> str:
        """Return the cursor of now, for `watch` and `changes`."""
        return self._driver.run(self._core.changes.cursor())

    def changes(self, since: str | None = None, limit: int = 1000) -> builtins.list[Change]:
        """Return what changed after a cursor, each session once, at most `limit`; the last one's cursor goes on.

        Without a cursor: every session there is. Raises what `watch` raises.
        """
        return self._driver.run(self._core.changes.changes(since, limit))

    def wait_for(self, id: str, *, revision: int, timeout: float) -> int:
        """Return the session's revision as soon as it is at least `revision`.

        Raises:
            NotFoundError: the session is absent, and its partition has passed that revision; that is looked at when
                it begins, when the session changes, and at each heartbeat.
            TimeoutError: it has not come in `timeout` seconds.

        """
        changes, wake = self._core.changes, threading.Event()
        channel = changes.channel(id)
        plan = changes.wait_for(id, revision, timeout, wake)
        leave = self._driver.listen({channel: waking(wake, revision)})
        try:
            return self._driver.follow(plan)
        finally:
            leave()

    @property
    def origin(self) -> str:
        """What the changes that this store makes have as their origin."""
        return self._core.changes.origin

    def ping(self) -> float:
        """Return how many seconds a round trip to the server takes."""
        return self._driver.perform(self._core.sessions.ping())

    def sync_status(self) -> SyncStatus:
        """Return how the store stands with its server, at once and without asking it.

        Online with the last acknowledged operation and the writes in flight; Error from a failure to reach the server
        until the next success; Offline after closing.
        """
        return self._core.lifecycle.sync_status()


@overload
def open_store(
    url: str | None = None, *, client: redis.Redis | None = None, **options: Unpack[OptionArguments]
) -> AbstractContextManager[RedisSessionStore[SessionAsset]]: ...


@overload
def open_store(
    url: str | None = None,
    *,
    client: redis.Redis | None = None,
    asset_type: type[A],
    **options: Unpack[OptionArguments],
) -> AbstractContextManager[RedisSessionStore[A]]: ...


@overload
def open_store(url: os.PathLike[str]) -> AbstractContextManager[LocalFileStore[SessionAsset]]: ...


@overload
def open_store(url: os.PathLike[str], *, asset_type: type[A]) -> AbstractContextManager[LocalFileStore[A]]: ...


@contextlib.contextmanager
def open_store(
    url: str | os.PathLike[str] | None = None, *, client: redis.Redis | None = None, **options: Any
) -> Iterator[Any]:  # the overloads say what
    """Open a store for a `with` block.

    Args:
        url: redis://, rediss://, valkey://, valkeys://, unix://, embedded:, memory:// or file:// (the docs' page of
            options has the table); without it and without a client, that of $ORCS_REDIS_URL, else `embedded:`. A
            folder's path, such as a `pathlib.Path`, and a file:// URL give a LocalFileStore, which has the methods of
            SessionStore only and takes no option but asset_type. Type checkers know that of a path, not of a URL.
        client: a blocking redis-py client to use instead; it is never closed and never reconfigured.
        options: namespace ("orcs"); partitions (1 when the namespace is created, later read from its descriptor);
            asset_type (SessionAsset); deadline for all that a call does (5.0 s); heartbeat for watches (5.0 s);
            max_asset_bytes (128 MiB) and max_turn_bytes (16 MiB), encoded; max_fields (1000) at an asset's top level;
            max_connections of a blocking store (64); credentials, a function that returns user name and password, and
            is called at each connecting, in the thread that needs it.

    Raises:
        UnavailableError, PermissionDeniedError: no server within the deadline, or it denies access.
        UnsupportedServerError: older than Redis 7.0 or Valkey 7.2, or a cluster's node.
        LayoutError: the namespace is of another layout, or has another number of partitions.
        ValueError, TypeError: a URL, client or option that can't be, or that means nothing for this kind of store.

    """
    checked, target = check_arguments("open_store", url, client, options)
    if isinstance(target, FileFolder):
        with LocalFileStore(target.path, asset_type=checked.asset_type) as files:
            yield files
        return
    with RedisSessionStore._open(checked, target, client) as store:
        yield store
