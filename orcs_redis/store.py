"""The Redis store for asyncio."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import math
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack, cast, overload

from .address import Address, EmbeddedFolder, FileFolder, MemoryName
from .asset import ConversationTurn, SessionAsset
from .clients import AsyncClientLink, memory_client
from .core import IN_FLIGHT, NO_OUTCOME, NOT_SENT, Core, OptionArguments, Options, Target, choose
from .errors import StorageError, UnavailableError
from .interrupts import raise_interruption, suppress
from .lease import AsyncLeasing, Lease, LeaseInfo
from .link import AsyncLink, Link
from .local import LocalFileStore
from .meta import Page, SessionMeta, SyncStatus, Versioned
from .network import in_thread
from .operations import Operation
from .plans import Pause, Plan
from .resp import Retry, Trouble, WrongServer
from .subscription import Subscription
from .watch import Change, Watcher, waking

if TYPE_CHECKING:
    import redis.asyncio

    from .embedded import Attachment

__all__ = ["RedisSessionStore", "open_store"]

T = TypeVar("T")
A = TypeVar("A", bound=SessionAsset)


class RedisSessionStore(Generic[A]):
    """Sessions in Redis or Valkey, shared by everyone who opens the same namespace.

    All tasks of the event loop that opened it share it, over one connection. Made by `open_store` or `connect`.

    Every method may raise UnavailableError (within the deadline no server could do it; a write was certainly not
    applied), PermissionDeniedError, and RuntimeError if the store was opened in another event loop or before a fork;
    those with an id InvalidIdError, before anything is sent. Every write may raise OutcomeUnknownError (it may have
    been applied), StoreFullError and StoreResetError. A retry within the store never applies a write twice.
    """

    def __init__(self, core: Core[A], link: AsyncLink, attachment: Attachment | None) -> None:
        self._core = core
        self._link = link
        self._attachment = attachment
        self._loop = asyncio.get_running_loop()
        self._idle: asyncio.Future[None] | None = None
        self._waiting: OrderedDict[object, asyncio.Future[None]] = OrderedDict()  # calls that may not send yet
        self._subscription = Subscription(link.feed, core.options.heartbeat)

    @overload
    @classmethod
    async def connect(
        cls,
        url: str | None = None,
        *,
        client: redis.asyncio.Redis | None = None,
        **options: Unpack[OptionArguments],
    ) -> RedisSessionStore[SessionAsset]: ...

    @overload
    @classmethod
    async def connect(
        cls,
        url: str | None = None,
        *,
        client: redis.asyncio.Redis | None = None,
        asset_type: type[A],
        **options: Unpack[OptionArguments],
    ) -> RedisSessionStore[A]: ...

    @classmethod
    async def connect(
        cls,
        url: str | None = None,
        *,
        client: redis.asyncio.Redis | None = None,
        **options: Any,
    ) -> RedisSessionStore[Any]:
        """Open a store; the caller closes it with `aclose`. For the arguments and errors see `open_store`."""
        chosen, target = choose("RedisSessionStore.connect", url, client, options)
        return await cls._open(chosen, target, client)

    @classmethod
    async def _open(
        cls, options: Options[Any], target: Target | None, client: redis.asyncio.Redis | None
    ) -> RedisSessionStore[Any]:
        core = Core(options)
        until = asyncio.get_running_loop().time() + core.deadline
        attachment: Attachment | None = None
        match target:
            case Address() as address:
                link: AsyncLink = Link(address, core.deadline, on_connect=core.connected)
            case MemoryName(name):
                fake = memory_client(name, "FakeAsyncRedis")
                link = AsyncClientLink(fake, core.deadline, owned=True, on_connect=core.connected)
            case EmbeddedFolder(path):
                from .embedded import Attachment, attach

                attachment = await in_thread(attach, path, core.deadline, discard=Attachment.release)
                where = Address(path=str(attachment.socket))
                link = Link(where, core.deadline, attachment.ensure, on_connect=core.connected)
            case FileFolder():
                raise ValueError("file: is a LocalFileStore's: use open_store")
            case None:
                link = AsyncClientLink(cast(Any, client), core.deadline, on_connect=core.connected)
        store = cls(core, link, attachment)
        try:
            await store._run(core.open(), until)
        except BaseException:
            await store.aclose()
            raise
        return store

    async def aclose(self) -> None:
        """Let what is under way end, then close the connection. Later calls raise UnavailableError."""
        core = self._core
        core.closed = True
        if core.is_forked:  # sockets and selector are the parent's
            return
        async with contextlib.AsyncExitStack() as stack:  # also if this is cancelled while it waits
            if self._attachment is not None:
                stack.callback(self._attachment.release)
            stack.push_async_callback(self._link.close)
            stack.push_async_callback(self._subscription.close)
            if core.active:
                self._idle = self._idle or self._loop.create_future()
                await asyncio.wait([self._idle], timeout=core.deadline + 1)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} namespace={self._core.options.namespace!r}>"

    async def save(self, asset: A, *, if_revision: int | None = None, lease: Lease | None = None) -> int:
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
        return await self._run(self._core.operations.save(asset, if_revision, lease))

    async def load(self, id: str) -> A:
        """Return the session.

        Raises:
            NotFoundError: there is no such session.
            CorruptSessionError: what is stored under the id is no session, or a part of it is gone.
            VersionIncompatibleError: it is of another version of the schema.

        """
        return (await self._perform(self._core.operations.load(id))).asset

    async def load_versioned(self, id: str) -> Versioned[A]:
        """Return the session and its revision, read at one point in time. Raises what `load` raises."""
        return await self._perform(self._core.operations.load(id))

    async def append(
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
        return (await self._perform(self._core.operations.append(id, turns, if_revision, lease))).revision

    async def turns(self, id: str, start: int = 0, stop: int = -1) -> builtins.list[ConversationTurn]:
        """Return part of a session's history: from index start to index stop, both included, negative from the end.

        `turns(id, -20)` is the last twenty. Raises NotFoundError, CorruptSessionError.
        """
        return await self._perform(self._core.operations.turns(id, start, stop))

    async def update(self, id: str, change: Callable[[A], object], *, lease: Lease | None = None) -> Versioned[A]:
        """Load a session, call `change(asset)`, and save it if no other write came between; else do it again.

        There is no bound on the number of tries; the deadline is for each of them.

        Args:
            id: the session.
            change: changes the asset in place. It may be called more than once, each time with what is stored then.
            lease: only as long as it is held.

        """
        return await self._run(self._core.operations.update(id, change, lease))

    async def list(
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
        plan = self._core.operations.list(limit, project_path, updated_after, updated_before)
        return await self._run(plan)

    async def page(
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
        plan = self._core.operations.page(limit, cursor, project_path, updated_after, updated_before)
        return await self._run(plan)

    async def delete(self, id: str, *, if_revision: int | None = None, lease: Lease | None = None) -> None:
        """Remove a session.

        Raises:
            NotFoundError: there is no such session.
            ConflictError: it is at another revision than if_revision.

        """
        await self._perform(self._core.operations.delete(id, if_revision, lease))

    async def exists(self, id: str) -> bool:
        """Return whether there is a session."""
        return await self._perform(self._core.operations.exists(id))

    async def save_many(self, assets: Iterable[A]) -> builtins.list[int | StorageError]:
        """Save assets, in few round trips. The list has their revisions, or the error of an asset that failed."""
        return await self._each(self.save, assets)

    async def load_many(self, ids: Iterable[str]) -> builtins.list[A | StorageError]:
        """Load sessions, in few round trips. The list has the error in the place of a session that failed."""
        return await self._each(self.load, ids)

    async def delete_many(self, ids: Iterable[str]) -> builtins.list[StorageError | None]:
        """Delete sessions, in few round trips. The list has the error in the place of a session that failed."""
        return await self._each(self.delete, ids)

    def lease(self, id: str, *, ttl: float = 30.0, wait: float = 0.0) -> AsyncLeasing:
        """Return an async context manager that gives the session's lease, a `Lease`.

        It is renewed in the background, and given back at the end of the block. Writes with `lease=` are refused with
        LeaseLostError once it has ended or passed to another; so a worker that was stopped can't write when it goes on.

        Args:
            id: the session, which need not exist yet.
            ttl: after so many seconds without renewal others may have it; by the server's clock.
            wait: for so many seconds wait for another to give it back.

        Raises:
            LeaseHeldError: another has it.

        """
        return AsyncLeasing(self, id, ttl, wait)

    async def leases(self) -> builtins.list[LeaseInfo]:
        """Return all leases that are held, in the order in which they end."""
        return await self._run(self._core.leases.all())

    async def watch(
        self, *, since: str | None = None, ids: Collection[str] | None = None
    ) -> AsyncGenerator[Change, None]:
        """Yield every peer's changes, and this store's own, until the loop is left or the store is closed.

        Of each partition they come in order, none twice; each session's latest state always comes, whatever happened
        to the connection (several changes of a session may come as the last of them).

        Args:
            since: a `Change.cursor` or `cursor()`, perhaps of another process: goes on from there, and misses nothing.
                Without it, from now.
            ids: only these sessions' changes.

        Raises:
            StoreResetError: the data was wiped or went back, or the cursor is older than the memory of deletions (the
                last 10,000 of a partition): list again, and watch from a cursor taken before.
            ValueError: `since` is no cursor.

        """
        wake = asyncio.Event()
        watcher = Watcher(self._core.changes, ids, wake)
        await self._run(watcher.start(since))
        listeners = watcher.listeners()
        try:
            for channel, listener in listeners:
                self._subscription.listen(channel, listener)
            while not self._core.closed:
                change = watcher.pop()
                if change is not None:
                    yield change
                else:
                    await self._follow(watcher.wait())
        finally:
            for channel, listener in listeners:
                self._subscription.leave(channel, listener)

    async def cursor(self) -> str:
        """Return the cursor of now, for `watch` and `changes`."""
        return await self._run(self._core.changes.cursor())

    async def changes(self, since: str | None = None, limit: int = 1000) -> builtins.list[Change]:
        """Return what changed after a cursor, each session once, at most `limit`; the last one's cursor goes on.

        Without a cursor: every session there is. Raises what `watch` raises.
        """
        return await self._run(self._core.changes.changes(since, limit))

    async def wait_for(self, id: str, *, revision: int, timeout: float) -> int:  # noqa: ASYNC109  # it is the contract's
        """Return the session's revision as soon as it is at least `revision`.

        Raises:
            NotFoundError: the session is absent, and its partition has passed that revision.
            TimeoutError: it has not come in `timeout` seconds.

        """
        changes, wake = self._core.changes, asyncio.Event()
        channel, listener = changes.channel(id), waking(wake, id, revision)
        plan = changes.wait_for(id, revision, timeout, wake)
        self._subscription.listen(channel, listener)
        try:
            return await self._follow(plan)
        finally:
            self._subscription.leave(channel, listener)

    @property
    def origin(self) -> str:
        """What the changes that this store makes have as their origin."""
        return self._core.changes.origin

    async def ping(self) -> float:
        """Return how many seconds a round trip to the server takes."""
        return await self._perform(self._core.operations.ping())

    def sync_status(self) -> SyncStatus:
        """Return how the store stands with its server, at once and without asking it.

        Online with the last acknowledged operation and the writes in flight; Error from a failure to reach the server
        until the next success; Offline after closing.
        """
        return self._core.sync_status()

    async def _each(self, call: Callable[[Any], Any], items: Iterable[Any]) -> builtins.list[Any]:
        """Call a method with each item, a number of them at a time; a dead server is waited for once."""
        waiting = deque(enumerate(items))
        results: builtins.list[Any] = [None] * len(waiting)
        dead = False

        async def work() -> None:
            nonlocal dead
            while waiting:
                n, item = waiting.popleft()
                began = self._loop.time()
                try:
                    if dead:
                        raise UnavailableError(NOT_SENT)
                    results[n] = await call(item)
                except StorageError as error:
                    raise_interruption(error)
                    results[n] = error
                    dead |= isinstance(error, NO_OUTCOME) and self._core.answered < began

        await _all(work() for _ in range(min(len(waiting), IN_FLIGHT // 2)))  # other callers have their half
        return results

    async def _perform(self, operation: Operation[T], until: float | None = None, call: object = None) -> T:
        """Send an operation until there is an answer or the deadline has come.

        Args:
            operation: what to do.
            until: the deadline of the call that it is part of.
            call: that call, which was admitted.

        """
        core, loop = self._core, self._loop
        if asyncio.get_running_loop() is not loop:
            self._refuse_loop()
        retry: Retry | None = None
        error: BaseException | None = None
        began, expires = math.inf, 0.0
        try:
            core.enter(operation, call)
            if call is None and len(core.active) - len(self._waiting) > IN_FLIGHT:
                await self._take_turn(operation)
            began = loop.time()
            expires = until or began + (operation.deadline or core.deadline)
            while True:
                sent = loop.time()
                try:
                    return operation.decode(await self._link.call(operation.commands(), expires))
                except (Trouble, StorageError) as problem:
                    raise_interruption(problem)
                    if isinstance(problem, WrongServer):
                        self._link.drop(sent)
                    retry = retry or Retry(expires)
                    delay = retry.after(problem, loop.time(), operation)
                if delay:
                    await asyncio.sleep(delay)
        except BaseException as exc:
            error = exc
            if self._waiting and isinstance(exc, NO_OUTCOME) and core.answered < began <= expires - 0.9 * core.deadline:
                self._give_up()
            raise
        finally:
            if call is None:
                core.active.pop(operation, None)
            core.leave(operation, error, loop.time())
            error = None  # else it, this frame and those of its callers are a cycle
            if call is None:
                self._end_turn()

    def _refuse_loop(self) -> None:
        self._core.check_process()
        raise RuntimeError("this store belongs to another event loop: open one in this loop")

    async def _take_turn(self, call: Operation[Any] | Plan[Any]) -> None:
        """Wait until a call may send; its deadline begins only then.

        Raises:
            UnavailableError: nothing came of those that were sent before it.

        """
        if isinstance(call, Operation) and call.deadline is not None:
            return  # the renewal of a lease has no time to wait
        turn = self._waiting[call] = self._loop.create_future()
        try:
            await turn
        finally:
            self._waiting.pop(call, None)

    def _end_turn(self) -> None:
        """Let others send in the place of a call that has ended."""
        active, waiting = self._core.active, self._waiting
        while waiting and len(active) - len(waiting) < IN_FLIGHT:
            _, turn = waiting.popitem(last=False)
            if not turn.done():  # else its caller was cancelled
                turn.set_result(None)
        if self._idle is not None and not active and not self._idle.done():
            self._idle.set_result(None)

    def _give_up(self) -> None:
        """Wait for a dead server once, not again for each that waits."""
        for turn in self._waiting.values():
            if not turn.done():
                turn.set_exception(UnavailableError(NOT_SENT))

    async def _run(self, plan: Plan[T], until: float | None = None) -> T:
        """Perform a plan's operations, one after the other; `aclose` waits for the last."""
        core, loop = self._core, self._loop
        if asyncio.get_running_loop() is not loop:
            self._refuse_loop()
        try:
            core.admit(plan)
            if len(core.active) - len(self._waiting) > IN_FLIGHT:
                await self._take_turn(plan)
            return await self._follow(plan, until or loop.time() + core.deadline, plan)
        finally:
            core.active.pop(plan, None)
            self._end_turn()

    async def _follow(self, plan: Plan[T], until: float | None = None, call: object = None) -> T:
        """Perform a plan's operations, one after the other, until the store is closed.

        With `until` they have one deadline, which begins anew when the plan has paused.
        """
        with contextlib.closing(plan):
            try:
                step = next(plan)
                while True:
                    if isinstance(step, Pause):
                        await _pause(step)
                        if until is not None:
                            until = self._loop.time() + self._core.deadline
                        step = plan.send(None)
                        continue
                    try:
                        result = await self._perform(step, until, call)
                    except StorageError as error:
                        raise_interruption(error)
                        step = plan.throw(error)
                    else:
                        step = plan.send(result)
            except StopIteration as stop:
                raise_interruption(stop)
                return cast(T, stop.value)


