"""Sessions and their parts, against what orcs writes and does."""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import orcs_redis
from orcs_redis.errors import CorruptSessionError, SerializationError, VersionIncompatibleError
from orcs_redis.model.asset import SessionAsset
from orcs_redis.model.encoding import f32_text
from orcs_redis.model.sections import (
    AutoTriggerConfig,
    CodingStylePrefs,
    CommandGrant,
    CommunicationPrefs,
    CompactedTurn,
    ComponentSnapshot,
    ContextInjection,
    ConversationHistory,
    ConversationTurn,
    GrantKind,
    LearnedFact,
    LLMTrigger,
    ProjectContext,
    SkillConfig,
    ToolCallRecord,
    Trigger,
    TriggerCondition,
    UserPreferences,
)

SECRET = "hunter2"

# As orcs 0.1 prints it: every field, every trigger.
WRITTEN = """{
  "id": "s1",
  "version": 1,
  "created_at_ms": 1719459572000,
  "updated_at_ms": 18446744073709551615,
  "history": {
    "turns": [
      {
        "id": "t1",
        "timestamp_ms": 0,
        "role": "user",
        "content": "\\u0000\\b\\t\\n\\f\\r\\u001f\\"\\\\/\x7f\u2028é😀<>&",
        "tool_calls": [
          {
            "tool_name": "grep",
            "args": {
              "1e16": "1e16",
              "numbers": [
                1e+16,
                -2.5e+300,
                0.00001,
                1e-6,
                1000000000000000.0,
                -0.0,
                -9223372036854775808,
                18446744073709551615
              ]
            },
            "result": null,
            "success": true,
            "duration_ms": 12
          }
        ],
        "tags": [],
        "metadata": {}
      }
    ],
    "compacted": [
      {
        "summary": "s",
        "turn_count": 2,
        "start_time_ms": 1,
        "end_time_ms": 2
      }
    ],
    "max_turns": 1000
  },
  "preferences": {
    "coding_style": {
      "preferred_languages": [],
      "indent": "tabs",
      "indent_size": 255,
      "naming_convention": null,
      "comment_style": null
    },
    "communication": {
      "verbosity": null,
      "language": null,
      "formality": null,
      "include_examples": false
    },
    "frequent_tools": [],
    "custom": {}
  },
  "project_context": {
    "root_path": "/p",
    "name": null,
    "technologies": [],
    "key_files": [],
    "architecture_notes": [],
    "learned_facts": [
      {
        "key": "k",
        "value": "v",
        "source": "s",
        "confidence": 0.9,
        "learned_at_ms": 5
      },
      {
        "key": "k2",
        "value": "v",
        "source": "s",
        "confidence": 1.0,
        "learned_at_ms": 5
      }
    ],
    "persistent_contexts": [
      {
        "id": "c",
        "timing": "always",
        "content": "x"
      }
    ]
  },
  "skill_configs": {
    "lint": {
      "skill_id": "lint",
      "enabled": true,
      "auto_trigger": {
        "enabled": true,
        "triggers": [
          {
            "OnFileEdit": {
              "glob": "*.rs"
            }
          },
          "OnLLMPreRequest",
          "OnLLMPostResponse",
          {
            "OnEvent": {
              "kind": "x"
            }
          },
          {
            "Interval": {
              "seconds": 5
            }
          }
        ]
      },
      "params": {}
    }
  },
  "component_snapshots": {
    "ns::a": {
      "component_fqn": "ns::a",
      "version": 1,
      "state": null,
      "metadata": {}
    }
  },
  "granted_commands": [
    {
      "pattern": "ls",
      "kind": "Persistent"
    },
    {
      "pattern": "rm",
      "kind": "OneTime"
    }
  ],
  "metadata": {}
}"""
FULL = json.loads(WRITTEN) | {"updated_at_ms": 1}
SAMPLES = Path(orcs_redis.__file__).parent / "cli/demo_sessions"


class Annotated(SessionAsset):
    notes: list[str] = []  # noqa: RUF012  # msgspec copies it


def decode(document: Any) -> SessionAsset:
    return SessionAsset.from_json(json.dumps(document))


def changed(path: str, value: Any) -> Any:
    document = copy.deepcopy(FULL)
    *above, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place = document
    for part in above:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return document


