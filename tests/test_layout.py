"""What lies in Redis (docs/protocol.md), and namespaces that are not ours."""

from __future__ import annotations

import itertools
import time
from typing import Any

import msgspec
import pytest

from orcs_redis import (
    ConversationTurn,
    CorruptSessionError,
    LayoutError,
    SerializationError,
    SessionAsset,
    StoreResetError,
)
from orcs_redis.protocol.writer import Namespace

from .conftest import Connect, Place

Dump = dict[bytes, tuple[bytes, Any]]


def dump(place: Place) -> Dump:
    """Everything in the namespace."""
    found: Dump = {}
    raw: Any = place.raw
    for key in raw.scan_iter(match=f"*{place.namespace}*"):
        kind = raw.type(key)
        read = {
            b"hash": raw.hgetall,
            b"string": raw.get,
            b"list": lambda key: raw.lrange(key, 0, -1),
            b"zset": lambda key: raw.zrange(key, 0, -1, withscores=True),
        }[kind]
        found[key] = (kind, read(key))
    return found


async def test_keys_of_a_session(place: Place, store: Any) -> None:
    """A session is a hash of msgpack parts and a list of msgpack turns, in the indexes under its id."""
    raw: Any = place.raw
    asset = SessionAsset(id="s", updated_at_ms=5000, created_at_ms=4000)
    asset.add_turn(ConversationTurn.user("hello"))
    asset.updated_at_ms = 5000
    asset.metadata |= {"a": 1, "b.c": [], "labels": {"user": "u1", "a": "é"}}
    asset.project_context.root_path = "/p"
    asset.extra = {"new": 1, "with.dot": 2}
    await store.save(asset)
    fields = raw.hgetall(place.key("session:s"))
    names = {
        "version", "created_at_ms", "updated_at_ms", "history", "preferences", "project_context", "granted_commands",
        "metadata.a", "metadata.b.c", "metadata.labels", "new", "..with.dot",
    }  # fmt: skip
    marks = {".revision": b"1", ".turns": b"1", ".born": b"1", ".reshaped": b"1", ".parts": b"1"}
    assert fields.keys() == {name.encode() for name in {*names, *marks, ".op"}}
    assert {name: fields[name.encode()] for name in marks} == marks
    assert len(fields[b".op"]) == 20
    assert msgspec.msgpack.decode(fields[b"metadata.a"]) == 1
    assert msgspec.msgpack.decode(fields[b"updated_at_ms"]) == 5000
    assert set(msgspec.msgpack.decode(fields[b"history"])) == {"compacted", "max_turns"}
    (turn,) = raw.lrange(place.key("turns:s"), 0, -1)
    assert msgspec.msgpack.decode(turn)[2:] == ["user", "hello", [], [], {}]
    assert raw.zrange(place.key("updated"), 0, -1, withscores=True) == [(b"s", 5000.0)]
    assert raw.zrange(place.key("changes"), 0, -1, withscores=True) == [(b"s", 1.0)]
    assert raw.zrange(place.key("labels"), 0, -1) == [
        b"\0\0\0\0\2/ps", b"\1a\0\0\0\2\xc3\xa9s", b"\4user\0\0\0\2u1s"
    ]  # fmt: skip
    meta = raw.hget(place.key("meta"), "s")
    written_at_ms = int.from_bytes(meta[35:43])
    assert abs(written_at_ms - time.time() * 1000) < 60_000
    tail = [{"a": "é", "user": "u1"}, None, "/p"]
    assert meta == b"".join(
        (
            b"\x99\xcf" + (1).to_bytes(8) + b"\xcf" + (5000).to_bytes(8) + b"\xce" + (1).to_bytes(4),
            b"\xc4\x08" + bytes.fromhex(store.origin),
            b"\xcf" + written_at_ms.to_bytes(8) + b"\xcf" + (4000).to_bytes(8),
            *map(msgspec.msgpack.encode, tail),
        )
    )
    layout = raw.hgetall(f"{place.namespace}:layout")
    assert (layout[b"version"], layout[b"partitions"]) == (b"2", b"1")


