"""How what is to be stored differs from what is known to be stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .baseline import Baseline, turn_id
from .codec import Encoded
from .turns import id_of

__all__ = ["Patch", "TurnsPatch", "compare"]

_MAX_EDITS = 64  # turns changed in place; beyond that it is cheaper to send the history anew
_ALL_TURNS = (0, -1)


class Patch(NamedTuple):
    """What has to be sent so that the stored becomes the new."""

    set: dict[str, bytes]
    removed: list[str]
    turns: TurnsPatch | None  # None: better sent whole

    @property
    def is_empty(self) -> bool:
        """Whether nothing has to be sent."""
        return not (self.set or self.removed) and self.turns is not None and self.turns.is_empty


class TurnsPatch(NamedTuple):
    """What has to be done to a list of turns."""

    keep: tuple[int, int]  # index of the first and last turn to keep, -1: the end
    edits: list[tuple[int, bytes]]  # counted from the first one kept
    pushed: list[bytes]
    moves: bool = False  # turns change their places: nobody else's may have come after them

    @property
    def is_empty(self) -> bool:
        """Whether nothing has to be done."""
        return self.keep == _ALL_TURNS and not self.edits and not self.pushed


def compare(stored: Baseline, new: Encoded) -> Patch:
    """Return how the new differs from the stored."""
    return Patch(
        {name: data for name, data in new.fields.items() if stored.fields.get(name) != data},
        [name for name in stored.fields if name not in new.fields],
        _edited_turns(stored.turns, new.turns) if stored.skipped else _compare_turns(stored.turns, new.turns),
    )


def _edited_turns(old: Sequence[bytes], turns: list[bytes]) -> TurnsPatch | None:
    """Compare the last turns of a history, of which none can be dropped."""
    if len(turns) < len(old):
        return None
    edits = [(i, turn) for i, turn in enumerate(turns[: len(old)]) if old[i] != turn]
    return TurnsPatch(_ALL_TURNS, edits, turns[len(old) :], _moves(old, edits))


def _compare_turns(old: Sequence[bytes], turns: list[bytes]) -> TurnsPatch | None:
    first = 0
    if old and (not turns or old[0] != turns[0]):
        # The oldest turns were dropped (compaction), or the first one was edited.
        first = old.index(turns[0]) if turns and turns[0] in old else 0
    kept = min(len(old) - first, len(turns))
    edits: list[tuple[int, bytes]] = []
    if old[first : first + kept] != turns[:kept]:  # quicker at once: most are the same object
        edits = [(i, turns[i]) for i in range(kept) if old[first + i] != turns[i]]
    removed = next((n for n, (i, turn) in enumerate(edits) if turn_id(old[first + i]) != id_of(turn)), None)
    if removed is not None:
        # From there on turns are others. What others have pushed must not come after them as if they had stayed.
        if len(turns) - edits[removed][0] > _MAX_EDITS:
            return None
        kept, edits = edits[removed][0], edits[:removed]
    if (old and not kept) or len(edits) > _MAX_EDITS:
        return None
    last = -1 if first + kept == len(old) else first + kept - 1
    return TurnsPatch((first, last), edits, turns[kept:], _moves(old[first:], edits))


def _moves(old: Sequence[bytes], edits: list[tuple[int, bytes]]) -> bool:
    return any(turn_id(old[i]) != id_of(turn) for i, turn in edits)
