"""What a hybrid store does with a session: every row of the table, and that nothing is lost on the way."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Collection
from typing import Any, Literal, NamedTuple, TypeAlias

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from orcs_redis import (
    CompactedTurn,
    ComponentSnapshot,
    ConversationTurn,
    CorruptSessionError,
    LearnedFact,
    SessionAsset,
    SyncState,
)
from orcs_redis.stores.hybrid.journal import Record, Row
from orcs_redis.stores.hybrid.local import arrived
from orcs_redis.stores.hybrid.planner import (
    SAME,
    Act,
    Base,
    Pending,
    Side,
    Step,
    Unreadable,
    caught_up,
    forced,
    lacking_turns,
    plan,
    sent_turns,
    standing,
)

from .test_merge import edits, made, versions

Version: TypeAlias = "Side[SessionAsset]"
Prefer: TypeAlias = Literal["local", "remote"] | None
UNREADABLE = Unreadable(CorruptSessionError("s"))
SIDES = ("here", "there")
ABSENT = object()


def version(turns: str, birth: int = 1, compacted: str = "", updated: int = 9, **parts: Any) -> Version:
    """Make a version: a turn by each letter, a capital one being its edited form; summaries of the letters."""
    asset = SessionAsset(id="s", created_at_ms=birth, updated_at_ms=updated)
    asset.history.turns = [ConversationTurn(id=c.lower(), timestamp_ms=0, role="user", content=c) for c in turns]
    for names in compacted.split():
        summary = CompactedTurn(summary=names, turn_count=len(names), start_time_ms=0, end_time_ms=0)
        asset.history.compacted.append(summary)
    asset.metadata = {name: parts[name] for name in ("x", "y") if name in parts}
    if "fact" in parts:
        asset.project_context.learn(LearnedFact(key="f", value=parts["fact"], source="s", learned_at_ms=0))
    if "snapshot" in parts:
        asset.component_snapshots["c"] = ComponentSnapshot(component_fqn="c", state=parts["snapshot"])
    asset.project_context.root_path = parts.get("root")
    return Side.of(asset)


VERSIONS = {
    "ab": version("ab", x=1),
    "touched": version("ab", updated=10, x=1),
    "x=2": version("ab", x=2),
    "no x": version("ab", y=1, root="/here"),
    "c": version("abc", x=1, fact="1"),
    "d, x=3": version("abd", x=3, fact="2", root="/there"),
    "a": version("a", x=1),
    "b": version("b", x=1, compacted="a"),
    "c of abc": version("c", x=1, compacted="a b"),
    "b edited": version("aB", x=1, snapshot=1),
    "a, b edited": version("AB", x=1, snapshot=2),
    "no turns": version("", x=1),
    "made anew": version("q", birth=2, x=3),
    "made anew, no turns": version("", birth=2, y=2),
}


def parts_of(side: Version | None) -> dict[str, Any]:
    """The parts that count, written down by hand."""
    if side is None:
        return {}
    asset = side.asset
    found: dict[str, Any] = {f"turn/{turn.id}": turn.content for turn in asset.history.turns}
    found |= {f"metadata.{key}": value for key, value in asset.metadata.items()}
    found |= {f"project_context.learned_facts.{f.key}": f.value for f in asset.project_context.learned_facts}
    found |= {f"component_snapshots.{key}": item.state for key, item in asset.component_snapshots.items()}
    summaries = [summary.summary for summary in asset.history.compacted]
    return found | {"history.compacted": summaries, "project_context.root_path": asset.project_context.root_path}


def ids(side: Version | None) -> list[str]:
    return [] if side is None else [turn.id for turn in side.asset.history.turns]


def turns(side: Version | None) -> Counter[str]:
    return Counter([] if side is None else [turn.content for turn in side.asset.history.turns])


def equal(one: Version | None, other: Version | None) -> bool:
    if one is None or other is None:
        return one is other
    return parts_of(one) == parts_of(other) and ids(one) == ids(other)


def base_of(side: Version | None, revision: int = 1) -> Base | None:
    return None if side is None else Base(side.parts, side.digest, revision)


def one_session(one: Version, other: Version) -> bool:
    return one.asset.created_at_ms == other.asset.created_at_ms or not {*ids(one)}.isdisjoint(ids(other))


def lost_by_file(base: Version, here: Version, removed: Collection[str]) -> set[str]:
    """The turns that a file lacks though nobody is known to have removed them."""
    known = [id for id in ids(base) if id not in removed]
    lacking = [id for id in known if id not in ids(here)]
    before, after = (side.asset.history.compacted for side in (base, here))
    grown = len(after) > len(before) and after[: len(before)] == before
    explained = grown and known[: len(lacking)] == lacking
    explained = explained and sum(summary.turn_count for summary in after[len(before) :]) >= len(lacking)
    return set() if explained else {*lacking}


class Case(NamedTuple):
    """What is known of a session, and what is decided."""

    base: Version | None
    here: Version | None
    there: Version | None
    removed: frozenset[str] = frozenset()
    merging: bool = True
    prefer: Prefer = None

    def __repr__(self) -> str:
        names = {id(side): name for name, side in VERSIONS.items()} | {id(None): None}
        return str(([names[id(side)] for side in self[:3]], *self[3:]))

    def plan(self) -> Step[SessionAsset]:
        return plan(
            base_of(self.base), self.here, self.there,
            removed=self.removed, merging=self.merging, prefer=self.prefer,
        )  # fmt: skip

    @property
    def common(self) -> Version | None:
        """The base, unless it is of another session than the one that is there."""
        if self.base and self.there and not one_session(self.base, self.there):
            return None
        return self.base

    @property
    def stale(self) -> bool:
        if self.common is None or self.here is None or self.there is None or equal(self.here, self.base):
            return False
        return bool(lost_by_file(self.common, self.here, self.removed))

    def colliding(self) -> set[str]:
        """The parts that both sides have otherwise than the base and than each other, but for those with a rule."""
        base, here, there = map(parts_of, (self.common, self.here, self.there))
        found = set()
        for name in {*base, *here, *there}:
            added = name not in base and name in here and name in there
            values = [side.get(name) for side in (base, here, there)]
            if name in ("history.compacted", "project_context.root_path") or name.startswith("component_snapshots."):
                continue
            if added and name.startswith(("turn/", "project_context.learned_facts.")):
                continue
            if values[1] != values[2] and values[0] not in values[1:]:
                found.add(name)
        return found

    def row(self) -> int:
        """The row of the table in the design: hybrid.md, 2.4."""
        here, there = self.here, self.there
        if self.base is None or (self.common is None and here and not equal(here, self.base)):
            if here is None or there is None:
                return 1 + 1 * (here is not None) + 2 * (there is not None)
            if equal(here, there):
                return 4
            apart = ids(here) and ids(there) and not one_session(here, there)
            larger = turns(here) <= turns(there) or turns(there) <= turns(here)
            collides = self.colliding() and self.prefer is None and not larger
            return 6 if apart or not self.merging or collides else 5
        if here is None:
            return 17 if there is None else 13 if self.common and equal(there, self.base) else 14
        if there is None:
            return 15 if equal(here, self.base) else 16
        if equal(here, self.base):
            return 7 if self.common and equal(there, self.base) else 9
        if equal(there, self.base):
            return 8
        if equal(here, there):
            return 10
        if self.stale:
            return 11
        return 12 if not self.merging or (self.colliding() and self.prefer is None) else 11


TABLE: dict[int, tuple[SyncState | None, Act]] = {
    1: (None, Act.FORGET),
    2: (SyncState.LOCAL_ONLY, Act.INSTALL),
    3: (SyncState.REMOTE_AHEAD, Act.INSTALL),
    4: (SyncState.SYNCED, Act.ADOPT),
    5: (SyncState.LOCAL_AHEAD, Act.INSTALL),
    6: (SyncState.CONFLICT, Act.NOTHING),
    7: (SyncState.SYNCED, Act.ADOPT),
    8: (SyncState.LOCAL_AHEAD, Act.INSTALL),
    9: (SyncState.REMOTE_AHEAD, Act.INSTALL),
    10: (SyncState.SYNCED, Act.ADOPT),
    11: (SyncState.LOCAL_AHEAD, Act.INSTALL),
    12: (SyncState.CONFLICT, Act.NOTHING),
    13: (None, Act.DELETE_THERE),
    14: (SyncState.REMOTE_AHEAD, Act.INSTALL),
    15: (SyncState.REMOTE_AHEAD, Act.DELETE_HERE),
    16: (SyncState.LOCAL_AHEAD, Act.INSTALL),
    17: (None, Act.FORGET),
}


def all_cases() -> list[Case]:
    found = []
    for base, here, there in itertools.product([None, *VERSIONS.values()], repeat=3):
        lacking = {*ids(base)} - {*ids(here)} if base and here else set()
        for removed in {frozenset[str](), frozenset(lacking), frozenset(sorted(lacking)[:1])}:
            case = Case(base, here, there, removed)
            found.append(case)
            if here and there and not equal(here, there):
                found.append(case._replace(merging=False))
                found += [case._replace(prefer=prefer) for prefer in ("local", "remote")]
    return found


@pytest.fixture(scope="module")
def cases() -> list[tuple[Case, Step[SessionAsset]]]:
    return [(case, case.plan()) for case in all_cases()]


Planned: TypeAlias = list[tuple[Case, Step[SessionAsset]]]


def test_every_row(cases: Planned) -> None:
    """State and act are those of the row that base, here and there are in, and every row comes up."""
    rows = Counter[int]()
    for case, step in cases:
        row = case.row()
        rows[row] += 1
        assert (step.state, step.act) == TABLE[row], (row, case)
        assert (step.version is not None) == (step.act is Act.INSTALL)
        assert step.revives == (row in (14, 16))
        assert bool(step.reason) == (row in (6, 12))
        if case.prefer is None and case.merging and row == 12:
            assert {*step.parts} == case.colliding()
    assert rows.keys() == TABLE.keys()


def test_a_side_is_written_unless_it_has_the_version(cases: Planned) -> None:
    """Exactly the sides that have something else are written, and nothing is written but to install or delete."""
    for case, step in cases:
        wanted = step.act is Act.INSTALL
        assert step.write_here == (wanted and not equal(step.version, case.here)), case
        assert step.write_there == (wanted and not equal(step.version, case.there)), case


def test_one_side_alone(cases: Planned) -> None:
    """What only one side has changed is installed exactly as that side has it."""
    for case, step in cases:
        match case.row():
            case 2 | 16:
                assert step.version is case.here
            case 8 if not case.stale:
                assert step.version is case.here
            case 3 | 9 | 14:
                assert step.version is case.there


def held(case: Case, name: str, base: Any, here: Any, there: Any) -> Any:
    """Which value of a part holds in a merge."""
    if case.stale:
        return there
    if here == base or here == there:
        return there
    if there == base:
        return here
    if name in ("history.compacted", "project_context.root_path"):
        return there
    if name.startswith("component_snapshots."):
        return here
    if name.startswith("project_context.learned_facts.") and base is ABSENT and ABSENT not in (here, there):
        return there
    prefer = case.prefer
    if prefer is None and case.common is None:
        prefer = "local" if turns(case.here) > turns(case.there) else "remote"
    return here if prefer == "local" else there


def test_parts_of_a_merge(cases: Planned) -> None:
    """A part is as the side has it that changed it, and what collides as the rule or the preferred side says."""
    for case, step in cases:
        if step.version is None or not case.here or not case.there:
            continue
        if case.row() not in (5, 11) and not case.stale:
            continue
        sides = [parts_of(side) for side in (case.common, case.here, case.there)]
        result = parts_of(step.version)
        for name in {*sides[0], *sides[1], *sides[2]} - {"turn/" + id for id in "abcdq"}:
            values = [side.get(name, ABSENT) for side in sides]
            assert result.get(name, ABSENT) == held(case, name, *values), (name, case)


def test_turns_of_a_merge(cases: Planned) -> None:
    """Turns that a side added are there, what one side removed is not, and a stale file removes none."""
    for case, step in cases:
        if step.version is None or not case.here or not case.there:
            continue
        if case.row() not in (5, 11) and not case.stale:
            continue
        common, here, there, result = (parts_of(side) for side in (case.common, case.here, case.there, step.version))
        lost = lost_by_file(case.common, case.here, case.removed) if case.common else set()
        recompacted = len({*map(str, (s.get("history.compacted") for s in (common, here, there)))}) == 3
        for id in "abcdq":
            b, h, t = (side.get(f"turn/{id}") for side in (common, here, there))
            found = result.get(f"turn/{id}")
            if id in lost:
                assert found == t, (id, case)  # it comes back as it is there
            elif b is None:
                assert found in {h, t} - {None} if h or t else found is None, (id, case)
            elif recompacted and h is None and t == b:
                assert found == t, (id, case)  # the compaction here is undone
            elif case.stale and h is None and id in case.removed:
                assert found == (None if t == b else t), (id, case)
            else:
                assert found == held(case, "turn", b, h, t), (id, case)
        left, order = turns(case.there), [turn.content for turn in step.version.asset.history.turns]
        new = [t.content for t in case.here.asset.history.turns if t.id not in ids(case.common) and t.content not in left]
        assert order[len(order) - len(new) :] == new, case  # ours after theirs
        stored = [turn.content for turn in case.there.asset.history.turns if turn.content in order]
        assert [content for content in order if content in left] == stored


def test_what_loses_is_kept(cases: Planned) -> None:
    """A side of which the installed version lacks something that the base has not either is kept before."""
    for case, step in cases:
        if step.act is Act.DELETE_HERE:
            assert step.keep == ("here",)
        if step.version is None:
            assert not step.keep or step.act is Act.DELETE_HERE
            continue
        base, result = parts_of(case.base), parts_of(step.version)
        for name, side in zip(SIDES, (case.here, case.there), strict=True):
            kept = name in step.keep
            lost = [part for part, value in parts_of(side).items() if value not in (base.get(part), result.get(part))]
            lost = [part for part in lost if part != "history.compacted" or parts_of(side)[part]]
            lost = [part for part in lost if not part.startswith("turn/") or not has_turn(step.version, side, part)]
            if lost:
                assert kept, (lost, name, case)
            if kept and case.row() != 9:
                assert not equal(side, step.version), case
        if case.row() == 9 and case.here and case.base and case.there:
            gone = lost_by_file(case.base, case.there, ())
            assert ("here" in step.keep) == bool(gone or case.common is None), case


def has_turn(version: Version, side: Version | None, part: str) -> bool:
    wanted = parts_of(side)[part]
    return any((f"turn/{turn.id}", turn.content) == (part, wanted) for turn in version.asset.history.turns)


def test_both_sides_are_treated_alike(cases: Planned) -> None:
    """With the sides exchanged it is the same or the mirrored row, but for files written from an old version."""
    mirrored = {2: 3, 3: 2, 8: 9, 9: 8, 13: 15, 14: 16, 15: 13, 16: 14}
    for case, _ in cases:
        other = case._replace(here=case.there, there=case.here)
        if case.stale or other.stale or (case.base and (case.common is None or other.common is None)):
            continue
        row = case.row()
        assert other.plan()[:2] == TABLE[mirrored.get(row, row)], (row, case)


def test_a_step_that_is_done_leaves_nothing_to_do(cases: Planned) -> None:
    """Once both sides and the base are what a step installs, a session is SYNCED, or gone."""
    for case, step in cases:
        if step.act is Act.INSTALL:
            done = plan(base_of(step.version, 2), step.version, SAME, removed=case.removed)
            assert done == Step(SyncState.SYNCED), case
        elif step.act is Act.ADOPT:
            assert plan(base_of(case.there), case.here, SAME, removed=case.removed) == Step(SyncState.SYNCED)


def test_what_is_there_is_read_only_where_it_matters(cases: Planned) -> None:
    """With the base's version known to be there, the step is the same; it has to be read for lacking turns alone."""
    for case, step in cases:
        if case.base is None or case.there is not case.base:
            continue
        base = base_of(case.base)
        assert base is not None
        if case.here and lacking_turns(base.parts, case.here, case.removed):
            with pytest.raises(ValueError, match="read first"):
                plan(base, case.here, SAME, removed=case.removed)
            continue
        known = plan(base, case.here, SAME, removed=case.removed, merging=case.merging, prefer=case.prefer)
        assert known == (step._replace(act=Act.NOTHING) if case.row() == 7 else step)