async def test_what_a_write_moves(place: Place, store: Any) -> None:
    """Each write moves `.revision`; `.parts` moves with parts, `.reshaped` with turns that are not pushed."""
    raw: Any = place.raw
    asset = SessionAsset(id="s")
    asset.add_turn(ConversationTurn.user("x"))
    await store.save(asset)
    writes: list[Any] = [
        (store.append, ["s", ConversationTurn.user("y")], {}, ("1", "1")),
        (store.commit, ["s"], {"set": {"metadata.a": 1}}, ("1", "3")),
        (store.touch, ["s"], {}, ("1", "3")),
        (store.commit, ["s"], {"put": {"k": b"v"}}, ("1", "3")),
        (store.pop, ["s"], {}, ("6", "3")),
        (store.commit, ["s"], {"labels": {"a": "b"}}, ("6", "7")),
    ]
    for revision, (write, arguments, options, (reshaped, parts)) in enumerate(writes, 2):
        await write(*arguments, **options)
        marks = raw.hmget(place.key("session:s"), ".revision", ".born", ".reshaped", ".parts")
        assert marks == [str(revision).encode(), b"1", reshaped.encode(), parts.encode()], write


async def test_keys_of_records(place: Place, store: Any) -> None:
    """Records are a hash and the set of their keys; the last one takes both away, and so does a deletion."""
    raw: Any = place.raw
    keys = [place.key(name) for name in ("records:s", "names:s")]
    await store.save(SessionAsset(id="s"))
    await store.commit("s", put={"b": b"1", "a/1": b"\0"})
    assert raw.hgetall(keys[0]) == {b"b": b"1", b"a/1": b"\0"}
    assert raw.zrange(keys[1], 0, -1, withscores=True) == [(b"a/1", 0.0), (b"b", 0.0)]
    await store.commit("s", drop=["b", "a/*"])
    assert raw.exists(*keys) == 0
    await store.commit("s", put={"b": b"1"})
    await store.delete("s")
    assert raw.exists(*keys) == 0


async def test_a_deleted_session_leaves_a_tombstone(place: Place, store: Any) -> None:
    """After a deletion only the tombstone is left, and a session made again takes it away."""
    raw: Any = place.raw
    asset = SessionAsset(id="s")
    asset.metadata["labels"] = {"a": "b"}
    await store.save(asset)
    await store.delete("s")
    assert raw.exists(place.key("session:s"), place.key("turns:s"), place.key("labels")) == 0
    assert raw.hexists(place.key("meta"), "s") is False
    assert raw.zscore(place.key("changes"), "s") == 2.0
    assert raw.zscore(place.key("deleted"), "s") == 2.0
    await store.save(SessionAsset(id="s"))
    assert raw.zscore(place.key("changes"), "s") == 3.0
    assert raw.exists(place.key("deleted"), place.key("deleted:meta")) == 0


async def test_messages(place: Place, store: Any) -> None:
    """Every change is published as msgpack on the partition's channel of changes, and on its session's."""
    raw: Any = place.raw
    first = await store.save(SessionAsset(id="t"))
    subscription = raw.pubsub()
    own = raw.pubsub()
    for pubsub, name in ((subscription, place.channel("changes")), (own, place.channel("changes") + ":s")):
        pubsub.subscribe(name)
        assert pubsub.get_message(timeout=5)["type"] == "subscribe"
    await store.save(SessionAsset(id="other"))
    await store.save(SessionAsset(id="s", updated_at_ms=7))
    await store.append("s", ConversationTurn.user("x"))
    await store.delete("s")
    messages = [subscription.get_message(timeout=5)["data"] for _ in range(4)]
    assert [own.get_message(timeout=5)["data"] for _ in range(3)] == messages[1:]
    decoded = [msgspec.msgpack.decode(message) for message in messages]
    assert [(m[0], m[2], m[4]) for m in decoded] == [
        (first + 1, 0, "other"),
        (first + 2, 0, "s"),
        (first + 3, 0, "s"),
        (first + 4, 1, "s"),
    ]
    assert decoded[1][1] == 7
    assert {m[3].hex() for m in decoded} == {store.origin}
    subscription.close()
    own.close()


