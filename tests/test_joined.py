"""Several writes in one call of the writing script: each has the outcome that it would have had alone."""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import hiredis
import msgspec
import pytest

from orcs_redis import ConversationTurn, RedisSessionStore, SessionAsset, StoreFullError, scripts
from orcs_redis.protocol.codec import Codec
from orcs_redis.protocol.commands import Batch, CallPrefix, Command, ScriptCall, batches, merge
from orcs_redis.protocol.saving import Saving
from orcs_redis.protocol.sessions import Sessions
from orcs_redis.protocol.writer import Namespace
from orcs_redis.protocol.writes import Write

from .conftest import Place, Server, every_server
from .test_layout import dump

PREFIX = CallPrefix("EVALSHA", b"digest", ("state",), ("incarnation",))


class Writer:
    """Makes writes by hand, and sends as many as it is told in one call."""

    def __init__(self, place: Place) -> None:
        self._raw: Any = place.raw
        incarnation: Any = self._raw.hget(f"{place.namespace}:layout", "incarnation")
        self.namespace = Namespace(place.namespace, 1, incarnation)
        codec = Codec(SessionAsset, 2**27, 2**24, 1000)
        self._operations, self._saving = Sessions(self.namespace, codec), Saving(self.namespace, codec)

    def append(self, id: str, *contents: str, if_revision: int | None = None) -> Write:
        return self._operations.append(id, [ConversationTurn.user(text) for text in contents], if_revision, None)

    def save(self, id: str, *contents: str, if_revision: int | None = None) -> Write:
        asset = SessionAsset(id=id)
        for text in contents:
            asset.add_turn(ConversationTurn.user(text))
        write = next(self._saving.save(asset, if_revision))
        assert isinstance(write, Write)
        return write

    def delete(self, id: str, if_revision: int | None = None) -> Write:
        return self._operations.delete(id, if_revision, None)

    def send(self, *writes: Write) -> list[Any]:
        """Return an outcome for each: the script's answer, without times."""
        calls = []
        for write in writes:
            (call,) = write.commands()
            assert isinstance(call, ScriptCall)
            calls.append(call)
        _, _, *rest = merge(calls)
        outcomes = self._raw.execute_command("EVAL", scripts.WRITE.source, *rest)
        for outcome in outcomes:
            if outcome[0] in (b"OK", b"FORGOTTEN"):
                self.namespace.observe(self.namespace.keyspace.partitions[0], outcome[1])
        return [outcome[:2] for outcome in outcomes]


def contents(place: Place, id: str) -> list[str]:
    raw: Any = place.raw
    return [msgspec.msgpack.decode(data)[3] for data in raw.lrange(place.key(f"turns:{id}"), 0, -1)]


@pytest.fixture
async def writer(place: Place, store: Any) -> Writer:
    await store.save_many([SessionAsset(id=id) for id in ("a", "b", "gone")])
    return Writer(place)


async def test_each_has_its_own_outcome(place: Place, store: Any, writer: Writer) -> None:
    """What is refused stands beside what is done, and each write finds what those before it left."""
    assert writer.send(
        writer.append("a", "1"),
        writer.append("absent", "x"),
        writer.append("a", "2", if_revision=1),
        writer.append("a", "2", if_revision=4),
        writer.save("new", "first"),
        writer.append("new", "second", "third"),
        writer.save("new", if_revision=0),
        writer.delete("gone"),
        writer.append("gone", "x"),
        writer.save("gone", "again"),
        writer.delete("b", if_revision=9),
        writer.append("b", "1"),
    ) == [
        [b"OK", 4],
        [b"NOTFOUND"],
        [b"CONFLICT", 4],
        [b"OK", 5],
        [b"OK", 6],
        [b"OK", 7],
        [b"CONFLICT", 7],
        [b"OK", 8],
        [b"NOTFOUND"],
        [b"OK", 9],
        [b"CONFLICT", 2],
        [b"OK", 10],
    ]
    for id, expected, revision in (
        ("a", ["1", "2"], 5),
        ("new", ["first", "second", "third"], 7),
        ("gone", ["again"], 9),
        ("b", ["1"], 10),
    ):
        asset, found = await store.load_versioned(id)
        assert ([turn.content for turn in asset.history.turns], found) == (expected, revision)
    metas = {meta.id: (meta.revision, meta.turn_count, meta.updated_at) for meta in await store.list()}
    assert {id: seen[:2] for id, seen in metas.items()} == {"a": (5, 2), "new": (7, 3), "gone": (9, 1), "b": (10, 1)}
    assert [metas[id][2] for id in metas] == [(await store.load(id)).updated_at for id in metas]
    changes = [(change.id, change.revision) for change in await store.changes()]
    assert changes == [("a", 5), ("new", 7), ("gone", 9), ("b", 10)]


