"""An asset as parts: names, values, digests."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcs_redis import (
    CommandGrant,
    ComponentSnapshot,
    ContextInjection,
    ConversationTurn,
    LearnedFact,
    SessionAsset,
    SkillConfig,
)
from orcs_redis.model.parts import (
    TIMES,
    changed,
    digests,
    drop_part,
    get_part,
    list_part,
    parts_of,
    place_of,
    set_part,
    settable,
)

SECRET = "hunter2"

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
keys = text | st.sampled_from(["a.b", "", ".", "turn/x", "x*", "é\n", "extra", "history"])
free = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2),
    max_leaves=3,
)
maps = st.dictionaries(keys, free, max_size=2)
f32s = st.floats(0, 1) | st.just(0.1 + 0.2)


class Scored(SessionAsset):
    score: float = 0.0
    notes: dict[str, int] = msgspec.field(default_factory=dict)


@st.composite
def assets(draw: st.DrawFn) -> SessionAsset:
    asset = Scored(id="s", created_at_ms=1, updated_at_ms=2, metadata=draw(maps), score=draw(st.integers(0, 3)))
    asset.extra = {f"x{key}": value for key, value in draw(maps).items()}
    asset.preferences.custom = draw(maps)
    asset.preferences.frequent_tools = draw(st.lists(text, max_size=2))
    asset.preferences.coding_style.indent = draw(st.none() | text)
    context = asset.project_context
    context.name = draw(st.none() | text)
    for key in draw(st.lists(keys, max_size=2)):
        context.learned_facts.append(LearnedFact(key=key, value="v", source="s", confidence=draw(f32s)))
        context.persistent_contexts.append(ContextInjection(id=key, timing="always", content="c"))
        asset.skill_configs[key] = SkillConfig(skill_id=key, params=draw(maps))
        asset.component_snapshots[key] = ComponentSnapshot(component_fqn=key, state=draw(free))
        asset.granted_commands.append(CommandGrant.one_time(key))
        asset.add_turn(ConversationTurn(id=key, role="user", content="x", metadata=draw(maps)))
    asset.updated_at_ms = 3
    return asset


def shuffled(value: Any) -> Any:
    """The same with the keys of all maps in another order."""
    if isinstance(value, dict):
        return {key: shuffled(item) for key, item in reversed(value.items())}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(assets())
def test_digests_survive_json(asset: SessionAsset) -> None:
    """What comes back from orcs' JSON, in whatever order, has the same digests."""
    again = Scored.from_json(asset.to_json())
    assert digests(again) == digests(asset)
    other = msgspec.json.encode(shuffled(msgspec.json.decode(asset.to_json())))
    assert not changed(digests(asset), digests(Scored.from_json(other)))
    assert pickle.loads(pickle.dumps(digests(asset))) == digests(asset)


@given(assets())
def test_names_lead_to_their_parts(asset: SessionAsset) -> None:
    """Each name is that of one part, and leads to it, whatever is in the key."""
    parts = parts_of(asset)
    for name, value in parts.values.items():
        assert get_part(asset, name) is value
        place = place_of(name, Scored)
        assert ".".join([*place.fields, *([] if place.key is None else [place.key])]) == name
    for path, items in parts.lists.items():
        for key, _ in digests(asset).lists[path]:
            found = get_part(asset, list_part(path, key))
            assert found is items or found in items


def test_parts_of_an_empty_session() -> None:
    """All parts that are not in maps."""
    parts = parts_of(Scored())
    style, spoken, context = "preferences.coding_style", "preferences.communication", "project_context"
    assert parts.values.keys() == {
        *("created_at_ms", "updated_at_ms", "score", "notes", "history.compacted", "history.max_turns"),
        *(f"{style}.{name}" for name in ("indent", "indent_size", "naming_convention", "comment_style")),
        *(f"{spoken}.{name}" for name in ("verbosity", "language", "formality", "include_examples")),
        *(f"{context}.{name}" for name in ("root_path", "name")),
    }
    assert parts.lists.keys() == {
        *("history.turns", "granted_commands", f"{style}.preferred_languages", "preferences.frequent_tools"),
        *(f"{context}.{name}" for name in ("technologies", "key_files", "architecture_notes")),
        *(f"{context}.{name}" for name in ("learned_facts", "persistent_contexts")),
    }


@given(assets(), assets())
def test_setting_parts_makes_one_asset_the_other(old: SessionAsset, new: SessionAsset) -> None:
    """Exactly the parts that changed are what has to be set and dropped."""
    result = copy.deepcopy(old)
    for path, items in parts_of(new).lists.items():
        set_part(result, path, items) if path != "history.turns" else setattr(result.history, "turns", items)
    names = changed(digests(result), digests(new))
    for name in names:
        if name in parts_of(new).values:
            set_part(result, name, get_part(new, name))
        else:
            drop_part(result, name)
    assert not changed(digests(result), digests(new))
    assert not names & changed(digests(result), digests(new))


