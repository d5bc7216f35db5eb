"""How to wait, in asyncio: one connection that all tasks of a loop share.

What the tasks ask for in one turn of the loop goes out in one write, and the replies come back in order. Calls of the
writing script that follow one another go out as one call. A caller that is cancelled leaves its place in the queue, and
its reply is dropped when it comes.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeAlias, cast

import hiredis
import msgspec

from .address import Address
from .resp import JOINED, Command, Joinable, Lost, Reply, Trouble, check, divided, joinable_run, joined, pack

__all__ = ["AsyncLink", "Deliver", "Feed", "Link", "attempt_patience", "dial"]

Push: TypeAlias = Callable[[Reply], None]

_MORE = object()
_INPUT = 128 * 1024  # bytes read at once


def attempt_patience(deadline: float) -> float:
    """Return after how many silent seconds a connection is given up, to leave time for another within the deadline."""
    return 0.4 * deadline


class AsyncLink(Protocol):
    """What the asyncio store needs of a way to a server."""

    def call(self, commands: Sequence[Command], expires: float) -> Awaitable[list[Reply]]:
        """Return the commands' replies, errors among them as values.

        Raises:
            Lost: no answer before `expires`, in seconds of the loop's clock, or the connection broke.
            StorageError: no connection can be had, for a reason that waiting does not mend.

        """
        ...

    async def feed(self, deliver: Deliver, heartbeat: float) -> Feed:
        """Open a connection for what is published."""
        ...

    async def close(self) -> None:
        """Close what this link has opened, without its feeds."""
        ...


Deliver: TypeAlias = Callable[[str, bytes | None], None]


class Feed(Protocol):
    """A connection that messages come over. A confirmed subscription is delivered as None in place of a message."""

    def subscribe(self, channel: str) -> None:
        """Ask for a channel."""
        ...

    def unsubscribe(self, channel: str) -> None:
        """Ask for no more of a channel."""
        ...

    async def watch(self) -> None:
        """Raise Lost when the connection broke, or the server has not answered for a heartbeat."""
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class _Call(msgspec.Struct, eq=False):
    """What is asked for by one caller: a call that may be joined to others, or what goes over the wire."""

    future: asyncio.Future[list[Reply]]
    joinable: Joinable | None
    data: bytes
    count: int  # of replies
    expires: float
    replies: list[Reply]

    @property
    def members(self) -> Sequence[_Call]:
        return (self,)

    def finish(self) -> None:
        if not self.future.done():
            self.future.set_result(self.replies)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _Joined:
    """Calls that went out as one."""

    __slots__ = ("members", "replies")
    count = 1

    def __init__(self, members: Sequence[_Call]) -> None:
        self.members = members
        self.replies: list[Reply] = []

    def finish(self) -> None:
        for call, reply in zip(self.members, divided(self.replies[0], len(self.members)), strict=True):
            call.replies.append(reply)
            call.finish()


class _Connection(asyncio.BufferedProtocol):
    """One connection. `_waiting` have been handed to the transport, `_queued` not yet."""

    def __init__(self, loop: asyncio.AbstractEventLoop, patience: float, push: Push | None = None) -> None:
        self._loop = loop
        self._patience = patience
        self._push = push
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[_Call | _Joined] = deque()
        self._queued: list[_Call] = []
        self._output: list[bytes] = []
        self._paused = False
        self._scheduled = False
        self._heard = 0.0  # when the other side last showed that it is there
        self._unsent = 0
        self._input = bytearray(_INPUT)  # kept: fresh memory for each reading costs page faults
        self._view = memoryview(self._input)
        self._watch: asyncio.TimerHandle | None = None
        self.closed = self._loop.create_future()

    # What callers use

    def submit(self, commands: Sequence[Command], expires: float) -> asyncio.Future[list[Reply]]:
        future: asyncio.Future[list[Reply]] = self._loop.create_future()
        if self.closed.done() or (self._transport is not None and self._transport.is_closing()):
            future.set_exception(Lost("the connection was closed", sent=False))
            return future
        only = commands[0]
        if type(only) is Joinable and len(commands) == 1:
            call = _Call(future, only, b"", 1, expires, [])
        else:
            call = _Call(future, None, pack(commands), len(commands), expires, [])
        self._queued.append(call)
        if len(self._queued) < JOINED:
            self._schedule()
        else:  # enough for a call: the server need not wait for those that the loop has yet to let ask
            self._flush()
        return future

    def send(self, commands: Sequence[Command]) -> None:
        """Send commands that are answered by push messages alone."""
        self._output.append(pack(commands))
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            # Nothing in flight: a caller that is alone need not wait for the loop's next turn.
            if self._waiting:
                self._loop.call_soon(self._flush)
            else:
                self._flush()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        self._heard = self._loop.time()
        waiting, gets = self._waiting, self._reader.gets
        self._reader.feed(self._input, 0, nbytes)  # type: ignore[arg-type]  # any buffer will do
        try:
            while (reply := gets()) is not _MORE:
                if type(reply) is hiredis.PushNotification or (self._push is not None and not waiting):
                    if self._push is not None:
                        self._push(reply)
                    continue
                call = waiting[0]
                call.replies.append(reply)
                if len(call.replies) == call.count:
                    waiting.popleft()
                    call.finish()
        except Exception:  # nonsense, or a reply that nobody asked for: what comes after can't be told apart
            self.abort()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        reason = f"the connection broke ({type(exc).__name__})" if exc else "the connection was closed"
        for entry in self._waiting:
            for call in entry.members:
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
        if self._paused or self._transport is None or not (self._output or self._queued):
            return
        if not self._waiting:
            self._heard = self._loop.time()
        output, queued = self._output, self._queued
        self._output, self._queued = [], []
        at = 0
        while at < len(queued):
            call = queued[at]
            if call.joinable is None:
                self._waiting.append(call)
                output.append(call.data)
                at += 1
            else:
                run = joinable_run(call.joinable for call in itertools.islice(queued, at, None))
                output += self._joined(queued[at : at + len(run)], run)
                at += len(run)
        self._transport.write(output[0] if len(output) == 1 else b"".join(output))
        if self._watch is None:
            self._watch = self._loop.call_later(self._patience / 10, self._look)

    def _joined(self, calls: Sequence[_Call], run: Sequence[Joinable]) -> list[bytes]:
        """Return what to write for calls that go out as one."""
        try:
            data = pack((joined(run),))
        except Exception as exc:  # whoever brought what can't be packed: the others go out
            if len(calls) == 1:
                calls[0].fail(exc)
                return []
            return [part for call, one in zip(calls, run, strict=True) for part in self._joined((call,), (one,))]
        self._waiting.append(calls[0] if len(calls) == 1 else _Joined(calls))
        return [data]

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
        for entry in self._waiting:
            for call in entry.members:
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
        self._pid = os.getpid()

    async def feed(self, deliver: Deliver, heartbeat: float) -> Feed:
        """Open a connection for what is published: see `Feed`."""
        return await dial(self._address, heartbeat, self._prepare, deliver)

    def call(self, commands: Sequence[Command], expires: float) -> Awaitable[list[Reply]]:
        """Return the commands' replies: see `AsyncLink`."""
        connection = self._connection
        if connection is None or connection.closed.done():
            return self._connect_and_call(commands, expires)
        return connection.submit(commands, expires)

    async def close(self) -> None:
        """Close the connection. A forked child leaves it alone: socket and selector are its parent's too."""
        if os.getpid() != self._pid:
            return
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        if self._connection is not None:
            self._connection.abort()
            await self._connection.closed

    async def _connect_and_call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        connection = await self._connected(expires)
        return await connection.submit(commands, expires)

    async def _connected(self, expires: float) -> _Connection:
        """Connect, once for all who wait for it."""
        loop = asyncio.get_running_loop()
        if self._connecting is None or self._connecting.done():
            self._connecting = loop.create_task(self._connect())
            # Its failure is told to those who wait; there may be none left.
            self._connecting.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            async with asyncio.timeout_at(expires):
                return await asyncio.shield(self._connecting)
        except TimeoutError:
            raise Lost(f"no connection to {self._address} in time", sent=False) from None

    async def _connect(self) -> _Connection:
        # Kept by the task itself: those who wait for it may all have gone.
        self._connection = await _connect(self._address, attempt_patience(self._deadline), self._prepare)
        return self._connection


