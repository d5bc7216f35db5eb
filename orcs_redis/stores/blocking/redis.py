# Made from ../redis.py: change that one, then run `python tools/unasync.py`.
"""The Redis store, blocking."""

from __future__ import annotations

import builtins
import math
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack, overload

from ...errors import StorageError
from ...model.asset import SessionAsset
from ...model.filters import FilterArguments, Filters
from ...model.ids import check_id, several
from ...model.meta import Committed, Page, SessionMeta, SyncStatus, Versioned
from ...model.sections import ConversationTurn
from ...protocol.changes import Change
from ...protocol.commits import CommitArguments
from ...protocol.leases import LeaseInfo
from ...protocol.namespace import appearance
from ...protocol.request import single
from ...protocol.watching import Watcher, waking
from ...protocol.writer import Namespace
from ...transport.address import Target
from ...transport.threads import Driver
from ..core import Core
from ..options import OptionArguments, Options, check_arguments
from .leasing import Lease, Leasing

if TYPE_CHECKING:
    import redis

__all__ = ["RedisSessionStore"]

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

    def save(
        self, asset: A, *, overwrite: bool = False, if_revision: int | None = None, lease: Lease | None = None
    ) -> int:
        """Store an asset and return the session's new revision.

        A new asset, made here, is stored whole, over whatever has its id. Of one that was loaded from this namespace or
        saved to it, the changes since are applied to what is stored now: turns that others pushed stay, and the
        asset's come after them; other parts are as whoever changed them has them. Afterwards the asset equals what is
        stored, if it was not changed meanwhile. Without a change nothing is written, and the asset is refreshed.

        `updated_at` in lists moves if turns have changed, or with `asset.touch()`.

        Args:
            asset: a partial one (`load(id, last=n)`) can be saved where it was loaded.
            overwrite: store it whole, over whatever is there.
            if_revision: only over this revision; 0: only if the session is absent. Nothing is merged.
            lease: only as long as it is held.

        Raises:
            ConflictError: others have changed one of the parts that the asset changes, in another way (`parts` names
                them), or the session is gone, or was made anew; nothing was written, and the asset is as it was. Or it
                is at another revision than if_revision.
            LeaseLostError: the lease ended or passed to another; so for every write that takes one.
            SerializationError: a value that would not come back, or too large; nothing was sent.
            VersionIncompatibleError: the asset or the stored session is of another version of the schema.
            CorruptSessionError: what is stored under the id is no session. `delete` removes it.
            ValueError: a partial asset can't be saved like this.

        """
        return self._driver.run(self._core.saving.save, asset, if_revision, lease, overwrite=overwrite)

    def load(self, id: str, *, last: int | None = None) -> A:
        """Return the session.

        Args:
            id: the session's.
            last: only so many of the last turns, at a cost that does not depend on the history.
                `asset.history.skipped` says how many were left out; if any were, the asset is partial: it can be
                changed and saved, but no turn of it can be removed, and it can't be stored elsewhere.

        Raises:
            NotFoundError: there is no such session.
            CorruptSessionError: what is stored under the id is no session, or a part of it is gone.
            VersionIncompatibleError: it is of another version of the schema.

        """
        return self._driver.perform(self._core.sessions.load, id, last).asset

    def load_versioned(self, id: str) -> Versioned[A]:
        """Return the session and its revision, read at one point in time. Raises what `load` raises."""
        return self._driver.perform(self._core.sessions.load, id)

    def refresh(self, asset: A) -> int:
        """Bring an asset up to what is stored, in place, and return the revision that it then has.

        Only what is new is read. What was changed in the asset stays changed; if others have changed the same, the next
        save is a ConflictError.

        Raises:
            NotFoundError: the session is gone.
            ConflictError: it was deleted and made anew, or cut below the turns of a partial asset.
            ValueError: the asset was neither loaded from this namespace nor saved to it.

        """
        return self._driver.run(self._core.saving.refresh, asset)

    def append(
        self,
        id: str,
        *turns: ConversationTurn,
        create: bool = False,
        once: bool = False,
        if_revision: int | None = None,
        lease: Lease | None = None,
    ) -> int:
        """Add turns at the end of a session's history and return the new revision.

        The cost does not depend on the history's length. The session's updated_at_ms moves forward to the server's now.

        Args:
            id: the session's.
            turns: at least one.
            create: make the session if it is absent.
            once: leave out turns whose ids are among those of the session's last 1,000, whoever added them: for what
                may be delivered twice. If none is left, nothing is written.
            if_revision: only to this revision.
            lease: only as long as it is held.

        Raises:
            NotFoundError: there is no such session.
            ConflictError: it is at another revision than if_revision.
            SerializationError: a value that would not come back, or too large; nothing was sent.
            ValueError: no turn was given; or with `once`, one without an id, or two with the same.

        """
        sessions = self._core.sessions
        if once:
            return self._driver.run(sessions.append_once, id, turns, if_revision, lease, create=create)
        return self._driver.perform(sessions.append, id, turns, if_revision, lease, create=create).revision

    def pop(
        self, id: str, count: int = 1, *, if_revision: int | None = None, lease: Lease | None = None
    ) -> builtins.list[ConversationTurn]:
        """Remove the last turns, exactly once, and return them in the history's order: at most `count`.

        Raises:
            NotFoundError: there is no such session.
            ConflictError: it is at another revision than if_revision.

        """
        return self._driver.run(self._core.sessions.pop, id, count, if_revision, lease)

    def truncate(self, id: str, length: int, *, if_revision: int | None = None, lease: Lease | None = None) -> int:
        """Keep the first `length` turns of a session, and return its revision. A shorter history stays as it is.

        Raises:
            NotFoundError: there is no such session.
            ConflictError: it is at another revision than if_revision.

        """
        return self._driver.perform(self._core.sessions.truncate, id, length, if_revision, lease).revision

    def replace_turn(
        self, id: str, turn: ConversationTurn, *, if_revision: int | None = None, lease: Lease | None = None
    ) -> int:
        """Put a turn in the place of the one with its id, looked for from the end, and return the new revision.

        Raises:
            NotFoundError: there is no such session, or no such turn in it.
            ConflictError: it is at another revision than if_revision.
            SerializationError: a value that would not come back, or too large; nothing was sent.

        """
        return self._driver.run(self._core.sessions.replace_turn, id, turn, if_revision, lease)

    def touch(self, id: str, *, if_revision: int | None = None, lease: Lease | None = None) -> int:
        """Move a session's updated_at to the server's now, and return its revision. NotFoundError if it is absent."""
        return self._driver.perform(self._core.sessions.touch, id, if_revision, lease).revision

    def fork(
        self,
        id: str,
        new_id: str,
        *,
        length: int | None = None,
        records: bool = False,
        if_revision: int | None = None,
    ) -> int:
        """Make a new session with the same parts, and return its revision.

        Its `metadata["forked_from"]` has id, revision and length of the source; `created_at` is now. Within a partition
        the turns don't leave the server.

        Args:
            id: the source.
            new_id: must be absent.
            length: only the first so many turns.
            records: with the source's records.
            if_revision: only of this revision of the source.

        Raises:
            NotFoundError: there is no source.
            ConflictError: there is a session of the new id; or the source is at another revision than if_revision.

        """
        return self._driver.run(self._core.sessions.fork, id, new_id, length, if_revision, records=records)

    def commit(
        self,
        id: str,
        *,
        append: Sequence[ConversationTurn] = (),
        pop: int = 0,
        truncate: int | None = None,
        set: Mapping[str, object] | None = None,
        unset: Collection[str] = (),
        put: Mapping[str, bytes] | None = None,
        put_new: Mapping[str, bytes] | None = None,
        drop: Collection[str] = (),
        labels: Mapping[str, str | None] | None = None,
        create: bool = False,
        if_revision: int | None = None,
        if_last: str | None = None,
        lease: Lease | None = None,
    ) -> Committed:
        """Change some parts of a session without loading it: all or nothing, in one call.

        Without conditions commits commute with those of others.

        Args:
            id: the session's.
            append: turns to add at the end, after `pop` or `truncate`.
            pop: how many of the last turns to remove, if there are so many.
            truncate: how many of the first turns to keep.
            set: values of parts by name: `metadata.<key>`, `skill_configs.<key>`, `component_snapshots.<key>`,
                `extra.<key>`, or a section such as `project_context`.
            unset: names of such parts to remove, whether they are there or not.
            put: records by key; they replace those of the same key.
            put_new: records by key; those that are there stay (`Committed.placed` says which were put), and the rest of
                the commit is done all the same.
            drop: keys of records to remove; one that ends in `*` removes all that begin like this, but for those of
                `put` and `put_new`.
            labels: by name; None removes one. A `metadata["labels"]` that is no labels gives way to them.
            create: make the session if it is absent.
            if_revision: only over this revision; 0: only if the session is absent.
            if_last: only if the last turn has this id.
            lease: only as long as it is held.

        Raises:
            NotFoundError: there is no such session.
            ConflictError: a condition is not met; its `actual` is the session's revision.
            SerializationError: a value that would not come back, or too large; nothing was sent. Or there would be more
                than 8 labels.
            ValueError: nothing is changed, or one thing twice; a part, key or label can't be.

        """
        changes = CommitArguments(append, pop, truncate, set, unset, put, put_new, drop, labels)
        return self._driver.run(self._core.sessions.commit, id, changes, if_revision, if_last, lease, create=create)

    def turns(self, id: str, start: int = 0, stop: int = -1) -> builtins.list[ConversationTurn]:
        """Return part of a session's history: from index start to index stop, both included, negative from the end.

        `turns(id, -20)` is the last twenty. Raises NotFoundError, CorruptSessionError.
        """
        return self._driver.perform(self._core.sessions.turns, id, start, stop)

    def update(self, id: str, change: Callable[[A], object], *, lease: Lease | None = None) -> Versioned[A]:
        """Load a session, call `change(asset)`, and save it; again if others have changed the same part in between.

        There is no bound on the number of tries; the deadline is for each of them. A change that changes nothing
        writes nothing.

        Args:
            id: the session.
            change: changes the asset in place. It may be called more than once, each time with what is stored then.
            lease: only as long as it is held.

        """
        return self._driver.run(self._core.saving.update, id, change, lease)

    def list(self, *, limit: int | None = None, **filters: Unpack[FilterArguments]) -> builtins.list[SessionMeta]:
        """Return sessions' metadata, newest first; equal times are ordered by id, descending.

        What is asked for with `labels` or `project_path` does not cost more if there are other sessions.

        Args:
            limit: so many at most.
            filters: only those of which all that is given holds:
                project_path (str): of this project;
                updated_after (aware datetime): updated then or later;
                updated_before (aware datetime): updated before that;
                labels (map of names to strings): with all of these labels.

        """
        return self._driver.run(self._core.lists.list, limit, Filters(**filters))

    def page(self, limit: int, cursor: str | None = None, **filters: Unpack[FilterArguments]) -> Page[SessionMeta]:
        """Return so many sessions' metadata, newest first, and the cursor of the next page (None: this is the last).

        Whatever is written meanwhile, no session that stays unchanged is skipped or repeated. Filters are as in `list`.
        """
        return self._driver.run(self._core.lists.page, limit, cursor, Filters(**filters))

    def count(self, **filters: Unpack[FilterArguments]) -> int:
        """Return the number of sessions; filters are as in `list`.

        The server knows it for no filter, bounds of time alone, one label, a project; for others it looks at the
        sessions with one of the labels.
        """
        return self._driver.run(self._core.lists.count, Filters(**filters))

    def records(
        self,
        id: str,
        prefix: str = "",
        *,
        after: str | None = None,
        before: str | None = None,
        limit: int | None = None,
        reverse: bool = False,
    ) -> builtins.list[tuple[str, bytes]]:
        """Return a session's records as pairs of key and bytes, in the order of their keys' UTF-8; [] if it is absent.

        The cost is that of what is returned. A hundred or more are read some at a time: one that is dropped meanwhile
        is not there, one that is put meanwhile may be. The deadline is for each of these steps.

        Args:
            id: the session.
            prefix: only those whose keys begin so.
            after: only those whose keys come after this one.
            before: only those whose keys come before this one.
            limit: so many at most.
            reverse: the last keys first.

        """
        return self._driver.run(self._core.records.range, id, prefix, after, before, limit, reverse)

    def get_records(self, id: str, keys: Iterable[str]) -> dict[str, bytes]:
        """Return a session's records by their keys, without those that are absent; up to a hundred at one moment."""
        return self._driver.run(self._core.records.get, id, keys)

    def delete(self, id: str, *, if_revision: int | None = None, lease: Lease | None = None) -> None:
        """Remove a session.

        Raises:
            NotFoundError: there is no such session.
            ConflictError: it is at another revision than if_revision.

        """
        self._driver.perform(self._core.sessions.delete, id, if_revision, lease)

    def exists(self, id: str) -> bool:
        """Return whether there is a session."""
        return self._driver.perform(self._core.sessions.exists, id)

    def save_many(self, assets: Iterable[A]) -> builtins.list[int | StorageError]:
        """Save assets, in few round trips. The list has their revisions, or the error of an asset that failed."""
        return self._driver.each(self._core.saving.save, assets)

    def load_many(self, ids: Iterable[str]) -> builtins.list[A | StorageError]:
        """Load sessions, in few round trips. The list has the error in the place of a session that failed."""
        load = self._core.sessions.load
        loaded = self._driver.each(partial(single, load), several(ids))
        return [item if isinstance(item, StorageError) else item.asset for item in loaded]

    def delete_many(self, ids: Iterable[str | SessionMeta]) -> builtins.list[StorageError | None]:
        """Delete sessions, in few round trips. The list has the error in the place of a session that failed.

        Of a `SessionMeta`, as lists have them, the session is deleted only if it is still at that revision; else the
        error is a ConflictError.
        """
        delete = self._core.sessions.delete_listed
        deleted = self._driver.each(partial(single, delete), several(ids))
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
        return self._driver.run(self._core.leases.all)

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
        changes = self._core.changes
        watcher = Watcher(changes, ids, wake)
        cursor = self._driver.run(changes.start, since)
        self._until_created(changes.namespace)
        if self._core.lifecycle.closed:
            return
        self._driver.execute(watcher.start(cursor))
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
        return self._driver.run(self._core.changes.cursor)

    def changes(self, since: str | None = None, limit: int = 1000) -> builtins.list[Change]:
        """Return what changed after a cursor, each session once, at most `limit`; the last one's cursor goes on.

        Without a cursor: every session there is. Raises what `watch` raises.
        """
        return self._driver.run(self._core.changes.changes, since, limit)

    def wait_for(self, id: str, *, revision: int, timeout: float) -> int:
        """Return the session's revision as soon as it is at least `revision`.

        Raises:
            NotFoundError: the session is absent, and its partition has passed that revision; that is looked at when
                it begins, when the session changes, and at each heartbeat.
            TimeoutError: it has not come in `timeout` seconds.

        """
        changes, wake = self._core.changes, threading.Event()
        check_id(id)
        expires = time.monotonic() + timeout
        self._until_created(changes.namespace, timeout)
        channel = changes.channel(id)
        plan = changes.wait_for(id, revision, expires - time.monotonic(), wake)
        leave = self._driver.listen({channel: waking(wake, revision)})
        try:
            return self._driver.follow(plan)
        finally:
            leave()

    def _until_created(self, namespace: Namespace, seconds: float = math.inf) -> None:
        """Wait until the namespace is there, the time is over, or the store is closed."""
        if namespace.known:
            return
        wake, lifecycle = threading.Event(), self._core.lifecycle
        expires = time.monotonic() + seconds
        leave = self._driver.listen({namespace.creation_channel: lambda _: wake.set()})
        try:
            left = seconds
            while left >= 0 and not (namespace.known or lifecycle.closed):
                self._driver.follow(appearance(namespace, min(left, self._core.options.heartbeat), wake))
                left = expires - time.monotonic()
        finally:
            leave()

    def reopen(self) -> None:
        """Take the namespace as it is now, after a StoreResetError: absent, or another, perhaps with other partitions.

        The store goes on as a new one: it has another origin, and has seen nothing. Watches and leases from before
        remain those of the old namespace; they end with StoreResetError and as lost. Nothing is created: that does the
        next write. Raises what `open_store` raises; then all is as before.
        """
        self._driver.execute(self._core.open())

    @property
    def origin(self) -> str:
        """What the changes that this store makes have as their origin."""
        return self._core.changes.origin

    def ping(self) -> float:
        """Return how many seconds a round trip to the server takes."""
        return self._driver.send(self._core.sessions.ping())

    def sync_status(self) -> SyncStatus:
        """Return how the store stands with its server, at once and without asking it.

        Online with the last acknowledged operation and the writes in flight; Error from a failure to reach the server
        until the next success; Offline after closing.
        """
        return self._core.lifecycle.sync_status()
