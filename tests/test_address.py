"""URLs and options: the server that is meant, or a ValueError; never another one."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

import pytest
import redis
import redis.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

import orcs_redis
import orcs_redis.sync
from orcs_redis import PermissionDeniedError, SessionAsset, UnavailableError
from orcs_redis.transport.address import Address, EmbeddedFolder, FileFolder, MemoryName, parse_url

from .conftest import Server

SECRET = "s3cret"

StartServer: TypeAlias = Callable[..., Server]
Open: TypeAlias = Callable[..., Any]

forms = pytest.mark.parametrize("form", ["async", "sync"])
printable = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x2FFF, exclude_categories=["C"]), max_size=12)
tricky = st.text(st.sampled_from("aZ09:@/?#%[]\\&=+;~ ''\"é.-$!*(){}|^`<>,_"), max_size=16)
passwords = printable | tricky


@settings(deadline=None)  # the first TLS context takes its time
@given(password=passwords, username=st.sampled_from(["", "me"]), place=st.sampled_from(["host", "host:1", "[::1]:1"]))
@pytest.mark.parametrize("tail", ["", "/", "/2"])
@pytest.mark.parametrize("scheme", ["redis", "rediss", "valkey", "valkeys"])
def test_raw_passwords(scheme: str, tail: str, place: str, username: str, password: str) -> None:
    """A password as it is: it arrives, at the host that is meant, or is a ValueError."""
    try:
        found = parse_url(f"{scheme}://{username}:{password}@{place}{tail}")
    except ValueError:
        assert set(password) & set("#/?%")  # and no other is refused
        return
    assert isinstance(found, Address)
    where = (found.host, found.port, found.path, found.db)
    assert where == ("::1" if "::1" in place else "host", 1 if ":1" in place else 6379, None, 2 if "2" in tail else 0)
    if not re.search("%[0-9A-Fa-f]{2}", password):  # that is an encoded character
        assert (found.username, found.password) == (username, password)


@given(password=passwords, username=st.sampled_from(["", "me"]))
@pytest.mark.parametrize("tail", ["", "?db=2"])
def test_raw_passwords_over_a_unix_socket(tail: str, username: str, password: str) -> None:
    """The same over a unix socket, whose path a slash could begin."""
    try:
        found = parse_url(f"unix://{username}:{password}@/run/redis.sock{tail}")
    except ValueError:
        assert set(password) & set("#/?%")
        return
    assert isinstance(found, Address)
    assert (found.path, found.db) == ("/run/redis.sock", 2 if tail else 0)
    if not re.search("%[0-9A-Fa-f]{2}", password):
        assert (found.username, found.password) == (username, password)


@given(password=st.text(st.characters(exclude_categories=["Cs"])), username=printable)
def test_encoded_passwords(username: str, password: str) -> None:
    """Percent-encoded, everything arrives."""
    user = f"{quote(username, safe='')}:{quote(password, safe='')}"
    assert parse_url(f"redis://{user}@host:7/3") == Address("host", 7, username=username, password=password, db=3)
    assert parse_url(f"unix://{user}@/a%40b") == Address(path="/a@b", username=username, password=password)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("valkey://me:pw@host:7000/3", Address(host="host", port=7000, username="me", password="pw", db=3)),
        ("unix:///run/redis.sock?db=4", Address(path="/run/redis.sock", db=4)),
        ("unix:///run/redis@6379.sock", Address(path="/run/redis@6379.sock")),
        ("redis:///2", Address(db=2)),
        ("REDIS://host", Address(host="host")),
        ("embedded://", EmbeddedFolder(None)),
        ("embedded:/a", EmbeddedFolder(Path("/a"))),
        ("memory:a%2Fb", MemoryName("a/b")),
        ("file:/a", FileFolder(Path("/a"))),
    ],
)
def test_good_urls(url: str, expected: object) -> None:
    """What each kind of URL means."""
    assert parse_url(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:#{SECRET}@prod:6379/0",
        f"redis://user:12#{SECRET}@host",
        "redis://host#",
        "file:///a#b",
        f"redis://me:{SECRET}@",
        f"redis://me:{SECRET}@/0",
        f"redis://me:{SECRET}@:6379",
        f"redis://{SECRET}@",
        f"redis://:{SECRET}@host?",
        f"redis://:{SECRET}@host?ssl_certfile=/x",
        f"valkey://:{SECRET}@host?db=1",
        f"rediss://me:6379?ssl_ca_certs=/etc/{SECRET}@host",
        f"unix://:/{SECRET}@/run/redis.sock",
        f"unix://:@/{SECRET}@/run/redis.sock",
        f"unix:/run/{SECRET}",
        "redis:0",
        f"redis://:100%{SECRET}@host",
        f"redis://:%ff{SECRET}@host",
        f"redis://:{SECRET}@ho st",
        f"redis://:{SECRET}@host:7000:7001",
        f"redis://:{SECRET}\t@host",
        f" redis://:{SECRET}@host",
        f"redis://:{SECRET}@[host]",
        f"redis://:{SECRET}@host/99999999999999999999",
        f"redis+sentinel://:{SECRET}@host/mymaster",
        f"redis+cluster://:{SECRET}@host",
        "embedded:folder",
        "file:folder",
        "file:///a%00b",
    ],
)
def test_bad_urls(url: str) -> None:
    """A URL that could mean something else is a ValueError that repeats nothing of it."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # each says something else
        parse_url(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@forms
async def test_an_empty_url_is_none(monkeypatch: pytest.MonkeyPatch, open_in: Open, form: str) -> None:
    """A variable that is not set must not open another store than the one that was meant."""
    monkeypatch.setenv("ORCS_REDIS_URL", "memory://")
    with pytest.raises(ValueError, match="unknown scheme"):
        await open_in(form, "")
    assert await (await open_in(form)).list() == []


OPENERS: dict[str, Callable[..., Any]] = {
    "open_store": orcs_redis.open_store,
    "RedisSessionStore.connect": orcs_redis.RedisSessionStore.connect,
    "sync open_store": orcs_redis.sync.open_store,
    "sync RedisSessionStore.connect": orcs_redis.sync.RedisSessionStore.connect,
}


async def attempt(name: str, *arguments: Any, **options: Any) -> None:
    """Open a store by a public function and close it."""
    opened = OPENERS[name](*arguments, **options)
    if name == "open_store":
        async with opened:
            pass
    elif name == "sync open_store":
        with opened:
            pass
    elif name.startswith("sync"):
        opened.close()
    else:
        await (await opened).aclose()


async def test_a_path_is_a_folder_of_files(tmp_path: Path) -> None:
    """`open_store` takes a folder's path in the place of a URL; a Redis store can't be opened by one."""
    async with orcs_redis.open_store(tmp_path) as files:
        assert isinstance(files, orcs_redis.LocalFileStore)
        assert files.path == tmp_path
    with orcs_redis.sync.open_store(tmp_path) as blocking:
        assert isinstance(blocking, orcs_redis.sync.LocalFileStore)
        assert blocking.path == tmp_path
    for name in ("RedisSessionStore.connect", "sync RedisSessionStore.connect"):
        with pytest.raises(ValueError, match="use open_store"):
            await attempt(name, tmp_path)


@pytest.mark.parametrize("name", OPENERS)
@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("memory://", {"retries": 99}),
        ("memory://", {"credentials": lambda: (None, "x")}),
        ("embedded:", {"credentials": lambda: (None, "x")}),
        ("file:", {"deadline": -1, "retries": 99}),
        ("file:", {"namespace": "orcs"}),
        ("file:", {"max_connections": 3}),
        ("path", {"namespace": "orcs"}),
        ("redis://127.0.0.1:1", {"decode": True}),
        ("client", {"credentials": lambda: (None, "x")}),
        ("client", {"retries": 99}),
    ],
)
async def test_options_that_mean_nothing(tmp_path: Path, name: str, url: str, options: dict[str, Any]) -> None:
    """An option that this kind of store doesn't have is a TypeError that names the function called."""
    client: Any = None
    if url == "client":
        client = redis.Redis(port=1) if name.startswith("sync") else redis.asyncio.Redis(port=1)
    target = {"file:": f"file://{tmp_path}", "path": tmp_path}.get(url, url)
    with pytest.raises(TypeError, match=re.escape(name.removeprefix("sync ") + "()")):
        await attempt(name, None if client else target, client=client, **options)


