"""The virtual time, and what is to be done when."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from typing import Any

EPOCH = 4_000_000_000  # seconds since 1970: ahead of the server's own clock


class Clock:
    """What the modules under test take for `time`; it stands still until it is advanced."""

    def __init__(self) -> None:
        self.now = 0.0
        self._asked = 0
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._number = 0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return EPOCH + self.now

    def time_ns(self) -> int:
        """Never the same twice, as a real one."""
        self._asked += 1
        return round(self.time() * 1000) * 1_000_000 + self._asked

    def milliseconds(self) -> int:
        """Return the server's time."""
        return int((EPOCH + self.now) * 1000)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def at(self, moment: float, action: Callable[[], object]) -> None:
        """Have an action done when the time has come; it finds out by itself whether it still matters."""
        self._number += 1
        heapq.heappush(self._timers, (moment, self._number, action))

    def advance(self, seconds: float) -> None:
        """Let time pass, and do what falls due, each at its time."""
        self.advance_to(self.now + seconds)

    def advance_to(self, until: float) -> None:
        """Let time pass until then."""
        while self._timers and self._timers[0][0] <= until:
            moment, _, action = heapq.heappop(self._timers)
            self.now = max(self.now, moment)
            action()
        self.now = max(self.now, until)

    def next(self) -> float:
        """Return when something falls due."""
        return self._timers[0][0] if self._timers else float("inf")
