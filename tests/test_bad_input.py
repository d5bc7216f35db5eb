"""What callers and other programs may do wrong: ids, values that can't be stored, what is stored but no session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from orcs_redis import (
    CompactedTurn,
    ConversationHistory,
    ConversationTurn,
    CorruptSessionError,
    InvalidIdError,
    LayoutError,
    LearnedFact,
    NotFoundError,
    SerializationError,
    SessionAsset,
    StorageError,
    StoreResetError,
    ToolCallRecord,
    VersionIncompatibleError,
)

from .conftest import ROWS, Connect, Place

PAYLOAD = "a payload that nobody else may read"

# What is found in a server is judged alike in both forms.
few = pytest.mark.parametrize("place", [ROWS[1], ROWS[2], ROWS[5]], ids=str, indirect=True)


def session(turns: int = 2, **fields: Any) -> SessionAsset:
    asset = SessionAsset(**fields)
    for n in range(turns):
        asset.add_turn(ConversationTurn.user(f"{PAYLOAD} {n}"))
    return asset


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a test does, no payload is logged, and asyncio has nothing to complain about."""
    caplog.set_level(logging.DEBUG)
    yield
    assert PAYLOAD not in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def told(error: BaseException | None) -> str:
    """All that an error and what is chained to it say."""
    if error is None:
        return ""
    return f"{error} {error!r}\n{told(error.__cause__)}{told(error.__context__)}"


async def fails(kind: type[StorageError] | tuple[type[StorageError], ...], call: Awaitable[Any]) -> Any:
    """Expect an error that quotes nothing that was to be stored or was stored."""
    with pytest.raises(kind) as caught:
        await call
    assert PAYLOAD not in told(caught.value)
    return caught.value


def content(place: Place) -> dict[bytes, object]:
    """All that the namespace's keys hold."""
    raw: Any = place.raw
    keys = raw.scan_iter(match=f"*{place.namespace}*", count=10_000)
    readers: dict[bytes, Callable[[bytes], object]] = {
        b"hash": raw.hgetall,
        b"list": lambda key: raw.lrange(key, 0, -1),
        b"zset": lambda key: raw.zrange(key, 0, -1, withscores=True),
        b"string": raw.get,
    }
    return {key: readers[raw.type(key)](key) for key in keys}


# Ids

GOOD_IDS = [
    "a", "a" * 200, "é" * 100, "{x}", "{}", "}{", "a:b", "session:turns:a", "*", "a*[b-c]?", "[", "'", '"', "`$(x)`",
    " ", " a b ", "a.b..", "-", "--help", "%s%n", "0", "-1", "nil", "😀", "日本語", "\u202eabc", "e\u0301", "\ufeff",
    "\u2028", "(1", "+inf",
]  # fmt: skip
BAD_IDS = [
    "", "a" * 300, "é" * 150, "\0", "a\0b", "a\n", "\r", "a\tb", "\x7f", "\x85", "/", "a/b", "/etc/passwd", "..", ".",
    "../a", ".hidden", "a\\b", "\ud800", "a\udfff",
]  # fmt: skip


async def test_any_text_is_an_id(place: Place, store: Any) -> None:
    """Braces, colons, globs, quotes, spaces and any script are ordinary everywhere an id is used."""
    assets = {id: session(id=id) for id in GOOD_IDS}
    for n, asset in enumerate(assets.values()):
        asset.updated_at_ms = 1_000 + n // 3  # some of equal times
        await store.save(asset)
    everything = {meta.id for meta in await store.list()}
    assert everything == set(GOOD_IDS)
    paged, cursor = [], None
    while True:
        page = await store.page(4, cursor)
        paged += [meta.id for meta in page.items]
        cursor = page.cursor
        if cursor is None:
            break
    by_time = sorted(assets.values(), key=lambda asset: (asset.updated_at_ms, asset.id.encode()), reverse=True)
    assert paged == [asset.id for asset in by_time]
    for id, asset in assets.items():
        assert await store.load(id) == asset
        await store.append(id, ConversationTurn.user("more"))
        assert [turn.content for turn in await store.turns(id, -1)] == ["more"]
        assert await store.exists(id)
    for count, id in enumerate(GOOD_IDS, 1):
        await store.delete(id)
        assert not await store.exists(id)
        assert {meta.id for meta in await store.list()} == set(GOOD_IDS[count:])


