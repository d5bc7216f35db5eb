"""What an asset was when it was loaded or last saved. It is kept with the asset, for each namespace.

Pickled, it is digests: who unpickles the asset has the values that were not changed, and knows of the others that they
were. Where a digest can't be resolved, both sides have changed the value. Sections of smaller parts go along as they
are, as long as they are small beside the rest; else both sides have changed whatever differs in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from ..model.asset import SessionAsset
from ..model.encoding import attempt, encode
from ..model.sections import ConversationHistory, ConversationTurn, ProjectContext, UserPreferences
from .turns import id_of

__all__ = ["Baseline", "Digest", "baseline_of", "digest", "loaded_turns", "resolved", "set_baseline", "turn_id"]

_DIGEST_BYTES = 8
_KEPT_BYTES = 1024  # or a twentieth of all

# The fields in which a merge looks deeper, as they are at first.
_DEEP = {
    "history": encode({"compacted": [], "max_turns": ConversationHistory().max_turns}),
    "preferences": encode(UserPreferences()),
    "project_context": encode(ProjectContext()),
    "granted_commands": encode([]),
}


class Digest(bytes):
    """In place of encoded data: the first bytes of its SHA-1."""

    id = b""  # of a turn: its id, as `turn_id` gives it


def digest(data: bytes) -> bytes:
    """Return the digest of encoded data; of a digest, itself."""
    return data if type(data) is Digest else hashlib.sha1(data, usedforsecurity=False).digest()[:_DIGEST_BYTES]


def turn_id(turn: bytes) -> bytes:
    """Return the id of a turn in a baseline, as it is encoded."""
    return turn.id if type(turn) is Digest else id_of(turn)


class Baseline(NamedTuple):
    """What is known to be stored of an asset."""

    incarnation: bytes  # the namespace's
    id: str
    revision: int
    operation_id: bytes  # of the write that made the revision: a restore can reuse a revision
    fields: Mapping[str, bytes]
    turns: Sequence[bytes]
    skipped: int = 0  # turns before these
    conflicting: bool = False  # whether what is stored now differs: `refresh` has left a conflict to the next save
    digested: bool = False  # whether there are digests among the values
    sent: tuple[tuple[Mapping[str, bytes], Sequence[bytes]], ...] = ()  # fields and turns of saves of unknown outcome

    @property
    def turn_count(self) -> int:
        """The number of turns that were stored."""
        return self.skipped + len(self.turns)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        size = sum(map(len, self.turns)) + sum(map(len, self.fields.values()))
        room = max(_KEPT_BYTES, size // 20)
        kept: dict[str, bytes] = {}
        deep: dict[str, bytes] = {}
        for name, first in _DEEP.items():
            if (data := self.fields.get(name)) is not None:
                deep[name] = b"" if data == first else data
        for name, data in sorted(deep.items(), key=lambda item: len(item[1])):
            if type(data) is not Digest and len(data) <= room:
                kept[name] = data
                room -= len(data)
        fields = {name: digest(data) for name, data in self.fields.items() if name not in kept}
        return _unpickled, (*self[:4], fields, kept, b"".join(map(digest, self.turns)), *self[6:8])


def _unpickled(
    incarnation: bytes,
    id: str,
    revision: int,
    op: bytes,
    fields: dict[str, bytes],
    kept: dict[str, bytes],
    turns: bytes,
    *more: Any,
) -> Baseline:
    values: dict[str, bytes] = {name: Digest(data) for name, data in fields.items()}
    values |= {name: data or _DEEP[name] for name, data in kept.items()}
    digests = [Digest(turns[at : at + _DIGEST_BYTES]) for at in range(0, len(turns), _DIGEST_BYTES)]
    return Baseline(incarnation, id, revision, op, values, digests, *more)._replace(digested=True)


def resolved(baseline: Baseline, fields: Mapping[str, bytes], turns: Iterable[bytes]) -> Baseline:
    """Put in the place of digests what they are of, as far as it is among these values."""
    if not baseline.digested:
        return baseline
    by_digest = {digest(turn): turn for turn in turns}
    known_turns = [by_digest.get(turn, turn) if type(turn) is Digest else turn for turn in baseline.turns]
    known = dict(baseline.fields)
    for name, data in baseline.fields.items():
        if type(data) is Digest and (value := fields.get(name)) is not None and digest(value) == data:
            known[name] = value
    left = any(type(data) is Digest for data in (*known.values(), *known_turns))
    return baseline._replace(fields=known, turns=known_turns, digested=left)


def set_baseline(asset: SessionAsset, baseline: Baseline, turns: Sequence[ConversationTurn] | None = None) -> None:
    """Keep with an asset what is stored of it; `turns` are those of the asset that were loaded or stored, in order."""
    known = vars(asset).get("_baselines", {})
    vars(asset)["_baselines"] = {**known, baseline.incarnation: (baseline, turns)}
    if baseline.skipped or asset.history.skipped:
        vars(asset.history)["_skipped"] = baseline.skipped


def baseline_of(asset: SessionAsset, incarnation: bytes) -> Baseline | None:
    """Return what was stored of an asset when it was loaded from a namespace or last saved to it, if it was."""
    entry: tuple[Baseline | None, Any] = _entry(asset, incarnation)
    baseline, turns = entry
    if baseline is not None and baseline.digested:
        for data, turn in zip(baseline.turns, turns or (), strict=False):
            if type(data) is Digest and not data.id:
                data.id = attempt(encode, turn.id)[0] or b""
    return baseline


def loaded_turns(asset: SessionAsset, incarnation: bytes) -> Sequence[ConversationTurn] | None:
    """Return the asset's turns that go with the baseline's; None if they are not known."""
    turns: Sequence[ConversationTurn] | None = _entry(asset, incarnation)[1]
    return turns


def _entry(asset: SessionAsset, incarnation: bytes) -> tuple[Any, Any]:
    entry: tuple[Any, Any] = vars(asset).get("_baselines", {}).get(incarnation, (None, None))
    return entry