async def test_as_if_one_after_the_other(place: Place, store: Any, writer: Writer) -> None:
    """Many appends to one session in one call, and nobody can tell: turns, revisions, messages, memory."""
    raw: Any = place.raw
    subscription = raw.pubsub()
    subscription.subscribe(place.channel("changes"))
    assert subscription.get_message(timeout=5)["type"] == "subscribe"
    writes = [writer.append("a" if n % 3 else "b", str(n)) for n in range(150)]
    assert writer.send(*writes) == [[b"OK", 4 + n] for n in range(150)]
    assert contents(place, "a") == [str(n) for n in range(150) if n % 3]
    assert contents(place, "b") == [str(n) for n in range(150) if not n % 3]
    told = [msgspec.msgpack.decode(subscription.get_message(timeout=5)["data"]) for _ in writes]
    assert [(message[0], message[4]) for message in told] == [(4 + n, "a" if n % 3 else "b") for n in range(150)]
    subscription.close()
    before = dump(place)
    assert writer.send(*reversed(writes)) == [[b"OK", 153 - n] for n in range(150)]
    assert dump(place) == before
    assert await store.append("a", ConversationTurn.user("after")) == 154


async def test_sent_twice_in_one_call(place: Place, writer: Writer) -> None:
    """A write that is in a call twice, or comes again in another call, is applied once."""
    append, save, delete = writer.append("a", "once"), writer.save("s", "once"), writer.delete("gone")
    first = [[b"OK", 4], [b"OK", 5], [b"OK", 6]]
    assert writer.send(append, append, save, save, delete, delete) == [answer for answer in first for _ in range(2)]
    assert writer.send(delete, writer.append("a", "more"), append, save) == [first[2], [b"OK", 7], *first[:2]]
    assert (contents(place, "a"), contents(place, "s")) == (["once", "more"], ["once"])


async def test_one_is_corrupt(place: Place, writer: Writer) -> None:
    """A session that is harmed is told of, and keeps nobody from theirs."""
    raw: Any = place.raw
    raw.hset(place.key("session:b"), ".turns", 7)
    raw.delete(place.key("session:gone"))
    raw.rpush(place.key("session:gone"), "x")
    assert writer.send(
        writer.append("a", "1"), writer.append("b", "x"), writer.append("gone", "x"), writer.append("a", "2")
    ) == [[b"OK", 4], [b"CORRUPT", b"history.turns"], [b"CORRUPT", b"session"], [b"OK", 5]]
    assert contents(place, "a") == ["1", "2"]


@pytest.mark.parametrize("name", ["state", "updated", "meta", "changes", "deleted", "deleted:meta", "labels"])
async def test_foreign_index(place: Place, writer: Writer, name: str) -> None:
    """A key of the partition that has another type: nothing of the call is done, the index that came first neither."""
    raw: Any = place.raw
    raw.delete(place.key(name))
    raw.set(place.key(name), "foreign")
    before = dump(place)
    writes = [writer.append("a", "1"), writer.save("new", "1"), writer.append("a", "2"), writer.delete("gone")]
    if name.startswith(("deleted", "labels")):
        writes = writes[1:2] + writes[3:]  # the others don't need it
    for _ in range(2):
        assert writer.send(*writes) == [[b"LAYOUT", name.encode()]] * len(writes)
        assert dump(place) == before


