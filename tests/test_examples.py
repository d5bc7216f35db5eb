"""The programs in examples/ do what they say, each in a process of its own, on a server that is started for them."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

import orcs_redis
from orcs_redis import ConversationTurn, SessionAsset
from orcs_redis.sync import LocalFileStore, open_store
from orcs_redis.transport import embedded

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an embedded server that runs as long as these tests."""
    with embedded.attach(tmp_path_factory.mktemp("examples"), 20) as attachment:
        yield attachment.folder


@pytest.fixture
def url(folder: Path) -> str:
    """The server, with nothing in it."""
    with embedded.attach(folder, 20) as attachment, redis.Redis(unix_socket_path=str(attachment.socket)) as raw:
        raw.flushall()
    return f"embedded://{folder}"


def run(name: str, *arguments: str, url: str = "memory://", code: int = 0) -> str:
    """Run a program and return what it prints; nothing goes to stderr if its exit code is 0."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    environment = os.environ | {"ORCS_REDIS_URL": url}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, cwd=EXAMPLES.parent)
    assert done.returncode == code, done.stderr
    assert code or done.stderr == ""
    return done.stdout


def test_each_example_has_its_test() -> None:
    """A program that is added without a test is noticed."""
    assert {f"test_{path.stem}" for path in EXAMPLES.glob("*.py")} <= globals().keys()


def test_quickstart(url: str) -> None:
    """The quick start shows both turns, and a conflict."""
    shown = run("quickstart.py", url=url)
    assert "expected revision 1, found 2" in shown
    assert "user: Why does the build fail?\nassistant: An import is missing.\n" in shown


def test_fleet(url: str) -> None:
    """Nine sessions are answered once each, although one worker is killed and one is asked to stop."""
    shown = run("fleet.py", url=url)
    assert shown.endswith("9 sessions, one answer each\n")
    assert "SIGKILL" in shown
    assert shown.count("answered by") >= 7  # the two may be struck between writing and printing


@pytest.mark.parametrize("where", ["embedded", "memory"])
def test_retry(url: str, where: str) -> None:
    """Counters add up, one rename of three lands."""
    shown = run("retry.py", url=url if where == "embedded" else "memory://")
    assert "20 tasks counted to 20" in shown
    assert "1 of 3 renamed it" in shown


def test_test_greeter() -> None:
    """The tests with memory:// pass without a server."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLES / "test_greeter.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=EXAMPLES.parent)
    assert "2 passed" in done.stdout, done.stdout


def test_import_orcs(url: str, tmp_path: Path) -> None:
    """Sessions come in; what is there already stays; a file that can't be read is named and counted."""
    files = LocalFileStore(tmp_path)
    for id in ("a", "b"):
        files.save(SessionAsset(id=id))
    with open_store(url) as store:
        store.save(SessionAsset(id="b", metadata={"from": "the store"}))
        assert run("import_orcs.py", str(tmp_path), url=url) == "1 imported, 1 skipped, 0 failed\n"
        assert store.exists("a")
        assert store.load("b").metadata == {"from": "the store"}
    (tmp_path / "c.json").write_text("{")
    assert run("import_orcs.py", str(tmp_path), url=url, code=1) == "0 imported, 2 skipped, 1 failed\n"


@pytest.fixture
def service(url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The chat service, as a module."""
    monkeypatch.setenv("ORCS_REDIS_URL", url)
    spec = importlib.util.spec_from_file_location("chat_service", EXAMPLES / "chat_service.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "chat_service", module)
    spec.loader.exec_module(module)
    return module


async def test_chat_service(service: Any, url: str) -> None:
    """Posted turns and a peer's reach a stream that is open already, and one that continues by Last-Event-ID."""
    transport = httpx.ASGITransport(service.app)
    client = httpx.AsyncClient(transport=transport, base_url="http://chat")
    async with service.app.router.lifespan_context(service.app), client:
        assert (await client.get("/sessions/s/turns")).status_code == 404
        assert (await client.put("/sessions/s")).status_code == 201
        assert (await client.put("/sessions/s")).status_code == 409
        assert (await client.put("/sessions/.s")).status_code == 400

        stream = asyncio.create_task(client.get("/sessions/s/events", params={"count": 3}))
        async with asyncio.timeout(10):
            while not service.app.state.hub.streams:  # noqa: ASYNC110  # the service is as it is shown
                await asyncio.sleep(0.01)
        assert (await client.post("/sessions/s/turns", json={"content": "hello"})).status_code == 201
        async with orcs_redis.open_store(url, namespace="chat") as peer:
            await peer.append("s", ConversationTurn.assistant("from a peer"))
        received = events(await asyncio.wait_for(stream, 10))
        assert received == [(1, "hello"), (2, "You said: hello"), (3, "from a peer")]

        later = await client.get("/sessions/s/events", params={"count": 1}, headers={"Last-Event-ID": "2"})
        assert events(later) == [(3, "from a peer")]
        assert [turn["content"] for turn in (await client.get("/sessions/s/turns?last=1")).json()] == ["from a peer"]
        assert service.app.state.hub.streams == 0


def events(response: httpx.Response) -> list[tuple[int, str]]:
    """The numbers and contents of a stream's events."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        if fields.get("event") == "turn":
            found.append((int(fields["id"]), json.loads(fields["data"])["content"]))
    return found
