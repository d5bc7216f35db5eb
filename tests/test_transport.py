"""What drivers and links do with errors, and with replies that are none."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from orcs_redis import (
    ConversationTurn,
    CorruptSessionError,
    LocalFileStore,
    NotFoundError,
    OutcomeUnknownError,
    SerializationError,
    SessionAsset,
    StorageError,
    UnavailableError,
)
from orcs_redis.protocol.attempts import ConnectionLost, copy_of_error
from orcs_redis.protocol.codec import Codec
from orcs_redis.protocol.commands import Batch, Command, Reply
from orcs_redis.protocol.index import ALL, AllMeta, IndexSizes, LabelRun, MetaRun
from orcs_redis.protocol.namespace import Create, ReadLayout
from orcs_redis.protocol.records import RecordKeys, RecordValues
from orcs_redis.protocol.request import Plan, Request
from orcs_redis.protocol.sessions import Sessions
from orcs_redis.protocol.writer import Namespace
from orcs_redis.transport import driver, threads
from orcs_redis.transport.address import Address
from orcs_redis.transport.clients import AsyncClientLink, memory_client
from orcs_redis.transport.connection import Link
from orcs_redis.transport.lifecycle import Lifecycle
from orcs_redis.transport.multiplexed import Connection

from .conftest import Connect
from .servers import Server, free_port

NONSENSE: list[Reply] = [
    None, 5, -1, b"", b"x", 1.5, True, [], [None], [5], [b"OK"], [[]], [[b"OK"]], [[b"OK", b"x", None]], [[5, 5]],
    [[b"CORRUPT"]], [[b"VERSION", 5]], [b"x", b"y"], {}, {b".revision": 5}, {b"a": [1]}, {5: 5}, [[[]]], [b"nan", b"a"],
]  # fmt: skip


class Nonsense:
    """A link over which the same reply comes to every command."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.drops = 0

    async def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        return [self.reply] * len(commands)

    def drop(self, before: float) -> None:
        self.drops += 1

    async def open_pubsub(self, on_message: Any, heartbeat: float) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        pass


class BlockingNonsense(Nonsense):
    """The same, blocking."""

    def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:  # type: ignore[override]
        return [self.reply] * len(commands)


def requests() -> list[Request[Any]]:
    namespace = Namespace("n", 1, b"same")
    sessions = Sessions(namespace, Codec(SessionAsset, 2**20, 2**20, 100))
    partition = namespace.keyspace.partitions[0]
    return [
        ReadLayout("n"),
        Create("n", 1),
        sessions.load("s"),
        sessions.turns("s", 0, -1),
        sessions.exists("s"),
        sessions.append("s", [ConversationTurn.user("x")], None, None),
        sessions.delete("s", None, None),
        AllMeta(partition),
        MetaRun(partition, 2, ALL, None, ()),
        LabelRun(partition, 2, 2, ALL, None, b"", [b"label"]),
        IndexSizes(partition, ALL, [b"label"]),
        RecordKeys(namespace, "s", b"-", b"+", 10, False),
        RecordValues(namespace, "s", ["a"]),
    ]


@pytest.mark.parametrize("reply", NONSENSE, ids=repr)
async def test_a_reply_that_is_no_answer(reply: Reply) -> None:
    """It is taken for what it says or ends in a StorageError, a write's in an unknown outcome."""
    asynchronous, blocking = Nonsense(reply), BlockingNonsense(reply)
    for at in range(len(requests())):
        one, other = requests()[at], requests()[at]
        performing = driver.Driver(Lifecycle(0.1), asynchronous).send(one)
        outcomes: list[Any] = [*await asyncio.gather(performing, return_exceptions=True)]
        try:
            outcomes.append(threads.Driver(Lifecycle(0.1), blocking).send(other))  # type: ignore[arg-type]
        except StorageError as error:
            outcomes.append(error)
        assert type(outcomes[0]) is type(outcomes[1])
        if isinstance(outcomes[0], BaseException):
            assert isinstance(outcomes[0], StorageError), repr(outcomes[0])
            if "no answer" in str(outcomes[0]):
                assert isinstance(outcomes[0], OutcomeUnknownError) == one.writes


async def test_what_follows_nonsense_is_not_read() -> None:
    """The connection over which it came is not used any more: what follows may be another's."""
    link = Nonsense([b"x"])
    with pytest.raises(StorageError, match="no answer"):
        await driver.Driver(Lifecycle(1.0), link).send(requests()[2])
    assert link.drops == 1


class Refused(Request[None]):
    """One that can't be sent."""

    def commands(self) -> Sequence[Command]:
        raise SerializationError("metadata", "no")


def test_what_is_refused_here_says_nothing_of_the_server() -> None:
    """Only what was sent shows whether the server is there."""

    def plan() -> Plan[None]:
        yield Refused()

    lifecycle = Lifecycle(1.0)
    performer = threads.Driver(lifecycle, BlockingNonsense(0))  # type: ignore[arg-type]
    with pytest.raises(SerializationError):
        performer.send(Refused())
    assert [type(error) for error in performer.each(lambda _: plan(), [None])] == [SerializationError]
    assert lifecycle.last_answer_at < 0
    performer.send(requests()[4])
    assert lifecycle.last_answer_at > 0


