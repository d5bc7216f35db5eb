"""Three-way merges: nothing is lost or doubled, and a conflict is where both changed one part."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from orcs_redis import (
    CommandGrant,
    CompactedTurn,
    ComponentSnapshot,
    ContextInjection,
    ConversationTurn,
    LearnedFact,
    SessionAsset,
    SkillConfig,
)
from orcs_redis.model.merge import merge, rebased, settled
from orcs_redis.model.parts import TIMES, Digests, changed, digests, get_part, parts_of

few = st.integers(0, 2)
names = st.sampled_from(["a", "a.b", ""])
Op = tuple[Any, ...]

# One random session, changed twice: independent ones would never have a turn in common.
ops: st.SearchStrategy[Op] = st.one_of(
    st.tuples(st.just("metadata"), names, st.none() | few),
    st.tuples(st.just("extra"), names, st.none() | few),
    st.tuples(st.just("skill"), names, st.none() | few),
    st.tuples(st.just("snapshot"), names, st.none() | few),
    st.tuples(st.just("custom"), names, st.none() | few),
    st.tuples(st.just("fact"), names, st.none() | few),
    st.tuples(st.just("context"), names, st.none() | few),
    st.tuples(st.sampled_from(["name", "root_path", "indent"]), few),
    st.tuples(st.sampled_from(["technology", "grant"]), few, st.booleans()),
    st.tuples(st.sampled_from(["max_turns", "created", "updated"]), few),
    st.tuples(st.just("reverse"), few),
    st.tuples(st.just("compact"), few),
    *[st.tuples(st.just("add"), st.sampled_from(["t1", "t2", "t3", "t4"]), few)] * 3,
    *[st.tuples(st.sampled_from(["edit", "remove"]), st.integers(0, 3), few)] * 2,
)
edits = st.lists(ops, max_size=5)


def turn(id: str, content: str) -> ConversationTurn:
    return ConversationTurn(id=id, timestamp_ms=0, role="user", content=content)


def put(target: dict[str, Any], key: str, value: Any) -> None:
    if value is None:
        target.pop(key, None)
    else:
        target[key] = value


def put_in(items: list[Any], field: str, key: str, value: Any) -> None:
    """Set, add or remove the element of a key."""
    at = next((n for n, item in enumerate(items) if getattr(item, field) == key), len(items))
    items[at : at + 1] = [] if value is None else [value]


def apply(asset: SessionAsset, op: Op, twice: bool) -> None:
    """Change an asset; ``twice``: a turn's id may be there already."""
    kind, arg, *rest = op
    value = rest[0] if rest else None
    context, turns = asset.project_context, asset.history.turns
    match kind:
        case "metadata":
            put(asset.metadata, arg, value)
        case "extra":
            put(asset.extra, f"x{arg}", value)
        case "custom":
            put(asset.preferences.custom, arg, value)
        case "skill":
            config = SkillConfig(skill_id=arg, params={"n": value})
            put(asset.skill_configs, arg, None if value is None else config)
        case "snapshot":
            snapshot = ComponentSnapshot(component_fqn=arg, state=value)
            put(asset.component_snapshots, arg, None if value is None else snapshot)
        case "fact":
            fact = LearnedFact(key=arg, value=str(value), source="s", learned_at_ms=0)
            put_in(context.learned_facts, "key", arg, None if value is None else fact)
        case "context":
            text = ContextInjection(id=arg, timing="always", content=str(value))
            put_in(context.persistent_contexts, "id", arg, None if value is None else text)
        case "name" | "root_path":
            setattr(context, kind, str(arg))
        case "indent":
            asset.preferences.coding_style.indent = str(arg)
        case "technology" | "grant":
            items: list[Any] = context.technologies if kind == "technology" else asset.granted_commands
            item = str(arg) if kind == "technology" else CommandGrant.one_time(str(arg))
            if item in items and not value:
                items.remove(item)
            elif item not in items and value:
                items.append(item)
        case "max_turns":
            asset.history.max_turns = arg
        case "created" | "updated":
            setattr(asset, f"{kind}_at_ms", 10 + arg)
        case "compact":
            gone, asset.history.turns = turns[:arg], turns[arg:]
            if gone:
                summary = CompactedTurn(summary=str(gone), turn_count=len(gone), start_time_ms=0, end_time_ms=0)
                asset.history.compacted.append(summary)
        case "reverse":
            turns.reverse()
            context.technologies.reverse()
        case "add":
            if twice or all(known.id != arg for known in turns):
                turns.append(turn(arg, f"new {value}"))
        case "edit" | "remove" if arg < len(turns):
            turns[arg : arg + 1] = [turn(turns[arg].id, f"{turns[arg].content}, {value}")] if kind == "edit" else []


