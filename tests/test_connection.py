"""What happens between a store and its server: connecting, waiting, breaking, refusing, closing."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import hiredis
import pytest
import redis
import redis.asyncio
import redis.asyncio.cluster
from redis.backoff import NoBackoff
from redis.retry import Retry

import orcs_redis
import orcs_redis.sync
from orcs_redis import (
    ConversationTurn,
    OutcomeUnknownError,
    PermissionDeniedError,
    SessionAsset,
    StorageError,
    StoreFullError,
    SyncMode,
    UnavailableError,
    UnsupportedServerError,
)
from orcs_redis.protocol.attempts import ConnectionLost
from orcs_redis.transport import embedded
from orcs_redis.transport.address import Address, EmbeddedFolder, FileFolder, MemoryName, parse_url
from orcs_redis.transport.clients import AsyncClientLink, BlockingClientLink, memory_client
from orcs_redis.transport.connection import Link
from orcs_redis.transport.sockets import SocketLink

from .conftest import Server, Threaded, every_server, free_port
from .faults.proxy import Proxy
from .support import until

SECRET = "s3cret"
PAYLOAD = "a payload that nobody else may read"
DEADLINE = 1.0
SLACK = 2.0  # seconds that a busy machine may add

StartServer: TypeAlias = Callable[..., Server]
Open: TypeAlias = Callable[..., Awaitable[Any]]
Answer: TypeAlias = Callable[[list[bytes]], bytes | None]

forms = pytest.mark.parametrize("way", ["async", "sync"])
ways = pytest.mark.parametrize("way", ["async", "sync", "async-injected", "sync-injected"])


def session(*contents: str, **fields: Any) -> SessionAsset:
    asset = SessionAsset(**fields)
    for content in contents or (PAYLOAD,):
        asset.add_turn(ConversationTurn.user(content))
    return asset


def turn(content: str = PAYLOAD) -> ConversationTurn:
    return ConversationTurn.user(content)


def injected(way: str, port: int, **options: Any) -> Any:
    """A client with redis-py's own retries on."""
    kind: Any = redis.asyncio.Redis if way.startswith("async") else redis.Redis
    return kind(port=port, **options)


@pytest.fixture
async def open_store() -> AsyncIterator[Open]:
    """Open stores in either form, over a URL or an injected client, and close them with the test."""
    opened: list[Any] = []
    clients: list[Any] = []

    async def open_one(way: str, where: Server | str | int, **options: Any) -> Any:
        url: str | None = where if isinstance(where, str) else None
        port = where.port if isinstance(where, Server) else where
        if isinstance(port, int):
            if way.endswith("injected"):
                options["client"] = injected(way, port)
                clients.append(options["client"])
            else:
                url = f"redis://127.0.0.1:{port}"
        options.setdefault("deadline", 5.0)
        if way.startswith("async"):
            store: Any = await orcs_redis.RedisSessionStore.connect(url, **options)
        else:
            connect: Any = orcs_redis.sync.RedisSessionStore.connect
            store = Threaded(await asyncio.to_thread(connect, url, **options))
        opened.append(store)
        return store

    yield open_one
    for store in opened:
        await store.aclose()
    for client in clients:
        closed = client.aclose() if isinstance(client, redis.asyncio.Redis) else client.close()
        if closed is not None:
            await closed


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a test does: nothing secret is logged, and asyncio has nothing to complain about."""
    caplog.set_level(logging.DEBUG)
    yield
    assert SECRET not in caplog.text
    assert PAYLOAD not in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and everything that is chained to it."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        current = pending.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            yield current
            pending += [current.__cause__, current.__context__]


def told(error: BaseException) -> str:
    """All that an error and what is chained to it say."""
    return "\n".join(f"{link} {link!r}" for link in chain(error))


async def fails(kind: type[BaseException], call: Awaitable[Any], *, within: float = DEADLINE) -> BaseException:
    """Expect an error in time that tells nothing secret."""
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        await call
    assert time.monotonic() - began < within + SLACK
    assert type(caught.value) is kind
    assert SECRET not in told(caught.value)
    assert PAYLOAD not in told(caught.value)
    return caught.value


def dump(raw: redis.Redis) -> dict[bytes, Any]:
    """Everything on a server."""
    keys: Any = raw.keys()
    return {key: raw.dump(key) for key in keys}


def acl(raw: Any, *words: str) -> None:
    """Change what users may do."""
    raw.execute_command("ACL", *words)


def connections(raw: redis.Redis) -> list[dict[str, str]]:
    """The store's own connections on a server."""
    listed: Any = raw.client_list()
    return [client for client in listed if client["name"] == "orcs-redis"]


class Between:
    """A server in threads that answers commands itself (`answer` returns RESP) or passes them on (it returns None)."""

    def __init__(self, answer: Answer, port: int | None = None) -> None:
        self._answer = answer
        self._upstream = port
        self._sockets: list[socket.socket] = []
        self.opened = 0  # connections
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.opened += 1
                self._sockets.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.enter_context(client)
            upstream = None
            if self._upstream is not None:
                upstream = stack.enter_context(socket.create_connection(("127.0.0.1", self._upstream)))
            reader = hiredis.Reader()
            while data := client.recv(65536):
                reader.feed(data)
                while (command := reader.gets()) is not False:
                    reply = self._answer(command)
                    if reply is None:
                        assert upstream is not None
                        reply = self._ask(upstream, command)
                    client.sendall(reply)

    @staticmethod
    def _ask(upstream: socket.socket, command: list[bytes]) -> bytes:
        upstream.sendall(hiredis.pack_command(tuple(command)))  # type: ignore[arg-type]
        more = object()
        reader, reply = hiredis.Reader(notEnoughData=more), b""
        while reader.gets() is more:
            data = upstream.recv(65536)
            if not data:
                raise ConnectionError
            reader.feed(data)
            reply += data
        return reply

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in self._sockets:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def between() -> Iterator[Callable[..., Between]]:
    """Start servers that are made of an answer."""
    servers: list[Between] = []

    def start(answer: Answer, port: int | None = None) -> Between:
        servers.append(Between(answer, port))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


class Endpoint:
    """An address behind which the server changes: a forwarder that leaves the connections open that it has."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.slow = False  # whether what clients send passes at 3 MB a second
        self.accepted = 0
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.accepted += 1
                server = socket.create_connection(("127.0.0.1", self.target))
                self._sockets += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=(*pair, pair[0] is client), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(32768):
                if up and self.slow:
                    time.sleep(0.01)
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for one in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.fixture
def endpoint() -> Iterator[Callable[[int], Endpoint]]:
    """Start endpoints."""
    endpoints: list[Endpoint] = []

    def start(target: int) -> Endpoint:
        endpoints.append(Endpoint(target))
        return endpoints[-1]

    yield start
    for each in endpoints:
        each.close()


# Nobody there


@ways
async def test_no_server(open_store: Open, way: str) -> None:
    """Without a server, opening a store ends with the deadline, not before there was time for several attempts."""
    began = time.monotonic()
    await fails(UnavailableError, open_store(way, free_port(), deadline=0.7), within=0.7)
    assert time.monotonic() - began > 0.7 - 0.35
    await fails(UnavailableError, open_store(way, free_port(), deadline=0.2), within=0.2)


@ways
async def test_killed_and_started_again(start_server: StartServer, open_store: Open, way: str) -> None:
    """While its server is down a store says so in time, and it works again as soon as the server does."""
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    store = await open_store(way, server, deadline=DEADLINE)
    asset = session()
    await store.save(asset)
    server.kill()
    await fails(UnavailableError, store.load(asset.id))
    await fails(UnavailableError, store.append(asset.id, turn()))
    assert store.sync_status().mode is SyncMode.ERROR
    assert PAYLOAD not in repr(store)
    server.start()
    assert (await store.load(asset.id)).history == asset.history
    assert store.sync_status().mode is SyncMode.ONLINE
    await store.append(asset.id, turn())


@ways
async def test_restart_while_tasks_wait(start_server: StartServer, open_store: Open, way: str) -> None:
    """Writers that wait while the server restarts succeed, each once."""
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    store = await open_store(way, server, deadline=20.0)
    asset = session("first")
    await store.save(asset)
    server.kill()
    tasks = [asyncio.ensure_future(store.append(asset.id, turn(str(n)))) for n in range(5)]
    await until(lambda: store.sync_status().pending_uploads == 5)
    server.start()
    await asyncio.gather(*tasks)
    contents = [turn.content for turn in await store.turns(asset.id)]
    assert sorted(contents) == ["0", "1", "2", "3", "4", "first"]


@ways
async def test_hung_server(start_server: StartServer, open_store: Open, way: str) -> None:
    """Of a server that hangs a write's outcome is unknown, a read is unavailable; both in time."""
    server = start_server()
    store = await open_store(way, server, deadline=DEADLINE)
    asset = session()
    await store.save(asset)
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    # Not both at once: a blocking store has one connection open, and what doesn't get it is not sent.
    await fails(OutcomeUnknownError, store.append(asset.id, turn()))
    # What is tried only now was certainly not sent: no connection can be had.
    await fails(UnavailableError, store.append(asset.id, turn()))
    await fails(UnavailableError, open_store(way, server, deadline=DEADLINE))
    server.process.send_signal(signal.SIGCONT)
    await store.append(asset.id, turn("last"))
    server.process.send_signal(signal.SIGSTOP)
    await fails(UnavailableError, store.load(asset.id))
    server.process.send_signal(signal.SIGCONT)
    contents = [turn.content for turn in await store.turns(asset.id)]
    assert contents in ([PAYLOAD, "last"], [PAYLOAD, PAYLOAD, "last"])


