"""How to wait with a client of redis-py's that the caller made, or with fakeredis: on its connections, one at a time.

The client's own retries, callbacks and decoding are passed by; it is neither closed nor changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import hiredis
import redis
import redis.asyncio
from redis import exceptions

from .link import attempt_patience
from .resp import Command, Lost, Reply, pack

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


class AsyncClientLink:
    """Sends what all tasks ask for while a batch is under way as the next batch."""

    def __init__(self, client: redis.asyncio.Redis, deadline: float, *, owned: bool = False) -> None:
        check_client(client, redis.asyncio.Redis)
        self._client = client
        self._owned = owned
        self._patience = attempt_patience(deadline)
        self._queue: list[tuple[Sequence[Command], asyncio.Future[list[Reply]]]] = []
        self._pump: asyncio.Task[None] | None = None

    async def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        """Return the commands' replies: see `AsyncLink`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Reply]] = loop.create_future()
        self._queue.append((commands, future))
        if self._pump is None or self._pump.done():
            self._pump = loop.create_task(self._run())
        try:
            async with asyncio.timeout_at(expires):
                return await future
        except TimeoutError:
            raise Lost("no answer in time", sent=True) from None

    async def close(self) -> None:
        """Let go of the client; a client of the caller's stays open."""
        if self._pump is not None:
            self._pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._pump
        if self._owned:
            await self._client.aclose()

    async def _run(self) -> None:
        while self._queue:
            batch, self._queue = self._queue, []
            sent = False
            try:
                async with asyncio.timeout(self._patience), self._connection() as connection:
                    sent = True
                    packed = [pack(commands) for commands, _ in batch]
                    await connection.send_packed_command(packed, check_health=False)
                    for commands, future in batch:
                        replies = [await self._reply(connection) for _ in commands]
                        if not future.done():
                            future.set_result(replies)
            except (OSError, TimeoutError, exceptions.RedisError) as exc:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(Lost(f"the client failed: {type(exc).__name__}", sent=sent))

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        pool: Any = self._client.connection_pool
        connection = await pool.get_connection()
        try:
            yield connection
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)

    @staticmethod
    async def _reply(connection: Any) -> Reply:
        try:
            return await connection.read_response(disable_decoding=True)
        except (exceptions.ResponseError, exceptions.BusyLoadingError) as error:
            return _as_reply(error)


class BlockingClientLink:
    """Borrows a connection for each call, so that threads don't meet."""

    def __init__(self, client: redis.Redis, deadline: float, *, owned: bool = False) -> None:
        check_client(client, redis.Redis)
        self._client = client
        self._owned = owned
        self._patience = attempt_patience(deadline)

    def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        """Return the commands' replies: see `BlockingLink`."""
        until = min(expires, time.monotonic() + self._patience)
        sent = False
        try:
            with self._connection() as connection:
                sent = True
                connection.send_packed_command([pack(commands)], check_health=False)
                return [self._reply(connection, until) for _ in commands]
        except (OSError, exceptions.RedisError) as exc:
            raise Lost(f"the client failed: {type(exc).__name__}", sent=sent) from exc

    def close(self) -> None:
        """Let go of the client; a client of the caller's stays open."""
        if self._owned:
            self._client.close()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Any]:
        pool: Any = self._client.connection_pool
        connection: Any = pool.get_connection()
        try:
            yield connection
        except BaseException:
            connection.disconnect()
            raise
        finally:
            pool.release(connection)

    @staticmethod
    def _reply(connection: Any, until: float) -> Reply:
        try:
            remaining = max(0.001, until - time.monotonic())
            return connection.read_response(disable_decoding=True, timeout=remaining)
        except (exceptions.ResponseError, exceptions.BusyLoadingError) as error:
            return _as_reply(error)


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