def made(base: SessionAsset, changes: list[Op], twice: bool = False) -> SessionAsset:
    asset = copy.deepcopy(base)
    for op in changes:
        apply(asset, op, twice)
    return asset


@st.composite
def versions(draw: st.DrawFn, twice: bool = False) -> tuple[SessionAsset, SessionAsset, SessionAsset]:
    """A base and two versions made of it."""
    empty = SessionAsset(id="s", created_at_ms=5, updated_at_ms=5)
    base = made(empty, draw(edits), twice)
    return base, made(base, draw(edits), twice), made(base, draw(edits), twice)


def model(asset: SessionAsset) -> dict[str, str]:
    """The parts that can collide, written down by hand; turns with an id of their own."""
    context, style = asset.project_context, asset.preferences.coding_style
    found: dict[str, Any] = {f"metadata.{k}": v for k, v in asset.metadata.items()}
    found |= {f"extra.{k}": v for k, v in asset.extra.items()}
    found |= {f"preferences.custom.{k}": v for k, v in asset.preferences.custom.items()}
    found |= {f"skill_configs.{k}": v.params for k, v in asset.skill_configs.items()}
    found |= {f"component_snapshots.{k}": v.state for k, v in asset.component_snapshots.items()}
    found |= {f"project_context.learned_facts.{fact.key}": fact.value for fact in context.learned_facts}
    found |= {f"project_context.persistent_contexts.{c.id}": c.content for c in context.persistent_contexts}
    found |= {f"turn/{turn.id}": turn.content for turn in asset.history.turns}
    found |= {"project_context.name": context.name, "project_context.root_path": context.root_path}
    found |= {"preferences.coding_style.indent": style.indent, "history.max_turns": asset.history.max_turns}
    found["history.compacted"] = [summary.summary for summary in asset.history.compacted]
    return {name: repr(value) for name, value in found.items()}


def same(one: SessionAsset, other: SessionAsset) -> bool:
    """Equal but for the order of lists."""

    def unordered(asset: SessionAsset) -> Any:
        found = digests(asset)
        return found.values, {path: Counter(entries) for path, entries in found.lists.items()}

    return bool(unordered(one) == unordered(other))


@given(versions())
def test_conflicts_are_where_both_changed_one_part(three: Any) -> None:
    """A conflict is a part that both sides have otherwise than the base, and otherwise than each other."""
    base, mine, theirs = map(model, three)
    collisions = {n for n in {*base, *mine, *theirs} if len({d.get(n) for d in (base, mine, theirs)}) == 3}
    added = {n for n in collisions if n not in base and n.startswith(("turn/", "project_context.learned_facts."))}
    assert merge(*three).conflicts == tuple(sorted(collisions - added))
    event(f"{len(collisions - added)} conflicts")


@given(versions(), st.sampled_from([False, True]))
def test_parts_are_of_the_side_that_changed_them(three: Any, concede: bool) -> None:
    """Each part is as the side has it that changed it; in a conflict as mine, or as theirs if that was conceded."""
    base, mine, theirs = map(model, three)
    conflicts = merge(*three).conflicts
    result = model(merge(*three, concede=conflicts if concede else ()).asset)
    for name in {*base, *mine, *theirs}:
        b, m, t = base.get(name), mine.get(name), theirs.get(name)
        if name in conflicts:
            expected = t if concede else m
        elif name.startswith("turn/") and None not in (m, t) and b is None:
            expected = m  # both stay, mine after theirs
        elif name.startswith("project_context.learned_facts.") and None not in (m, t) and b is None:
            expected = t
        elif name.startswith("turn/") and "history.compacted" in conflicts and b is not None and None in (m, t):
            expected = t if concede else m  # what the other compaction summed up stays
        else:
            expected = t if m == b else m
        assert result.get(name) == expected, name


@given(versions(twice=True))
def test_one_side_alone_is_the_result(three: Any) -> None:
    """What only one side changed becomes exactly that side, and what both changed equally stays so."""
    base, mine, _ = three
    for known in (base, digests(base)):
        assert merge(known, mine, base) == (mine, ())
        assert merge(known, base, mine) == (mine, ())
        assert merge(known, mine, copy.deepcopy(mine)) == (mine, ())
    assert merge(None, mine, copy.deepcopy(mine)) == (mine, ())


