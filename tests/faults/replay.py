"""The checker of sessions that are changed by parts: what was seen and answered, against their possible states.

The rules, by the names that violations bear:

    answer       a write was answered what it can't have come to, or was applied where its condition was not met
    lost turn    a turn is missing that nobody removed
    extra turn   a turn is there that was removed, or is there twice, or was never written
    part         a part, label or record is not what was last written to it
    resurrected  a session is there that is deleted, or gone that is not
    list         a list by label lacks a session that had it, or has one that had not
    conflict parts  a refused save names other parts than those that both have changed
    refreshed    a loaded asset is not what was stored at its revision, with its own changes
    changed asset   a save that failed has changed its asset
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .editors import FORKS, SHARED
from .model import LABELS, Refused, State, apply, merged, same_asset, same_snapshot
from .ops import Op, Violation
from .states import Replay

__all__ = ["check_parts"]


def check_parts(ops: Sequence[Op], dump: Sequence[Mapping[str, Any]] | None) -> list[Violation]:
    """Return what violates the contract in sessions that are changed by their parts."""
    replay = Replay(ops, dump)
    for session in (*SHARED, *FORKS):  # forks after their sources
        replay.replay(session)
    answers = _Answers(replay)
    for session in (*SHARED, *FORKS):
        answers.check(session)
    for op in ops:
        if op.kind == "labelled" and op.ok:
            answers.check_labelled(op)
    return replay.violations + answers.violations


class _Answers:
    """What reads, refusals and loaded assets were told."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self.violations: list[Violation] = []

    def _say(self, rule: str, text: str) -> None:
        self.violations.append(Violation(rule, text))

    def check(self, session: str) -> None:
        """Check what reads, refusals and writes without an effect were told."""
        for op in self._replay.ops[session]:
            if op.kind in ("merge", "refresh"):
                self._check_asset(op)
            if op.outcome == "ConflictError":
                self._check_conflict(op)
            elif op.outcome == "NotFoundError":
                self._check_not_found(op)
            elif op.ok and op.kind in ("tail", "records", "get_records"):
                self._check_read(op)
            elif op.ok and op.result.get("idle") and op.kind == "commit":
                self._check_idle(op)

    def _any(self, op: Op, holds: Callable[[State | None], bool], session: str | None = None) -> bool:
        return any(holds(state) for moment in self._replay.window(op, session) for state in moment.states)

    def _check_not_found(self, op: Op) -> None:
        source = op.args["source"] if op.kind == "fork" else None
        if op.kind == "replace":
            id = op.args["replace"][0]
            told = self._any(op, lambda state: state is None or id not in dict(state.turns))
        else:
            told = self._any(op, lambda state: state is None, source)
        if not told:
            self._say("absent", f"{op}, but it was there all the time")

    def _check_read(self, op: Op) -> None:
        if op.kind == "tail":
            last, ids = op.args["last"], op.result["ids"]
            if not self._any(op, lambda state: state is not None and [id for id, _ in state.turns[-last:]] == ids):
                self._say("stale", f"{op} saw {ids}, which were never the last turns meanwhile")
            return
        found, prefix = op.result["records"], op.args.get("prefix", "")
        states = [state.records if state else {} for moment in self._replay.window(op) for state in moment.states]
        if op.kind == "get_records":
            fits = any(found == records for records in states)
        else:  # keys and values are not read at one moment
            keys = {key for records in states for key in records if key.startswith(prefix)} | found.keys()
            fits = all(any(records.get(key) == found.get(key) for records in states) for key in keys)
        if not fits:
            self._say("part", f"{op} saw {found}, which they never were meanwhile: {states[:3]}")

    def check_labelled(self, op: Op) -> None:
        """Check that a list of those with a label has all that had it, and no other."""
        label, value = op.args["label"], op.args["value"]
        found = {id: labels for id, _, _, _, labels in op.result["items"]}
        for id, labels in found.items():
            if labels.get(label) != value:
                self._say("list", f"{op} has {id!r} with the labels {labels}")
        for session in (*SHARED, *FORKS):
            moments = self._replay.window(op, session)
            states = [state for moment in moments for state in moment.states]
            if session not in found and all(
                s is not None and s.parts.get(LABELS, {}).get(label) == value for s in states
            ):
                self._say("list", f"{op} lacks {session!r}, which had the label all the time")

    def _check_idle(self, op: Op) -> None:
        def is_idle(state: State | None) -> bool:
            if state is None:
                return False
            try:
                after, answer = apply(op.kind, op.uid, op.args, state)
            except Refused:
                return False
            return after == state and answer.get("popped", []) == op.result.get("popped", [])

        if not self._any(op, is_idle):
            self._say("answer", f"{op} changed nothing, though there was something to change all the time")

    def _check_conflict(self, op: Op) -> None:
        actual, parts = op.result["actual"], tuple(op.result["parts"])
        if op.kind == "fork":
            return  # the general rule looks for who else has made it
        if actual == 0:
            if not self._any(op, lambda state: state is None):
                self._say("conflict", f"{op}: it was never absent meanwhile")
            return
        states = self._replay.states(op.session, actual)
        if op.kind in ("merge", "refresh"):
            bases, musts = self._replay.bases(op), []
            for base, state in itertools.product(bases, states):
                if state is not None:
                    result = merged(base, op.args["mine"], state) if state.born == base.born else None
                    must = result.conflicts if result else ()
                    if parts == must and (must or result is None):
                        return
                    musts.append(must)
            if musts:
                self._say("conflict parts", f"{op} at revision {actual} names {parts}, it must be {musts}")
        elif op.kind == "create" or ((base_revision := op.args.get("base")) is not None and actual != base_revision):
            return
        elif op.args.get("if_last") is not None:
            if states and not any(s is None or not s.turns or s.turns[-1][0] != op.args["if_last"] for s in states):
                self._say("conflict", f"{op}: {op.args['if_last']} was the last turn at revision {actual}")
        else:
            self._say("conflict", f"{op}: found revision {actual}")

    def _check_asset(self, op: Op) -> None:
        """An asset is what is stored, with its own changes; after a failure it is what it was."""
        after, mine = op.args.get("after"), op.args["mine"]
        if after is None:
            return
        if not op.ok:
            if after != mine:
                self._say("changed asset", f"{op} has made {after} of {mine}")
            return
        of = op.args["of"]
        if op.writes and op.args.get("behind"):  # it could not be read again, or was gone
            if after != mine:
                self._say("refreshed", f"{op} has made {after} of {mine}")
            return
        states = self._replay.states(op.session, of)
        if not states:
            self._say("refreshed", f"{op}: the session had no revision {of}")
            return
        if op.writes:
            fits = any(state is not None and same_snapshot(state, after) for state in states)
            must: Sequence[Any] = states
        else:
            bases = self._replay.bases(op)
            if not bases:
                return
            must = [merged(base, mine, state) for base, state in itertools.product(bases, states) if state is not None]
            fits = any(result and same_asset(result.state, after, result.conflicts) for result in must)
        if not fits:
            self._say("refreshed", f"{op} came to {after} at revision {of}; it must be {must}"[:1500])