@ways
async def test_loading_server(
    start_server: StartServer, between: Callable[..., Between], open_store: Open, way: str
) -> None:
    """A server that is still loading is waited for; if it takes too long, it is unavailable."""
    server = start_server()
    refusals = 4

    def answer(command: list[bytes]) -> bytes | None:
        nonlocal refusals
        if command[0].upper() in (b"HELLO", b"CLIENT", b"SELECT") or not refusals:
            return None
        refusals -= 1
        return b"-LOADING Redis is loading the dataset in memory\r\n"

    port = between(answer, server.port).port
    store = await open_store(way, port)
    assert refusals == 0
    asset = session()
    await store.save(asset)
    refusals = 3
    await store.append(asset.id, turn())
    assert len(await store.turns(asset.id)) == 2
    hasty = await open_store(way, port, deadline=DEADLINE)
    refusals = 10**6
    await fails(UnavailableError, hasty.append(asset.id, turn()))
    await fails(UnavailableError, hasty.load(asset.id))
    refusals = 0
    assert len(await store.turns(asset.id)) == 2


# Lost answers


@ways
async def test_lost_answers_are_not_doubled(
    start_server: StartServer, between: Callable[..., Between], open_store: Open, way: str
) -> None:
    """A write whose answer was lost is repeated, and applied once; also by a client that retries by itself."""
    server = start_server()
    lose, arrived = 0, 0
    raw: Any = server.raw()

    def answer(command: list[bytes]) -> bytes | None:
        nonlocal lose, arrived
        if lose and command[0] == b"EVALSHA":
            lose -= 1
            arrived += 1
            raw.execute_command(*command)
            raise ConnectionError
        return None

    port = between(answer, server.port).port
    store, hasty = await open_store(way, port), await open_store(way, port, deadline=DEADLINE)
    asset = session("first")
    await store.save(asset)
    lose = 2
    revision = await store.append(asset.id, turn("second"))
    assert arrived == 2
    assert [turn.content for turn in await store.turns(asset.id)] == ["first", "second"]
    assert (await store.load_versioned(asset.id)).revision == revision
    await hasty.load(asset.id)
    lose = 10**6
    await fails(OutcomeUnknownError, hasty.append(asset.id, turn("third")))
    lose = 0
    assert [turn.content for turn in await store.turns(asset.id)] == ["first", "second", "third"]


@ways
@pytest.mark.parametrize(
    "nonsense",
    [b"HTTP/1.1 400 Bad\r\n\r\n", b"%1\r\n*1\r\n:1\r\n:2\r\n", b"$9999999999\r\n"],
    ids=["http", "map", "long"],
)
async def test_nonsense(between: Callable[..., Between], open_store: Open, way: str, nonsense: bytes) -> None:
    """What is no Redis at all is an error of ours, in time."""
    server = between(lambda command: nonsense)
    with pytest.raises((UnavailableError, UnsupportedServerError)) as caught:
        await open_store(way, server.port, deadline=0.4)
    assert isinstance(caught.value, StorageError)


@ways
async def test_nonsense_later(
    start_server: StartServer, between: Callable[..., Between], open_store: Open, way: str
) -> None:
    """Nonsense on an open connection ends it: a read is tried again, a write's outcome is unknown."""
    server = start_server()
    broken = False

    def answer(command: list[bytes]) -> bytes | None:
        return b"nonsense\r\n" if broken and command[0] in (b"HGETALL", b"EVALSHA") else None

    port = between(answer, server.port).port
    store = await open_store(way, port)
    asset = session()
    await store.save(asset)
    hasty = await open_store(way, port, deadline=DEADLINE)
    broken = True
    await fails(UnavailableError, hasty.load(asset.id))
    await fails(OutcomeUnknownError, hasty.append(asset.id, turn()))
    broken = False
    assert (await store.load(asset.id)).history == asset.history


# Refusals


@ways
async def test_wrong_password(start_server: StartServer, open_store: Open, way: str) -> None:
    """A wrong password or none is denied at once, and is not repeated to anyone."""
    server = start_server("--requirepass", "right")
    at = f"127.0.0.1:{server.port}"
    if way.endswith("injected"):
        clients = [injected(way, server.port, **extra) for extra in ({}, {"password": SECRET}, {"password": "right"})]
        calls: list[tuple[str | None, dict[str, Any]]] = [(None, {"client": client}) for client in clients]
    else:
        calls = [(f"redis://{login}{at}", {}) for login in ("", f":{SECRET}@", ":right@")]
        calls[:0] = [(f"redis://somebody:{SECRET}@{at}", {})]
    form = way.removesuffix("-injected")
    for url, options in calls[:-1]:
        await fails(PermissionDeniedError, open_store(form, url, **options), within=DEADLINE)
    url, options = calls[-1]
    store = await open_store(form, url, **options)
    assert await store.list() == []
    for _, options in calls:
        if isinstance(client := options.get("client"), redis.asyncio.Redis):
            await client.aclose()
        elif client is not None:
            client.close()


@pytest.fixture(params=["redis", "valkey"])
def acl_server(
    request: pytest.FixtureRequest, start_server: StartServer, embedded_server: embedded.Attachment
) -> Iterator[tuple[str, redis.Redis]]:
    """A server's address, to be completed by a login, and its administrator."""
    if request.param == "redis":
        server = start_server()
        yield f"redis://LOGIN127.0.0.1:{server.port}", server.raw()
        return
    with redis.Redis(unix_socket_path=str(embedded_server.socket)) as raw:
        yield f"unix://LOGIN{embedded_server.socket}", raw
        raw.acl_deluser("limited")


def content(raw: redis.Redis, namespace: str) -> dict[bytes, Any]:
    return {key: value for key, value in dump(raw).items() if namespace.encode() in key}


@forms
@pytest.mark.parametrize(
    "rules",
    ["+@all -zadd", "+@all -publish", "+@all resetchannels", "+@all -evalsha", "+@all -hdel", "+@all -persist"],
)
async def test_missing_right(acl_server: tuple[str, redis.Redis], open_store: Open, way: str, rules: str) -> None:
    """Whoever lacks one right that writing takes writes nothing at all, but reads."""
    address, raw = acl_server
    namespace = f"acl-{random.randrange(10**9)}"
    asset = session()
    admin = await open_store(way, address.replace("LOGIN", ""), namespace=namespace)
    await admin.save(asset)
    acl(raw, "SETUSER", "limited", "reset", "on", f">{SECRET}", "~*", "&*", *rules.split())
    before = content(raw, namespace)
    store = await open_store(way, address.replace("LOGIN", f"limited:{SECRET}@"), namespace=namespace)
    for call in (
        store.save(session(id=asset.id)),
        store.save(session()),
        store.append(asset.id, turn()),
        store.delete(asset.id),
        store.update(asset.id, lambda asset: asset.metadata.update(x=1)),
    ):
        await fails(PermissionDeniedError, call)
    assert content(raw, namespace) == before
    assert await store.load(asset.id) == asset
    assert [meta.id for meta in await store.list()] == [asset.id]
    assert SECRET not in repr(store)


