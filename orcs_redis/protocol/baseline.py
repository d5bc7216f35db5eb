"""What an asset was when it was loaded or last saved. It is kept with the asset, for each namespace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..model.asset import SessionAsset
from ..model.sections import ConversationTurn

__all__ = ["Baseline", "baseline_of", "loaded_turns", "set_baseline"]


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

    @property
    def turn_count(self) -> int:
        """The number of turns that were stored."""
        return self.skipped + len(self.turns)


def set_baseline(asset: SessionAsset, baseline: Baseline, turns: Sequence[ConversationTurn] | None = None) -> None:
    """Keep with an asset what is stored of it; `turns` are those of the asset that were loaded or stored, in order."""
    known = vars(asset).get("_baselines", {})
    vars(asset)["_baselines"] = {**known, baseline.incarnation: (baseline, turns)}
    if baseline.skipped or asset.history.skipped:
        vars(asset.history)["_skipped"] = baseline.skipped


def baseline_of(asset: SessionAsset, incarnation: bytes) -> Baseline | None:
    """Return what was stored of an asset when it was loaded from a namespace or last saved to it, if it was."""
    baseline: Baseline | None = _entry(asset, incarnation)[0]
    return baseline


def loaded_turns(asset: SessionAsset, incarnation: bytes) -> Sequence[ConversationTurn] | None:
    """Return the asset's turns that go with the baseline's; None if they are not known."""
    turns: Sequence[ConversationTurn] | None = _entry(asset, incarnation)[1]
    return turns


def _entry(asset: SessionAsset, incarnation: bytes) -> tuple[Any, Any]:
    entry: tuple[Any, Any] = vars(asset).get("_baselines", {}).get(incarnation, (None, None))
    return entry
