"""The hybrid store for asyncio."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar, Unpack, cast, overload
from weakref import WeakValueDictionary

from ...errors import ConflictError, NotFoundError, OutcomeUnknownError, StorageError, UnavailableError
from ...interrupts import raise_interruption
from ...model.asset import SessionAsset
from ...model.filters import FilterArguments, Filters, check_limit
from ...model.ids import check_id, several
from ...model.meta import Page, SessionMeta, SyncMode, SyncStatus, Versioned
from ...model.sections import ConversationTurn
from ...protocol.codec import Codec
from ...protocol.lists import decode_cursor, encode_cursor, place_of
from ...protocol.saving import call_change
from ...transport.address import FileFolder
from ...transport.driver import BackgroundWork, Driver, Workers, pause
from ..disk import AnyPath
from ..options import HybridArguments, check_arguments
from ..redis import RedisSessionStore
from .files import Files
from .installing import Progress, Rules, SyncOptions
from .journal import Journal
from .live import Live
from .local import Ancestor, Local, Saved, ancestor_of, set_ancestor
from .results import Conflict, Kept, SyncReport
from .rounds import Rounds
from .shared import Shared
from .steps import Connect, Each, Here, Listen, Pause, Plan, Step, There

__all__ = ["HybridSessionStore"]

A = TypeVar("A", bound=SessionAsset)
T = TypeVar("T")
_CLOSING_SECONDS = 10.0  # for what is under way
_OFFLINE_SECONDS = 1.0  # for reaching a server that was not reached yet


class HybridSessionStore(Generic[A]):
    """Sessions in orcs' files, in step with a shared store: local first.

    Reading and writing is done in the folder, and never waits for the network. `sync` brings the folder and the shared
    store together; a live store does so by itself. Any number of processes may use a folder at once, orcs among them.

    Every method may raise PermissionDeniedError, StoreFullError and UnavailableError (the disk); those with an id
    InvalidIdError, before anything is done; RuntimeError after a fork, and of a live store in another event loop.
    """

    @overload
    def __init__(
        self: HybridSessionStore[SessionAsset],
        path: AnyPath,
        url: str | None = None,
        **options: Unpack[HybridArguments],
    ) -> None: ...
    @overload
    def __init__(
        self, path: AnyPath, url: str | None = None, *, asset_type: type[A], **options: Unpack[HybridArguments]
    ) -> None: ...
    def __init__(
        self,
        path: AnyPath,
        url: str | None = None,
        *,
        live: bool = True,
        merge: bool = True,
        prefer: Literal["local", "remote"] | None = None,
        keep_days: float = 30.0,
        scan: float = 2.0,
        on_sync: Callable[[SyncReport], object] | None = None,
        **options: Any,
    ) -> None:
        """Open the folder, and make it if it is absent. The network is not waited for.

        Args:
            path: the folder. It must be on a local file system.
            url: the shared store's, as of `open_store`.
            live: synchronise in the background; else only `sync` and `resolve` use the network.
            merge: merge what both sides changed, part by part; else that is a conflict.
            prefer: whose parts hold where both sides changed the same: "local" or "remote". None: that is a conflict.
            keep_days: for so many days a copy of what loses is kept.
            scan: after so many seconds a live store looks for files that other programs have changed.
            on_sync: is called with what each round of a live store has done, in its background task or thread; what it
                raises is logged.
            options: those of `open_store`.

        Raises:
            ValueError, TypeError: a URL or option that can't be.
            PermissionDeniedError: the folder can't be written to.
            UnsupportedServerError: it is on a network file system.
            LayoutError: its `state.db` is of another version.

        """
        checked, target = check_arguments("HybridSessionStore", url, None, options)
        if not os.fspath(path):
            raise ValueError("the folder's path is empty")
        if isinstance(target, FileFolder):
            raise ValueError("a folder is synchronised with a shared store, not with another folder")
        if prefer not in (None, "local", "remote"):
            raise ValueError('prefer is "local", "remote" or None')
        for name, value in (("keep_days", keep_days), ("scan", scan)):
            if type(value) not in (int, float) or not 0 < value < 2**31:
                raise ValueError(f"{name} is a number more than 0")
        self._options, self._target = checked, target
        self._files = Files(path)
        self._folder = self._files.path.resolve()  # by whichever name it was opened
        self._journal = Journal(self._files.home / "state.db")
        self._local: Local[A] = Local(self._files, self._journal, checked.asset_type)
        self._local.open()
        self._rounds = Rounds(self._local, Rules(merge, prefer, keep_days))
        self._workers = Workers(16, "orcs-redis-hybrid")
        self._is_live = live
        self._scan = scan
        self._live: Live[A] | None = None
        self._on_sync = on_sync
        self._work: BackgroundWork | None = None
        self._remote: RedisSessionStore[A] | None = None
        self._shared: Shared[A] | None = None
        self._connecting = asyncio.Lock()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of saves, by id
        self._closed = False
        self._abandoned = False  # closed, and what was under way was waited for
        self._pid = os.getpid()

    async def aclose(self) -> None:
        """End what is under way, and close the connection. Later calls raise UnavailableError."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        try:
            if self._live is not None and self._work is not None:
                self._live.close()
                offline = self._rounds.mode is SyncMode.OFFLINE  # a first round may be beginning, all the same
                await self._work.join(_OFFLINE_SECONDS if offline else _CLOSING_SECONDS)
        finally:  # also if this is cancelled while it waits
            try:
                self._abandoned = True
                if self._remote is not None:
                    await self._remote.aclose()
            finally:
                self._workers.close()
                self._journal.close()

    async def __aenter__(self) -> Self:
        self._begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {str(self._files.path)!r} namespace={self._options.namespace!r}>"

    @property
    def path(self) -> Path:
        """The folder."""
        return self._files.path

    @property
    def remote(self) -> RedisSessionStore[A]:
        """The shared store itself, for leases, watches and all that is done there at once.

        Raises:
            UnavailableError: it was not reached.

        """
        if self._remote is None or self._closed or self._rounds.mode is SyncMode.OFFLINE:
            raise UnavailableError("the shared store is not reached")
        return self._remote

    # Sessions

    async def save(self, asset: A, *, overwrite: bool = False) -> int:
        """Store an asset in its file, and return that file's modification time in ns.

        A new asset, made here, is stored whole, over whatever has its id. Of one that was loaded or saved here the
        changes since are applied to the file as it is now. Afterwards the asset equals the file, if it was not changed
        meanwhile.

        Args:
            asset: what to store.
            overwrite: store it whole, over whatever is there; what is lost by that is kept.

        Raises:
            ConflictError: the file was changed in one of the parts that the asset changes, in another way (`parts`
                names them), or is gone; nothing was written.
            SerializationError: a value that would not come back.
            CorruptSessionError, VersionIncompatibleError: the file can't be read. Nothing was written.
            OutcomeUnknownError: it is written, but may not survive a power failure.

        """
        id = check_id(asset.id)
        self._begin()
        async with self._saving(id):  # what is saved twice at once is no conflict with itself
            data = asset.to_json().encode()  # here, lest another task changes the asset meanwhile
            turns = [turn.id for turn in asset.history.turns]
            known = ancestor_of(asset, self._folder)

            def save() -> Saved[A]:
                try:
                    saved = self._local.save(id, data, turns, known, overwrite=overwrite)
                except OutcomeUnknownError:
                    self._note_ancestor(asset, 0, turns, data)
                    raise
                self._note_ancestor(asset, saved.revision, turns, data)
                return saved

            saved = await self._workers.complete(save)
            if saved.merged is not None and asset.to_json().encode() == data:
                Codec.assign(asset, saved.merged)
                self._note_ancestor(asset, saved.revision, [turn.id for turn in asset.history.turns], saved.data)
        self._note_saved(id)
        return saved.revision

    def _saving(self, id: str) -> asyncio.Lock:
        return self._locks.setdefault(id, asyncio.Lock())

    def _note_ancestor(self, asset: A, revision: int, turns: builtins.list[str], data: bytes) -> None:
        set_ancestor(asset, self._folder, self._local.ancestor(revision, turns, data))

    async def load(self, id: str, *, fresh: bool = False) -> A:
        """Read a session from its file; one that is not here is fetched, if the shared store is reached.

        Args:
            id: the session's.
            fresh: synchronise it first.

        Raises:
            NotFoundError: there is no such session.
            UnavailableError: it is in the shared store only, and that can't be reached; or fresh can't be had.
            CorruptSessionError: the file is no session.
            VersionIncompatibleError: it is of another version of the schema.

        """
        self._begin()
        if fresh:
            await self._fetch(id)
        try:
            asset, known = await self._workers.call(self._local.load, id)
        except (NotFoundError, UnavailableError) as error:
            raise_interruption(error)
            if fresh or not self._is_online:
                raise
            await self._fetch(id)
            asset, known = await self._workers.call(self._local.load, id)
        set_ancestor(asset, self._folder, known)
        return asset

    async def _fetch(self, id: str) -> None:
        self._begin()
        options = SyncOptions(patience=self._options.deadline)
        report = await self._follow(self._rounds.sync([check_id(id)], options))
        for _, error in report.failed:
            raise error

    async def append(self, id: str, *turns: ConversationTurn) -> int:
        """Add turns at the end of a session's history and return the file's new modification time in ns.

        A session that is not here is fetched, if the shared store is reached.

        Raises:
            NotFoundError: there is no such session.
            UnavailableError: it is in the shared store only, and that can't be reached.
            SerializationError: a value that would not come back.
            ValueError: no turn was given.

        """
        self._begin()
        try:
            revision = await self._workers.call(self._local.append, id, turns)
        except (NotFoundError, UnavailableError) as error:
            raise_interruption(error)
            if not self._is_online:
                raise
            await self._fetch(id)
            revision = await self._workers.call(self._local.append, id, turns)
        self._note_saved(id)
        return revision

    async def update(self, id: str, change: Callable[[A], object]) -> Versioned[A]:
        """Load a session, change it, and save it, again and again until no one else wrote the file meanwhile.

        Returns the session as it was stored, and its revision. What changes nothing writes nothing.

        Args:
            id: the session's.
            change: changes the asset that it is given, and does not wait. It may be called several times.

        Raises:
            NotFoundError: there is no such session.
            SerializationError: a value that would not come back.
            TypeError, ValueError: `change` waits, or changes the id.

        """
        while True:
            asset = await self.load(id)
            call_change(change, asset)
            data, turns = asset.to_json().encode(), [turn.id for turn in asset.history.turns]
            known = cast(Ancestor, ancestor_of(asset, self._folder))
            revision = await self._workers.call(self._local.save_exactly, id, data, turns, known)
            if revision is not None:
                self._note_ancestor(asset, revision, turns, data)
                self._note_saved(id)
                return Versioned(asset, revision)

    async def turns(self, id: str, start: int = 0, stop: int = -1) -> builtins.list[ConversationTurn]:
        """Return the turns from index `start` to `stop`, both included; -1 is the last. Raises what `load` raises."""
        if type(start) is not int or type(stop) is not int:
            raise ValueError("the index of a turn is an integer")
        turns = (await self.load(id)).history.turns
        return turns[start : None if stop == -1 else stop + 1]

    async def delete(self, id: str) -> None:
        """Delete a session, here at once and with the next sync in the shared store; NotFoundError if it is absent.

        If it is edited elsewhere before that, the edit wins.
        """
        self._begin()
        try:
            await self._workers.call(self._local.delete, id)
        except UnavailableError as error:
            raise_interruption(error)
            if not self._is_online:
                raise
            await self._fetch(id)
            await self._workers.call(self._local.delete, id)
        self._note_saved(id)

    async def exists(self, id: str) -> bool:
        """Return whether there is such a session, here or in the shared store as far as that is known or reached."""
        self._begin()
        if await self._workers.call(self._local.exists, id):
            return True
        if not self._is_online or id in self._journal.rows:
            return False
        return await self._follow(_is_there(id))

    async def list(self, *, limit: int | None = None, **filters: Unpack[FilterArguments]) -> builtins.list[SessionMeta]:
        """List the sessions here, and those known in the shared store, the last updated first.

        Only files that have changed since are read. `sync_state` says how each stands to the shared store.

        Args:
            limit: so many at most.
            filters: project_path, updated_after, updated_before, labels: only those of which all that is given holds.

        """
        limit = None if limit is None else check_limit(limit)
        self._begin()
        return (await self._workers.call(self._local.list, Filters(**filters)))[:limit]

    async def page(
        self, limit: int, cursor: str | None = None, **filters: Unpack[FilterArguments]
    ) -> Page[SessionMeta]:
        """Return one page of the list, and the cursor of the next one. ValueError if `cursor` is none."""
        check_limit(limit, least=1)
        metas = await self.list(**filters)
        if cursor is not None:
            place = decode_cursor(cursor)
            metas = [meta for meta in metas if place_of(meta) < place]
        items = metas[:limit]
        return Page(items, encode_cursor(items[-1]) if len(metas) > limit else None)

    async def count(self, **filters: Unpack[FilterArguments]) -> int:
        """Return the number of sessions that `list` has."""
        return len(await self.list(**filters))

    async def save_many(self, assets: Iterable[A]) -> builtins.list[int | StorageError]:
        """Save assets. The list has their revisions, or the error of an asset that failed."""
        results: builtins.list[int | StorageError] = []
        for asset in assets:
            try:
                results.append(await self.save(asset))
            except StorageError as error:
                raise_interruption(error)
                results.append(error.with_traceback(None))
        return results

    async def load_many(self, ids: Iterable[str]) -> builtins.list[A | StorageError]:
        """Load sessions. The list has the error in the place of a session that failed."""
        results: builtins.list[A | StorageError] = []
        for id in several(ids):
            try:
                results.append(await self.load(id))
            except StorageError as error:
                raise_interruption(error)
                results.append(error.with_traceback(None))
        return results

    async def delete_many(self, ids: Iterable[str | SessionMeta]) -> builtins.list[StorageError | None]:
        """Delete sessions. The list has the error in the place of a session that failed.

        Of a `SessionMeta`, as lists have them, the session is deleted only if its file is still of that revision; else
        the error is a ConflictError.
        """
        results: builtins.list[StorageError | None] = []
        for item in several(ids):
            try:
                if isinstance(item, SessionMeta):
                    await self._check_revision(item)
                await self.delete(item.id if isinstance(item, SessionMeta) else item)
                results.append(None)
            except StorageError as error:
                raise_interruption(error)
                results.append(error.with_traceback(None))
        return results

    async def _check_revision(self, meta: SessionMeta) -> None:
        signature = await self._workers.call(self._files.signature, meta.id)
        if signature is not None and signature.modified_ns != meta.revision:
            raise ConflictError(meta.id, meta.revision, signature.modified_ns)

    # Synchronisation

    async def sync(
        self,
        *ids: str,
        dry_run: bool = False,
        adopt: bool = False,
        deletions: bool = False,
        verify: bool = False,
        progress: Progress | None = None,
    ) -> SyncReport:
        """Bring the folder and the shared store together, and return what was done.

        A session's own failure is in the report.

        Args:
            ids: only these sessions; without any, all.
            dry_run: only say what would be done, and remember how each session stands.
            adopt: take the shared store as it is, though it is not what this folder was last in step with: what is
                here goes there, and nothing is deleted.
            deletions: delete, though it is most of the sessions.
            verify: read every file, whatever its times say.
            progress: is called here with the numbers of sessions done and to be done; what it raises ends the round.

        Raises:
            UnavailableError: the shared store can't be reached.
            StoreResetError: it was wiped, went back in time, or is another one; see `adopt`.
            SyncStoppedError: everything was done but for suspiciously many deletions; see `deletions`.
            PermissionDeniedError, LayoutError, UnsupportedServerError: as of `open_store`.
            ValueError: `adopt` takes all sessions.

        """
        self._begin()
        options = SyncOptions(dry_run, adopt, deletions, verify, progress)
        return await self._follow(self._rounds.sync(ids or None, options))

    async def conflict(self, id: str) -> Conflict[A] | None:
        """Return what a session's conflict is about, with both versions; None: it has none.

        Raises:
            NotFoundError: there is no such session.
            UnavailableError, StoreResetError: as of `sync`.

        """
        self._begin()
        return await self._follow(self._rounds.conflict(id))

    def conflict_reason(self, id: str) -> str:
        """Say why a session was in conflict when it was last looked at, in words or by the parts that collide.

        Without I/O; "" if it was in none.
        """
        return self._local.conflict_reason(check_id(id))

    async def resolve(self, id: str, keep: Literal["local", "remote"] | A) -> None:
        """Decide what a session is to be, on both sides. Both versions are kept first.

        Args:
            id: the session's.
            keep: "local" or "remote": whose parts hold where both sides changed the same; all else is merged. Without
                a conflict, and of two different sessions, that side is taken whole. Or an asset: is taken as it is.

        Raises:
            NotFoundError: there is no such session.
            CorruptSessionError: the side to be kept can't be read, or the file holds another session.
            VersionIncompatibleError: one of them is of another version of the schema: it is never overwritten.
            SerializationError, PermissionDeniedError, StoreFullError: the shared store refuses what is to be kept.
            UnavailableError, StoreResetError: as of `sync`.
            ConflictError: others write it all the time.
            ValueError: `keep` is none of these, or an asset of another id.

        """
        if isinstance(keep, SessionAsset):
            if keep.id != id:
                raise ValueError("the asset has another id")
            data = keep.to_json().encode()
            keep = await self._workers.call(self._local.decode, check_id(id), data)
        elif keep not in ("local", "remote"):
            raise ValueError('keep is "local", "remote" or an asset')
        self._begin()
        await self._follow(self._rounds.resolve(id, keep))

    def kept(self, id: str | None = None) -> builtins.list[Kept]:
        """List the copies that are kept of what lost, of one session or of all, the newest first. Reads the disk."""
        return self._files.copies.list(id)

    async def load_kept(self, copy: Kept) -> A:
        """Read a kept copy; it can be saved with `overwrite=True`."""
        self._begin()
        data = await self._workers.call(self._files.copies.read, copy.path)
        return await self._workers.call(self._local.decode, copy.id, data)

    def sync_status(self) -> SyncStatus:
        """Return how the folder stands with the shared store, at once and without I/O."""
        standings = self._local.standings()
        last = self._rounds.last_sync
        return SyncStatus(
            mode=SyncMode.OFFLINE if self._closed else self._rounds.mode,
            last_sync=None if last is None else datetime.fromtimestamp(last, UTC),
            pending_uploads=sum(found.upload for found in standings.values()),
            pending_downloads=sum(found.download for found in standings.values()),
            conflicts=sorted(id for id, found in standings.items() if found.is_conflict),
        )

    # How plans are performed

    @property
    def _is_online(self) -> bool:
        reached = self._rounds.mode in (SyncMode.ONLINE, SyncMode.SYNCING)
        return self._is_live and self._remote is not None and reached

    def _begin(self) -> None:
        """Check that the store can be used; a live one begins to synchronise with its first use."""
        if os.getpid() != self._pid:
            raise RuntimeError("this store was opened before a fork: open one in the child")
        if self._closed:
            raise UnavailableError("the store is closed")
        if self._is_live and self._live is None:
            self._live = Live(self._local, self._rounds, self._scan, asyncio.Event(), self._on_sync)
            self._work = BackgroundWork(self._run_live)
        elif self._work is not None:
            self._work.check_caller()

    async def _run_live(self) -> None:
        if self._live is not None:
            await self._follow(self._live.run())

    def _note_saved(self, id: str) -> None:
        if self._live is not None:
            self._live.note_saved(id)

    async def _follow(self, plan: Plan[T]) -> T:
        """Do what a plan asks for, step by step."""
        with contextlib.closing(plan):
            try:
                step = next(plan)
                while True:
                    try:
                        result = await self._do(step)
                    except StorageError as error:
                        raise_interruption(error)
                        step = plan.throw(error)
                    else:
                        step = plan.send(result)
            except StopIteration as stop:
                raise_interruption(stop)
                return cast(T, stop.value)

    async def _do(self, step: Step) -> Any:
        match step:
            case Here(call, arguments):
                return await self._workers.complete(call, *arguments)
            case There(make, arguments):
                return await self._driver.run(make, *arguments)
            case Each(make, items):
                return await self._driver.each(make, items)
            case Connect(anew):
                return await self._connect(anew=anew)
            case Listen(listeners):
                return self._driver.listen(listeners)
            case Pause():
                return await pause(step)

    @property
    def _driver(self) -> Driver:
        return cast(RedisSessionStore[A], self._remote)._driver

    async def _connect(self, *, anew: bool) -> Shared[A]:
        """Open the Redis store, if it is not open; `anew`: take its namespace as it is now."""
        async with self._connecting:
            if self._remote is None:
                self._remote = await RedisSessionStore._open(self._options, self._target, None)
            if self._abandoned:  # closing did not wait for it
                await self._remote.aclose()
                raise UnavailableError("the store is closed")
            if anew:
                await self._remote.reopen()
            if self._shared is None or anew:
                self._shared = Shared(self._remote._core)
            return self._shared


def _is_there(id: str) -> Plan[bool]:
    shared = yield Connect()
    return (yield There(shared.mark, (id,))) is not None