async def test_bad_ids(place: Place, store: Any) -> None:
    """What can't be an id is refused by every method, and nothing is written."""
    before = content(place)
    wrong: list[Any] = [*BAD_IDS, None, 5, b"a", ("a",)]
    for id in wrong:
        for call in (
            store.load(id),
            store.load_versioned(id),
            store.turns(id),
            store.exists(id),
            store.delete(id),
            store.append(id, ConversationTurn.user("x")),
            store.update(id, lambda asset: None),
        ):
            error = await fails(InvalidIdError, call)
            assert isinstance(error, ValueError)
        assert [type(result) for result in await store.load_many([id])] == [InvalidIdError]
        assert [type(result) for result in await store.delete_many([id])] == [InvalidIdError]
        asset = session()
        asset.id = id
        await fails(InvalidIdError, store.save(asset))
    assert content(place) == before


# Values that can't be stored


class Unknown:
    def __repr__(self) -> str:
        return PAYLOAD


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


BAD_VALUES = {
    "nan": float("nan"),
    "infinity": float("inf"),
    "minus infinity": float("-inf"),
    "2**64": 2**64,
    "-2**63-1": -(2**63) - 1,
    "huge": 10**400,
    "surrogate": f"{PAYLOAD} \ud800",
    "set": {PAYLOAD},
    "class": Unknown(),
    "type": Unknown,
    "bytes": PAYLOAD.encode(),
    "complex": 1j,
    "function": len,
    "deep": nested(5000),
}


@pytest.mark.parametrize("name", BAD_VALUES)
async def test_values_that_cannot_be_stored(place: Place, store: Any, name: str) -> None:
    """The error names the field, and nothing is written: of no new session, no known one and no turn."""
    bad = BAD_VALUES[name]
    asset = session()
    await store.save(asset)
    before = content(place)

    def in_metadata(asset: SessionAsset) -> None:
        asset.metadata["fine"] = 1
        asset.metadata["outer"] = {"inner": [0, bad]}

    def in_arguments(asset: SessionAsset) -> None:
        asset.history.turns[1].tool_calls = [ToolCallRecord(tool_name="t", args={"key": bad})]

    def in_extra(asset: SessionAsset) -> None:
        asset.extra["later"] = bad

    for spoil, field in (
        (in_metadata, "metadata.outer.inner[1]"),
        (in_arguments, "history.turns[1].tool_calls[0].args.key"),
        (in_extra, "later"),
    ):
        for spoilt in (session(), await store.load(asset.id)):
            spoil(spoilt)
            error = await fails(SerializationError, store.save(spoilt))
            assert error.field.startswith(field)
            assert field in str(error)
            (result,) = await store.save_many([spoilt])
            assert type(result) is SerializationError
        error = await fails(SerializationError, store.update(asset.id, spoil))
        assert error.field.startswith(field)
    turn = ConversationTurn.user("x")
    turn.tool_calls = [ToolCallRecord(tool_name="t", args={}, result=[bad])]
    error = await fails(SerializationError, store.append(asset.id, turn))
    assert error.field.startswith("turn.tool_calls[0].result[0]")
    error = await fails(SerializationError, store.append(asset.id, ConversationTurn.user("x"), turn))
    assert error.field.startswith("turns[1].tool_calls[0].result[0]")
    assert content(place) == before


async def test_keys_that_cannot_be_stored(place: Place, store: Any) -> None:
    """Keys of a map are text."""
    before = content(place)
    bad: list[Any] = [1, None, (1, 2), b"x", f"{PAYLOAD} \ud800"]
    for key in bad:
        asset = session()
        asset.metadata["outer"] = {key: 1}
        error = await fails(SerializationError, store.save(asset))
        assert error.field == "metadata.outer"
    assert content(place) == before