@given(versions(twice=True))
def test_digests_of_the_base_are_enough(three: Any) -> None:
    """The base's values play no part, and a merge changes neither side."""
    base, mine, theirs = three
    before = copy.deepcopy(three)
    merged = merge(base, mine, theirs)
    assert merge(digests(base), mine, theirs) == merged
    merged.asset.metadata["later"] = merged.asset.extra["later"] = 1
    merged.asset.preferences.custom["later"] = 1
    merged.asset.history.turns.append(turn("later", ""))
    merged.asset.project_context.technologies.append("later")
    assert three == before


@given(versions(twice=True))
def test_no_turn_is_lost_or_doubled(three: Any) -> None:
    """Without a conflict, each turn is there as often as the base and both sides' changes say, also under one id."""
    merged = merge(*three)
    assume(not merged.conflicts)
    base, mine, theirs, result = (
        Counter((turn.id, turn.content) for turn in asset.history.turns) for asset in (*three, merged.asset)
    )
    for key in base | mine | theirs:
        here, there = mine[key] - base[key], theirs[key] - base[key]
        both = here * there > 0
        change = (max if here > 0 else min)(here, there) if both else here + there
        assert result[key] == base[key] + change, key
    assert not result - (base | mine | theirs)


@given(versions(twice=True))
def test_no_turn_goes_in_a_conflict(three: Any) -> None:
    """A conflict takes no turn away that is on both sides; what one side added stays."""
    base, mine, theirs = three
    conflicts = merge(*three).conflicts
    for concede in ((), conflicts):
        result = Counter(turn.id for turn in merge(*three, concede=concede).asset.history.turns)
        ids = [Counter(turn.id for turn in asset.history.turns) for asset in (base, mine, theirs)]
        assert not (ids[1] & ids[2]) - result
        assert all(result[id] for id in {*ids[1], *ids[2]} - {*ids[0]})


@given(versions())
def test_the_stored_order_stays(three: Any) -> None:
    """Theirs are in their order, and what is new in mine comes after it, in mine's."""
    _, mine, theirs = three
    mine.history.turns += [turn("mine 1", ""), turn("mine 2", "")]
    theirs.history.turns.append(turn("theirs", ""))
    result = ids(merge(*three).asset)
    assert result[-2:] == ["mine 1", "mine 2"]
    if len({*result}) == len(result):
        assert [id for id in result if id in ids(theirs)] == [id for id in ids(theirs) if id in result]


@given(versions(twice=True))
def test_disjoint_changes_commute(three: Any) -> None:
    """Changes of different parts merge, and it does not matter who is first, but for the order of lists."""
    base, mine, theirs = three
    names = [changed(digests(base), digests(side)) for side in (mine, theirs)]
    assume(not names[0] & names[1])
    one, other = merge(base, mine, theirs), merge(base, theirs, mine)
    assert one.conflicts == other.conflicts == ()
    assert same(one.asset, other.asset)
    assert changed(digests(base), digests(one.asset)) <= names[0] | names[1] | set(parts_of(base).lists)


@given(versions(twice=True))
def test_a_conflict_stays_one(three: Any) -> None:
    """Brought up to date, an asset collides with what is stored in the same parts as before, and in no others."""
    base, mine, theirs = three
    known = digests(base)
    merged = merge(known, mine, theirs)
    after = rebased(known, digests(theirs), merged.conflicts)
    assert merge(after, merged.asset, theirs).conflicts == merged.conflicts
    if not merged.conflicts:
        assert after == digests(theirs)
        assert merge(after, merged.asset, theirs).asset == merged.asset


@given(versions(), edits, edits)
def test_what_was_sent_is_no_change_of_others(three: Any, more: list[Op], after: list[Op]) -> None:
    """Stored or not, a version that was sent is no change of others: what came since collides with theirs alone."""
    base, sent, others = three
    known, later = digests(base), made(sent, more)
    for stored in (base, sent):
        assert merge(settled(known, digests(sent), digests(stored)), later, stored) == (later, ())
    assert merge(settled(known, digests(sent), digests(others)), sent, others).conflicts == merge(*three).conflicts
    theirs = made(sent, after)
    both = merge(sent, later, theirs).conflicts
    assert {*both} <= {*merge(settled(known, digests(sent), digests(theirs)), later, theirs).conflicts}