async def _connect(
    address: Address, patience: float, prepare: Callable[[], None] | None, push: Push | None = None
) -> _Connection:
    """Open a connection and introduce ourselves, within `patience` seconds."""
    loop = asyncio.get_running_loop()
    connection = _Connection(loop, patience, push)
    try:
        if prepare is not None:
            await asyncio.to_thread(prepare)
        async with asyncio.timeout(patience):
            if address.path is not None:
                await loop.create_unix_connection(lambda: connection, address.path)
            else:
                await loop.create_connection(lambda: connection, address.host, address.port, ssl=address.tls)
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


async def dial(address: Address, heartbeat: float, prepare: Callable[[], None] | None, deliver: Deliver) -> Feed:
    """Open a connection for what is published; in RESP3, PING is answered between messages."""
    feed = _LinkFeed(heartbeat, deliver)
    feed.connection = await _connect(address, heartbeat / 2, prepare, feed.push)
    return feed


class _LinkFeed:
    connection: _Connection

    def __init__(self, heartbeat: float, deliver: Deliver) -> None:
        self._heartbeat = heartbeat
        self._deliver = deliver
        self._refusals: list[Reply] = []

    def push(self, message: Reply) -> None:
        if isinstance(message, hiredis.ReplyError):  # a refused subscription
            self._refusals.append(message)
            self.connection.abort()
            return
        kind, channel, *rest = message
        if kind == b"message":
            self._deliver(channel.decode(), rest[0])
        elif kind == b"subscribe":
            self._deliver(channel.decode(), None)

    def subscribe(self, channel: str) -> None:
        self.connection.send([("SUBSCRIBE", channel)])

    def unsubscribe(self, channel: str) -> None:
        self.connection.send([("UNSUBSCRIBE", channel)])

    async def watch(self) -> None:
        loop, closed = asyncio.get_running_loop(), self.connection.closed
        while True:
            await asyncio.wait([closed], timeout=self._heartbeat / 2)
            check(self._refusals)
            if closed.done():
                raise Lost("the connection broke", sent=False)
            check(await self.connection.submit([("PING",)], loop.time() + self._heartbeat / 2))

    async def close(self) -> None:
        self.connection.abort()
        await self.connection.closed