async def test_wrong_types(place: Place, store: Any) -> None:
    """A field of another type than the schema's is named; what is no asset or turn at all is refused too."""
    before = content(place)
    for field, value in (
        ("created_at_ms", -1),
        ("updated_at_ms", 2**64),
        ("updated_at_ms", None),
        ("history.compacted", None),
        ("history.turns", [5]),
        ("project_context.name", 5),
        ("metadata", [1]),
        ("granted_commands", [PAYLOAD]),
    ):
        asset = session()
        *path, last = field.split(".")
        target: Any = asset
        for name in path:
            target = getattr(target, name)
        setattr(target, last, value)
        error = await fails(SerializationError, store.save(asset))
        assert error.field.startswith(field)
    nothing: Any = {"id": "x"}
    await fails(SerializationError, store.save(nothing))
    await fails(SerializationError, store.append("x", nothing))
    assert content(place) == before


class MyTurn(ConversationTurn):
    mood: str = "fine"


class MyCall(ToolCallRecord):
    cost: int = 5

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class MyHistory(ConversationHistory):
    topic: str = "x"


class MySummary(CompactedTurn):
    words: int = 5

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class MyFact(LearnedFact):
    doubt: float = 0.5


def like_a_turn() -> Any:
    return SimpleNamespace(**msgspec.structs.asdict(ConversationTurn.user("x")))


async def test_foreign_types(place: Place, store: Any) -> None:
    """A subclass, whose fields would be dropped, and what only looks like a turn are refused: by class and field."""
    call = MyCall(tool_name="t", args={})
    plain = session()
    await store.save(plain)
    before = content(place)
    for turn, where, name in (
        (MyTurn.user("x"), "", "MyTurn"),
        (like_a_turn(), "", "SimpleNamespace"),
        (ConversationTurn.user("x").with_tool_calls([call]), ".tool_calls[0]", "MyCall"),
    ):
        error = await fails(SerializationError, store.append(plain.id, turn))
        assert error.field == "turn" + where
        assert name in error.reason
        error = await fails(SerializationError, store.append(plain.id, ConversationTurn.user("x"), turn))
        assert error.field == "turns[1]" + where

        def add(asset: SessionAsset, turn: Any = turn) -> None:
            asset.history.turns.append(turn)

        await refuse_everywhere(store, plain.id, add, f"history.turns[{len(plain.history)}]{where}", name)

    def in_place(asset: SessionAsset) -> None:  # what is stored already but for a field
        turn = ConversationTurn.user("x").with_tool_calls([ToolCallRecord(tool_name="t", args={})])
        asset.history.turns = [turn]

    def other_call(asset: SessionAsset) -> None:
        asset.history.turns[0].tool_calls[0] = call

    def other_history(asset: SessionAsset) -> None:
        asset.history = MyHistory(turns=asset.history.turns)

    def summary(asset: SessionAsset) -> None:
        asset.history.compacted = [MySummary(summary="s", turn_count=1, start_time_ms=0, end_time_ms=0)]

    def fact(asset: SessionAsset) -> None:
        asset.project_context.learned_facts = [MyFact.new("k", "v", "s")]

    await refuse_everywhere(store, plain.id, other_history, "history", "MyHistory")
    await refuse_everywhere(store, plain.id, summary, "history.compacted[0]", "MySummary")
    await refuse_everywhere(store, plain.id, fact, "project_context.learned_facts[0]", "MyFact")
    assert content(place) == before
    in_place(plain)
    await store.save(plain)
    await refuse_everywhere(store, plain.id, other_call, "history.turns[0].tool_calls[0]", "MyCall")