@every_server
@ways
async def test_no_right_to_create(start_server: StartServer, open_store: Open, way: str) -> None:
    """Where nothing is yet and nothing may be written, there is nothing to read, and nothing is written."""
    server = start_server()
    raw = server.raw()
    acl(raw, "SETUSER", "default", "-@write")
    store = await open_store(way, server)
    assert await store.list() == []
    await fails(PermissionDeniedError, store.save(session()))
    assert raw.dbsize() == 0


@every_server
@forms
async def test_reader(start_server: StartServer, open_store: Open, way: str) -> None:
    """A user who may only read can open, list, page and load."""
    server = start_server()
    raw = server.raw()
    asset = session()
    await (await open_store(way, server)).save(asset)
    rules = ["~*", "resetchannels", "-@all", "+@read", "+@connection", "+eval", "+evalsha"]
    acl(raw, "SETUSER", "reader", "on", f">{SECRET}", *rules)
    before = dump(raw)
    store = await open_store(way, f"redis://reader:{SECRET}@127.0.0.1:{server.port}")
    assert await store.load(asset.id) == asset
    assert await store.turns(asset.id) == asset.history.turns
    assert await store.exists(asset.id)
    assert [meta.id for meta in await store.list()] == [asset.id]
    assert [meta.id for meta in (await store.page(10)).items] == [asset.id]
    await fails(PermissionDeniedError, store.save(session(id=asset.id)))
    assert dump(raw) == before


@every_server
@ways
async def test_replica(start_server: StartServer, open_store: Open, way: str) -> None:
    """A replica serves reads, also while there is nothing yet; writes are unavailable there."""
    primary = start_server("--repl-diskless-sync-delay", "0")
    replica = start_server("--replicaof", "127.0.0.1", str(primary.port))
    raw = replica.raw()
    status: Callable[[], Any] = raw.info
    await until(lambda: status().get("master_link_status") == "up")
    early = await open_store(way, replica, deadline=DEADLINE)
    assert await early.list() == []
    asset = session()
    await fails(UnavailableError, early.save(asset))
    writer = await open_store(way, primary)
    await writer.save(asset)
    await until(lambda: raw.exists(f"{{orcs/0}}:session:{asset.id}"))
    assert await early.load(asset.id) == asset
    store = await open_store(way, replica, deadline=DEADLINE)
    assert await store.load(asset.id) == asset
    assert [meta.id for meta in await store.list()] == [asset.id]
    for call in (store.save(session()), store.append(asset.id, turn()), store.delete(asset.id)):
        await fails(UnavailableError, call)


@every_server
@ways
async def test_full_server(start_server: StartServer, open_store: Open, way: str) -> None:
    """A server without memory refuses writes whole, and still lets read and delete."""
    server = start_server()
    raw = server.raw()
    store = await open_store(way, server)
    assets = [session() for _ in range(3)]
    await store.save_many(assets)
    raw.config_set("maxmemory", 1)
    before = dump(raw)
    for call in (
        store.append(assets[0].id, turn()),
        store.save(session(id=assets[0].id)),
        store.save(session()),
        store.save(session(*map(str, range(100)))),
    ):
        error = await fails(StoreFullError, call)
        assert isinstance(error, StoreFullError)
    assert {key: value for key, value in dump(raw).items() if b":staging:" not in key} == before
    assert await store.load(assets[0].id) == assets[0]
    assert len(await store.list()) == 3
    assert len((await store.page(10)).items) == 3
    await store.delete(assets[2].id)
    assert len(await store.list()) == 2
    assert len(await (await open_store(way, server)).list()) == 2
    raw.config_set("maxmemory", 0)
    await store.append(assets[0].id, turn())


@every_server
@ways
async def test_disk_full(start_server: StartServer, open_store: Open, way: str) -> None:
    """A server that can't save to its disk takes no writes: it is unavailable for them, reads work."""
    server = start_server()
    raw = server.raw()
    store = await open_store(way, server, deadline=DEADLINE)
    asset = session()
    await store.save(asset)
    before = dump(raw)
    (server.folder / "dump.rdb").mkdir()  # which no snapshot can replace
    raw.config_set("save", "3600 1000000")
    raw.bgsave()
    status: Callable[[str], Any] = raw.info
    await until(lambda: status("persistence")["rdb_last_bgsave_status"] == "err")
    calls = store.append(asset.id, turn()), store.save(session()), store.delete(asset.id)
    await asyncio.gather(*(fails(UnavailableError, call) for call in calls))
    assert dump(raw) == before
    other = await open_store(way, server, deadline=DEADLINE)
    assert await other.load(asset.id) == asset
    raw.config_set("save", "")
    await store.append(asset.id, turn())


# The wrong server


@pytest.fixture
def pair(start_server: StartServer) -> tuple[Server, Server]:
    """A primary and its replica."""
    primary = start_server("--repl-diskless-sync-delay", "0")
    return primary, start_server("--replicaof", "127.0.0.1", str(primary.port))


def fail_over(primary: Server, replica: Server, at: Endpoint) -> None:
    """Promote the replica, have the endpoint lead there, and demote the primary, which follows nobody."""
    old: Any = primary.raw()
    new: Any = replica.raw()
    end = time.monotonic() + 10
    while True:  # WAIT would speak of its own connection's writes only
        there, here = new.info("replication"), old.info("replication")
        if there["master_link_status"] == "up" and there["slave_repl_offset"] >= here["master_repl_offset"]:
            break
        assert time.monotonic() < end
        time.sleep(0.01)
    new.execute_command("REPLICAOF", "NO", "ONE")
    at.target = replica.port
    old.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))


@ways
async def test_failover_behind_an_endpoint(
    pair: tuple[Server, Server], endpoint: Callable[[int], Endpoint], open_store: Open, way: str
) -> None:
    """Writes go on, each once, when an endpoint leads to the promoted replica and the old connection stays open."""
    at = endpoint(pair[0].port)
    store = await open_store(way, at.port)
    asset = session("first")
    await store.save(asset)
    fail_over(*pair, at)
    await asyncio.gather(*(store.append(asset.id, turn(str(n))) for n in range(20)))
    await store.save_many([session() for _ in range(3)])
    fresh = await open_store(way, pair[1])
    assert {turn.content for turn in await fresh.turns(asset.id)} == {"first", *map(str, range(20))}
    assert len(await fresh.turns(asset.id)) == 21
    assert len(await store.list()) == 4


@ways
async def test_reads_after_a_failover(
    pair: tuple[Server, Server], endpoint: Callable[[int], Endpoint], open_store: Open, way: str
) -> None:
    """A store that only reads notices within seconds that its server was demoted."""
    at = endpoint(pair[0].port)
    store = await open_store(way, at.port)
    asset = session("first")
    await store.save(asset)
    fail_over(*pair, at)
    await (await open_store(way, pair[1])).append(asset.id, turn("second"))
    end = time.monotonic() + 1 + SLACK
    while len(await store.turns(asset.id)) < 2:
        assert time.monotonic() < end, "stale"
        await asyncio.sleep(0.05)


@ways
async def test_watch_over_a_failover(
    pair: tuple[Server, Server], endpoint: Callable[[int], Endpoint], open_store: Open, way: str
) -> None:
    """Who waits for a change receives it from the promoted server, within about a heartbeat."""
    at = endpoint(pair[0].port)
    store = await open_store(way, at.port, heartbeat=1.0)
    asset = session("first")
    revision = await store.save(asset)
    waiting = asyncio.ensure_future(store.wait_for(asset.id, revision=revision + 2, timeout=30))
    raw: Any = pair[0].raw()
    await until(lambda: raw.pubsub_channels("*changes*"))
    fail_over(*pair, at)
    writer = await open_store(way, pair[1])
    await writer.append(asset.id, turn())
    promoted: Any = pair[1].raw()
    await until(lambda: promoted.pubsub_channels("*changes*"), 10)
    began = time.monotonic()
    assert await writer.append(asset.id, turn()) == await waiting
    assert time.monotonic() - began < 1 + SLACK


def refusing(text: str, *, item: bool) -> bytes:
    """An error as a script's whole reply, or as its answer to one operation."""
    return b"%s-%s\r\n" % (b"*1\r\n" if item else b"", text.encode())


