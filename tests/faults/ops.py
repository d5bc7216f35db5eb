"""What workers say they did: their logs, read as operations; and the acknowledged writes among them, in order.

A write is acknowledged (it says its revision), refused (the error promises that it was not applied), or unknown
(OutcomeUnknownError, a cancelled or interrupted caller, a killed worker): then it is in at most once, at any time after
the call.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

__all__ = [
    "BY_PARTS",
    "FALSEHOODS",
    "MEMORY",
    "NEVER",
    "QUIET",
    "REFUSALS",
    "UNKNOWN",
    "WRITES",
    "Faults",
    "Known",
    "Op",
    "Violation",
    "judged",
    "read_history",
]

WRITES = (
    "append", "create", "put", "save", "update", "delete",
    "commit", "replace", "merge", "amend", "fork",  # by parts: see model.py
)  # fmt: skip
REFUSALS = (
    "UnavailableError",
    "NotFoundError",
    "ConflictError",
    "StoreFullError",
    "LeaseLostError",
    "PermissionDeniedError",
)  # not applied, says the contract
UNKNOWN = ("OutcomeUnknownError", "Cancelled", "Interrupted", "Swallowed", None)
FALSEHOODS = (
    "refused",
    "conflict",
    "conflict parts",
    "absent",
)  # the rules that an error breaks which says what isn't so
BY_PARTS = ("shared-", "fork-")  # how sessions begin whose histories don't only grow: replay.py checks those
NEVER = 2**63
MEMORY = 2_000_000_000  # ns for which a store may remember a denial, or not know that its server was demoted


@dataclass(frozen=True)
class Faults:
    """What the checker must know of the faults, in ns of the monotonic clock."""

    moved: Sequence[tuple[int, int]] = ()  # the old master was demoted, and then the endpoint led to the new one
    denied: Sequence[tuple[int, int]] = ()  # the workers' user lacked rights
    healed: int = NEVER  # all faults were over
    alive: Sequence[str] = ()  # workers that had some time to write after that


QUIET = Faults()


@dataclass(slots=True)
class Op:
    """One call of the store, and how it ended (outcome None: nobody knows)."""

    uid: str
    kind: str
    session: str
    called: int
    args: dict[str, Any] = field(default_factory=dict)
    returned: int = NEVER
    outcome: str | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def writes(self) -> bool:
        """Whether it may have made a revision."""
        return self.kind in WRITES and not self.result.get("idle")

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"

    @property
    def unknown(self) -> bool:
        return self.outcome in UNKNOWN

    @property
    def revision(self) -> int:
        revision: int = self.result["revision"]
        return revision

    @property
    def ids(self) -> list[str]:
        ids: list[str] = self.args.get("ids", [])
        return ids

    def __str__(self) -> str:
        end = f"@{self.revision}" if self.ok and "revision" in self.result else ""
        took = "" if self.returned == NEVER else f" in {(self.returned - self.called) / 1e9:.3f} s"
        return f"{self.kind} {self.uid} on {self.session!r} ({self.outcome}{end}, called {self.called / 1e9:.3f}{took})"


@dataclass(frozen=True)
class Violation:
    """What can't be, and why."""

    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.text}"


def read_history(paths: Iterable[Path]) -> list[Op]:
    """Read the workers' logs. A line that a kill cut short is a call that was not made."""
    ops: dict[str, Op] = {}
    for path in paths:
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            at = line.pop("at")
            if (noted := line.pop("note", None)) is not None:
                ops[noted].args |= line
            elif (uid := line.pop("call", None)) is not None:
                ops[uid] = Op(uid, line.pop("kind"), line.pop("session"), at, line)
            else:
                op = ops[line.pop("return")]
                op.returned, op.outcome, op.result = at, line.pop("outcome"), line
    return list(ops.values())


def judged(op: Op, moved: Sequence[tuple[int, int]]) -> Op:
    """Return a read as if it had begun before the server's role changed: then it may have read from the demoted one."""
    if op.writes and op.outcome not in ("NotFoundError", "ConflictError"):
        return op
    begins = [begin for begin, end in moved if begin < op.returned and op.called < end + MEMORY]
    return replace(op, called=min(op.called, *begins)) if begins else op


class Known:
    """The acknowledged writes of a session or partition, in the order of their revisions; the unknown ones apart."""

    def __init__(self, writes: Sequence[Op]) -> None:
        self.unknown = [op for op in writes if op.unknown]
        self.writes = sorted((op for op in writes if op.ok), key=lambda op: op.revision)
        self.revisions = [op.revision for op in self.writes]
        by_return = sorted(self.writes, key=lambda op: op.returned)
        self._returns = [op.returned for op in by_return]
        self._newest = list(_running_max(by_return))
        calls = [op.called for op in reversed(self.writes)]
        by_call = sorted(self.writes, key=lambda op: op.called)
        self._calls = [op.called for op in by_call]
        lowest = accumulate((op.revision for op in reversed(by_call)), min)
        self._lowest = [*reversed(list(lowest)), NEVER]
        self._first_calls = [*reversed(list(accumulate(calls, min))), NEVER]

    def began_after(self, revision: int) -> int:
        """Return when the first of the writes with a higher revision was called."""
        return self._first_calls[bisect.bisect_right(self.revisions, revision)]

    def before(self, moment: int) -> Op | None:
        """Return the newest of the writes that were acknowledged before a moment."""
        at = bisect.bisect_left(self._returns, moment)
        return self._newest[at - 1] if at else None

    def after(self, moment: int) -> int:
        """Return the lowest revision of the writes that were called after a moment."""
        return self._lowest[bisect.bisect_right(self._calls, moment)]

    def between(self, low: int, high: int) -> list[Op]:
        """Return those with low < revision < high."""
        return self.writes[bisect.bisect_right(self.revisions, low) : bisect.bisect_left(self.revisions, high)]

    def up_to(self, revision: int) -> Op | None:
        """Return the last one of this revision or an earlier one."""
        at = bisect.bisect_right(self.revisions, revision)
        return self.writes[at - 1] if at else None


def _running_max(ops: Iterable[Op]) -> Iterator[Op]:
    newest: Op | None = None
    for op in ops:
        if newest is None or op.revision > newest.revision:
            newest = op
        yield newest
