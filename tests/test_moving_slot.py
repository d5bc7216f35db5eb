"""A cluster's slot that is moving: each call of the writing script is done whole there, or refused whole.

The server stops a script that uses a key which is not there, or not any more: in a call no key may vanish and be used
again. Before it runs a script, it refuses one if a key that it names is missing.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from typing import Any

import hiredis
import pytest
import redis

from orcs_redis import ConflictError, ConversationTurn, NotFoundError, SessionAsset, StorageError, Versioned, scripts
from orcs_redis.protocol.attempts import AttemptError
from orcs_redis.protocol.codec import Codec
from orcs_redis.protocol.commands import CallPrefix, ScriptCall, batches
from orcs_redis.protocol.commits import CommitArguments
from orcs_redis.protocol.request import Request
from orcs_redis.protocol.saving import Saving
from orcs_redis.protocol.sessions import Sessions
from orcs_redis.protocol.writer import Namespace
from orcs_redis.protocol.writes import Write

from .conftest import Server, every_server, free_port

CODEC = Codec(SessionAsset, 2**27, 2**24, 1000)
IDS = ("s", "t")


class Node:
    """A cluster's node with a namespace whose slot is moving to another node."""

    def __init__(self, raw: Any, other: bytes) -> None:
        self.raw = raw
        self._other = other
        self._open()
        self._slot = raw.execute_command("CLUSTER KEYSLOT", "{orcs/0}:state")
        raw.script_load(scripts.WRITE.source)
        self._fill()
        self._pristine = {key: self.raw.dump(key) for key in self.raw.scan_iter()}

    def _open(self) -> None:
        namespace = Namespace("orcs", 1, b"same")
        self.sessions = Sessions(namespace, CODEC)
        self.saving = Saving(namespace, CODEC)

    def _fill(self) -> None:
        state = {"incarnation": "same", "revision": 0, "compacted": 0, "forgotten": 0}
        self.raw.hset("{orcs/0}:state", mapping=state)
        for id in (*IDS, "gone"):
            asset = SessionAsset(id=id)
            for n in range(3):
                asset.add_turn(ConversationTurn.user(str(n)))
            if id == "s":
                asset.metadata["labels"] = {"l": "1"}  # the only one of the index
            self.send(self.save(asset))
            self.send(self.commit(id, put={"a": b"1", "b1": b"1", "b2": b"1"}))
        self.send(self.sessions.delete("gone", None, None))

    def reset(self) -> None:
        """Make all as it was, and let the slot begin to move."""
        self._open()
        self._move("STABLE")
        self.raw.flushall()
        with self.raw.pipeline(transaction=False) as pipeline:
            for key, dumped in self._pristine.items():
                pipeline.restore(key, 0, dumped)
            pipeline.execute()
        self._move("MIGRATING", self._other)

    def arrive(self) -> None:
        """Let the slot stay after all."""
        self._move("STABLE")

    def _move(self, *how: bytes | str) -> None:
        self.raw.execute_command("CLUSTER SETSLOT", self._slot, *how)

    def commit(self, id: str, **changes: Any) -> Write:
        write = next(self.sessions.commit(id, CommitArguments(**changes), None, None, None, create=False))
        assert isinstance(write, Write)
        return write

    def save(self, asset: SessionAsset) -> Write:
        write = next(self.saving.save(asset))
        assert isinstance(write, Write)
        return write

    def edited(self, id: str) -> Any:
        """A save that drops the oldest turns."""
        (loaded,) = self.send(self.sessions.load(id))
        del loaded.asset.history.turns[:2]
        loaded.asset.add_turn(ConversationTurn.user("new"))
        return self.save(loaded.asset)

    def send(self, *requests: Request[Any]) -> list[Any]:
        """Send requests as a link does that has all of them at once; return a result or an error for each."""
        commands = [request.commands() for request in requests]
        replies: list[Any] = []
        for batch in batches(itertools.chain.from_iterable(commands)):
            try:
                reply = self.raw.execute_command(*batch.frame())
            except redis.ResponseError as error:
                reply = hiredis.ReplyError(f"{type(error).__name__} {error}")
            replies += batch.split(reply)
        results = []
        for request, asked in zip(requests, commands, strict=True):
            own, replies = replies[: len(asked)], replies[len(asked) :]
            try:
                results.append(request.decode(own))
            except (StorageError, AttemptError) as error:
                results.append(error)
        return results


@pytest.fixture
def node(start_server: Callable[..., Server]) -> Node:
    options = ("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no", "--cluster-port")
    servers = [start_server(*options, str(free_port())) for _ in range(2)]
    raw: Any
    other: Any
    raw, other = (server.raw() for server in servers)
    raw.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
    raw.execute_command("CLUSTER MEET", "127.0.0.1", servers[1].port, servers[1].arguments[-1])
    id = other.execute_command("CLUSTER MYID")
    end = time.monotonic() + 20
    while True:
        with contextlib.suppress(redis.RedisError):
            if id.decode() in str(raw.execute_command("CLUSTER NODES")) and raw.set("ready", 1):
                break
        assert time.monotonic() < end, "there is no cluster"
        time.sleep(0.01)
    raw.flushall()
    return Node(redis.Redis(port=servers[0].port, single_connection_client=True), id)


