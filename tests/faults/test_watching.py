"""The checkers of watches and leases fire: each rule on what was made by hand, and none on what is right."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import msgspec
import pytest

from orcs_redis import Change
from orcs_redis.model.asset import to_datetime

from .history import Op
from .leases import check_leases
from .test_history import lost_append, op
from .watchers import Log
from .watching import Chain, Told, check_watches, read_chains

SECOND = 1_000_000_000


def cursor(*positions: int) -> str:
    beyond = b"".join((position - min(positions)).to_bytes(8) for position in positions)
    return base64.urlsafe_b64encode(msgspec.msgpack.encode((b"incarnation", min(positions), 8, beyond))).decode()


def write(revision: int, session: str = "s", kind: str = "append") -> Op:
    """A write that took from its revision's second to the next half."""
    return op(f"u{revision}", kind, revision, revision + 0.5, session=session, ids=[], revision_=revision)


def told(
    revision: int, id: str = "s", kind: str = "saved", at: float | None = None, come_to: int | None = None
) -> Told:
    moment = int((revision + 0.4 if at is None else at) * SECOND)
    return Told(moment, kind, id, revision, cursor(revision if come_to is None else come_to))


# A session that lives, one that dies, and an unknown write (revision 5) between.
HISTORY = [
    write(1, kind="create"),
    write(2, "t", "create"),
    write(3),
    write(4, "t", "delete"),
    lost_append("u5", 5),
    write(6),
]
ALL = [told(1), told(2, "t"), told(3), told(4, "t", "deleted"), told(5), told(6)]
DUMP = [{"revision": 6, "changes": {"s": 6, "t": 4}, "deleted": {"t": 4}}]


def rules(changes: list[Told], ops: list[Op] = HISTORY, **options: Any) -> set[str]:
    chain = Chain("w", [0], told=changes, **options)
    return {violation.rule for violation in check_watches([chain], ops, DUMP)}


def test_right_watch_passes() -> None:
    """A watch that was told everything is right."""
    assert rules(ALL) == set()


def test_merged_changes_pass() -> None:
    """What was left out because a later state was already there is right."""
    assert rules([told(4, "t", "deleted", at=9), told(6, at=9)]) == set()
    assert rules([told(2, "t", at=3.2), told(3, at=4.5), told(4, "t", "deleted"), told(6)]) == set()


def test_some_sessions() -> None:
    """A watch of some sessions need not tell of others, and must not."""
    assert rules([told(4, "t", "deleted", at=9)], ids=frozenset("t")) == set()
    assert rules(ALL, ids=frozenset("t")) == {"watch foreign"}


def test_watch_from_a_later_cursor() -> None:
    """What was before a watch's beginning need not be told."""
    chain = Chain("w", [4], told=ALL[4:])
    assert check_watches([chain], HISTORY, DUMP) == []


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param([*ALL[:3], ALL[2], *ALL[3:]], id="twice"),
        pytest.param([ALL[0], told(3, come_to=3), told(2, "t", at=3.5, come_to=3), *ALL[3:]], id="out of order"),
    ],
)
def test_order(changes: list[Told]) -> None:
    """A change told twice, or after a later one, is found."""
    assert rules(changes) == {"watch order"}


def test_cursor() -> None:
    """A cursor that would skip, or repeat, what follows is found."""
    for come_to in (2, 4):
        assert rules([*ALL[:2], told(3, come_to=come_to), *ALL[3:]]) == {"watch cursor"}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(told(7), id="beyond the counter"),
        pytest.param(told(6, "t"), id="another session's revision"),
        pytest.param(told(6, "s", "deleted"), id="another kind"),
        pytest.param(told(6, at=5.9), id="before the write"),
    ],
)
def test_foreign(change: Told) -> None:
    """A change that no write made is found."""
    assert "watch foreign" in rules([*ALL[:5], change])


def test_foreign_unknown() -> None:
    """A change at a revision that nobody was told of is that of an unknown write of the session, or none."""
    assert "watch foreign" in rules([*ALL[:4], told(5, "t"), ALL[5]])
    assert "watch foreign" in rules(ALL, [write for write in HISTORY if write.uid != "u5"])