@ways
@pytest.mark.parametrize(
    ("refusal", "leaves"),
    [
        (refusing("READONLY You can't write against a read only replica.", item=True), True),
        (refusing("READONLY You can't write against a read only replica.", item=False), True),
        (refusing("NOAUTH Authentication required.", item=True), True),
        (
            refusing("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", item=False),
            True,
        ),
        (
            refusing("MISCONF Redis is configured to save RDB snapshots, but it's currently unable to.", item=True),
            False,
        ),
        (refusing("NOREPLICAS Not enough good replicas to write.", item=False), False),
    ],
    ids=["READONLY", "READONLY of the script", "NOAUTH", "MASTERDOWN", "MISCONF", "NOREPLICAS"],
)
async def test_refusals_that_pass(
    start_server: StartServer, between: Callable[..., Between], open_store: Open, way: str, refusal: bytes, leaves: bool
) -> None:
    """A refusal that ends within the deadline is waited for, over a new connection where that can help."""
    server = start_server()
    refusals = 0

    def answer(command: list[bytes]) -> bytes | None:
        nonlocal refusals
        if command[0] != b"EVALSHA" or not refusals:
            return None
        refusals -= 1
        return refusal

    middle = between(answer, server.port)
    store = await open_store(way, middle.port)
    asset = session()
    await store.save(asset)
    opened, refusals = middle.opened, 4
    await store.append(asset.id, turn())
    assert refusals == 0
    assert (middle.opened > opened) is leaves
    assert len(await store.turns(asset.id)) == 2


@ways
@pytest.mark.parametrize("code", ["READONLY", "MISCONF"])
async def test_refusals_that_stay(
    start_server: StartServer, between: Callable[..., Between], open_store: Open, way: str, code: str
) -> None:
    """A refusal that does not end within the deadline is named then; nothing was written."""
    server = start_server()
    refuse = False

    def answer(command: list[bytes]) -> bytes | None:
        return refusing(f"{code} for now", item=True) if refuse and command[0] == b"EVALSHA" else None

    store = await open_store(way, between(answer, server.port).port, deadline=1.5)
    asset = session()
    await store.save(asset)
    refuse = True
    began = time.monotonic()
    error = await fails(UnavailableError, store.append(asset.id, turn()), within=1.5)
    assert time.monotonic() - began > 1.0
    assert code in str(error)
    refuse = False
    assert len(await store.turns(asset.id)) == 1


# Names and addresses


