"""The checker: reads what the workers say they did and what the server holds in the end, and finds what can't be.

It is pure. Revisions order the writes of a partition, so that nothing has to be searched: each rule is a pass
over the lists.

The rules, by the names that violations bear:

    unexpected   an error that no fault explains
    hasty        an operation was given up long before its deadline
    swallowed    an exception that a signal's handler raised did not come out as it was
    lost         an acknowledged write's turns are not in a history that is as new as the write
    doubled      a turn is there twice
    refused      a write is there whose error promised that it is not
    foreign      a turn, mark or session is there that nobody wrote to this place
    torn         the turns of one write are not together and in order
    order        a write is at another place than its revision says
    time         revisions disagree with real time, or a read has seen the future
    revisions    a revision was given twice, or is beyond the partition's counter
    gaps         revisions that no write accounts for, or writes that no revision is left for
    stale        a read is older than what had been acknowledged before it
    state        two observations of one revision of a session differ
    overwrote    a conditional write came over another revision than its own
    counter      increments of a counter, made conditionally, were lost
    conflict     a conflict without another write that it could be with
    absent       a session was not found that must have been there
    list         a list is unsorted, skips or repeats
    stuck        a worker does not write again once all faults are over
    dump         index, metadata, turns and hashes disagree
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from zlib import crc32

from .final import check_dump, check_gaps
from .ops import BY_PARTS, MEMORY, NEVER, QUIET, UNKNOWN, Faults, Known, Op, Violation, judged, read_history
from .recorder import digest
from .workers import DEADLINE

__all__ = ["Faults", "Op", "Violation", "check", "read_history"]

PATIENCE = int(DEADLINE / 2 * 1e9)  # ns


def check(ops: Sequence[Op], dump: Sequence[Mapping[str, Any]] | None, faults: Faults = QUIET) -> list[Violation]:
    """Return what violates the contract in a history and the final dump (`take_dump`)."""
    violations = _check_denials(ops, faults.denied)
    for name in faults.alive:
        own = [op for op in ops if op.uid.rpartition("-")[0] == name]
        if not any(op.writes and op.ok and op.called > faults.healed for op in own):
            violations.append(Violation("stuck", f"{name} has written nothing since the end of all faults"))
    ops = [judged(op, faults.moved) for op in ops]
    partitions = len(dump) if dump else 1
    for number in range(partitions):
        own = [op for op in ops if not op.session or crc32(op.session.encode()) % partitions == number]
        violations += _Partition(own, number, partitions, dump[number] if dump else None).check()
    return violations


def _check_denials(ops: Sequence[Op], denied: Sequence[tuple[int, int]]) -> list[Violation]:
    """An operation can be denied only if rights were missing, or had been a moment before."""
    return [
        Violation("unexpected", f"{op}: {op.result.get('text', '')}")
        for op in ops
        if op.outcome == "PermissionDeniedError"
        and not any(begin < op.returned and op.called < end + MEMORY for begin, end in denied)
    ]


@dataclass
class _Truth:
    """The fullest history known of a session between one creation and the next."""

    session: str
    born: str
    ids: list[str]
    revision: int  # at which it was seen
    seen_by: str
    seen_at: int
    first: int = 0  # the oldest revision known to be of this creation
    cuts: set[int] = field(default_factory=set)  # numbers of turns at which a write ends
    ends: list[tuple[int, int, int]] = field(default_factory=list)  # revision, start and end of acknowledged writes
    where: dict[str, int] = field(default_factory=dict)

    @property
    def rank(self) -> tuple[bool, int, int]:
        """The dump knows best, then who saw most."""
        return self.seen_at == NEVER, len(self.ids), self.revision


class _Partition:
    """One partition's part of a history."""

    def __init__(self, ops: Sequence[Op], number: int, partitions: int, dump: Mapping[str, Any] | None) -> None:
        self._partitions = partitions
        self._number = number
        self._dump = dump
        self._ops = {op.uid: op for op in ops}
        self._writes = [op for op in ops if op.writes]
        self._reads = [op for op in ops if not op.writes and op.ok]
        self._known = Known(self._writes)
        self._of: dict[str, list[Op]] = defaultdict(list)
        for op in self._writes:
            self._of[op.session].append(op)
        self._session = {session: Known(writes) for session, writes in self._of.items()}
        self._deletes = {
            session: Known([op for op in writes if op.kind == "delete"]) for session, writes in self._of.items()
        }
        self._truths: dict[tuple[str, str], _Truth] = {}
        self._violations: list[Violation] = []
        self._placed: dict[str, _Truth] = {}  # where a write's turns are
        self._home: dict[str, _Truth] = {}  # where a turn is
        self._bounds: dict[str, tuple[int, int]] = {}  # unknown writes that were seen: their revision is in between

    def check(self) -> list[Violation]:
        self._check_errors()
        self._check_revisions()
        self._check_states()
        self._find_truths()
        for truth in self._truths.values():
            self._check_truth(truth)
        for op in self._reads:
            match op.kind:
                case "load":
                    self._check_load(op)
                case "turns":
                    self._check_turns(op)
                case "read" | "refresh":
                    self._check_fresh(op, op.session, op.result["revision"])
                case "labelled":
                    for id, revision, *_ in op.result["items"]:
                        if self._mine(id):
                            self._check_fresh(op, id, revision)
                case "list" | "page":
                    self._check_items(op)
        self._check_absences()
        self._check_conditions()
        if self._dump is not None:
            self._violations += check_dump(self._dump, self._session)
            self._violations += check_gaps(self._dump, self._known, self._bounds)
        return self._violations

    def _say(self, rule: str, text: str) -> None:
        self._violations.append(Violation(rule, text))

    # Single operations

    def _check_errors(self) -> None:
        for op in self._ops.values():
            allowed: tuple[str | None, ...] = ("ok", "UnavailableError", "PermissionDeniedError", *UNKNOWN)
            if op.writes:
                allowed += ("StoreFullError",)
            if op.session and op.kind not in ("create", "put", "merge"):
                allowed += ("NotFoundError",)
            if op.kind in ("merge", "refresh", "fork") or (
                op.writes and not (op.args.get("base") is None and op.args.get("if_last") is None)
            ):
                allowed += ("ConflictError",)
            if op.writes and op.args.get("lease") is not None:
                allowed += ("LeaseLostError",)
            if op.kind == "acquire":
                allowed = (*allowed, "LeaseHeldError", "StoreFullError")
            elif not op.writes:
                allowed = tuple(outcome for outcome in allowed if outcome != "OutcomeUnknownError")
            if op.outcome == "Swallowed":
                self._say("swallowed", f"{op}: {op.result.get('text') or 'it went on'}")
            if op.outcome == "UnavailableError" and op.returned - op.called < PATIENCE:
                self._say("hasty", f"{op}: {op.result.get('text', '')}")
            if op.outcome not in allowed:
                self._say("unexpected", f"{op}: {op.result.get('text', '')}")

    def _check_revisions(self) -> None:
        for first, second in pairwise(self._known.writes):
            if first.revision == second.revision:
                self._say("revisions", f"{first} and {second} have one revision")
        for op in self._known.writes:
            before = self._known.before(op.called)
            if before is not None and before.revision >= op.revision:
                self._say("time", f"{before} was acknowledged before {op} began")

    def _check_conditions(self) -> None:
        for op in self._writes:
            base = op.args.get("base")
            others = self._session[op.session]
            if op.ok and base:
                for other in others.between(base, op.revision):
                    self._say("overwrote", f"{op}, made for revision {base}, came over {other}")
                    break
            elif op.ok and base == 0:
                newest = others.up_to(op.revision - 1)
                if newest is not None and not self._may_be_absent(op.session, newest, op.returned):
                    self._say("overwrote", f"{op}, made for an absent session, came over {newest}")
            if op.outcome == "ConflictError" and base is not None and op.args.get("if_last") is None:
                rivals = others.began_after(base) < op.returned or any(
                    other.called < op.returned and (base or other.kind != "delete") for other in others.unknown
                )
                if not rivals:
                    self._say("conflict", f"{op}, made for revision {base}, had no other write to be in conflict with")
        for session, writes in self._of.items():
            self._check_counters(session, writes)

    def _check_counters(self, session: str, writes: Sequence[Op]) -> None:
        counted: dict[str, list[tuple[int, int, Op]]] = defaultdict(list)
        unknown = sum(op.unknown and op.kind in ("save", "update") for op in writes)
        for op in writes:
            if op.ok and op.kind in ("save", "update"):
                facts = op.args | op.result
                counted[facts["born"]].append((op.revision, facts["counter"], op))
        for increments in counted.values():
            increments.sort(key=lambda increment: increment[0])
            for (_, earlier, first), (_, later, second) in pairwise(increments):
                if not earlier < later <= earlier + 1 + unknown:
                    self._say("counter", f"{first} made the counter {earlier}, {second} made it {later}")

    # Observations

    def _observations(self) -> Iterator[tuple[str, dict[str, Any], str, int]]:
        """Yield what was seen of sessions: the session, what, by whom, when."""
        for op in self._reads:
            if op.kind == "load":
                yield op.session, op.result, str(op), op.returned
        if self._dump is not None:
            for session, data in self._dump["sessions"].items():
                if session.startswith(BY_PARTS):
                    continue
                seen = {"revision": data["revision"], "n": len(data["ids"]), "all": data["ids"]}
                seen["sum"] = digest(data["ids"])
                seen |= {key: data["metadata"].get(key) for key in ("born", "counter", "mark")}
                yield session, seen, "the final dump", NEVER

    def _check_states(self) -> None:
        """What is told of one revision of a session must be the same, whoever tells it."""
        told: dict[tuple[str, int, str], tuple[Any, str]] = {}

        def tell(session: str, revision: int, facts: Mapping[str, Any], who: str) -> None:
            for name in ("born", "counter", "mark", "n", "sum"):
                if name in facts:
                    value, first = told.setdefault((session, revision, name), (facts[name], who))
                    if value != facts[name]:
                        both = f"{value} in {first}, {facts[name]} in {who}"
                        self._say("state", f"{session!r} at revision {revision}: {name} is {both}")

        for op in self._known.writes:
            facts: dict[str, Any] = {}
            if op.kind in ("create", "put") and "whole" not in op.args:
                facts = {"born": op.uid, "counter": 0, "mark": op.uid, "n": len(op.ids), "sum": digest(op.ids)}
            elif op.kind in ("save", "update"):
                facts = {key: (op.args | op.result)[key] for key in ("born", "counter")} | {"mark": op.uid}
            tell(op.session, op.revision, facts, str(op))
        for session, seen, who, at in self._observations():
            tell(session, seen["revision"], seen, who)
            for name, kinds in (("born", ("create", "put")), ("mark", ("create", "put", "save", "update"))):
                writer = self._ops.get(seen[name])
                if writer is None or writer.session != session or writer.kind not in kinds:
                    self._say("foreign", f"{session!r}: {name} {seen[name]!r} in {who}")
                elif not writer.unknown and not writer.ok:
                    self._say("refused", f"{writer}, yet its mark is in {who} at revision {seen['revision']}")
                elif writer.called > at:
                    self._say("time", f"{who} has seen {writer}, which began later")
                elif writer.ok and writer.revision > seen["revision"]:
                    self._say("order", f"the mark of {writer} is in {who} at revision {seen['revision']}")
                elif writer.unknown:
                    self._bound(writer, 0, seen["revision"])
        for op in self._reads:
            for id, revision, count, *_ in op.result.get("items", ()):
                if self._mine(id):
                    tell(id, revision, {"n": count}, str(op))

    def _bound(self, op: Op, after: int, up_to: int) -> None:
        before = self._known.before(op.called)
        low, high = self._bounds.get(op.uid, (before.revision if before else 0, NEVER))
        self._bounds[op.uid] = max(low, after), min(high, up_to)

    # Histories

    def _find_truths(self) -> None:
        first: dict[tuple[str, str], int] = {}
        for session, seen, who, at in self._observations():
            key = session, seen["born"]
            first[key] = min(first.get(key, NEVER), seen["revision"])
            if "all" in seen:
                truth = _Truth(session, seen["born"], seen["all"], seen["revision"], who, at)
                if key not in self._truths or self._truths[key].rank < truth.rank:
                    self._truths[key] = truth
        for key, truth in self._truths.items():
            creator = self._ops.get(truth.born)
            truth.first = creator.revision if creator is not None and creator.ok else first[key]

    def _check_truth(self, truth: _Truth) -> None:
        ids, session = truth.ids, truth.session
        for id, count in Counter(ids).items():
            if count > 1:
                writer = self._ops.get(id.rpartition(".")[0])
                self._say("doubled", f"turn {id} is {count} times in {session!r}, of {writer}, in {truth.seen_by}")
        found: dict[str, int] = {}
        waiting: list[Op] = []  # unknown writes since the last acknowledged one
        last = at = 0
        truth.cuts.add(0)
        while at < len(ids):
            writer = self._ops.get(ids[at].rpartition(".")[0])
            truth.where.setdefault(ids[at], at)
            self._home.setdefault(ids[at], truth)
            if writer is None or writer.session != session or ids[at] not in writer.ids:
                self._say("foreign", f"turn {ids[at]} in {session!r}: {writer}")
                at += 1
                continue
            start, at = at, at + 1
            if ids[start : start + len(writer.ids)] == writer.ids:
                at = start + len(writer.ids)
            else:
                there = ids[start : start + len(writer.ids)]
                self._say("torn", f"{session!r} has {there} in {truth.seen_by}: {writer}")
            for n in range(start, at):
                truth.where.setdefault(ids[n], n)
                self._home.setdefault(ids[n], truth)
            truth.cuts.add(at)
            found.setdefault(writer.uid, start)
            other = self._placed.setdefault(writer.uid, truth)
            if other is not truth:
                text = f"{writer} is in {session!r} as created by {other.born} and as created by {truth.born}"
                self._say("doubled", text)
            if not writer.ok and not writer.unknown:
                self._say("refused", f"{writer}, yet its turns are in {truth.seen_by}")
            elif writer.called > truth.seen_at:
                self._say("time", f"{truth.seen_by} has seen {writer}, which began later")
            elif writer.unknown:
                waiting.append(writer)
                self._bound(writer, last, truth.revision)
            elif found[writer.uid] == start:
                if not last < writer.revision <= truth.revision:
                    text = f"{writer} comes after revision {last} in {truth.seen_by} at {truth.revision}"
                    self._say("order", text)
                for unknown in waiting:
                    self._bound(unknown, 0, writer.revision)
                waiting.clear()
                truth.ends.append((writer.revision, start, at))
                truth.first = min(truth.first, writer.revision)
                last = max(last, writer.revision)
        known = self._session.get(session) or Known(())
        for op in known.between(truth.first - 1, truth.revision + 1):
            if op.ids and op.uid not in found:
                self._say("lost", f"{op} is not in {session!r} of {truth.seen_by} at revision {truth.revision}")

    def _check_place(self, truth: _Truth, revision: int, count: int, who: str) -> None:
        """Check that so many turns at this revision are those of the writes up to it."""
        if count not in truth.cuts:
            self._say("torn", f"{who} saw {count} turns, in the middle of a write")
        at = bisect.bisect_right(truth.ends, (revision, NEVER, NEVER))
        if at and truth.ends[at - 1][2] > count:
            self._say("stale", f"{who} saw {count} turns at {revision}, {truth.ends[at - 1][2]} were there")
        if at < len(truth.ends) and truth.ends[at][1] < count:
            self._say("order", f"{who} saw {count} turns at {revision}, turns of {truth.ends[at][0]} among them")

    # Reads

    def _check_load(self, op: Op) -> None:
        self._check_fresh(op, op.session, op.result["revision"])
        truth = self._truths.get((op.session, op.result["born"]))
        count = op.result["n"]
        if truth is None or (count > len(truth.ids) and truth.seen_at != NEVER):
            return  # that creation's turns are gone, and nobody saw all of them
        if digest(truth.ids[:count]) != op.result["sum"]:
            self._say("order", f"{op} saw {count} turns that are not the first ones of {truth.seen_by}")
            return
        self._check_place(truth, op.result["revision"], count, str(op))

    def _check_fresh(self, op: Op, session: str, revision: int) -> None:
        known = self._session.get(session)
        if known is None:
            self._say("foreign", f"{op} saw {session!r}, which nobody wrote")
            return
        before = known.before(op.called)
        if before is not None and before.revision > revision:
            self._say("stale", f"{op} saw {session!r} at revision {revision}, after {before} was acknowledged")
        last = known.up_to(revision)
        if last is not None and last.called > op.returned:
            self._say("time", f"{op} saw {session!r} at revision {revision}, and {last} began later")
        newest = self._known.up_to(revision)
        if newest is not None and newest.called > op.returned:
            self._say("time", f"{op} saw revision {revision}, and {newest} began later")

    def _check_turns(self, op: Op) -> None:
        ids: list[str] = op.result["ids"]
        before = self._session[op.session].before(op.called) if op.session in self._session else None
        if not ids:
            return
        truth = self._home.get(ids[0])
        start = truth.where[ids[0]] if truth is not None and truth.session == op.session else -1
        end = start + len(ids)
        # The dead one may have gone on after it was last seen whole: then there is less to say.
        if truth is not None and start >= 0 and (end <= len(truth.ids) or truth.seen_at == NEVER):
            if truth.ids[start:end] != ids:
                self._say("order", f"{op} saw {ids}, which are not so in {truth.seen_by}")
                return
            if len(ids) < op.args["last"] and start:
                self._say("torn", f"{op} saw {len(ids)} turns only")
            if end not in truth.cuts:
                self._say("torn", f"{op} saw {ids}, which ends in the middle of a write")
            if before is not None and before.revision <= truth.revision:
                at = bisect.bisect_right(truth.ends, (before.revision, NEVER, NEVER))
                if at and truth.ends[at - 1][2] > end:
                    text = f"{op} ends at turn {end} of {truth.ends[at - 1][2]}, after {before} was acknowledged"
                    self._say("stale", text)
            elif before is not None and before.kind in ("create", "put", "delete"):
                self._say("stale", f"{op} saw turns of before {before}")
            return
        for id in ids:
            writer = self._ops.get(id.rpartition(".")[0])
            if writer is None or writer.session != op.session or id not in writer.ids:
                self._say("foreign", f"{op} saw turn {id}: {writer}")
            elif not writer.ok and not writer.unknown:
                self._say("refused", f"{writer}, yet {op} saw its turns")

    def _mine(self, id: str) -> bool:
        return crc32(id.encode()) % self._partitions == self._number

    def _check_items(self, op: Op) -> None:
        items = [(id, revision, count) for id, revision, count, *_ in op.result["items"] if self._mine(id)]
        listed = {id: revision for id, revision, _ in items}
        if op.kind == "list":
            if len(listed) < len(items):
                self._say("list", f"{op} has a session twice")
            if not op.result.get("sorted", True):
                self._say("list", f"{op} is not in the order of time")
        newest = max(listed.values(), default=0)
        for id, revision in listed.items():
            self._check_fresh(op, id, revision)
        for id, known in self._session.items():
            before = known.before(op.called)
            if op.kind == "list":
                # All metadata of a partition are read at one point in time, not before its newest revision.
                last = known.up_to(newest)
                if last is not None and (before is None or last.revision > before.revision):
                    before = last
                if before is not None and id in listed and listed[id] < before.revision:
                    self._say("stale", f"{op} saw {id!r} at {listed[id]} beside revision {newest}, but {before}")
            elif before is not None and self._changes_during(id, before, op):
                continue  # a page promises only what stays as it is
            else:
                seen = sum(item[0] == id for item in items)
                if seen > 1:
                    self._say("list", f"{op} has {id!r} {seen} times, though it did not change")
            if before is not None and id not in listed and not self._may_be_absent(id, before, op.returned):
                self._say("list", f"{op} lacks {id!r}, after {before}")

    def _changes_during(self, session: str, before: Op, op: Op) -> bool:
        known = self._session[session]
        return known.began_after(before.revision) < op.returned or any(
            write.called < op.returned and self._bounds.get(write.uid, (0, NEVER))[1] > before.revision
            for write in known.unknown
        )

    def _may_be_absent(self, session: str, newest: Op, until: int) -> bool:
        """Whether a session can be absent after an acknowledged write, because of a deletion."""
        deletes = self._deletes[session]
        return (
            newest.kind == "delete"
            or deletes.began_after(newest.revision) < until
            or any(op.called < until for op in deletes.unknown)
        )

    def _check_absences(self) -> None:
        for op in self._ops.values():
            by_parts = op.session.startswith(BY_PARTS)  # replay.py knows more of them
            if op.outcome == "NotFoundError" and op.session in self._session and not by_parts:
                before = self._session[op.session].before(op.called)
                if before is not None and not self._may_be_absent(op.session, before, op.returned):
                    self._say("absent", f"{op}, after {before}")
