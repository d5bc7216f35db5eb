"""Processes of their own that work at a folder, and are killed: test_hybrid_faults.py runs them."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import redis

import orcs_redis
import orcs_redis.sync
from orcs_redis import ConversationTurn
from orcs_redis.transport import driver, threads

from .support import until

__all__ = ["append_often", "killed_at_a_call", "killed_at_a_write", "start"]

# The calls of C that change something that lasts, or make it last.
_LASTING = {
    "commit", "execute", "executemany", "executescript", "fsync", "ftruncate", "link", "mkdir", "open", "remove",
    "rename", "replace", "unlink", "write",
}  # fmt: skip
_OWNERS = {"posix", "_io", "sqlite3"}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


def start(function: Callable[..., None], *arguments: Any) -> Any:
    """Start a process that calls a function of this module."""
    process = _context.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def _run(form: str, folder: Path, url: str, namespace: str, work: Callable[[Any], Any], **options: Any) -> None:
    """Open a store in a form, and let it do something."""
    if form == "async":

        async def main() -> None:
            async with orcs_redis.HybridSessionStore(folder, url, namespace=namespace, **options) as store:
                await work(store)

        asyncio.run(main())
    else:
        with orcs_redis.sync.HybridSessionStore(folder, url, namespace=namespace, **options) as store:
            work(store)


def killed_at_a_write(form: str, folder: Path, url: str, namespace: str, count: int) -> None:
    """Run a round that ends with kill -9 as soon as the reply of so many writes is there: before it is noted."""
    raw: Any = redis.Redis.from_url(url)

    def revision() -> int:
        return int(raw.hget(f"{{{namespace}/0}}:state", "revision") or 0)

    at = revision() + count

    def strike() -> None:
        if revision() >= at:
            os.kill(os.getpid(), signal.SIGKILL)

    send, together, alone = driver.Driver.send, threads.Driver._send_together, threads.Driver.send

    async def struck_send(self: Any, *arguments: Any) -> Any:
        result = await send(self, *arguments)
        strike()
        return result

    def struck_together(self: Any, *arguments: Any) -> Any:
        result = together(self, *arguments)
        strike()
        return result

    def struck_alone(self: Any, *arguments: Any) -> Any:
        result = alone(self, *arguments)
        strike()
        return result

    for kind, name, struck in (
        (driver.Driver, "send", struck_send),
        (threads.Driver, "_send_together", struck_together),
        (threads.Driver, "send", struck_alone),
    ):
        setattr(kind, name, struck)
    _run(form, folder, url, namespace, lambda store: store.sync(), live=False)


def _is_lasting(function: Any) -> bool:
    owner = function.__module__ or type(function.__self__).__module__
    return function.__name__ in _LASTING and owner in _OWNERS


def killed_at_a_call(form: str, folder: Path, url: str, namespace: str, count: int) -> None:
    """Run a round that ends with kill -9 before the so manieth call that changes something that lasts."""
    left = count
    package = str(Path(orcs_redis.__file__).parent / "stores")

    def strike() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and frame.f_code.co_filename.startswith(package) and _is_lasting(argument):
            strike()

    def listen(event: str, arguments: Any) -> None:
        if event == "ctypes.call_function":
            strike()

    def work(store: Any) -> Any:
        sys.addaudithook(listen)
        threading.setprofile(note)
        sys.setprofile(note)
        return store.sync()

    _run(form, folder, url, namespace, work, live=False)


def append_often(form: str, folder: Path, url: str, namespace: str, name: str, count: int) -> None:
    """Append turns to "s", live, and leave when they are all there."""
    turns = [ConversationTurn.user(f"{name} {n}") for n in range(count)]

    async def work(store: Any) -> None:
        for turn in turns:
            await store.append("s", turn)
        await until(lambda: not store.sync_status().pending_uploads)

    def work_blocking(store: Any) -> None:
        for turn in turns:
            store.append("s", turn)
        asyncio.run(until(lambda: not store.sync_status().pending_uploads))

    _run(form, folder, url, namespace, work if form == "async" else work_blocking)
