"""The replay fires: each of its rules on a history made by hand, and none on one that is right."""

from __future__ import annotations

from typing import Any

import pytest

from .ops import Op
from .replay import check_parts
from .test_history import op

S = "shared-0"


def snapshot(turns: list[str], **parts: Any) -> dict[str, Any]:
    """Turns of which each is as its first writer made it, and keys of the metadata."""
    return {
        "turns": [[id, id.partition(".")[0]] for id in turns],
        "parts": {f"metadata.{name}": value for name, value in parts.items()},
    }


def create(revision: int = 1, uid: str = "c-1", turns: tuple[str, ...] = ("c-1.0", "c-1.1")) -> Op:
    whole = snapshot([*turns], a="c-1")
    return op(uid, "create", revision, revision + 0.5, session=S, whole=whole, base=0, revision_=revision)


def commit(uid: str, revision: int | None, at: float | None = None, outcome: str = "ok", **facts: Any) -> Op:
    """A commit at the second that its revision says; of no revision, an idle one or one that failed."""
    at = revision or at or 0
    result = {"revision_": revision} if revision and outcome == "ok" else {"idle_": True} if outcome == "ok" else {}
    return op(uid, "commit", at, at + 0.5, outcome, session=S, **result, **facts)


def pushed(uid: str, revision: int, **facts: Any) -> Op:
    return commit(uid, revision, turns=[[f"{uid}.0", uid]], **facts)


def read(uid: str, at: float, revision: int, turns: list[str], **parts: Any) -> Op:
    found = op(uid, "read", at, at + 0.5, session=S)
    found.result = {"revision": revision, **snapshot(turns, **parts)}
    return found


def keep(kind: str, uid: str, at: float, chain: str, mine: dict[str, Any], outcome: str = "ok", **facts: Any) -> Op:
    """A save or refresh of a loaded asset."""
    return op(uid, kind, at, at + 0.5, outcome, session=S, chain=chain, mine=mine, **facts)


def rules(*ops: Op, dump: Any = None) -> set[str]:
    return {violation.rule for violation in check_parts(ops, dump)}


BOTH = ["c-1.0", "c-1.1"]


def history() -> list[Op]:
    """A history that is right: an unknown append took revision 3."""
    loaded = read("w-1", 4.6, 4, ["c-1.0", "c-1.1", "a-1.0", "u-1.0"], a="s-1")
    mine = snapshot(["c-1.0", "c-1.1", "a-1.0", "u-1.0", "w-2.0"], a="s-1", b="w-2")
    after = snapshot(["c-1.0", "c-1.1", "a-1.0", "u-1.0", "a-5.0", "w-2.0"], a="s-1", b="w-2")
    return [
        create(),
        pushed("a-1", 2),
        op("u-1", "commit", 2.6, None, None, session=S, turns=[["u-1.0", "u-1"]]),
        commit("s-1", 4, set={"metadata.a": "s-1"}, put_new={"k": "s-1"}, placed_={"k": True}, created_=False),
        loaded,
        pushed("a-5", 5),
        keep("merge", "w-3", 6, "w-1", mine, revision_=6, after=after, of=6),
        commit("a-7", 7, pop=2, by="pop", popped_=["a-5.0", "w-2.0"]),
        commit("a-8", 8, put_new={"k": "a-8"}, placed_={"k": False}, created_=False),
        op("r-1", "get_records", 8.6, 9, session=S, records_={"k": "s-1"}),
        op("r-2", "tail", 8.6, 9, session=S, last=2, ids_=["a-1.0", "u-1.0"]),
        read("r-3", 9, 8, ["c-1.0", "c-1.1", "a-1.0", "u-1.0"], a="s-1", b="w-2"),
    ]


def with_read(revision: int, turns: list[str], **parts: Any) -> list[Op]:
    return [*history(), read("x-1", 9, revision, turns, **parts)]


