"""What can't come back equal is refused, and the field is named."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import inspect
import math
import pickle
import signal
import sys
import uuid
from collections.abc import Callable
from typing import Any
from unittest import mock

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcs_redis.errors import CorruptSessionError, SerializationError
from orcs_redis.model.asset import SessionAsset
from orcs_redis.model.encoding import attempt, pack, parse_json
from orcs_redis.model.sections import (
    AutoTriggerConfig,
    CommandGrant,
    ConversationTurn,
    LearnedFact,
    SkillConfig,
    ToolCallRecord,
)
from orcs_redis.protocol.baseline import Baseline
from orcs_redis.protocol.codec import Codec

SECRET = "hunter2"


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def a_loop() -> Any:
    loop: list[Any] = [SECRET]
    loop.append({"again": loop})
    return loop


class Opaque:
    def __repr__(self) -> str:
        return SECRET


FREE = [
    pytest.param(math.nan, "", id="nan"),
    pytest.param(math.inf, "", id="inf"),
    pytest.param({"a": [1, -math.inf]}, ".a[1]", id="nested inf"),
    pytest.param(2**64, "", id="too big"),
    pytest.param(-(2**63) - 1, "", id="too small"),
    pytest.param("\ud800", "", id="surrogate"),
    pytest.param({"a": {"b": "\udfff"}}, ".a.b", id="nested surrogate"),
    pytest.param({"\ud800": 1}, "", id="surrogate key"),
    pytest.param({SECRET}, "", id="set"),
    pytest.param(set(), "", id="empty set"),
    pytest.param(frozenset(), "", id="frozenset"),
    pytest.param(SECRET.encode(), "", id="bytes"),
    pytest.param(b"", "", id="empty bytes"),
    pytest.param(bytearray(), "", id="bytearray"),
    pytest.param([b""], "[0]", id="nested bytes"),
    pytest.param(dt.datetime.now(dt.UTC), "", id="datetime"),
    pytest.param(dt.timedelta(), "", id="timedelta"),
    pytest.param(dt.date.today(), "", id="date"),
    pytest.param(uuid.uuid4(), "", id="uuid"),
    pytest.param(decimal.Decimal(0), "", id="decimal"),
    pytest.param(1j, "", id="complex"),
    pytest.param(Opaque(), "", id="unknown class"),
    pytest.param({"x": LearnedFact.new("k", SECRET, "s")}, ".x", id="struct"),
    pytest.param({"a": {1: SECRET}}, ".a", id="int key"),
    pytest.param({None: SECRET}, "", id="None key"),
    pytest.param({b"k": SECRET}, "", id="bytes key"),
    pytest.param({("a",): SECRET}, "", id="tuple key"),
    pytest.param((1, 2), "", id="tuple"),
    pytest.param([1, (2,)], "[1]", id="tuple in a list"),
]


@pytest.mark.parametrize(("value", "where"), FREE)
def test_free_values_refused(value: Any, where: str) -> None:
    """What JSON can't hold is refused wherever it stands, by path, without the value in the error."""
    for refuse, path in places(value):
        with pytest.raises(SerializationError) as caught:
            refuse()
        assert caught.value.field == path + where
        assert caught.value.__context__ is None
        assert SECRET not in str(caught.value) + repr(caught.value) + str(pickle.dumps(caught.value))


def places(value: Any) -> list[tuple[Callable[[], object], str]]:
    turn = ConversationTurn.user("x").with_tool_calls([ToolCallRecord(tool_name="t", args=value)])
    asset = SessionAsset.new()
    asset.metadata["m"] = value
    other = SessionAsset.new()
    other.extra["new"] = value
    return [
        (lambda: pack(value, Any, "metadata.m"), "metadata.m"),
        (lambda: pack(turn, ConversationTurn, "history.turns[3]"), "history.turns[3].tool_calls[0].args"),
        (asset.to_json, "metadata.m"),
        (other.to_json, "new"),
    ]