async def refuse_everywhere(store: Any, id: str, spoil: Callable[[SessionAsset], None], field: str, name: str) -> None:
    """Try it in an asset that was loaded, in a new one, in an update and in orcs' JSON."""
    loaded = await store.load(id)
    new = SessionAsset.from_json(loaded.to_json())
    for asset in (loaded, new):
        spoil(asset)
        errors = [await fails(SerializationError, store.save(asset))]
        with pytest.raises(SerializationError) as caught:
            asset.to_json()
        for error in (*errors, caught.value):
            assert error.field == field
            assert name in error.reason
    assert (await fails(SerializationError, store.update(id, spoil))).field == field


async def test_too_large(connect: Connect, place: Place) -> None:
    """A turn or an asset over its limit is refused before anything is sent."""
    store = await connect(max_turn_bytes=1000, max_asset_bytes=5000)
    asset = session()
    await store.save(asset)
    before = content(place)
    await fails(SerializationError, store.append(asset.id, ConversationTurn.user("x" * 1001)))
    await fails(SerializationError, store.append(asset.id, *[ConversationTurn.user("x" * 900)] * 7))
    await fails(SerializationError, store.save(session(60)))
    big = session()
    big.metadata["x"] = "x" * 5000
    await fails(SerializationError, store.save(big))
    assert content(place) == before


# What is stored, but no session

GARBAGE = {
    "empty": b"",
    "garbage": b"\xc1\xff garbage " + PAYLOAD.encode(),
    "number": b"\x05",
    "text": b"abc",
    "map": b"\x81",
}


async def spoilt_and_well(store: Any) -> tuple[SessionAsset, SessionAsset]:
    """A session that is about to be spoilt, and another."""
    spoilt, well = session(), session()
    await store.save_many([spoilt, well])
    return spoilt, well


async def others_are_well(store: Any, spoilt: SessionAsset, well: SessionAsset) -> None:
    """The other session is listed, loaded and written."""
    assert well.id in {meta.id for meta in await store.list()}
    assert well.id in {meta.id for meta in await store.list(limit=10)}
    assert well.id in {meta.id for meta in (await store.page(10)).items}
    assert (await store.load_many([well.id, spoilt.id]))[0] == well
    await store.append(well.id, ConversationTurn.user("x"))


@few
@pytest.mark.parametrize("garbage", GARBAGE)
async def test_garbage_in_a_section(place: Place, connect: Connect, garbage: str) -> None:
    """A section that is no section makes its session corrupt, by name; deleting it heals."""
    store = await connect()
    spoilt, well = await spoilt_and_well(store)
    key = place.key(f"session:{spoilt.id}")
    good: Any = place.raw.hgetall(key)
    for name in [name for name in good if not name.startswith(b".")]:
        if garbage == "number" and name in (b"version", b"created_at_ms", b"updated_at_ms"):
            continue
        place.raw.hset(key, name, GARBAGE[garbage])
        error = await fails(CorruptSessionError, store.load(spoilt.id))
        assert error.id == spoilt.id
        assert error.field.startswith(name.decode())
        place.raw.hset(key, name, good[name])
    place.raw.hset(key, "metadata", GARBAGE[garbage])
    await fails(CorruptSessionError, store.update(spoilt.id, lambda asset: None))
    await others_are_well(store, spoilt, well)
    await store.save(session(id=spoilt.id))
    assert len(await store.turns(spoilt.id)) == 2
    place.raw.hset(key, "metadata", GARBAGE[garbage])
    await store.delete(spoilt.id)
    assert not await store.exists(spoilt.id)


@few
@pytest.mark.parametrize("field", [".revision", ".turns"])
@pytest.mark.parametrize("garbage", [b"", b"x", b"-1", b"1e400", b"9" * 30, None], ids=repr)
async def test_garbage_in_the_stores_own_fields(
    place: Place, connect: Connect, field: str, garbage: bytes | None
) -> None:
    """So does garbage in what the store keeps for itself: never a foreign error, and nothing is half-written."""
    store = await connect()
    spoilt, well = await spoilt_and_well(store)
    key = place.key(f"session:{spoilt.id}")
    if garbage is None:
        place.raw.hdel(key, field)
    else:
        place.raw.hset(key, field, garbage)
    before = content(place)
    await fails(CorruptSessionError, store.load(spoilt.id))
    assert await store.exists(spoilt.id)
    for start in (0, 99):
        with contextlib.suppress(CorruptSessionError, NotFoundError):
            await store.turns(spoilt.id, start)
    await fails(CorruptSessionError, store.append(spoilt.id, ConversationTurn.user("x")))
    assert content(place) == before
    await others_are_well(store, spoilt, well)


