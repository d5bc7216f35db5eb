"""A handle that belongs to no event loop: a store for each loop that asks for one, and a blocking one for threads."""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack, overload
from weakref import WeakKeyDictionary, WeakSet

from ..errors import StorageError, UnavailableError
from ..interrupts import interruption, raise_interruption
from ..model.asset import SessionAsset
from ..protocol.attempts import copy_of_error, without_traceback
from ..transport.address import FileFolder, MemoryName, Target
from ..transport.network import in_thread
from .files import LocalFileStore
from .options import OptionArguments, Options, check_arguments
from .redis import RedisSessionStore

if TYPE_CHECKING:
    from .blocking import redis

__all__ = ["StorePool"]

A = TypeVar("A", bound=SessionAsset)


class StorePool(Generic[A]):
    """A handle on a place where sessions are, which belongs to no event loop, thread or process.

    It is made anywhere, at import time too, and opens nothing: `store()` does, once for each event loop, and
    `blocking()`, once for all threads. In a fork of the process both open anew.

    A loop's store is closed with its loop, by `asyncio.run` and all that ends a loop as it does (asyncio.Runner,
    pytest, uvicorn), or before by `aclose`. A closed pool opens again when it is asked again. Keep it as long as you
    use its stores: what it has opened in a loop is closed when it is gone.
    """

    @overload
    def __init__(self: StorePool[SessionAsset], url: str | None = None, **options: Unpack[OptionArguments]) -> None: ...

    @overload
    def __init__(self, url: str | None = None, *, asset_type: type[A], **options: Unpack[OptionArguments]) -> None: ...

    def __init__(self, url: str | None = None, **options: Any) -> None:
        """Check the arguments, without I/O.

        Args:
            url: as of `open_store`, no path; without it, that of $ORCS_REDIS_URL, else `embedded:`. The stores of one
                pool at `memory://` share their data. At a `file:` URL they are LocalFileStores.
            options: those of `open_store`, without `client`: a client belongs to a loop.

        Raises:
            ValueError, TypeError: a URL or option that can't be, or that means nothing for this kind of store.

        """
        if isinstance(url, os.PathLike):
            raise TypeError("a pool takes a URL: file:///path/to/dir for a folder")
        checked, target = check_arguments("StorePool", url, None, options)
        if target == MemoryName(""):
            target = MemoryName(f"\0{secrets.token_hex(8)}")  # no URL has such a name
        self._options: Options[A] = checked
        self._target = target
        self._inherited: list[object] = []  # what a parent process has opened: its sockets are not ours to close
        self._begin()
        _pools.add(self)

    def _begin(self) -> None:
        options, target = self._options, self._target
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopStore[A]] = WeakKeyDictionary()
        self._threads: _ThreadStore[A] = _ThreadStore(partial(_connect_blocking, options, target))

    def _begin_in_child(self) -> None:
        self._inherited.append((dict(self._loops), self._threads))
        self._begin()

    async def store(self) -> RedisSessionStore[A]:
        """Return this loop's store, opened by the first call; it is the same until it is closed.

        Tasks that ask meanwhile wait for that one opening, which goes on if one of them is cancelled. If it fails, each
        of them gets its error, and the next call tries again. Raises what `open_store` raises.
        """
        loop = asyncio.get_running_loop()
        mine = self._loops.get(loop)
        if mine is None:
            self._drop_ended()
            mine = self._loops[loop] = _LoopStore(partial(_connect, self._options, self._target))
        return await mine.get()

    def blocking(self) -> redis.RedisSessionStore[A]:
        """Return the blocking store, the same for all threads; as `store` does."""
        return self._threads.get()

    async def aclose(self) -> None:
        """Close this loop's store, and the blocking one. Those of other loops are closed with their loops.

        The stores raise UnavailableError from then on; the pool opens others when it is asked again.
        """
        self._drop_ended()
        mine = self._loops.pop(asyncio.get_running_loop(), None)
        try:
            if mine is not None:
                await mine.aclose()
        finally:
            await in_thread(self._threads.close, discard=lambda _: None)

    def close(self) -> None:
        """Close the blocking store; see `aclose`. Those of loops are closed with their loops."""
        self._drop_ended()
        self._threads.close()

    def _drop_ended(self) -> None:
        """Let go of the stores of loops that were closed without closing what was in them."""
        for reference in self._loops.keyrefs():
            loop = reference()
            if loop is not None and loop.is_closed():
                self._loops.pop(loop, None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} namespace={self._options.namespace!r}>"


