"""Made-up sessions that look like real ones: the same for the same seed, no two alike."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from pathlib import Path

from orcs_redis import ConversationTurn, LearnedFact, SessionAsset, ToolCallRecord

SAMPLES = Path(__file__).parents[3] / "shared/data/sessions"
"""Real sessions, if they are there."""

_START_MS = 1_750_000_000_000
_WORDS = (  # noqa: SIM905  # a list of so many words is no easier to read
    "the a to of in is and that it for this with when not from are as be on by if we then which value field test "
    "module function return error index session cache request handler parser config default argument import branch "
    "commit revert patch diff stack trace timeout retry socket buffer decode encode schema migrate query table "
    "column deploy container volume metric latency throughput lock thread async await future loop event stream "
    "cursor offset batch partition replica failover snapshot checksum assertion fixture coverage refactor rename "
    "signature annotation generic protocol iterator dictionary tuple exception traceback"
).split()
_TOOLS = ("read_file", "search", "run_tests", "edit_file", "shell")


class Source:
    """A stream of sessions and turns."""

    def __init__(self, seed: int = 1) -> None:
        self._random = random.Random(seed)
        self._now = _START_MS

    def text(self, size: int) -> str:
        """Return words, numbers and names of about so many characters."""
        rng, words, length = self._random, list[str](), 0
        while length < size:
            word = rng.choice(_WORDS)
            roll = rng.random()
            if roll < 0.08:
                word = f"`{word}_{rng.choice(_WORDS)}`"
            elif roll < 0.14:
                word = f"src/{word}/{rng.choice(_WORDS)}.py:{rng.randrange(900)}"
            elif roll < 0.2:
                word += rng.choice((".\n", ",", ":", ".", "\n\n"))
            words.append(word)
            length += len(word) + 1
        return " ".join(words)

    def turn(self, n: int) -> ConversationTurn:
        """Return a session's n-th turn: about 420 bytes of msgpack, 490 of JSON."""
        rng = self._random
        self._now += rng.randrange(500, 30_000)
        turn = ConversationTurn(
            id=str(uuid.UUID(int=rng.getrandbits(128), version=4)),
            timestamp_ms=self._now,
            role="assistant" if n % 2 else "user",
            content=self.text(rng.randrange(60, 280)),
        )
        if n % 2:
            turn.tool_calls.append(
                ToolCallRecord(
                    tool_name=rng.choice(_TOOLS),
                    args={"path": f"src/{rng.choice(_WORDS)}.py", "line": rng.randrange(900)},
                    result=self.text(rng.randrange(60, 300)),
                    duration_ms=rng.randrange(5000),
                )
            )
            turn.metadata["model"] = "large-2"
            turn.metadata["tokens"] = rng.randrange(4000)
        return turn

    def turns(self, count: int) -> list[ConversationTurn]:
        """Return so many turns."""
        return [self.turn(n) for n in range(count)]

    def session(self, id: str, turns: int) -> SessionAsset:
        """Return a session with so many turns."""
        asset = self.small(id)
        asset.history.turns = self.turns(turns)
        asset.project_context.technologies = self._random.sample(_WORDS, 3)
        for _ in range(3):
            key = self.text(12)
            asset.project_context.learn(
                LearnedFact(key=key, value=self.text(60), source="agent", learned_at_ms=self._now)
            )
        return asset

    def small(self, id: str) -> SessionAsset:
        """Return a session without turns, to fill an index with."""
        asset = SessionAsset.for_project(f"/home/dev/{self._random.choice(_WORDS)}")
        asset.id = id
        asset.created_at_ms = asset.updated_at_ms = self._now = self._now + self._random.randrange(1, 20)
        return asset


def real_sessions(count: int) -> Iterator[SessionAsset]:
    """Yield the real sessions again and again, under ids of their own; nothing if they are not there."""
    texts = [path.read_bytes() for path in sorted(SAMPLES.glob("*.json"))]
    for n in range(count if texts else 0):
        asset = SessionAsset.from_json(texts[n % len(texts)])
        asset.id = f"real-{n}"
        yield asset
