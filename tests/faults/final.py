"""The checker of the final state: what the server's keys say in the end, of each other and of the history."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .ops import NEVER, Known, Op, Violation

__all__ = ["check_dump", "check_gaps"]

CLOCKS = 5  # ms by which a worker's clock may be ahead of the server's


def check_dump(dump: Mapping[str, Any], known: Mapping[str, Known]) -> list[Violation]:
    """Return what is wrong with a partition's keys, given the writes of each session."""
    return _Dump(dump, known).check()


class _Dump:
    def __init__(self, dump: Mapping[str, Any], known: Mapping[str, Known]) -> None:
        self._dump = dump
        self._session = known
        self._violations: list[Violation] = []

    def check(self) -> list[Violation]:
        self._check_keys(self._dump)
        self._check_index(self._dump)
        return self._violations

    def _say(self, rule: str, text: str) -> None:
        self._violations.append(Violation(rule, text))

    def _check_keys(self, dump: Mapping[str, Any]) -> None:
        sessions, last = dump["sessions"], dump["revision"]
        for key in dump["strays"]:
            self._say("dump", f"there is a key {key!r}")
        for name in ("meta", "updated"):
            if difference := set(dump[name]) ^ set(sessions):
                self._say("dump", f"{name} and the sessions differ in {sorted(difference)}")
        if difference := set(dump["changes"]) ^ (set(sessions) | set(dump["deleted"])):
            self._say("dump", f"changes and the sessions and tombstones differ in {sorted(difference)}")
        if set(dump["deleted"]) & set(sessions) or set(dump["deleted"]) != set(dump["deleted_meta"]):
            self._say("dump", "the tombstones disagree with each other or with the sessions")
        if len(set(dump["changes"].values())) < len(dump["changes"]):
            self._say("dump", "two sessions have their last change at the same revision")
        for id, data in sessions.items():
            facts = {
                "turns": {len(data["ids"]), data["turns"], dump["meta"].get(id, [0, 0, -1])[2]},
                "revision": {data["revision"], dump["meta"].get(id, [-1])[0], dump["changes"].get(id, -1)},
                "updated_at_ms": {dump["meta"].get(id, [0, -1])[1], dump["updated"].get(id, -1)},
            }
            if data["updated_at_ms"] > max(facts["updated_at_ms"]) + CLOCKS:
                self._say("dump", f"{id!r}: updated_at_ms is {data['updated_at_ms']}, later than in the index")
            for name, values in facts.items():
                if len(values) > 1:
                    self._say("dump", f"{id!r}: {name} is {sorted(values)} in the hash, the list and the index")
            if data.get("names", []) != sorted(data.get("snapshot", {}).get("records", ())):
                self._say("dump", f"{id!r}: records and their names differ: {data['names']}")
            self._check_end(id, data["revision"], last)
        for id, revision in dump["deleted"].items():
            if dump["changes"].get(id) != revision:
                self._say("dump", f"{id!r} was deleted at {revision}, and changed at {dump['changes'].get(id)}")
            self._check_end(id, revision, last)
            newest = self._session[id].up_to(NEVER) if id in self._session else None
            if newest is not None and newest.revision == revision and newest.kind != "delete":
                self._say("absent", f"{id!r} is gone after {newest}")
        for id in self._session:
            if id not in sessions and id not in dump["deleted"] and (newest := self._session[id].up_to(NEVER)):
                self._say("absent", f"{id!r} has left no trace, after {newest}")

        remembered = [revision for window in dump["windows"] for revision in window]
        if any(window != sorted(window) for window in dump["windows"]):
            self._say("dump", "the revisions of a dedup window are not in order")
        if max(remembered, default=0) > last:
            self._say("revisions", f"a window is at {max(remembered)}, its partition at {last}")

    def _check_index(self, dump: Mapping[str, Any]) -> None:
        """Labels, name and project's path are the same in the hash, the metadata and the index of labels."""
        index = []
        for id, (labels, name, root_path) in dump.get("tails", {}).items():
            index += [[id, label, value] for label, value in labels.items()]
            index += [] if root_path is None else [[id, "", root_path]]
            if id in dump["sessions"]:
                parts = dump["sessions"][id]["snapshot"]["parts"]
                stored = parts.get("metadata.labels", {}), parts.get("project_context.name")
                if stored != (labels, name):
                    self._say("dump", f"{id!r} has labels and name {stored}, in the index metadata {labels, name}")
        if sorted(index) != dump.get("index", []):
            self._say("dump", f"the index of labels is {dump['index']}, the metadata have {sorted(index)}")

    def _check_end(self, id: str, revision: int, last: int) -> None:
        if id not in self._session:
            self._say("foreign", f"session {id!r}")
            return
        newest = self._session[id].up_to(NEVER)
        if newest is not None and newest.revision > revision:
            self._say("lost", f"{id!r} is at revision {revision} in the end, after {newest}")
        if revision > last:
            self._say("revisions", f"{id!r} is at {revision}, its partition at {last}")


def check_gaps(dump: Mapping[str, Any], known: Known, bounds: Mapping[str, tuple[int, int]]) -> Iterator[Violation]:
    """The revisions that nobody was told must be those of the writes whose outcome is unknown.

    Args:
        dump: of a partition.
        known: its writes.
        bounds: of unknown writes that were seen: their revision is in between.

    """
    last = dump["revision"]
    for op in known.writes:
        if not 1 <= op.revision <= last:
            yield Violation("revisions", f"{op}, and the partition's counter is {last}")
    told = set(known.revisions)
    gaps = [revision for revision in range(1, last + 1) if revision not in told]
    unknown = []
    for op in known.unknown:
        before = known.before(op.called)
        unknown.append((*bounds.get(op.uid, (before.revision if before else 0, NEVER)), op))
    seen = [bound for bound in unknown if bound[2].uid in bounds]
    for op in _unplaced(seen, gaps)[0]:
        low, high = bounds[op.uid]
        yield Violation("gaps", f"{op} was seen, but no revision between {low} and {high} is left for it")
    for revision in _unplaced(unknown, gaps)[1]:
        text = f"nobody made revision {revision} (of {last}): {len(gaps)} gaps, {len(unknown)} unknown"
        yield Violation("gaps", text)


def _unplaced(bounds: Iterable[tuple[int, int, Op]], gaps: Sequence[int]) -> tuple[list[Op], list[int]]:
    """Give each gap a write whose bounds allow it, the most urgent first; return what is left of both."""
    coming = sorted(bounds, key=lambda bound: bound[0], reverse=True)
    ready: list[tuple[int, str, Op]] = []
    late: list[Op] = []
    empty = []
    for gap in gaps:
        while coming and coming[-1][0] < gap:
            _, high, op = coming.pop()
            heapq.heappush(ready, (high, op.uid, op))
        while ready and ready[0][0] < gap:
            late.append(heapq.heappop(ready)[2])
        if ready:
            heapq.heappop(ready)
        else:
            empty.append(gap)
    return late + [op for _, _, op in ready] + [op for _, _, op in coming], empty
