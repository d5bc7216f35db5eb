"""How to wait, in asyncio: one connection that all tasks of a loop share.

What the tasks ask for in one turn of the loop goes out in one write, and the replies come back in order. Calls of the
writing script that follow one another go out as one call. A caller that is cancelled leaves its place in the queue, and
its reply is dropped when it comes.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias, cast

import hiredis
import msgspec

from ..errors import StorageError, UnavailableError
from ..interrupts import interruption, raise_interruption
from ..protocol.attempts import AttemptError, AttemptTimeout, ConnectionLost, WrongServer, check
from ..protocol.commands import MAX_MERGED, Command, Reply, ScriptCall, merge, next_batch, pack, split_reply
from .address import Address
from .base import OnMessage, Prepare, PubSub, attempt_timeout, nothing
from .network import ASK_ROLE, ROLE_CHECK, Role, in_thread, open_socket, reason_of, unreachable

__all__ = [
    "Link",
    "Silence",
    "open_pubsub",
]

OnPush: TypeAlias = Callable[[Reply], None]

_MORE = object()
_INPUT = 128 * 1024  # bytes read at once
_OUTPUT = 64 * 1024  # bytes after which the transport is asked whether it takes more


class Silence:
    """Notices that nothing comes over a connection, in time during which this loop was not busy with something else."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout: float, look: Callable[[], bool]) -> None:
        """`look` is called from time to time while the watch is on, and returns whether it is to go on."""
        self._loop = loop
        self._attempt_timeout = timeout
        self._look = look
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.last_received = 0.0  # when the other side last showed that it is there

    def start(self) -> None:
        """Begin to look, if that is not under way."""
        if self._timer is None:
            self._due = self._loop.time() + self._attempt_timeout / 10
            self._timer = self._loop.call_at(self._due, self._tick)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def too_long(self) -> bool:
        """Whether the other side has been silent for too long."""
        return self._loop.time() - self.last_received > self._attempt_timeout

    def _tick(self) -> None:
        self._timer = None
        now = self._loop.time()
        self.last_received = min(
            now, self.last_received + now - self._due
        )  # while this loop was late, nothing could be received
        if self._look():
            self.start()


class _Call(msgspec.Struct, eq=False):
    """What is asked for by one caller: a script call that may be merged with others, or what goes over the wire."""

    future: asyncio.Future[list[Reply]]
    script_call: ScriptCall | None
    data: bytes
    count: int  # of replies
    expires: float
    replies: list[Reply]

    @property
    def calls(self) -> Sequence[_Call]:
        return (self,)

    def size(self) -> int:
        return len(self.data) if self.script_call is None else self.script_call.size()

    def finish(self) -> None:
        if not self.future.done():
            self.future.set_result(self.replies)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _MergedCall:
    """Calls that went out as one."""

    __slots__ = ("calls", "replies")
    count = 1

    def __init__(self, calls: Sequence[_Call]) -> None:
        self.calls = calls
        self.replies: list[Reply] = []

    def finish(self) -> None:
        for call, reply in zip(self.calls, split_reply(self.replies[0], len(self.calls)), strict=True):
            call.replies.append(reply)
            call.finish()


