"""What a workload asks of a store. Only the standard library: this runs in every store's environment."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

Turn = dict[str, Any]
"""A turn as every store gets it: about 500 bytes of JSON. Stores of text get that JSON as the text."""

_WORDS = (  # noqa: SIM905  # a list of so many words is no easier to read
    "the a to of in is and that it for this with when not from are as be on by if we then which value field test "
    "module function return error index session cache request handler parser config default argument import branch"
).split()
_CONTENTS = [" ".join(random.Random(n).choices(_WORDS, k=60)) for n in range(100)]


def turn(number: int, owner: str = "") -> Turn:
    """Return a turn that is the same for the same number and owner; its id names both."""
    return {
        "id": f"{owner}:{number}:0123456789abcdef",
        "timestamp_ms": 1_750_000_000_000 + number * 1000,
        "role": "assistant" if number % 2 else "user",
        "content": _CONTENTS[number % len(_CONTENTS)],
        "tool_calls": [],
        "tags": ["benchmark"],
        "metadata": {"model": "some-model-1", "tokens": number % 1000},
    }


class Store:
    """Keeps sessions. What it has no way to do is named in `cannot`, with the reason."""

    blocking: ClassVar[bool] = False  # its methods never await: many callers are as many threads
    serverless: ClassVar[bool] = False
    cannot: ClassVar[dict[str, str]] = {}  # "tail", "newest": a sentence

    async def open(self, url: str, folder: str) -> None:
        """Connect to the server at `url`, or use the empty folder."""
        raise NotImplementedError

    async def close(self) -> None:
        """Disconnect."""

    async def create(self, id: str, turns: Sequence[Turn]) -> None:
        """Store a new session; in the quickest way that the store has."""
        raise NotImplementedError

    async def append(self, id: str, turn: Turn) -> None:
        """Add one turn; return when it is acknowledged."""
        raise NotImplementedError

    async def load(self, id: str) -> Sequence[Any]:
        """Return all turns, decoded into what the store's users work with."""
        raise NotImplementedError

    async def tail(self, id: str, count: int) -> Sequence[Any]:
        """Return the last turns without loading all."""
        raise NotImplementedError

    async def newest(self, count: int) -> list[str]:
        """Return the ids of the sessions changed last, newest first."""
        raise NotImplementedError

    async def watch(self, seen: Callable[[], None]) -> None:
        """Call `seen` for each change that a peer made, as it comes; without end."""
        raise NotImplementedError

    async def announce(self, id: str, turn: Turn) -> None:
        """Make a change that a watching peer is told of."""
        await self.append(id, turn)

    def turn_id(self, turn: Any) -> str:
        """Return the id of a turn that `load` returned."""
        raise NotImplementedError
