"""The table of servers and forms that tests run over, and stores on them.

A test asks for `store` (or `connect`, to open several) and is run over every row of `ROWS`. Tests are written in
asyncio; a blocking store is driven through `Threaded`, which runs each of its methods in a thread.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fakeredis
import hypothesis
import pytest
import redis
import redis.asyncio

import orcs_redis
import orcs_redis.sync
from orcs_redis.transport import embedded

from .command_line import Outcome, Run
from .servers import BINARIES, BINARY
from .servers import Server as Server
from .servers import free_port as free_port

# A busy machine may take long for any single example; the whole test has its timeout.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

# What a shell starts in the background ignores these signals, and so would all that the tests start.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

# For tests of what depends on the server's version or build.
every_server = pytest.mark.parametrize("start_server", BINARIES.values(), ids=BINARIES.keys(), indirect=True)


@pytest.fixture
def start_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    """Start the test's own server with further arguments; it ends with the test."""
    binary: Path = getattr(request, "param", BINARY)
    servers: list[Server] = []

    def start(*arguments: str, password: str | None = None) -> Server:
        folder = tmp_path_factory.mktemp("server")
        server = Server(free_port(), folder, arguments, binary, password=password)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that don't harm it."""
    server = Server(free_port(), tmp_path_factory.mktemp("shared-server"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def embedded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[embedded.Attachment]:
    """One embedded server for all tests that don't harm it."""
    with embedded.attach(tmp_path_factory.mktemp("embedded"), 20) as attachment:
        yield attachment


def channel(raw: Any, key: str) -> str:
    """The channel that goes with a key of a partition: its name has the namespace's incarnation."""
    incarnation: bytes = raw.hget(key.rpartition("}")[0] + "}:state", "incarnation")
    return f"{key}:{incarnation.decode()}"


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


async def connected(way: str, url: str | None, **options: Any) -> Any:
    """A store at a URL, in either form, with awaitable methods."""
    if way == "async":
        return await orcs_redis.RedisSessionStore.connect(url, **options)
    connect: Any = orcs_redis.sync.RedisSessionStore.connect
    return Threaded(await asyncio.to_thread(connect, url, **options))


@pytest.fixture
async def open_in() -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """Open stores in a form, "async" or "sync"; they are closed with the test."""
    stores: list[Any] = []

    async def open_one(form: str, url: str | None = None, **options: Any) -> Any:
        stores.append(await connected(form, url, **options))
        return stores[-1]

    yield open_one
    for store in stores:
        await store.aclose()


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that the user, who is not root while it is used, may not write to."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    user = os.geteuid()
    if user == 0:  # whom permissions don't stop
        os.seteuid(65534)
    yield folder
    os.seteuid(user)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command line and checks what holds for every run."""
    from orcs_redis.cli import main

    def run(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as info:
            main([str(argument) for argument in arguments])
        outcome = Outcome(int(info.value.code or 0), *capfd.readouterr())
        assert "Traceback" not in outcome.err
        assert all(line.startswith("orcs-redis: ") for line in outcome.err.splitlines())
        return outcome

    return run


@dataclass(frozen=True)
class Row:
    """Where and how: a kind of server, a form, and whether the client is the caller's."""

    server: str  # "redis" is what speaks its protocol over TCP: see BINARY
    form: str
    protocol: int = 3
    injected: bool = False

    def __str__(self) -> str:
        return f"{self.server}-{self.form}" + ("-injected" if self.injected else "") + f"-resp{self.protocol}"


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

# Those of one kind of server, if that is said: the others are the same with every server on the PATH.
ONLY = os.environ.get("ORCS_REDIS_TEST_SERVER")
CHOSEN = [row for row in ROWS if ONLY in (None, row.server)]

Connect = Callable[..., Awaitable[Any]]


@dataclass
class Place:
    """A row's server, with a namespace that no other test has."""

    row: Row
    url: str
    namespace: str
    raw: redis.Redis

    async def connect(self, **options: Any) -> Any:
        """Open a store in the row's form."""
        options.setdefault("namespace", self.namespace)
        module: Any = orcs_redis if self.row.form == "async" else orcs_redis.sync
        connect = module.RedisSessionStore.connect
        if self.row.injected:
            kind: Any = redis.asyncio.Redis if self.row.form == "async" else redis.Redis
            client = kind.from_url(self.url, protocol=self.row.protocol)
            options |= {"client": client}
            url = None
        else:
            client = None
            url = self.url
        try:
            if self.row.form == "async":
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

    def channel(self, rest: str, partition: int = 0) -> str:
        """A channel of the namespace's, which is there."""
        return channel(self.raw, self.key(rest, partition))


@pytest.fixture(params=CHOSEN, ids=str)
def place(
    request: pytest.FixtureRequest, shared_server: Server, embedded_server: embedded.Attachment
) -> Iterator[Place]:
    """A server and a namespace, for each row."""
    row: Row = request.param
    namespace = f"test-{secrets.token_hex(4)}"
    raw: Any
    match row.server:
        case "memory":
            url = f"memory://{namespace}"
            from orcs_redis.transport.clients import memory_client

            raw = memory_client(namespace, "FakeRedis")
            assert isinstance(raw, fakeredis.FakeRedis)
        case "embedded":
            url = f"embedded://{embedded_server.folder}"
            raw = redis.Redis(unix_socket_path=str(embedded_server.socket))
        case "redis":
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
    """A store in the test's own namespace."""
    return await connect()
