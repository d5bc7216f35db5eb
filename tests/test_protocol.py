"""docs/protocol.md is enough: a second client, made from that page alone, works beside the library.

The client is plain redis-py and the shipped scripts. Each test runs twice: in the second run every reply to it is lost
once, so it sends each of its operations again, as it was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple
from zlib import crc32

import pytest
import redis
from msgspec import msgpack

import orcs_redis
import orcs_redis.sync
from orcs_redis import (
    CommandGrant,
    CompactedTurn,
    ComponentSnapshot,
    ConversationTurn,
    LearnedFact,
    RawItem,
    SessionAsset,
    SkillConfig,
    ToolCallRecord,
)

from .conftest import Server, every_server

Json = dict[str, Any]
Groups = Mapping[str, Sequence[Any]]

SHARED = ("state", "updated", "meta", "changes", "deleted", "deleted:meta", "labels")
MAPS = ("metadata", "skill_configs", "component_snapshots")
TURN = ("id", "timestamp_ms", "role", "content", "tool_calls", "tags", "metadata")
CALL = ("tool_name", "args", "result", "success", "duration_ms")
pack, unpack = msgpack.encode, msgpack.decode


class RefusedError(Exception):
    """The script's item for an operation, if it is not OK."""


class Operation(NamedTuple):
    """One that is sent as often as is needed: the same bytes each time."""

    partition: str
    counter: int
    keys: list[str]
    arguments: list[Any]


class Stored(NamedTuple):
    """A session as it was read: what its revision is, and what a write is made from."""

    revision: int
    operation_id: bytes
    parts: dict[str, bytes]
    turns: list[bytes]

    @property
    def base(self) -> list[Any]:
        return [b"%d:%b" % (self.revision, self.operation_id), len(self.turns)]