@every_server
async def test_full_server(start_server: Callable[..., Server]) -> None:
    """What a full server refuses is each write's own error, and a deletion among them is done."""
    server = start_server("--maxmemory-policy", "noeviction")
    raw: Any = server.raw()
    store = await RedisSessionStore.connect(server.url)
    await store.save_many([SessionAsset(id=id) for id in "abc"])
    raw.config_set("maxmemory", 1)
    turn = ConversationTurn.user("x")
    outcomes = await asyncio.gather(
        store.ping(), store.append("a", turn), store.append("b", turn), store.delete("c"), store.append("a", turn),
        return_exceptions=True,
    )  # fmt: skip
    assert [type(outcome) for outcome in outcomes[1:3]] == [StoreFullError, StoreFullError]
    assert (outcomes[3], await store.exists("c")) == (None, False)
    raw.config_set("maxmemory", 0)
    done = [outcomes[4]] if isinstance(outcomes[4], int) else []  # what comes after a change is let through
    assert len(await store.turns("a")) == len(done)
    assert await store.append("a", turn) == 5 + len(done)
    await store.aclose()


async def test_cancelled_among_others(start_server: Callable[..., Server]) -> None:
    """Of callers whose writes went out as one, those that are cancelled take nothing from the rest."""
    server = start_server()
    raw: Any = server.raw()
    store = await RedisSessionStore.connect(server.url)
    await store.save_many([SessionAsset(id=str(n)) for n in range(60)])
    calls = raw.info("commandstats")["cmdstat_evalsha"]["calls"]
    tasks = [asyncio.create_task(store.append(str(n), ConversationTurn.user(str(n)))) for n in range(60)]
    await asyncio.sleep(0)
    for n in range(0, 60, 3):
        tasks[n].cancel()
    revisions = await asyncio.gather(*tasks, return_exceptions=True)
    assert raw.info("commandstats")["cmdstat_evalsha"]["calls"] - calls < 10
    for n, revision in enumerate(revisions):
        asset, found = await store.load_versioned(str(n))
        if n % 3:
            assert (revision, [turn.content for turn in asset.history.turns]) == (found, [str(n)])
        else:
            assert isinstance(revision, asyncio.CancelledError)
            assert len(asset.history.turns) <= 1
    await store.aclose()


def test_how_many_go_together() -> None:
    """Calls that follow one another go out as one: of one prefix, 16 at most, and not too many bytes."""
    small, other = ScriptCall(PREFIX, ["k"], [b"x"]), ScriptCall(PREFIX._replace(script=b"text"), ["k"], [b"x"])
    large = ScriptCall(PREFIX, ["k"], [b"x" * 40_000])

    def runs(*commands: Command) -> list[Any]:
        return [list(batch.commands) for batch in batches(commands)]

    assert runs() == []
    assert runs(*[small] * 40) == [[small] * 16, [small] * 16, [small] * 8]
    assert runs(small, small, other, small) == [[small, small], [other], [small]]
    assert runs(small, ("PING",), ("PING",), small) == [[small], [("PING",)], [("PING",)], [small]]
    assert runs(large, large, small) == [[large], [large, small]]
    assert merge([small, ScriptCall(PREFIX, ["k", "l"], [b"y", 2])]) == (
        "EVALSHA", b"digest", b"4", "state", "k", "k", "l", "incarnation", b"x", b"y", 2,
    )  # fmt: skip


def test_what_each_is_told() -> None:
    """Each caller gets an array of its own item; an error of the whole is everyone's."""
    calls = [ScriptCall(PREFIX, ["k"], [b"x"])] * 2
    error = hiredis.ReplyError("ERR")
    assert Batch(calls).split([1, 2]) == [[1], [2]]
    assert Batch(calls).split(error) == [error, error]
    assert Batch(calls).split([1, 2, 3]) == [None, None]  # nobody's
    assert Batch(calls[:1]).split([1]) == [[1]]


# So that tombstones, or windows, overflow after a few writes.
FEW_TOMBSTONES, FEW_WINDOWS = (
    re.sub(b"(?m)^ *local %b = \\d+" % name, b"local %b = 4" % name, scripts.WRITE.source)
    for name in (b"MAX_TOMBSTONES", b"MAX_WINDOWS")
)
IDS = ("a", "b", "c")