def test_changes_are_named() -> None:
    """A change names its parts; another order of one list, the list's field."""
    asset = SessionAsset(id="s", created_at_ms=1, updated_at_ms=1)
    asset.history.turns = [ConversationTurn(id=id, role="user", content="x") for id in ("a", "b", "b")]
    before = digests(asset)
    assert changed(before, before) == set()
    asset.metadata["a.b"] = 1
    asset.project_context.name = "n"
    asset.project_context.technologies.append("rust")
    asset.project_context.learn(LearnedFact.new("k.1", "v", "s"))
    asset.history.turns[2].content = "y"
    asset.granted_commands = [CommandGrant.one_time("x")]
    asset.touch()
    assert changed(before, digests(asset)) == {
        "metadata.a.b",
        "project_context.name",
        "project_context.technologies",
        "project_context.learned_facts.k.1",
        "turn/b",
        "granted_commands",
        "updated_at_ms",
    }
    before = digests(asset)
    asset.history.turns.reverse()
    assert changed(before, digests(asset)) == {"history.turns"}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("metadata.title", Any),
        ("metadata.", Any),
        ("metadata.a.b\n*", Any),
        ("extra.future", Any),
        ("skill_configs.x", SkillConfig),
        ("component_snapshots.a::b", ComponentSnapshot),
        ("granted_commands", list[CommandGrant]),
        ("score", float),
        ("notes", dict[str, int]),
    ],
)
def test_what_a_commit_sets_and_unsets(name: str, hint: Any) -> None:
    """A commit names keys of maps and sections; their type is known."""
    place = settable(name, Scored, unset=True)
    assert place.hint == hint
    assert settable(name, Scored) == place
    assert place.fields == (name.split(".")[0],)
    assert place.key == (name.partition(".")[2] if "." in name else None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "no such part"),
        (".", "no such part"),
        ("title", "no such part"),
        ("Metadata.x", "no such part"),
        ("preferences.no", "no such part"),
        ("created_at_ms.x", "no such part"),
        ("granted_commands.x", "no such part"),
        ("score.x", "no such part"),
        ("notes.x", "no such part"),
        ("history.turns", "no such part"),
        ("history.turns.t1", "no such part"),
        ("metadata", "metadata is a map"),
        ("skill_configs", "is a map"),
        ("component_snapshots", "is a map"),
        ("extra", "is a map"),
        ("preferences.custom", "is a map"),
        ("turn/t1", "changed by append"),
        ("turn/", "changed by append"),
        ("history", "changed by append"),
        ("history.compacted", "changed by append"),
        ("id", "can't be changed"),
        ("version", "can't be changed"),
        ("project_context.name", "set project_context"),
        ("project_context.learned_facts.k", "set project_context"),
        ("preferences.custom.x", "set preferences"),
        ("extra.metadata", "a field of this name exists"),
        ("\ud800", "text"),
        (7, "text"),
        (None, "text"),
        ("x" * 1000 + SECRET, "…$"),
    ],
)
def test_what_a_commit_refuses(name: Any, reason: str) -> None:
    """A name that is no part that can be set is a ValueError that says why, in short."""
    with pytest.raises(ValueError, match=reason) as caught:
        settable(name, Scored)
    assert SECRET not in str(caught.value)
    assert len(str(caught.value)) < 120
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize("name", ["preferences", "project_context", "created_at_ms", "updated_at_ms"])
def test_what_every_session_has(name: str) -> None:
    """A section that every session has can be set, but not unset."""
    assert settable(name).key is None
    with pytest.raises(ValueError, match="can't be unset"):
        settable(name, unset=True)
    with pytest.raises(ValueError, match="can't be dropped"):
        drop_part(SessionAsset(), name)


def test_elements_of_lists() -> None:
    """Turns, facts and contexts are got, set and dropped by their keys; of turns with one id, the last."""
    asset = SessionAsset()
    first, last, new = (ConversationTurn(id="t.1", role="user", content=text) for text in "abc")
    asset.history.turns = [first, last]
    assert get_part(asset, "turn/t.1") is last
    set_part(asset, "turn/t.1", new)
    assert asset.history.turns == [first, new]
    drop_part(asset, "turn/t.1")
    assert asset.history.turns == [first]
    name = "project_context.learned_facts.a.b"
    set_part(asset, name, LearnedFact.new("a.b", "v", "s"))
    assert get_part(asset, name) is asset.project_context.learned_facts[0]
    drop_part(asset, name)
    assert asset.project_context.learned_facts == []
    for missing in (name, "turn/no", "metadata.no"):
        with pytest.raises(KeyError):
            get_part(asset, missing)
        with pytest.raises(KeyError):
            drop_part(asset, missing)


def test_fields_are_dropped_to_their_defaults() -> None:
    """A field that is dropped is as in a session that was made without it."""
    asset = Scored(score=2.0, notes={"a": 1}, granted_commands=[CommandGrant.one_time("x")])
    asset.project_context.name = "n"
    for name in ("score", "notes", "granted_commands", "project_context.name"):
        drop_part(asset, name)
    assert changed(digests(Scored()), digests(asset)) <= TIMES
    assert asset.notes is not Scored().notes