def asset(id: str, turns: int) -> SessionAsset:
    made = SessionAsset(id=id)
    for n in range(turns):
        made.add_turn(ConversationTurn.user(f"new {n}"))
    return made


def turn() -> ConversationTurn:
    return ConversationTurn.user("new")


# What can make a key vanish, and what uses it then.
WRITES: dict[str, Callable[[Node, str], Request[Any]]] = {
    "append": lambda node, name: node.sessions.append(name, [turn()], None, None),
    "pop all": lambda node, name: node.commit(name, pop=3),
    "pop all, append": lambda node, name: node.commit(name, pop=9, append=[turn()]),
    "truncate": lambda node, name: node.sessions.truncate(name, 0, None, None),
    "truncate, append": lambda node, name: node.commit(name, truncate=0, append=[turn(), turn()]),
    "save over": lambda node, name: node.save(asset(name, 2)),
    "save nothing over": lambda node, name: node.save(asset(name, 0)),
    "edit": lambda node, name: node.edited(name),
    "drop all": lambda node, name: node.commit(name, drop=["*"]),
    "drop all, put": lambda node, name: node.commit(name, drop=["*"], put={"new": b"1"}),
    "drop each": lambda node, name: node.commit(name, drop=["a", "b1", "b2", "c", "b*", "*"]),
    "put": lambda node, name: node.commit(name, put={"b1": b"2"}, put_new={"c": b"1"}),
    "unlabel": lambda node, name: node.commit(name, labels={"l": None}),
    "label": lambda node, name: node.commit(name, labels={"m": "1"}),
    "delete": lambda node, name: node.sessions.delete(name, None, None),
}


def check(node: Node, name: str) -> None:
    """Everything that is there is whole: sessions, their records, the indexes."""
    node.arrive()
    raw = node.raw
    for id in IDS:
        (loaded,) = node.send(node.sessions.load(id))
        if raw.exists(f"{{orcs/0}}:session:{id}"):
            assert isinstance(loaded, Versioned), (name, loaded)
            assert raw.zscore("{orcs/0}:changes", id) == loaded.revision, name
            assert raw.zscore("{orcs/0}:updated", id) is not None, name
            labelled = any(member.endswith(id.encode()) for member in raw.zrange("{orcs/0}:labels", 0, -1))
            assert labelled == bool(loaded.asset.metadata.get("labels")), name
        else:
            assert raw.zscore("{orcs/0}:deleted", id) is not None, name
        names = raw.zrange(f"{{orcs/0}}:names:{id}", 0, -1)
        assert sorted(raw.hkeys(f"{{orcs/0}}:records:{id}")) == names, name


@every_server
def test_writes_alone(node: Node) -> None:
    """Every kind of write is done: no key of those that it found vanishes and is used again."""
    for name, write in WRITES.items():
        node.reset()
        (result,) = node.send(write(node, "s"))
        assert not isinstance(result, Exception), (name, result)
        check(node, name)


@every_server
def test_writes_together(node: Node) -> None:
    """Of two or three that are to go out at once each is done, or refused since a key is missing before it begins."""
    done = 0
    for names in (*itertools.product(WRITES, repeat=2), ("unlabel", "unlabel", "label"), ("put", "drop all", "put")):
        for ids in ((IDS[0],) * 3, IDS + IDS):
            node.reset()
            requests = [WRITES[name](node, id) for name, id in zip(names, ids, strict=False)]
            results = node.send(*requests)
            for result in results:
                refused = isinstance(result, (ConflictError, NotFoundError)) or "TryAgain" in str(result)
                assert refused or not isinstance(result, Exception), (names, result)
                done += not refused
            check(node, f"{names} {ids}")
    assert done > 500


def test_what_goes_together() -> None:
    """A deletion goes alone; after what may empty a session's keys goes nothing of that session's."""
    prefix = CallPrefix("EVALSHA", b"digest", ("state",), ())
    plain, other = (ScriptCall(prefix, [key], []) for key in "so")
    emptying, deletion = ScriptCall(prefix, ["s"], [], empties=True), ScriptCall(prefix, ["d"], [], alone=True)

    def runs(*calls: ScriptCall) -> list[Any]:
        return [list(batch.commands) for batch in batches(calls)]

    assert runs(plain, emptying, other, other) == [[plain, emptying, other, other]]
    assert runs(emptying, other, plain, plain) == [[emptying, other], [plain, plain]]
    assert runs(emptying, emptying, other) == [[emptying], [emptying, other]]
    assert runs(plain, deletion, deletion, plain) == [[plain], [deletion], [deletion], [plain]]