class Twin:
    """A namespace in which the same operations, with the same ids, are sent in other calls."""

    def __init__(self, raw: Any, name: str) -> None:
        self._raw = raw
        self._namespace = Namespace(name, 1, b"same")
        self._partition = self._namespace.keyspace.partitions[0]
        raw.hset(
            self._partition.state,
            mapping={"incarnation": "same", "revision": 0, "compacted": 0, "forgotten": 0, "dedup_bytes": 0},
        )

    def call(self, operation: Operation) -> ScriptCall:
        partition, id, letters = self._partition, operation.id, [letter for letter, _ in operation.groups]
        keys = [partition.session(id), partition.turns(id)]
        if "l" in letters:
            keys.append(partition.lease(id))
        if "S" in letters:
            keys.append(partition.staging(operation.token.hex()))
            self._raw.rpush(keys[-1], *(turn(f"staged {n}") for n in range(operation.staged)))
        if operation.kind != "w" or {*letters} & {*"PNDR"}:
            keys += [partition.records(id), partition.names(id)]
        if operation.source:
            source = operation.source
            keys += [
                partition.session(source), partition.turns(source), partition.records(source), partition.names(source)
            ]  # fmt: skip
        arguments = [argument for _, group in operation.groups for argument in group]
        what = b"".join(letter.encode() + len(group).to_bytes(4) for letter, group in operation.groups)
        header = len(arguments).to_bytes(4) + len(keys).to_bytes() + operation.token + operation.kind.encode() + what
        return ScriptCall(self._namespace.prefixes[0][0], keys, [header, *arguments])

    def send(self, calls: list[ScriptCall], script: bytes = FEW_TOMBSTONES) -> list[Any]:
        _, _, *rest = merge(calls)
        outcomes = self._raw.execute_command("EVAL", script, *rest)
        # What is forgotten is told with a revision that is surely there: not one that is yet to be written.
        return [
            outcome[:1] if outcome[0] == b"FORGOTTEN" else outcome[:2] + outcome[3:] if outcome[0] == b"OK" else outcome
            for outcome in outcomes
        ]

    def harm(self, id: str, how: str) -> None:
        match how:
            case "evicted":
                self._raw.delete(self._partition.session(id))
            case "turns":
                self._raw.delete(self._partition.turns(id))
            case "revision":
                self._raw.hset(self._partition.session(id), ".revision", "x")
            case "records":
                self._raw.delete(self._partition.records(id))
                self._raw.set(self._partition.records(id), "foreign")

    def turns(self, id: str) -> list[bytes]:
        return cast(list[bytes], self._raw.lrange(self._partition.turns(id), 0, -1))

    def field(self, id: str, name: str) -> bytes:
        """Return what is stored in a field of a session; nothing if it is absent."""
        return self._raw.hget(self._partition.session(id), name) or b""

    def content(self) -> dict[bytes, Any]:
        """Everything there is, without times and names of keys that go."""
        found: dict[bytes, Any] = {}
        prefix = self._partition.prefix
        for key in self._raw.scan_iter(match=f"{prefix}*", count=1000):
            name = key.removeprefix(prefix.encode())
            match self._raw.type(key):
                case b"list":
                    found[name] = self._raw.lrange(key, 0, -1)
                case b"zset":
                    found[name] = dict(self._raw.zrange(key, 0, -1, withscores=True))
                case b"hash":
                    found[name] = self._raw.hgetall(key)
        found[b"updated"] = set(found.get(b"updated", ()))
        for id, packed in found.get(b"meta", {}).items():
            found[b"meta"][id] = packed[:11] + packed[19:35] + packed[52:]
        for id, packed in found.get(b"deleted:meta", {}).items():
            found[b"deleted:meta"][id] = packed[8:]
        for name, fields in found.items():
            if name.startswith(b"session:"):
                fields.pop(b"updated_at_ms", None)
                fields.pop(b"created_at_ms", None)
        return found


class Operation(NamedTuple):
    """What one call of the writing script is to do."""

    kind: str
    id: str
    token: bytes
    groups: list[tuple[str, list[Any]]]
    staged: int = 0
    source: str = ""


def turn(id: str, content: str = "") -> bytes:
    return msgspec.msgpack.encode([id, 0, "user", content, [], [], {}])


