"""How to wait, blocking: a connection for each thread that is waiting, kept for the next."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import hiredis

from .address import Address
from .link import Deliver, Feed, attempt_patience, dial
from .resp import Command, Lost, Reply, Trouble, pack

__all__ = ["BlockingLink", "SocketLink"]

_MORE = object()
_CHUNK = 65536
_BROKEN = (OSError, hiredis.ProtocolError, TypeError)  # the last: a map with a key that can't be one


class BlockingLink(Protocol):
    """What the blocking store needs of a way to a server."""

    def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        """Return the commands' replies, errors among them as values.

        Raises:
            Lost: no answer before `expires`, in seconds of `time.monotonic`, or the connection broke.
            StorageError: no connection can be had, for a reason that waiting does not mend.

        """
        ...

    async def feed(self, deliver: Deliver, heartbeat: float) -> Feed:
        """Open a connection for what is published, in the event loop of a thread for that."""
        ...

    def close(self) -> None:
        """Close what this link has opened, without its feeds."""
        ...


class _Connection:
    def __init__(self, address: Address, expires: float) -> None:
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        timeout = max(0.001, expires - time.monotonic())
        if address.path is not None:
            self._socket = socket.socket(socket.AF_UNIX)
        else:
            self._socket = socket.create_connection((address.host, address.port), timeout)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._socket.settimeout(timeout)
            if address.path is not None:
                self._socket.connect(address.path)
            if address.tls is not None:
                self._socket = address.tls.wrap_socket(self._socket, server_hostname=address.host)
            self._poll = select.poll()
            self._poll.register(self._socket, select.POLLIN)
            address.check(self.call(address.introduction(), expires, timeout))
        except BaseException:
            self.close()
            raise

    def call(self, commands: Sequence[Command], expires: float, patience: float) -> list[Reply]:
        data = memoryview(pack(commands))
        replies: list[Reply] = []
        try:
            while data:
                self._socket.settimeout(min(patience, max(0.001, expires - time.monotonic())))
                data = data[self._socket.send(data) :]
            while len(replies) < len(commands):
                reply = self._reader.gets()
                if reply is _MORE:
                    self._socket.settimeout(min(patience, max(0.001, expires - time.monotonic())))
                    received = self._socket.recv(_CHUNK)
                    if not received:
                        raise Lost("the connection was closed", sent=True)
                    self._reader.feed(received)
                elif type(reply) is not hiredis.PushNotification:
                    replies.append(reply)
        except _BROKEN as exc:
            raise Lost(f"the connection broke ({type(exc).__name__})", sent=True) from exc
        return replies

    def is_usable(self) -> bool:
        """Whether the server has neither closed it nor said what nobody asked for."""
        return not self._reader.has_data() and not self._poll.poll(0)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()


class SocketLink:
    """Connections to one server, opened when needed; as many as threads wait at the same time."""

    def __init__(self, address: Address, deadline: float, prepare: Callable[[], None] | None = None) -> None:
        """`prepare` is called before each connecting (an embedded server is started by it)."""
        self._address = address
        self._patience = attempt_patience(deadline)
        self._prepare = prepare
        self._idle: deque[_Connection] = deque()
        self._closed = False

    def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        """Return the commands' replies: see `BlockingLink`."""
        connection = self._kept() or self._connect(expires)
        try:
            replies = connection.call(commands, expires, self._patience)
        except BaseException:
            # Whatever interrupted it, a reply may still come, and would be taken for the next call's.
            connection.close()
            self._drain()
            raise
        self._idle.append(connection)
        if self._closed:
            self._drain()
        return replies

    async def feed(self, deliver: Deliver, heartbeat: float) -> Feed:
        """Open a connection for what is published: see `Feed`."""
        return await dial(self._address, heartbeat, self._prepare, deliver)

    def close(self) -> None:
        """Close the connections; one that is in use is closed when its call ends."""
        self._closed = True
        self._drain()

    def _kept(self) -> _Connection | None:
        with contextlib.suppress(IndexError):
            while True:
                connection = self._idle.pop()
                if connection.is_usable():
                    return connection
                connection.close()
        return None

    def _connect(self, expires: float) -> _Connection:
        try:
            if self._prepare is not None:
                self._prepare()
            return _Connection(self._address, min(expires, time.monotonic() + self._patience))
        except (OSError, Trouble) as exc:
            reason = str(exc) if isinstance(exc, Trouble) else type(exc).__name__
            raise Lost(f"no connection to {self._address}: {reason}", sent=False) from exc

    def _drain(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()