FOREIGN: dict[str, Callable[[Any, str], object]] = {
    "string": lambda raw, key: raw.set(key, PAYLOAD),
    "list": lambda raw, key: raw.rpush(key, PAYLOAD),
    "hash": lambda raw, key: raw.hset(key, "x", PAYLOAD),
    "zset": lambda raw, key: raw.zadd(key, {PAYLOAD: 1}),
}


@few
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("part", ["session", "turns"])
async def test_foreign_data_under_a_sessions_key(place: Place, connect: Connect, part: str, kind: str) -> None:
    """Something else under a session's key makes it corrupt; deleting it heals."""
    store = await connect()
    spoilt, well = await spoilt_and_well(store)
    key = place.key(f"{part}:{spoilt.id}")
    place.raw.delete(key)
    FOREIGN[kind](place.raw, key)
    before = content(place)
    await fails(CorruptSessionError, store.load(spoilt.id))
    await fails(CorruptSessionError, store.append(spoilt.id, ConversationTurn.user("x")))
    if (part, kind) not in (("session", "hash"), ("turns", "list")):
        await fails(CorruptSessionError, store.turns(spoilt.id))
        await fails(CorruptSessionError, store.save(session(id=spoilt.id)))
    assert content(place) == before
    await others_are_well(store, spoilt, well)
    await store.delete(spoilt.id)
    assert {meta.id for meta in await store.list()} == {well.id}
    await store.save(session(id=spoilt.id), if_revision=0)
    assert (await store.load(spoilt.id)).id == spoilt.id


@few
async def test_truncated_history(place: Place, connect: Connect) -> None:
    """Turns that are missing, surplus or broken make a session corrupt: none is left out in silence."""
    store = await connect()
    spoilt, well = await spoilt_and_well(store)
    key = place.key(f"turns:{spoilt.id}")
    good: Any = place.raw.lrange(key, 0, -1)
    for bad in (good[:1], [*good, good[0]], [good[0], good[1][:-3]], [b"", good[1]], [b"\xc1", b"\x05"], []):
        place.raw.delete(key)
        if bad:
            place.raw.rpush(key, *bad)
        error = await fails(CorruptSessionError, store.load(spoilt.id))
        assert error.field.startswith("history.turns")
        if len(bad) != 2:
            await fails(CorruptSessionError, store.append(spoilt.id, ConversationTurn.user("x")))
    await fails(CorruptSessionError, store.turns(spoilt.id))
    await others_are_well(store, spoilt, well)


@few
@pytest.mark.parametrize("garbage", [b"", b"x", b"\x96\x01", b"y" * 40, b"\xc1" * 24 + PAYLOAD.encode()], ids=len)
async def test_garbage_in_the_metadata(place: Place, connect: Connect, garbage: bytes) -> None:
    """Metadata that is none leaves its session out of lists, and the others in; the session itself can be loaded."""
    store = await connect()
    spoilt, well = await spoilt_and_well(store)
    place.raw.hset(place.key("meta"), spoilt.id, garbage)
    before = content(place)
    assert [meta.id for meta in await store.list()] == [well.id]
    assert [meta.id for meta in (await store.page(10)).items] == [well.id]
    assert await store.load(spoilt.id) == spoilt
    await fails(CorruptSessionError, store.append(spoilt.id, ConversationTurn.user("x")))
    assert content(place) == before
    await store.save(session(id=spoilt.id))
    assert {meta.id for meta in await store.list()} == {spoilt.id, well.id}


