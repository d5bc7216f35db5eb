"""Connections like those of a redis-py client or of fakeredis, and what their errors mean.

The client's own retries, callbacks and decoding are passed by; it is neither closed nor changed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import hiredis
import redis
import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from ..errors import StorageError
from ..interrupts import raise_interruption, suppress
from ..protocol.attempts import AttemptError, AttemptTimeout, ConnectionLost, check_server, translate
from ..protocol.commands import Command, Reply, as_error, pack
from .network import unreachable
from .role import ASK_ROLE

__all__ = ["AsyncConnection", "BlockingConnection", "check_client", "failure_of"]

_CROWDED = "max number of clients"  # to redis-py it is a broken connection

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
        TypeError: it is not of redis-py, or of the other form (asyncio, blocking).
        ValueError: it decodes replies as text, or its settings can't be read.

    """
    if not isinstance(client, kind):
        raise TypeError(f"client is a {kind.__module__.removesuffix('.client')}.{kind.__name__} here")
    settings: dict[str, Any] = client.connection_pool.connection_kwargs
    if settings.get("decode_responses"):
        raise ValueError("the client decodes replies as text (decode_responses=True): sessions are bytes")


class AsyncConnection:
    """A connection like the client's. It can be opened again after it was closed."""

    opened = checked = -math.inf

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._connection: Any = None

    async def open(self) -> Reply:
        """Connect, and return the server's answer to HELLO."""
        if self._connection is None:
            settings = {"socket_timeout": None, "retry": AsyncRetry(NoBackoff(), 0)}
            pool: Any = self._client.connection_pool
            self._connection = pool.connection_class(**pool.connection_kwargs | settings)
        await self._connection.connect()
        hello = await self.ask_role()
        _check_greeting(hello)
        return hello

    async def ask_role(self) -> Reply:
        """Return the server's answer to HELLO."""
        await self.send([pack(ASK_ROLE)])
        return await self.reply()

    async def send(self, packed: list[bytes]) -> None:
        """Send commands."""
        await self._connection.send_packed_command(packed, check_health=False)

    async def reply(self) -> Reply:
        """Return the next reply."""
        try:
            return _unwrapped(await self._connection.read_response(disable_decoding=True, disconnect_on_error=False))
        except _ERROR_REPLIES as error:
            return _as_reply(error)

    async def is_usable(self) -> bool:
        """Whether it is open, and the server has neither closed it nor said what nobody asked for."""
        if self._connection is None or not self._connection.is_connected:
            return False
        try:
            # The name before redis-py 8; what it may destroy is what nobody asked for.
            can_read = getattr(self._connection, "can_read", None) or self._connection.can_read_destructive
            return not await can_read()
        except (OSError, exceptions.RedisError) as error:
            raise_interruption(error)
            return False

    async def close(self) -> None:
        """Close it, if it is open."""
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)


class _Packer:
    """Packs what redis-py says by itself when it connects: see `pack`."""

    def pack(self, *arguments: Any) -> list[bytes]:
        name, *rest = arguments
        return [pack([(*name.split(), *rest)])]


class BlockingConnection:
    """A connection like the client's, without its retries, which nothing could stop: see `Pooled`."""

    opened = checked = used = -math.inf

    def __init__(self, client: redis.Redis, timeout: float) -> None:
        self._client = client
        self._attempt_timeout = timeout
        self._connection: Any = None

    def open(self, expires: float) -> Reply:
        """Connect, and return the server's answer to HELLO."""
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
            failure = failure_of(exc, sent=False)
        raise failure  # here, since the client's exception may quote what was sent

    def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        """Return the commands' replies."""
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
            failure = failure_of(exc, sent=sent, size=len(data))
        raise failure  # here, since the client's exception may quote what was sent

    def is_usable(self) -> bool:
        """Whether it is open, and the server has neither closed it nor said what nobody asked for."""
        if self._connection is not None:
            with suppress(OSError, exceptions.RedisError):
                return not self._connection.can_read()
        return False

    def close(self) -> None:
        """Close it, if it is open."""
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


def failure_of(error: Exception, *, sent: bool, size: int = 0) -> AttemptError | StorageError:
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
