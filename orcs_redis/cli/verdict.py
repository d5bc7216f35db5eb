"""The verdict of the demo: the workers' logs, and what a watcher saw, against what is stored."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal

from msgspec import Struct

from ..model.asset import SessionAsset

__all__ = ["COUNTER", "Entry", "Seen", "Verdict", "describe", "judge"]

COUNTER = "demo_counter"  # in a session's metadata


class Entry(Struct, frozen=True, omit_defaults=True):
    """A line of a worker's log: an operation before it is sent ("tried"), and how it ended."""

    op: str
    kind: Literal["append", "update", "save"]
    outcome: Literal["tried", "done", "refused"]
    session: str
    turns: tuple[str, ...] = ()  # ids of those it adds
    increments: int = 0
    revision: int = 0


class Seen(Struct):
    """What a watcher has seen of the sessions: of each the last revision, and how many changes."""

    changes: int = 0
    again: int = 0  # changes that were no newer than one seen before
    revisions: dict[str, int] = {}

    def add(self, id: str, revision: int) -> None:
        """Note a change."""
        self.changes += 1
        self.again += revision <= self.revisions.get(id, 0)
        self.revisions[id] = revision

    def missing(self, final: Mapping[str, int]) -> int:
        """Return of how many sessions the final revision was not seen."""
        return sum(self.revisions.get(id) != revision for id, revision in final.items())


class Verdict(Struct, frozen=True):
    """What the logs say against what is stored; turns are counted one by one."""

    acknowledged: int
    found: int
    lost: int
    doubled: int
    misordered: int  # neighbours whose revisions fall
    refused: int
    refused_found: int
    unknown: int  # neither acknowledged nor refused
    unknown_found: int
    updates_acknowledged: int
    updates_counted: int
    updates_lost: int
    updates_doubled: int
    changes: int
    changes_again: int
    sessions_final: int  # changed sessions, ...
    sessions_missed: int  # ... and those whose final revision the watcher has not seen

    @property
    def ok(self) -> bool:
        """Whether there was anything to judge, and nothing is wrong."""
        wrong = (self.lost, self.doubled, self.misordered, self.refused_found, self.updates_lost, self.updates_doubled)
        watched = self.changes > 0 and not (self.changes_again or self.sessions_missed)
        return self.acknowledged > 0 and self.updates_acknowledged > 0 and not any(wrong) and watched


def judge(
    entries: Iterable[Entry], stored: Mapping[str, SessionAsset], seen: Seen, final: Mapping[str, int]
) -> Verdict:
    """Hold the workers' logs and what a watcher saw against the sessions that are stored and their revisions."""
    ops: dict[str, Entry] = {}
    for entry in entries:
        if entry.outcome != "tried" or entry.op not in ops:
            ops[entry.op] = entry
    turns = Counter((id, turn.id) for id, asset in stored.items() for turn in asset.history.turns)
    copies: dict[str, list[int]] = {"done": [], "refused": [], "tried": []}
    increments: dict[str, Counter[str]] = defaultdict(Counter)
    revisions: dict[tuple[str, str], int] = {}
    for op in ops.values():
        copies[op.outcome] += [turns[op.session, turn] for turn in op.turns]
        increments[op.session][op.outcome] += op.increments
        if op.outcome == "done":
            revisions |= {(op.session, turn): op.revision for turn in op.turns}
    misordered = counted = lost = doubled = 0
    for id in stored.keys() | increments.keys():
        asset = stored.get(id)
        known = [revisions[id, t.id] for t in asset.history.turns if (id, t.id) in revisions] if asset else []
        misordered += sum(after < before for before, after in itertools.pairwise(known))
        count = int(asset.metadata.get(COUNTER, 0)) if asset else 0
        counted += count
        lost += max(increments[id]["done"] - count, 0)
        doubled += max(count - increments[id]["done"] - increments[id]["tried"], 0)
    done, refused, unknown = copies["done"], copies["refused"], copies["tried"]
    return Verdict(
        acknowledged=len(done),
        found=len(done) - done.count(0),
        lost=done.count(0),
        doubled=sum(n > 1 for n in (*done, *refused, *unknown)),
        misordered=misordered,
        refused=len(refused),
        refused_found=len(refused) - refused.count(0),
        unknown=len(unknown),
        unknown_found=len(unknown) - unknown.count(0),
        updates_acknowledged=sum(counter["done"] for counter in increments.values()),
        updates_counted=counted,
        updates_lost=lost,
        updates_doubled=doubled,
        changes=seen.changes,
        changes_again=seen.again,
        sessions_final=len(final),
        sessions_missed=seen.missing(final),
    )


def describe(verdict: Verdict) -> str:
    """Return the verdict in words."""
    v = verdict
    return (
        f"turns    acknowledged {v.acknowledged:,}, found {v.found:,}, lost {v.lost:,}, doubled {v.doubled:,}, "
        f"out of order {v.misordered:,}\n"
        f"         refused {v.refused:,}, of them found {v.refused_found:,}; "
        f"outcome unknown {v.unknown:,}, of them found {v.unknown_found:,}\n"
        f"updates  acknowledged {v.updates_acknowledged:,}, counted {v.updates_counted:,}, "
        f"lost {v.updates_lost:,}, doubled {v.updates_doubled:,}\n"
        f"changes  watched {v.changes:,}, twice {v.changes_again:,}; "
        f"final revision seen of {v.sessions_final - v.sessions_missed:,} of {v.sessions_final:,} sessions"
    )