async def test_nothing_is_left_staged(place: Place, store: Any) -> None:
    """Staged turns end up in the session; a save that is refused leaves them to a timer."""
    raw: Any = place.raw
    asset = SessionAsset(id="s")
    for n in range(100):
        asset.add_turn(ConversationTurn.user(str(n)))
    await store.save(asset)
    assert not list(raw.scan_iter(match=f"*{place.namespace}*staging*"))
    assert raw.ttl(place.key("turns:s")) == -1


@pytest.mark.parametrize(
    "layout",
    [
        {"version": 1, "partitions": 1, "incarnation": "x"},
        {"version": 3, "partitions": 1, "incarnation": "x"},
        {"version": 2, "partitions": 0, "incarnation": "x"},
        {"version": 2, "partitions": 1},
        {"version": "one", "partitions": 1, "incarnation": "x"},
        {"something": "else"},
        "a string",
    ],
    ids=str,
)
async def test_foreign_layouts_are_not_touched(place: Place, connect: Connect, layout: Any) -> None:
    """A descriptor that is not ours is an error, and everything stays as it was."""
    key = f"{place.namespace}:layout"
    if isinstance(layout, str):
        place.raw.set(key, layout)
    else:
        place.raw.hset(key, mapping=layout)
    before = dump(place)
    with pytest.raises(LayoutError):
        await connect()
    assert dump(place) == before


async def test_another_number_of_partitions(place: Place, connect: Connect) -> None:
    """The number of partitions is fixed when the namespace is created."""
    for id in ("s", "t"):
        store = await connect(partitions=3)
        await store.save(SessionAsset(id=id))
    before = dump(place)
    with pytest.raises(LayoutError, match="3 partitions, not 4"):
        await connect(partitions=4)
    assert dump(place) == before


async def test_a_lost_descriptor(place: Place, connect: Connect) -> None:
    """Data without a descriptor is not taken for a new namespace."""
    store = await connect()
    await store.save(SessionAsset(id="s"))
    place.raw.delete(f"{place.namespace}:layout")
    before = dump(place)
    with pytest.raises(LayoutError, match="descriptor"):
        await connect()
    assert dump(place) == before


async def test_a_wiped_namespace(place: Place, connect: Connect) -> None:
    """A store whose namespace was wiped, and perhaps made anew, writes nothing into it."""
    store = await connect()
    asset = SessionAsset(id="s")
    await store.save(asset)
    asset.metadata["a"] = 1  # without a change nothing would be written
    place.raw.delete(*dump(place))
    for call in (store.save(asset), store.append("s", ConversationTurn.user("x")), store.delete("s")):
        with pytest.raises(StoreResetError):
            await call
    assert dump(place) == {}
    other = await connect()
    with pytest.raises(StoreResetError):
        await store.save(asset)
    assert await other.list() == []
    assert await other.save(asset) == 1


async def test_data_that_went_back(place: Place, connect: Connect) -> None:
    """A store that has seen a later revision than the partition has refuses to write."""
    store = await connect()
    await store.save(SessionAsset(id="s"))
    await store.save(SessionAsset(id="t"))
    place.raw.hset(place.key("state"), "revision", 1)
    before = dump(place)
    with pytest.raises(StoreResetError, match="went back"):
        await store.append("s", ConversationTurn.user("x"))
    assert dump(place) == before


FOREIGN = {
    "hash gone string": lambda raw, key: (raw.delete(key("session:s")), raw.set(key("session:s"), "x")),
    "turns gone string": lambda raw, key: (raw.delete(key("turns:s")), raw.set(key("turns:s"), "x")),
    "foreign hash": lambda raw, key: (raw.delete(key("session:s")), raw.hset(key("session:s"), "a", "b")),
    "turns evicted": lambda raw, key: raw.delete(key("turns:s")),
    "a turn too many": lambda raw, key: raw.rpush(key("turns:s"), raw.lindex(key("turns:s"), 0)),
}


