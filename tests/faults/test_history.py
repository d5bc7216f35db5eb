"""The checker fires: each rule on a history made by hand, and none on one that is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .history import check
from .ops import Faults, Op, read_history
from .recorder import Recorder, digest

SECOND = 1_000_000_000


def op(
    uid: str, kind: str, begin: float, end: float | None, outcome: str | None = "ok", session: str = "s", **facts: Any
) -> Op:
    """A call at `begin` and its return at `end`, in seconds; facts of the result end in an underscore."""
    args = {name: value for name, value in facts.items() if not name.endswith("_")}
    result = {name.rstrip("_"): value for name, value in facts.items() if name.endswith("_")}
    returned = 2**63 if end is None else int(end * SECOND)
    return Op(uid, kind, session, int(begin * SECOND), args, returned, outcome, result)


def load(uid: str, begin: float, end: float, revision: int, ids: list[str], **facts: Any) -> Op:
    seen: dict[str, Any] = {
        "revision": revision,
        "n": len(ids),
        "sum": digest(ids),
        "all": ids,
        "born": "c",
        "counter": 0,
        "mark": "c",
    }
    loaded = op(uid, "load", begin, end)
    loaded.result = seen | facts
    return loaded


def create() -> Op:
    return op("c", "create", 0, 1, ids=["c.0"], base=0, revision_=1)


def append(uid: str, begin: float, end: float | None, revision: int, turns: int = 1) -> Op:
    return op(uid, "append", begin, end, ids=[f"{uid}.{n}" for n in range(turns)], revision_=revision)


def lost_append(uid: str, begin: float, outcome: str | None = "OutcomeUnknownError") -> Op:
    return op(uid, "append", begin, begin + 1, outcome, ids=[f"{uid}.0"])


def dump(ids: list[str], ops: list[int], last: int | None = None, **metadata: Any) -> list[dict[str, Any]]:
    """What the server holds if all is right and the session is "s", last changed at the last of these revisions."""
    revision = ops[-1]
    return [
        {
            "revision": last or revision,
            "sessions": {
                "s": {
                    "revision": revision, "turns": len(ids), "ids": ids, "updated_at_ms": 7,
                    "metadata": {"born": "c", "counter": 0, "mark": "c"} | metadata,
                }
            },
            "meta": {"s": [revision, 7, len(ids)]}, "updated": {"s": 7}, "changes": {"s": revision},
            "deleted": {}, "deleted_meta": [], "strays": [], "windows": [ops],
        }
    ]  # fmt: skip


def rules(ops: list[Op], end: list[dict[str, Any]] | None = None) -> set[str]:
    return {violation.rule for violation in check(ops, end)}


def history() -> list[Op]:
    """A history that is right: an unknown append took revision 3."""
    return [
        create(),
        append("a", 1.1, 2, 2, turns=2),
        lost_append("u", 2.1),
        op("v", "append", 2.1, 5, "UnavailableError", ids=["v.0"]),
        append("b", 3.2, 4, 4),
        op("s1", "save", 4.1, 5, ids=["s1.0"], base=4, counter=1, born="c", revision_=5),
        load("l", 5.1, 6, 5, ["c.0", "a.0", "a.1", "u.0", "b.0", "s1.0"], counter=1, mark="s1"),
        op("t", "turns", 5.1, 6, last=3, ids_=["u.0", "b.0", "s1.0"]),
        op("i", "list", 5.1, 6, session="", items_=[["s", 5, 6]], sorted_=True),
        op("p", "page", 5.1, 6, session="", items_=[["s", 5, 6]]),
    ]


END = ["c.0", "a.0", "a.1", "u.0", "b.0", "s1.0"]


def end(ids: list[str] = END) -> list[dict[str, Any]]:
    return dump(ids, [1, 2, 3, 4, 5], counter=1, mark="s1")


def test_right_history_passes() -> None:
    """A history in which an unknown append was applied between others is right."""
    assert check(history(), end()) == []


def test_unknown_write_may_be_absent() -> None:
    """An unknown write that was not applied leaves no gap and is right."""
    ops = [create(), lost_append("u", 1.1), lost_append("w", 1.1, None), append("a", 3, 4, 2)]
    assert check(ops, dump(["c.0", "a.0"], [1, 2])) == []


def test_unknown_write_may_come_late() -> None:
    """An unknown write may be applied after writes that began after its error."""
    ops = [create(), lost_append("u", 1.1), append("a", 3, 4, 2)]
    assert check(ops, dump(["c.0", "a.0", "u.0"], [1, 2, 3])) == []


def test_lost() -> None:
    """An acknowledged append that is not in the final history is found."""
    assert "lost" in rules(history(), end(["c.0", "a.0", "a.1", "u.0", "s1.0"]))


def test_lost_in_the_middle() -> None:
    """An acknowledged append that a later read lacks is found, though the session was deleted afterwards."""
    ops = [create(), append("a", 1.1, 2, 2), append("b", 2.1, 3, 3), load("l", 4, 5, 3, ["c.0", "b.0"])]
    assert "lost" in rules(ops)


def test_lost_after_the_end() -> None:
    """A session whose last revision is older than an acknowledged write is found."""
    assert "lost" in rules([*history(), append("z", 7, 8, 6)], end())


def test_doubled() -> None:
    """A turn that is there twice is found."""
    assert "doubled" in rules(history(), end([*END, "b.0"]))


def test_doubled_in_two_creations() -> None:
    """An append that is in a session and again in the one that was made anew under its id is found."""
    ops = [
        create(),
        append("a", 1.1, 2, 2),
        load("l", 2.1, 3, 2, ["c.0", "a.0"]),
        op("d", "delete", 3.1, 4, base=None, revision_=3),
        op("c2", "create", 4.1, 5, ids=[], base=0, revision_=4),
        load("m", 6, 7, 5, ["a.0"], born="c2", mark="c2"),
    ]
    assert "doubled" in rules(ops)


@pytest.mark.parametrize("error", ["UnavailableError", "NotFoundError", "StoreFullError", "ConflictError"])
def test_refused(error: str) -> None:
    """A turn of an append whose error promised that it was not applied is found."""
    ops = [create(), lost_append("v", 1.1, error), append("a", 3, 4, 2)]
    assert "refused" in rules(ops, dump(["c.0", "a.0", "v.0"], [1, 2, 3]))


def test_refused_save() -> None:
    """The mark of a save whose error promised that it was not applied is found."""
    ops = [create(), op("x", "save", 1.1, 4, "UnavailableError", ids=[], base=1, counter=1, born="c")]
    assert "refused" in rules(ops, dump(["c.0"], [1, 2], mark="x", counter=1))


def test_foreign() -> None:
    """A turn that nobody wrote to this session is found, and so is a session that nobody wrote."""
    assert "foreign" in rules(history(), end([*END, "q.0"]))
    assert "foreign" in rules([], dump(["c.0"], [1]))


def test_torn() -> None:
    """A write of two turns of which one is there, or between which another lies, is found."""
    assert "torn" in rules(history(), end(["c.0", "a.0", "u.0", "b.0", "s1.0"]))
    assert "torn" in rules(history(), end(["c.0", "a.0", "u.0", "a.1", "b.0", "s1.0"]))


def test_torn_read() -> None:
    """A read that ends in the middle of a write is found."""
    assert "torn" in rules([*history(), load("x", 7, 8, 2, ["c.0", "a.0"])], end())
    assert "torn" in rules([*history(), op("x", "turns", 1.2, 3, last=2, ids_=["c.0", "a.0"])], end())


def test_order() -> None:
    """An append at another place than its revision says is found, in the end and in a read."""
    assert "order" in rules(history(), end(["c.0", "b.0", "a.0", "a.1", "u.0", "s1.0"]))
    assert "order" in rules([*history(), load("x", 3.3, 8, 4, ["c.0", "b.0"])], end())
    assert "order" in rules([*history(), load("x", 1.2, 8, 1, ["c.0", "a.0", "a.1"])], end())


def test_time() -> None:
    """A write with a lower revision than one acknowledged before it began is found."""
    assert "time" in rules([create(), append("a", 1.1, 2, 3), append("b", 2.1, 3, 2)])


def test_time_of_reads() -> None:
    """A read that has seen a write which began later is found."""
    assert "time" in rules([create(), append("a", 3, 4, 2), load("l", 1.1, 2, 2, ["c.0", "a.0"])])


def test_revisions() -> None:
    """A revision given twice, or beyond the partition's counter, is found."""
    assert "revisions" in rules([create(), append("a", 1.1, 2, 2), append("b", 1.1, 2, 2)])
    assert "revisions" in rules([*history(), append("z", 7, 8, 9)], end())


