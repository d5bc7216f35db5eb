"""What a signal handler raises in the midst of the work reaches the caller, and harms neither store nor data."""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest

from orcs_redis import ConversationTurn, SerializationError, SessionAsset

from .conftest import Place, Server
from .interrupted import KINDS
from .test_layout import dump


async def run(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.interrupted", json.dumps(arguments)]
    process = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    report: dict[str, Any] = json.loads(process.stdout)
    return report


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("how", "number"), [("timer", 300), ("call", 3)], ids=["timer", "call"])
@pytest.mark.parametrize("face", ["blocking", "asyncio"])
async def test_struck(shared_server: Server, face: str, how: str, number: int, kind: str) -> None:
    """Whatever is struck: nothing acknowledged is lost, nothing doubled, all sessions load, and the store goes on.

    The caller gets what the handler raised, nothing else. In asyncio strikes the store's own code: the loop's has no
    protection from such handlers.
    """
    report = await run(shared_server.url, f"struck-{secrets.token_hex(4)}", face, kind, how, number, False)
    assert (report["failures"], report["swallowed"]) == ([], [])
    assert report["struck"] >= 100


@pytest.mark.parametrize("kind", ["limit", "timeout"])
@pytest.mark.parametrize("face", ["blocking", "asyncio"])
async def test_struck_with_a_client(shared_server: Server, face: str, kind: str) -> None:
    """The same with an injected client; what redis-py swallows when it connects it swallows."""
    report = await run(shared_server.url, f"struck-{secrets.token_hex(4)}", face, kind, "timer", 300, True)
    assert report["failures"] == []
    assert report["struck"] >= 100


class Limit(Exception):
    pass


@pytest.mark.parametrize("raised", [Limit, MemoryError, TimeoutError])
async def test_encoding_interrupted(place: Place, store: Any, raised: type[Exception]) -> None:
    """What is raised while a turn is encoded ends the call, and nothing is written: above all no empty turn."""
    asset = SessionAsset(id="a")
    asset.add_turn(ConversationTurn.user("x"))
    await store.save(asset)
    before = dump(place)
    asset.add_turn(ConversationTurn.user("y"))
    with mock.patch("orcs_redis.protocol.turns._encode_turn", side_effect=raised):
        for call in (
            store.append("a", ConversationTurn.user("y")),
            store.append("a", ConversationTurn.user("y"), ConversationTurn.user("z")),
            store.save(asset),
            store.save(SessionAsset(id="b", history=asset.history)),
        ):
            with pytest.raises(raised):
                await call
    assert dump(place) == before
    assert await store.append("a", ConversationTurn.user("z")) == 2
    assert [turn.content for turn in (await store.load("a")).history.turns] == ["x", "z"]


async def test_nothing_empty_is_written(place: Place, store: Any) -> None:
    """Should encoding ever yield no bytes, it is an error, and no turn or section is written."""
    asset = SessionAsset(id="a")
    await store.save(asset)
    before = dump(place)
    turn = ConversationTurn.user("y")
    with mock.patch("orcs_redis.protocol.turns._encode_turn", return_value=b""):
        for call in (store.append("a", turn), store.save(SessionAsset(id="b", history=history(turn)))):
            with pytest.raises(SerializationError):
                await call
    with mock.patch("orcs_redis.protocol.codec.pack", return_value=b""), pytest.raises(SerializationError):
        await store.save(SessionAsset(id="b"))
    assert dump(place) == before


def history(*turns: ConversationTurn) -> Any:
    asset = SessionAsset()
    asset.history.turns += turns
    return asset.history


@pytest.mark.parametrize("raised", [Limit, MemoryError, OSError])
async def test_decoding_interrupted(store: Any, raised: type[Exception]) -> None:
    """What is raised while something is decoded ends the call: nothing is called corrupt, and no list is incomplete."""
    asset = SessionAsset(id="a")
    asset.add_turn(ConversationTurn.user("x"))
    await store.save(asset)
    for name, call in (
        ("turns._decode_wire_turns", lambda: store.load("a")),
        ("turns._decode_wire_turns", lambda: store.turns("a")),
        ("codec._decode_int", lambda: store.load("a")),
        ("index._decode_meta", store.list),
        ("index._decode_meta", lambda: store.list(limit=5)),
    ):
        with mock.patch(f"orcs_redis.protocol.{name}", side_effect=raised), pytest.raises(raised):
            await call()
    assert await store.load("a") == asset


def test_recognised_though_python_has_lost_its_main_thread() -> None:
    """A KeyError of a handler that struck in `threading.current_thread` makes Python take the thread for another."""
    code = """if True:
        import signal, threading
        from orcs_redis.interrupts import interruption

        def handler(*_):
            raise KeyError("struck")

        signal.signal(signal.SIGUSR1, handler)
        threading._DummyThread()  # as current_thread does then
        assert threading.current_thread() is not threading.main_thread()
        try:
            signal.raise_signal(signal.SIGUSR1)
        except KeyError as error:
            assert interruption(error) is error
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
