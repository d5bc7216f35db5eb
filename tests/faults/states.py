"""The possible states of sessions that are changed by parts: every write, applied to the model in order of revisions.

What was acknowledged has its revision. An unknown write may be at any of the revisions that nobody was told, once, or
nowhere: from there on there are several possible states, until an observation says which of them it is. What is seen of
a revision must be one of its possible states; so must what a write was answered. The rules are those of replay.py.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from zlib import crc32

from .editors import FORKS, NAME, SHARED
from .model import LABELS, Refused, State, apply, fork, merged, merged_parts, rebased, same_asset, same_snapshot
from .ops import NEVER, Known, Op, Violation

__all__ = ["Moment", "Replay"]

MOST_STATES = 1000  # that are kept in mind at once


class Node(NamedTuple):
    """A possible state, and the unknown writes that it has."""

    state: State | None
    used: frozenset[str] = frozenset()


class Moment(NamedTuple):
    """A revision, and what the session may have been from there on."""

    revision: int
    states: tuple[State | None, ...]


class Seen(NamedTuple):
    """What was seen of a session at a revision; turns and parts, or some of a list's facts."""

    what: Mapping[str, Any]
    who: str

    def fits(self, state: State | None) -> bool:
        """Whether it can be that state."""
        if state is None:
            return False
        what = self.what
        if "turns" in what and not same_snapshot(state, what):
            return False
        if "records" in what and what["records"] != state.records:
            return False
        if "count" in what:
            facts = len(state.turns), state.parts.get(NAME), state.parts.get(LABELS, {})
            return facts == (what["count"], what["name"], what["labels"])
        return True


