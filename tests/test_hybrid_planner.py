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
from orcs_redis.model.parts import TIMES, changed
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
    if here in (base, there):
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
        new = [
            t.content for t in case.here.asset.history.turns if t.id not in ids(case.common) and t.content not in left
        ]
        assert order[len(order) - len(new) :] == new, case  # ours after theirs
        stored = [turn.content for turn in case.there.asset.history.turns if turn.content in order]
        assert [content for content in order if content in left] == stored


def test_what_loses_is_kept(cases: Planned) -> None:
    """A side of which the installed version lacks something that the base has not either is kept before."""
    for case, step in cases:
        if step.act is Act.DELETE_HERE:
            assert step.keep == ("here",)
        if step.act is Act.DELETE_THERE:
            assert step.keep == ("there",)  # the file is gone already
        if step.version is None:
            assert not step.keep or step.act in (Act.DELETE_HERE, Act.DELETE_THERE)
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
        if case.row() == 13:  # it is not kept then
            step = step._replace(keep=())
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


class World:
    """A folder and a shared store, of one session; `sync` can be cut off after each of its steps."""

    def __init__(self, base: Version | None, here: Version | None, there: Version | None) -> None:
        self.base = base_of(base)
        self.here, self.there = here, there
        self.revision = 1 if base and there and base.digest == there.digest else 2
        self.pending: Pending | None = None
        self.removed: set[str] = set()
        self.kept: list[Version | None] = []

    def __repr__(self) -> str:
        return f"World({self.base}, {self.here and parts_of(self.here)}, {self.there and parts_of(self.there)})"

    def edit_here(self, turns: str = "", *, known: bool = True, **parts: Any) -> None:
        """Write a file; `known`: through the API, which notes what it removes."""
        before = {*ids(self.here)}
        self.here = version(turns, **parts)
        if known:
            self.removed |= before - {*ids(self.here)}

    def delete_here(self) -> None:
        self.removed |= {*ids(self.here)}
        self.here = None

    def edit_there(self, side: Version | None) -> None:
        self.there = side
        self.revision += 1

    def open(self) -> None:
        """Note what was brought to both sides."""
        if self.here is not None and (base := arrived(Record.of(self.base, self.pending, Row()), self.here)):
            self.base, self.pending = base, None

    def plan(self, prefer: Prefer = None) -> Step[SessionAsset]:
        """Look, and plan what follows."""
        self.open()
        there: Any = self.there
        if there is not None and self.base is not None and self.base.revision == self.revision:
            stale = self.here is not None and lacking_turns(self.base.parts, self.here, self.removed)
            there = there if stale else SAME
        if there is not SAME:
            self.base = caught_up(self.base, self.pending, there, revision=self.revision)
        return plan(self.base, self.here, there, removed=self.removed, prefer=prefer)

    def sync(self, stop: int = 6, prefer: Prefer = None) -> Step[SessionAsset]:
        """Do one round, and end it after a step: those of hybrid.md, 2.5."""
        step = self.plan(prefer)
        self.install(step, stop)
        return step

    def install(self, step: Step[SessionAsset], stop: int = 6) -> None:
        if step.act in (Act.NOTHING, Act.FORGET):
            self.base = self.base if step.act is Act.NOTHING else None
            return
        if step.act is Act.INSTALL and step.version:
            self.pending = self.intention(step, step.version)
        lacking = self.removed - {*ids(self.here)}
        self.kept += [self.here if side == "here" else self.there for side in step.keep]
        if stop < 3:
            return
        if step.write_there or step.act is Act.DELETE_THERE:
            self.edit_there(step.version)
        if stop < 4:
            return
        if step.write_here and step.write_there and self.pending:
            self.pending = Pending(self.pending.digest, self.revision, mine=self.pending.mine, sent=self.pending.sent)
        if stop < 5:
            return
        if step.write_here or step.act is Act.DELETE_HERE:
            self.here = step.version
        if stop < 6:
            return
        common = self.there if step.act is Act.ADOPT else step.version
        self.base, self.pending = base_of(common, self.revision), None
        self.removed = (self.removed - lacking) & {*ids(common)}

    def intention(self, step: Step[SessionAsset], version: Version) -> Pending | None:
        if not step.write_there:
            return Pending(version.digest, self.revision)
        if self.here is None:
            return None
        base, there = (side.parts if side else None for side in (self.base, self.there))
        over = self.there.digest if self.there else b""
        return Pending(version.digest, over=over, mine=self.here.parts, sent=sent_turns(version.parts, base, there))

    def settle(self, prefer: Prefer = None) -> SyncState | None:
        """Do rounds until nothing is planned, at most three, or there is a conflict; return the state."""
        for _ in range(4):
            step = self.sync(prefer=prefer)
            if step.act in (Act.NOTHING, Act.FORGET):
                return step.state
        raise AssertionError("it does not come to rest")


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """A session that was changed on both sides since it was common, or deleted; or the base is lost."""
    base, here, there = draw(versions(twice=draw(st.booleans())))
    kind = draw(st.sampled_from(["all", "all", "all", "no base", "here alone", "there alone", "not here", "not there"]))
    event(kind)
    world = World(
        None if kind == "no base" else Side.of(base),
        Side.of(base) if kind == "there alone" else None if kind == "not here" else Side.of(here),
        Side.of(base) if kind == "here alone" else None if kind == "not there" else Side.of(there),
    )
    lacking = sorted({*ids(Side.of(base))} - {*ids(world.here)})
    world.removed = {*lacking[: draw(st.integers(0, len(lacking)))]}
    return world


