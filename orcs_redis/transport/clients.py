"""A way to a server over the caller's redis-py client, or into fakeredis: one for asyncio, one blocking."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import redis
import redis.asyncio

from ..errors import UnavailableError
from ..interrupts import interruption, raise_interruption
from ..protocol.attempts import AttemptTimeout, ConnectionLost, copy_of_error
from ..protocol.commands import Command, Packed, Reply, pack
from .base import OnMessage, PubSub, attempt_timeout, nothing
from .client_connections import AsyncConnection, BlockingConnection, check_client, failure_of
from .client_pubsub import ClientPubSub
from .role import ASK_ROLE, Role
from .silence import Silence
from .sockets import PooledLink

__all__ = ["AsyncClientLink", "BlockingClientLink", "memory_client"]

_BATCH_BYTES = 256 * 1024  # after so many bytes a batch is sent


class _Call:
    __slots__ = ("_future", "packed", "sent")

    def __init__(self, packed: Packed, future: asyncio.Future[list[Reply]]) -> None:
        self.packed = packed
        self.sent = False
        self._future = future

    @property
    def done(self) -> bool:
        return self._future.done()

    def finish(self, replies: list[Reply]) -> None:
        if not self._future.done():
            self._future.set_result(replies)

    def fail(self, error: BaseException) -> None:
        if not self._future.done():
            self._future.set_exception(error)


class AsyncClientLink:
    """Sends what all tasks ask for while a batch is under way as the next one, over a connection like the client's."""

    def __init__(
        self,
        client: redis.asyncio.Redis,
        deadline: float,
        *,
        owned: bool = False,
        on_connect: Callable[[], object] = nothing,
    ) -> None:
        """`on_connect` is called when a connection was opened, before a call is sent over it."""
        check_client(client, redis.asyncio.Redis)
        self._client = client
        self._owned = owned
        self._on_connect = on_connect
        self._attempt_timeout = attempt_timeout(deadline)
        self._role = Role()
        self._queue: deque[_Call] = deque()
        self._pump: asyncio.Task[None] | None = None
        self._connection = AsyncConnection(client)
        self._closed = False
        self._pid = os.getpid()

    async def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        """Return the commands' replies: see `AsyncLink`."""
        if self._closed:
            raise UnavailableError("the store is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Reply]] = loop.create_future()
        call = _Call(Packed(pack(commands), len(commands)), future)
        self._queue.append(call)
        if self._pump is None or self._pump.done():
            self._pump = loop.create_task(self._run())
            self._pump.add_done_callback(self._ended)
        try:
            async with asyncio.timeout_at(expires):
                return await future
        except TimeoutError as error:
            raise_interruption(error)
            raise AttemptTimeout("no answer in time", sent=call.sent) from None

    def drop(self, before: float) -> None:
        """Use no connection any more that was opened before then: see `AsyncLink`."""
        self._role.drop(before)

    async def open_pubsub(self, on_message: OnMessage, heartbeat: float) -> PubSub:
        """Listen with a pub/sub object of the client's: see `PubSub`."""
        loop = asyncio.get_running_loop()
        ask = lambda: self.call(ASK_ROLE, loop.time() + heartbeat)  # noqa: E731  # see the other link's
        return ClientPubSub(self._client, on_message, heartbeat, ask, self._role.is_dropped)

    async def close(self) -> None:
        """Let go of the client; the caller's own stays open. See `Link.close` for a forked child."""
        self._closed = True
        if os.getpid() != self._pid:
            return
        try:
            if self._pump is not None:
                self._pump.cancel()
                await asyncio.wait([self._pump])
        finally:
            await self._connection.close()
            if self._owned:
                await self._client.aclose()

    def _ended(self, pump: asyncio.Task[None]) -> None:
        error = None if pump.cancelled() else pump.exception()
        if error is None:
            return
        # A signal handler's, for those who wait; it is reported to the loop in any case.
        waiting, self._queue = self._queue, deque()
        for call in waiting:
            call.fail(error)
        pump.get_loop().call_exception_handler({"message": "a signal handler raised", "exception": error})

    async def _run(self) -> None:
        batch: list[_Call] = []
        try:
            while self._queue:
                try:
                    await self._send(batch)
                except Exception as exc:
                    await self._connection.close()
                    for call in batch or self._queue:
                        size = len(call.packed.data) if call.sent else 0
                        call.fail(interruption(exc) or copy_of_error(failure_of(exc, sent=call.sent, size=size)))
                    if not batch:  # no connection could be had
                        self._queue.clear()
                batch.clear()
        except BaseException:
            self._role.drop(time.monotonic())  # what is still to be received would be taken for others'
            reason = "the store was closed" if self._closed else "the connection was given up: it was interrupted"
            for call in (*batch, *self._queue):
                call.fail(ConnectionLost(reason, sent=call.sent))
            raise

    async def _send(self, batch: list[_Call]) -> None:
        """Send what is waiting, as much as makes a batch, and receive the replies."""
        loop, connection = asyncio.get_running_loop(), self._connection
        async with asyncio.timeout(None) as limit:

            def look() -> bool:
                if silence.too_long:
                    limit.reschedule(loop.time())
                return not silence.too_long

            silence = Silence(loop, self._attempt_timeout, look)
            silence.last_received = loop.time()
            silence.start()
            try:
                await self._make_ready()
                size = 0
                while self._queue and size < _BATCH_BYTES:
                    call = self._queue[0]
                    if not call.done:  # cancelled, or its time is over
                        batch.append(call)
                        size += call.packed.size()
                    self._queue.popleft()  # at last: wherever a signal handler raises, it is in one of the two
                for call in batch:
                    call.sent = True
                await connection.send([call.packed.data for call in batch])
                for call in batch:
                    call.finish([await connection.reply() for _ in range(call.packed.count)])
                    silence.last_received = loop.time()
            finally:
                silence.stop()

    async def _make_ready(self) -> None:
        """Open the connection, unless it is open and leads to the right server."""
        connection, role = self._connection, self._role
        if not role.is_dropped(connection.opened) and await connection.is_usable():
            now = time.monotonic()
            if not role.is_due(connection, now):
                return
            with role.asking(connection, now):
                role.check(await connection.ask_role())
                return
        await connection.close()
        hello = await connection.open()
        connection.opened = connection.checked = time.monotonic()
        role.check(hello)
        self._on_connect()


class BlockingClientLink(PooledLink[BlockingConnection]):
    """Connections like the client's, beside its own; not more than its pool may have."""

    def __init__(
        self,
        client: redis.Redis,
        deadline: float,
        *,
        max_connections: int = 64,
        owned: bool = False,
        on_connect: Callable[[], object] = nothing,
    ) -> None:
        """`on_connect` is called when a connection was opened, before a call is sent over it."""
        check_client(client, redis.Redis)
        timeout = attempt_timeout(deadline)
        most = min(max_connections, client.connection_pool.max_connections)
        super().__init__(lambda: BlockingConnection(client, timeout), most, on_connect)
        self._client = client
        self._owned = owned

    async def open_pubsub(self, on_message: OnMessage, heartbeat: float) -> PubSub:
        """Listen with a pub/sub object of the client's: see `PubSub`."""
        ask = lambda: asyncio.to_thread(self.call, ASK_ROLE, time.monotonic() + heartbeat)  # noqa: E731  # as short
        return ClientPubSub(self._client, on_message, heartbeat, ask, self._role.is_dropped)

    def close(self) -> None:
        """Let go of the client; the caller's own stays open."""
        super().close()
        if self._owned:
            self._client.close()


_memories: dict[str, Any] = {}


def memory_client(name: str, kind: str) -> Any:
    """Return a fakeredis client; `kind` is "FakeRedis" or "FakeAsyncRedis". Of a name there is one data set."""
    try:
        import fakeredis
    except ImportError as exc:
        raise RuntimeError("memory:// needs fakeredis: pip install 'orcs-redis[memory]'") from exc
    server = _memories.setdefault(name, fakeredis.FakeServer()) if name else fakeredis.FakeServer()
    return getattr(fakeredis, kind)(server=server)
