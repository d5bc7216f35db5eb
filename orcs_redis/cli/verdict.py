"""The verdict of the demo: the workers' logs, and what a watcher saw, against what is stored."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Literal, TypeAlias

import msgspec
from msgspec import Struct

from ..model.asset import SessionAsset
from ..model.labels import labels_of

__all__ = [
    "COUNTER", "KINDS", "NOTE", "PHASES", "Entry", "Final", "Kind", "Rates", "Seen", "Verdict", "describe", "judge",
    "rates", "state_of",
]  # fmt: skip

COUNTER, NOTE = "demo_counter", "demo_note"  # in a session's metadata
PHASES = ("plan", "code", "test", "done")  # a label's values

Kind: TypeAlias = Literal["append", "pop", "rename", "label", "note", "count", "refresh"]
KINDS: tuple[Kind, ...] = ("append", "pop", "rename", "label", "note", "count", "refresh")

_encode = msgspec.json.Encoder(order="sorted").encode


class Entry(Struct, frozen=True, omit_defaults=True):
    """A line of a worker's log: an operation before it is sent ("tried"), and how it ended."""

    op: str  # worker, task and number
    kind: Kind
    outcome: Literal["tried", "done", "refused"]
    session: str
    turns: tuple[str, ...] = ()  # ids of those that it adds, or has popped
    pops: int = 0  # how many it pops at most
    values: dict[str, str] = {}  # of parts that it sets
    increments: int = 0  # of the counter
    revision: int = 0
    at: float = 0.0  # seconds, by a clock that all processes share
    state: str = ""  # of a refresh: what the asset is then ...
    loaded: str = ""  # ... and what is loaded at the same revision


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


class Final(Struct, frozen=True):
    """What there is in the end."""

    stored: Mapping[str, SessionAsset]
    revisions: Mapping[str, int]
    refreshed: Mapping[str, SessionAsset] = {}  # what was saved at first, brought up to date
    listed_wrong: int = 0  # lines of lists, and counts, that don't say what is stored


class Verdict(Struct, frozen=True):
    """What the logs say against what is stored; turns are counted one by one."""

    acknowledged: int  # turns that were appended
    found: int  # of them, those that are stored or were popped
    lost: int  # of them and of those that there were at first
    doubled: int
    misordered: int  # neighbours whose revisions fall
    unexpected: int  # turns that nobody has appended
    refused: int
    refused_found: int
    unknown: int  # neither acknowledged nor refused
    unknown_found: int
    popped: int
    popped_again: int
    popped_found: int  # popped, and stored all the same
    parts_acknowledged: int  # values of names, labels and notes
    parts_checked: int
    parts_wrong: int  # those that have not the last acknowledged value
    counts_acknowledged: int
    counts_found: int
    counts_lost: int
    counts_doubled: int
    refreshes: int
    refreshes_compared: int
    refreshes_wrong: int  # those that gave something else than a load, or something old
    listed_wrong: int
    changes: int
    changes_again: int
    sessions_final: int  # changed sessions, ...
    sessions_missed: int  # ... and those whose final revision the watcher has not seen

    @property
    def ok(self) -> bool:
        """Whether there was anything of each kind to judge, and nothing is wrong."""
        v = self
        there = (v.acknowledged, v.popped, v.parts_checked, v.counts_acknowledged, v.refreshes_compared, v.changes)
        turns = (v.lost, v.doubled, v.misordered, v.unexpected, v.refused_found, v.popped_again, v.popped_found)
        parts = (v.parts_wrong, v.counts_lost, v.counts_doubled, v.refreshes_wrong, v.listed_wrong)
        return all(there) and not any((*turns, *parts, v.changes_again, v.sessions_missed))


class Rates(Struct, frozen=True):
    """Acknowledged operations of all workers in the first and in the last second in which all of them worked."""

    first: int
    last: int
    ratio: float


def state_of(asset: SessionAsset) -> str:
    """Return a digest of all that an asset has."""
    return blake2b(_encode(asset), digest_size=12).hexdigest()