def test_gap_without_a_write() -> None:
    """A revision that no write accounts for is found."""
    ops = [write for write in history() if write.uid != "u"]
    found = check(ops, dump([id for id in END if id != "u.0"], [1, 2, 3, 4, 5], counter=1, mark="s1"))
    assert "gaps" in {violation.rule for violation in found}


def test_write_without_a_gap() -> None:
    """An unknown write that is there, though no revision is left for it, is found."""
    ops = [create(), lost_append("u", 1.1), append("a", 3, 4, 2)]
    assert "gaps" in rules(ops, dump(["c.0", "u.0", "a.0"], [1, 2]))


def test_stale() -> None:
    """A read older than what was acknowledged before it is found, whole, in part and in a list."""
    assert "stale" in rules([*history(), load("x", 7, 8, 1, ["c.0"])], end())
    assert "stale" in rules([*history(), op("x", "turns", 7, 8, last=2, ids_=["u.0", "b.0"])], end())
    assert "stale" in rules([*history(), op("x", "list", 7, 8, session="", items_=[["s", 4, 5]])], end())


def test_stale_list_beside_newer() -> None:
    """A list that has one session's newer state beside another's older one is found."""
    ops = [
        create(),
        op("d", "create", 1.1, 2, session="t", ids=[], base=0, revision_=2),
        append("a", 2.1, 9, 3),
        op("e", "append", 2.1, 9, session="t", ids=["e.0"], revision_=4),
        op("l", "list", 2.2, 8, session="", items_=[["s", 1, 1], ["t", 4, 1]], sorted_=True),
    ]
    assert "stale" in rules(ops)