@pytest.mark.parametrize("name", OPENERS)
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"credentials": ("me", "pw")}, TypeError),
        ({"credentials": lambda: ("me", "pw")}, ValueError),  # the URL has some, too
        ({"max_connections": 0}, ValueError),
        ({"max_connections": 2.5}, ValueError),
        ({"partitions": 1025}, ValueError),
    ],
)
async def test_options_with_bad_values(name: str, options: dict[str, Any], error: type[Exception]) -> None:
    """A value that can't be is refused before anything is connected."""
    with pytest.raises(error):
        await attempt(name, "redis://me:pw@127.0.0.1:1", **options)


@forms
async def test_credentials_are_asked_at_each_connecting(start_server: StartServer, open_in: Open, form: str) -> None:
    """A password that rotates: each connection is opened with the one of its time, a watch's too."""
    server = start_server("--requirepass", "first", password="first")
    now = ["first"]
    asked: list[str] = []

    def credentials() -> tuple[str | None, str]:
        asked.append(now[0])
        return (None if len(asked) % 2 else "default"), now[0]

    store = await open_in(form, server.url, credentials=credentials)
    asset = SessionAsset()
    await store.save(asset)
    raw: Any = server.raw()
    raw.config_set("requirepass", "second")
    now[0] = server.password = "second"
    raw.client_kill_filter(_type="normal", skipme=True)
    assert await store.load(asset.id) == asset
    assert set(asked) == {"first", "second"}
    before = len(asked)
    with pytest.raises(TimeoutError):
        await store.wait_for(asset.id, revision=99, timeout=0.5)
    assert asked[before:] == ["second"]


@forms
@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        (ValueError(SECRET), PermissionDeniedError),
        (ConnectionError(SECRET), UnavailableError),
        ((SECRET, "a", "b"), PermissionDeniedError),
        (SECRET, PermissionDeniedError),
        ((SECRET, None), PermissionDeniedError),
        (("default", SECRET), PermissionDeniedError),
    ],
)
async def test_credentials_that_fail(
    start_server: StartServer,
    open_in: Open,
    caplog: pytest.LogCaptureFixture,
    form: str,
    outcome: Any,
    kind: type[Exception],
) -> None:
    """What the callable raises is the cause of the error; neither its text nor what it gave is repeated."""
    server = start_server("--requirepass", "right", password="right")
    good = [True]

    def credentials() -> Any:
        if good[0]:
            return None, "right"
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    caplog.set_level(logging.DEBUG)
    store = await open_in(form, server.url, credentials=credentials, deadline=0.5)
    good[0] = False
    raw: Any = server.raw()
    raw.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises(kind) as caught:
        await store.exists("s")
    assert type(caught.value) is kind
    assert SECRET not in str(caught.value)
    if isinstance(outcome, ValueError):
        assert caught.value.__cause__ is outcome
    good[0] = True
    await store.save(SessionAsset())
    assert SECRET not in caplog.text
