"""How to wait, blocking: a connection for each thread that is waiting, kept for the next."""

from __future__ import annotations

import math
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakSet

import hiredis

from ..errors import UnavailableError
from ..interrupts import raise_interruption, suppress
from ..protocol.attempts import AttemptError, AttemptTimeout, ConnectionLost
from ..protocol.commands import Command, Reply, pack
from .address import Address
from .base import OnMessage, Prepare, PubSub, attempt_timeout, nothing
from .network import open_socket, reason_of, unreachable
from .pubsub import open_pubsub
from .role import ASK_ROLE, Checked, Role

__all__ = ["PooledLink", "SocketLink"]

IDLE = 60.0
"""After how many seconds without use a connection is closed, at the next call."""

_LOOK = 0.1  # seconds after which one that waits looks by itself
_MORE = object()
_CHUNK = 65536
_BROKEN = (OSError, hiredis.ProtocolError, TypeError)  # the last: a map with a key that can't be one


class Pooled(Checked, Protocol):
    """A connection that a thread takes, uses and gives back. It can be opened again after it was closed."""

    opened: float  # when, of time.monotonic
    used: float  # when it was given back

    def open(self, expires: float) -> Reply:
        """Connect, and return the server's answer to HELLO. Raises what `BlockingLink.call` raises."""
        ...

    def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        """Return the commands' replies; raises ConnectionLost."""
        ...

    def is_usable(self) -> bool:
        """Whether the server has neither closed it nor said what nobody asked for."""
        ...

    def close(self) -> None:
        """Close it, if it is open."""
        ...


C = TypeVar("C", bound=Pooled)


class _Turn:
    """A thread that waits for a connection. A lock alone: unlike a condition, a signal's exception leaves it sound."""

    __slots__ = ("looked", "wake")

    def __init__(self) -> None:
        self.looked = 0.0  # when it last looked
        self.wake = threading.Lock()
        self.wake.acquire()


class PooledLink(Generic[C]):
    """Connections to one server, opened when needed; as many as threads wait at the same time, up to a number.

    A thread that finds none free waits for one behind those that came before.
    """

    def __init__(self, make: Callable[[], C], most: int, on_connect: Callable[[], object]) -> None:
        self._make = make
        self._most = most
        self._on_connect = on_connect
        self._role = Role()
        self._lock = threading.RLock()  # a signal handler may use the link that it has interrupted
        self._waiting: deque[_Turn] = deque()  # the first to come first
        self._idle: deque[C] = deque()  # the last used at the end
        # All there are. What an interrupted thread has lost is not counted any more.
        self._connections: WeakSet[C] = WeakSet()
        self._closed = False

    def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        """Return the commands' replies: see `BlockingLink`."""
        connection = self._take(expires)
        try:
            self._make_ready(connection, expires)
            replies = connection.call(commands, expires)
        except BaseException:
            # Whatever interrupted it, a reply may still come, and would be taken for the next call's.
            self._discard(connection)
            self._drain()
            self._give(None)
            raise
        self._give(connection)
        return replies

    def drop(self, before: float) -> None:
        """Use no connection any more that was opened before then: see `BlockingLink`."""
        self._role.drop(before)

    def close(self) -> None:
        """Close the connections; one that is in use is closed when its call ends."""
        self._closed = True
        self._drain()

    def _take(self, expires: float) -> C:
        with self._lock:
            if not self._waiting and self._is_free():
                return self._next()
            turn = _Turn()
        try:
            while (left := expires - time.monotonic()) > 0:
                with self._lock:
                    if self._is_first(turn) and self._is_free():
                        return self._next()
                turn.wake.acquire(timeout=min(left, _LOOK))
        finally:
            with self._lock:
                with suppress(ValueError):
                    self._waiting.remove(turn)
                self._wake()
        raise ConnectionLost(f"all {self._most} connections were in use", sent=False)

    def _is_first(self, turn: _Turn) -> bool:
        """Whether a thread is the first of those that wait; one that has not looked for long was interrupted."""
        now = turn.looked = time.monotonic()
        if turn not in self._waiting:
            self._waiting.append(turn)
        while self._waiting[0].looked < now - 10 * _LOOK:
            self._waiting.popleft()
        return self._waiting[0] is turn

    def _is_free(self) -> bool:
        return bool(self._idle) or self._closed or len(self._connections) < self._most

    def _next(self) -> C:
        if self._closed:
            raise UnavailableError("the store is closed")
        if self._idle:
            return self._idle.pop()
        connection = self._make()
        self._connections.add(connection)
        return connection

    def _wake(self) -> None:
        """Let the first that waits look whether there is something for it."""
        if self._waiting and self._is_free():
            with suppress(RuntimeError):  # it is awake
                self._waiting[0].wake.release()

    def _make_ready(self, connection: C, expires: float) -> None:
        """Open a connection, unless it is open and leads to the right server."""
        if not self._role.is_dropped(connection.opened) and connection.is_usable():
            now = time.monotonic()
            if not self._role.is_due(connection, now):
                return
            with self._role.asking(connection, now):
                self._role.check(connection.call(ASK_ROLE, expires)[0])
                return
        connection.close()
        hello = connection.open(expires)
        connection.opened = connection.checked = time.monotonic()
        self._role.check(hello)
        self._on_connect()

    def _give(self, connection: C | None) -> None:
        """Take a connection back, or None: it was closed."""
        now = time.monotonic()
        with self._lock:
            if connection is not None:
                connection.used = now
                self._idle.append(connection)
            while self._idle and self._idle[0].used < now - IDLE:
                self._discard(self._idle.popleft())
            self._wake()
        if self._closed:
            self._drain()

    def _drain(self) -> None:
        with suppress(IndexError):
            while True:
                self._discard(self._idle.pop())

    def _discard(self, connection: C) -> None:
        connection.close()
        self._connections.discard(connection)