async def _all(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines side by side; an error ends all of them, and is raised when they have ended."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _pause(pause: Pause) -> None:
    if pause.wake is None:
        await asyncio.sleep(pause.seconds)
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(None if pause.seconds == math.inf else pause.seconds):
            await pause.wake.wait()


@overload
def open_store(
    url: str | None = None, *, client: redis.asyncio.Redis | None = None, **options: Unpack[OptionArguments]
) -> AbstractAsyncContextManager[RedisSessionStore[SessionAsset]]: ...


@overload
def open_store(
    url: str | None = None,
    *,
    client: redis.asyncio.Redis | None = None,
    asset_type: type[A],
    **options: Unpack[OptionArguments],
) -> AbstractAsyncContextManager[RedisSessionStore[A]]: ...


@contextlib.asynccontextmanager
async def open_store(
    url: str | None = None, *, client: redis.asyncio.Redis | None = None, **options: Any
) -> AsyncIterator[RedisSessionStore[Any]]:
    """Open a store for an `async with` block.

    Args:
        url: redis://, rediss://, valkey://, valkeys://, unix://, embedded:, memory:// or file:// (the docs' page of
            options has the table); without it and without a client, that of $ORCS_REDIS_URL, else `embedded:`. A
            file:// URL gives a LocalFileStore, which has the methods of SessionStore only and takes no option but
            asset_type.
        client: a redis-py asyncio client to use instead; it is never closed and never reconfigured.
        options: namespace ("orcs"); partitions (1 when the namespace is created, later read from its descriptor);
            asset_type (SessionAsset); deadline for all that a call does (5.0 s); heartbeat for watches (5.0 s);
            max_asset_bytes (128 MiB) and max_turn_bytes (16 MiB), encoded; max_fields (1000) at an asset's top level;
            max_connections of a blocking store (64); credentials, a function that returns user name and password, and
            is called in this thread at each connecting.

    Raises:
        UnavailableError, PermissionDeniedError: no server within the deadline, or it denies access.
        UnsupportedServerError: older than Redis 7.0 or Valkey 7.2, or a cluster's node.
        LayoutError: the namespace is of another layout, or has another number of partitions.
        ValueError, TypeError: a URL, client or option that can't be, or that means nothing for this kind of store.

    """
    chosen, target = choose("open_store", url, client, options)
    if isinstance(target, FileFolder):
        async with LocalFileStore(target.path, asset_type=chosen.asset_type) as files:
            yield cast(RedisSessionStore[Any], files)
        return
    async with await RedisSessionStore._open(chosen, target, client) as store:
        yield store