def test_json_is_what_orcs_writes() -> None:
    """A session that orcs wrote comes out byte for byte."""
    text = WRITTEN.replace("18446744073709551615", "1719459572001", 1)
    assert SessionAsset.from_json(text).to_json() == text
    assert SessionAsset.from_json(text.encode()).to_json() == text


def test_sample_sessions() -> None:
    """Real sessions come out byte for byte."""
    files = list(SAMPLES.glob("*.json"))
    assert files
    for file in files:
        text = file.read_text()
        assert SessionAsset.from_json(text).to_json() == text


REQUIRED = {
    "": [
        "id",
        "version",
        "created_at_ms",
        "updated_at_ms",
        "history",
        "preferences",
        "project_context",
        "skill_configs",
        "metadata",
    ],
    "history/": ["turns", "compacted"],
    "history/turns/0/": ["id", "timestamp_ms", "role", "content", "tool_calls", "tags", "metadata"],
    "history/turns/0/tool_calls/0/": ["tool_name", "args", "success", "duration_ms"],
    "history/compacted/0/": ["summary", "turn_count", "start_time_ms", "end_time_ms"],
    "preferences/": ["coding_style", "communication", "frequent_tools", "custom"],
    "preferences/coding_style/": ["preferred_languages"],
    "project_context/": ["technologies", "key_files", "architecture_notes", "learned_facts", "persistent_contexts"],
    "project_context/learned_facts/0/": ["key", "value", "source", "confidence", "learned_at_ms"],
    "project_context/persistent_contexts/0/": ["id", "timing", "content"],
    "skill_configs/lint/": ["skill_id", "enabled", "auto_trigger", "params"],
    "skill_configs/lint/auto_trigger/": ["enabled", "triggers"],
    "component_snapshots/ns::a/": ["component_fqn", "version", "state", "metadata"],
    "granted_commands/0/": ["pattern", "kind"],
}


@pytest.mark.parametrize("path", [above + name for above, names in REQUIRED.items() for name in names])
def test_required_fields(path: str) -> None:
    """A field that orcs requires must be there, and names itself when it isn't."""
    with pytest.raises(CorruptSessionError) as caught:
        decode(changed(path, ...))
    assert caught.value.field.endswith(path.rpartition("/")[2])


@pytest.mark.parametrize(
    ("path", "default"),
    [
        ("history/max_turns", 1000),
        ("preferences/communication/include_examples", False),
        ("component_snapshots", {}),
        ("granted_commands", []),
    ],
)
def test_fields_with_serde_default(path: str, default: Any) -> None:
    """What orcs defaults may be missing."""
    assert decode(changed(path, ...)) == decode(changed(path, default))


@pytest.mark.parametrize(
    "path",
    ["history/turns/0/tool_calls/0/result", "project_context/root_path", "project_context/name"]
    + [f"preferences/coding_style/{n}" for n in ("indent", "indent_size", "naming_convention", "comment_style")]
    + [f"preferences/communication/{n}" for n in ("verbosity", "language", "formality")],
)
def test_options(path: str) -> None:
    """An Option may be absent or null."""
    assert decode(changed(path, ...)) == decode(changed(path, None))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("id", 5),
        ("created_at_ms", -1),
        ("created_at_ms", 2**64),
        ("created_at_ms", 1.0),
        ("version", 2.0),
        ("version", True),
        ("history/turns/0/timestamp_ms", -1),
        ("history/turns/0/timestamp_ms", 2**64),
        ("history/turns/0/role", None),
        ("history/turns/0/tags", [1]),
        ("history/turns/0/tool_calls/0/success", 1),
        ("preferences/coding_style/indent_size", 256),
        ("project_context/learned_facts/0/confidence", 1e39),
        ("project_context/learned_facts/0/confidence", "1"),
        ("component_snapshots/ns::a/version", 2**32),
        ("granted_commands/0/kind", SECRET),
        ("skill_configs/lint/auto_trigger/triggers/0", SECRET),
        ("skill_configs/lint/auto_trigger/triggers/0", {}),
        ("skill_configs/lint/auto_trigger/triggers/0", {"OnSomething": {}}),
        ("skill_configs/lint/auto_trigger/triggers/0", {"OnFileEdit": {}}),
        ("skill_configs/lint/auto_trigger/triggers/0", {"OnFileEdit": None}),
        ("skill_configs/lint/auto_trigger/triggers/0", {"OnEvent": {"kind": "x"}, "Interval": {"seconds": 1}}),
        ("skill_configs/lint/auto_trigger/triggers/0", {"Interval": {"seconds": -1}}),
    ],
)
def test_wrong_values(path: str, value: Any) -> None:
    """A value that orcs would refuse is corrupt; the error names the top-level field and no value."""
    with pytest.raises(CorruptSessionError) as caught:
        decode(changed(path, value))
    assert caught.value.field.startswith(path.partition("/")[0])
    assert caught.value.id == ("s1" if path != "id" else "")
    assert SECRET not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        "5",
        "{",
        WRITTEN[:-1],
        WRITTEN + "x",
        b"\xff",
        b"\xef\xbb\xbf{}",
        "�",
        '{"a": "\\ud800"}',
        "[" * 100000,
        '{"a":' * 100000,
        '{"version": NaN}',
        '{"version": 1e999}',
        WRITTEN.replace('"metadata": {}\n}', f'"metadata": {{"a": 1{"0" * 400}}}\n}}'),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_garbage(text: str | bytes) -> None:
    """Garbage of all kinds is corrupt and nothing else."""
    with pytest.raises(CorruptSessionError):
        SessionAsset.from_json(text)