def contents(*sides: Version | None) -> Counter[tuple[str, str]]:
    """The turns of sides, as often as one of them has them."""
    found = Counter[tuple[str, str]]()
    for side in sides:
        if side is not None:
            found |= Counter((turn.id, turn.content) for turn in side.asset.history.turns)
    return found


@given(worlds(), st.sampled_from([None, "local", "remote"]))
@settings(max_examples=150)
def test_three_rounds_are_enough(world: World, prefer: Prefer) -> None:
    """From any trees, rounds end in one version on both sides or in a conflict, which a decision ends."""
    base, here, there = world.base, world.here, world.there
    known = set(base.parts.lists["history.turns"]) if base else set()
    state = world.settle(prefer)
    event(str(state))
    if state is SyncState.CONFLICT:
        assert (world.here, world.there) == (here, there)
        for keep in ("local", "remote"):
            other = copy.copy(world)
            step = forced(world.base, here, there, keep, removed=world.removed)
            other.kept = []
            other.install(step)
            assert other.kept == [here, there]
            assert other.settle() is SyncState.SYNCED
            assert (other.here and other.here.digest) == (other.there and other.there.digest)
        return
    assert (world.here and world.here.digest) == (world.there and world.there.digest)
    for side in (here, there):
        for entry, turn in (
            zip(side.parts.lists["history.turns"], side.asset.history.turns, strict=True) if side else ()
        ):
            if entry not in known:
                assert (turn.id, turn.content) in contents(world.here, *world.kept), "what a side added is lost"


@given(worlds())
@settings(max_examples=150)
def test_cut_off_before_anything_is_sent(world: World) -> None:
    """A step that was noted and not done is planned again, just as it was."""
    first = world.sync(stop=1)
    again = world.plan()
    assert (again.state, again.act) == (first.state, first.act)
    assert (again.version and again.version.digest) == (first.version and first.version.digest)
    assert (again.write_here, again.write_there, again.keep) == (first.write_here, first.write_there, first.keep)


@given(worlds(), st.integers(3, 5))
@settings(max_examples=150)
def test_cut_off_after_it_was_sent(world: World, stop: int) -> None:
    """The next round finds it there, brings it here, and writes nothing there a second time."""
    step = world.sync(stop=stop)
    revision = world.revision
    state = world.settle()
    assert world.revision == revision
    if step.version is not None:
        assert state is SyncState.SYNCED
        assert world.here is not None
        assert world.here.digest == world.there.digest == step.version.digest  # type: ignore[union-attr]  # it is there


