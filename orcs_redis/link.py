"""How to wait, in asyncio: one connection that all tasks of a loop share.

What the tasks ask for in one turn of the loop goes out in one write, and the replies come back in order. A caller that
is cancelled leaves its place in the queue, and its reply is dropped when it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import hiredis

from .address import Address
from .errors import StorageError
from .resp import Command, Lost, Reply, Trouble, pack

__all__ = ["AsyncLink", "Link", "attempt_patience"]

_MORE = object()


def attempt_patience(deadline: float) -> float:
    """Return after how many silent seconds a connection is given up, to leave time for another within the deadline."""
    return 0.4 * deadline


class AsyncLink(Protocol):
    """What the asyncio store needs of a way to a server."""

    async def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        """Return the commands' replies, errors among them as values.

        Raises:
            Lost: no answer before `expires`, in seconds of the loop's clock, or the connection broke.
            StorageError: no connection can be had, for a reason that waiting does not mend.

        """
        ...

    async def close(self) -> None:
        """Close what this link has opened."""
        ...


class _Call:
    __slots__ = ("count", "expires", "future", "replies")

    def __init__(self, future: asyncio.Future[list[Reply]], count: int, expires: float) -> None:
        self.future = future
        self.count = count
        self.expires = expires
        self.replies: list[Reply] = []

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _Connection(asyncio.Protocol):
    """One connection. `_waiting` have been handed to the transport, `_queued` not yet."""

    def __init__(self, loop: asyncio.AbstractEventLoop, patience: float) -> None:
        self._loop = loop
        self._patience = patience
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[_Call] = deque()
        self._queued: list[_Call] = []
        self._output: list[bytes] = []
        self._paused = False
        self._scheduled = False
        self._heard = 0.0  # when the other side last showed that it is there
        self._unsent = 0
        self._watch: asyncio.TimerHandle | None = None
        self.closed = self._loop.create_future()

    # What callers use

    def submit(self, commands: Sequence[Command], expires: float) -> asyncio.Future[list[Reply]]:
        future: asyncio.Future[list[Reply]] = self._loop.create_future()
        self._output.append(pack(commands))
        self._queued.append(_Call(future, len(commands), expires))
        if not self._scheduled:
            self._scheduled = True
            # Nothing in flight: a caller that is alone need not wait for the loop's next turn.
            if self._waiting:
                self._loop.call_soon(self._flush)
            else:
                self._flush()
        return future

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        waiting, gets = self._waiting, self._reader.gets
        self._reader.feed(data)
        try:
            while (reply := gets()) is not _MORE:
                if type(reply) is hiredis.PushNotification:
                    continue
                call = waiting[0]
                call.replies.append(reply)
                if len(call.replies) == call.count:
                    waiting.popleft()
                    if not call.future.done():
                        call.future.set_result(call.replies)
        except (hiredis.ProtocolError, IndexError):
            self.abort()  # what comes after can't be told apart

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        reason = f"the connection broke ({type(exc).__name__})" if exc else "the connection was closed"
        for call in self._waiting:
            call.fail(Lost(reason, sent=True))
        for call in self._queued:
            call.fail(Lost(reason, sent=False))
        self._waiting.clear()
        self._queued.clear()
        self._output.clear()
        if self._watch is not None:
            self._watch.cancel()
        if not self.closed.done():
            self.closed.set_result(None)

    # What keeps it going

    def _flush(self) -> None:
        self._scheduled = self._paused
        if self._paused or not self._queued or self._transport is None:
            return
        if not self._waiting:
            self._heard = self._loop.time()
        self._waiting.extend(self._queued)
        self._queued.clear()
        data = self._output[0] if len(self._output) == 1 else b"".join(self._output)
        self._output.clear()
        self._transport.write(data)
        if self._watch is None:
            self._watch = self._loop.call_later(self._patience / 10, self._look)

    def _look(self) -> None:
        """End the calls whose time is over, and the connection if it has been silent for too long."""
        self._watch = None
        if not self._waiting and not self._queued:
            return
        now = self._loop.time()
        unsent = self._transport.get_write_buffer_size() if self._transport is not None else 0
        if unsent < self._unsent:
            self._heard = now
        self._unsent = unsent
        for call in self._waiting:
            if call.expires <= now:
                call.fail(Lost("no answer in time", sent=True))
        for call in self._queued:
            if call.expires <= now:
                call.fail(Lost("no answer in time", sent=True))  # it stays queued and will be sent
        if now - self._heard > self._patience:
            self.abort()
            return
        self._watch = self._loop.call_later(self._patience / 10, self._look)


class Link:
    """A connection to one server that is opened when needed and again when it broke."""

    def __init__(self, address: Address, deadline: float, prepare: Callable[[], None] | None = None) -> None:
        """`prepare` is called in a thread before each connecting (an embedded server is started by it)."""
        self._address = address
        self._deadline = deadline
        self._prepare = prepare
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[_Connection] | None = None

    async def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        """Return the commands' replies: see `AsyncLink`."""
        connection = self._connection
        if connection is None or connection.closed.done():
            connection = await self._connected(expires)
        return await connection.submit(commands, expires)

    async def close(self) -> None:
        """Close the connection."""
        if self._connecting is not None:
            self._connecting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Trouble, StorageError):
                await self._connecting
        if self._connection is not None:
            self._connection.abort()
            await self._connection.closed

    async def _connected(self, expires: float) -> _Connection:
        """Connect, once for all who wait for it."""
        loop = asyncio.get_running_loop()
        if self._connecting is None or self._connecting.done():
            self._connecting = loop.create_task(self._connect())
            # Its failure is told to those who wait; there may be none left.
            self._connecting.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            async with asyncio.timeout_at(expires):
                self._connection = await asyncio.shield(self._connecting)
        except TimeoutError:
            raise Lost(f"no connection to {self._address} in time", sent=False) from None
        return self._connection

    async def _connect(self) -> _Connection:
        address = self._address
        loop = asyncio.get_running_loop()
        patience = attempt_patience(self._deadline)
        connection = _Connection(loop, patience)
        try:
            if self._prepare is not None:
                await asyncio.to_thread(self._prepare)
            async with asyncio.timeout(patience):
                if address.path is not None:
                    await loop.create_unix_connection(lambda: connection, address.path)
                else:
                    await loop.create_connection(
                        lambda: connection, address.host, address.port, ssl=address.tls
                    )
                replies = await connection.submit(address.introduction(), loop.time() + patience)
            address.check(replies)
        except (OSError, TimeoutError, Trouble) as exc:
            connection.abort()
            reason = str(exc) if isinstance(exc, Trouble) else type(exc).__name__
            raise Lost(f"no connection to {address}: {reason}", sent=False) from exc
        except BaseException:
            connection.abort()
            raise
        return connection