def test_right_history_passes() -> None:
    """A history with an unknown append in its middle, a merging save, a pop and records is right."""
    assert rules(*history()) == set()


def test_unknown_write_may_be_absent_or_late() -> None:
    """An unknown write may have been applied anywhere after its call, or not at all."""
    unknown = op("u-1", "commit", 1.6, None, None, session=S, turns=[["u-1.0", "u-1"]])
    assert rules(create(), unknown, pushed("a-1", 2), read("r-1", 3, 2, [*BOTH, "a-1.0"], a="c-1")) == set()
    late = read("r-1", 4, 3, [*BOTH, "a-1.0", "u-1.0"], a="c-1")
    assert rules(create(), unknown, pushed("a-1", 2), pushed("a-4", 4), late) == set()


def test_turn_lost() -> None:
    """A turn that was acknowledged and that nobody removed is missed."""
    assert rules(create(), pushed("a-1", 2), read("r-1", 3, 2, BOTH, a="c-1")) == {"lost turn"}
    assert "lost turn" in rules(*with_read(2, BOTH, a="c-1"))


def test_turn_of_a_refused_write() -> None:
    """A turn is there of a write whose error promised that it is not."""
    refused = commit("x-2", None, 1.6, "UnavailableError", turns=[["x-2.0", "x-2"]])
    assert "extra turn" in rules(
        create(), refused, pushed("a-1", 2), read("r-1", 3, 2, [*BOTH, "x-2.0", "a-1.0"], a="c-1")
    )


def test_popped_turn_is_gone() -> None:
    """A turn that was popped is there again."""
    popped = commit("p-1", 2, pop=1, by="pop", popped_=["c-1.1"])
    assert rules(create(), popped, read("r-1", 3, 2, BOTH, a="c-1")) == {"extra turn"}


def test_turn_popped_twice() -> None:
    """Two pops return the same turn."""
    first = commit("p-1", 2, pop=1, by="pop", popped_=["c-1.1"])
    again = commit("p-2", 3, pop=1, by="pop", popped_=["c-1.1"])
    assert rules(create(), first, again) == {"answer"}


def test_turn_doubled() -> None:
    """What was delivered twice with `once` is there twice."""
    first, again = pushed("a-1", 2), commit("a-2", None, 2.6, turns=[["a-1.0", "a-1"]], once=True, by="append")
    assert rules(create(), first, again, read("r-1", 4, 2, [*BOTH, "a-1.0"], a="c-1")) == set()
    assert "extra turn" in rules(create(), first, again, read("r-1", 4, 2, [*BOTH, "a-1.0", "a-1.0"], a="c-1"))
    more = commit("a-2", 3, turns=[["a-1.0", "a-1"]], once=True, by="append")
    assert "extra turn" in rules(create(), first, more, read("r-1", 4, 3, [*BOTH, "a-1.0", "a-1.0"], a="c-1"))


def test_order_of_a_merge() -> None:
    """A save's turns stand before those that others had pushed."""
    turns = ["c-1.0", "c-1.1", "a-1.0", "u-1.0", "w-2.0", "a-5.0"]
    assert "part" in rules(*with_read(6, turns, a="s-1", b="w-2"))


def test_part_is_not_the_last_write() -> None:
    """A part has another value than the last acknowledged write to it gave, or of one that was refused."""
    turns = ["c-1.0", "c-1.1", "a-1.0", "u-1.0"]
    assert rules(*with_read(4, turns, a="c-1")) == {"part"}
    assert rules(*with_read(8, turns, a="s-1")) == {"part"}
    assert rules(*with_read(8, turns, a="s-1", b="x-9")) == {"part"}


def test_part_of_an_unknown_write() -> None:
    """A part may have the value of a write of unknown outcome, which then took a revision that nobody was told."""
    unknown = op("u-1", "commit", 1.6, None, None, session=S, set={"metadata.a": "u-1"})
    seen = read("r-1", 4, 3, BOTH, a="u-1")
    other = commit("s-1", 2, set={"metadata.b": "s-1"})
    seen.result["parts"]["metadata.b"] = "s-1"
    assert rules(create(), unknown, other, commit("t-1", 4, by="touch"), seen) == set()
    seen.result["revision"] = 2
    assert "part" in rules(create(), unknown, other, seen)