class Replay:
    """The possible states of the sessions."""

    def __init__(self, ops: Sequence[Op], dump: Sequence[Mapping[str, Any]] | None) -> None:
        self._dump = dump
        self._partitions = len(dump) if dump else 1
        self.ops: dict[str, list[Op]] = defaultdict(list)
        self._known: dict[int, Known] = {}
        self._gaps: dict[int, list[int]] = {}
        self._claimed: dict[tuple[int, int], str] = {}
        self._seen: dict[str, dict[int, list[Seen]]] = defaultdict(lambda: defaultdict(list))
        self._moments: dict[str, list[Moment]] = {}
        self._chains: dict[str, list[Op]] = defaultdict(list)
        self._bases: dict[str, Sequence[State]] = {}  # of merges and refreshes, by uid
        self.violations: list[Violation] = []
        by_partition: dict[int, list[Op]] = defaultdict(list)
        for op in ops:
            if op.session:
                by_partition[self._partition(op.session)].append(op)
                self.ops[op.session].append(op)
            if op.kind in ("read", "merge", "refresh") and op.session:
                self._chains[op.args.get("chain", op.uid)].append(op)
            self._note(op)
        for number in range(self._partitions):
            self._known[number] = known = Known([op for op in by_partition[number] if op.writes])
            last = dump[number]["revision"] if dump else max(known.revisions, default=0)
            told = set(known.revisions)
            self._gaps[number] = [revision for revision in range(1, last + 1) if revision not in told]
        for place, session in ((p, s) for s in self._seen for p in ((self._partition(s), r) for r in self._seen[s])):
            self._claimed[place] = session
        for chain in self._chains.values():
            chain.sort(key=_number)  # `called` may have been moved: see history.judged

    def _partition(self, session: str) -> int:
        return crc32(session.encode()) % self._partitions

    def _say(self, rule: str, text: str) -> None:
        self.violations.append(Violation(rule, text))

    def _note(self, op: Op) -> None:
        """Keep what was seen, by session and revision."""
        if op.session not in SHARED + FORKS:
            for item in op.result.get("items", ()) if op.ok else ():
                id, revision, count, *more = item
                if more and id in SHARED + FORKS:
                    name, labels = more
                    self._seen[id][revision].append(Seen({"count": count, "name": name, "labels": labels}, str(op)))
                else:
                    self._claimed[self._partition(id), revision] = id
            if op.ok and isinstance(op.result.get("revision"), int) and op.session:
                self._claimed[self._partition(op.session), op.result["revision"]] = op.session
        elif op.kind == "read" and op.ok:
            self._seen[op.session][op.result["revision"]].append(Seen(op.result, str(op)))
        elif op.outcome == "ConflictError" and op.result.get("actual", 0) > 0 and op.kind != "fork":
            self._seen[op.session][op.result["actual"]].append(Seen({}, str(op)))

    # Replay

    def replay(self, session: str) -> None:
        """Find the possible states of a session at each of its revisions."""
        number = self._partition(session)
        ops = self.ops[session]
        acked = {op.revision: op for op in ops if op.writes and op.ok}
        pending = [(self._low(op), op) for op in ops if op.writes and op.unknown]
        if self._dump is not None and (data := self._dump[number]["sessions"].get(session)):
            self._seen[session][data["revision"]].append(Seen(data["snapshot"], "the final dump"))
        first = min((low for low, _ in pending), default=NEVER)
        seen = self._seen[session]
        gaps = [
            gap for gap in self._gaps[number] if gap > first and self._claimed.get((number, gap), session) == session
        ]
        moments: list[Moment] = [Moment(0, (None,))]
        self._moments[session] = moments
        nodes = [Node(None)]
        for revision in sorted({*acked, *gaps}):
            if revision in acked:
                nodes = self._acknowledged(acked[revision], nodes, moments)
            else:
                late = [op for low, op in pending if low < revision]
                new = self._unknown(late, revision, nodes, moments)
                nodes = new if revision in seen else nodes + new
            nodes = self._pruned(session, revision, nodes, seen.get(revision, ()), moments)
            if len(nodes) > MOST_STATES:
                nodes = nodes[:MOST_STATES]
            moments.append(
                Moment(revision, tuple({node.state.key if node.state else "": node.state for node in nodes}.values()))
            )
        self._check_end(session, number, nodes)

    def _low(self, op: Op) -> int:
        """Return a revision that an unknown write is certainly after."""
        before = self._known[self._partition(op.session)].before(op.called)
        low = before.revision if before else 0
        for earlier in self._chains.get(op.args.get("chain", ""), ()):
            if _number(earlier) < _number(op) and earlier.ok:
                low = max(low, earlier.result.get("revision", 0), earlier.args.get("of", 0))
        return low

    def _acknowledged(self, op: Op, nodes: list[Node], moments: list[Moment]) -> list[Node]:
        """Apply a write where it was told to be."""
        new: list[Node] = []
        reasons: list[str] = []
        for node in nodes:
            for state, answer in self._outcomes(op, node.state, reasons):
                wrong = {name: answer[name] for name in answer if op.result.get(name, answer[name]) != answer[name]}
                if wrong:
                    told = {name: op.result[name] for name in wrong}
                    reasons.append(f"it was told {told}, it must be {wrong}")
                else:
                    new.append(Node(state, node.used))
        if not new:
            self._say("answer", f"{op}: {'; '.join(dict.fromkeys(reasons))[:600]}")
            return self._forced(op, nodes)
        return _distinct(new)

    def _forced(self, op: Op, nodes: list[Node]) -> list[Node]:
        """Go on as well as possible after a write that can't be."""
        args = {**op.args, "if_last": None, "create": True}
        new = []
        for node in nodes:
            try:
                state = apply(op.kind, op.uid, args, None if op.kind == "create" else node.state)[0]
            except (Refused, ValueError):
                state = State.of(op.args["after"], op.uid) if "after" in op.args else node.state
            new.append(Node(state, node.used))
        return _distinct(new)

    def _unknown(self, ops: Sequence[Op], revision: int, nodes: list[Node], moments: list[Moment]) -> list[Node]:
        """Apply any of these writes."""
        new = []
        for node in nodes:
            for op in ops:
                if op.uid not in node.used and op.args.get("base") in (None, 0, moments[-1].revision):
                    for state, _ in self._outcomes(op, node.state, [], revision):
                        new.append(Node(state, node.used | {op.uid}))
        return _distinct(new)

    def _outcomes(
        self, op: Op, state: State | None, reasons: list[str], revision: int = 0
    ) -> Iterator[tuple[State | None, dict[str, Any]]]:
        """Yield what a write can make of a state, and what it then answers."""
        if op.kind == "merge":
            for after in self._saved(op, state, reasons):
                yield after, {}
        elif op.kind == "fork":
            if state is not None:
                reasons.append("the session is there")
            else:
                for forked in self._forks(op, revision or op.revision):
                    yield forked, {}
        else:
            try:
                yield apply(op.kind, op.uid, op.args, state)
            except Refused as refusal:
                reasons.append(str(refusal))

    def _saved(self, op: Op, state: State | None, reasons: list[str]) -> Iterator[State]:
        """Yield what the save of a loaded asset can make of a state."""
        bases = self.bases(op)
        if state is None:
            reasons.append("the session is gone")
        elif not bases:  # not known: it is as it was afterwards
            yield State.of(op.args["after"], state.born, state.records) if "after" in op.args else state
        else:
            for base in bases:
                if base.born != state.born:
                    reasons.append("the session was made anew")
                    continue
                result = merged(base, op.args["mine"], state) or merged_parts(base, op.args["mine"], state)
                if result is None or result.conflicts:
                    reasons.append(f"both have changed {result.conflicts if result else 'what was loaded'}")
                else:
                    before = state.turns[: result.state.skipped]
                    yield replace(result.state, turns=before + result.state.turns, skipped=0)

    def _forks(self, op: Op, revision: int) -> Iterator[State]:
        source, moments = op.args["source"], self._moments[op.args["source"]]
        if self._partition(source) == self._partition(op.session):
            at = bisect.bisect_right(moments, revision, key=lambda moment: moment.revision) - 1
            for state in moments[at].states:
                if state is not None:
                    yield fork(op.uid, state, moments[at].revision, op.args, state.records)
            return
        window = list(self.window(op, source))  # what is read of the other partition is not read at one moment
        for moment in window:
            for state in moment.states:
                if state is not None:
                    all_records = {repr(sorted(s.records.items())): s.records for m in window for s in m.states if s}
                    for records in all_records.values() if op.args["records"] else [{}]:
                        yield fork(op.uid, state, moment.revision, op.args, records)

    def _pruned(
        self, session: str, revision: int, nodes: list[Node], seen: Iterable[Seen], moments: list[Moment]
    ) -> list[Node]:
        """Keep the states that fit what was seen; if none does, say so and go on with what was seen."""
        for sight in seen:
            fitting = [node for node in nodes if sight.fits(node.state)]
            if not fitting:
                self._diagnose(session, revision, sight, nodes)
                known = [node for node in nodes if node.state is not None] or [Node(State("?"))]
                if not nodes:
                    known = [Node(state or State("?")) for state in moments[-1].states]
                if "turns" in sight.what and not sight.what.get("skipped"):
                    states = [(node, node.state or State("?")) for node in known]
                    fitting = [
                        Node(State.of(sight.what, state.born, sight.what.get("records", state.records)), node.used)
                        for node, state in states
                    ]
                else:
                    fitting = known
            nodes = _distinct(fitting)
        return nodes

    def _diagnose(self, session: str, revision: int, sight: Seen, nodes: Sequence[Node]) -> None:
        who = f"{session!r} at revision {revision} in {sight.who}"
        states = [node.state for node in nodes if node.state is not None]
        if not nodes:
            self._say("answer", f"{who}: no write of it can have made this revision")
            return
        if not states:
            self._say("resurrected", f"{who}, but it is deleted")
            return
        if "turns" not in sight.what:
            self._say("part", f"{who}: {sight.what}, it must be {[_about(state) for state in states[:3]]}")
            return
        state = min(states, key=lambda state: _distance(state, sight.what))
        state = state.view(sight.what.get("skipped", 0))
        must, there = [id for id, _ in state.turns], [id for id, _ in sight.what["turns"]]
        if missing := [id for id in must if id not in there]:
            self._say("lost turn", f"{who}: {missing} of {must}")
        if more := [id for n, id in enumerate(there) if id not in must or id in there[:n]]:
            self._say("extra turn", f"{who}: {more} beside {must}")
        for name in sorted({*state.parts, *sight.what["parts"]}):
            if (want := state.parts.get(name)) != (found := sight.what["parts"].get(name)):
                self._say("part", f"{who}: {name} is {found!r}, it must be {want!r}")
        if not missing and not more and state.turns != tuple(map(tuple, sight.what["turns"])):
            self._say("part", f"{who}: turns {sight.what['turns']}, they must be {state.turns}")
        records = sight.what.get("records", state.records)
        if records != state.records:
            self._say("part", f"{who}: records {records}, they must be {state.records}")

    def _check_end(self, session: str, number: int, nodes: Sequence[Node]) -> None:
        if self._dump is None or session in self._dump[number]["sessions"]:
            return
        if not any(node.state is None for node in nodes):
            self._say("resurrected", f"{session!r} is gone in the end, though nobody deleted it")

    # Loaded assets

    def bases(self, op: Op) -> Sequence[State]:
        """Return what an asset can have been based on when it was saved or refreshed; nothing if that is not known."""
        if op.uid in self._bases:
            return self._bases[op.uid]
        bases: Sequence[State] = ()
        for earlier in self._chains[op.args["chain"]]:
            self._bases[earlier.uid] = bases
            if earlier is op:
                break
            if earlier.kind == "read" and earlier.ok:
                bases = self._alike(earlier.session, earlier.result["revision"], earlier.result)
            elif earlier.ok and "of" in earlier.args:
                bases = list({base.key: base for base in self._bases_after(earlier, bases)}.values())
        return self._bases.setdefault(op.uid, ())

    def _bases_after(self, op: Op, bases: Sequence[State]) -> Iterable[State]:
        """Return what an asset can be based on after it was saved or refreshed."""
        after = op.args["after"]
        if op.kind == "merge" and not op.result.get("idle"):
            if op.args.get("behind"):
                return [State.of(after, state.born) for state in self.states(op.session, op.revision) if state]
            return self._alike(op.session, op.args["of"], after)
        return [
            rebased(base, state.view(result.state.skipped), result.conflicts)
            for state in self.states(op.session, op.args["of"])
            for base in bases
            if state is not None
            and base.born == state.born
            and (result := merged(base, op.args["mine"], state)) is not None
            and same_asset(result.state, after, result.conflicts)
        ]

    def _alike(self, session: str, revision: int, snapshot: Mapping[str, Any]) -> list[State]:
        """Return the states of a revision that are like that."""
        states = self.states(session, revision)
        return [state.view(snapshot.get("skipped", 0)) for state in states if state and same_snapshot(state, snapshot)]

    def states(self, session: str, revision: int) -> tuple[State | None, ...]:
        """Return what a session can have been at a revision of its own; nothing if it has none such."""
        moments = self._moments[session]
        at = bisect.bisect_right(moments, revision, key=lambda moment: moment.revision) - 1
        return moments[at].states if moments[at].revision == revision else ()

    def window(self, op: Op, session: str | None = None) -> Iterator[Moment]:
        """Yield what a session may have been while an operation was under way."""
        session = session or op.session
        known = self._known[self._partition(session)]
        acked = {write.revision: write for write in self.ops[session] if write.writes and write.ok}
        before = max((r for r, write in acked.items() if write.returned < op.called), default=0)
        after = known.after(op.returned)
        moments = self._moments[session]
        start = bisect.bisect_right(moments, before, key=lambda moment: moment.revision) - 1
        for moment in moments[start:]:
            if moment.revision in acked and acked[moment.revision].called > op.returned:
                continue
            if moment.revision >= after:
                break
            yield moment


def _number(op: Op) -> int:
    """Return which of its worker's operations it is."""
    return int(op.uid.rpartition("-")[2])


def _distinct(nodes: Iterable[Node]) -> list[Node]:
    return list({(node.state.key if node.state else "", node.used): node for node in nodes}.values())


def _distance(state: State, what: Mapping[str, Any]) -> int:
    turns = {id for id, _ in state.turns} ^ {str(id) for id, _ in what["turns"]}
    differing = [name for name in {*state.parts, *what["parts"]} if state.parts.get(name) != what["parts"].get(name)]
    return len(turns) + len(differing)


def _about(state: State) -> tuple[int, Any, Any]:
    return len(state.turns), state.parts.get(NAME), state.parts.get(LABELS, {})