def test_other_versions() -> None:
    """Another version is told before any other difference, when reading and when writing."""
    with pytest.raises(VersionIncompatibleError) as caught:
        SessionAsset.from_json('{"version": 2, "id": 5, "history": "new"}')
    assert (caught.value.found, caught.value.supported) == (2, 1)
    asset = SessionAsset.new()
    asset.version = 2
    with pytest.raises(VersionIncompatibleError):
        asset.to_json()


def test_long_integers() -> None:
    """Integers beyond 64 bits are read as floats, as serde_json does."""
    asset = decode(FULL | {"metadata": {"a": [2**64, -(2**63) - 1, 2**64 - 1]}, "new": 10**30})
    assert repr(asset.metadata["a"]) == repr([2.0**64, -(2.0**63), 2**64 - 1])
    assert repr(asset.extra["new"]) == "1e+30"
    text = SessionAsset.new().to_json().replace('"metadata": {}\n}', f'"metadata": {{"a": {2**64}}}\n}}')
    assert repr(SessionAsset.from_json(text).metadata["a"]) == repr(2.0**64)


def test_unknown_fields() -> None:
    """Unknown top-level fields survive, one called `extra` too; unknown nested ones are dropped."""
    document = FULL | {"extra": {"a": 1}, "planet": [1, None], "": 0}
    asset = decode(document)
    assert asset.extra == {"extra": {"a": 1}, "planet": [1, None], "": 0}
    assert json.loads(asset.to_json()) == document
    assert asset != decode(FULL)
    for twin in (copy.deepcopy(asset), pickle.loads(pickle.dumps(asset)), decode(json.loads(asset.to_json()))):
        assert twin == asset
    nested = copy.deepcopy(FULL)
    nested["history"]["turns"][0]["new"] = 1
    assert decode(nested) == decode(FULL)


@pytest.mark.parametrize("field", ["extra", "planet"])
def test_unknown_fields_as_written(field: str) -> None:
    """What differs from a known session in one unknown field only is read as what it is, in any form."""
    text = decode(FULL).to_json()
    document = json.loads(text)
    for known in (text, json.dumps(document), msgspec.json.format(text, indent=-1)):
        assert SessionAsset.from_json(known) == decode(document)
        with_more = known.rstrip()[:-1] + f', "{field}": {{}}' + "}"
        assert SessionAsset.from_json(with_more).extra == {field: {}}


def repeat(text: str, key: str, again: str) -> str:
    """Return JSON in which the first object with a key has it once more."""
    return text.replace(f'"{key}":', f'"{key}": {again}, "{key}":', 1)