def test_state() -> None:
    """Two observations of one revision that differ are found."""
    ops = [create(), load("l", 2, 3, 1, ["c.0"]), load("m", 2, 3, 1, ["c.0"], counter=1)]
    assert "state" in rules(ops)
    assert "state" in rules([*history(), op("x", "list", 7, 8, session="", items_=[["s", 5, 9]])], end())


def test_overwrote() -> None:
    """A conditional write that came over another write than the one it was made for is found."""
    ops = [create(), append("a", 1.1, 2, 2), op("x", "save", 2.1, 3, ids=[], base=1, counter=1, born="c", revision_=3)]
    assert "overwrote" in rules(ops)
    assert "overwrote" in rules([create(), op("x", "create", 2, 3, ids=[], base=0, revision_=2)])


def test_counter() -> None:
    """Two conditional increments that came to the same number are found."""
    ops = [
        create(),
        op("x", "update", 2, 3, ids=[], revision_=2, counter_=1, born_="c"),
        op("y", "update", 4, 5, ids=[], revision_=3, counter_=1, born_="c"),
    ]
    assert "counter" in rules(ops)


def test_conflict() -> None:
    """A conflict of a write with nobody but itself is found."""
    ops = [create(), op("x", "save", 2, 3, "ConflictError", ids=[], base=1, counter=1, born="c")]
    assert rules(ops) == {"conflict"}
    assert rules([*ops, lost_append("u", 1.5)]) == set()


def test_absent() -> None:
    """A session that is not found, though nobody has deleted it, is found."""
    missing = op("l", "load", 2, 3, "NotFoundError")
    assert rules([create(), missing]) == {"absent"}
    assert rules([create(), missing, op("d", "delete", 2.5, 4, "OutcomeUnknownError", base=None)]) == set()
    nothing = dump(["c.0"], [1])
    for name in ("sessions", "meta", "updated", "changes"):
        nothing[0][name] = {}
    assert "absent" in rules([create()], nothing)


def test_list() -> None:
    """A list that is unsorted, or skips or repeats a session that did not change, is found."""
    assert rules([*history(), op("x", "list", 7, 8, session="", items_=[], sorted_=True)], end()) == {"list"}
    assert rules([*history(), op("x", "page", 7, 8, session="", items_=[["s", 5, 6]] * 2)], end()) == {"list"}
    unsorted = op("x", "list", 7, 8, session="", items_=[["s", 5, 6]], sorted_=False)
    assert rules([*history(), unsorted], end()) == {"list"}


def test_unexpected() -> None:
    """An error that no fault explains is found."""
    for outcome in ("CorruptSessionError", "StoreResetError", "RuntimeError('x')"):
        assert rules([create(), op("l", "load", 2, 3, outcome)]) == {"unexpected"}
    assert rules([create(), op("l", "load", 2, 3, "OutcomeUnknownError")]) == {"unexpected"}


def test_hasty() -> None:
    """An operation that was given up before there was time for several attempts is found."""
    for kind in ("append", "load"):
        assert rules([create(), op("x", kind, 2, 2.4, "UnavailableError", ids=[])]) == {"hasty"}
        assert rules([create(), op("x", kind, 2, 4.4, "UnavailableError", ids=[])]) == set()


