"""The checker of watches: reads what watchers were told, and finds what can't be beside the history and the dump.

It is pure. A **chain** is a watch and all that resumed from its last cursor, perhaps in other processes; to its user it
is one watch. Changes may be left out only where a later one of the same session was there to be told.

The rules, by the names that violations bear:

    watch error      a watch ended with an error, or by itself
    watch order      of a partition, a change that is no newer than one before: out of order, or twice
    watch cursor     a cursor that is not where the watch has come to
    watch foreign    a change that no write made, or of another kind than the write, or before the write
    watch missed     a write left out, though its session had no later state when the watch went past it
    watch final      a session whose last state, a deletion perhaps, was not told in the end
"""

from __future__ import annotations

import base64
import bisect
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec

from .history import Op, Violation

__all__ = ["Chain", "Told", "check_watches", "positions", "read_chains", "unfinished"]


def positions(cursor: str) -> list[int]:
    """Return what a cursor says of each partition."""
    _, least, width, beyond = msgspec.msgpack.decode(base64.urlsafe_b64decode(cursor))
    return [least + int.from_bytes(beyond[at : at + width]) for at in range(0, len(beyond), width)]


@dataclass(frozen=True, slots=True)
class Told:
    """A change, as a watcher was told of it."""

    at: int
    kind: str
    id: str
    revision: int
    cursor: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.id!r}@{self.revision} at {self.at / 1e9:.3f}"


@dataclass
class Chain:
    """What one watch was told, through all its resumptions."""

    name: str
    start: list[int]
    ids: frozenset[str] | None = None
    told: list[Told] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    resumed: int = 0

    def wants(self, id: str) -> bool:
        return self.ids is None or id in self.ids


def read_chains(paths: Iterable[Path]) -> list[Chain]:
    """Read the watchers' logs. A line that a kill cut short was not told."""
    chains: dict[str, Chain] = {}
    for path in paths:
        for text in path.read_bytes().splitlines():
            try:
                line = msgspec.json.decode(text)
            except msgspec.DecodeError:
                continue
            name = line["chain"]
            if "since" in line:
                if name in chains:
                    chains[name].resumed += 1
                else:
                    ids = line["ids"]
                    chains[name] = Chain(name, positions(line["since"]), None if ids is None else frozenset(ids))
            elif "error" in line:
                chains[name].errors.append(line["error"])
            else:
                told = Told(line["at"], line["kind"], line["id"], line["revision"], line["cursor"])
                chains[name].told.append(told)
    return list(chains.values())


def unfinished(chain: Chain, dump: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, int]]:
    """Return the sessions whose last state the chain has not told: id, kind and revision."""
    latest = {told.id: (told.kind, told.revision) for told in chain.told}
    missing = []
    for number, partition in enumerate(dump):
        for id, revision in partition["changes"].items():
            kind = "deleted" if id in partition["deleted"] else "saved"
            if chain.wants(id) and revision > chain.start[number] and latest.get(id) != (kind, revision):
                missing.append((id, kind, revision))
    return missing


def check_watches(chains: Sequence[Chain], ops: Sequence[Op], dump: Sequence[Mapping[str, Any]]) -> list[Violation]:
    """Return what violates the contract in what watchers were told."""
    return [violation for chain in chains for violation in _Check(chain, ops, dump).check()]


class _Check:
    def __init__(self, chain: Chain, ops: Sequence[Op], dump: Sequence[Mapping[str, Any]]) -> None:
        self._chain = chain
        self._dump = dump
        self._acknowledged: dict[tuple[int, int], Op] = {}
        self._unknown: dict[str, list[Op]] = defaultdict(list)
        self._of: dict[str, list[Op]] = defaultdict(list)
        for op in ops:
            if op.writes and op.ok:
                self._acknowledged[self._partition(op.session), op.revision] = op
                self._of[op.session].append(op)
            elif op.writes and op.unknown:
                self._unknown[op.session].append(op)
        self._violations: list[Violation] = []

    def check(self) -> list[Violation]:
        chain = self._chain
        for error in chain.errors:
            self._say("error", error)
        self._check_order()
        for told in chain.told:
            self._check_origin(told)
        self._check_missed()
        for id, kind, revision in unfinished(chain, self._dump):
            self._say("final", f"{id!r} was {kind} at revision {revision} in the end")
        return self._violations

    def _partition(self, id: str) -> int:
        return crc32(id.encode()) % len(self._dump)

    def _say(self, rule: str, text: str) -> None:
        self._violations.append(Violation(f"watch {rule}", f"chain {self._chain.name}: {text}"))

    def _check_order(self) -> None:
        come_to = list(self._chain.start)
        before: list[Told | None] = [None] * len(come_to)
        for told in self._chain.told:
            number = self._partition(told.id)
            if not self._chain.wants(told.id):
                self._say("foreign", f"{told} was not asked for")
            if told.revision <= come_to[number]:
                self._say("order", f"{told} came after {before[number] or come_to[number]}")
            come_to[number] = max(come_to[number], told.revision)
            before[number] = told
            if told.cursor and positions(told.cursor) != come_to:
                self._say("cursor", f"{told} has the cursor {positions(told.cursor)}, the watch is at {come_to}")

    def _check_origin(self, told: Told) -> None:
        number = self._partition(told.id)
        made = self._acknowledged.get((number, told.revision))
        candidates = self._unknown[told.id] if made is None else [made]
        if told.revision > self._dump[number]["revision"]:
            candidates = []
        facts = told.id, told.kind == "deleted"
        if not any((op.session, op.kind == "delete") == facts and op.called < told.at for op in candidates):
            self._say("foreign", f"{told}: {made or 'no write has made it'}")

    def _check_missed(self) -> None:
        """Of each write left out: when the watch first went past it, a later write of the session had begun."""
        passed: dict[int, tuple[list[int], list[int]]] = {}
        for number in range(len(self._dump)):
            told = sorted((t.revision, t.at) for t in self._chain.told if self._partition(t.id) == number)
            first_at = []
            earliest = 2**63
            for _, at in reversed(told):
                earliest = min(earliest, at)
                first_at.append(earliest)
            passed[number] = [revision for revision, _ in told], first_at[::-1]
        told_of = {(told.id, told.revision) for told in self._chain.told}
        for id, writes in self._of.items():
            if not self._chain.wants(id):
                continue
            number = self._partition(id)
            revisions, first_at = passed[number]
            writes.sort(key=lambda op: op.revision)
            later = min((op.called for op in self._unknown[id]), default=2**63)
            for op in reversed(writes):
                if op.revision > self._chain.start[number] and (id, op.revision) not in told_of:
                    at = bisect.bisect_right(revisions, op.revision)
                    if at < len(revisions) and later > first_at[at]:
                        self._say("missed", f"{op} was left out, {id!r} had no later state")
                later = min(later, op.called)
