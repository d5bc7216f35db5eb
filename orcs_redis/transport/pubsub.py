"""Pub/sub: one connection for what is published, with a liveness check of its own.

A message is a hint. What is true is in the keys: whenever messages may have been missed, every listener is asked to
look for itself. A blocking store runs the same code in a dedicated thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import hiredis

from ..errors import StorageError, UnavailableError
from ..interrupts import interruption, raise_interruption
from ..protocol.attempts import AttemptError, ConnectionLost, WrongServer, check
from ..protocol.commands import Reply
from ..protocol.request import Listener
from .address import Address
from .base import OnMessage, Prepare, PubSub
from .multiplexed import Connection, connect
from .role import ASK_ROLE, Role

__all__ = ["Background", "Subscription", "open_pubsub"]

_FIRST_DELAY = 0.01  # seconds
_LONGEST_DELAY = 60.0  # until a refused subscription is tried again
_MAX_CHANNELS = 1000  # in one command
_log = logging.getLogger("orcs_redis")

OpenPubSub = Callable[[OnMessage, float], Awaitable[PubSub]]


class Subscription:
    """The channels that somebody in this process listens to; connected while there are any."""

    def __init__(self, open_pubsub: OpenPubSub, heartbeat: float) -> None:
        self._open_pubsub = open_pubsub
        self._heartbeat = heartbeat
        self._listeners: dict[str, list[Listener]] = {}
        self._pubsub: PubSub | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._ending: set[asyncio.Task[None]] = set()

    def listen(self, listeners: Mapping[str, Listener]) -> None:
        """Call each channel's listener with its messages, and with None when it has to look for itself."""
        if self._closed:
            return
        new = []
        for channel, listener in listeners.items():
            present = self._listeners.setdefault(channel, [])
            present.append(listener)
            if len(present) == 1:
                new.append(channel)
            else:  # it may be confirmed already, and what came before it was added is lost
                listener(None)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        elif self._pubsub is not None:
            self._subscribe(self._pubsub, new)

    def leave(self, listeners: Mapping[str, Listener]) -> None:
        """Call them no more."""
        left = []
        for channel, listener in listeners.items():
            present = self._listeners.get(channel, [])
            if listener in present:
                present.remove(listener)
                if not present:
                    del self._listeners[channel]
                    left.append(channel)
        if left and self._listeners and self._pubsub is not None:
            self._pubsub.unsubscribe(left)
        if not self._listeners and self._task is not None:
            self._end(self._task)
            self._task = None

    async def close(self) -> None:
        """Close the connection; nobody is called any more."""
        self._closed = True
        for channel in self._listeners:
            self._deliver(channel, None)  # those who wait for a message wait in vain
        self._listeners.clear()
        task, self._task = self._task, None
        if task is not None:
            self._end(task)
        if self._ending:
            await asyncio.wait(self._ending)

    def _end(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    @staticmethod
    def _subscribe(pubsub: PubSub, channels: Iterable[str]) -> None:
        rest = iter(channels)
        while chunk := list(itertools.islice(rest, _MAX_CHANNELS)):
            pubsub.subscribe(chunk)

    def _deliver(self, channel: str, message: bytes | None) -> None:
        for listener in tuple(self._listeners.get(channel, ())):
            try:
                listener(message)
            except Exception as error:  # a message that is none of ours: whatever it was to say can be looked for
                raise_interruption(error)
                listener(None)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        pause = refusal = _FIRST_DELAY
        logged = ""
        while True:
            began = loop.time()
            try:
                pubsub = await self._open_pubsub(self._deliver, self._heartbeat)
                pause, self._pubsub = _FIRST_DELAY, pubsub
                try:
                    self._subscribe(pubsub, self._listeners)
                    await pubsub.watch()
                finally:
                    self._pubsub = None
                    await pubsub.close()
            except (AttemptError, UnavailableError):
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, 0.5)
            except Exception as exc:  # no rights, say
                if (found := interruption(exc)) is not None:  # it is not ours to keep
                    loop.call_exception_handler({"message": "a signal handler raised", "exception": found})
                    continue
                problem = str(exc) if isinstance(exc, StorageError) else type(exc).__name__
                if problem != logged:
                    _log.warning("nothing is received of changes, they are looked for every second: %s", problem)
                    logged = problem
                refusal = 1.0 if loop.time() > began + _LONGEST_DELAY else min(2 * max(refusal, 0.5), _LONGEST_DELAY)
                expires = loop.time() + refusal
                while loop.time() < expires:
                    for channel in tuple(self._listeners):
                        self._deliver(channel, None)
                    await asyncio.sleep(1)


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
    pubsub.connection = await connect(address, heartbeat / 2, prepare, role, pubsub.on_push)
    return pubsub


class _SocketPubSub:
    connection: Connection

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

    def subscribe(self, channels: Sequence[str]) -> None:
        self.connection.send([("SUBSCRIBE", *channels)])

    def unsubscribe(self, channels: Sequence[str]) -> None:
        self.connection.send([("UNSUBSCRIBE", *channels)])

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


class Background:
    """An event loop in a thread, for what a blocking store receives while its caller does something else."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="orcs-redis", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function in the loop, without waiting for it; once closed, there is nothing left to call it for."""
        if os.getpid() == self._pid:  # in a forked child there is no thread, and waking it would wake the parent's
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(function, *arguments)

    def close(self, last: Callable[[], Awaitable[None]], expires: float) -> None:
        """Run `last`, and end the thread; wait for that, but not beyond `expires`, in seconds of time.monotonic()."""

        async def finish() -> None:
            try:
                await last()
            finally:
                self._loop.stop()

        asyncio.run_coroutine_threadsafe(finish(), self._loop)
        # Who closes it may be a finalizer in that thread, or a signal handler whose thread keeps it waiting.
        if threading.current_thread() is not self._thread:
            self._thread.join(max(0.0, expires - time.monotonic()))

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()
