"""How to wait with a client of redis-py's that the caller made, or with fakeredis.

The client's own retries, callbacks and decoding are passed by; it is neither closed nor changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import hiredis
import redis
import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from ..errors import StorageError, UnavailableError
from ..interrupts import interruption, raise_interruption, suppress
from ..protocol.attempts import AttemptError, AttemptTimeout, ConnectionLost, WrongServer, check_server, translate
from ..protocol.commands import Command, Reply, as_error, pack
from .base import OnMessage, PubSub, attempt_timeout, nothing
from .connection import Silence
from .network import ASK_ROLE, ROLE_CHECK, Role, unreachable
from .sockets import PooledLink

__all__ = ["AsyncClientLink", "BlockingClientLink", "memory_client"]

_CROWDED = "max number of clients"  # to redis-py it is a broken connection
_BATCH_BYTES = 256 * 1024  # after so many bytes a batch is sent

# redis-py takes the code off these; it is put back, so that there is one translation.
_CODES: dict[type[Exception], str] = {
    exceptions.NoScriptError: "NOSCRIPT",
    exceptions.BusyLoadingError: "LOADING",
    exceptions.ReadOnlyError: "READONLY",
    exceptions.OutOfMemoryError: "OOM",
    exceptions.NoPermissionError: "NOPERM",
    exceptions.AuthenticationError: "NOAUTH",
    exceptions.MasterDownError: "MASTERDOWN",  # before its base class
    exceptions.ClusterDownError: "CLUSTERDOWN",
    exceptions.TryAgainError: "TRYAGAIN",
    exceptions.MovedError: "MOVED",
    exceptions.AskError: "ASK",
}


# The others among them are to redis-py what a broken connection is.
_ERROR_REPLIES = (exceptions.ResponseError, exceptions.BusyLoadingError, exceptions.AuthenticationError)


def check_client(client: object, kind: type[Any]) -> None:
    """Refuse a client that can't work.

    Raises:
        TypeError: it is not redis-py's of the store's form.
        ValueError: it decodes replies as text, or its settings can't be read.

    """
    if not isinstance(client, kind):
        raise TypeError(f"client is a {kind.__module__.removesuffix('.client')}.{kind.__name__} here")
    settings: dict[str, Any] = client.connection_pool.connection_kwargs
    if settings.get("decode_responses"):
        raise ValueError("the client decodes replies as text (decode_responses=True): sessions are bytes")


class _Request:
    __slots__ = ("data", "future", "replies", "sent")

    def __init__(self, data: bytes, replies: int, future: asyncio.Future[list[Reply]]) -> None:
        self.data = data
        self.replies = replies  # how many
        self.future = future
        self.sent = False


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
        self._queue: deque[_Request] = deque()
        self._pump: asyncio.Task[None] | None = None
        self._connection: Any = None
        self._opened = self._checked = self._dropped = -math.inf
        self._closed = False
        self._pid = os.getpid()

    async def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        """Return the commands' replies: see `AsyncLink`."""
        if self._closed:
            raise UnavailableError("the store is closed")
        loop = asyncio.get_running_loop()
        request = _Request(pack(commands), len(commands), loop.create_future())
        self._queue.append(request)
        if self._pump is None or self._pump.done():
            self._pump = loop.create_task(self._run())
            self._pump.add_done_callback(self._ended)
        try:
            async with asyncio.timeout_at(expires):
                return await request.future
        except TimeoutError as error:
            raise_interruption(error)
            raise AttemptTimeout("no answer in time", sent=request.sent) from None

    def drop(self, before: float) -> None:
        """Use no connection any more that was opened before then: see `AsyncLink`."""
        self._dropped = max(self._dropped, before)

    async def open_pubsub(self, on_message: OnMessage, heartbeat: float) -> PubSub:
        """Listen with a pub/sub object of the client's: see `PubSub`."""
        loop = asyncio.get_running_loop()
        ask = lambda: self.call(ASK_ROLE, loop.time() + heartbeat)  # noqa: E731  # see the other link's
        return _ClientPubSub(self._client, on_message, heartbeat, ask, self.is_dropped)

    def is_dropped(self, opened: float) -> bool:
        """Whether what was opened at a time is to be used no more."""
        return opened < self._dropped

    async def close(self) -> None:
        """Let go of the client; a client of the caller's stays open. See `Link.close` for a forked child."""
        self._closed = True
        if os.getpid() != self._pid:
            return
        try:
            if self._pump is not None:
                self._pump.cancel()
                await asyncio.wait([self._pump])
        finally:
            if self._connection is not None:
                await self._connection.disconnect(nowait=True)
            if self._owned:
                await self._client.aclose()

    def _ended(self, pump: asyncio.Task[None]) -> None:
        error = None if pump.cancelled() else pump.exception()
        if error is None:
            return
        # A signal handler's, for those who wait; it is reported to the loop in any case.
        waiting, self._queue = self._queue, deque()
        for request in waiting:
            if not request.future.done():
                request.future.set_exception(error)
        pump.get_loop().call_exception_handler({"message": "a signal handler raised", "exception": error})

    async def _run(self) -> None:
        batch: list[_Request] = []
        try:
            while self._queue:
                try:
                    await self._send(batch)
                except Exception as exc:
                    await self._disconnect()
                    for request in batch or self._queue:
                        if not request.future.done():
                            size = len(request.data) if request.sent else 0
                            failure = interruption(exc) or _failure(exc, sent=request.sent, size=size)
                            request.future.set_exception(failure)
                    if not batch:  # no connection could be had
                        self._queue.clear()
                batch.clear()
        finally:  # closed
            for request in (*batch, *self._queue):
                if not request.future.done():
                    request.future.set_exception(ConnectionLost("the store was closed", sent=request.sent))

    async def _send(self, batch: list[_Request]) -> None:
        """Send what is waiting, as much as makes a batch, and receive the replies."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as limit:

            def look() -> bool:
                if silence.too_long:
                    limit.reschedule(loop.time())
                return not silence.too_long

            silence = Silence(loop, self._attempt_timeout, look)
            silence.last_received = loop.time()
            silence.start()
            try:
                connection = await self._connected()
                size = 0
                while self._queue and size < _BATCH_BYTES:
                    request = self._queue[0]
                    if not request.future.done():  # cancelled, or its time is over
                        batch.append(request)
                        size += len(request.data)
                    self._queue.popleft()  # at last: wherever a signal handler raises, it is in one of the two
                for request in batch:
                    request.sent = True
                await connection.send_packed_command([request.data for request in batch], check_health=False)
                for request in batch:
                    replies = [await self._reply(connection) for _ in range(request.replies)]
                    if not request.future.done():
                        request.future.set_result(replies)
                    silence.last_received = loop.time()
            finally:
                silence.stop()

    async def _connected(self) -> Any:
        """Return a connection that leads to the right server."""
        loop = asyncio.get_running_loop()
        if self._connection is None:
            settings = {"socket_timeout": None, "retry": AsyncRetry(NoBackoff(), 0)}
            pool: Any = self._client.connection_pool
            self._connection = pool.connection_class(**pool.connection_kwargs | settings)
        connection = self._connection
        if connection.is_connected and not self.is_dropped(self._opened) and await self._is_quiet(connection):
            if loop.time() < self._checked + ROLE_CHECK:
                return connection
            try:
                self._role.check(await self._ask_role(connection))
            except WrongServer:
                self.drop(loop.time())
            except (AttemptError, StorageError):
                pass
            else:
                self._checked = loop.time()
                return connection
        await self._disconnect()
        await connection.connect()
        hello = await self._ask_role(connection)
        self._opened = self._checked = loop.time()
        _check_greeting(hello)
        self._role.check(hello)
        self._on_connect()
        return connection

    async def _disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)

    async def _ask_role(self, connection: Any) -> Reply:
        await connection.send_packed_command([pack(ASK_ROLE)], check_health=False)
        return await self._reply(connection)

    @staticmethod
    async def _is_quiet(connection: Any) -> bool:
        """Whether the server has neither closed it nor said what nobody asked for."""
        try:
            # The name before redis-py 8; what it may destroy is what nobody asked for.
            can_read = getattr(connection, "can_read", None) or connection.can_read_destructive
            return not await can_read()
        except (OSError, exceptions.RedisError) as error:
            raise_interruption(error)
            return False

    @staticmethod
    async def _reply(connection: Any) -> Reply:
        try:
            return _unwrapped(await connection.read_response(disable_decoding=True, disconnect_on_error=False))
        except _ERROR_REPLIES as error:
            return _as_reply(error)


class _Packer:
    """Packs what redis-py says by itself when it connects: see `pack`."""

    def pack(self, *arguments: Any) -> list[bytes]:
        name, *rest = arguments
        return [pack([(*name.split(), *rest)])]


class _ClientConnection:
    """A connection like the client's, without its retries, which nothing could stop."""

    opened = checked = used = -math.inf

    def __init__(self, client: redis.Redis, timeout: float) -> None:
        self._client = client
        self._attempt_timeout = timeout
        self._connection: Any = None

    def open(self, expires: float) -> Reply:
        pool: Any = self._client.connection_pool
        timeout = self._limit(expires)
        settings = {"socket_timeout": timeout, "retry": Retry(NoBackoff(), 0), "command_packer": _Packer()}
        if "socket_connect_timeout" in pool.connection_kwargs:
            settings["socket_connect_timeout"] = timeout
        try:
            self._connection = pool.connection_class(**pool.connection_kwargs | settings)
            self._connection.connect()
            (hello,) = self.call(ASK_ROLE, expires)
            _check_greeting(hello)
            return hello
        except Exception as exc:
            failure = _failure(exc, sent=False)
        raise failure  # here, since the client's exception may quote what was sent

    def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        data, sent = pack(commands), False
        connection = self._connection
        # A setting of redis-py's is for all time, the socket's own for the next step. A fake socket has none.
        set_timeout: Any = getattr(getattr(connection, "_sock", None), "settimeout", lambda _: None)
        try:
            set_timeout(self._limit(expires))
            sent = True
            connection.send_packed_command([data], check_health=False)
            replies = []
            for _ in commands:
                set_timeout(self._limit(expires))
                replies.append(self._reply(connection))
            return replies
        except Exception as exc:
            failure = _failure(exc, sent=sent, size=len(data))
        raise failure  # here, since the client's exception may quote what was sent

    def is_usable(self) -> bool:
        if self._connection is not None:
            with suppress(OSError, exceptions.RedisError):
                return not self._connection.can_read()
        return False

    def close(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None

    def _limit(self, expires: float) -> float:
        return min(self._attempt_timeout, max(0.001, expires - time.monotonic()))

    @staticmethod
    def _reply(connection: Any) -> Reply:
        try:
            return _unwrapped(connection.read_response(disable_decoding=True, disconnect_on_error=False))
        except _ERROR_REPLIES as error:
            return _as_reply(error)


class BlockingClientLink(PooledLink[_ClientConnection]):
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
        super().__init__(lambda: _ClientConnection(client, timeout), most, on_connect)
        self._client = client
        self._owned = owned

    async def open_pubsub(self, on_message: OnMessage, heartbeat: float) -> PubSub:
        """Listen with a pub/sub object of the client's: see `PubSub`."""
        ask = lambda: asyncio.to_thread(self.call, ASK_ROLE, time.monotonic() + heartbeat)  # noqa: E731  # as short
        return _ClientPubSub(self._client, on_message, heartbeat, ask, self.is_dropped)

    def close(self) -> None:
        """Let go of the client; a client of the caller's stays open."""
        super().close()
        if self._owned:
            self._client.close()


Ask: TypeAlias = Callable[[], Awaitable[object]]
IsDropped: TypeAlias = Callable[[float], bool]


class _ClientPubSub:
    """A pub/sub object of either form; the blocking one's calls are made in threads.

    redis-py connects and subscribes again by itself, which shows as another confirmation. Only one call is under way at
    a time, so what is to be sent waits for the reading to pause. In RESP2 its server can't be asked for
    its role over it, so the link is asked to use its own connection, which leads to the same server.
    """

    _POLL = 0.1  # seconds

    def __init__(self, client: Any, on_message: OnMessage, heartbeat: float, ask: Ask, is_dropped: IsDropped) -> None:
        self._pubsub = client.pubsub()
        self._ask = ask
        self._is_dropped = is_dropped
        self._opened = time.monotonic()
        self._on_message = on_message
        self._heartbeat = heartbeat
        self._orders: deque[tuple[str, str]] = deque()
        self._channels: set[str] = set()
        self._busy: asyncio.Future[Any] | None = None

    def subscribe(self, channel: str) -> None:
        self._orders.append(("subscribe", channel))

    def unsubscribe(self, channel: str) -> None:
        self._orders.append(("unsubscribe", channel))

    async def watch(self) -> None:
        last_received = asked = asked_link = time.monotonic()
        try:
            while True:
                if time.monotonic() - asked_link > self._heartbeat / 2:
                    await self._ask()
                    asked_link = time.monotonic()
                if self._is_dropped(self._opened):
                    raise ConnectionLost("the client's connection leads to a wrong server", sent=False)
                while self._orders:
                    verb, channel = self._orders.popleft()
                    (self._channels.add if verb == "subscribe" else self._channels.discard)(channel)
                    await self._call(verb, channel)
                if not self._channels:
                    await asyncio.sleep(self._POLL)
                    last_received = time.monotonic()
                    continue
                message = await self._call("get_message", timeout=self._POLL)
                now = time.monotonic()
                if message is not None:
                    last_received = now
                    self._receive(message)
                elif now - last_received > self._heartbeat:
                    raise AttemptTimeout("no answer in time", sent=False)
                elif now - max(last_received, asked) > self._heartbeat / 2:
                    asked = now
                    await self._call("ping")
        except (OSError, exceptions.RedisError) as exc:
            failure = _failure(exc, sent=False)
        raise failure

    async def close(self) -> None:
        if self._busy is not None:
            await asyncio.wait([self._busy], timeout=self._heartbeat)
        with contextlib.suppress(OSError, exceptions.RedisError):
            await self._call("aclose" if inspect.iscoroutinefunction(self._pubsub.get_message) else "close")

    def _receive(self, message: dict[str, Any]) -> None:
        if message["type"] == "message":
            self._on_message(message["channel"].decode(), message["data"])
        elif message["type"] == "subscribe":
            self._on_message(message["channel"].decode(), None)

    async def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        method = getattr(self._pubsub, name)
        if not inspect.iscoroutinefunction(self._pubsub.get_message):
            method = partial(asyncio.to_thread, method)
        # Neither a thread nor every pub/sub object can be cancelled: `close` waits for it.
        self._busy = asyncio.ensure_future(method(*arguments, **options))
        async with asyncio.timeout(self._heartbeat):
            return await asyncio.shield(self._busy)


def _failure(error: Exception, *, sent: bool, size: int = 0) -> AttemptError | StorageError:
    """Name what the client raised. A command of its own that was refused (HELLO, AUTH, SELECT) is a server's error."""
    raise_interruption(error)
    if isinstance(error, StorageError):
        return error
    if isinstance(error, AttemptError):
        return (AttemptTimeout if isinstance(error, AttemptTimeout) else ConnectionLost)(str(error), sent=sent)
    text = str(_as_reply(error))
    if isinstance(error, (exceptions.ResponseError, exceptions.AuthenticationError)) or _CROWDED in text:
        return translate(text, opening=True)
    failure = unreachable("the client's server", error)
    if isinstance(error, (TimeoutError, exceptions.TimeoutError)):
        size = 0
    return type(failure)(str(failure), sent=sent, size=size) if isinstance(failure, ConnectionLost) else failure


def _check_greeting(hello: Reply) -> None:
    text = as_error(hello)
    if text is not None:
        raise translate(text, opening=True)
    check_server(hello)


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