@given(worlds(), st.integers(3, 5), edits)
@settings(max_examples=150)
def test_cut_off_and_edited_here(world: World, stop: int, changes: list[Any]) -> None:
    """What is edited here after a step that was cut off collides only with what others had brought by it."""
    sent = world.here
    step = world.sync(stop=stop)
    if step.act is not Act.INSTALL or step.version is None or world.here is None:
        return
    base = base_of(sent) if step.write_there else world.base
    if stop == 5 and step.write_here:
        base = base_of(step.version)
    if base and world.there and base.parts.values.get("created_at_ms") != world.there.parts.values.get("created_at_ms"):
        return  # equal but for their births, which are not sent: the merge has the earlier one
    world.open()
    before = world.here
    world.here = Side.of(made(before.asset, changes))
    world.removed |= {*ids(before)} - {*ids(world.here)}
    oracle = plan(base, world.here, world.there, removed=world.removed)
    found = world.plan()
    assert (found.state, found.parts) == (oracle.state, oracle.parts)
    assert (found.version and found.version.digest) == (oracle.version and oracle.version.digest)


@given(worlds(), st.integers(3, 5), edits)
@settings(max_examples=150)
def test_cut_off_and_edited_there(world: World, stop: int, changes: list[Any]) -> None:
    """What others edit after a step that was cut off collides with nothing, if they leave what was sent."""
    step, base = world.sync(stop=stop), world.base
    if step.act is not Act.INSTALL or step.version is None or world.there is None or world.here is None:
        return
    world.edit_there(Side.of(made(world.there.asset, changes)))
    pending = world.pending
    if pending is not None and pending.mine is not None:
        if pending.sent and Counter(pending.sent) - Counter(world.there.parts.lists["history.turns"]):
            return
        if not pending.sent and base is None:
            return
        sent = changed(base.parts, pending.mine) if base else set()
        if not pending.sent and sent & changed(step.version.parts, world.there.parts) - TIMES:
            return
    elif not equal(world.here, step.version):  # nothing was brought here: both sides' edits are as without the round
        return
    there = world.there
    assert world.settle() is SyncState.SYNCED
    assert contents(there) <= contents(world.there)


# What random runs taught the design: hybrid.md, section 8.


def test_sent_and_overwritten_from_memory() -> None:
    """A turn that was sent comes back where a program wrote its file without it before the sending was noted."""
    world = World(version("a"), version("ab"), version("a"))
    world.sync(stop=3)
    world.edit_here("ac", known=False)
    assert world.settle() is SyncState.SYNCED
    assert ids(world.here) == ids(world.there) == ["a", "b", "c"]


def test_turns_that_others_had_prove_nothing() -> None:
    """Without a base, as of a copied folder or a wiped store, others may have brought the turns that were sent."""
    mine, theirs = version("ab", x=1), version("ab")
    pending = Pending(mine.digest, mine=mine.parts, sent=[*mine.parts.lists["history.turns"]])
    step = plan(caught_up(None, pending, theirs), mine, theirs)
    assert step.version is not None
    assert step.version.asset.metadata == {"x": 1}
    assert (step.write_here, step.write_there) == (False, True)


def test_one_turn_of_a_sending_proves_nothing() -> None:
    """What was sent was stored whole or not at all: another machine may have brought one turn of it."""
    world = World(version("a", x=1), version("abc", x=2), version("a", x=1))
    world.sync(stop=1)
    world.edit_there(version("ab", x=1))
    assert world.settle() is SyncState.SYNCED
    assert equal(world.here, version("abc", x=2))
    assert equal(world.there, version("abc", x=2))


def test_what_was_there_before_is_not_sent() -> None:
    """A merge sends what neither the base nor the shared store has, each as often as it is new."""
    base, here, there = version("ab"), version("abcdd"), version("abd")
    assert [key for key, _ in sent_turns(here.parts, base.parts, there.parts)] == ["c", "d"]
    assert [key for key, _ in sent_turns(here.parts, None, None)] == ["a", "b", "c", "d", "d"]


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_merge_that_landed_and_was_deleted(stop: int) -> None:
    """A session that was merged on both sides, and is deleted before that was noted, does not come back."""
    world = World(version("a"), version("ab"), version("ac"))
    world.sync(stop=stop)
    world.open()
    world.delete_here()
    world.settle()
    assert (world.here is None and world.there is None) == (stop == 5)
    if world.there is not None:  # nothing of what others brought had been seen here
        assert ids(world.there) == ids(world.here) == ["a", "c", "b"]