@pytest.mark.parametrize("harm", FOREIGN.values(), ids=FOREIGN)
async def test_a_harmed_session(place: Place, store: Any, harm: Any) -> None:
    """A session whose keys were harmed says so to readers and to appends, is listed, and can be deleted."""
    for id in ("s", "other"):
        asset = SessionAsset(id=id)
        asset.add_turn(ConversationTurn.user("x"))
        await store.save(asset)
    harm(place.raw, place.key)
    before = dump(place)
    with pytest.raises(CorruptSessionError) as caught:
        await store.load("s")
    assert caught.value.id == "s"
    for call in (store.append("s", ConversationTurn.user("y")), store.fork("s", "new")):
        with pytest.raises(CorruptSessionError) as caught:
            await call
        assert caught.value.id == "s"
    assert dump(place) == before
    assert {meta.id for meta in await store.list()} == {"s", "other"}
    assert len((await store.load("other")).history) == 1
    await store.delete("s")
    assert [meta.id for meta in await store.list()] == ["other"]
    assert not place.raw.exists(place.key("session:s"), place.key("turns:s"))
    asset = SessionAsset(id="s")
    await store.save(asset)
    assert await store.load("s") == asset


@pytest.mark.parametrize(
    ("part", "data"),
    [
        ("metadata.a", b"\xc1"),
        ("metadata.a", b""),
        ("metadata.a", b"\x81\xa1"),
        ("component_snapshots.a", msgspec.msgpack.encode([1])),
        ("history", b"\x80"),
        ("preferences", msgspec.msgpack.encode({"coding_style": 1})),
        ("version", b"\xa1x"),
        ("created_at_ms", msgspec.msgpack.encode(-1)),
        ("skill_configs.a", b"\x81\xa1\xff\x80"),
        ("unknown", b"\xc1"),
    ],
)
async def test_garbage_in_a_part(place: Place, store: Any, part: str, data: bytes) -> None:
    """A part that can't be decoded is named, without what is in it."""
    await store.save(SessionAsset(id="s"))
    place.raw.hset(place.key("session:s"), part, data)
    with pytest.raises(CorruptSessionError) as caught:
        await store.load("s")
    assert caught.value.field == part
    assert len(await store.list()) == 1


@pytest.mark.parametrize("section", ["preferences", "history", "version", ".revision", "created_at_ms"])
async def test_a_missing_part(place: Place, store: Any, section: str) -> None:
    """A part that a session must have is missed."""
    await store.save(SessionAsset(id="s"))
    place.raw.hdel(place.key("session:s"), section)
    with pytest.raises(CorruptSessionError, match=section):
        await store.load("s")


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", msgspec.msgpack.encode("x"), b"\x81\xa7content\xa1"])
async def test_garbage_in_a_turn(place: Place, store: Any, data: bytes) -> None:
    """A turn that can't be decoded is named by its index."""
    asset = SessionAsset(id="s")
    for n in range(3):
        asset.add_turn(ConversationTurn.user(str(n)))
    await store.save(asset)
    raw: Any = place.raw
    raw.lset(place.key("turns:s"), 1, data)
    with pytest.raises(CorruptSessionError) as caught:
        await store.load("s")
    assert caught.value.field == "history.turns[1]"
    with pytest.raises(CorruptSessionError):
        await store.turns("s")
    assert len(await store.turns("s", 2)) == 1


@pytest.mark.parametrize("key", ["state", "meta", "updated", "changes", "deleted", "deleted:meta", "labels"])
async def test_a_foreign_partition_key(place: Place, store: Any, key: str) -> None:
    """A partition's own key of a foreign type is an error, and nothing is written."""
    asset = SessionAsset(id="s", updated_at_ms=1)
    await store.save(asset)
    place.raw.delete(place.key(key))
    place.raw.set(place.key(key), "x")
    before = dump(place)
    writes = [store.delete("s"), store.save(SessionAsset(id="new"))]
    if key == "labels":
        writes += [store.commit("s", labels={"a": "b"}), store.fork("s", "new")]
    elif not key.startswith("deleted"):
        writes += [store.append("s", ConversationTurn.user("x")), store.save(SessionAsset(id="s"))]
    for write in writes:
        with pytest.raises(LayoutError):
            await write
    assert dump(place) == before