class Client:
    """A minimal client, of one epoch and without a deadline."""

    def __init__(self, server: Any, namespace: str = "orcs", *, loses_replies: bool = False) -> None:
        self.server, self.namespace, self.loses_replies = server, namespace, loses_replies
        self.writer, self.counters = os.urandom(8 + 4), itertools.count(1)
        self.unfinished: set[int] = set()
        self.high_water_marks: dict[str, int] = {}
        self.layout: dict[bytes, bytes] = {}

    def call(self, name: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        source = files("orcs_redis.scripts").joinpath(f"{name}.lua").read_bytes()
        try:
            return self.server.evalsha(hashlib.sha1(source).hexdigest(), len(keys), *keys, *arguments)
        except redis.exceptions.NoScriptError:
            return self.server.eval(source, len(keys), *keys, *arguments)

    def open(self, partitions: int = 1) -> None:
        key, prefixes = f"{self.namespace}:layout", [f"{{{self.namespace}/{n}}}:" for n in range(partitions)]
        if not self.server.exists(key):
            self.call("create", [key, *(p + "state" for p in prefixes)], [2, os.urandom(8).hex()])
        self.layout = self.server.hgetall(key)
        assert self.layout[b"version"] == b"2"
        for n in range(int(self.layout[b"partitions"])):
            p = f"{{{self.namespace}/{n}}}:"
            self.high_water_marks[p] = int(self.server.hget(p + "state", "revision"))

    def partition(self, id: str) -> str:
        return f"{{{self.namespace}/{crc32(id.encode()) % int(self.layout[b'partitions'])}}}:"

    def begin(self) -> int:
        counter = next(self.counters)
        self.unfinished.add(counter)
        return counter

    def operation(
        self, id: str, groups: Groups, kind: str = "w", source: str | None = None, staged: Sequence[bytes] = ()
    ) -> Operation:
        p, counter = self.partition(id), self.begin()
        identity = struct.pack(">12sII", self.writer, counter, time.time_ns() & 0xFFFFFFFF)
        keys = [f"{p}session:{id}", f"{p}turns:{id}"]
        if "l" in groups:
            keys.append(f"{p}lease:{id}")
        if staged:
            keys.append(f"{p}staging:{identity.hex()}:1")
            pipe = self.server.pipeline(transaction=True)
            pipe.rpush(keys[-1], *staged).pexpire(keys[-1], 60_000).execute()
            groups = {**groups, "S": [len(staged)]}
        if kind in "df" or groups.keys() & set("PNDR"):
            keys += [f"{p}records:{id}", f"{p}names:{id}"]
        if source is not None:
            keys += [f"{p}{name}:{source}" for name in ("session", "turns", "records", "names")]
        values = [value for arguments in groups.values() for value in arguments]
        marks = self.high_water_marks[p], min(self.unfinished)
        header = struct.pack(">IB20sQI", len(values), len(keys), identity, *marks)
        header += kind.encode() + b"".join(struct.pack(">cI", g.encode(), len(groups[g])) for g in groups)
        return Operation(p, counter, keys, [header, *values])

    def send(self, *operations: Operation) -> list[list[Any]]:
        keys, arguments = [operations[0].partition + name for name in SHARED], [self.layout[b"incarnation"], pack(1)]
        for operation in operations:
            keys += operation.keys
            arguments += operation.arguments
        reply: list[list[Any]] = self.call("write", keys, arguments)
        return reply

    def perform(self, operation: Operation) -> list[Any]:
        """Return revision and answer bits."""
        if self.loses_replies:
            self.send(operation)
        ((answer, *values),) = self.send(operation)
        self.unfinished.remove(operation.counter)
        if answer != b"OK":
            raise RefusedError(answer.decode(), *values)
        p = operation.partition
        self.high_water_marks[p] = max(self.high_water_marks[p], values[0])
        return [values[0], "".join(f"{byte:08b}" for byte in (values[2:] or [b""])[0])]

    def write(self, id: str, **groups: Sequence[Any]) -> int:
        return int(self.perform(self.operation(id, groups))[0])

    def save(self, id: str, document: Json, **conditions: Sequence[Any]) -> int:
        """Store a session as a whole, from its JSON."""
        parts = parts_of(document)
        turns = [turn_of(turn) for turn in document["history"]["turns"]]
        staged = turns if len(turns) > 15 else []
        context, created = document["project_context"], document["created_at_ms"].to_bytes(8)
        names = pack(context.get("name")) + pack(context.get("root_path"))
        groups: dict[str, Sequence[Any]] = {**conditions, "W": [], "t": [document["updated_at_ms"]]}
        groups |= {"s": flat(parts), "m": [created, names], "L": [labels_of(document["metadata"])]}
        if not staged:
            groups["h"] = turns
        return int(self.perform(self.operation(id, groups, staged=staged))[0])

    def save_changes(self, id: str, base: Stored, set: Json, unset: Sequence[str] = (), **more: Sequence[Any]) -> int:
        """Set and unset parts of a session that was loaded, unless others have changed just these."""
        known = [base.parts.get(name) for name in (*set, *unset)]
        digests = ["" if data is None else hashlib.sha1(data).hexdigest()[:16] for data in known]
        groups: dict[str, Sequence[Any]] = {"g": base.base, "e": digests, **more}
        if set:
            groups["s"] = flat({name: pack(value) for name, value in set.items()})
        if unset:
            groups["u"] = unset
        return self.write(id, **groups)

    def load(self, id: str) -> Stored:
        p = self.partition(id)
        while True:
            pipe = self.server.pipeline(transaction=False)
            pipe.hgetall(f"{p}session:{id}").lrange(f"{p}turns:{id}", 0, -1).hget(f"{p}session:{id}", ".revision")
            fields, turns, revision = pipe.execute()
            if not fields and revision is None:
                raise KeyError(id)
            if fields.get(b".revision") == revision:
                break
        assert int(fields[b".turns"]) == len(turns)
        own = {name: data for name, data in fields.items() if name[:1] == b"." and name[:2] != b".."}
        parts = {name.decode(): data for name, data in fields.items() if name not in own}
        return Stored(int(revision), own[b".op"], parts, turns)

    def news(self, id: str, base: Stored) -> tuple[list[bytes], bool]:
        """Return the turns that were pushed since, and whether other parts have changed."""
        p = self.partition(id)
        pipe = self.server.pipeline(transaction=False)
        pipe.lrange(f"{p}turns:{id}", len(base.turns), -1)
        pipe.hmget(f"{p}session:{id}", ".revision", ".turns", ".parts", ".reshaped", ".born")
        pushed, marks = pipe.execute()
        revision, count, parts, reshaped, born = map(int, marks)
        assert max(born, reshaped) <= base.revision <= revision, "to be loaded anew"
        assert count == len(base.turns) + len(pushed)
        return pushed, parts > base.revision

    def pop(self, id: str) -> bytes:
        while True:
            stored = self.load(id)
            try:
                self.write(id, g=stored.base, z=[1])
                return stored.turns[-1]
            except RefusedError as error:
                if error.args[0] != "CHANGED":
                    raise

    def fork(self, id: str, new_id: str, **groups: Sequence[Any]) -> int:
        return int(self.perform(self.operation(new_id, groups, "f", source=id))[0])

    def delete(self, id: str, **conditions: Sequence[Any]) -> int:
        return int(self.perform(self.operation(id, conditions, "d"))[0])

    def records(self, id: str, prefix: bytes = b"") -> dict[bytes, bytes]:
        p = self.partition(id)
        keys = self.server.zrange(f"{p}names:{id}", b"[" + prefix, b"(" + prefix + b"\xff", bylex=True)
        return dict(zip(keys, self.server.hmget(f"{p}records:{id}", keys) if keys else (), strict=True))

    def labelled(self, name: str, value: str) -> dict[str, list[Any]]:
        """Return the index metadata of the sessions with a label, newest first."""
        key, found = label_key(name, value), {}
        for p in self.high_water_marks:
            members = self.server.zrange(p + "labels", b"[" + key, b"(" + key + b"\xff", bylex=True)
            ids = [member[len(key) :] for member in members]
            for id, meta in zip(ids, self.server.hmget(p + "meta", ids) if ids else (), strict=True):
                if meta is not None:
                    found[id.decode()] = unpack(meta)
        return dict(sorted(found.items(), key=lambda item: (item[1][1], item[0]), reverse=True))

    def lease(self, verb: str, id: str, *arguments: Any) -> list[Any]:
        p = self.partition(id)
        keys = [p + "state", f"{p}lease:{id}", p + "fence", p + "leases"]
        reply: list[Any] = self.call("lease", keys, [self.layout[b"incarnation"], verb, id, *arguments])
        return reply

    def acquire(self, id: str, ttl_ms: int) -> list[Any]:
        p, counter = self.partition(id), self.begin()
        claim = struct.pack(">12sII", self.writer, counter, time.time_ns() & 0xFFFFFFFF)
        marks = self.high_water_marks[p], min(self.unfinished)
        answer = self.lease("acquire", id, claim, ttl_ms, "them", *marks)
        self.unfinished.remove(counter)
        return answer

    def listen(self, id: str) -> Any:
        subscription = self.server.pubsub()
        subscription.subscribe(f"{self.partition(id)}changes:{self.layout[b'incarnation'].decode()}:{id}")
        assert subscription.get_message(timeout=5)["type"] == "subscribe"
        return subscription


def flat(pairs: Mapping[str, Any]) -> list[Any]:
    return [item for pair in pairs.items() for item in pair]


def label_key(name: str, value: str) -> bytes:
    return bytes([len(name.encode())]) + name.encode() + len(value.encode()).to_bytes(4) + value.encode()


def labels_of(metadata: Json) -> bytes:
    labels: Any = metadata.get("labels")
    texts = [*labels, *labels.values()] if isinstance(labels, dict) and len(labels) <= 8 else [None]
    sound = all(isinstance(text, str) and 0 < len(text.encode()) <= 200 for text in texts)
    return pack(dict(sorted(labels.items())) if sound else {})


def parts_of(document: Json) -> dict[str, bytes]:
    """Return a session's JSON as the fields of its hash."""
    parts: Json = {}
    for name, value in document.items():
        if name in MAPS:
            parts |= {f"{name}.{key}": item for key, item in value.items()}
        elif name == "history":
            parts[name] = {key: item for key, item in value.items() if key != "turns"}
        elif name != "id":
            parts[f"..{name}" if "." in name else name] = value
    return {name: pack(value) for name, value in parts.items()}


def document_of(id: str, stored: Stored) -> Json:
    """Return the JSON of what is stored."""
    document: Json = {"id": id} | {name: {} for name in MAPS}
    for field, data in stored.parts.items():
        section, dot, key = field.partition(".")
        if field.startswith(".."):
            document[field[2:]] = unpack(data)
        elif not dot:
            document[field] = unpack(data)
        elif section in MAPS:
            document[section][key] = unpack(data)
    document["history"]["turns"] = [json_of(turn) for turn in stored.turns]
    return document


def turn_of(turn: Json) -> bytes:
    calls = [[call.get(name) for name in CALL] for call in turn["tool_calls"]]
    return pack([calls if name == "tool_calls" else turn[name] for name in TURN])


def json_of(data: bytes) -> Json:
    turn = dict(zip(TURN, unpack(data), strict=False))
    return turn | {"tool_calls": [dict(zip(CALL, call, strict=False)) for call in turn["tool_calls"]]}


# Beside the library


@pytest.fixture(params=[False, True], ids=["answered", "lost replies"])
def client(start_server: Callable[..., Server], request: pytest.FixtureRequest) -> Client:
    return Client(start_server().raw(), loses_replies=request.param)


@pytest.fixture
def store(client: Client) -> Iterator[Any]:
    """The library, on the client's server; the client has created the namespace."""
    client.open(partitions=3)
    address = client.server.connection_pool.connection_kwargs
    with orcs_redis.sync.open_store(f"redis://127.0.0.1:{address['port']}/0") as store:
        yield store


def everything(id: str, turns: int = 2) -> SessionAsset:
    """An asset with something everywhere."""
    asset = SessionAsset(id=id)
    call = ToolCallRecord(tool_name="run", args={"a": [1, None]}, result={"ok": True}, duration_ms=3)
    for n in range(turns):
        asset.add_turn(ConversationTurn.user(f"turn {n}").with_tool_calls([call]).with_tags(["x", "é"]))
    asset.history.compacted = [CompactedTurn(summary="s", turn_count=2, start_time_ms=1, end_time_ms=2)]
    asset.preferences.coding_style.preferred_languages = ["Lua"]
    asset.preferences.custom = {"a.b": {"c": 1.5}}
    asset.project_context.name, asset.project_context.root_path = "shop", "/src/shop"
    asset.project_context.learn(LearnedFact.new("build", "make", "README"))
    asset.set_skill_config("s.k", SkillConfig.new("s.k"))
    asset.save_snapshot(ComponentSnapshot(component_fqn="c.d", state=[1, {"x": None}]))
    asset.save_grants([CommandGrant.persistent("make")])
    asset.metadata = {"labels": {"user": "u1", "é": "ü"}, "a.b": {"c": -1}, "": "empty", "big": 2**64 - 1}
    asset.extra = {"newer": [1], "with.dot": 2, ".dot": 3}
    return asset


def json_of_asset(asset: SessionAsset) -> Json:
    document: Json = json.loads(asset.to_json())
    return document


def a_turn(content: str) -> ConversationTurn:
    return ConversationTurn.assistant(content)


def packed(turn: ConversationTurn) -> bytes:
    return turn_of({name: getattr(turn, name) for name in TURN})


def contents(turns: Iterable[ConversationTurn]) -> list[str]:
    return [turn.content for turn in turns]


@every_server
@pytest.mark.parametrize("turns", [0, 2, 40])
def test_whole_sessions(client: Client, store: Any, turns: int) -> None:
    """What either saves as a whole, the other loads, all of it."""
    for n in range(5):  # in several partitions
        theirs, ours = everything(f"theirs-{n}", turns), everything(f"ours-{n}", turns)
        revision = client.save(theirs.id, json_of_asset(theirs), r=[0])
        assert store.load_versioned(theirs.id) == (theirs, revision)
        assert store.save(ours) == client.load(ours.id).revision
        assert document_of(ours.id, client.load(ours.id)) == json_of_asset(ours)
    with pytest.raises(RefusedError, match="CONFLICT"):
        client.save("ours-0", json_of_asset(theirs), r=[0])


@every_server
def test_a_whole_save_replaces(client: Client, store: Any) -> None:
    """A session saved as a whole loses the parts and turns that it had."""
    store.save(everything("s"))
    plain = SessionAsset(id="s")
    client.save("s", json_of_asset(plain))
    assert store.load("s") == plain
    assert client.labelled("user", "u1") == {}
    assert not client.server.exists(f"{client.partition('s')}turns:s")


@every_server
def test_turns(client: Client, store: Any) -> None:
    """Appended, popped, cut and replaced on either side."""
    new = json_of_asset(SessionAsset(id="s"))
    with pytest.raises(RefusedError, match="NOTFOUND"):
        client.write("s", p=[packed(a_turn("x"))])
    beginning = {"c": [pack(None) + pack(None), *flat(parts_of(new))], "p": [packed(a_turn("0"))]}
    _, bits = client.perform(client.operation("s", beginning))
    assert bits[0] == "1"
    store.append("s", a_turn("1"))
    _, bits = client.perform(client.operation("s", beginning | {"p": [packed(a_turn("2"))]}))
    assert bits[0] == "0"
    assert contents(store.load("s").history.turns) == ["0", "1", "2"]
    assert json_of(client.pop("s"))["content"] == "2"
    assert contents(store.pop("s")) == ["1"]
    assert [json_of(turn)["content"] for turn in client.load("s").turns] == ["0"]
    turns = [a_turn(str(n)) for n in range(1, 6)]
    store.append("s", *turns)
    changed = ConversationTurn(id=turns[1].id, role="user", content="changed")
    with pytest.raises(RefusedError, match="CHANGED"):
        client.write("s", v=[-1, pack(changed.id), packed(changed)])
    client.write("s", v=[2, pack(changed.id), packed(changed)])
    client.write("s", z=[1], p=[packed(a_turn("last"))])
    assert contents(store.turns("s")) == ["0", "1", "changed", "3", "4", "last"]
    client.write("s", q=[4])
    client.write("s", x=[1, -1], y=[0, packed(a_turn("first"))], p=[packed(a_turn("end"))])
    assert contents(store.turns("s")) == ["first", "changed", "3", "end"]
    before = client.load("s").revision
    assert client.write("s", q=[9]) == before  # cuts nothing
    client.write("s", i=[pack(json_of(client.load("s").turns[-1])["id"])], z=[9])
    assert store.load("s").history.turns == []


@every_server
def test_raw_turns(client: Client, store: Any) -> None:
    """A raw turn has two elements more, and no content of its own."""
    store.append(
        "s", ConversationTurn.from_raw(RawItem("openai-agents/1", b'{"role":"user"}'), role="user"), create=True
    )
    (ours,) = client.load("s").turns
    assert unpack(ours)[3] == ""
    assert unpack(ours)[7:] == ["openai-agents/1", b'{"role":"user"}']
    client.write("s", p=[pack([*unpack(packed(a_turn(""))), "langgraph/4", b"\x00\x01"])])
    assert store.load("s").history.turns[-1].raw == RawItem("langgraph/4", b"\x00\x01")


@every_server
def test_commits(client: Client, store: Any) -> None:
    """Several parts at once, all or nothing, under conditions."""
    asset = everything("s")
    revision = store.save(asset)
    values = {"metadata.title": pack("t"), "metadata.a.b": pack([1]), "granted_commands": pack([])}
    last = asset.history.turns[-1].id
    groups: Any = {
        "r": [revision], "i": [pack(last)], "s": flat(values), "u": ["metadata.big", "skill_configs.s.k"], "z": [1],
        "p": [packed(a_turn("new"))], "P": ["a/1", b"\x00", "a/2", b"2"], "N": ["n", b"n", "a/1", b"other"],
        "j": ["user", "u2", "é", "", "team", "t"],
    }  # fmt: skip
    got, bits = client.perform(client.operation("s", groups))
    assert (got, bits[:4]) == (revision + 1, "0100")
    found = store.load("s")
    assert found.metadata == {
        "labels": {"user": "u2", "team": "t"}, "a.b": [1], "": "empty", "title": "t"
    }  # fmt: skip
    assert (found.granted_commands, found.skill_configs) == ([], {})
    assert contents(found.history.turns) == ["turn 0", "new"]
    for groups in ({"r": [revision], "n": []}, {"i": [pack(last)], "s": ["metadata.x", pack(1)]}):
        with pytest.raises(RefusedError, match="CONFLICT"):
            client.perform(client.operation("s", groups))
    with pytest.raises(RefusedError, match="LABELS"):
        client.write("s", j=flat({f"l{n}": "x" for n in range(7)}), s=["metadata.x", pack(1)])
    with pytest.raises(RefusedError, match="EMPTY"):
        client.write("s", s=["metadata.x", b""])
    assert store.load_versioned("s") == (found, got)
    committed = store.commit("s", set={"metadata.title": "u"}, put_new={"a/2": b"x", "b": b"y"}, labels={"user": "u3"})
    assert committed.placed == {"a/2": False, "b": True}
    stored = client.load("s")
    assert (unpack(stored.parts["metadata.title"]), unpack(stored.parts["metadata.labels"])) == (
        "u", {"team": "t", "user": "u3"}
    )  # fmt: skip
    assert client.records("s", b"a/") == {b"a/1": b"\x00", b"a/2": b"2"}
    client.write("s", P=["a/9", b"9"], D=["b"], R=["a/"])
    assert client.records("s") == {b"a/9": b"9", b"n": b"n"}


@every_server
def test_what_others_changed(client: Client, store: Any) -> None:
    """What was loaded is saved by its changes: others' are kept, and the same part is a conflict."""
    store.save(everything("s"))
    base, ours = client.load("s"), store.load("s")
    client.save_changes("s", base, {"metadata.theirs": 1}, ["metadata.big"], p=[packed(a_turn("theirs"))])
    ours.metadata["ours"] = 2
    ours.add_turn(a_turn("ours"))
    store.save(ours)
    assert contents(store.load("s").history.turns)[2:] == ["theirs", "ours"]
    assert store.load("s").metadata == ours.metadata
    assert (ours.metadata["theirs"], "big" in ours.metadata) == (1, False)
    pushed, parts_changed = client.news("s", base)
    assert ([json_of(turn)["content"] for turn in pushed], parts_changed) == (["theirs", "ours"], True)
    ours.metadata["theirs"] = 3
    client.write("s", s=["metadata.theirs", pack(4)])
    with pytest.raises(orcs_redis.ConflictError) as caught:
        store.save(ours)
    assert caught.value.parts == ("metadata.theirs",)
    base = client.load("s")
    store.append("s", a_turn("pushed"))
    client.save_changes("s", base, {"metadata.x": 1}, y=[0, packed(a_turn("edited"))])
    assert contents(store.turns("s")) == ["edited", "turn 1", "theirs", "ours", "pushed"]
    store.commit("s", set={"metadata.x": 2})
    for set, unset, more in (
        ({"metadata.x": 3}, (), {}), ({}, ["metadata.x"], {}), ({"metadata.y": 1}, (), {"p": [packed(a_turn(""))]})
    ):  # fmt: skip
        with pytest.raises(RefusedError, match="CHANGED"):
            client.save_changes("s", base, set, unset, **more)


def pushes(client: Client, store: Any) -> None:
    store.append("s", a_turn("pushed"))


def pushes_many(client: Client, store: Any) -> None:
    store.append("s", *(a_turn(str(n)) for n in range(65)))


def pushes_the_same(client: Client, store: Any) -> None:
    client.write("s", p=[SAME])


def edits(client: Client, store: Any) -> None:
    client.write("s", y=[0, packed(a_turn("edited"))])


def sets(client: Client, store: Any) -> None:
    store.commit("s", set={"metadata.a.b": 7})


def removes(client: Client, store: Any) -> None:
    store.delete("s")


def makes_anew(client: Client, store: Any) -> None:
    store.delete("s")
    store.save(everything("s"))


SAME = packed(ConversationTurn(id="same", role="user", content=""))
BIG = hashlib.sha1(pack(2**64 - 1)).hexdigest()[:16]


@every_server
@pytest.mark.parametrize(
    ("others", "groups", "answer"),
    [
        ((), {"z": [1]}, [b"OK"]),
        ((removes,), {"n": []}, [b"CONFLICT", 0]),
        ((makes_anew,), {"n": []}, [b"CONFLICT", 3]),
        ((pushes, sets), {"n": []}, [b"OK"]),
        ((edits,), {"p": [SAME]}, [b"CHANGED", 2, b"turns"]),
        ((edits,), {"s": ["metadata.x", pack(1)], "e": [""]}, [b"OK"]),
        ((pushes,), {"p": [SAME]}, [b"OK"]),
        ((pushes,), {"x": [1, -1]}, [b"OK"]),
        ((pushes,), {"y": [0, SAME]}, [b"OK"]),
        ((pushes,), {"x": [0, 0]}, [b"CHANGED", 2, b"turns"]),
        ((pushes,), {"z": [1]}, [b"CHANGED", 2, b"turns"]),
        ((pushes,), {"q": [1]}, [b"CHANGED", 2, b"turns"]),
        ((pushes,), {"h": [SAME]}, [b"CHANGED", 2, b"turns"]),
        ((pushes_the_same,), {"p": [SAME]}, [b"CHANGED", 2, b"turns"]),
        ((pushes_many,), {"p": [SAME]}, [b"CHANGED", 2, b"turns"]),
        ((pushes_the_same,), {"y": [0, SAME]}, [b"CHANGED", 2, b"turns"]),
        ((pushes_many,), {"y": [0, SAME]}, [b"CHANGED", 2, b"turns"]),
        ((sets,), {"s": ["metadata.a.b", pack(1)], "e": ["0" * 16]}, [b"CHANGED", 2, b"parts"]),
        ((sets,), {"s": ["metadata.a.b", pack(1)], "e": [""]}, [b"CHANGED", 2, b"parts"]),
        ((sets,), {"s": ["metadata.a.b", pack(1)]}, [b"OK"]),
        ((sets,), {"u": ["metadata.big"], "e": [BIG]}, [b"OK"]),
        ((sets,), {"s": ["metadata.x", pack(1)], "u": ["metadata.big"], "e": ["", BIG]}, [b"OK"]),
    ],
)
def test_what_a_write_was_made_from(
    client: Client, store: Any, others: Sequence[Any], groups: Groups, answer: list[Any]
) -> None:
    """The table of the group `g`: whether what others did meets what the write does."""
    store.save(everything("s"))
    base = client.load("s")
    for other in others:
        other(client, store)
    state = client.partition("s") + "state"
    revision = int(client.server.hget(state, "revision"))
    found = client.send(client.operation("s", {"g": base.base, **groups}))[0]
    assert found[: len(answer)] == answer
    assert int(client.server.hget(state, "revision")) == revision + (answer == [b"OK"])


@every_server
def test_another_base(client: Client, store: Any) -> None:
    """A revision that is not reached yet, or that another operation has made, is none to build upon."""
    store.save(everything("s"))
    base = client.load("s")
    for revision in (b"9", b"%d:%b" % (base.revision, bytes(20))):
        with pytest.raises(RefusedError, match="CHANGED"):
            client.write("s", g=[revision, 2], n=[])
    with pytest.raises(RefusedError, match="CONFLICT"):
        client.write("s", r=[b"%d:%b" % (base.revision, bytes(20))], n=[])
    client.write("s", r=base.base[:1], n=[])


@every_server
@pytest.mark.parametrize(
    ("groups", "index", "part"),
    [
        ({"t": [2000]}, 2000, 2000),
        ({"t": [500]}, 1000, 500),
        ({"t": [2**48]}, "now", 2**48),
        ({"t": [2000], "p": [SAME]}, "now", 2000),
        ({"t": [2000], "n": []}, "now", 2000),
        ({"p": [SAME]}, "now", "now"),
        ({"z": [1]}, "now", "now"),
        ({"n": []}, "now", "now"),
        ({"s": ["metadata.x", pack(1)]}, 1000, 1000),
        ({"P": ["k", b"v"]}, 1000, 1000),
    ],
)
def test_when_a_session_was_updated(client: Client, store: Any, groups: Groups, index: Any, part: Any) -> None:
    """The table of `updated_at_ms`: in the index, and as a part."""
    asset = everything("s")
    asset.updated_at_ms = 1000
    store.save(asset)
    if "t" in groups:
        groups = {**groups, "s": ["updated_at_ms", pack(groups["t"][0])]}
    before = time.time_ns() // 1_000_000
    client.write("s", **groups)
    meta = unpack(client.server.hget(client.partition("s") + "meta", "s"))
    found = meta[1], unpack(client.load("s").parts["updated_at_ms"])
    assert client.server.zscore(client.partition("s") + "updated", "s") == meta[1]
    for value, expected in zip(found, (index, part), strict=True):
        assert before <= value <= before + 60_000 if expected == "now" else value == expected
    assert before <= meta[4] <= before + 60_000


@every_server
@pytest.mark.parametrize(("more", "expected"), [({}, 500), ({"k": []}, 1000)])
def test_when_a_session_was_saved_whole(client: Client, store: Any, more: Groups, expected: int) -> None:
    """A whole save brings its own time; `k` keeps the index from going back."""
    asset = everything("s")
    asset.updated_at_ms = 1000
    store.save(asset)
    asset.updated_at_ms = 500
    client.save("s", json_of_asset(asset), **more)
    assert client.server.zscore(client.partition("s") + "updated", "s") == expected
    assert store.load("s").updated_at_ms == 500


@every_server
def test_answers_of_many_bits(client: Client, store: Any) -> None:
    """Each record of a large commit has its bit, also when the answer is asked for again."""
    store.save(everything("s"))
    store.commit("s", put={f"k{n}": b"ours" for n in range(0, 130, 3)})
    new = flat({f"k{n}": b"theirs" for n in range(130)})
    _, bits = client.perform(client.operation("s", {"N": new}))
    assert bits == "0" + "".join("01"[n % 3 > 0] for n in range(130)) + "0" * (3 * 56 - 131)
    assert store.get_records("s", ["k0", "k1"]) == {"k0": b"ours", "k1": b"theirs"}


@every_server
def test_forks_and_deletions(client: Client, store: Any) -> None:
    """A fork has the parts and the first turns; a deletion leaves a tombstone, and nothing of a session."""
    ids = [f"s-{n}" for n in range(50) if client.partition(f"s-{n}") == client.partition("s-0")]
    source, theirs, ours, absent, new = ids[:5]
    asset = everything(source)
    revision = store.save(asset)
    store.commit(source, put={"k": b"v"})
    client.fork(source, theirs, r=[revision + 1], q=[1], O=[])
    store.fork(source, ours, length=1, records=True)
    origin = {"id": source, "revision": revision + 1, "length": 1}
    for id in (theirs, ours):
        forked = store.load(id)
        assert forked.metadata == asset.metadata | {"forked_from": origin}
        assert forked.history.turns == asset.history.turns[:1]
        assert client.records(id) == {b"k": b"v"}
    assert set(client.labelled("user", "u1")) == {source, theirs, ours}
    with pytest.raises(RefusedError, match="CONFLICT"):
        client.fork(source, theirs)
    with pytest.raises(RefusedError, match="CONFLICT"):
        client.fork(source, new, r=[revision])
    with pytest.raises(RefusedError, match="NOTFOUND"):
        client.fork(absent, new)
    cursor = store.cursor()
    client.delete(theirs, r=[client.load(theirs).revision])
    store.delete(ours)
    with pytest.raises(orcs_redis.NotFoundError):
        store.load(theirs)
    with pytest.raises(KeyError):
        client.load(ours)
    assert [(change.id, change.kind) for change in store.changes(cursor)] == [(theirs, "deleted"), (ours, "deleted")]
    p = client.partition(ours)
    assert client.server.zrange(p + "deleted", 0, -1) == [theirs.encode(), ours.encode()]
    assert not client.server.exists(*(f"{p}{key}:{ours}" for key in ("session", "turns", "records", "names")))
    assert set(client.labelled("", "/src/shop")) == {source}
    with pytest.raises(RefusedError, match="NOTFOUND"):
        client.delete(ours)


@every_server
def test_records(client: Client, store: Any) -> None:
    """Records that either has put, in the order of their keys' bytes."""
    store.save(SessionAsset(id="s"))
    keys = ["b", "a/10", "a/9", "a", "é", "a/\U0001f600", "z" * 1024]
    for n, key in enumerate(keys):
        if n % 2:
            client.write("s", P=[key, b"%d" % n])
        else:
            store.commit("s", put={key: b"%d" % n})
    expected = sorted((key.encode(), b"%d" % n) for n, key in enumerate(keys))
    assert list(client.records("s").items()) == expected
    assert [(key.encode(), value) for key, value in store.records("s")] == expected
    assert list(client.records("s", b"a/")) == [b"a/10", b"a/9", "a/\U0001f600".encode()]


@every_server
def test_lists_by_label(client: Client, store: Any) -> None:
    """Sessions that either labels are found by both, newest first."""
    for n in range(6):
        asset = SessionAsset(id=f"s-{n}", updated_at_ms=1000 + n)
        asset.updated_at_ms = 1000 + n
        asset.project_context.root_path = "/p" if n < 3 else None
        asset.metadata["labels"] = {"user": f"u{n % 2}"}
        if n % 3:
            client.save(asset.id, json_of_asset(asset))
        else:
            store.save(asset)
    client.write("s-1", j=["user", "u0"])
    store.commit("s-4", labels={"user": None})
    client.write("s-5", s=["metadata.labels", pack("none")], L=[pack({})])
    for name, value, expected in (("user", "u0", [2, 1, 0]), ("user", "u1", [3]), ("", "/p", [2, 1, 0])):
        found = client.labelled(name, value)
        assert list(found) == [f"s-{n}" for n in expected]
        query = {"labels": {name: value}} if name else {"project_path": value}
        metas = store.list(**query)
        assert [meta.id for meta in metas] == list(found)
        for meta, row in zip(metas, found.values(), strict=True):
            assert (meta.revision, meta.turn_count, meta.labels, meta.name, meta.project_path) == (
                row[0], row[2], *row[6:]
            )  # fmt: skip
            assert [meta.updated_at.timestamp(), meta.written_at.timestamp(), meta.created_at.timestamp()] == [
                row[1] / 1000, row[4] / 1000, row[5] / 1000
            ]  # fmt: skip


@every_server
def test_channels(client: Client, store: Any) -> None:
    """Each change is heard on the session's own channel, once, whoever made it, and no other session's is."""
    subscription, watch = client.listen("s"), store.watch(since=store.cursor(), ids=["s"])
    asset = SessionAsset(id="s")
    revisions = [client.save("s", json_of_asset(asset)), store.append("s", a_turn("x"))]
    for other in range(9):
        client.save(f"other-{other}", json_of_asset(SessionAsset(id=f"other-{other}")))
    revisions.append(client.delete("s"))
    heard = [unpack(subscription.get_message(timeout=5)["data"]) for _ in revisions]
    assert subscription.get_message(timeout=0.05) is None
    origins = [client.writer[:8], bytes.fromhex(store.origin), client.writer[:8]]
    assert [(m[0], m[2], m[3], m[4]) for m in heard] == [
        (revision, kind, origin, "s") for revision, kind, origin in zip(revisions, (0, 0, 1), origins, strict=True)
    ]
    change = next(watch)
    while change.revision < revisions[-1]:
        change = next(watch)
    assert (change.id, change.kind, change.origin) == ("s", "deleted", client.writer[:8].hex())
    watch.close()
    subscription.close()


@every_server
def test_leases(client: Client, store: Any) -> None:
    """One holds a session at a time, and writes under the token; after that, no more."""
    store.save(SessionAsset(id="s"))
    answer, token = client.acquire("s", 60_000)
    assert answer == b"OK"
    with pytest.raises(orcs_redis.LeaseHeldError), store.lease("s"):
        pass
    client.write("s", l=[token], p=[packed(a_turn("theirs"))])
    assert client.lease("renew", "s", token, 60_000) == [b"OK", token]
    assert client.lease("release", "s", token) == [b"OK", token]
    with store.lease("s") as lease:
        assert lease.token > token
        assert client.acquire("s", 60_000)[0] == b"HELD"
        with pytest.raises(RefusedError, match="LEASELOST"):
            client.write("s", l=[token], p=[packed(a_turn("late"))])
        store.append("s", a_turn("ours"), lease=lease)
    assert contents(store.turns("s")) == ["theirs", "ours"]
    token = client.acquire("s", 60_000)[1]
    client.save("s", json_of_asset(everything("s", 20)), l=[token])  # staged
    new = next(f"new-{n}" for n in range(50) if client.partition(f"new-{n}") == client.partition("s"))
    with pytest.raises(RefusedError, match="LEASELOST"):
        client.fork("s", new, l=[token])
    client.fork("s", new, l=[client.acquire(new, 60_000)[1]])
    assert len(store.turns(new)) == 20


@every_server
def test_calls_of_several_operations(client: Client, store: Any) -> None:
    """Each operation of a call has its own answer, and again the same one if the call is sent again."""
    store.save(SessionAsset(id="s"))
    p = client.partition("s")
    turns = [{"p": [packed(a_turn(str(n)))]} for n in range(3)]
    refused = client.operation("s", {"r": [0], **turns[1]})
    operations = [client.operation("s", turns[0]), refused, client.operation("s", turns[2])]
    operations += [client.operation("s", {"N": ["k", b"v"]})]
    first = client.send(*operations)
    assert [item[0] for item in first] == [b"OK", b"CONFLICT", b"OK", b"OK"]
    store.append("s", a_turn("ours"))
    again = client.send(*operations)
    assert [item[:2] for item in (*again[:1], *again[2:])] == [item[:2] for item in (*first[:1], *first[2:])]
    assert (again[0][2], again[3][3]) == (0, first[3][3])
    assert contents(store.turns("s")) == ["0", "2", "ours"]
    assert int(client.server.hget(p + "state", "revision")) == store.load_versioned("s").revision


@every_server
def test_late_attempts(client: Client, store: Any) -> None:
    """What its sender has finished with, or barred, is not applied however late it comes."""
    store.save(SessionAsset(id="s"))
    late, barred = (client.operation("s", {"p": [packed(a_turn("late"))]}) for _ in range(2))
    other = Client(client.server)
    other.open()
    other.writer = client.writer[:8] + os.urandom(4)
    other.write("s", n=[], b=[client.writer[8:] + barred.arguments[0][17:25]])
    assert client.send(barred)[0][0] == b"FORGOTTEN"
    client.unfinished.clear()
    client.write("s", n=[])
    assert client.send(late)[0][0] == b"FORGOTTEN"
    other.write("s", n=[], b=[client.writer[8:] + b"\xff" * 4 + bytes(4)])
    closed = client.operation("s", {"p": [packed(a_turn("late"))]})
    assert client.send(closed)[0][0] == b"FORGOTTEN"
    assert store.turns("s") == []