async def test_each_that_waits_gets_an_error_of_its_own() -> None:
    """A failure to connect is raised afresh for each: what one adds to it does not reach the others."""
    link = Link(Address("127.0.0.1", free_port()), 1.0)
    until = asyncio.get_running_loop().time() + 1
    errors: list[Any] = await asyncio.gather(*(link.call([("PING",)], until) for _ in range(5)), return_exceptions=True)
    await link.close()
    assert {type(error) for error in errors} == {ConnectionLost}
    assert len({id(error) for error in errors}) == 5
    assert len({str(error) for error in errors}) == 1
    assert {error.sent for error in errors} == {False}
    assert all(isinstance(error.__cause__, OSError) for error in errors)


def test_a_fresh_error() -> None:
    """It is equal, with all that was noted of it."""
    for error in (ConnectionLost("broke", sent=True, size=2**20), NotFoundError("s"), UnavailableError("gone")):
        other = copy_of_error(error)
        assert (type(other), str(other), vars(other)) == (type(error), str(error), vars(error))
        assert other is not error


async def test_errors_in_a_list_keep_nothing_alive(connect: Connect) -> None:
    """What `load_many` and its like return has no traceback: its frames would hold what was being done."""
    store = await connect()
    for error in [*await store.load_many(["a", "b"]), *await store.delete_many(["c"])]:
        assert isinstance(error, NotFoundError)
        assert (error.__traceback__, error.__context__, error.__cause__) == (None, None, None)


async def test_threads_of_a_file_store_end(tmp_path: Path) -> None:
    """Closing the store ends its threads; it can be used all the same."""
    store = LocalFileStore(tmp_path)
    for _ in range(2):
        await store.save(SessionAsset(id="s"))
        mine = [thread for thread in threading.enumerate() if thread.name.startswith("orcs-redis-files")]
        assert mine
        await store.aclose()
        for thread in mine:
            await asyncio.to_thread(thread.join, 10)
            assert not thread.is_alive()


def test_a_client_s_connection_that_was_interrupted() -> None:
    """What Ctrl-C interrupts is said to be interrupted, and the connection is opened anew."""
    opened = []

    def on_connect() -> None:
        opened.append(1)
        if len(opened) == 1:
            raise KeyboardInterrupt

    async def ping() -> list[Reply]:
        return await link.call([("PING",)], loop.time() + 5)

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)
    client = memory_client("", "FakeAsyncRedis")
    link = AsyncClientLink(client, 5.0, owned=True, on_connect=on_connect)
    try:
        first = loop.create_task(ping())
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(first)
        with pytest.raises(ConnectionLost, match="interrupted"):
            loop.run_until_complete(first)
        assert loop.run_until_complete(ping()) == [b"PONG"]
        assert len(opened) == 2
    finally:
        loop.run_until_complete(link.close())
        loop.close()


async def test_a_buffer_that_is_asked_for_in_vain() -> None:
    """It breaks no connection: uvloop asks once more when what was received has filled the last one."""

    class Transport(asyncio.Transport):
        """Of another library."""

    connection = Connection(asyncio.get_running_loop(), 1.0)
    connection.connection_made(Transport())
    assert connection.get_buffer(-1) is connection.get_buffer(-1)


async def test_calls_end_when_their_writing_is_interrupted(
    start_server: Callable[..., Server], open_in: Callable[..., Awaitable[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler that raises while queued calls are written leaves none of them waiting for ever."""

    class Limit(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Limit

    def pack_interrupted(batch: Batch) -> bytes:
        packed.append(batch)
        if len(packed) == 3:
            signal.raise_signal(signal.SIGUSR1)
        return pack(batch)

    store = await open_in("async", start_server().url, deadline=2.0)
    await store.save(SessionAsset(id="s"))
    packed: list[Batch] = []
    pack = Batch.pack
    before = signal.signal(signal.SIGUSR1, interrupt)
    loop = asyncio.get_running_loop()
    reported: list[Any] = []
    loop.set_exception_handler(lambda loop, context: reported.append(context.get("exception")))
    try:
        monkeypatch.setattr(Batch, "pack", pack_interrupted)
        async with asyncio.timeout(10):
            results = await asyncio.gather(*(store.load("s") for _ in range(6)), return_exceptions=True)
    finally:
        signal.signal(signal.SIGUSR1, before)
        loop.set_exception_handler(None)
    assert all(isinstance(result, SessionAsset) for result in results), results
    assert [type(error) for error in reported] == [Limit]


async def test_an_error_of_the_asset_s_own_code(
    start_server: Callable[..., Server], open_in: Callable[..., Awaitable[Any]]
) -> None:
    """What a subclass raises when it is made is no fault of the server's: the connection stays."""

    class Picky(SessionAsset):
        def __post_init__(self) -> None:
            if "bad" in self.metadata:
                raise KeyError("bad")

    url = start_server().url
    await (await open_in("async", url)).save(SessionAsset(id="s", metadata={"bad": 1}))
    for form in ("async", "sync"):
        store = await open_in(form, url, asset_type=Picky)
        with pytest.raises(CorruptSessionError) as caught:
            await store.load("s")
        assert isinstance(caught.value.__cause__, KeyError)