class Chance:
    """Makes operations of any kind, by any writer, more or less up to date."""

    def __init__(self, rng: random.Random, stored: Twin) -> None:
        self.rng, self._stored = rng, stored
        self._writers = [rng.randbytes(12) for _ in range(7)]
        self._turns = 0

    def operation(self, number: int, revision: int) -> Operation:
        rng = self.rng
        seen = max(0, revision - rng.choice([0, 0, 0, 1, 5, 30]))
        low_water_mark = max(0, number - rng.choice([0, 3, 10]))
        writer = rng.choice(self._writers)
        token = writer + number.to_bytes(4) + bytes(4) + seen.to_bytes(8) + low_water_mark.to_bytes(4)
        kind, id = rng.choices(["w", "d", "f"], [12, 1, 2])[0], rng.choice(IDS)
        source = rng.choice([other for other in IDS if other != id]) if kind == "f" else ""
        groups, staged = self._conditions(kind, source or id, revision), 0
        if kind == "f":
            groups += [("q", [rng.randrange(4)])] * rng.randrange(2) + [("O", [])] * rng.randrange(2)
        elif kind == "w":
            whole = rng.random() < 0.2
            changes = self._whole(number) if whole else self._changes(id, number)
            if whole or (rng.random() < 0.1 and not {"z", "q", "x", "p"} & {letter for letter, _ in changes}):
                staged = rng.choice([0, 1, 3])
                history = [("S", [staged])] if staged else [("h", self._new_turns(2))]
                changes += history
            groups += changes if whole else self._based(id, revision, changes)
        if rng.random() < 0.1:
            barred = rng.choice(self._writers)[8:] + rng.randrange(number + 4).to_bytes(4) + bytes(4)
            groups.append(("b", [barred]))
        return Operation(kind, id, token, groups, staged, source)

    def _conditions(self, kind: str, id: str, revision: int) -> list[tuple[str, list[Any]]]:
        rng, groups = self.rng, list[tuple[str, list[Any]]]()
        current = self._stored.field(id, ".revision")
        if rng.random() < 0.15:
            groups.append(("l", [rng.choice(["7", "7", "8"])]))
        if rng.random() < 0.3:
            expected = rng.choice([b"0", b"%d" % revision, current or b"0", current or b"0"])
            maker = b":" + self._stored.field(id, ".op") if kind != "f" and rng.random() < 0.3 else b""
            groups.append(("r", [expected + maker]))
        if kind == "w" and rng.random() < 0.1:
            last = self._stored.turns(id)[-1:] or [turn("none")]
            groups.append(("i", [msgspec.msgpack.encode(msgspec.msgpack.decode(last[0])[0])]))
        return groups

    def _based(self, id: str, revision: int, changes: list[tuple[str, list[Any]]]) -> list[tuple[str, list[Any]]]:
        """Say what the changes were made from, more or less as it is."""
        rng = self.rng
        if rng.random() < 0.5:
            return changes
        found = self._stored.field(id, ".revision")
        current = int(found) if found.isdigit() else 0
        base = rng.choice([current, max(current - 1, 0), max(revision - 5, 0), 0])
        count = max(len(self._stored.turns(id)) - rng.choice([0, 0, 1, 2]), 0)
        groups: list[tuple[str, list[Any]]] = [("g", [b"%d" % base, count])]
        named = dict(changes)
        names = [*named.get("s", [])[::2], *named.get("u", [])]
        if names:
            stored = [self._stored.field(id, name) if rng.random() < 0.9 else b"other" for name in names]
            digests = [hashlib.sha1(data, usedforsecurity=False).hexdigest()[:16] if data else "" for data in stored]
            groups.append(("e", digests))
        return groups + changes

    def _new_turns(self, most: int) -> list[bytes]:
        found = []
        for _ in range(self.rng.randint(1, most)):
            self._turns += 1
            found.append(turn(f"t{self._turns}"))
        return found

    def _labels(self) -> bytes:
        names = sorted(self.rng.sample(["l1", "l2", "l3"], self.rng.randrange(4)))
        return msgspec.msgpack.encode({name: self.rng.choice("xy") for name in names})

    def _about(self, *, whole: bool = False) -> list[tuple[str, list[Any]]]:
        names = msgspec.msgpack.encode("name") + msgspec.msgpack.encode(self.rng.choice([None, "/p", "/q"]))
        about = [bytes(8), names] if whole else [self.rng.choice([b"", bytes(8)]), self.rng.choice([b"", names])]
        return [("m", about), ("L", [self._labels()])]

    def _whole(self, number: int) -> list[tuple[str, list[Any]]]:
        kept: list[tuple[str, list[Any]]] = [("k", [])] * self.rng.randrange(2)
        parts = ["version", b"\x01", "metadata.a", b"%d" % number]
        return [*kept, ("W", []), ("t", [1000 + number]), ("s", parts), *self._about(whole=True)]

    def _changes(self, id: str, number: int) -> list[tuple[str, list[Any]]]:
        rng, groups = self.rng, list[tuple[str, list[Any]]]()
        if rng.random() < 0.3:
            groups.append(("c", [b"\xc0\xc0", "version", b"\x01", "metadata.new", b"\x01"]))
        if rng.random() < 0.3:
            groups += [("t", [1000 + number])] * rng.randrange(2)
            names = rng.sample(["metadata.a", "metadata.b", "metadata.c", "updated_at_ms"], rng.randint(1, 3))
            groups.append(("s", [item for name in names for item in (name, b"\xcf" + (1000 + number).to_bytes(8))]))
            gone = [name for name in ("metadata.b", "metadata.new") if name not in names]
            groups += [("u", gone)] * rng.randrange(2)
        if rng.random() < 0.2:
            groups += rng.choice([self._about(), [("n", [])], [("j", ["l1", rng.choice(["x", ""]), "l4", "y"])]])
        if rng.random() < 0.3:
            keys = rng.sample(["a", "a/1", "a/2", "b"], 4)
            groups += [("P", [keys[0], b"put"])] * rng.randrange(2)
            groups += [("N", [keys[1], b"new", keys[2], b"new"])] * rng.randrange(2)
            groups += [("D", [keys[3]])] * rng.randrange(2) + [("R", ["a"])] * (rng.random() < 0.2)
        choice = rng.random()
        if choice < 0.1:
            groups.append(("x", [rng.randrange(3), rng.choice([-1, 0, 2])]))
        elif choice < 0.2:
            groups.append(("z", [rng.randint(1, 3)]))
        elif choice < 0.3:
            groups.append(("q", [rng.randrange(4)]))
        elif choice < 0.4:
            groups.append(("y", [rng.randrange(3), turn(f"t{number}", "edited")]))
        elif choice < 0.5:
            index, stored = rng.choice([-1, 0]), self._stored.turns(id) or [turn("none")]
            wanted = msgspec.msgpack.decode(stored[index])[0] if rng.random() < 0.8 else "other"
            groups.append(("v", [index, msgspec.msgpack.encode(wanted), turn(wanted, "replaced")]))
        if rng.random() < 0.5 or not groups:
            groups.append(("p", self._new_turns(3)))
        return groups