@pytest.mark.parametrize("field", [".revision", ".turns"])
async def test_harmed_bookkeeping(place: Place, store: Any, field: str) -> None:
    """What the store keeps beside the sections may be harmed too: a StorageError, and a way out."""
    await store.save(SessionAsset(id="s"))
    place.raw.hset(place.key("session:s"), field, "abc")
    before = dump(place)
    with pytest.raises(CorruptSessionError):
        await store.append("s", ConversationTurn.user("x"))
    with pytest.raises(CorruptSessionError):
        await store.load("s")
    if field == ".turns":
        with pytest.raises(CorruptSessionError):
            await store.turns("s")
    assert dump(place) == before
    await store.delete("s")
    assert await store.list() == []


@pytest.mark.parametrize("name", ["created_at_ms", "updated_at_ms"])
async def test_times_that_no_list_shows(place: Place, store: Any, name: str) -> None:
    """A commit refuses a time after the year 9999, as a save does: the session would be missing in lists."""
    await store.save(SessionAsset(id="s"))
    before = dump(place)
    with pytest.raises(SerializationError, match="9999"):
        await store.commit("s", set={name: 253_402_300_800_000})
    assert dump(place) == before
    await store.commit("s", set={name: 253_402_300_799_999})
    assert [meta.id for meta in await store.list()] == ["s"]


@pytest.mark.parametrize("field", [".born", ".reshaped"])
async def test_harmed_marks(place: Place, store: Any, field: str) -> None:
    """Without the marks of what has changed nothing can be merged: an error, and nothing is written."""
    asset = SessionAsset(id="s")
    await store.save(asset)
    await store.touch("s")
    place.raw.hset(place.key("session:s"), field, "abc")
    before = dump(place)
    asset.metadata["a"] = 1
    for call in (store.refresh(asset), store.save(asset)):
        with pytest.raises(CorruptSessionError):
            await call
    assert dump(place) == before
    assert (await store.load("s")).metadata == {}


async def test_many_unknown_fields(connect: Connect) -> None:
    """As many top-level fields as are allowed come and go; one more is refused before anything is sent."""
    store = await connect(max_fields=3500)
    asset = SessionAsset(id="s")
    asset.extra = {f"x{n}": n for n in range(3400)}
    await store.save(asset)
    assert await store.load("s") == asset
    asset.extra = {}
    await store.save(asset)
    assert await store.load("s") == asset
    asset.extra = {f"x{n}": n for n in range(3500)}
    with pytest.raises(SerializationError, match="3500"):
        await store.save(asset)


def test_operation_ids_never_repeat() -> None:
    """When an epoch's counter of 32 bits comes to its end, another epoch begins; so it does when it is asked for."""
    namespace = Namespace("orcs", 1, b"x")
    (partition,) = namespace.keyspace.partitions
    first = namespace.begin(partition)
    namespace.end(first)
    first.window.counters = itertools.count(2**32 - 16)
    last, renewed = namespace.begin(partition), namespace.begin(partition)
    namespace.begin_epoch()
    again = namespace.begin(partition)
    ids = [token.operation_id for token in (first, last, renewed, again)]
    assert [len(id) for id in ids] == [20] * 4
    assert len({id[:8] for id in ids}) == 1
    assert ids[0][:12] == ids[1][:12]
    assert len({id[:12] for id in ids}) == 3
    assert [id[12:16] for id in ids] == [b"\0\0\0\1", b"\xff\xff\xff\xf0", b"\0\0\0\1", b"\0\0\0\1"]


