"""The Redis store, blocking: the same names as in `orcs_redis` without `async` and `await`.

    from orcs_redis.sync import open_store

What the methods do, and what they raise, is said in `orcs_redis.RedisSessionStore`.
"""

from __future__ import annotations

import builtins
import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack, cast, overload

from .address import Address, EmbeddedFolder, FileFolder, MemoryName
from .asset import (
    SESSION_VERSION,
    AutoTriggerConfig,
    CodingStylePrefs,
    CommandGrant,
    CommunicationPrefs,
    CompactedTurn,
    ComponentSnapshot,
    ContextInjection,
    ConversationHistory,
    ConversationTurn,
    GrantKind,
    LearnedFact,
    ProjectContext,
    SessionAsset,
    SkillConfig,
    ToolCallRecord,
    TriggerCondition,
    UserPreferences,
)
from .blocking import BlockingLink, SocketLink
from .clients import BlockingClientLink, memory_client
from .core import IN_FLIGHT, NO_OUTCOME, NOT_SENT, Core, OptionArguments, Options, Target, choose
from .errors import (
    ChecksumMismatchError,
    ConflictError,
    CorruptSessionError,
    InvalidIdError,
    LayoutError,
    LeaseHeldError,
    LeaseLostError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    SerializationError,
    StorageError,
    StoreFullError,
    StoreResetError,
    UnavailableError,
    UnsupportedServerError,
    VersionIncompatibleError,
)
from .interrupts import raise_interruption
from .lease import BlockingLease as Lease
from .lease import BlockingLeasing, LeaseInfo
from .local import BlockingLocalFileStore as LocalFileStore
from .meta import BlockingSessionStore as SessionStore
from .meta import Page, SessionMeta, SyncMode, SyncState, SyncStatus, Versioned
from .operations import Operation
from .plans import Pause, Plan, alone
from .resp import Command, Reply, Retry, Trouble, WrongServer, divided, joinable_run, joined
from .subscription import Background, Listener, Subscription
from .watch import Change, Watcher, waking

if TYPE_CHECKING:
    import redis

    from .embedded import Attachment

__all__ = [
    "SESSION_VERSION",
    "AutoTriggerConfig",
    "Change",
    "ChecksumMismatchError",
    "CodingStylePrefs",
    "CommandGrant",
    "CommunicationPrefs",
    "CompactedTurn",
    "ComponentSnapshot",
    "ConflictError",
    "ContextInjection",
    "ConversationHistory",
    "ConversationTurn",
    "CorruptSessionError",
    "GrantKind",
    "InvalidIdError",
    "LayoutError",
    "LearnedFact",
    "Lease",
    "LeaseHeldError",
    "LeaseInfo",
    "LeaseLostError",
    "LocalFileStore",
    "NotFoundError",
    "OutcomeUnknownError",
    "Page",
    "PermissionDeniedError",
    "ProjectContext",
    "RedisSessionStore",
    "SerializationError",
    "SessionAsset",
    "SessionMeta",
    "SessionStore",
    "SkillConfig",
    "StorageError",
    "StoreFullError",
    "StoreResetError",
    "SyncMode",
    "SyncState",
    "SyncStatus",
    "ToolCallRecord",
    "TriggerCondition",
    "UnavailableError",
    "UnsupportedServerError",
    "UserPreferences",
    "VersionIncompatibleError",
    "Versioned",
    "open_store",
]

T = TypeVar("T")
A = TypeVar("A", bound=SessionAsset)