@pytest.mark.parametrize("seed", range(60))
def test_joined_or_one_by_one(shared_server: Server, seed: int) -> None:
    """Whatever the operations and however they are merged, answers and data are those of single calls.

    Among them are all groups of arguments and all kinds, conflicts, leases, writers that are behind, second attempts,
    harmed sessions and full memories.
    """
    rng, raw = random.Random(seed), shared_server.raw()
    name = f"joined-{secrets.token_hex(4)}"
    single, together = Twin(raw, f"{name}-1"), Twin(raw, f"{name}-2")
    for twin in (single, together):
        raw.hset(twin._partition.lease("a"), "token", "7")
    chance, revision, sent = Chance(rng, single), 0, list[Operation]()
    for number in range(1, 90, 6):
        batch = [chance.operation(number + n, revision) for n in range(6)]
        if sent and rng.random() < 0.6:
            again = [operation for operation in rng.choices(sent, k=2) if not operation.staged]
            batch = rng.sample(batch + again, k=len(batch + again))
        sent += batch
        alone = [answer for operation in batch for answer in single.send([single.call(operation)])]
        calls, answers = [together.call(operation) for operation in batch], list[Any]()
        while calls:
            cut = rng.randrange(1, len(calls) + 1)
            answers += together.send(calls[:cut])
            calls = calls[cut:]
        assert answers == alone
        assert together.content() == single.content()
        revision = int(raw.hget(single._partition.state, "revision") or 0)
        if rng.random() < 0.15:
            harm = rng.choice(["evicted", "turns", "revision", "records"])
            for twin in (single, together):
                twin.harm("b", harm)
    raw.delete(*raw.scan_iter(match=f"*{name}*", count=1000))