@pytest.mark.parametrize(
    ("key", "again", "where"),
    [
        ("id", '"x"', "id"),
        ("version", "1", "version"),
        ("metadata", "{}", "history.turns[0].metadata"),
        ("granted_commands", "[]", "granted_commands"),
        ("turns", "[]", "history.turns"),
        ("role", '"user"', "history.turns[0].role"),
        ("success", "true", "history.turns[0].tool_calls[0].success"),
        ("turn_count", "1", "history.compacted[0].turn_count"),
        ("indent_size", "null", "preferences.coding_style.indent_size"),
        ("skill_id", '"s"', "skill_configs.lint.skill_id"),
        ("Interval", '{"seconds": 1}', "skill_configs.lint.auto_trigger.triggers[4].Interval"),
        ("component_fqn", '"c"', "component_snapshots.ns::a.component_fqn"),
        ("kind", '"x"', "skill_configs.lint.auto_trigger.triggers[3].OnEvent.kind"),
        ("pattern", '"x"', "granted_commands[0].pattern"),
    ],
)
def test_repeated_fields(key: str, again: str, where: str) -> None:
    """A field that is there twice is refused, as serde refuses it, wherever it is."""
    with pytest.raises(CorruptSessionError) as caught:
        SessionAsset.from_json(repeat(WRITTEN, key, again))
    assert caught.value.field == where


@pytest.mark.parametrize("key", ["1e16", "numbers", "lint", "ns::a", "unknown"])
def test_repeated_keys_of_maps(key: str) -> None:
    """Of a key that is twice in a map, or is unknown, the last one holds, as in serde's maps."""
    text = WRITTEN.replace('"indent"', '"unknown": 0, "indent"', 1)
    again = WRITTEN[WRITTEN.index('"ns::a": ') + 9 :].partition("    }")[0] + "}" if key == "ns::a" else "[[[0]]]"
    if key == "lint":
        again = '{"skill_id": "x", "enabled": true, "auto_trigger": {"enabled": true, "triggers": []}, "params": {}}'
    assert SessionAsset.from_json(repeat(text, key, again)) == SessionAsset.from_json(WRITTEN)
    top = text.replace('"id"', '"new": 1, "new": 2, "id"', 1)
    assert SessionAsset.from_json(top).extra == {"new": 2}


@pytest.mark.parametrize("id", ["a\nb", "x" * 100_000, "\u202e"])
def test_errors_show_no_such_id(id: str) -> None:
    """An id that a file may hold, but no session can have, is shortened and escaped in an error."""
    with pytest.raises(CorruptSessionError) as caught:
        decode(FULL | {"id": id, "metadata": 5})
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


def test_invalid_utf8_anywhere() -> None:
    """Bytes that are no UTF-8 are refused in what is passed over, too: else the next save would lose it for good."""
    text = SessionAsset.new().to_json().encode()
    for before, after in [
        (b'"indent": null', b'"indent\xff": null'),
        (b'"indent": null', b'"indent": null, "unknown": "\xff"'),
        (b'"indent": null', b'"indent": null, "\xc3": {}'),
        (b'"custom": {}', b'"custom": {"a": "\xed\xa0\x80"}'),
    ]:
        assert before in text
        with pytest.raises(CorruptSessionError):
            SessionAsset.from_json(text.replace(before, after))
    with pytest.raises(CorruptSessionError):
        SessionAsset.from_json(text.decode().replace('"indent": null', '"indent": null, "unknown": "\ud800"'))


def test_extra_can_not_hide_a_field() -> None:
    """An unknown field with a known one's name is refused on writing."""
    asset = SessionAsset.new()
    asset.extra["id"] = "x"
    with pytest.raises(SerializationError, match=r"extra\.id"):
        asset.to_json()


def test_subclass() -> None:
    """A subclass's own fields stand at top level, and may be missing if they have a default."""
    asset = Annotated.new()
    asset.notes.append("n")
    document = json.loads(asset.to_json())
    assert document["notes"] == ["n"]
    assert list(document)[-1] == "notes"
    back = Annotated.from_json(asset.to_json())
    assert (type(back), back) == (Annotated, asset)
    assert Annotated.from_json(SessionAsset.new().to_json()).notes == []
    assert SessionAsset.from_json(asset.to_json()).extra == {"notes": ["n"]}