def test_missed() -> None:
    """A write left out, when the watch had nothing later to tell of its session, is found."""
    # At 4.4 the watch went past revision 3, and the next write of the session began at 5.
    assert rules([*ALL[:2], ALL[3], ALL[4], ALL[5]]) == {"watch missed"}
    # In time it is made good, but whoever looked in between did not see it.
    assert rules([ALL[0], ALL[2], *ALL[3:]]) == {"watch missed"}


@pytest.mark.parametrize(("left_out", "count"), [("s", 1), ("t", 1), ("st", 2)])
def test_final(left_out: str, count: int) -> None:
    """A session whose last state, a deletion too, was not told is found."""
    last = {"s": 6, "t": 4}
    changes = [t for t in ALL if t.id not in left_out or t.revision < last[t.id]]
    found = check_watches([Chain("w", [0], told=changes)], HISTORY, DUMP)
    assert sum(violation.rule == "watch final" for violation in found) == count


def test_resumed_from_a_later_cursor() -> None:
    """A resumed watch that skips what came in between is found."""
    assert "watch final" in rules([*ALL[:2], ALL[5]])  # t's deletion fell into the gap


def test_error() -> None:
    """A watch that ended is found."""
    assert rules(ALL, errors=["StoreResetError"]) == {"watch error"}


def test_log_of_a_watcher_is_read_back(tmp_path: Path) -> None:
    """A chain is what all processes of its name were told; a line that a kill has cut off was not told."""
    path = tmp_path / "watch.jsonl"
    at = to_datetime(0)
    for first in (1, 3):
        log = Log(str(path))
        log.begun("w", cursor(first - 1, 0), None)
        for revision in (first, first + 1):
            log.told("w", Change("saved", "s", revision, at, cursor(revision, 0), "o"))
    log.failed("w", "StoreResetError")
    with path.open("a") as file:
        file.write('{"chain": "w", "at')
    (chain,) = read_chains([path])
    assert (chain.name, chain.start, chain.ids, chain.resumed) == ("w", [0, 0], None, 1)
    assert [told.revision for told in chain.told] == [1, 2, 3, 4]
    assert chain.told[-1].cursor == cursor(4, 0)
    assert chain.errors == ["StoreResetError"]


# Leases


def acquire(token: int, begin: float, end: float, session: str = "s", ttl: float = 10) -> Op:
    return op(f"a{token}", "acquire", begin, end, session=session, ttl=ttl, token_=token)


def release(token: int, begin: float) -> Op:
    return op(f"r{token}", "release", begin, begin + 1, token=token)


def fenced(revision: int, token: int, begin: float) -> Op:
    return op(f"f{revision}", "append", begin, begin + 1, ids=[], lease=token, revision_=revision)


def lease_rules(*ops: Op) -> set[str]:
    return {violation.rule for violation in check_leases(ops, 1)}


def test_right_leases_pass() -> None:
    """One after the other, given back or run out; a late write that came before the next holder's is right."""
    assert lease_rules(acquire(1, 0, 1), fenced(1, 1, 2), release(1, 4), acquire(2, 4.5, 5), fenced(2, 2, 6)) == set()
    assert lease_rules(acquire(1, 0, 1), acquire(2, 9, 11), acquire(3, 2, 3, "t")) == {"lease token"}
    assert lease_rules(acquire(1, 0, 1), fenced(1, 1, 10.5), acquire(2, 9, 11)) == set()


def test_tokens() -> None:
    """A token given twice, or lower than one given before, is found."""
    assert lease_rules(acquire(1, 0, 1), acquire(1, 20, 21)) == {"lease token"}
    assert lease_rules(acquire(2, 0, 1), acquire(1, 20, 21)) == {"lease token"}


def test_holders() -> None:
    """Two holders at once are found, unless the first gave it back."""
    assert lease_rules(acquire(1, 0, 1), acquire(2, 5, 6)) == {"lease holders"}
    assert lease_rules(acquire(1, 0, 1), release(1, 4), acquire(2, 5, 6)) == set()


def test_fence() -> None:
    """A write of a former holder's after one of the next, or after its grant, is found."""
    grants = [acquire(1, 0, 1), acquire(2, 10, 11)]
    assert lease_rules(*grants, fenced(5, 2, 12), fenced(6, 1, 10.5)) == {"lease fence"}
    assert lease_rules(*grants, fenced(6, 1, 12)) == {"lease fence"}
