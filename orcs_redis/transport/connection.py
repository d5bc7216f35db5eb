"""A way to a server in asyncio: one connection, opened when needed and again when it broke."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence

from ..errors import StorageError, UnavailableError
from ..interrupts import interruption
from ..protocol.attempts import AttemptError, AttemptTimeout, copy_of_error
from ..protocol.commands import Command, Reply
from .address import Address
from .base import OnMessage, Prepare, PubSub, attempt_timeout, nothing
from .multiplexed import Connection, connect
from .pubsub import open_pubsub
from .role import ASK_ROLE, Role

__all__ = ["Link"]


class Link:
    """A connection to one server that is opened when needed and again when it broke."""

    def __init__(
        self,
        address: Address,
        deadline: float,
        prepare: Prepare | None = None,
        on_connect: Callable[[], object] = nothing,
    ) -> None:
        """`on_connect` is called when a connection was opened, before a call is sent over it."""
        self._address = address
        self._attempt_timeout = attempt_timeout(deadline)
        self._prepare = prepare
        self._on_connect = on_connect
        self._role = Role()
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[Connection] | None = None
        self._closed = False
        self._pid = os.getpid()

    async def open_pubsub(self, on_message: OnMessage, heartbeat: float) -> PubSub:
        """Open a connection for what is published: see `PubSub`."""
        return await open_pubsub(self._address, heartbeat, self._prepare, on_message, self._role, self.drop)

    def call(self, commands: Sequence[Command], expires: float) -> Awaitable[list[Reply]]:
        """Return the commands' replies: see `AsyncLink`."""
        connection = self._connection
        if connection is None or self._role.is_due(connection, time.monotonic()):
            return self._connect_and_call(commands, expires)
        return connection.submit(commands, expires)

    def drop(self, before: float) -> None:
        """Use no connection any more that was opened before then: see `AsyncLink`."""
        if self._connection is not None and self._connection.opened < before:
            self._connection.abort()
            self._connection = None

    async def close(self) -> None:
        """Close the connection. A forked child leaves it alone: socket and selector are its parent's too."""
        self._closed = True
        if os.getpid() != self._pid:
            return
        if self._connection is not None:
            self._connection.abort()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        if self._connection is not None:
            await asyncio.wait([self._connection.closed], timeout=self._attempt_timeout)

    async def _connect_and_call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        connection = await self._connected(expires)
        return await connection.submit(commands, expires)

    async def _connected(self, expires: float) -> Connection:
        """Connect, or ask for the server's role again, once for all who wait for it."""
        if self._closed:
            raise UnavailableError("the store is closed")
        loop = asyncio.get_running_loop()
        if self._connecting is None or self._connecting.done():
            self._connecting = loop.create_task(self._connect())
            # Those who wait raise its failure; there may be none left.
            self._connecting.add_done_callback(lambda task: task.cancelled() or task.exception())
        connecting = self._connecting
        await asyncio.wait([connecting], timeout=expires - loop.time())
        if connecting.cancelled():
            raise UnavailableError("the store is closed")
        if not connecting.done():
            raise AttemptTimeout(f"no connection to {self._address} in time", sent=False)
        error = connecting.exception()
        if isinstance(error, (AttemptError, StorageError)) and interruption(error) is None:
            raise copy_of_error(error)
        return connecting.result()

    async def _connect(self) -> Connection:
        # Kept by the task itself: those who wait for it may all have gone.
        connection = self._connection
        if connection is not None:
            with self._role.asking(connection, time.monotonic()):
                # Whatever is before it, nobody waits any longer.
                expires = asyncio.get_running_loop().time() + 4 * self._attempt_timeout
                (hello,) = await connection.submit(ASK_ROLE, expires)
                self._role.check(hello)
                return connection
            connection.abort()
            self._connection = None
        self._connection = connection = await connect(self._address, self._attempt_timeout, self._prepare, self._role)
        self._on_connect()
        return connection