@pytest.mark.parametrize(
    ("confidence", "text"),
    [
        (0.9, "0.9"),
        (0.1 + 0.2, "0.3"),
        (1, "1.0"),
        (0.899999976158142, "0.9"),
        (1e-6, "0.000001"),
        (1e-7, "1e-7"),
        (0.0, "0.0"),
        (1 / 3, "0.33333334"),
        (1.5e12, "1500000000000.0"),
        (1e13, "1e+13"),
        (3.4028234663852886e38, "3.4028235e+38"),
        (3.4028235677973362e38, "3.4028235e+38"),  # the largest that is no infinity
        (-3.4028235677973362e38, "-3.4028235e+38"),
        (-0.0, "-0.0"),
        (2.0**-96, "1.2621775e-29"),  # whose nearest eight digits are another's
        (2.0**87, "1.5474251e+26"),
        (2.0**90, "1.2379401e+27"),
        (1048576.25, "1048576.2"),  # of two that are as near, the even one
        (2.0**-149, "1e-45"),
    ],
)
def test_confidence(confidence: float, text: str) -> None:
    """A confidence is written with the shortest digits of its 32 bits; the asset keeps what it had."""
    asset = SessionAsset.new()
    asset.project_context.learn(LearnedFact(key="k", value="v", source="s", confidence=confidence))
    assert f'"confidence": {text},\n' in asset.to_json()
    assert asset.project_context.learned_facts[0].confidence == confidence
    assert SessionAsset.from_json(asset.to_json()).project_context.learned_facts[0].confidence == float(text)


@pytest.mark.parametrize("confidence", [3.402823567797337e38, -3.402823567797337e38, 1e39])
def test_confidence_out_of_range(confidence: float) -> None:
    """What would be an infinity in 32 bits is neither written nor read."""
    asset = SessionAsset.new()
    asset.project_context.learn(LearnedFact(key="k", value="v", source="s", confidence=1.0))
    text = asset.to_json().replace('"confidence": 1.0', f'"confidence": {confidence}')
    with pytest.raises(CorruptSessionError, match="confidence"):
        SessionAsset.from_json(text)
    asset.project_context.learned_facts[0].confidence = confidence
    with pytest.raises(SerializationError, match="confidence"):
        asset.to_json()


def single(bits: int) -> float:
    value: float = struct.unpack(">f", bits.to_bytes(4))[0]
    return value


@given(st.integers(0, 0x7F7FFFFF))
def test_shortest_digits(bits: int) -> None:
    """An f32 is written with the fewest digits that only it has, and of these with the nearest."""
    check_digits(bits)


def test_shortest_digits_beside_powers_of_two() -> None:
    """The same where f32s are denser on one side than on the other."""
    for exponent in range(255):
        for near in (-1, 0, 1):
            check_digits(max(0, (exponent << 23) + near))


def check_digits(bits: int) -> None:
    text = bytes(f32_text(single(bits))).decode()
    assert single_bits(text) == bits
    _, digits, exponent = Decimal(text).normalize().as_tuple()
    assert isinstance(exponent, int)
    number, unit, exact = int("".join(map(str, digits))), Fraction(10) ** exponent, Fraction(single(bits))
    for other in (number - 1, number + 1):
        if single_bits(f"{other}e{exponent}") == bits:
            assert abs(other * unit - exact) >= abs(number * unit - exact)
    if number:
        for shorter in (number // 10, number // 10 + 1):
            assert single_bits(f"{shorter}e{exponent + 1}") != bits


def single_bits(text: str) -> int:
    return int.from_bytes(struct.pack(">f", float(text))) if abs(float(text)) < 3.4028235677973366e38 else -1


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
U64 = st.integers(0, 2**64 - 1)
FREE = st.dictionaries(
    TEXT,
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | TEXT
    | st.floats(allow_nan=False, allow_infinity=False),
    max_size=3,
)
CALLS = st.builds(
    ToolCallRecord, tool_name=TEXT, args=FREE, result=st.none() | FREE, success=st.booleans(), duration_ms=U64
)
TURNS = st.builds(
    ConversationTurn,
    id=TEXT,
    timestamp_ms=U64,
    role=TEXT,
    content=TEXT,
    tool_calls=st.lists(CALLS, max_size=2),
    tags=st.lists(TEXT, max_size=2),
    metadata=FREE,
)
CONDITIONS = st.one_of(
    st.sampled_from(list(LLMTrigger)),
    TEXT.map(TriggerCondition.on_file_edit),
    TEXT.map(TriggerCondition.on_event),
    U64.map(TriggerCondition.interval),
)
SKILLS = st.builds(
    SkillConfig,
    skill_id=TEXT,
    enabled=st.booleans(),
    auto_trigger=st.builds(AutoTriggerConfig, enabled=st.booleans(), triggers=st.lists(CONDITIONS, max_size=3)),
    params=FREE,
)
ASSETS = st.builds(
    lambda **fields: SessionAsset(**fields),
    id=TEXT,
    created_at_ms=st.integers(0, 253_402_300_799_999),
    updated_at_ms=st.integers(0, 253_402_300_799_999),
    history=st.builds(ConversationHistory, compacted=st.just([]), turns=st.lists(TURNS, max_size=3), max_turns=U64),
    skill_configs=st.dictionaries(TEXT, SKILLS, max_size=2),
    metadata=FREE,
    extra=FREE.map(lambda d: {f"x-{k}": v for k, v in d.items()}),
)


@given(ASSETS)
def test_round_trip(asset: SessionAsset) -> None:
    """Any asset comes back equal from JSON, and its parts from msgpack."""
    text = asset.to_json()
    back = SessionAsset.from_json(text)
    assert back == asset
    assert back.to_json() == text
    assert json.dumps(json.loads(text), indent=2, ensure_ascii=False).count("\n") == text.count("\n")
    for part in (asset.history, asset.skill_configs):
        hint = dict[str, SkillConfig] if isinstance(part, dict) else type(part)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(part), type=hint) == part