@pytest.mark.parametrize("restored", [False, True])
def test_a_merge_whose_revision_is_known(restored: bool) -> None:
    """It has arrived, though nothing of it is there any more; unless what is there is older than it."""
    world = World(version("a", x=1), version("ab", x=2), version("ac", x=1))
    before = world.revision
    world.sync(stop=4)
    world.edit_there(version("ac", x=1))
    world.revision = before if restored else world.revision
    world.edit_here("abd", x=2)
    assert world.settle() is SyncState.SYNCED
    assert equal(world.here, version("acbd", x=2) if restored else version("acd", x=1))
    assert equal(world.there, world.here)


def test_a_pull_that_was_not_written() -> None:
    """A version that was to be pulled was not seen: it is no edit of others that a deletion here knows of."""
    world = World(version("a"), version("a"), version("ab"))
    world.sync(stop=1)
    world.open()
    world.delete_here()
    step = world.sync()
    assert (step.state, step.revives) == (SyncState.REMOTE_AHEAD, True)
    assert ids(world.here) == ids(world.there) == ["a", "b"]


@pytest.mark.parametrize("stops", [*itertools.product([1, 3, 4], repeat=2)])
def test_cut_off_twice(stops: tuple[int, int]) -> None:
    """A second intention does not make others' edits of what the first has sent."""
    world = World(version("a", x=1), version("ab", x=2), version("a", x=1))
    world.sync(stop=stops[0])
    world.edit_here("abc", x=3)
    world.sync(stop=stops[1])
    world.edit_here("abcd", x=4)
    assert world.settle() is SyncState.SYNCED
    assert equal(world.here, version("abcd", x=4))
    assert equal(world.there, world.here)


@pytest.mark.parametrize("base", [version("a", x=1), None])
def test_no_turn_was_sent(base: Version | None) -> None:
    """A part that is there as it was sent is no change of others, who have added a turn since."""
    world = World(base, version("a", x=2) if base else version("", x=2), base)
    world.sync(stop=3)
    world.edit_there(version("ab" if base else "b", x=2))
    world.edit_here("a" if base else "", x=3)
    assert world.settle() is SyncState.SYNCED
    assert equal(world.here, version("ab" if base else "b", x=3))
    assert equal(world.there, world.here)


def test_a_sending_that_others_have_built_upon() -> None:
    """What landed is common, whatever others have changed since in other parts."""
    world = World(version("a"), version("ab"), version("a"))
    world.sync(stop=3)
    world.edit_there(version("abc"))
    assert world.settle() is SyncState.SYNCED
    assert ids(world.here) == ids(world.there) == ["a", "b", "c"]
    assert world.revision == 3  # as others left it


def test_a_first_sending_that_did_not_arrive() -> None:
    """Cut off before it was sent, the merge of two folders without a base is the same again, and no conflict."""
    world = World(None, version("ab", x=1), version("a", x=2))
    assert world.sync(stop=1).state is SyncState.LOCAL_AHEAD
    assert world.settle() is SyncState.SYNCED
    assert equal(world.there, version("ab", x=1))


@pytest.mark.parametrize("keep", ["local", "remote"])
def test_a_conflict_deleted_there(keep: Literal["local", "remote"]) -> None:
    """To resolve a session that was deleted there meanwhile keeps it, or deletes it here; what loses is kept."""
    base, here = base_of(version("a", x=1)), version("a", x=2)
    step = forced(base, here, None, keep)
    assert step.keep == ("here",)
    if keep == "local":
        assert (step.act, step.version, step.write_here, step.write_there) == (Act.INSTALL, here, False, True)
    else:
        assert (step.act, step.version) == (Act.DELETE_HERE, None)


def test_deleted_and_made_anew() -> None:
    """A session that was deleted here and made anew has no turns of the old one, which others have not changed."""
    world = World(version("ab"), version("ab"), version("ab"))
    world.delete_here()
    world.edit_here("q", birth=2)
    assert world.settle() is SyncState.SYNCED
    assert ids(world.here) == ids(world.there) == ["q"]