@few
async def test_foreign_members_of_the_index(place: Place, connect: Connect) -> None:
    """What somebody else put into the indexes is not listed, and keeps nothing from being listed."""
    store = await connect()
    one, other = await spoilt_and_well(store)
    raw: Any = place.raw
    raw.zadd(place.key("updated"), {b"\xff\xfe": 5, b"stray": 10**15, b"": 6})
    raw.hset(place.key("meta"), b"\xff\xfe", b"\xc1")
    for metas in (await store.list(), await store.list(limit=10), (await store.page(10)).items):
        assert {meta.id for meta in metas} == {one.id, other.id}
    paged, cursor = set(), None
    for _ in range(20):
        page = await store.page(1, cursor)
        paged |= {meta.id for meta in page.items}
        if (cursor := page.cursor) is None:
            break
    assert paged == {one.id, other.id}


@few
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("part", ["state", "updated", "meta", "changes", "deleted", "deleted:meta"])
async def test_foreign_data_under_a_partitions_key(place: Place, connect: Connect, part: str, kind: str) -> None:
    """Something else under a key of the partition's own is a LayoutError, and nothing is half-written."""
    store = await connect()
    asset = session()
    await store.save(asset)
    expected = {"updated": "zset", "changes": "zset", "deleted": "zset"}.get(part, "hash")
    if kind == expected:
        return
    place.raw.delete(place.key(part))
    FOREIGN[kind](place.raw, place.key(part))
    before = content(place)
    for call in (
        store.save(session()),
        store.save(session(id=asset.id)),
        store.append(asset.id, ConversationTurn.user("x")),
        store.delete(asset.id),
    ):
        error: object = (await asyncio.gather(call, return_exceptions=True))[0]
        if isinstance(error, BaseException):  # a write that has no use for the key may succeed
            assert type(error) is LayoutError
            assert PAYLOAD not in told(error)
            assert content(place) == before
        before = content(place)
    if part in ("meta", "updated"):
        await fails(LayoutError, store.page(10))
    if part == "meta":
        await fails(LayoutError, store.list())


@few
@pytest.mark.parametrize("field", ["revision", "compacted", "incarnation"])
async def test_garbage_in_the_partitions_state(place: Place, connect: Connect, field: str) -> None:
    """A partition's state that is none stops its writes, whole, and its sessions can be read."""
    store = await connect()
    asset = session()
    await store.save(asset)
    place.raw.hset(place.key("state"), field, b"x")
    before = content(place)
    await fails((LayoutError, StoreResetError), store.save(session()))
    assert content(place) == before
    assert await store.load(asset.id) == asset


@few
@pytest.mark.parametrize("kind", ["string", "list", "zset", "hash"])
async def test_foreign_descriptor(place: Place, connect: Connect, kind: str) -> None:
    """A descriptor that is none is a LayoutError, when a store is opened."""
    FOREIGN[kind](place.raw, f"{place.namespace}:layout")
    before = content(place)
    error = await fails(LayoutError, connect())
    assert place.namespace in str(error)
    assert content(place) == before


@few
@pytest.mark.parametrize(
    "fields",
    [{"version": "3"}, {"version": "x"}, {"partitions": "0"}, {"partitions": "99999"}, {"partitions": "x"}],
    ids=str,
)
async def test_descriptor_of_another_layout(place: Place, connect: Connect, fields: dict[Any, Any]) -> None:
    """Another layout version and an impossible number of partitions are refused."""
    await connect()
    place.raw.hset(f"{place.namespace}:layout", mapping=fields)
    await fails(LayoutError, connect())


@few
async def test_version_2(place: Place, connect: Connect) -> None:
    """A session of version 2 is told apart from a corrupt one, and listed with the others."""
    store = await connect()
    spoilt, well = await spoilt_and_well(store)
    place.raw.hset(place.key(f"session:{spoilt.id}"), "version", msgspec.msgpack.encode(2))
    for call in (store.load(spoilt.id), store.append(spoilt.id, ConversationTurn.user("x"))):
        error = await fails(VersionIncompatibleError, call)
        assert (error.found, error.supported) == (2, 1)
    await others_are_well(store, spoilt, well)