def test_triggers() -> None:
    """Triggers are values with names, tagged as serde tags an enum."""
    triggers: list[Trigger] = [
        TriggerCondition.on_file_edit("*.rs"),
        TriggerCondition.on_llm_pre_request(),
        TriggerCondition.on_llm_post_response(),
        TriggerCondition.on_event("e"),
        TriggerCondition.interval(5),
    ]
    tagged = [{"OnFileEdit": {"glob": "*.rs"}}, "OnLLMPreRequest", "OnLLMPostResponse"]
    assert msgspec.to_builtins(triggers) == [*tagged, {"OnEvent": {"kind": "e"}}, {"Interval": {"seconds": 5}}]
    assert msgspec.json.decode(msgspec.json.encode(triggers), type=list[Trigger]) == triggers
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(triggers), type=list[Trigger]) == triggers
    with pytest.raises(ValueError, match="exactly one"):
        TriggerCondition()


def test_defaults_in_python() -> None:
    """What Python makes without arguments is complete, and shares nothing."""
    assert ConversationTurn(role="user", content="x").tags == []
    assert SessionAsset() != SessionAsset()
    for part in (UserPreferences, ProjectContext, ConversationHistory, CodingStylePrefs, CommunicationPrefs):
        assert part() == part()
    assert SessionAsset().history.turns is not SessionAsset().history.turns
    assert SessionAsset().granted_commands is not SessionAsset().granted_commands
    assert SkillConfig.new("s").enabled
    assert not SkillConfig.disabled("s").enabled
    assert CommandGrant.persistent("x").kind is GrantKind.PERSISTENT
    assert [t("x").role for t in (ConversationTurn.user, ConversationTurn.assistant, ConversationTurn.system)] == [
        "user",
        "assistant",
        "system",
    ]


def test_history() -> None:
    """recent, search and in_range find what orcs finds, and an empty history is true."""
    turns = [ConversationTurn(role="user", content=f"Turn {n}", timestamp_ms=n) for n in range(10)]
    turns[4].with_tags(["RUST"])
    history = ConversationHistory(turns=turns)
    assert len(history) == 10
    assert bool(ConversationHistory())
    assert history.recent(3) == turns[7:]
    assert history.recent(0) == []
    assert history.recent(99) == turns
    assert history.search("TURN 7") == [turns[7]]
    assert history.search("rust") == [turns[4]]
    assert history.in_range(2, 4) == turns[2:5]


def test_compact() -> None:
    """Turns beyond the maximum become one summary; a failing summarizer loses nothing."""
    turns = [ConversationTurn(role="user", content=f"{n}", timestamp_ms=n) for n in range(5)]
    history = ConversationHistory(turns=list(turns), max_turns=2)
    with pytest.raises(ZeroDivisionError):
        history.compact(lambda old: str(1 / 0))
    assert history.turns == turns
    history.compact(lambda old: "".join(turn.content for turn in old))
    history.compact(lambda old: "not called")
    assert history.turns == turns[3:]
    assert history.compacted == [CompactedTurn(summary="012", turn_count=3, start_time_ms=0, end_time_ms=2)]