@pytest.mark.parametrize("together", [1, 3])
def test_windows_that_are_dropped(shared_server: Server, together: int) -> None:
    """Of too many windows those go that were used least lately; their writers' operations are forgotten, no others."""
    raw: Any = shared_server.raw()
    twin = Twin(raw, f"joined-{secrets.token_hex(4)}")
    state = twin._partition.state

    def write(writer: int, seen: int) -> ScriptCall:
        token = bytes([writer]) * 12 + (1).to_bytes(4) + bytes(4) + seen.to_bytes(8) + (1).to_bytes(4)
        whole: list[tuple[str, list[Any]]] = [("W", []), ("s", ["version", b"\x01"]), ("m", [bytes(8), b"\xc0\xc0"])]
        return twin.call(Operation("w", "a", token, whole))

    calls = [write(writer, 0) for writer in range(9)]
    first = [answer for n in range(0, 3, together) for answer in twin.send(calls[n : n + together], FEW_WINDOWS)]
    assert first == [[b"OK", 1, b"", 0], [b"OK", 2, b"", 1], [b"OK", 3, b"", 2]]
    # A new writer that has heard of nothing yet can't tell itself from one that was forgotten.
    calls[3:] = [write(writer, 3) for writer in range(3, 9)]
    answers = [answer for n in range(3, 6, together) for answer in twin.send(calls[n : n + together], FEW_WINDOWS)]
    assert answers == [[b"OK", 4, b"", 3], [b"OK", 5, b"", 4], [b"OK", 6, b"", 5]]
    windows = {name for name in raw.hkeys(state) if name.startswith(b"w")}
    assert windows == {b"w" + bytes([writer]) * 12 for writer in (2, 3, 4, 5)}
    assert raw.hget(state, "forgotten") == b"2"
    assert twin.send([calls[0]], FEW_WINDOWS) == twin.send([calls[1]], FEW_WINDOWS) == [[b"FORGOTTEN"]]
    assert twin.send(calls[2:6], FEW_WINDOWS) == [[b"OK", n, b""] for n in (3, 4, 5, 6)]
    assert twin.send([write(0, 6)], FEW_WINDOWS) == [[b"OK", 7, b"", 6]]
    raw.delete(*raw.scan_iter(match=f"{twin._partition.prefix}*", count=1000))


async def test_what_cannot_be_packed(start_server: Callable[..., Server]) -> None:
    """Whoever brings what can't be sent is told so, and those whose calls were to go along notice nothing."""
    store = await RedisSessionStore.connect(start_server().url)
    await store.save_many([SessionAsset(id=id) for id in "ab"])
    prefix = store._core.sessions._namespace.prefixes[0][0]
    bad = ScriptCall(prefix, ["key"], cast(Any, [object()]))
    turn = ConversationTurn.user("x")
    outcomes: Any = await asyncio.gather(
        store.ping(), store.append("a", turn), store._driver.link.call([bad], asyncio.get_running_loop().time() + 5),
        store.append("b", turn), store.load_versioned("a"), return_exceptions=True,
    )  # fmt: skip
    assert (outcomes[1], outcomes[3], outcomes[4].revision) == (3, 4, 3)
    assert isinstance(outcomes[2], Exception)
    with pytest.raises(ValueError, match="if_revision"):
        await store.append("a", turn, if_revision=10**5000)
    assert [await store.append(id, turn) for id in "ab"] == [5, 6]
    assert len(await store.list(limit=10**5000)) == len(await store.changes(limit=10**5000)) == 2
    await store.aclose()
