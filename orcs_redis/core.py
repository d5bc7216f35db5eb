"""What both colours of the Redis store share: its options, its state, and how it opens. Nothing here waits."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Generic, TypeAlias, TypedDict, TypeVar

from .address import Address, Credentials, EmbeddedFolder, FileFolder, MemoryName, parse_url
from .asset import SessionAsset
from .codec import Codec
from .errors import OutcomeUnknownError, PermissionDeniedError, StorageError, UnavailableError
from .keys import MAX_PARTITIONS, check_namespace
from .lease import Leases
from .meta import SyncMode, SyncStatus
from .operations import Operation
from .plans import Operations, Plan, open_namespace
from .watch import Changes

__all__ = ["IN_FLIGHT", "NOT_SENT", "NO_OUTCOME", "Core", "OptionArguments", "Options", "Target", "choose", "resolve"]

A = TypeVar("A", bound=SessionAsset)

_DENIAL_TIME = 1.0  # seconds

IN_FLIGHT = 256
"""How many calls a store has under way at a time, where its callers would have more."""

NO_OUTCOME = (UnavailableError, OutcomeUnknownError)
"""What a call ends in if no server has done what it was asked for."""

NOT_SENT = "not sent: the server has done nothing for a deadline"
"""What is said of calls that wait for others when nothing comes of those."""


@dataclass(frozen=True, kw_only=True)
class Options(Generic[A]):
    """The options of a Redis store, checked."""

    asset_type: type[A]
    namespace: str = "orcs"
    partitions: int | None = None
    deadline: float = 5.0
    heartbeat: float = 5.0
    max_asset_bytes: int = 128 * 1024 * 1024
    max_turn_bytes: int = 16 * 1024 * 1024
    max_fields: int = 1000
    max_connections: int = 64
    credentials: Credentials | None = None

    def __post_init__(self) -> None:
        check_namespace(self.namespace)
        if not (isinstance(self.asset_type, type) and issubclass(self.asset_type, SessionAsset)):
            raise ValueError("asset_type is SessionAsset or a subclass of it")
        if self.partitions is not None and (
            type(self.partitions) is not int or not 1 <= self.partitions <= MAX_PARTITIONS
        ):
            raise ValueError(f"partitions is 1 to {MAX_PARTITIONS}")
        if type(self.max_connections) is not int or self.max_connections < 1:
            raise ValueError("max_connections is 1 or more")
        for name in ("deadline", "heartbeat", "max_asset_bytes", "max_turn_bytes", "max_fields"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < 2**31:
                raise ValueError(f"{name} is a number more than 0, below 2**31")
        if max(self.max_asset_bytes, self.max_turn_bytes) > 400 * 1024 * 1024:
            raise ValueError("a value in Redis has 512 MB at most: the limits end at 400 MiB")
        if self.max_fields > 3500:
            raise ValueError("max_fields is 3500 at most: a script in Redis can't pass on more at once")
        if self.credentials is not None and not callable(self.credentials):
            raise TypeError("credentials is a callable that returns a user name and a password")


class OptionArguments(TypedDict, total=False):
    """The options as `open_store` and `connect` take them; asset_type is apart, since it types the store."""

    namespace: str
    partitions: int | None
    deadline: float
    heartbeat: float
    max_asset_bytes: int
    max_turn_bytes: int
    max_fields: int
    max_connections: int
    credentials: Credentials | None


Target: TypeAlias = Address | EmbeddedFolder | MemoryName | FileFolder

# The options that stand for nothing there.
_UNKNOWN: dict[object, frozenset[str]] = {
    None: frozenset({"credentials"}),  # a client of the caller's
    MemoryName: frozenset({"credentials"}),
    EmbeddedFolder: frozenset({"credentials"}),
    FileFolder: frozenset(OptionArguments.__optional_keys__),
}


def choose(
    function: str, url: str | None, client: object, arguments: Mapping[str, Any]
) -> tuple[Options[Any], Target | None]:
    """Check the arguments of a public function that opens a store.

    Returns:
        The options, and what the URL means; None: a client was given.

    Raises:
        TypeError: an option that this kind of store doesn't have.
        ValueError: a URL or value that can't be.

    """
    target: Target | None = None
    if client is None:
        target = resolve(url)
    elif url is not None:
        raise ValueError("a store takes a URL or a client, not both")
    for name in arguments:
        if name != "asset_type" and name not in OptionArguments.__optional_keys__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        if name in _UNKNOWN.get(target and type(target), ()):
            raise TypeError(f"{function}(): this kind of store has no option {name!r}")
    options: Options[Any] = Options(**{"asset_type": SessionAsset, **arguments})
    if isinstance(target, Address) and options.credentials is not None:
        if target.username is not None:
            raise ValueError("a store takes user name and password from its URL or from credentials, not from both")
        target = replace(target, credentials=options.credentials)
    return options, target


class Core(Generic[A]):
    """A store's state.

    There is no lock: a signal handler or a finalizer may use the store wherever its thread was interrupted. What is
    under way is a dict, whose single steps can't be interrupted, and not a counter, which an exception out of a signal
    handler could leave wrong.
    """

    def __init__(self, options: Options[A]) -> None:
        self.options = options
        self.deadline = options.deadline
        self.closed = False
        self.active: dict[object, tuple[int, int]] = {}  # calls under way: how many writes they wait for; their thread
        self.answered = -math.inf  # when an operation last had an outcome, in seconds of time.monotonic()
        self._pid = os.getpid()
        self._last_success: float | None = None  # seconds since 1970
        self._failing = False
        self._denied: str | None = None  # why writing was refused when the server was last asked,
        self._denied_until = 0.0  # which is not done again until then
        self._operations: Operations[A] | None = None
        self._leases: Leases | None = None
        self._changes: Changes | None = None

    @property
    def operations(self) -> Operations[A]:
        """What the store can do, once it is open."""
        if self._operations is None:
            raise UnavailableError("the store is not connected")
        return self._operations

    @property
    def leases(self) -> Leases:
        """What there is to ask about leases, once it is open."""
        if self._leases is None:
            raise UnavailableError("the store is not connected")
        return self._leases

    @property
    def changes(self) -> Changes:
        """What there is to ask about changes, once it is open."""
        if self._changes is None:
            raise UnavailableError("the store is not connected")
        return self._changes

    def connected(self) -> None:
        """Note that a connection was opened: a process that was cloned since must not go on as its twin does."""
        if self._operations is not None:
            self._operations.renew()

    def open(self) -> Plan[None]:
        """Read or create the namespace, and find out whether writing is allowed."""
        options = self.options
        namespace = yield from open_namespace(options.namespace, options.partitions)
        codec = Codec(options.asset_type, options.max_asset_bytes, options.max_turn_bytes, options.max_fields)
        operations = Operations(namespace, codec)
        denied = yield operations.probe()
        if denied is not None:
            self._deny(denied)
        self._operations = operations
        self._leases = Leases(namespace)
        self._changes = Changes(namespace, options.heartbeat)

    def admit(self, call: object) -> None:
        """Let a call of several operations in, which goes on though the store is closing, until it is out of `active`.

        Raises what `check_open` raises.
        """
        self.check_open()
        self.active[call] = 0, threading.get_ident()

    def is_busy(self) -> bool:
        """Whether another thread has something under way."""
        me = threading.get_ident()
        return any(thread != me for _, thread in tuple(self.active.values()))

    @property
    def is_forked(self) -> bool:
        """Whether this process is a fork of the one that opened the store."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Raise RuntimeError in a fork of the process that opened the store."""
        if self.is_forked:
            raise RuntimeError("this store was opened before a fork: open one in the child")

    def check_open(self) -> None:
        """Raise RuntimeError in a fork of the process that opened the store, UnavailableError if it is closed."""
        self.check_process()
        if self.closed:
            raise UnavailableError("the store is closed")

    def enter(self, operation: Operation[Any], call: object = None) -> None:
        """Note that an operation begins, by itself or in a call that was admitted.

        Raises:
            RuntimeError: this process is a fork of the one that opened the store.
            UnavailableError: the store is closed.
            PermissionDeniedError: a write, and writing is not allowed.

        """
        if call is None:
            self.check_open()
        self.check_right(operation)
        self.active[call or operation] = operation.writes, threading.get_ident()

    def check_right(self, operation: Operation[Any]) -> None:
        """Raise PermissionDeniedError for a write, if writing was denied just now."""
        if operation.writes and self._denied is not None and time.monotonic() < self._denied_until:
            raise PermissionDeniedError(self._denied)

    def _deny(self, error: StorageError) -> None:
        self._denied, self._denied_until = str(error), time.monotonic() + _DENIAL_TIME

    def leave(self, operation: Operation[Any], error: BaseException | None, now: float) -> None:
        """Note how it ended, at `now` in seconds of time.monotonic(); by itself, it is out of `active` already."""
        operation.end()
        if self._denied is not None and operation.writes:
            if error is None:
                self._denied = None
            elif isinstance(error, PermissionDeniedError) and now >= self._denied_until:
                self._deny(error)
        if error is None:
            self._failing = False
            self.answered, self._last_success = now, time.time()
        elif isinstance(error, NO_OUTCOME):
            self._failing = True
        elif isinstance(error, StorageError):
            self.answered = now

    def sync_status(self) -> SyncStatus:
        """How the store stands with its server, without asking it."""
        if self.closed or self._operations is None:
            return SyncStatus.offline()
        last = self._last_success
        return SyncStatus(
            mode=SyncMode.ERROR if self._failing else SyncMode.ONLINE,
            last_sync=None if last is None else datetime.fromtimestamp(last, UTC),
            pending_uploads=sum(writes for writes, _ in tuple(self.active.values())),
        )


def resolve(url: str | None) -> Target:
    """Read a URL; without one, that of $ORCS_REDIS_URL, else an embedded server in the default folder."""
    return parse_url(url if url is not None else os.environ.get("ORCS_REDIS_URL") or "embedded:")