# Files that were written from an old version.


def test_a_stale_file_brings_back_nothing_that_was_removed() -> None:
    """Turns that a file lacks come back, but for those removed knowingly; unless they were edited there."""
    for there, expected in (("abc", "abd"), ("aBC", "aBCd")):
        world = World(version("abc"), version("abc"), version("abc"))
        world.edit_there(version(there))
        world.edit_here("ab")
        world.edit_here("ad", known=False)
        assert world.settle() is SyncState.SYNCED
        assert [turn.content for turn in world.there.asset.history.turns] == [*expected]  # type: ignore[union-attr]  # it is there


def test_a_session_that_came_back_was_not_removed() -> None:
    """What was deleted here and came back, since it was edited there, is put back into a file that lacks it."""
    world = World(version("ab"), version("ab"), version("abc"))
    world.delete_here()
    assert world.settle() is SyncState.SYNCED
    world.edit_here("ad", known=False)
    assert world.settle() is SyncState.SYNCED
    assert ids(world.there) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("compacted", ["a", "a b"])
def test_a_compaction_explains_as_many_turns_as_it_sums_up(compacted: str) -> None:
    """A program that compacted what it had in memory does not remove the turn that was pulled meanwhile."""
    world = World(version("ab", x=1), version("q", x=1, compacted=compacted), version("ab", x=1))
    assert world.settle() is SyncState.SYNCED
    assert ids(world.there) == (["q"] if compacted == "a b" else ["a", "b", "q"])


def test_a_second_turn_of_one_id_in_a_stale_file() -> None:
    """It is new, and stays."""
    here = version("aA")
    world = World(version("ab"), here, version("abc"))
    assert world.settle() is SyncState.SYNCED
    assert [turn.content for turn in world.there.asset.history.turns] == [*"abcA"]  # type: ignore[union-attr]  # it is there


# Decisions.


def test_decisions(cases: Planned) -> None:
    """A decision ends every conflict: colliding parts are as one side has them, and no turn that one added goes."""
    for case, step in cases:
        if case.prefer or not case.merging or case.row() not in (6, 12):
            continue
        for keep in ("local", "remote"):
            found = forced(base_of(case.base), case.here, case.there, keep, removed=case.removed)
            assert (found.state, found.act, found.keep) == (SyncState.LOCAL_AHEAD, Act.INSTALL, SIDES), case
            assert found.version is not None
            wanted, other = (case.here, case.there) if keep == "local" else (case.there, case.here)
            assert wanted is not None
            assert other is not None
            if not step.parts:  # two sessions
                assert equal(found.version, wanted)
            for part in step.parts:
                assert parts_of(found.version).get(part) == parts_of(wanted).get(part), (part, case)
            assert found.write_here == (not equal(found.version, case.here))
            assert found.write_there == (not equal(found.version, case.there))
            if step.parts:
                added = contents(wanted, other) - contents(case.base)
                unsure = {part.removeprefix("turn/") for part in step.parts}
                left = added - contents(found.version)
                assert all(id in unsure or id in ids(case.base) for id, _ in left), case


def test_a_side_is_forced_where_nothing_collides(cases: Planned) -> None:
    """Without a conflict, the side that is kept is taken whole, and both are kept before."""
    for case, step in cases:
        if case.prefer or not case.merging or step.state is SyncState.CONFLICT:
            continue
        for keep in ("local", "remote"):
            found = forced(base_of(case.base), case.here, case.there, keep, removed=case.removed)
            wanted, other = (case.here, case.there) if keep == "local" else (case.there, case.here)
            if equal(wanted, other):
                assert found.act is (Act.ADOPT if wanted else Act.FORGET)
                continue
            assert found.version is wanted
            assert found.keep == tuple(name for name, side in zip(SIDES, case[1:3], strict=True) if side), case
            if wanted is None:
                assert found.act is (Act.DELETE_THERE if keep == "local" else Act.DELETE_HERE)
            else:
                assert (found.write_here, found.write_there) == (keep == "remote", keep == "local")