def rates(entries: Iterable[Entry]) -> Rates | None:
    """Return the rates of a log; None if the workers did not all work at once for a second."""
    times: dict[str, list[float]] = defaultdict(list)
    for entry in entries:
        if entry.outcome == "done":
            times[entry.op.partition("-")[0]].append(entry.at)
    begin = max((min(of_one) for of_one in times.values()), default=0.0)
    end = min((max(of_one) for of_one in times.values()), default=0.0)
    if end - begin < 1:
        return None
    done = [*itertools.chain(*times.values())]
    first = sum(begin <= at < begin + 1 for at in done)
    last = sum(end - 1 < at <= end for at in done)
    return Rates(first, last, round(last / first, 3))


def judge(entries: Sequence[Entry], initial: Mapping[str, SessionAsset], seen: Seen, final: Final) -> Verdict:
    """Hold the workers' logs and what a watcher saw against the sessions that there were and that there are."""
    ops: dict[str, Entry] = {}
    for entry in entries:
        if entry.outcome != "tried" or entry.op not in ops:
            ops[entry.op] = entry
    counts = {
        **_judge_turns(ops.values(), initial, final.stored),
        **_judge_parts(ops.values(), initial, final.stored),
        **_judge_counts(ops.values(), final.stored),
        **_judge_refreshes(entries, final),
    }
    return Verdict(
        **counts,
        listed_wrong=final.listed_wrong,
        changes=seen.changes,
        changes_again=seen.again,
        sessions_final=len(final.revisions),
        sessions_missed=seen.missing(final.revisions),
    )


def _judge_turns(
    ops: Iterable[Entry], initial: Mapping[str, SessionAsset], stored: Mapping[str, SessionAsset]
) -> dict[str, int]:
    there = Counter((id, turn.id) for id, asset in stored.items() for turn in asset.history.turns)
    first = {(id, turn.id) for id, asset in initial.items() for turn in asset.history.turns}
    added: dict[str, dict[tuple[str, str], int]] = {"done": {}, "refused": {}, "tried": {}}
    popped: Counter[tuple[str, str]] = Counter()
    may_be_popped: Counter[str] = Counter()
    for op in ops:
        turns = [(op.session, turn) for turn in op.turns]
        if op.kind == "append":
            added[op.outcome] |= dict.fromkeys(turns, op.revision)
        elif op.kind == "pop" and op.outcome == "done":
            popped.update(turns)
        elif op.kind == "pop" and op.outcome == "tried":
            may_be_popped[op.session] += op.pops
    done, refused, unknown = added["done"], added["refused"], added["tried"]
    known = there.keys() | popped.keys()
    missing = Counter(id for id, _ in (first | done.keys()) - known)
    return {
        "acknowledged": len(done),
        "found": len(done.keys() & known),
        "lost": sum(max(count - may_be_popped[id], 0) for id, count in missing.items()),
        "doubled": sum(count > 1 for count in there.values()),
        "misordered": sum(_falls(id, asset, done) for id, asset in stored.items()),
        "unexpected": len(known - first - done.keys() - refused.keys() - unknown.keys()),
        "refused": len(refused),
        "refused_found": len(refused.keys() & known),
        "unknown": len(unknown),
        "unknown_found": len(unknown.keys() & known),
        "popped": popped.total(),
        "popped_again": sum(count > 1 for count in popped.values()),
        "popped_found": len(popped.keys() & there.keys()),
    }


def _falls(id: str, asset: SessionAsset, revisions: Mapping[tuple[str, str], int]) -> int:
    known = [revisions[id, turn.id] for turn in asset.history.turns if (id, turn.id) in revisions]
    return sum(after < before for before, after in itertools.pairwise(known))


def _judge_parts(
    ops: Iterable[Entry], initial: Mapping[str, SessionAsset], stored: Mapping[str, SessionAsset]
) -> dict[str, int]:
    """Each part has the value of its last acknowledged write, or of one whose outcome is unknown."""
    last: dict[tuple[str, str], tuple[int, str]] = {}
    possible: dict[tuple[str, str], set[str | None]] = defaultdict(set)
    acknowledged = 0
    for op in ops:
        acknowledged += len(op.values) * (op.outcome == "done")
        for part, value in op.values.items():
            key = (op.session, part)
            if op.outcome == "done":
                last[key] = max(last.get(key, (0, "")), (op.revision, value))
            elif op.outcome == "tried":
                possible[key].add(value)
    wrong = 0
    keys = {(id, part) for id, asset in initial.items() for part in _parts_of(asset)} | last.keys() | possible.keys()
    for id, part in keys:
        before = _parts_of(initial[id]).get(part) if id in initial else None
        expected = last[id, part][1] if (id, part) in last else before
        found = _parts_of(stored[id]).get(part) if id in stored else None
        wrong += found != expected and found not in possible[id, part]
    return {"parts_acknowledged": acknowledged, "parts_checked": len(keys), "parts_wrong": wrong}