TYPED: list[tuple[str, Any]] = [
    ("history.turns[0].role", 5),
    ("history.turns[0].content", None),
    ("history.turns[0].content", "\ud800"),
    ("history.turns[0].timestamp_ms", -1),
    ("history.turns[0].timestamp_ms", 2**64),
    ("history.turns[0].timestamp_ms", 1.0),
    ("history.turns[0].timestamp_ms", True),
    ("history.turns[0].tags", {"a"}),
    ("history.turns[0].tags", ["a", 1]),
    ("history.turns[0].tool_calls", None),
    ("history.turns[0].tool_calls[0].success", 1),
    ("history.turns[0]", {"role": SECRET}),
    ("history.max_turns", "many"),
    ("history", None),
    ("updated_at_ms", "x"),
    ("created_at_ms", 253_402_300_800_000),
    ("version", "1"),
    ("id", None),
    ("preferences.coding_style.indent_size", 256),
    ("preferences.coding_style", CommandGrant.one_time("x")),
    ("project_context.learned_facts[0].confidence", math.nan),
    ("project_context.learned_facts[0].confidence", math.inf),
    ("project_context.learned_facts[0].confidence", 1e39),
    ("skill_configs", {1: SkillConfig.new("s")}),
    ("skill_configs", [SECRET]),
    ("granted_commands[0].kind", SECRET),
    ("extra", None),
]


@pytest.mark.parametrize(("path", "value"), TYPED)
def test_typed_fields_refused(path: str, value: Any) -> None:
    """A field assigned with another type than its own is refused, by path."""
    asset = full_asset()
    exec(f"asset.{path} = value", {"asset": asset, "value": value})
    with pytest.raises(SerializationError) as caught:
        asset.to_json()
    field = "" if path == "extra" else path
    assert caught.value.field.startswith(field)
    assert SECRET not in str(caught.value)


def full_asset() -> SessionAsset:
    asset = SessionAsset.new()
    asset.add_turn(ConversationTurn.user("x").with_tool_calls([ToolCallRecord(tool_name="t")]))
    asset.project_context.learn(LearnedFact.new("a", "b", "c"))
    asset.save_grants([CommandGrant.one_time("x")])
    return asset


def test_wrong_trigger() -> None:
    """Something else than a trigger among triggers is refused, by path."""
    asset = SessionAsset.new()
    asset.set_skill_config("s", SkillConfig(skill_id="s", auto_trigger=AutoTriggerConfig(triggers=["x"])))  # type: ignore[list-item]
    with pytest.raises(SerializationError, match=r"skill_configs\.s\.auto_trigger\.triggers\[0\]"):
        asset.to_json()


def test_nesting() -> None:
    """serde_json reads 127 levels, the root counted; one more, and a loop, are refused by name."""
    asset = SessionAsset.new()
    turn = ConversationTurn.user("x")
    asset.add_turn(turn)
    asset.metadata["a"] = nested(125)
    turn.metadata["a"] = nested(122)
    assert SessionAsset.from_json(asset.to_json()) == asset
    asset.metadata["a"] = nested(126)
    with pytest.raises(SerializationError, match="nested deeper"):
        asset.to_json()
    turn.metadata["a"] = nested(123)
    with pytest.raises(SerializationError, match="nested deeper"):
        pack(turn, ConversationTurn, "history.turns[0]", level=4)
    for value in (a_loop(), nested(100_000)):
        with pytest.raises(SerializationError, match="nested deeper") as caught:
            pack(value, Any, "metadata.x")
        assert SECRET not in str(caught.value)


def test_str_enums_pass() -> None:
    """An enum member is stored as its value, to which it may be equal."""

    class Level(enum.StrEnum):
        HIGH = "high"

    assert msgspec.msgpack.decode(pack({"a": Level.HIGH}, Any, "x")) == {"a": "high"}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=12,
)


@given(JSON)
def test_free_values_come_back(value: Any) -> None:
    """Whatever JSON can hold comes back equal and of the same types."""
    back = msgspec.msgpack.decode(pack(value, Any, "x"))
    assert back == value
    assert repr(back) == repr(value)


KEYS = {
    "k" * 100_000: "k" * 39 + "…",
    "a\nforged: line": "a\\nforged: line",
    "\x1b[2J\u202e\u2028": "\\x1b[2J\\u202e\\u2028",
    "\n" * 100: "\\n" * 19 + "\\…",
    "someone@example.org": "someone@example.org",
    "schlüssel": "schlüssel",
}


