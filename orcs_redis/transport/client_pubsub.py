"""What is published, received by a pub/sub object of a redis-py client or of fakeredis."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

from redis import exceptions

from ..protocol.attempts import AttemptTimeout, ConnectionLost
from .base import OnMessage
from .client_connections import failure_of

__all__ = ["ClientPubSub"]

Ask: TypeAlias = Callable[[], Awaitable[object]]
IsDropped: TypeAlias = Callable[[float], bool]


class ClientPubSub:
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
        self._orders: deque[tuple[str, Sequence[str]]] = deque()
        self._channels: set[str] = set()
        self._busy: asyncio.Future[Any] | None = None

    def subscribe(self, channels: Sequence[str]) -> None:
        """Ask for channels, soon."""
        self._orders.append(("subscribe", channels))

    def unsubscribe(self, channels: Sequence[str]) -> None:
        """Ask for no more of channels, soon."""
        self._orders.append(("unsubscribe", channels))

    async def watch(self) -> None:
        """Do what was asked for and deliver what comes: see `PubSub`."""
        last_received = asked = asked_link = time.monotonic()
        try:
            while True:
                if time.monotonic() - asked_link > self._heartbeat / 2:
                    await self._ask()
                    asked_link = time.monotonic()
                if self._is_dropped(self._opened):
                    raise ConnectionLost("the client's connection leads to a wrong server", sent=False)
                while self._orders:
                    verb, channels = self._orders.popleft()
                    (self._channels.update if verb == "subscribe" else self._channels.difference_update)(channels)
                    await self._call(verb, *channels)
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
            failure = failure_of(exc, sent=False)
        raise failure

    async def close(self) -> None:
        """Close the connection, when the call that is under way has ended."""
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