@pytest.fixture
def deaf() -> Iterator[int]:
    """A port whose listener swallows what would be a connection."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


Resolve: TypeAlias = Callable[[Callable[[], list[int]]], None]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Have the name server.test lead to ports of this machine."""
    real = socket.getaddrinfo

    def set_ports(ports: Callable[[], list[int]]) -> None:
        def lookup(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
            flags = kwargs.get("flags", 0)
            if host != "server.test" or flags & socket.AI_NUMERICHOST:
                return real(host, port, *args, **kwargs)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", each)) for each in ports()]

        monkeypatch.setattr(socket, "getaddrinfo", lookup)

    return set_ports


@forms
async def test_a_dead_address_among_others(
    start_server: StartServer, resolve: Resolve, deaf: int, open_store: Open, way: str
) -> None:
    """Of a name's addresses the ones that swallow or refuse connections hold nobody up."""
    server = start_server()
    for ports in ([deaf, server.port], [free_port(), server.port], [deaf, free_port(), deaf, server.port]):
        resolve(lambda ports=ports: ports)  # type: ignore[misc]  # bound now
        began = time.monotonic()
        store = await open_store(way, "redis://server.test", deadline=5.0)
        assert time.monotonic() - began < 0.5 + SLACK
        assert await store.list() == []
    resolve(lambda: [deaf, deaf])
    await fails(UnavailableError, open_store(way, "redis://server.test", deadline=DEADLINE))


@forms
async def test_a_slow_name_server(start_server: StartServer, resolve: Resolve, open_store: Open, way: str) -> None:
    """A name that is not resolved in time is unavailable in time, and can be cancelled."""
    server, gate = start_server(), threading.Event()

    def ports() -> list[int]:
        gate.wait(20)
        return [server.port]

    resolve(ports)
    await fails(UnavailableError, open_store(way, "redis://server.test", deadline=DEADLINE))
    if way == "async":
        opening = asyncio.ensure_future(open_store(way, "redis://server.test", deadline=20.0))
        await asyncio.sleep(0.05)
        opening.cancel()
        began = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert time.monotonic() - began < SLACK
    gate.set()


async def test_busy_default_executor(
    start_server: StartServer, embedded_server: embedded.Attachment, open_store: Open, tmp_path: Path
) -> None:
    """Nothing waits for the loop's own threads: neither a name, nor an embedded server, nor files."""
    server, gate = start_server(), threading.Event()
    threads = ThreadPoolExecutor(1)
    asyncio.get_running_loop().set_default_executor(threads)
    threads.submit(gate.wait, 20)
    try:
        async with asyncio.timeout(3 + SLACK):
            for url in (f"redis://localhost:{server.port}", f"embedded://{embedded_server.folder}"):
                assert await (await open_store("async", url, deadline=3)).ping() > 0
            async with orcs_redis.open_store(f"file://{tmp_path}") as files:
                await files.save(session())
                assert len(await files.list()) == 1
    finally:
        gate.set()


@ways
async def test_reasons(start_server: StartServer, open_store: Open, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error says why there is no connection; what can't change is not tried again."""
    error = await fails(UnavailableError, open_store(way, free_port(), deadline=0.3))
    assert "refused" in str(error)
    if way.endswith("injected"):
        return
    error = await fails(UnavailableError, open_store(way, "unix:///nowhere/redis.sock", deadline=0.3))
    assert "/nowhere/redis.sock: No such file" in str(error)
    error = await fails(UnavailableError, open_store(way, f"unix:///{'x' * 200}.sock", deadline=9.0))
    assert "too long" in str(error)

    def unknown(*args: Any, **kwargs: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = await fails(UnavailableError, open_store(way, "redis://no.such.name", deadline=0.3))
    assert "no.such.name:6379: Name or service not known" in str(error)


@ways
async def test_a_limit_on_the_size_of_requests(
    start_server: StartServer, between: Callable[..., Between], open_store: Open, way: str
) -> None:
    """What is large and breaks the connection each time is sent a few times, and the error names the likely cause."""
    server, sent = start_server(), 0

    def answer(command: list[bytes]) -> bytes | None:
        nonlocal sent
        if sum(map(len, command)) > 1_000_000:
            sent += 1
            raise ConnectionError
        return None

    store = await open_store(way, between(answer, server.port).port, deadline=2.0)
    asset = session()
    await store.save(asset)
    error = await fails(OutcomeUnknownError, store.append(asset.id, turn("x" * 2_000_000)), within=2.0)
    assert "does the server limit the size of requests" in str(error)
    assert 2 <= sent <= 6
    await store.append(asset.id, turn())


# Servers that won't do

_HELLO = (
    b"%%7\r\n+server\r\n+%s\r\n+version\r\n+%s\r\n+proto\r\n:3\r\n+id\r\n:1\r\n"
    b"+mode\r\n+%s\r\n+role\r\n+master\r\n+modules\r\n*0\r\n"
)


@ways
@pytest.mark.parametrize(
    "hello",
    [
        _HELLO % (b"redis", b"6.2.0", b"standalone"),
        _HELLO % (b"redis", b"7.2.0", b"cluster"),
        b"-ERR unknown command 'HELLO', with args beginning with: '3' 'AUTH' 'default' '%s'\r\n" % SECRET.encode(),
        b"-NOPROTO unsupported protocol version\r\n",
        b"+OK\r\n",
        b"$-1\r\n",
        b":5\r\n",
        b"*1\r\n:1\r\n",
    ],
    ids=["6.2", "cluster", "no HELLO", "no RESP3", "OK", "null", "number", "odd"],
)
async def test_unsupported_server(between: Callable[..., Between], open_store: Open, way: str, hello: bytes) -> None:
    """An old server, a cluster's node, and what is no Redis, are refused at once."""

    def answer(command: list[bytes]) -> bytes:
        return {b"HELLO": hello, b"HGETALL": b"*0\r\n"}.get(command[0].upper(), b"+OK\r\n")

    began = time.monotonic()
    with pytest.raises((UnsupportedServerError, UnavailableError)) as caught:
        await open_store(way, between(answer).port, deadline=DEADLINE)
    assert time.monotonic() - began < DEADLINE + SLACK
    assert SECRET not in told(caught.value)
    # redis-py itself stumbles over an answer that is none.
    assert type(caught.value) is UnsupportedServerError or (way.endswith("injected") and b" " not in hello)


@every_server
@ways
async def test_node_of_a_cluster(start_server: StartServer, open_store: Open, way: str) -> None:
    """A real node of a cluster is refused by name."""
    server = start_server("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    error = await fails(UnsupportedServerError, open_store(way, server))
    assert "cluster" in str(error)


@every_server
async def test_too_many_clients(start_server: StartServer, open_store: Open) -> None:
    """A server that takes no more connections is waited for."""
    server = start_server("--maxclients", "2")
    others = [redis.Redis(port=server.port) for _ in range(2)]
    for other in others:
        other.ping()
    for way in ("async", "sync"):
        await fails(UnavailableError, open_store(way, server, deadline=DEADLINE))
    opening = asyncio.ensure_future(open_store("async", server, deadline=10.0))
    await asyncio.sleep(0)
    for other in others:
        other.close()
    assert await (await opening).list() == []


# Injected clients


async def test_clients_that_cannot_work() -> None:
    """A client that decodes, and one of another form or kind, are refused before anything is asked of them."""
    connect: Any = orcs_redis.RedisSessionStore.connect
    blocking: Any = orcs_redis.sync.RedisSessionStore.connect
    with pytest.raises(ValueError, match="decode_responses"):
        await connect(client=redis.asyncio.Redis(port=1, decode_responses=True))
    with pytest.raises(ValueError, match="decode_responses"):
        blocking(client=redis.Redis(port=1, decode_responses=True))
    with pytest.raises(TypeError, match=r"redis\.asyncio\.Redis"):
        await connect(client=redis.Redis(port=1))
    with pytest.raises(TypeError, match=r"redis\.Redis"):
        blocking(client=redis.asyncio.Redis(port=1))
    with pytest.raises(TypeError):
        await connect(client=object())
    with pytest.raises(ValueError, match="not both"):
        await connect("redis://localhost", client=redis.asyncio.Redis(port=1))


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("way", ["async-injected", "sync-injected"])
async def test_client_stays_the_callers(start_server: StartServer, open_store: Open, way: str, protocol: int) -> None:
    """An injected client works before, between and after, as it was set."""
    server = start_server()
    client = injected(way, server.port, protocol=protocol, retry=Retry(NoBackoff(), 7), client_name="mine")

    async def ask(*command: str) -> Any:
        reply = client.execute_command(*command)
        return await reply if way.startswith("async") else reply

    before = dict(client.connection_pool.connection_kwargs), dict(vars(client))
    assert await ask("SET", "theirs", "1")
    module: Any = orcs_redis if way.startswith("async") else orcs_redis.sync
    connect = module.RedisSessionStore.connect
    store = await connect(client=client) if way.startswith("async") else Threaded(connect(client=client))
    asset = session()
    await store.save(asset)
    assert await ask("GET", "theirs") == b"1"
    assert await store.load(asset.id) == asset
    await store.aclose()
    assert await ask("GET", "theirs") == b"1"
    assert (dict(client.connection_pool.connection_kwargs), dict(vars(client))) == before
    assert client.get_retry().get_retries() == 7
    await fails(UnavailableError, store.load(asset.id))
    closed = client.aclose() if way.startswith("async") else client.close()
    if closed is not None:
        await closed
    raw = server.raw()
    listed: Any = raw.client_list
    await until(lambda: [each["name"] for each in listed()] == [""])


# Many at a time


@pytest.mark.parametrize("way", ["async", "async-injected"])
async def test_cancelling_disturbs_nobody(start_server: StartServer, open_store: Open, way: str) -> None:
    """While callers are cancelled at random, the others get their own replies, over the same connection."""
    server = start_server()
    store = await open_store(way, server)
    assets = [session(f"content {n}") for n in range(40)]
    await store.save_many(assets)
    raw = server.raw()
    before = connections(raw)
    chance = random.Random(7)

    async def one(n: int) -> None:
        asset = assets[n % len(assets)]
        match n % 4:
            case 0:
                assert await store.load(asset.id) == asset
            case 1:
                assert (await store.turns(asset.id, 0, 0))[0].content == asset.history.turns[0].content
            case 2:
                assert await store.exists(asset.id) is True
            case _:
                own = session(f"own {n}")
                assert (await store.save(own)) > 0
                assert await store.load(own.id) == own

    for _ in range(5):
        tasks = [asyncio.ensure_future(one(n)) for n in range(300)]
        chosen = chance.sample(tasks, 150)
        for start in range(0, 150, 10):
            await asyncio.sleep(chance.choice([0, 0, 0.001, 0.003]))
            for task in chosen[start : start + 10]:
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} <= {type(None), asyncio.CancelledError}
        assert sum(result is None for result in results) >= 150
    if way == "async":
        assert [client["id"] for client in connections(raw)] == [client["id"] for client in before]
        assert len(before) == 1


async def test_cancelled_while_connecting(start_server: StartServer, open_store: Open) -> None:
    """A connection that nobody waits for any more is kept for the next caller."""
    server = start_server()
    raw = server.raw()
    store = await open_store("async", server)
    asset = session()
    await store.save(asset)
    for _ in range(10):
        raw.client_kill_filter(_type="normal", skipme=True)
        await until(lambda: not connections(raw))
        await asyncio.sleep(0)
        tasks = [asyncio.ensure_future(store.load(asset.id)) for _ in range(10)]
        await asyncio.sleep(random.choice([0, 0, 0.0005]))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await store.load(asset.id) == asset
        assert len(connections(raw)) == 1


async def test_thousands_of_tasks_share_one_connection(start_server: StartServer, open_store: Open) -> None:
    """Five thousand tasks at once need one connection, and all get their answer."""
    server = start_server()
    store = await open_store("async", server, deadline=30.0)
    asset, other = session(), session()
    await store.save_many([asset, other])
    raw = server.raw()
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, len(await asyncio.to_thread(connections, raw)))
            await asyncio.sleep(0.1)

    watching = asyncio.ensure_future(watch())
    loads = (store.load(other.id) for _ in range(2500))
    appends = (store.append(asset.id, turn(str(n))) for n in range(2500))
    results = await asyncio.gather(*appends, *loads)
    watching.cancel()
    assert len(set(results[:2500])) == 2500
    assert len(await store.turns(asset.id)) == 2501
    assert most <= 1
    assert len(connections(raw)) == 1


async def test_sixteen_threads(start_server: StartServer) -> None:
    """A blocking store is shared by threads, of which each gets its own replies."""
    server = start_server()
    store = orcs_redis.sync.RedisSessionStore.connect(server.url)
    asset = session()
    store.save(asset)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            own = session(f"own {number}")
            for n in range(30):
                own.metadata["n"] = n
                store.save(own)
                assert store.load(own.id) == own
                store.append(asset.id, turn(f"{number}.{n}"))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert failures == []
    contents = collections.Counter(turn.content for turn in store.turns(asset.id))
    assert contents == collections.Counter([PAYLOAD, *(f"{a}.{b}" for a in range(16) for b in range(30))])
    assert len(connections(server.raw())) <= 16
    store.close()
    raw = server.raw()
    await until(lambda: not connections(raw))


@pytest.mark.parametrize("way", ["async", "async-injected"])
async def test_what_is_queued_is_not_sent(
    start_server: StartServer, endpoint: Callable[[int], Endpoint], open_store: Open, way: str
) -> None:
    """A call that is cancelled, or whose time is over, before it could be sent is never sent, and its error says so."""
    server = start_server()
    at = endpoint(server.port)
    store = await open_store(way, at.port, deadline=1.5)
    asset = session()
    await store.save(asset)
    at.slow = True
    large = asyncio.ensure_future(store.save(session(*["x" * 15_000_000] * 2)))
    await asyncio.sleep(0.1)
    cancelled = asyncio.ensure_future(store.append(asset.id, turn("cancelled")))
    await asyncio.sleep(0.1)
    cancelled.cancel()
    if way == "async":
        await fails(UnavailableError, store.append(asset.id, turn("late")), within=1.5)
    at.slow = False
    with contextlib.suppress(OutcomeUnknownError):
        await large
    await store.append(asset.id, turn("last"))
    assert [turn.content for turn in await store.turns(asset.id)] == [PAYLOAD, "last"]


@pytest.mark.parametrize("way", ["async", "async-injected"])
async def test_busy_loop(
    start_server: StartServer, endpoint: Callable[[int], Endpoint], open_store: Open, way: str
) -> None:
    """A connection is not given up as mute when it was this loop that was busy."""
    at = endpoint(start_server().port)
    store = await open_store(way, at.port, deadline=3.0)
    saving = asyncio.ensure_future(store.save(session("x" * 8_000_000)))
    await asyncio.sleep(0.001)
    accepted = at.accepted
    time.sleep(1.5)  # noqa: ASYNC251  # this is what is tested
    await saving
    assert at.accepted == accepted


@pytest.mark.parametrize("way", ["sync", "sync-injected"])
async def test_cap_on_connections(start_server: StartServer, way: str) -> None:
    """Threads wait for one of at most so many connections; an injected client's own cap counts."""
    server = start_server()
    raw = server.raw()
    kind: Any = redis.BlockingConnectionPool
    pool = kind(port=server.port, max_connections=3, client_name="orcs-redis")
    client = redis.Redis(connection_pool=pool)
    connect: Any = orcs_redis.sync.RedisSessionStore.connect
    store = connect(client=client) if way.endswith("injected") else connect(server.url, max_connections=3)
    asset = session()
    store.save(asset)
    with ThreadPoolExecutor(40) as threads:
        calls = [asyncio.wrap_future(threads.submit(store.append, asset.id, turn(str(n)))) for n in range(400)]
        done = asyncio.gather(*calls)
        most = 0
        while not done.done():
            most = max(most, len(await asyncio.to_thread(connections, raw)))
        assert len(set(await done)) == 400
    assert 1 < most <= 3
    store.close()
    client.close()
    with pytest.raises(ValueError, match="max_connections"):
        connect(server.url, max_connections=0)


async def test_no_connection_is_free(start_server: StartServer) -> None:
    """A thread that finds no connection free in time has sent nothing; those that wait get one in turn."""
    server = start_server()
    address = parse_url(server.url)
    assert isinstance(address, Address)
    link = SocketLink(address, 5.0, max_connections=1)

    def push(value: int, seconds: float) -> Any:
        command: Any = ("RPUSH", "list", str(value))
        return link.call([command], time.monotonic() + seconds)

    holding = asyncio.ensure_future(asyncio.to_thread(link.call, [("BLPOP", "hold", "0")], time.monotonic() + 5))
    await asyncio.sleep(0.05)
    with pytest.raises(ConnectionLost, match="1 connections were in use") as caught:
        await asyncio.to_thread(push, 0, 0.1)
    assert not caught.value.sent
    tasks = []
    for n in range(1, 6):
        tasks.append(asyncio.ensure_future(asyncio.to_thread(push, n, 5)))
        await asyncio.sleep(0.01)
    raw = server.raw()
    raw.rpush("hold", "x")
    await holding
    await asyncio.gather(*tasks)
    values: Any = raw.lrange("list", 0, -1)
    assert values == [b"1", b"2", b"3", b"4", b"5"]
    link.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the collector closes what was lost
def test_interrupted_calls_lose_no_connection(start_server: StartServer) -> None:
    """A signal handler that raises, wherever it strikes, is passed on, and connections remain usable."""

    class Limit(Exception):
        pass

    raised = 0

    def interrupt(*_: object) -> None:
        nonlocal raised
        raised += 1
        raise Limit

    server = start_server()
    before = signal.signal(signal.SIGALRM, interrupt)
    done, failures = threading.Event(), []
    try:
        with orcs_redis.sync.open_store(server.url, max_connections=2) as store:

            def others() -> None:
                try:
                    while not done.is_set():
                        store.exists("s")
                except BaseException as error:
                    failures.append(error)

            threads = [threading.Thread(target=others) for _ in range(3)]
            for thread in threads:
                thread.start()
            interrupted = 0
            while interrupted < 300:
                try:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00005, 0.002))
                    for _ in range(50):
                        store.exists("s")
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except Limit:
                    interrupted += 1
            done.set()
            for thread in threads:
                thread.join()
            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(store.exists, ["s"] * 100)) == [False] * 100
            assert 1 <= len(connections(server.raw())) <= 2
            assert raised - interrupted < 5  # Python itself drops what strikes while it collects
    finally:
        done.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert failures == []