@pytest.mark.parametrize("key", KEYS, ids=lambda key: repr(key[:10]))
def test_keys_in_errors(key: str) -> None:
    """A key is named by its escaped beginning: no error is long, or has a line that it did not write itself."""
    asset = full_asset()
    for value in ({key: math.nan}, {"a": [{key: math.nan}]}):
        asset.metadata["m"] = value
        with pytest.raises(SerializationError) as caught:
            asset.to_json()
        assert caught.value.field == ("metadata.m." if key in value else "metadata.m.a[0].") + KEYS[key]
    asset = full_asset()
    asset.extra[key] = math.nan
    with pytest.raises(SerializationError) as caught:
        asset.to_json()
    assert caught.value.field == KEYS[key]
    text = full_asset().to_json()
    with pytest.raises(CorruptSessionError) as corrupt:
        SessionAsset.from_json(text.replace("{", "{" + msgspec.json.encode(key).decode() + ": 1e999,", 1))
    assert corrupt.value.field == KEYS[key]


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(TEXT | st.text("ab", min_size=30), max_size=80))
def test_errors_are_short(path: list[str]) -> None:
    """However long the way to a value, the error's text and path end, and are on one line."""
    value: Any = math.nan
    for key in path:
        value = {key: value}
    with pytest.raises(SerializationError) as caught:
        pack({"m": value}, Any, "metadata")
    for text in (str(caught.value), caught.value.field, repr(caught.value)):
        assert len(text) <= 500
        assert text.isprintable()
    twin = pickle.loads(pickle.dumps(caught.value))
    assert (str(twin), twin.args) == (str(caught.value), caught.value.args)


def at_depth(levels: int, call: Callable[[], object]) -> object:
    return at_depth(levels - 1, call) if levels else call()


def test_a_full_stack_is_no_verdict() -> None:
    """Where the caller's stack leaves no room, it is RecursionError, and neither value nor data are called bad."""
    asset = full_asset()
    asset.metadata["a"] = nested(100)
    text = asset.to_json()
    room = sys.getrecursionlimit() - len(inspect.stack())
    outcomes = set()
    for call in (asset.to_json, lambda: SessionAsset.from_json(text), lambda: pack(asset.metadata, Any, "metadata")):
        for free in range(1, 400):
            try:
                at_depth(room - free, call)
                outcomes.add("fine")
            except RecursionError:
                outcomes.add("full")
    assert outcomes == {"fine", "full"}


def test_unset_fields() -> None:
    """A field that was deleted is named."""
    asset = full_asset()
    del asset.history.turns[0].content
    with pytest.raises(SerializationError) as caught:
        asset.to_json()
    assert caught.value.field == "history.turns[0].content"


class Interruption(Exception):
    pass


@pytest.mark.parametrize("raised", [MemoryError, KeyboardInterrupt, OSError, TimeoutError, Interruption])
def test_what_is_no_refusal_passes(raised: type[BaseException]) -> None:
    """Only what codecs raise is taken for a refusal."""

    def fail(value: object) -> None:
        raise raised

    with pytest.raises(raised):
        attempt(fail, b"")


@pytest.mark.parametrize("kind", [ValueError, TypeError, AttributeError, msgspec.ValidationError, OverflowError])
def test_what_a_handler_raises_passes(kind: type[Exception]) -> None:
    """If a signal handler raises what a codec might, it passes as it is: also out of a __post_init__."""

    class Mine(kind):  # type: ignore[misc, valid-type]
        pass

    class Slow(msgspec.Struct):
        def __post_init__(self) -> None:
            signal.raise_signal(signal.SIGUSR1)

    def handler(number: int, frame: Any) -> None:
        raise Mine

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        for call in (msgspec.json.Decoder(Slow).decode, lambda data: signal.raise_signal(signal.SIGUSR1)):
            with pytest.raises(Mine):
                attempt(call, b"{}")
        try:
            signal.raise_signal(signal.SIGUSR1)
        except Mine:  # what is being handled outside is no interruption of what is done here
            assert attempt(msgspec.json.decode, b"{")[1] is not None
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_parsing_names_the_field() -> None:
    """What can't be decoded is a CorruptSessionError with id and field, without the value."""
    good = msgspec.to_builtins(ConversationTurn.user("x"))
    for broken, field in [
        ({**good, "role": 5}, "history.turns[2].role"),
        ({k: v for k, v in good.items() if k != "tags"}, "history.turns[2].tags"),
        ({**good, "tool_calls": [{}]}, "history.turns[2].tool_calls[0].tool_name"),
        ([], "history.turns[2]"),
    ]:
        with pytest.raises(CorruptSessionError) as caught:
            parse_json(msgspec.json.encode(broken), ConversationTurn, "abc", "history.turns[2]")
        assert (caught.value.id, caught.value.field) == ("abc", field)
    for data in (b"", b"{", b'"\xff"', b"[" * 100_000):
        with pytest.raises(CorruptSessionError):
            parse_json(data, Any, "abc", "metadata")