class RedisSessionStore(Generic[A]):
    """Sessions in Redis or Valkey, shared by everyone who opens the same namespace.

    Any number of threads may use it; each that waits has a connection of its own for that time.
    """

    def __init__(self, core: Core[A], link: BlockingLink, attachment: Attachment | None) -> None:
        self._core = core
        self._link = link
        self._attachment = attachment
        self._listening = threading.RLock()  # a signal handler may want it, too
        self._listeners: tuple[Background, Subscription] | None = None

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
        asset_type: type[A],
        **options: Unpack[OptionArguments],
    ) -> RedisSessionStore[A]: ...

    @classmethod
    def connect(
        cls,
        url: str | None = None,
        *,
        client: redis.Redis | None = None,
        **options: Any,
    ) -> RedisSessionStore[Any]:
        """Open a store; the caller closes it with `close`."""
        chosen, target = choose("RedisSessionStore.connect", url, client, options)
        return cls._open(chosen, target, client)

    @classmethod
    def _open(cls, options: Options[Any], target: Target | None, client: redis.Redis | None) -> RedisSessionStore[Any]:
        core = Core(options)
        most, renew = options.max_connections, core.connected
        until = time.monotonic() + core.deadline
        attachment: Attachment | None = None
        match target:
            case Address() as address:
                link: BlockingLink = SocketLink(address, core.deadline, max_connections=most, on_connect=renew)
            case MemoryName(name):
                fake = memory_client(name, "FakeRedis")
                link = BlockingClientLink(fake, core.deadline, max_connections=most, owned=True, on_connect=renew)
            case EmbeddedFolder(path):
                from .embedded import attach

                attachment = attach(path, core.deadline)
                where = Address(path=str(attachment.socket))
                link = SocketLink(where, core.deadline, attachment.ensure, max_connections=most, on_connect=renew)
            case FileFolder():
                raise ValueError("file: is a LocalFileStore's: use open_store")
            case None:
                link = BlockingClientLink(cast(Any, client), core.deadline, max_connections=most, on_connect=renew)
        store = cls(core, link, attachment)
        try:
            store._run(core.open(), until)
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Let what other threads have under way end, then close the connections."""
        core = self._core
        core.closed = True
        if not core.is_forked:  # the child of a fork has nobody to wait for
            until = time.monotonic() + core.deadline + 1
            while core.is_busy() and time.monotonic() < until:
                time.sleep(0.005)
            with self._listening:
                listeners, self._listeners = self._listeners, None
            if listeners is not None:
                background, subscription = listeners
                background.close(subscription.close, until)
        self._link.close()
        if self._attachment is not None:
            self._attachment.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} namespace={self._core.options.namespace!r}>"

    def save(self, asset: A, *, if_revision: int | None = None, lease: Lease | None = None) -> int:
        """Store the whole asset and return the new revision."""
        return self._run(self._core.operations.save(asset, if_revision, lease))

    def load(self, id: str) -> A:
        """Return the session."""
        return self._perform(self._core.operations.load(id)).asset

    def load_versioned(self, id: str) -> Versioned[A]:
        """Return the session and its revision."""
        return self._perform(self._core.operations.load(id))

    def append(
        self, id: str, *turns: ConversationTurn, if_revision: int | None = None, lease: Lease | None = None
    ) -> int:
        """Add turns at the end of a session's history and return the new revision."""
        return self._perform(self._core.operations.append(id, turns, if_revision, lease)).revision

    def turns(self, id: str, start: int = 0, stop: int = -1) -> builtins.list[ConversationTurn]:
        """Return part of a session's history."""
        return self._perform(self._core.operations.turns(id, start, stop))

    def update(self, id: str, change: Callable[[A], object], *, lease: Lease | None = None) -> Versioned[A]:
        """Load a session, call `change(asset)`, and save it if no other write came between; else do it again."""
        return self._run(self._core.operations.update(id, change, lease))

    def list(
        self,
        *,
        limit: int | None = None,
        project_path: str | None = None,
        updated_after: datetime | None = None,
        updated_before: datetime | None = None,
    ) -> builtins.list[SessionMeta]:
        """Return sessions' metadata, newest first."""
        plan = self._core.operations.list(limit, project_path, updated_after, updated_before)
        return self._run(plan)

    def page(
        self,
        limit: int,
        cursor: str | None = None,
        *,
        project_path: str | None = None,
        updated_after: datetime | None = None,
        updated_before: datetime | None = None,
    ) -> Page[SessionMeta]:
        """Return so many sessions' metadata, newest first, and the cursor of the next page."""
        plan = self._core.operations.page(limit, cursor, project_path, updated_after, updated_before)
        return self._run(plan)

    def delete(self, id: str, *, if_revision: int | None = None, lease: Lease | None = None) -> None:
        """Remove a session."""
        self._perform(self._core.operations.delete(id, if_revision, lease))

    def exists(self, id: str) -> bool:
        """Return whether there is a session."""
        return self._perform(self._core.operations.exists(id))

    def save_many(self, assets: Iterable[A]) -> builtins.list[int | StorageError]:
        """Save assets, in few round trips."""
        operations = self._core.operations
        return self._run_many([operations.save(asset, None, None) for asset in assets])

    def load_many(self, ids: Iterable[str]) -> builtins.list[A | StorageError]:
        """Load sessions, in few round trips."""
        operations = self._core.operations
        loaded = self._run_many([alone(operations.load, id) for id in ids])
        return [item if isinstance(item, StorageError) else item.asset for item in loaded]

    def delete_many(self, ids: Iterable[str]) -> builtins.list[StorageError | None]:
        """Delete sessions, in few round trips."""
        operations = self._core.operations
        deleted = self._run_many([alone(operations.delete, id, None, None) for id in ids])
        return [item if isinstance(item, StorageError) else None for item in deleted]

    def lease(self, id: str, *, ttl: float = 30.0, wait: float = 0.0) -> BlockingLeasing:
        """Return a context manager that gives the session's lease, a `Lease`."""
        return BlockingLeasing(self, id, ttl, wait)

    def leases(self) -> builtins.list[LeaseInfo]:
        """Return all leases that are held, in the order in which they end."""
        return self._run(self._core.leases.all())

    def watch(self, *, since: str | None = None, ids: Collection[str] | None = None) -> Generator[Change, None, None]:
        """Yield every peer's changes, and this store's own, until the loop is left or the store is closed."""
        wake = threading.Event()
        watcher = Watcher(self._core.changes, ids, wake)
        self._run(watcher.start(since))
        leave: builtins.list[Callable[[], None]] = []
        try:
            leave += (self._listen(channel, listener) for channel, listener in watcher.listeners())
            while not self._core.closed:
                change = watcher.pop()
                if change is not None:
                    yield change
                else:
                    self._follow(watcher.wait())
        finally:
            for end in leave:
                end()

    def cursor(self) -> str:
        """Return the cursor of now, for `watch` and `changes`."""
        return self._run(self._core.changes.cursor())

    def changes(self, since: str | None = None, limit: int = 1000) -> builtins.list[Change]:
        """Return what changed after a cursor, each session once, at most `limit`; the last one's cursor goes on."""
        return self._run(self._core.changes.changes(since, limit))

    def wait_for(self, id: str, *, revision: int, timeout: float) -> int:
        """Return the session's revision as soon as it is at least `revision`."""
        changes, wake = self._core.changes, threading.Event()
        channel, listener = changes.channel(id), waking(wake, id, revision)
        plan = changes.wait_for(id, revision, timeout, wake)
        leave = self._listen(channel, listener)
        try:
            return self._follow(plan)
        finally:
            leave()

    @property
    def origin(self) -> str:
        """What the changes that this store makes have as their origin."""
        return self._core.changes.origin

    def ping(self) -> float:
        """Return how many seconds a round trip to the server takes."""
        return self._perform(self._core.operations.ping())

    def sync_status(self) -> SyncStatus:
        """Return how the store stands with its server, at once and without asking it."""
        return self._core.sync_status()

    def _perform(self, operation: Operation[T], until: float | None = None, call: object = None) -> T:
        """Send an operation until there is an answer or the deadline has come.

        Args:
            operation: what to do.
            until: the deadline of the call that it is part of.
            call: that call, which was admitted.

        """
        core = self._core
        retry: Retry | None = None
        error: BaseException | None = None
        try:
            core.enter(operation, call)
            expires = until or time.monotonic() + (operation.deadline or core.deadline)
            while True:
                try:
                    sent = time.monotonic()
                    return operation.decode(self._link.call(operation.commands(), expires))
                except (Trouble, StorageError) as problem:
                    raise_interruption(problem)
                    if isinstance(problem, WrongServer):
                        self._link.drop(sent)
                    retry = retry or Retry(expires)
                    delay = retry.after(problem, time.monotonic(), operation)
                if delay:
                    time.sleep(delay)
        except BaseException as exc:
            error = exc
            raise
        finally:
            if call is None:
                core.active.pop(operation, None)
            core.leave(operation, error, time.monotonic())
            error = None  # else it, this frame and those of its callers are a cycle

    def _run(self, plan: Plan[T], until: float | None = None) -> T:
        """Perform a plan's operations, one after the other; `close` waits for the last."""
        core = self._core
        try:
            core.admit(plan)
            return self._follow(plan, until or time.monotonic() + core.deadline, plan)
        finally:
            core.active.pop(plan, None)

    def _follow(self, plan: Plan[T], until: float | None = None, call: object = None) -> T:
        """Perform a plan's operations, one after the other, until the store is closed.

        With `until` they have one deadline, which begins anew when the plan has paused.
        """
        with contextlib.closing(plan):
            try:
                step = next(plan)
                while True:
                    pauses = isinstance(step, Pause)
                    step = self._step(plan, step, until, call)
                    if pauses and until is not None:
                        until = time.monotonic() + self._core.deadline
            except StopIteration as stop:
                raise_interruption(stop)
                return cast(T, stop.value)

    def _step(self, plan: Plan[Any], step: Any, until: float | None = None, call: object = None) -> Any:
        """Do what a plan asks for and return what it asks for next."""
        if isinstance(step, Pause):
            (step.wake or threading.Event()).wait(None if step.seconds == math.inf else step.seconds)
            return plan.send(None)
        try:
            result = self._perform(step, until, call)
        except StorageError as error:
            raise_interruption(error)
            return plan.throw(error)
        return plan.send(result)

    def _listen(self, channel: str, listener: Listener) -> Callable[[], None]:
        """Have `listener` called, in another thread, with a channel's messages; return how to end that."""
        self._core.check_process()  # first: in the child of a fork, the lock may be held for ever
        with self._listening:
            self._core.check_open()
            if self._listeners is None:
                self._listeners = Background(), Subscription(self._link.feed, self._core.options.heartbeat)
            background, subscription = self._listeners
        background.call(subscription.listen, channel, listener)
        return partial(background.call, subscription.leave, channel, listener)

    def _run_many(self, plans: Sequence[Plan[T]]) -> builtins.list[T | StorageError]:
        """Run plans in step with each other, so many at a time; a dead server is waited for once."""
        core = self._core
        results: builtins.list[Any] = [None] * len(plans)
        dead = False
        for start in range(0, len(plans), IN_FLIGHT):
            batch = range(start, min(start + IN_FLIGHT, len(plans)))
            began, call = time.monotonic(), object()
            try:
                try:
                    if dead:
                        raise UnavailableError(NOT_SENT)
                    core.admit(call)
                except UnavailableError as error:  # it may have been closed meanwhile
                    for n in batch:
                        results[n] = UnavailableError(str(error))
                else:
                    self._run_batch(plans, batch, results, call)
            finally:
                core.active.pop(call, None)
            dead |= core.answered < began and any(isinstance(results[n], NO_OUTCOME) for n in batch)
        return results

    def _run_batch(
        self, plans: Sequence[Plan[Any]], batch: Iterable[int], results: builtins.list[Any], call: object
    ) -> None:
        """Run plans of a call; the operations that they have come to go out in one write, repetitions too."""
        core = self._core
        sent: dict[int, Operation[Any]] = {}
        steps: dict[int, Operation[Any]] = {}
        for n in batch:
            self._advance(n, partial(next, plans[n]), steps, results)
        until = time.monotonic() + core.deadline
        retries: dict[Operation[Any], Retry] = {}
        try:
            while steps:
                sent, steps, delay = steps, {}, 0.0
                core.active[call] = sum(operation.writes for operation in sent.values()), threading.get_ident()
                began = time.monotonic()
                for n, replies in self._send_together(sent, until).items():
                    operation = sent[n]
                    try:
                        if isinstance(replies, Exception):
                            raise replies
                        move = partial(plans[n].send, operation.decode(replies))
                        core.leave(operation, None, time.monotonic())
                    except (Trouble, StorageError) as problem:
                        raise_interruption(problem)
                        if isinstance(problem, WrongServer):
                            self._link.drop(began)
                        try:
                            retry = retries.setdefault(operation, Retry(until))
                            delay = max(delay, retry.after(problem, time.monotonic(), operation))
                            steps[n] = operation
                            continue
                        except StorageError as error:
                            raise_interruption(error)
                            core.leave(operation, error, time.monotonic())
                            move = partial(plans[n].throw, error)
                    self._advance(n, move, steps, results)
                if delay:
                    time.sleep(delay)
        finally:
            for operation in (*sent.values(), *steps.values()):  # those, too, that an exception has left over
                operation.end()

    @staticmethod
    def _advance(
        n: int, move: Callable[[], Any], steps: dict[int, Operation[Any]], results: builtins.list[Any]
    ) -> None:
        try:
            steps[n] = move()
        except StopIteration as stop:
            raise_interruption(stop)
            results[n] = stop.value
        except StorageError as error:
            raise_interruption(error)
            results[n] = error

    def _send_together(
        self, operations: dict[int, Operation[Any]], expires: float
    ) -> dict[int, Sequence[Reply] | Trouble | StorageError]:
        """Send operations in one write; return what came of each."""
        answers: dict[int, Sequence[Reply] | Trouble | StorageError] = {}
        sent: dict[int, Sequence[Command]] = {}
        for n, operation in operations.items():
            try:
                self._core.check_right(operation)
                sent[n] = operation.commands()
            except StorageError as error:
                raise_interruption(error)
                answers[n] = error
        flat = [command for commands in sent.values() for command in commands]
        if flat:
            frames: builtins.list[Command] = []
            widths: builtins.list[int] = []
            at = 0
            while at < len(flat):
                run = joinable_run(itertools.islice(flat, at, None))
                frames.append(joined(run) if len(run) > 1 else flat[at])
                widths.append(len(run) or 1)
                at += widths[-1]
            try:
                answered = self._link.call(frames, expires)
            except (Trouble, StorageError) as problem:
                raise_interruption(problem)
                return answers | dict.fromkeys(sent, problem)
            replies = [
                reply
                for frame, width in zip(answered, widths, strict=True)
                for reply in (divided(frame, width) if width > 1 else [frame])
            ]
            at = 0
            for n, commands in sent.items():
                answers[n] = replies[at : at + len(commands)]
                at += len(commands)
        return answers


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


@contextlib.contextmanager
def open_store(
    url: str | None = None, *, client: redis.Redis | None = None, **options: Any
) -> Iterator[RedisSessionStore[Any]]:
    """Open a store for a `with` block: see `orcs_redis.open_store`; `client` is a blocking redis-py client."""
    chosen, target = choose("open_store", url, client, options)
    if isinstance(target, FileFolder):
        with LocalFileStore(target.path, asset_type=chosen.asset_type) as files:
            yield cast(RedisSessionStore[Any], files)
        return
    with RedisSessionStore._open(chosen, target, client) as store:
        yield store