def test_project_context() -> None:
    """The first fact of a key wins, and facts are found by key and value in any case."""
    context = ProjectContext()
    context.learn(LearnedFact.new("db", "PostgreSQL", "user"))
    context.learn(LearnedFact.new("db", "SQLite", "user"))
    assert [fact.value for fact in context.find_facts("POSTGRE")] == ["PostgreSQL"]
    assert context.find_facts("DB") == context.learned_facts
    assert LearnedFact.new("a", "b", "c").with_confidence(7).confidence == 1.0
    context.add_persistent_context(ContextInjection(id="i", timing="always", content="x"))
    assert len(context.persistent_contexts) == 1


def test_asset_methods_touch() -> None:
    """The time of the last update moves when something changed, and only then."""

    def touches(asset: SessionAsset) -> bool:
        moved, asset.updated_at_ms = asset.updated_at_ms != 7, 7
        return moved

    asset = SessionAsset.for_project(Path("/p"))
    assert asset.project_context.root_path == "/p"
    assert touches(asset)
    asset.clear_snapshots()
    assert asset.remove_snapshot("a") is None
    asset.save_grants([])
    assert not touches(asset)
    snapshot = ComponentSnapshot(component_fqn="a")
    changes: list[Callable[[], None]] = [
        lambda: asset.save_snapshot(snapshot),
        lambda: asset.save_grants([CommandGrant.one_time("x")]),
        lambda: asset.set_skill_config("s", SkillConfig.new("s")),
        lambda: asset.add_turn(ConversationTurn.user("x")),
        asset.touch,
    ]
    for change in changes:
        change()
        assert touches(asset)
    assert (asset.snapshot_count, asset.grant_count, asset.get_snapshot("a")) == (1, 1, snapshot)
    assert asset.remove_snapshot("a") is snapshot
    assert touches(asset)
    asset.save_snapshot(snapshot)
    asset.clear_snapshots()
    assert asset.snapshot_count == 0


def test_times() -> None:
    """Times are aware and exact; those after 9999 are read as its end, and not written."""
    asset = SessionAsset(created_at_ms=1719459572001, updated_at_ms=2**64 - 1)
    assert asset.created_at == datetime(2024, 6, 27, 3, 39, 32, 1000, UTC)
    assert asset.updated_at.year == 9999
    assert SessionAsset.from_json(WRITTEN).updated_at_ms == 2**64 - 1
    with pytest.raises(SerializationError, match="updated_at_ms"):
        asset.to_json()


def test_copies() -> None:
    """Copies are equal, and carry what a store notes beside an asset."""
    asset = decode(FULL)
    vars(asset)["note"] = SECRET
    for twin in (copy.copy(asset), copy.deepcopy(asset), pickle.loads(pickle.dumps(asset))):
        assert twin == asset
        assert vars(twin) == vars(asset)


def test_reprs_hide_what_was_written() -> None:
    """No repr shows content, arguments, facts, patterns or metadata."""
    asset = decode(FULL)
    asset.metadata["x"] = asset.extra["y"] = SECRET
    asset.project_context.name = SECRET
    turn = ConversationTurn.user(SECRET).with_tags([SECRET])
    turn.with_tool_calls([ToolCallRecord(tool_name="t", args=SECRET, result=SECRET)])
    asset.add_turn(turn)
    asset.save_snapshot(ComponentSnapshot(component_fqn="f", state=SECRET))
    asset.set_skill_config("s", SkillConfig(skill_id="s", params={"p": SECRET}))
    asset.save_grants([CommandGrant.one_time(SECRET)])
    asset.project_context.learn(LearnedFact.new(SECRET, SECRET, SECRET))
    asset.preferences.custom["c"] = SECRET
    assert repr(asset) == "SessionAsset(id='s1', turns=2)"
    assert repr(turn) == f"ConversationTurn(id={turn.id!r}, role='user')"
    out = io.StringIO()

    def rich(part: Any) -> Any:
        return part.__rich_repr__()

    for part in [
        asset,
        *(getattr(asset, name) for name in asset.__struct_fields__ if name not in ("metadata", "extra")),
    ]:
        print(part, rich(part) if isinstance(part, msgspec.Struct) else "", file=out)
    for turn in asset.history.turns:
        print(turn, turn.tool_calls, rich(turn), file=out)
    print(asset.project_context.learned_facts, TriggerCondition.on_event(SECRET), file=out)
    assert SECRET not in out.getvalue()
