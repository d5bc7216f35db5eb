"""A blocking store that a signal interrupts in whatever it is doing."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import orcs_redis.sync
from orcs_redis import SessionAsset

__all__ = ["STRUCK", "Inline", "Swallowed"]

T = TypeVar("T")


class Struck(Exception):
    """What the signal's handler raises, as a framework's time limit does."""


class StruckInTime(TimeoutError):
    """The same, of a kind that libraries take for a lost connection."""


class StruckByKey(KeyboardInterrupt):
    """The same, as Ctrl-C."""


STRUCK = (Struck, StruckInTime, StruckByKey)


class Swallowed(Exception):
    """A call went on, or failed in another way, though the handler had raised."""


class Inline:
    """A blocking store with the asyncio one's methods. While one of them runs, SIGURG makes it raise."""

    def __init__(self, store: orcs_redis.sync.RedisSessionStore[SessionAsset], rng: random.Random) -> None:
        self._store = store
        self._rng = rng
        self._running = self._struck = False
        signal.signal(signal.SIGURG, self._strike)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if not callable(method):
            return method

        async def call(*args: Any, **options: Any) -> Any:
            return self.run(partial(method, *args, **options))

        return call

    def lease(self, *args: Any, **options: Any) -> InlineLeasing:
        return InlineLeasing(self, self._store.lease(*args, **options))

    async def aclose(self) -> None:
        self._store.close()

    def run(self, call: Callable[[], T]) -> T:
        """Call, and see to it that nobody swallows what the handler raises."""
        self._struck = False
        self._running = True
        try:
            result = call()
        except BaseException as error:
            self._running = False
            if self._struck and not isinstance(error, STRUCK):
                raise Swallowed(repr(error)) from error
            raise
        self._running = False
        if self._struck:
            raise Swallowed
        return result

    def _strike(self, *_: object) -> None:
        if self._running and not self._struck:
            self._struck = True
            raise self._rng.choice(STRUCK)


class InlineLeasing:
    """A blocking store's `lease`, awaited."""

    def __init__(self, store: Inline, leasing: Any) -> None:
        self._store = store
        self._leasing = leasing

    async def __aenter__(self) -> Any:
        return self._store.run(self._leasing.__enter__)

    async def __aexit__(self, *error: object) -> None:
        self._store.run(partial(self._leasing.__exit__, *error))
