"""How to wait with a client of redis-py's that the caller made, or with fakeredis.

The client's own retries, callbacks and decoding are passed by; it is neither closed nor changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import hiredis
import redis
import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from .link import Deliver, Feed, attempt_patience
from .resp import Command, Lost, Reply, pack, translate

__all__ = ["AsyncClientLink", "BlockingClientLink", "memory_client"]

# redis-py takes the code off these; it is put back, so that there is one translation.
_CODES: dict[type[Exception], str] = {
    exceptions.NoScriptError: "NOSCRIPT",
    exceptions.BusyLoadingError: "LOADING",
    exceptions.ReadOnlyError: "READONLY",
    exceptions.OutOfMemoryError: "OOM",
    exceptions.NoPermissionError: "NOPERM",
    exceptions.AuthenticationError: "NOAUTH",
    exceptions.ClusterDownError: "CLUSTERDOWN",
    exceptions.TryAgainError: "TRYAGAIN",
    exceptions.MasterDownError: "MASTERDOWN",
    exceptions.MovedError: "MOVED",
    exceptions.AskError: "ASK",
}


def check_client(client: object, kind: type[Any]) -> None:
    """Refuse a client that can't work.

    Raises:
        TypeError: it is not redis-py's of the store's colour.
        ValueError: it decodes replies as text, or can't be told its settings.

    """
    if not isinstance(client, kind):
        raise TypeError(f"client is a {kind.__module__.removesuffix('.client')}.{kind.__name__} here")
    settings: dict[str, Any] = client.connection_pool.connection_kwargs
    if settings.get("decode_responses"):
        raise ValueError("the client decodes replies as text (decode_responses=True): sessions are bytes")


class _Request:
    __slots__ = ("commands", "future", "sent")

    def __init__(self, commands: Sequence[Command], future: asyncio.Future[list[Reply]]) -> None:
        self.commands = commands
        self.future = future
        self.sent = False


class AsyncClientLink:
    """Sends what all tasks ask for while a batch is under way as the next one, over a connection like the client's."""

    def __init__(self, client: redis.asyncio.Redis, deadline: float, *, owned: bool = False) -> None:
        check_client(client, redis.asyncio.Redis)
        self._client = client
        self._owned = owned
        self._patience = attempt_patience(deadline)
        self._queue: list[_Request] = []
        self._pump: asyncio.Task[None] | None = None
        self._connection: Any = None
        self._pid = os.getpid()

    async def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        """Return the commands' replies: see `AsyncLink`."""
        loop = asyncio.get_running_loop()
        request = _Request(commands, loop.create_future())
        self._queue.append(request)
        if self._pump is None or self._pump.done():
            self._pump = loop.create_task(self._run())
        try:
            async with asyncio.timeout_at(expires):
                return await request.future
        except TimeoutError:
            raise Lost("no answer in time", sent=request.sent) from None

    async def feed(self, deliver: Deliver, heartbeat: float) -> Feed:
        """Listen with a pub/sub object of the client's: see `Feed`."""
        return _ClientFeed(self._client, deliver, heartbeat)

    async def close(self) -> None:
        """Let go of the client; a client of the caller's stays open. See `Link.close` for a forked child."""
        if os.getpid() != self._pid:
            return
        if self._pump is not None:
            self._pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._pump
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)
        if self._owned:
            await self._client.aclose()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            batch, self._queue = self._queue, []
            try:
                async with asyncio.timeout(self._patience) as silence:
                    connection = await self._connected()
                    batch = [request for request in batch if not request.future.done()]  # or given up
                    packed = [pack(request.commands) for request in batch]
                    for request in batch:
                        request.sent = True
                    await connection.send_packed_command(packed, check_health=False)
                    for request in batch:
                        replies = [await self._reply(connection) for _ in request.commands]
                        if not request.future.done():
                            request.future.set_result(replies)
                        silence.reschedule(loop.time() + self._patience)
            except Exception as exc:
                await self._connection.disconnect(nowait=True)
                for request in batch:
                    if not request.future.done():
                        request.future.set_exception(_failure(exc, sent=request.sent))

    async def _connected(self) -> Any:
        if self._connection is None:
            settings = {"socket_timeout": None, "retry": AsyncRetry(NoBackoff(), 0)}
            pool: Any = self._client.connection_pool
            self._connection = pool.connection_class(**pool.connection_kwargs | settings)
        connection = self._connection
        await connection.connect()
        try:
            # The name before redis-py 8; what it may destroy is what nobody asked for.
            can_read = getattr(connection, "can_read", None) or connection.can_read_destructive
            quiet = not await can_read()
        except (OSError, exceptions.RedisError):
            quiet = False
        if not quiet:  # the server closed it
            await connection.disconnect(nowait=True)
            await connection.connect()
        return connection

    @staticmethod
    async def _reply(connection: Any) -> Reply:
        try:
            return _unwrapped(await connection.read_response(disable_decoding=True, disconnect_on_error=False))
        except (exceptions.ResponseError, exceptions.BusyLoadingError) as error:
            return _as_reply(error)


