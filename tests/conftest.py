"""The table of servers and colours that tests run over, and stores on them.

A test asks for `store` (or `connect`, to open several) and is run over every row of `ROWS`. Tests are written in
asyncio; a blocking store is driven through `Threaded`, which runs each of its methods in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
import redis.asyncio

import orcs_redis
import orcs_redis.sync
from orcs_redis import embedded

IN_CI = bool(os.environ.get("CI"))


def missing(what: str) -> None:
    """Skip a test for which this machine lacks something; in CI that is a failure."""
    if IN_CI:
        pytest.fail(f"{what} is missing, and CI must have it")
    pytest.skip(f"{what} is missing")


@dataclass
class Server:
    """A redis-server of the tests' own; `url` is for stores, `raw` a client to look behind them."""

    port: int
    folder: Path
    arguments: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    password: str | None = None
    _clients: list[redis.Redis] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def raw(self) -> redis.Redis:
        client = redis.Redis(port=self.port, password=self.password)
        self._clients.append(client)
        return client

    def start(self) -> None:
        binary = shutil.which("redis-server") or shutil.which("valkey-server")
        assert binary is not None
        own = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder)]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen([binary, *own, *self.arguments], stdout=log)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(100):
                    return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.01)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        for client in self._clients:
            client.close()
        self.kill()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Start a redis-server of the test's own with further arguments; it ends with the test."""
    if not (shutil.which("redis-server") or shutil.which("valkey-server")):
        missing("redis-server")
    servers: list[Server] = []

    def start(*arguments: str, password: str | None = None) -> Server:
        server = Server(free_port(), tmp_path_factory.mktemp("server"), arguments, password=password)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server | None]:
    """One redis-server for all tests that don't harm it; None without the binary."""
    if not (shutil.which("redis-server") or shutil.which("valkey-server")):
        yield None
        return
    server = Server(free_port(), tmp_path_factory.mktemp("shared-server"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def embedded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[embedded.Attachment]:
    """One embedded server for all tests that don't harm it."""
    with embedded.attach(tmp_path_factory.mktemp("embedded"), 20) as attachment:
        yield attachment


class Threaded:
    """A blocking store or context manager with awaitable methods."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, "close" if name == "aclose" else name)
        if name == "sync_status" or not callable(method):
            return method

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await asyncio.to_thread(method, *args, **kwargs)

        return call


@dataclass(frozen=True)
class Row:
    """Where and how: a kind of server, a colour, and whether the client is the caller's."""

    server: str
    colour: str
    protocol: int = 3
    injected: bool = False

    def __str__(self) -> str:
        return f"{self.server}-{self.colour}" + ("-injected" if self.injected else "") + f"-resp{self.protocol}"


ROWS = [
    Row("memory", "async"),
    Row("memory", "sync"),
    Row("embedded", "async"),
    Row("embedded", "sync"),
    Row("redis", "async"),
    Row("redis", "sync"),
    Row("redis", "async", injected=True),
    Row("redis", "sync", protocol=2, injected=True),
]
if os.environ.get("ORCS_REDIS_TEST_URL"):
    ROWS += [Row("given", "async"), Row("given", "sync")]

Connect = Callable[..., Awaitable[Any]]


@dataclass
class Place:
    """A row's server, with a namespace that no other test has."""

    row: Row
    url: str
    namespace: str
    raw: redis.Redis

    async def connect(self, **options: Any) -> Any:
        """Open a store in the row's colour."""
        options.setdefault("namespace", self.namespace)
        module: Any = orcs_redis if self.row.colour == "async" else orcs_redis.sync
        connect = module.RedisSessionStore.connect
        if self.row.injected:
            kind: Any = redis.asyncio.Redis if self.row.colour == "async" else redis.Redis
            client = kind.from_url(self.url, protocol=self.row.protocol)
            options |= {"client": client}
            url = None
        else:
            client = None
            url = self.url
        try:
            if self.row.colour == "async":
                store = await connect(url, **options)
            else:
                store = Threaded(await asyncio.to_thread(connect, url, **options))
        except BaseException:
            await self._close_client(client)
            raise
        store._client_of_test = client
        return store

    async def close(self, store: Any) -> None:
        await store.aclose()
        await self._close_client(store._client_of_test)

    @staticmethod
    async def _close_client(client: Any) -> None:
        if isinstance(client, redis.asyncio.Redis):
            await client.aclose()
        elif client is not None:
            client.close()

    def key(self, rest: str, partition: int = 0) -> str:
        """A key of the namespace's."""
        return f"{{{self.namespace}/{partition}}}:{rest}"


@pytest.fixture(params=ROWS, ids=str)
def place(
    request: pytest.FixtureRequest, shared_server: Server | None, embedded_server: embedded.Attachment
) -> Iterator[Place]:
    """A server and a namespace, for each row."""
    row: Row = request.param
    namespace = f"test-{secrets.token_hex(4)}"
    raw: Any
    match row.server:
        case "memory":
            url = f"memory://{namespace}"
            from orcs_redis.clients import memory_client

            raw = memory_client(namespace, "FakeRedis")
            assert isinstance(raw, fakeredis.FakeRedis)
        case "embedded":
            url = f"embedded://{embedded_server.folder}"
            raw = redis.Redis(unix_socket_path=str(embedded_server.socket))
        case "redis":
            if shared_server is None:
                missing("redis-server")
            assert shared_server is not None
            url, raw = shared_server.url, redis.Redis(port=shared_server.port)
        case _:
            url = os.environ["ORCS_REDIS_TEST_URL"]
            raw = redis.Redis.from_url(url)
    yield Place(row, url, namespace, raw)
    keys = list(raw.scan_iter(match=f"*{namespace}*", count=10_000))
    if keys:
        raw.delete(*keys)
    raw.close()


@pytest.fixture
async def connect(place: Place) -> AsyncIterator[Connect]:
    """Open stores on the row's server, in the test's namespace."""
    stores = []
    # Blocking stores wait in threads, more of them than asyncio has by default.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(64))

    async def open_one(**options: Any) -> Any:
        store = await place.connect(**options)
        stores.append(store)
        return store

    yield open_one
    for store in stores:
        await place.close(store)


@pytest.fixture
async def store(connect: Connect) -> Any:
    """A store in a namespace of the test's own."""
    return await connect()