class _Connection(asyncio.BufferedProtocol):
    """One connection. `_waiting` have been handed to the transport, `_queued` not yet."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout: float, on_push: OnPush | None = None) -> None:
        self._loop = loop
        self._on_push = on_push
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[_Call | _MergedCall] = deque()
        self._queued: list[_Call] = []
        self._output: list[bytes] = []
        self._is_plain = False
        self._reading = False
        self._paused = False
        self._scheduled = False
        self._silence = Silence(loop, timeout, self._look)
        self._unsent = 0
        self._mute = False  # whether it was given up since nothing came
        self._input = bytearray(_INPUT)  # kept: fresh memory for each reading costs page faults
        self._view = memoryview(self._input)
        self._doubt: asyncio.TimerHandle | None = None
        self.opened = loop.time()
        self.ready = False  # whether it is open, and the server was asked for its role not long ago
        self.closed = self._loop.create_future()

    # What callers use

    def submit(self, commands: Sequence[Command], expires: float) -> asyncio.Future[list[Reply]]:
        future: asyncio.Future[list[Reply]] = self._loop.create_future()
        if self.closed.done() or (self._transport is not None and self._transport.is_closing()):
            future.set_exception(ConnectionLost("the connection was closed", sent=False))
            return future
        only = commands[0]
        if type(only) is ScriptCall and len(commands) == 1:
            call = _Call(future, only, b"", 1, expires, [])
        else:
            call = _Call(future, None, pack(commands), len(commands), expires, [])
        self._queued.append(call)
        try:
            if len(self._queued) < MAX_MERGED:
                self._schedule()
            else:  # enough for a call: the server need not wait for those that the loop has yet to let ask
                self._flush()
        except BaseException:
            future.cancel()  # what was not sent yet is not sent any more
            raise
        return future

    def send(self, commands: Sequence[Command]) -> None:
        """Send commands that are answered by push messages alone."""
        self._output.append(pack(commands))
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            # Nothing in flight: a caller that is alone need not wait for the loop's next turn.
            if self._waiting:
                self._scheduled = True
                self._loop.call_soon(self._flush)
            else:
                self._flush()

    async def greet(self, commands: Sequence[Command]) -> list[Reply]:
        """Ask for the server's role, among other things; from the answer on it is ready for a while."""
        # However long what is before it takes: whether the server is silent, `_look` says.
        replies = await self.submit(commands, math.inf)
        self.ready = True
        self._doubt = self._loop.call_later(ROLE_CHECK, self._unready)
        return replies

    def abort(self) -> None:
        self._unready()
        if self._transport is not None:
            self._transport.abort()

    def _unready(self) -> None:
        self.ready = False
        if self._doubt is not None:
            self._doubt.cancel()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._is_plain = transport.get_extra_info("sslcontext") is None

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._reading:  # with TLS it is asked for in vain, too
            raise ConnectionAbortedError("what was read was lost, when a signal handler raised")
        self._reading = self._is_plain
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self._silence.last_received = self._loop.time()
            waiting, gets = self._waiting, self._reader.gets
            self._reader.feed(self._input, 0, nbytes)  # type: ignore[arg-type]  # any buffer will do
            while (reply := gets()) is not _MORE:
                if type(reply) is hiredis.PushNotification or (self._on_push is not None and not waiting):
                    if self._on_push is not None:
                        self._on_push(reply)
                    continue
                call = waiting[0]
                call.replies.append(reply)
                if len(call.replies) == call.count:
                    call.finish()
                    waiting.popleft()
            self._reading = False
        except Exception as exc:  # nonsense, or a reply that nobody asked for: what comes after can't be told apart
            self.abort()
            self._report(exc)
        except BaseException:
            self.abort()
            raise

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, OSError):  # all else the transport has reported to the loop
            self._report(exc)
        reason = f"the connection broke: {reason_of(exc)}" if exc else "the connection was closed"
        for entry in self._waiting:
            for call in entry.calls:
                silent = AttemptTimeout("no answer in time", sent=True) if self._mute else None
                call.fail(silent or ConnectionLost(reason, sent=True, size=call.size()))
        for call in self._queued:
            call.fail(ConnectionLost(reason, sent=False))
        self._waiting.clear()
        self._queued.clear()
        self._output.clear()
        self._silence.stop()
        self._unready()
        if not self.closed.done():
            self.closed.set_result(None)

    def _report(self, error: Exception) -> None:
        if (found := interruption(error)) is not None:
            self._loop.call_exception_handler({"message": "a signal handler raised", "exception": found})

    # What keeps it going

    def _flush(self) -> None:
        try:
            self._write()
        except BaseException:
            self.abort()  # how much was written is not known: replies would be taken for others'
            raise

    def _write(self) -> None:
        self._scheduled = self._paused
        if self._paused or self._transport is None or not (self._output or self._queued):
            return
        if not self._waiting:
            self._silence.last_received = self._loop.time()
        # Without those that were cancelled, or whose time was over, before they went out.
        queued = [call for call in self._queued if not call.future.done()]
        output, self._output, self._queued = self._output, [], []
        at = size = 0
        while at < len(queued) and not self._paused:
            call = queued[at]
            if call.script_call is None:
                self._waiting.append(call)
                data = call.data
                at += 1
            else:
                run = next_batch(call.script_call for call in itertools.islice(queued, at, None))
                data = self._merged(queued[at : at + len(run)], run)
                at += len(run)
            output.append(data)
            size += len(data)
            if size > _OUTPUT:  # what the transport does not take yet is not sent yet
                self._transport.write(b"".join(output))
                output, size = [], 0
        if output:
            self._transport.write(output[0] if len(output) == 1 else b"".join(output))
        self._queued = queued[at:]
        self._scheduled = self._paused
        self._silence.start()

    def _merged(self, calls: Sequence[_Call], run: Sequence[ScriptCall]) -> bytes:
        """Return what to write for calls that go out as one."""
        try:
            data = pack((merge(run),))
        except Exception as exc:  # one that can't be packed fails by itself: the others go out
            raise_interruption(exc)
            if len(calls) == 1:
                calls[0].fail(exc)
                return b""
            return b"".join([self._merged((call,), (one,)) for call, one in zip(calls, run, strict=True)])
        self._waiting.append(calls[0] if len(calls) == 1 else _MergedCall(calls))
        return data

    def _look(self) -> bool:
        """End the calls whose time is over, and the connection if it has been silent for too long."""
        if not self._waiting and not self._queued:
            return False
        now = self._loop.time()
        unsent = self._transport.get_write_buffer_size() if self._transport is not None else 0
        if unsent < self._unsent:
            self._silence.last_received = now
        self._unsent = unsent
        for entry in self._waiting:
            for call in entry.calls:
                if call.expires <= now:
                    call.fail(AttemptTimeout("no answer in time", sent=True))
        for call in self._queued:
            if call.expires <= now:
                call.fail(AttemptTimeout("it could not be sent in time", sent=False))
        if self._silence.too_long:
            self._mute = True
            self.abort()
            return False
        return True


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
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[_Connection] | None = None
        self._closed = False
        self._pid = os.getpid()

    async def open_pubsub(self, on_message: OnMessage, heartbeat: float) -> PubSub:
        """Open a connection for what is published: see `PubSub`."""
        return await open_pubsub(self._address, heartbeat, self._prepare, on_message, self._role, self.drop)

    def call(self, commands: Sequence[Command], expires: float) -> Awaitable[list[Reply]]:
        """Return the commands' replies: see `AsyncLink`."""
        connection = self._connection
        if connection is None or not connection.ready:
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

    async def _connected(self, expires: float) -> _Connection:
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
        return connecting.result()

    async def _connect(self) -> _Connection:
        # Kept by the task itself: those who wait for it may all have gone.
        connection = self._connection
        if connection is not None:
            try:
                async with asyncio.timeout(4 * self._attempt_timeout):  # whatever is before it, nobody waits any longer
                    self._role.check((await connection.greet(ASK_ROLE))[0])
            except (AttemptError, StorageError, TimeoutError) as error:
                raise_interruption(error)
                connection.abort()
                self._connection = None
            else:
                return connection
        self._connection = connection = await _connect(self._address, self._attempt_timeout, self._prepare, self._role)
        self._on_connect()
        return connection


