"""A TCP proxy in a thread of its own, whose behaviour is changed while connections are open."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import re
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

__all__ = [
    "BLACKHOLE",
    "HOLD",
    "MODES",
    "PASS",
    "REFUSE",
    "SWALLOW",
    "TRICKLE",
    "Mode",
    "Proxy",
    "delay",
    "late",
    "mid_command",
    "mid_reply",
]

T = TypeVar("T")
_SUBSCRIBE = re.compile(rb"\*\d+\r\n\$9\r\nSUBSCRIBE\r\n")
_CHUNK = 65536


@dataclass(frozen=True)
class Mode:
    """What the proxy does to a connection. "Up" is from the client to the server."""

    name: str
    delay: float = 0.0  # seconds for each chunk, both ways
    late: float = 0.0  # seconds for each chunk up; it arrives even when the client has gone meanwhile
    hold: bool = False  # nothing passes until the mode changes, then everything does
    drop_up: bool = False
    drop_down: bool = False
    refuse: bool = False  # reset at once
    cut_up: int | None = None  # close after so many bytes of the next chunk
    cut_down: int | None = None
    trickle: bool = False  # a few bytes at a time


PASS = Mode("pass")
REFUSE = Mode("refuse", refuse=True)
HOLD = Mode("hold", hold=True)
BLACKHOLE = Mode("blackhole", drop_up=True, drop_down=True)
SWALLOW = Mode("swallow replies", drop_down=True)
TRICKLE = Mode("trickle", trickle=True)


def delay(seconds: float) -> Mode:
    """Slow both ways."""
    return Mode("delay", delay=seconds)


def late(seconds: float) -> Mode:
    """What the client sends arrives late, even if the client has given the connection up."""
    return Mode("late", late=seconds)


def mid_reply(count: int) -> Mode:
    """Cut after some bytes of the next reply."""
    return Mode("cut in mid-reply", cut_down=count)


def mid_command(count: int) -> Mode:
    """Cut after some bytes of the next command."""
    return Mode("cut in mid-command", cut_up=count)


MODES = ("pass", "refuse", "hold", "blackhole", "swallow replies", "trickle", "delay", "late", "cut in mid-reply",
         "cut in mid-command")  # fmt: skip


class _Pair:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, mode: Mode, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.mode = mode
        self.client = client
        self.server = server
        self.changed = asyncio.Event()
        self.feed = False  # it has subscribed to a channel
        self.torn = {True: False, False: False}  # by direction, up is True: bytes were dropped, so nothing more passes

    def set(self, mode: Mode) -> None:
        self.mode = mode
        self.changed.set()
        if mode.refuse:
            self.abort()

    def abort(self) -> None:
        self.client.transport.abort()
        self.server.transport.abort()


class Proxy:
    """Stands before 127.0.0.1:target; `port` is its own. Its methods may be called from any thread.

    A new `target` is that of new connections. With `tls` it speaks TLS to clients, for servers that don't.
    """

    def __init__(self, target: int, tls: ssl.SSLContext | None = None) -> None:
        self.port = 0
        self.target = target
        self._tls = tls
        self._mode = PASS  # of new connections
        self._pairs: set[_Pair] = set()
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="proxy", daemon=True)
        self._thread.start()
        started.wait()

    def strike(self, mode: Mode, *, existing: float = 1.0, new: bool = False, feeds: bool = False) -> None:
        """Put a share of the open connections (one at least, unless it is 0), or those to come, into a mode.

        With `feeds` only those that have subscribed to a channel.
        """

        def do() -> None:
            if new:
                self._mode = mode
            pairs = [pair for pair in self._pairs if pair.feed or not feeds]
            for pair in random.sample(pairs, math.ceil(existing * len(pairs))):
                pair.set(mode)

        self._call(do)

    def heal(self) -> None:
        """Let everything pass. A connection of which bytes were dropped stays mute."""
        self.strike(PASS, new=True)

    def cut(self, existing: float = 1.0) -> None:
        """Reset a share of the open connections."""
        self.strike(REFUSE, existing=existing)

    def connections(self) -> int:
        """How many are open."""
        return self._call(lambda: len(self._pairs))

    def close(self) -> None:
        """Reset all connections and end the thread."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, do: Callable[[], T]) -> T:
        async def wrapped() -> T:
            return do()

        return asyncio.run_coroutine_threadsafe(wrapped(), self._loop).result()

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)

        async def listen() -> None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1000, ssl=self._tls)
            self.port = self._server.sockets[0].getsockname()[1]
            started.set()

        self._loop.run_until_complete(listen())
        self._loop.run_forever()

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        for _ in range(3):  # connections that were being accepted come late
            for pair in list(self._pairs):
                pair.abort()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.sleep(0.01)  # the transports' last callbacks

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode.refuse:
            writer.transport.abort()
            return
        try:
            back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except BaseException as exc:
            writer.transport.abort()
            if isinstance(exc, OSError):
                return
            raise
        pair = _Pair(self._mode, writer, back_writer)
        self._pairs.add(pair)
        try:
            await asyncio.gather(
                self._pump(pair, reader, back_writer, up=True), self._pump(pair, back_reader, writer, up=False)
            )
        finally:
            self._pairs.discard(pair)
            pair.abort()

    async def _pump(self, pair: _Pair, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                pair.feed = pair.feed or (up and _SUBSCRIBE.search(data) is not None)
                with contextlib.suppress(OSError):  # what goes the other way may still be wanted
                    await self._carry(pair, data, writer, up=up)
        # In a blackhole the end isn't heard of either.
        while not up and (pair.mode.hold or pair.mode.drop_down):
            pair.changed.clear()
            await pair.changed.wait()
        if up or not pair.torn[False]:
            with contextlib.suppress(OSError):
                writer.close()

    async def _carry(self, pair: _Pair, data: bytes, writer: asyncio.StreamWriter, *, up: bool) -> None:
        while pair.mode.hold:
            pair.changed.clear()
            await pair.changed.wait()
        mode = pair.mode
        if pause := mode.delay + (mode.late if up else 0.0):
            await asyncio.sleep(pause)
        if pair.torn[up] or (mode.drop_up if up else mode.drop_down):
            pair.torn[up] = True
            return
        if writer.transport.is_closing():
            return
        if (cut := mode.cut_up if up else mode.cut_down) is not None:
            writer.write(data[:cut])
            pair.torn = {True: True, False: True}
            pair.client.close()
            pair.server.close()
            return
        if mode.trickle and len(data) < 4096:
            while data and not writer.transport.is_closing():
                size = random.randint(1, 64)
                writer.write(data[:size])
                data = data[size:]
                await asyncio.sleep(0.0005)
            return
        writer.write(data)
        await writer.drain()