class _LoopStore(Generic[A]):
    """The store of one loop.

    It lives in an async generator: a loop closes those that it has when it ends (`shutdown_asyncgens`), after all tasks
    have ended, and one that is let go.
    """

    def __init__(self, connect: Callable[[], Awaitable[RedisSessionStore[A]]]) -> None:
        self._connect = connect
        self._store: RedisSessionStore[A] | None = None
        self._opening: asyncio.Task[None] | None = None
        self._lifetime: AsyncGenerator[None, None] | None = None

    async def get(self) -> RedisSessionStore[A]:
        while (store := self._store) is None or _is_closed(store):
            if self._opening is None:
                self._opening = asyncio.get_running_loop().create_task(self._open())
                # Those who wait raise its failure; there may be none left.
                self._opening.add_done_callback(lambda task: task.cancelled() or task.exception())
            opening = self._opening
            await asyncio.wait([opening])
            if opening.cancelled():
                raise UnavailableError("the pool was closed while it opened the store")
            error = opening.exception()
            if isinstance(error, StorageError) and interruption(error) is None:
                raise copy_of_error(error)
            opening.result()
        return store

    async def aclose(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        if self._lifetime is not None:
            await self._lifetime.aclose()

    async def _open(self) -> None:
        try:
            if self._lifetime is not None:  # its user has closed the store
                await self._lifetime.aclose()
            lifetime = self._live()
            await anext(lifetime)
            self._lifetime = lifetime
        finally:
            self._opening = None

    async def _live(self) -> AsyncGenerator[None, None]:
        store = self._store = await self._connect()
        try:
            yield
        finally:
            self._store = self._lifetime = None  # they refer to the loop, which nothing here is to keep
            await store.aclose()


class _ThreadStore(Generic[A]):
    """The store of all threads."""

    def __init__(self, connect: Callable[[], redis.RedisSessionStore[A]]) -> None:
        self._connect = connect
        self._lock = threading.RLock()  # a signal handler may want the store, too
        self._store: redis.RedisSessionStore[A] | None = None
        self._error: StorageError | None = None
        self._failed_at = -math.inf

    def get(self) -> redis.RedisSessionStore[A]:
        if (store := self._store) is not None and not _is_closed(store):
            return store
        asked = time.monotonic()
        with self._lock:
            if (store := self._store) is None or _is_closed(store):
                if self._error is not None and self._failed_at > asked:
                    raise copy_of_error(self._error)  # a dead server is waited for once
                store = self._open()
        return store

    def _open(self) -> redis.RedisSessionStore[A]:
        try:
            opened = self._connect()
        except StorageError as error:
            raise_interruption(error)
            self._error, self._failed_at = without_traceback(copy_of_error(error)), time.monotonic()
            raise
        store, self._error = self._store, None
        if store is not None and not _is_closed(store):  # a signal handler was here
            opened.close()
            return store
        self._store = opened
        return opened

    def close(self) -> None:
        with self._lock:
            store, self._store = self._store, None
        if store is not None:
            store.close()


async def _connect(options: Options[Any], target: Target | None) -> Any:
    if isinstance(target, FileFolder):
        return LocalFileStore(target.path, asset_type=options.asset_type)
    return await RedisSessionStore._open(options, target, None)


def _connect_blocking(options: Options[Any], target: Target | None) -> Any:
    from .blocking import files, redis  # asyncio programs don't need them

    if isinstance(target, FileFolder):
        return files.LocalFileStore(target.path, asset_type=options.asset_type)
    return redis.RedisSessionStore._open(options, target, None)


def _is_closed(store: RedisSessionStore[Any] | redis.RedisSessionStore[Any]) -> bool:
    """Whether its user has closed it; one of files can be used all the same."""
    core = getattr(store, "_core", None)
    return core is not None and core.lifecycle.closed


_pools: WeakSet[StorePool[Any]] = WeakSet()


def _after_fork() -> None:
    for pool in tuple(_pools):
        pool._begin_in_child()


os.register_at_fork(after_in_child=_after_fork)
