"""One connection that all tasks of a loop share.

What the tasks ask for in one iteration of the loop goes out in one write, and the replies come back in order. Calls of
the writing script that follow one another go out as one call. A caller that is cancelled leaves its place in the queue,
and its reply is dropped when it comes.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import hiredis
import msgspec

from ..errors import UnavailableError
from ..interrupts import interruption, raise_interruption
from ..protocol.attempts import AttemptError, AttemptTimeout, ConnectionLost
from ..protocol.commands import MAX_MERGED, Batch, Command, Packed, Reply, ScriptCall, batches, pack
from .address import Address
from .base import Prepare
from .network import in_thread, open_socket, reason_of, unreachable
from .role import Role
from .silence import Silence

__all__ = ["Connection", "OnPush", "connect"]

OnPush: TypeAlias = Callable[[Reply], None]

_MORE = object()
_INPUT = 128 * 1024  # bytes read at once
_OUTPUT = 64 * 1024  # bytes after which the transport is asked whether it takes more


class _Call(msgspec.Struct, eq=False):
    """What is asked for by one caller."""

    future: asyncio.Future[list[Reply]]
    command: ScriptCall | Packed
    count: int  # of replies
    expires: float
    replies: list[Reply]

    @property
    def calls(self) -> Sequence[_Call]:
        return (self,)

    def finish(self) -> None:
        if not self.future.done():
            self.future.set_result(self.replies)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _MergedCall:
    """Calls that went out as one."""

    __slots__ = ("_batch", "calls", "replies")
    count = 1

    def __init__(self, calls: Sequence[_Call], batch: Batch) -> None:
        self.calls = calls
        self._batch = batch
        self.replies: list[Reply] = []

    def finish(self) -> None:
        for call, reply in zip(self.calls, self._batch.split(self.replies[0]), strict=True):
            call.replies.append(reply)
            call.finish()


class Connection(asyncio.BufferedProtocol):
    """One connection. `_waiting` have been handed to the transport, `_queued` not yet."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout: float, on_push: OnPush | None = None) -> None:
        self._loop = loop
        self._on_push = on_push
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[_Call | _MergedCall] = deque()
        self._queued: list[_Call] = []
        self._output: list[bytes] = []
        self._reading = False  # whether a buffer was handed out whose content has yet to be read
        self._may_lose = False  # whether what was received is lost if a signal handler raises at that moment
        self._paused = False
        self._scheduled = False  # whether a flush will come: from `call_soon`, or when writing may go on
        self._silence = Silence(loop, timeout, self._look)
        self._unsent = 0  # bytes in the transport's buffer at the last look
        self._mute = False  # whether it was given up since nothing came
        self._input = bytearray(_INPUT)  # kept: fresh memory for each reading costs page faults
        self._view = memoryview(self._input)
        self.opened = time.monotonic()
        self.checked = -math.inf  # when the server was last asked for its role, as long as it is open
        self.closed = self._loop.create_future()

    # What callers use

    def submit(self, commands: Sequence[Command], expires: float) -> asyncio.Future[list[Reply]]:
        """Send commands together with what others ask for; the future gets their replies, or ConnectionLost."""
        future: asyncio.Future[list[Reply]] = self._loop.create_future()
        if self.closed.done() or (self._transport is not None and self._transport.is_closing()):
            future.set_exception(ConnectionLost("the connection was closed", sent=False))
            return future
        count, only = len(commands), commands[0]
        command = only if count == 1 and type(only) is ScriptCall else Packed(pack(commands), count)
        self._queued.append(_Call(future, command, count, expires, []))
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
            # Nothing in flight: a caller that is alone need not wait for the loop's next iteration.
            if self._waiting:
                self._scheduled = True
                self._loop.call_soon(self._flush)
            else:
                self._flush()

    def abort(self) -> None:
        """Close it at once: those who wait for replies get ConnectionLost."""
        self.checked = -math.inf
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)
        # Others ask for a buffer in vain, too: TLS, and uvloop when the last reading has filled it.
        self._may_lose = type(transport).__module__ == "asyncio.selector_events"

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where to put what is received."""
        if self._reading:
            raise ConnectionAbortedError("what was read was lost, when a signal handler raised")
        self._reading = self._may_lose
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Give replies to those who wait for them, in order."""
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
        """Keep what is asked for from now on."""
        self._paused = True

    def resume_writing(self) -> None:
        """Send what was kept."""
        self._paused = False
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """End all calls."""
        if isinstance(exc, OSError):  # all else the transport has reported to the loop
            self._report(exc)
        reason = f"the connection broke: {reason_of(exc)}" if exc else "the connection was closed"
        for entry in self._waiting:
            for call in entry.calls:
                silent = AttemptTimeout("no answer in time", sent=True) if self._mute else None
                call.fail(silent or ConnectionLost(reason, sent=True, size=call.command.size()))
        for call in self._queued:
            call.fail(ConnectionLost(reason, sent=False))
        self._waiting.clear()
        self._queued.clear()
        self._output.clear()
        self._silence.stop()
        self.checked = -math.inf
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
        if self._scheduled or self._transport is None or not (self._output or self._queued):
            return
        if not self._waiting:
            self._silence.last_received = self._loop.time()
        # Without those that were cancelled, or whose time was over, before they went out.
        # The others stay queued until all are written: if a signal handler raises, they fail with the connection.
        queued = self._queued = [call for call in self._queued if not call.future.done()]
        output, self._output = self._output, []
        at = size = 0
        for batch in batches([call.command for call in queued]):
            if self._paused:
                break
            calls = queued[at : at + len(batch.commands)]
            at += len(calls)
            data = self._packed(calls, batch)
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

    def _packed(self, calls: Sequence[_Call], batch: Batch) -> bytes:
        """Return what to write for calls that go out as one."""
        try:
            data = batch.pack()
        except Exception as exc:  # one that can't be packed fails by itself: the others go out
            raise_interruption(exc)
            if len(calls) == 1:
                calls[0].fail(exc)
                return b""
            return b"".join([self._packed((call,), Batch((call.command,))) for call in calls])
        self._waiting.append(calls[0] if len(calls) == 1 else _MergedCall(calls, batch))
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


async def connect(
    address: Address, attempt_timeout: float, prepare: Prepare | None, role: Role, on_push: OnPush | None = None
) -> Connection:
    """Open a connection, handshake included, within `attempt_timeout` seconds."""
    loop = asyncio.get_running_loop()
    connection = Connection(loop, attempt_timeout, on_push)
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
            # Without a deadline of its own: `_look` gives up a connection whose server stays silent.
            replies = await connection.submit(address.handshake(), math.inf)
        address.check(replies)
        role.check(replies[0])
        connection.checked = time.monotonic()
    except (OSError, AttemptError, UnavailableError) as exc:
        connection.abort()
        raise_interruption(exc)
        raise unreachable(address, exc) from exc
    except BaseException:
        connection.abort()
        raise
    return connection