def test_clones_have_other_ids() -> None:
    """A process that was cloned counts as its twin does, and no write of one has the id of one of the other."""
    namespaces = [Namespace("orcs", 1, b"x") for _ in range(2)]
    windows = {namespace._windows[0] for namespace in namespaces}
    for window in windows:
        window.writer = bytes(12)
    ids = {
        namespace.begin(namespace.keyspace.partitions[0]).operation_id for _ in range(50) for namespace in namespaces
    }
    assert len(ids) == 100


def test_windows() -> None:
    """The low-water mark is the lowest unfinished counter; what one write holds back is bounded by a new window."""
    namespace = Namespace("orcs", 2, b"x")
    one, two = namespace.keyspace.partitions
    hanging, beside = namespace.begin(one), namespace.begin(two)
    for _ in range(1023):
        token = namespace.begin(one)
        assert token.low_water_mark == hanging.counter == 1
        namespace.end(token)
        namespace.end(token)
    assert token.window is hanging.window is not beside.window
    assert (beside.counter, beside.low_water_mark) == (1, 1)
    token = namespace.begin(one)
    assert token.counter == token.low_water_mark == 1
    assert token.window is not hanging.window
    namespace.end(token)
    token, later = namespace.begin(one), namespace.begin(one)
    namespace.end(token)
    assert (later.counter, later.low_water_mark, namespace.begin(one).low_water_mark) == (3, 2, 3)


def test_windows_are_closed() -> None:
    """A retired window is named by the next writes once nothing of it is under way, until one was applied."""
    namespace = Namespace("orcs", 1, b"x")
    (partition,) = namespace.keyspace.partitions
    hanging = namespace.begin(partition)
    namespace.begin_epoch()
    assert namespace.begin(partition).barred == []
    namespace.end(hanging)
    first, second = namespace.begin(partition), namespace.begin(partition)
    assert first.barred == second.barred == [(hanging.window, 2**32 - 1, 0)]
    namespace.acknowledge(partition, first)
    assert list(namespace.begin(partition).barred) == []


def test_what_is_given_up_is_barred() -> None:
    """A write that ended without an answer while an older one goes on is named by the next ones, until it is known."""
    namespace = Namespace("orcs", 1, b"x")
    (partition,) = namespace.keyspace.partitions
    older, lost, answered = (namespace.begin(partition) for _ in range(3))
    namespace.end(answered)
    namespace.end(lost, answered=False)
    first, second = namespace.begin(partition), namespace.begin(partition)
    assert first.barred == second.barred == [(lost.window, lost.counter, lost.nonce)]
    namespace.acknowledge(partition, first)
    assert namespace.begin(partition).barred == ()
    lost = namespace.begin(partition)
    namespace.end(lost, answered=False)
    namespace.begin_epoch()
    assert namespace.begin(partition).barred == [(lost.window, lost.counter, lost.nonce)]
    for token in (older, first, second):
        namespace.end(token)
    del token
    assert namespace.begin(partition).barred == [(lost.window, 2**32 - 1, 0)]


def test_a_low_water_mark_bars_once_it_is_acknowledged() -> None:
    """What was given up is named after a renewal, if the write whose low-water mark is above it hangs."""
    namespace = Namespace("orcs", 1, b"x")
    (partition,) = namespace.keyspace.partitions
    lost = namespace.begin(partition)
    namespace.end(lost, answered=False)
    hanging, applied = namespace.begin(partition), namespace.begin(partition)
    assert hanging.barred == applied.barred == []
    namespace.begin_epoch()
    assert namespace.begin(partition).barred == [(lost.window, lost.counter, lost.nonce)]
    namespace.acknowledge(partition, applied)
    assert namespace.begin(partition).barred == []


def test_a_lost_token_ends() -> None:
    """A write whose maker was interrupted before it could keep the token holds nothing back."""
    namespace = Namespace("orcs", 1, b"x")
    (partition,) = namespace.keyspace.partitions
    token = namespace.begin(partition)
    lost = {token.counter: token.nonce}
    del token
    later = namespace.begin(partition)
    assert later.low_water_mark == later.counter == 2
    assert later.window.given_up == lost