def test_swallowed() -> None:
    """A call that went on after a signal's handler had raised is found; the write may be applied or not."""
    ops = [create(), lost_append("x", 1.1, "Swallowed")]
    assert rules(ops, dump(["c.0", "x.0"], [1, 2])) == rules(ops, dump(["c.0"], [1])) == {"swallowed"}
    assert rules([create(), lost_append("x", 1.1, "Interrupted")], dump(["c.0", "x.0"], [1, 2])) == set()


def test_denied() -> None:
    """A denial while no rights were missing is found, and a denied write that is there."""
    ops = [create(), op("x", "append", 10, 11, "PermissionDeniedError", ids=["x.0"])]
    for begin, last, expected in ((9, 10.5, set()), (7, 9, set()), (5, 6, {"unexpected"}), (12, 13, {"unexpected"})):
        faults = Faults(denied=[(begin * SECOND, int(last * SECOND))])
        assert {violation.rule for violation in check(ops, None, faults)} == expected
        found = check(ops, dump(["c.0", "x.0"], [1, 2]), faults)
        assert "refused" in {violation.rule for violation in found}


def test_stuck() -> None:
    """A worker that writes nothing after the end of all faults is found."""
    ops = [op("w1-1", "append", 0, 1, ids=[], revision_=1), op("w2-1", "append", 0, 1, ids=[], revision_=2)]
    ops += [
        op("w1-2", "append", 9, 10, ids=[], revision_=3),
        op("w2-2", "append", 9, 10, "OutcomeUnknownError", ids=[]),
    ]
    found = check(ops, None, Faults(healed=5 * SECOND, alive=["w1", "w2"]))
    assert [violation.rule for violation in found] == ["stuck"]
    assert "w2" in found[0].text


def test_read_from_the_demoted() -> None:
    """Around a change of roles a read may be as old as the change; at any other time, or older still, it is found."""
    ops = [create(), append("a", 1.1, 2, 2), append("b", 11, 12, 3), load("l", 13, 14, 2, ["c.0", "a.0"])]
    for begin, last, expected in ((10, 12.5, set()), (12.5, 13, {"stale"}), (5, 10, {"stale"})):
        faults = Faults(moved=[(int(begin * SECOND), int(last * SECOND))])
        assert {violation.rule for violation in check(ops, None, faults)} == expected


def _no_meta(end: dict[str, Any]) -> None:
    end["meta"] = {}


def _old_score(end: dict[str, Any]) -> None:
    end["changes"]["s"] = 4


def _wrong_time(end: dict[str, Any]) -> None:
    end["updated"]["s"] = 6


def _wrong_count(end: dict[str, Any]) -> None:
    end["meta"]["s"][2] = 7


def _wrong_field(end: dict[str, Any]) -> None:
    end["sessions"]["s"]["turns"] = 7


def _stray(end: dict[str, Any]) -> None:
    end["strays"] = ["{chaos/0}:staging:x"]


def _tombstone(end: dict[str, Any]) -> None:
    end["deleted"]["s"] = 3


def _wrong_order(end: dict[str, Any]) -> None:
    end["windows"] = [[1, 2, 4, 3], [5]]


@pytest.mark.parametrize(
    "spoil",
    [_no_meta, _old_score, _wrong_time, _wrong_count, _wrong_field, _stray, _tombstone, _wrong_order],
)
def test_dump(spoil: Callable[[dict[str, Any]], None]) -> None:
    """Hashes, lists, index and metadata that disagree are found."""
    spoilt = end()
    spoil(spoilt[0])
    assert "dump" in rules(history(), spoilt)


def test_log_is_read_back(tmp_path: Path) -> None:
    """What a worker logs is read as what it did, and a call that a kill has cut off is unknown."""
    path = tmp_path / "history.jsonl"
    log = Recorder(str(path), "w")
    first, second = log.uid(), log.uid()
    log.call(first, "append", "s", ids=["w-1.0"])
    log.done(first, "ok", revision=3)
    log.call(second, "delete", "s", base=None)
    log.close()
    with path.open("a") as file:
        file.write(json.dumps({"call": "w-3", "at": 1})[:-4])
    done, unknown = read_history([path])
    assert done.ok
    assert done.revision == 3
    assert done.ids == ["w-1.0"]
    assert done.called < done.returned
    assert unknown.unknown
    assert unknown.writes