def _parts_of(asset: SessionAsset) -> dict[str, str | None]:
    """Return the parts that workers set, under the names that they have in logs."""
    labels = {f"label {name}": value for name, value in labels_of(asset).items()}
    return {"name": asset.project_context.name, "note": asset.metadata.get(NOTE), **labels}


def _judge_counts(ops: Iterable[Entry], stored: Mapping[str, SessionAsset]) -> dict[str, int]:
    increments: dict[str, Counter[str]] = defaultdict(Counter)
    for op in ops:
        increments[op.session][op.outcome] += op.increments
    counted = {id: int(asset.metadata.get(COUNTER, 0)) for id, asset in stored.items()}
    lost = doubled = 0
    for id, count in increments.items():
        lost += max(count["done"] - counted.get(id, 0), 0)
        doubled += max(counted.get(id, 0) - count["done"] - count["tried"], 0)
    return {
        "counts_acknowledged": sum(count["done"] for count in increments.values()),
        "counts_found": sum(counted.values()),
        "counts_lost": lost,
        "counts_doubled": doubled,
    }


def _judge_refreshes(entries: Iterable[Entry], final: Final) -> dict[str, int]:
    """A refresh gives what a load gives, and nothing older than what its worker knew before."""
    known: dict[tuple[str, str], int] = {}  # of a worker and a session: the highest acknowledged revision
    least: dict[str, int] = {}  # of a refresh: the same when it began
    refreshes = compared = wrong = 0
    for entry in entries:
        key = (entry.op.partition("-")[0], entry.session)
        if entry.kind == "refresh" and entry.outcome == "tried":
            least[entry.op] = known.get(key, 0)
        if entry.outcome != "done":
            continue
        if entry.kind == "refresh":
            refreshes += 1
            compared += entry.state != ""
            wrong += entry.state != entry.loaded or entry.revision < least.get(entry.op, 0)
        known[key] = max(known.get(key, 0), entry.revision)
    for id, asset in final.refreshed.items():
        wrong += id not in final.stored or state_of(asset) != state_of(final.stored[id])
    return {"refreshes": refreshes, "refreshes_compared": compared, "refreshes_wrong": wrong}


def describe(verdict: Verdict) -> str:
    """Return the verdict in words."""
    v = verdict
    return (
        f"turns      acknowledged {v.acknowledged:,}, found {v.found:,}, lost {v.lost:,}, doubled {v.doubled:,}, "
        f"out of order {v.misordered:,}, unexpected {v.unexpected:,}\n"
        f"           refused {v.refused:,}, of them found {v.refused_found:,}; "
        f"outcome unknown {v.unknown:,}, of them found {v.unknown_found:,}\n"
        f"pops       {v.popped:,} turns, twice {v.popped_again:,}, still there {v.popped_found:,}\n"
        f"parts      {v.parts_acknowledged:,} names, labels and notes acknowledged; "
        f"{v.parts_wrong:,} of {v.parts_checked:,} have not the last value\n"
        f"counters   acknowledged {v.counts_acknowledged:,}, counted {v.counts_found:,}, "
        f"lost {v.counts_lost:,}, doubled {v.counts_doubled:,}\n"
        f"refreshes  {v.refreshes:,}, compared with a load {v.refreshes_compared:,}, wrong {v.refreshes_wrong:,}\n"
        f"lists      lines and counts that are wrong {v.listed_wrong:,}\n"
        f"changes    watched {v.changes:,}, twice {v.changes_again:,}; "
        f"final revision seen of {v.sessions_final - v.sessions_missed:,} of {v.sessions_final:,} sessions"
    )