@given(versions())
def test_without_a_base(three: Any) -> None:
    """Without a base, all that is not equal was added on both sides."""
    _, mine, theirs = three
    merged = merge(None, mine, theirs)
    assert merged == merge(Digests(), mine, theirs)
    expected = {n for n in model(mine).keys() & model(theirs).keys() if model(mine)[n] != model(theirs)[n]}
    assert merged.conflicts == tuple(sorted(n for n in expected if "turn/" not in n and "learned_facts" not in n))


def session(*turns: str) -> SessionAsset:
    asset = SessionAsset(id="s", created_at_ms=5, updated_at_ms=5)
    asset.history.turns = [turn(id, "x") for id in turns]
    return asset


def ids(asset: SessionAsset) -> list[str]:
    return [turn.id for turn in asset.history.turns]


@pytest.mark.parametrize(
    ("base", "mine", "theirs", "result"),
    [
        ("a", "ab", "ac", "acb"),
        ("abc", "c", "abcd", "cd"),
        ("abc", "ab", "abcd", "abd"),
        ("abc", "abcd", "", "d"),
        ("aba", "ab", "abac", "abc"),
        ("aa", "aaa", "aaa", "aaa"),
        ("", "aab", "ac", "acab"),
        ("abc", "cba", "abcd", "abcd"),
        ("abc", "ac", "ab", "a"),
        ("abc", "cab", "abc", "cab"),
        ("abc", "abc", "cab", "cab"),
    ],
)
def test_turns(base: str, mine: str, theirs: str, result: str) -> None:
    """Theirs stay in their order, mine follow, what one side removed is gone."""
    merged = merge(session(*base), session(*mine), session(*theirs))
    assert "".join(ids(merged.asset)) == result
    assert merged.conflicts == ()


def test_the_same_id_with_other_content() -> None:
    """Of two turns that were added under one id both stay, the stored one first."""
    base, mine, theirs = session("a"), session("a", "b"), session("a", "b", "c")
    mine.history.turns[1].content = "mine"
    merged = merge(base, mine, theirs)
    assert merged.conflicts == ()
    assert [turn.content for turn in merged.asset.history.turns] == ["x", "x", "x", "mine"]
    assert ids(merged.asset) == ["a", "b", "c", "b"]


def test_removed_here_and_edited_there() -> None:
    """A turn that one side removed and the other edited collides; who holds decides whether it is there."""
    base, removed, edited = session("a", "b", "c"), session("a", "c"), session("a", "b", "c", "d")
    for edit in edited.history.turns[:2]:
        edit.content = "y"
    for mine, theirs, here, there in ((removed, edited, "acd", "abcd"), (edited, removed, "abcd", "acd")):
        merged = merge(base, mine, theirs)
        assert (merged.conflicts, "".join(ids(merged.asset))) == (("turn/b",), here)
        assert "".join(ids(merge(base, mine, theirs, concede=["turn/b"]).asset)) == there
        after = rebased(digests(base), digests(theirs), merged.conflicts)
        assert merge(after, merged.asset, theirs).conflicts == ("turn/b",)


def test_one_turn_edited_on_both_sides() -> None:
    """It collides until one side has what the other has."""
    base, mine, theirs = session("a"), session("a"), session("a", "b")
    mine.history.turns[0].content, theirs.history.turns[0].content = "mine", "theirs"
    merged = merge(base, mine, theirs)
    assert merged.conflicts == ("turn/a",)
    assert [turn.content for turn in merged.asset.history.turns] == ["mine", "x"]
    after = rebased(digests(base), digests(theirs), merged.conflicts)
    assert merge(after, merged.asset, theirs).conflicts == ("turn/a",)
    merged.asset.history.turns[0].content = "theirs"
    assert merge(after, merged.asset, theirs) == (theirs, ())


def test_compacted_on_both_sides() -> None:
    """Two compactions collide; with the one that holds stay the turns that only the other summed up."""
    base = session("a", "b", "c")
    mine, theirs = (copy.deepcopy(base) for _ in range(2))
    for asset, length, added in ((mine, 2, "m"), (theirs, 1, "t")):
        asset.history.max_turns = length
        asset.history.compact(lambda turns: "".join(turn.id for turn in turns))
        asset.history.max_turns = 1000
        asset.history.turns.append(turn(added, "x"))
    merged = merge(base, mine, theirs)
    assert merged.conflicts == ("history.compacted",)
    assert ids(merged.asset) == ["b", "c", "t", "m"]
    conceded = merge(base, theirs, mine, concede=merged.conflicts)
    assert conceded.asset.history.compacted[0].summary == "a"
    assert ids(conceded.asset) == ["b", "c", "m", "t"]