def test_records() -> None:
    """A record is not as it was last put, or was placed twice."""
    first = commit("s-1", 2, put_new={"k": "s-1"}, placed_={"k": True})
    assert rules(create(), first, op("r", "get_records", 3, 4, session=S, records_={"k": "x"})) == {"part"}
    assert rules(create(), first, op("r", "records", 3, 4, session=S, prefix="", records_={})) == {"part"}
    assert rules(create(), first, commit("s-3", 3, put_new={"k": "s-3"}, placed_={"k": True})) == {"answer"}
    assert (
        rules(
            create(), first, commit("s-3", 3, drop=["k"]), commit("s-4", 4, put_new={"k": "s-4"}, placed_={"k": True})
        )
        == set()
    )


def test_labels() -> None:
    """A list shows other labels than those that were given last."""
    given = commit("s-1", 2, labels={"user": "u1"})

    def listed(labels: dict[str, str]) -> Op:
        return op("l", "list", 3, 4, session="", items_=[[S, 2, 2, None, labels]], sorted_=True)

    assert rules(create(), given, listed({"user": "u1"})) == set()
    assert rules(create(), given, listed({})) == {"part"}


def test_list_by_label() -> None:
    """A list by label lacks a session that had it, or has one that had not."""
    given = commit("s-1", 2, labels={"user": "u1"})

    def listed(value: str, *items: Any) -> Op:
        return op("l", "labelled", 3, 4, session="", label="user", value=value, items_=[*items])

    item = [S, 2, 2, None, {"user": "u1"}]
    assert rules(create(), given, listed("u1", item)) == rules(create(), given, listed("u2")) == set()
    assert rules(create(), given, listed("u1")) == rules(create(), given, listed("u2", item)) == {"list"}
    taken = commit("s-3", 3, labels={"user": None})
    assert rules(create(), given, taken, listed("u1")) == set()


def test_condition() -> None:
    """A commit was applied though another turn than `if_last` was the last, or refused though it was."""
    assert rules(create(), pushed("a-1", 2, if_last="c-1.0")) == {"answer"}
    assert rules(create(), pushed("a-1", 2, if_last="c-1.1")) == set()
    refused = commit("a-1", None, 2, "ConflictError", turns=[], base=None, if_last="c-1.1", actual_=1, parts_=[])
    assert rules(create(), refused) == {"conflict"}


def test_resurrected() -> None:
    """A session is there after its deletion, by a save of an asset that was loaded before."""
    deleted = op("d-1", "delete", 2, 2.5, session=S, revision_=2)
    loaded = read("w-1", 1.6, 1, BOTH, a="c-1")
    mine = snapshot([*BOTH, "w-2.0"], a="c-1")
    saved = keep("merge", "w-3", 3, "w-1", mine, revision_=3, after=mine, of=3)
    assert rules(create(), loaded, deleted, saved) == {"answer"}
    assert rules(create(), deleted, read("r-1", 3, 2, BOTH, a="c-1")) == {"resurrected"}
    refused = keep("merge", "w-3", 3, "w-1", mine, "ConflictError", actual_=0, parts_=[], after=mine, of=1)
    assert rules(create(), loaded, deleted, refused) == set()
    assert rules(create(), loaded, refused) == {"conflict"}


def test_session_gone() -> None:
    """A session is gone in the end, or was not found, though nobody has deleted it."""
    empty = [{"revision": 1, "sessions": {}}]
    assert rules(create(), dump=empty) == {"resurrected"}
    assert rules(create(), commit("a-1", None, 2, "NotFoundError")) == {"absent"}