def test_lacking_turns() -> None:
    """A turn of the base that the file has not, and that nobody is known to have removed."""
    for base, here in itertools.product(VERSIONS.values(), repeat=2):
        for removed in itertools.chain.from_iterable(itertools.combinations("abc", n) for n in range(4)):
            found = lacking_turns(base.parts, here, removed)
            assert {key for key, _ in found} == lost_by_file(base, here, removed), (base, here, removed)


@pytest.mark.parametrize("there", [None, SAME, VERSIONS["c"], UNREADABLE])
@pytest.mark.parametrize("base", [None, base_of(VERSIONS["ab"])])
def test_a_file_that_cannot_be_read(base: Base | None, there: Any) -> None:
    """It is a conflict with a reason, and nothing is done."""
    step: Step[Any] = plan(base, UNREADABLE, there, prefer="remote")
    assert step == Step(SyncState.CONFLICT, reason=f"the file can't be read: {UNREADABLE.reason}")


@pytest.mark.parametrize("here", [None, VERSIONS["ab"], VERSIONS["c"]])
@pytest.mark.parametrize("base", [None, base_of(VERSIONS["ab"])])
def test_what_is_stored_cannot_be_read(base: Base | None, here: Any) -> None:
    """It is a conflict with a reason, and nothing is done."""
    step: Step[Any] = plan(base, here, UNREADABLE, prefer="local")
    assert step == Step(SyncState.CONFLICT, reason=f"what is stored can't be read: {UNREADABLE.reason}")


def test_standings_agree_with_plans(cases: Planned) -> None:
    """What is said without reading contents is what the plan says with them, unless both sides have changed."""
    for case, step in cases:
        if case.base and case.there and case.common is None:
            continue
        one: Any = "" if case.here is None else "same" if equal(case.here, case.base) else "changed"
        other: Any = "" if case.there is None else "same" if equal(case.there, case.base) else "changed"
        found = standing(based=case.base is not None, here=one, there=other)
        if one == other == "changed":
            assert (found.state, found.upload, found.download) == (SyncState.LOCAL_AHEAD, True, True)
            continue
        assert found.state == step.state, case
        row = case.row()
        assert (found.upload, found.download) == (row in (2, 8, 13, 16), row in (3, 9, 14, 15)), case