def test_the_other_compaction_has_dropped_nothing() -> None:
    """What only the conceded compaction has dropped stays, though theirs has the turns that both had."""
    base = session("a")
    mine, theirs = (copy.deepcopy(base) for _ in range(2))
    mine.history.max_turns = 0
    mine.history.compact(lambda turns: "mine")
    mine.history.max_turns = 1000
    theirs.history.compacted = [CompactedTurn(summary="theirs", turn_count=0, start_time_ms=0, end_time_ms=0)]
    assert ids(merge(base, mine, theirs).asset) == []
    conceded = merge(base, mine, theirs, concede=["history.compacted"])
    assert conceded.conflicts == ("history.compacted",)
    assert ids(conceded.asset) == ["a"]


def test_compacted_on_one_side() -> None:
    """A compaction and what was pushed meanwhile go together."""
    base = session("a", "b", "c")
    mine = copy.deepcopy(base)
    mine.history.max_turns = 2
    mine.history.compact(lambda turns: "sum")
    merged = merge(base, mine, session("a", "b", "c", "d"))
    assert merged.conflicts == ()
    assert ids(merged.asset) == ["b", "c", "d"]
    assert [summary.summary for summary in merged.asset.history.compacted] == ["sum"]


@pytest.mark.parametrize(
    ("mine", "theirs", "now", "expected"),
    [(7, 5, None, 7), (5, 9, 6, 9), (7, 9, None, 9), (9, 7, None, 9), (7, 99, 20, 20), (99, 5, 20, 99), (7, 7, 6, 7)],
)
def test_times(mine: int, theirs: int, now: int | None, expected: int) -> None:
    """Of two times of an update the later one holds, but not beyond now; of the creation the earlier one."""
    base, here, there = session(), session(), session()
    here.updated_at_ms, there.updated_at_ms = mine, theirs
    here.created_at_ms, there.created_at_ms = 4, 3
    merged = merge(base, here, there, now=now)
    assert merged.conflicts == ()
    assert (merged.asset.updated_at_ms, merged.asset.created_at_ms) == (expected, 3)


def test_sets() -> None:
    """Lists of strings and grants are sets: what either side added or removed is so, theirs first."""
    base, mine, theirs = session(), session(), session()
    grants = {name: CommandGrant.one_time(name) for name in "abcd"}
    for asset, items in ((base, "ab"), (mine, "bac"), (theirs, "bdc")):
        asset.project_context.technologies = list(items)
        asset.granted_commands = [grants[name] for name in items]
    merged = merge(base, mine, theirs)
    assert merged.conflicts == ()
    assert merged.asset.project_context.technologies == ["b", "d", "c"]
    assert merged.asset.granted_commands == [grants[name] for name in "bdc"]


def test_one_fact_learned_on_both_sides() -> None:
    """The first to arrive stands; edited on both sides, it collides, and so does a context."""
    base, mine, theirs = session(), session(), session()
    for asset, value in ((mine, "mine"), (theirs, "theirs")):
        asset.project_context.learn(LearnedFact.new("k", value, "s"))
        asset.project_context.add_persistent_context(ContextInjection(id="k", timing="always", content=value))
    merged = merge(base, mine, theirs)
    assert merged.conflicts == ("project_context.persistent_contexts.k",)
    assert [fact.value for fact in merged.asset.project_context.learned_facts] == ["theirs"]
    assert [text.content for text in merged.asset.project_context.persistent_contexts] == ["mine"]
    base.project_context.learn(LearnedFact.new("k", "old", "s"))
    assert "project_context.learned_facts.k" in merge(base, mine, theirs).conflicts


def test_the_result_has_my_values() -> None:
    """Of what is equal on both sides the result has the very objects of mine, so that references to them hold."""
    base, mine, theirs = session("a"), session("a"), session("a", "b")
    mine.metadata["x"] = theirs.metadata["x"] = base.metadata["x"] = {}
    theirs.metadata["y"] = {}
    merged = merge(base, mine, theirs).asset
    assert merged.history.turns[0] is mine.history.turns[0]
    assert merged.metadata["x"] is mine.metadata["x"]
    assert get_part(merged, "metadata.y") is theirs.metadata["y"]
    assert merged.metadata is not mine.metadata
    assert changed(digests(merged), digests(theirs)) <= TIMES
