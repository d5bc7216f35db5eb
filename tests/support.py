"""What several test modules need and is no fixture."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from orcs_redis import ConversationTurn


def turn(content: str = "x") -> ConversationTurn:
    return ConversationTurn.user(content)


async def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.005)
