"""Whether the other side of a connection still says something."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Silence"]


class Silence:
    """Notices that nothing comes over a connection, in time during which this loop was not busy with something else."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout: float, look: Callable[[], bool]) -> None:
        """`look` is called from time to time while the watch is on, and returns whether it is to go on."""
        self._loop = loop
        self._attempt_timeout = timeout
        self._look = look
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.last_received = 0.0  # when the other side last showed that it is there

    def start(self) -> None:
        """Begin to look, if that is not under way."""
        if self._timer is None:
            self._due = self._loop.time() + self._attempt_timeout / 10
            self._timer = self._loop.call_at(self._due, self._tick)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def too_long(self) -> bool:
        """Whether the other side has been silent for too long."""
        return self._loop.time() - self.last_received > self._attempt_timeout

    def _tick(self) -> None:
        self._timer = None
        now = self._loop.time()
        # While this loop was late, nothing could be received.
        self.last_received = min(now, self.last_received + now - self._due)
        if self._look():
            self.start()