class BlockingClientLink:
    """Connections like the client's, without its retries, which nothing could stop: one for each waiting thread."""

    def __init__(self, client: redis.Redis, deadline: float, *, owned: bool = False) -> None:
        check_client(client, redis.Redis)
        self._client = client
        self._owned = owned
        self._patience = attempt_patience(deadline)
        self._idle: deque[Any] = deque()

    def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        """Return the commands' replies: see `BlockingLink`."""
        data = pack(commands)
        sent = False
        connection = self._kept() or self._connection(expires)
        try:
            connection.connect()
            sent = True
            connection.send_packed_command([data], check_health=False)
            replies = [self._reply(connection) for _ in commands]
        except BaseException as exc:
            connection.disconnect()
            self._drain()
            if not isinstance(exc, Exception):
                raise
            failure = _failure(exc, sent=sent)
        else:
            if connection.socket_timeout == self._patience:
                self._idle.append(connection)
            else:
                connection.disconnect()
            return replies
        raise failure  # here, since the client's exception may quote what was sent

    async def feed(self, deliver: Deliver, heartbeat: float) -> Feed:
        """Listen with a pub/sub object of the client's: see `Feed`."""
        return _ClientFeed(self._client, deliver, heartbeat)

    def close(self) -> None:
        """Let go of the client; a client of the caller's stays open."""
        self._drain()
        if self._owned:
            self._client.close()

    def _kept(self) -> Any:
        with contextlib.suppress(IndexError):
            while True:
                connection = self._idle.pop()
                with contextlib.suppress(OSError, exceptions.RedisError):
                    if not connection.can_read():
                        return connection
                connection.disconnect()  # the server closed it
        return None

    def _connection(self, expires: float) -> Any:
        pool: Any = self._client.connection_pool
        timeout = min(self._patience, max(0.001, expires - time.monotonic()))
        settings = {"socket_timeout": timeout, "retry": Retry(NoBackoff(), 0)}
        if "socket_connect_timeout" in pool.connection_kwargs:
            settings["socket_connect_timeout"] = timeout
        return pool.connection_class(**pool.connection_kwargs | settings)

    def _drain(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().disconnect()

    @staticmethod
    def _reply(connection: Any) -> Reply:
        try:
            return _unwrapped(connection.read_response(disable_decoding=True, disconnect_on_error=False))
        except (exceptions.ResponseError, exceptions.BusyLoadingError) as error:
            return _as_reply(error)


class _ClientFeed:
    """A pub/sub object of either colour; the blocking one's calls are made in threads.

    redis-py connects and subscribes again by itself, which shows as another confirmation. Only one call is under way at
    a time, so what is to be sent waits for the reading to pause.
    """

    _POLL = 0.1  # seconds

    def __init__(self, client: Any, deliver: Deliver, heartbeat: float) -> None:
        self._pubsub = client.pubsub()
        self._deliver = deliver
        self._heartbeat = heartbeat
        self._orders: deque[tuple[str, str]] = deque()
        self._channels: set[str] = set()
        self._busy: asyncio.Future[Any] | None = None

    def subscribe(self, channel: str) -> None:
        self._orders.append(("subscribe", channel))

    def unsubscribe(self, channel: str) -> None:
        self._orders.append(("unsubscribe", channel))

    async def watch(self) -> None:
        heard = asked = time.monotonic()
        try:
            while True:
                while self._orders:
                    verb, channel = self._orders.popleft()
                    (self._channels.add if verb == "subscribe" else self._channels.discard)(channel)
                    await self._call(verb, channel)
                if not self._channels:
                    await asyncio.sleep(self._POLL)
                    heard = time.monotonic()
                    continue
                message = await self._call("get_message", timeout=self._POLL)
                now = time.monotonic()
                if message is not None:
                    heard = now
                    self._receive(message)
                elif now - heard > self._heartbeat:
                    raise Lost("no answer in time", sent=False)
                elif now - max(heard, asked) > self._heartbeat / 2:
                    asked = now
                    await self._call("ping")
        except (OSError, exceptions.RedisError) as exc:
            raise Lost(f"the client failed: {type(exc).__name__}", sent=False) from exc

    async def close(self) -> None:
        if self._busy is not None:
            await asyncio.wait([self._busy], timeout=self._heartbeat)
        with contextlib.suppress(OSError, exceptions.RedisError):
            await self._call("aclose" if inspect.iscoroutinefunction(self._pubsub.get_message) else "close")

    def _receive(self, message: dict[str, Any]) -> None:
        if message["type"] == "message":
            self._deliver(message["channel"].decode(), message["data"])
        elif message["type"] == "subscribe":
            self._deliver(message["channel"].decode(), None)

    async def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        method = getattr(self._pubsub, name)
        if not inspect.iscoroutinefunction(self._pubsub.get_message):
            method = partial(asyncio.to_thread, method)
        # Neither a thread nor every pub/sub object can be cancelled: `close` waits for it.
        self._busy = asyncio.ensure_future(method(*arguments, **options))
        async with asyncio.timeout(self._heartbeat):
            return await asyncio.shield(self._busy)


def _failure(error: Exception, *, sent: bool) -> Exception:
    """Name what the client raised. A command of its own that was refused (HELLO, AUTH, SELECT) is a server's error."""
    if isinstance(error, (exceptions.ResponseError, exceptions.AuthenticationError)):
        return translate(str(_as_reply(error)))
    return Lost(f"the client failed: {type(error).__name__}", sent=sent)


def _unwrapped(reply: Reply) -> Reply:
    if type(reply) is list:
        return [_as_reply(item) if isinstance(item, Exception) else item for item in reply]
    return reply


def _as_reply(error: Exception) -> Reply:
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), "")
    return hiredis.ReplyError(f"{code} {error}".strip())


_memories: dict[str, Any] = {}


def memory_client(name: str, kind: str) -> Any:
    """Return a fakeredis client; `kind` is "FakeRedis" or "FakeAsyncRedis". Of a name there is one data set."""
    try:
        import fakeredis
    except ImportError as exc:
        raise RuntimeError("memory:// needs fakeredis: pip install 'orcs-redis[memory]'") from exc
    server = _memories.setdefault(name, fakeredis.FakeServer()) if name else fakeredis.FakeServer()
    return getattr(fakeredis, kind)(server=server)