@pytest.mark.parametrize(
    ("parts", "actual", "expected"),
    [
        (["metadata.a"], 2, set()),
        (["metadata.a", "metadata.b"], 2, {"conflict parts"}),
        (["metadata.b"], 2, {"conflict parts"}),
        ([], 2, {"conflict parts"}),
        (["metadata.a"], 1, {"conflict parts"}),
    ],
)
def test_conflict_names_what_both_changed(parts: list[str], actual: int, expected: set[str]) -> None:
    """A refused save names exactly the parts that both have changed."""
    loaded, theirs = read("w-1", 1.6, 1, BOTH, a="c-1"), commit("s-1", 2, set={"metadata.a": "s-1"})
    mine = snapshot(BOTH, a="w-2", b="w-2")
    facts: dict[str, Any] = {"actual_": actual, "parts_": parts, "after": mine, "of": 1}
    assert rules(create(), loaded, theirs, keep("merge", "w-3", 3, "w-1", mine, "ConflictError", **facts)) == expected


def test_save_over_a_change() -> None:
    """A save is applied though another has changed the same part."""
    loaded, theirs = read("w-1", 1.6, 1, BOTH, a="c-1"), commit("s-1", 2, set={"metadata.a": "s-1"})
    mine = snapshot(BOTH, a="w-2")
    assert "answer" in rules(
        create(), loaded, theirs, keep("merge", "w-3", 3, "w-1", mine, revision_=3, after=mine, of=3)
    )


def test_turn_edited_by_two() -> None:
    """A turn that both have changed is named, whether it was replaced or removed."""
    loaded = read("w-1", 1.6, 1, BOTH, a="c-1")
    theirs = op("s-1", "replace", 2, 2.5, session=S, replace=["c-1.0", "s-1"], revision_=2)
    for mine in (
        snapshot(["c-1.1"], a="c-1"),
        {"turns": [["c-1.0", "w-2"], ["c-1.1", "c-1"]], "parts": {"metadata.a": "c-1"}},
    ):
        for parts, expected in ((["turn/c-1.0"], set()), (["turn/c-1.1"], {"conflict parts"})):
            refused = keep("merge", "w-3", 3, "w-1", mine, "ConflictError", actual_=2, parts_=parts, after=mine, of=1)
            assert rules(create(), loaded, theirs, refused) == expected


def test_refreshed() -> None:
    """A refreshed asset is what is stored, with its own changes; it keeps what collides, which the next save names."""
    loaded, theirs = (
        read("w-1", 1.6, 1, BOTH, a="c-1"),
        commit("s-1", 2, set={"metadata.a": "s-1", "metadata.b": "s-1"}),
    )
    mine, after = snapshot(BOTH, a="w-2"), snapshot(BOTH, a="w-2", b="s-1")
    right = keep("refresh", "w-3", 3, "w-1", mine, revision_=2, after=after, of=2)
    assert rules(create(), loaded, theirs, right) == set()
    for wrong in (mine, snapshot(BOTH, a="s-1", b="s-1")):
        assert rules(
            create(), loaded, theirs, keep("refresh", "w-3", 3, "w-1", mine, revision_=2, after=wrong, of=2)
        ) == {"refreshed"}
    for parts, expected in ((["metadata.a"], set()), (["metadata.b"], {"conflict parts"})):
        again = keep("merge", "w-4", 4, "w-1", after, "ConflictError", actual_=2, parts_=parts, after=after, of=2)
        assert rules(create(), loaded, theirs, right, again) == expected


def test_asset_changed_by_a_failure() -> None:
    """A save that failed has changed its asset."""
    loaded, mine = read("w-1", 1.6, 1, BOTH, a="c-1"), snapshot(BOTH, a="w-2")
    failed = keep("merge", "w-3", 3, "w-1", mine, "UnavailableError", after=snapshot(BOTH, a="c-1"), of=1)
    assert rules(create(), loaded, failed) == {"changed asset"}