async def _connect(
    address: Address, attempt_timeout: float, prepare: Prepare | None, role: Role, on_push: OnPush | None = None
) -> _Connection:
    """Open a connection and introduce ourselves, within `attempt_timeout` seconds."""
    loop = asyncio.get_running_loop()
    connection = _Connection(loop, attempt_timeout, on_push)
    try:
        async with asyncio.timeout(attempt_timeout):
            if prepare is not None:
                await in_thread(prepare, attempt_timeout, discard=lambda _: None)
            expires = time.monotonic() + attempt_timeout
            connected = await in_thread(open_socket, address, expires, discard=lambda late: late.close())
            connected.setblocking(False)
            create: Any = loop.create_connection if address.path is None else loop.create_unix_connection
            host = {"server_hostname": address.host} if address.tls is not None else {}
            await create(lambda: connection, sock=connected, ssl=address.tls, **host)
            replies = await connection.greet(address.handshake())
        address.check(replies)
        role.check(replies[0])
    except (OSError, AttemptError, UnavailableError) as exc:
        connection.abort()
        raise_interruption(exc)
        raise unreachable(address, exc) from exc
    except BaseException:
        connection.abort()
        raise
    return connection


async def open_pubsub(
    address: Address,
    heartbeat: float,
    prepare: Prepare | None,
    on_message: OnMessage,
    role: Role,
    drop: Callable[[float], object],
) -> PubSub:
    """Open a connection for what is published; in RESP3, HELLO is answered between messages.

    `drop` is called with the time when the server was found to be a wrong one.
    """
    pubsub = _SocketPubSub(heartbeat, on_message, role, drop)
    pubsub.connection = await _connect(address, heartbeat / 2, prepare, role, pubsub.on_push)
    return pubsub


class _SocketPubSub:
    connection: _Connection

    def __init__(self, heartbeat: float, on_message: OnMessage, role: Role, drop: Callable[[float], object]) -> None:
        self._heartbeat = heartbeat
        self._on_message = on_message
        self._role = role
        self._drop = drop
        self._refusals: list[Reply] = []

    def on_push(self, message: Reply) -> None:
        if isinstance(message, hiredis.ReplyError):  # a refused subscription
            self._refusals.append(message)
            self.connection.abort()
            return
        kind, channel, *rest = message
        if kind == b"message":
            self._on_message(channel.decode(), rest[0])
        elif kind == b"subscribe":
            self._on_message(channel.decode(), None)

    def subscribe(self, channel: str) -> None:
        self.connection.send([("SUBSCRIBE", channel)])

    def unsubscribe(self, channel: str) -> None:
        self.connection.send([("UNSUBSCRIBE", channel)])

    async def watch(self) -> None:
        closed = self.connection.closed
        while True:
            await asyncio.wait([closed], timeout=self._heartbeat / 2)
            check(self._refusals)
            if closed.done():
                raise ConnectionLost("the connection broke", sent=False)
            try:
                self._role.check((await self.connection.submit(ASK_ROLE, math.inf))[0])
            except WrongServer:
                self._drop(time.monotonic())
                raise

    async def close(self) -> None:
        self.connection.abort()
        await self.connection.closed