@pytest.mark.parametrize("way", ["sync", "sync-injected"])
async def test_idle_connections_are_closed(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """After a burst of threads the connections that are not needed any more are closed."""
    server = start_server()
    raw = server.raw()
    client = redis.Redis(port=server.port, client_name="orcs-redis")
    connect: Any = orcs_redis.sync.RedisSessionStore.connect
    store = connect(client=client) if way.endswith("injected") else connect(server.url)
    asset = session()
    store.save(asset)
    with ThreadPoolExecutor(10) as threads:
        list(threads.map(lambda n: store.append(asset.id, turn(str(n))), range(200)))
    assert len(connections(raw)) > 1
    monkeypatch.setattr("orcs_redis.transport.sockets.IDLE", 0.1)
    await asyncio.sleep(0.2)
    for _ in range(2):  # the first takes the last that was used
        store.load(asset.id)
    await until(lambda: len(connections(raw)) == 1)
    store.close()
    client.close()


@ways
async def test_closing_waits(
    start_server: StartServer, between: Callable[..., Between], open_store: Open, way: str
) -> None:
    """What is in flight when a store is closed ends normally; what comes later is refused."""
    server = start_server()
    gate = threading.Event()
    gate.set()

    def answer(command: list[bytes]) -> bytes | None:
        if command[0] == b"EVALSHA":
            gate.wait()
        return None

    store = await open_store(way, between(answer, server.port).port, deadline=30.0)
    asset = session()
    await store.save(asset)
    gate.clear()
    count = 500 if way.startswith("async") else 3  # as many as there are threads
    tasks = [asyncio.ensure_future(store.append(asset.id, turn(str(n)))) for n in range(count)]
    await until(lambda: store.sync_status().pending_uploads == count)
    closing = asyncio.ensure_future(store.aclose())
    await until(lambda: store.sync_status().mode is SyncMode.OFFLINE)
    gate.set()
    assert len(set(await asyncio.gather(*tasks))) == count
    await closing
    for call in (store.load(asset.id), store.append(asset.id, turn()), store.list()):
        await fails(UnavailableError, call)
    await store.aclose()
    raw = server.raw()
    listed: Any = raw.client_list
    await until(lambda: len(listed()) == 1)


@pytest.mark.parametrize("way", ["async", "async-injected"])
async def test_cancelled_closing(
    start_server: StartServer, between: Callable[..., Between], open_store: Open, way: str
) -> None:
    """Closing that is cancelled while it waits leaves no connection open."""
    gate = threading.Event()
    gate.set()
    server = start_server()

    def answer(command: list[bytes]) -> bytes | None:
        if command[0] == b"EVALSHA":
            gate.wait(10)
        return None

    middle = between(answer, server.port)
    store = await open_store(way, middle.port, deadline=5.0)
    asset = session()
    await store.save(asset)
    waiting = asyncio.ensure_future(store.wait_for(asset.id, revision=9, timeout=9))
    gate.clear()
    writing = asyncio.ensure_future(store.append(asset.id, turn()))
    await asyncio.sleep(0.05)
    closing = asyncio.ensure_future(store.aclose())
    await asyncio.sleep(0.05)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    began = time.monotonic()
    with pytest.raises(OutcomeUnknownError):
        await writing
    with pytest.raises(UnavailableError):
        await waiting
    gate.set()
    raw = server.raw()
    listed: Any = raw.client_list
    await until(lambda: len(listed()) == 1)
    assert time.monotonic() - began < 1 + SLACK


@ways
async def test_closed_links_open_nothing(start_server: StartServer, open_store: Open, way: str) -> None:
    """After closing, neither a link nor a wait connects again or starts a thread."""
    server = start_server()
    raw = server.raw()
    store = await open_store(way, server)
    asset = session()
    await store.save(asset)
    await store.aclose()
    listed: Any = raw.client_list
    await until(lambda: len(listed()) == 1)
    threads = threading.active_count()
    await fails(UnavailableError, store.wait_for(asset.id, revision=9, timeout=9))
    link = store._driver.link

    async def call() -> None:
        await link.call([("PING",)], time.monotonic() + 5)

    await fails(UnavailableError, call())
    assert threading.active_count() <= threads + way.startswith("sync")  # a thread of this test's own
    assert len(listed()) == 1


@ways
async def test_hook_at_each_connecting(start_server: StartServer, way: str) -> None:
    """A link calls its hook once for each command connection, before a call goes over it."""
    server = start_server()
    raw = server.raw()
    address = parse_url(server.url)
    assert isinstance(address, Address)
    calls: list[int] = []
    status: Callable[[str], Any] = raw.info

    def hook() -> None:
        calls.append(status("commandstats").get("cmdstat_exists", {"calls": 0})["calls"])

    client = injected(way, server.port)
    links: dict[str, Callable[[], Any]] = {
        "async": lambda: Link(address, 5.0, on_connect=hook),
        "sync": lambda: SocketLink(address, 5.0, on_connect=hook),
        "async-injected": lambda: AsyncClientLink(client, 5.0, on_connect=hook),
        "sync-injected": lambda: BlockingClientLink(client, 5.0, on_connect=hook),
    }
    link = links[way]()

    async def ask() -> None:
        replies = link.call([("EXISTS", "x")], time.monotonic() + 5)
        assert (await replies if way.startswith("async") else replies) == [0]

    for _ in range(2):
        await ask()
        await ask()
        raw.client_kill_filter(_type="normal", skipme=True)
        listed: Any = raw.client_list
        await until(lambda listed=listed: len(listed()) == 1)  # type: ignore[misc]  # bound now
        await asyncio.sleep(0.01)
    assert calls == [0, 2]
    closed = link.close()
    if closed is not None:
        await closed
    closed = client.aclose() if way.startswith("async") else client.close()
    if closed is not None:
        await closed


_NO_POLL = """
    import select, sys
    del select.poll, select.epoll  # as eventlet's monkey-patching does
    from orcs_redis import ConversationTurn, SessionAsset
    from orcs_redis.sync import open_store

    with open_store(sys.argv[1], deadline=2) as store:
        store.save(SessionAsset(id="s"))
        store.append("s", ConversationTurn.user("x"))
        assert len(store.load("s").history.turns) == 1
    print("done")
"""


async def test_without_poll(start_server: StartServer) -> None:
    """The blocking store works where `select.poll` was taken away."""
    server = start_server()
    run = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", textwrap.dedent(_NO_POLL), server.url],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.stdout == "done\n", run.stderr


# Subscriptions


@pytest.mark.parametrize(
    ("way", "server"),
    [
        *((way, "redis") for way in ("async", "sync", "async-injected", "sync-injected")),
        ("async", "memory"),
        ("sync", "memory"),
    ],
)
async def test_a_bad_message(start_server: StartServer, open_store: Open, way: str, server: str) -> None:
    """A message that is none of ours does not end a subscription."""
    raw: Any
    if server == "memory":
        name = f"bad-{random.randrange(10**9)}"
        stores = [await open_store(way, f"memory://{name}") for _ in range(2)]
        raw = memory_client(name, "FakeRedis")
    else:
        where = start_server()
        stores = [await open_store(way, where) for _ in range(2)]
        raw = where.raw()
    asset = session()
    revision = await stores[0].save(asset)
    waiting = asyncio.ensure_future(stores[1].wait_for(asset.id, revision=revision + 1, timeout=9))
    await until(lambda: raw.pubsub_channels("*changes*"))
    (channel,) = raw.pubsub_channels("*changes*")
    for message in (b"\x95\x02\x01\x00\xc4\x01x\xa2\xff\xfe", b"", b"nonsense", b"\xc1"):
        raw.publish(channel, message)
    await asyncio.sleep(0.3)  # its reader has them
    assert raw.pubsub_channels("*changes*") == [channel]
    began = time.monotonic()
    assert await stores[0].append(asset.id, turn()) == await waiting
    assert time.monotonic() - began < SLACK


@ways
async def test_denied_subscription(
    start_server: StartServer, open_store: Open, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a right to the channel changes are looked for each second; it is logged once, and rarely tried again."""
    server = start_server()
    raw = server.raw()
    writer = await open_store("async", server)
    asset = session()
    revision = await writer.save(asset)
    acl(raw, "SETUSER", "deaf", "reset", "on", f">{SECRET}", "~*", "resetchannels", "+@all")
    login = {"username": "deaf", "password": SECRET}
    client = injected(way, server.port, **login) if way.endswith("injected") else None
    url = None if client else f"redis://deaf:{SECRET}@127.0.0.1:{server.port}"
    store = await open_store(way.removesuffix("-injected"), url, client=client)
    received: Callable[[str], Any] = raw.info
    before = received("stats")["total_connections_received"]
    waiting = asyncio.ensure_future(store.wait_for(asset.id, revision=revision + 1, timeout=9))
    await asyncio.sleep(3.3)
    assert received("stats")["total_connections_received"] - before <= 3
    assert await writer.append(asset.id, turn()) == await asyncio.wait_for(waiting, 2)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "nothing is received of changes" in warnings[0].getMessage()
    caplog.clear()
    await store.aclose()
    if client is not None:
        closed = client.aclose() if way.startswith("async") else client.close()
        if closed is not None:
            await closed


# Where a store may not be used

_FORK = """
    import asyncio, os, sys
    import redis, redis.asyncio
    from orcs_redis import ConversationTurn, RedisSessionStore, SessionAsset
    from orcs_redis.sync import open_store

    asset = SessionAsset()

    def reap(child):
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    async def colour_async():
        client = redis.asyncio.Redis.from_url(sys.argv[1]) if sys.argv[2].endswith("injected") else None
        store = await RedisSessionStore.connect(None if client else sys.argv[1], client=client, deadline=2)
        await store.save(asset)
        child = os.fork()
        if not child:
            try:
                await store.load(asset.id)
            except RuntimeError as error:
                assert "fork" in str(error) or "event loop" in str(error)
                await store.aclose()
                os._exit(7)
            os._exit(1)
        reap(child)
        for _ in range(20):
            await store.append(asset.id, ConversationTurn.user("x"))
        assert len((await store.load(asset.id)).history.turns) == 20
        await store.aclose()

    def colour_sync():
        client = redis.Redis.from_url(sys.argv[1]) if sys.argv[2].endswith("injected") else None
        with open_store(None if client else sys.argv[1], client=client, deadline=2) as store:
            store.save(asset)
            child = os.fork()
            if not child:
                try:
                    store.load(asset.id)
                except RuntimeError as error:
                    assert "fork" in str(error)
                    store.close()
                    os._exit(7)
                os._exit(1)
            reap(child)
            for _ in range(20):
                store.append(asset.id, ConversationTurn.user("x"))
            assert len(store.load(asset.id).history.turns) == 20

    colour_sync() if sys.argv[2].startswith("sync") else asyncio.run(colour_async())
    print("done")
"""


@ways
async def test_fork(start_server: StartServer, way: str) -> None:
    """In a forked child the store refuses and can be closed, and the parent's goes on undisturbed."""
    server = start_server()
    run = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", textwrap.dedent(_FORK), server.url, way],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.stdout == "done\n", run.stderr


async def test_second_event_loop(start_server: StartServer, open_store: Open) -> None:
    """In another event loop the store refuses, and goes on in its own."""
    server = start_server()
    store = await open_store("async", server)
    asset = session()
    await store.save(asset)

    def elsewhere() -> None:
        for call in (store.load, store.exists, store.delete):
            with pytest.raises(RuntimeError, match="event loop"):
                asyncio.run(call(asset.id))

    await asyncio.to_thread(elsewhere)
    assert await store.load(asset.id) == asset


# What a connection survives


@ways
async def test_connection_closed_by_the_server(start_server: StartServer, open_store: Open, way: str) -> None:
    """After the server closed the connection the next call works, also a write."""
    server = start_server()
    raw = server.raw()
    store = await open_store(way, server)
    asset = session()
    await store.save(asset)
    listed: Any = raw.client_list
    for _ in range(3):
        raw.client_kill_filter(_type="normal", skipme=True)
        await until(lambda: len(listed()) == 1)
        await store.append(asset.id, turn())
    assert len(await store.turns(asset.id)) == 4
    assert store.sync_status().mode is SyncMode.ONLINE


@forms
async def test_idle_connections_are_closed_by_the_server(start_server: StartServer, open_store: Open, way: str) -> None:
    """With `timeout 1` on the server, an idle store works on."""
    server = start_server("--timeout", "1")
    store = await open_store(way, server)
    asset = session()
    await store.save(asset)

    def gone() -> bool:
        with redis.Redis(port=server.port) as raw:
            return not connections(raw)

    await until(gone)
    await store.append(asset.id, turn())
    assert len(await store.turns(asset.id)) == 2


@ways
async def test_scripts_are_flushed(start_server: StartServer, open_store: Open, way: str) -> None:
    """A server that has forgotten the scripts gets them again."""
    server = start_server()
    raw = server.raw()
    store = await open_store(way, server)
    asset = session(*map(str, range(50)))
    for _ in range(3):
        raw.script_flush()
        await store.save(session(*map(str, range(50)), id=asset.id))
        raw.script_flush()
        await asyncio.gather(*(store.append(asset.id, turn()) for _ in range(20)))
    assert len(await store.turns(asset.id)) == 70
    raw.script_flush()
    assert len((await store.page(10)).items) == 1


@every_server
@forms
async def test_database(start_server: StartServer, open_store: Open, way: str) -> None:
    """The URL chooses the database; the protocol is RESP3."""
    server = start_server()
    store = await open_store(way, f"redis://127.0.0.1:{server.port}/2")
    asset = session()
    await store.save(asset)
    assert await store.load(asset.id) == asset
    assert [meta.id for meta in (await store.page(1)).items] == [asset.id]
    raw = server.raw()
    assert {(client["resp"], client["db"]) for client in connections(raw)} == {("3", "2")}
    assert raw.dbsize() == 0


@forms
async def test_large_values(start_server: StartServer, open_store: Open, way: str) -> None:
    """Values larger than any buffer go through, beside small ones."""
    server = start_server()
    store = await open_store(way, server)
    large = session("x" * 8_000_000, "y" * 8_000_000)
    small = session()
    await asyncio.gather(store.save(large), *(store.save(small) for _ in range(4)))
    loaded = await asyncio.gather(store.load(large.id), *(store.load(small.id) for _ in range(4)))
    assert loaded == [large, small, small, small, small]


# TLS


TLS = Path(__file__).parent / "tls"


@pytest.fixture
def behind_tls(start_server: StartServer) -> Iterator[tuple[Server, int]]:
    """A server with the password "right", and the port of a proxy that speaks TLS for it."""
    server = start_server("--requirepass", "right")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(TLS / "server.crt", TLS / "server.key")
    with Proxy(server.port, tls) as proxy:
        yield server, proxy.port


@forms
async def test_tls(behind_tls: tuple[Server, int], resolve: Resolve, open_store: Open, way: str) -> None:
    """rediss:// works with the right authority, and with no other."""
    server, port = behind_tls
    url = f"rediss://:right@localhost:{port}?ssl_ca_certs={TLS}"
    store = await open_store(way, f"{url}/ca.crt")
    asset = session("x" * 1_000_000)
    await store.save(asset)
    assert await store.load(asset.id) == asset
    await asyncio.gather(*(store.append(asset.id, turn()) for _ in range(20)))
    assert len(await store.turns(asset.id)) == 21
    refused = await fails(UnavailableError, open_store(way, f"{url}/other.crt", deadline=9.0))
    assert "certificate refused: " in str(refused)
    resolve(lambda: [port])
    other_name = f"{url}/ca.crt".replace("localhost", "server.test")
    refused = await fails(UnavailableError, open_store(way, other_name, deadline=9.0))
    assert "certificate refused: Hostname mismatch" in str(refused)
    await fails(PermissionDeniedError, open_store(way, f"{url}/ca.crt".replace("right", SECRET)))
    # Plain text against TLS, and TLS against plain text.
    await fails(UnavailableError, open_store(way, f"redis://:right@localhost:{port}", deadline=DEADLINE))
    wrong = f"{url}/ca.crt".replace(str(port), str(server.port))
    await fails(UnavailableError, open_store(way, wrong, deadline=DEADLINE))


# URLs


def test_tls_urls() -> None:
    """Certificates are always checked; a file that can't be used is a ValueError, and no password is asked for."""
    address = parse_url(f"rediss://host?ssl_ca_certs={TLS / 'ca.crt'}")
    assert isinstance(address, Address)
    assert address.tls is not None
    assert (address.tls.verify_mode, address.tls.check_hostname) == (ssl.CERT_REQUIRED, True)
    certificate = f"ssl_certfile={TLS / 'server.crt'}"
    parse_url(f"rediss://host?{certificate}&ssl_keyfile={TLS / 'server.key'}")
    for query in (
        "ssl_ca_certs=/nowhere.crt",
        f"ssl_ca_certs={TLS / 'server.key'}",
        f"{certificate}&ssl_keyfile={TLS / 'ca.key'}",
        f"{certificate}&ssl_keyfile={TLS / 'locked.key'}",
        f"ssl_keyfile={TLS / 'server.key'}",
    ):
        with pytest.raises(ValueError, match=r"ssl_keyfile|TLS file"):
            parse_url(f"rediss://host?{query}")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://", Address()),
        ("redis://host", Address(host="host")),
        ("redis://host:7000/3", Address(host="host", port=7000, db=3)),
        ("redis://HOST:/", Address(host="host")),
        ("redis://[::1]:7000", Address(host="::1", port=7000)),
        ("redis://:pw@host", Address(host="host", username="", password="pw")),
        ("redis://me:p%40s%2Fs%3A%23@host", Address(host="host", username="me", password="p@s/s:#")),
        ("redis://m%C3%A9:%20@host", Address(host="host", username="mé", password=" ")),
        ("unix:///run/redis.sock", Address(path="/run/redis.sock")),
        ("unix://me:pw@/run/a%20b.sock?db=3", Address(path="/run/a b.sock", username="me", password="pw", db=3)),
        ("embedded:", EmbeddedFolder(None)),
        ("embedded:///a/b", EmbeddedFolder(Path("/a/b"))),
        ("memory://", MemoryName("")),
        ("memory://name", MemoryName("name")),
        ("file:///a/b%20c", FileFolder(Path("/a/b c"))),
    ],
)
def test_good_urls(url: str, expected: object) -> None:
    """What each kind of URL means."""
    assert parse_url(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost",
        "localhost:6379",
        "http://host",
        "rediss+insecure://host",
        f"redis://:{SECRET}@host?ssl_cert_reqs=none",
        f"rediss://:{SECRET}@host?ssl_cert_reqs=none",
        f"rediss://:{SECRET}@host?ssl_check_hostname=false",
        f"redis://:{SECRET}@host?db=3",
        f"redis://:{SECRET}@host/1?db=3",
        f"redis://:{SECRET}@host?decode_responses=1",
        f"redis://:{SECRET}@host?protocol=3",
        f"unix://:{SECRET}@/path?db=1&db=1",
        f"redis://:{SECRET}@host?ssl_ca_certs=/x",
        f"redis://:{SECRET}@host/abc",
        f"redis://:{SECRET}@host/-1",
        f"redis://:{SECRET}@host/1/2",
        f"redis://:{SECRET}@host/²",
        f"redis://:{SECRET}@host:port",
        f"redis://:{SECRET}@host:99999",
        f"redis://:{SECRET}@[::1",
        f"redis://:{SECRET}#x@host",  # a password that was not percent-encoded
        f"redis://:x#{SECRET}@host:1",
        f"redis://:12?{SECRET}@host",
        f"redis://:12/{SECRET}@host",
        f"redis://:{SECRET}?x@host",
        f"redis://:{SECRET}\ud800@host",
        f"redis://:{SECRET}%00@ho%00st",
        f"unix://host/{SECRET}",
        f"unix://:{SECRET}@",
        f"unix://:{SECRET}@/path?db=x",
        f"unix://:{SECRET}@/path%00",
        f"embedded://{SECRET}/path",
        f"embedded:///path?{SECRET}=1",
        f"memory://name?{SECRET}",
        f"file://{SECRET}/path",
        "file:",
    ],
)
@pytest.mark.parametrize("form", ["parse", "async", "sync"])
async def test_bad_urls(url: str, form: str) -> None:
    """A URL that can't be is a ValueError that repeats nothing of it; security settings can't be overridden."""

    async def use() -> None:
        if form == "parse" or not url:
            parse_url(url)
        elif form == "async":
            await orcs_redis.RedisSessionStore.connect(url)
        else:
            orcs_redis.sync.RedisSessionStore.connect(url)

    with pytest.raises(ValueError) as caught:  # noqa: PT011  # each says something else
        await use()
    assert type(caught.value) is ValueError
    assert SECRET not in told(caught.value)


def test_no_repr_tells_a_password() -> None:
    """Addresses and stores don't show how to get in."""
    address = parse_url(f"redis://me:{SECRET}@host")
    assert SECRET not in repr(address)
    assert SECRET not in str(address)