def test_fork() -> None:
    """A fork has what its source had at its revision."""

    def seen(length: int, turns: list[str]) -> Op:
        origin = {"id": S, "revision": 2, "length": length}
        found = read("r-1", 4, 3, turns, a="c-1", forked_from=origin)
        found.session = "fork-0"
        return found

    args: dict[str, Any] = {"session": "fork-0", "source": S, "length": 2, "records": False, "revision_": 3}
    forked = op("f-1", "fork", 3, 3.5, **args)
    assert rules(create(), pushed("a-1", 2), forked, seen(2, BOTH)) == set()
    assert rules(create(), pushed("a-1", 2), forked, seen(3, [*BOTH, "a-1.0"])) == {"extra turn", "part"}
    assert rules(create(), pushed("a-1", 2), forked, seen(1, ["c-1.0"])) == {"lost turn", "part"}


def test_counter() -> None:
    """Two updates came to the same number."""
    first = op("x-1", "amend", 2, 2.5, session=S, turns=[], set={"metadata.b": "x-1"}, revision_=2, counter_=1)
    second = op("x-2", "amend", 3, 3.5, session=S, turns=[], set={"metadata.b": "x-2"}, revision_=3, counter_=1)
    assert rules(create(), first, second) == {"answer"}
    second.result["counter"] = 2
    assert rules(create(), first, second) == set()


def test_idle() -> None:
    """A pop came to nothing though there were turns."""
    assert rules(create(), commit("p-1", None, 2, pop=1, by="pop", popped_=[])) == {"answer"}
    assert rules(create(turns=()), commit("p-1", None, 2, pop=1, by="pop", popped_=[])) == set()


def test_partial_asset() -> None:
    """A save of an asset of the last turns changes those, and is told of a history that was cut below them."""
    loaded, mine = read("w-1", 1.6, 1, ["c-1.1"], a="c-1"), snapshot(["c-1.1", "w-2.0"], a="c-1")
    after = snapshot(["c-1.1", "a-1.0", "w-2.0"], a="c-1")
    for asset in (loaded.result, mine, after):
        asset["skipped"] = 1
    saved = keep("merge", "w-3", 3, "w-1", mine, revision_=3, after=after, of=3)
    whole = read("r-1", 4, 3, ["c-1.0", "c-1.1", "a-1.0", "w-2.0"], a="c-1")
    assert rules(create(), loaded, pushed("a-1", 2), saved, whole) == set()
    torn = read("r-1", 4, 3, ["c-1.1", "a-1.0", "w-2.0"], a="c-1")
    assert "lost turn" in rules(create(), loaded, pushed("a-1", 2), saved, torn)
    cut = commit("t-1", 2, truncate=1, by="truncate")
    assert "answer" in rules(create(), loaded, cut, saved)
    refused = keep("merge", "w-3", 3, "w-1", mine, "ConflictError", actual_=2, parts_=[], after=mine, of=1)
    assert rules(create(), loaded, cut, refused) == set()
    assert rules(create(), loaded, pushed("a-1", 2), refused) == {"conflict parts"}


def test_save_that_could_not_read_again() -> None:
    """A save that could not read what others have changed leaves its asset as it is, and the next one merges."""
    loaded, theirs = read("w-1", 1.6, 1, BOTH, a="c-1"), commit("s-1", 2, set={"metadata.b": "s-1"})
    mine = snapshot(BOTH, a="w-2")
    saved = keep("merge", "w-3", 3, "w-1", mine, revision_=3, after=mine, of=3, behind=True)
    both = snapshot(BOTH, a="w-2", b="s-1")
    refreshed = keep("refresh", "w-4", 4, "w-1", mine, revision_=3, after=both, of=3)
    assert rules(create(), loaded, theirs, saved, refreshed) == set()
    refreshed.args["after"] = mine
    assert rules(create(), loaded, theirs, saved, refreshed) == {"refreshed"}
    saved.args["behind"] = False
    assert rules(create(), loaded, theirs, saved) == {"refreshed"}