class _Connection:
    opened = checked = used = -math.inf

    def __init__(self, address: Address, timeout: float, prepare: Prepare | None) -> None:
        self._address = address
        self._attempt_timeout = timeout
        self._prepare = prepare
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._socket: Any = None  # a socket, while it is open

    def open(self, expires: float) -> Reply:
        address, expires = self._address, min(expires, time.monotonic() + self._attempt_timeout)
        try:
            if self._prepare is not None:
                self._prepare(max(0.001, expires - time.monotonic()))
            self._reader = hiredis.Reader(notEnoughData=_MORE)
            self._socket = open_socket(address, expires)
            self._socket.settimeout(max(0.001, expires - time.monotonic()))
            if address.tls is not None:
                self._socket = address.tls.wrap_socket(self._socket, server_hostname=address.host)
            replies = self.call(address.handshake(), expires)
            address.check(replies)
        except (OSError, AttemptError, UnavailableError) as exc:
            raise_interruption(exc)
            raise unreachable(address, exc) from exc
        return replies[0]

    def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        request = pack(commands)
        data = memoryview(request)
        replies: list[Reply] = []
        wire, reader, received = self._socket, self._reader, b""
        try:
            self._limit(expires)
            while data := data[wire.send(data) :]:
                self._limit(expires)
            while len(replies) < len(commands):
                reply = reader.gets()
                if reply is _MORE:
                    if received:  # else the limit is as good as new
                        self._limit(expires)
                    received = wire.recv(_CHUNK)
                    if not received:
                        raise ConnectionError("closed by the server")
                    reader.feed(received)
                elif type(reply) is not hiredis.PushNotification:
                    replies.append(reply)
        except TimeoutError as exc:
            raise_interruption(exc)
            raise AttemptTimeout("no answer in time", sent=len(data) < len(request)) from exc
        except _BROKEN as exc:
            raise_interruption(exc)
            text = f"the connection broke: {reason_of(exc)}"
            raise ConnectionLost(text, sent=len(data) < len(request), size=len(request)) from exc
        return replies

    def is_usable(self) -> bool:
        if self._socket is None or self._reader.has_data():
            return False
        try:  # not poll: eventlet takes it away
            self._socket.settimeout(0)
            self._socket.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError as exc:
            raise_interruption(exc)
        return False

    def close(self) -> None:
        if self._socket is not None:
            with suppress(OSError):
                self._socket.close()
            self._socket = None

    def _limit(self, expires: float) -> None:
        self._socket.settimeout(min(self._attempt_timeout, max(0.001, expires - time.monotonic())))


class SocketLink(PooledLink[_Connection]):
    """Connections to the server of an address."""

    def __init__(
        self,
        address: Address,
        deadline: float,
        prepare: Prepare | None = None,
        max_connections: int = 64,
        on_connect: Callable[[], object] = nothing,
    ) -> None:
        """`on_connect` is called when a connection was opened, before a call is sent over it."""
        timeout = attempt_timeout(deadline)
        super().__init__(lambda: _Connection(address, timeout, prepare), max_connections, on_connect)
        self._address = address
        self._prepare = prepare

    async def open_pubsub(self, on_message: OnMessage, heartbeat: float) -> PubSub:
        """Open a connection for what is published: see `PubSub`."""
        return await open_pubsub(self._address, heartbeat, self._prepare, on_message, self._role, self.drop)