# A history that is stored already: what is unchanged needs no check, and nothing else passes for it.

CODEC = Codec(SessionAsset, 2**30, 2**24, 1000)


def turn(n: int, text: str = "") -> ConversationTurn:
    call = ToolCallRecord(tool_name="t", args={"a": [1, 2.5, None, text]}, result="ok", duration_ms=n)
    return ConversationTurn(id=str(n), timestamp_ms=n, role="user", content=text, tool_calls=[call] * (n % 3))


def stored(asset: SessionAsset) -> Baseline:
    encoded = CODEC.encode(asset, None)
    return Baseline(b"", asset.id, 1, b"", encoded.fields, encoded.turns)


EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("remove"), st.integers(0, 40), st.integers(0, 40)),
        st.tuples(st.just("edit"), st.integers(0, 40), st.just(0)),
        st.tuples(st.just("add"), st.integers(0, 40), st.integers(1, 20)),
    ),
    max_size=4,
)


@given(st.integers(0, 40), st.sampled_from([0, 1, 200, 1 << 16]), EDITS)
def test_a_stored_history_is_encoded_as_a_new_one(count: int, block: int, edits: list[tuple[str, int, int]]) -> None:
    """However a history was changed since, and whatever is compared at once, its bytes are those of a new one."""
    asset = SessionAsset.new()
    asset.history.turns = [turn(n, "x" * (n * 7 % 50)) for n in range(count)]
    known = stored(asset)
    turns = asset.history.turns
    for kind, at, more in edits:
        if kind == "remove":
            del turns[at : at + more]
        elif kind == "add":
            turns[at:at] = [turn(100 + n) for n in range(more)]
        elif at < len(turns):
            turns[at] = turn(at, "edited")
    with mock.patch("orcs_redis.protocol.codec._BLOCK_BYTES", block):
        assert CODEC.encode(asset, known) == CODEC.encode(asset, None)


class Turn(ConversationTurn):
    pass


class Call(ToolCallRecord):
    pass


class Text(str):
    __slots__ = ()


class Number(int):
    pass


PLAIN: dict[str, Any] = {"tool_name": "t", "args": {"a": "x"}}


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        ("", Turn(id="1", timestamp_ms=1, role="user", content="", tool_calls=[ToolCallRecord(**PLAIN)]), "Turn"),
        (".id", Text("1"), "Text"),
        (".role", Text("user"), "Text"),
        (".timestamp_ms", Number(1), "Number"),
        (".timestamp_ms", True, "bool"),
        (".timestamp_ms", 1.0, "float"),
        (".content", b"", "bytes"),
        (".tool_calls", None, "None"),
        (".tool_calls[0]", Call(**PLAIN), "Call"),
        (".tool_calls[0].success", 1, "int"),
        (".tool_calls[0].tool_name", Text("t"), "Text"),
        (".tool_calls[0].args.a", Text("x"), "Text"),
    ],
)
def test_what_is_encoded_alike_is_not_unchanged(path: str, value: Any, name: str) -> None:
    """A subclass, or a value of another type that is equal to what is stored, is refused by field and class."""
    asset = SessionAsset.new()
    plain = ConversationTurn(id="1", timestamp_ms=1, role="user", content="")
    asset.history.turns = [turn(n) for n in range(5)]
    asset.history.turns.insert(3, plain.with_tool_calls([ToolCallRecord(**PLAIN)]))
    known = stored(asset)
    target = path.replace(".args.a", ".args['a']")
    exec(f"turns[3]{target} = value", {"turns": asset.history.turns, "value": value})
    for baseline in (known, None):
        with pytest.raises(SerializationError) as caught:
            CODEC.encode(asset, baseline)
        assert caught.value.field == "history.turns[3]" + path
        assert name in caught.value.reason
