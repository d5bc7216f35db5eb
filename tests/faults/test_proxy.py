"""What the proxy does to connections, by its modes."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from . import proxy as modes
from .proxy import Proxy


class Echo:
    """A server that sends back what it gets, and remembers it."""

    def __init__(self) -> None:
        self.heard = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(1000):
                self.heard += data
                connection.sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)

    def hears(self, data: bytes) -> bool:
        until = time.monotonic() + 5
        while self.heard != data and time.monotonic() < until:
            time.sleep(0.01)
        return self.heard == data


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.port) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    """A connection through the proxy that is known to work."""
    with connect(proxy) as connection:
        assert ask(connection, b"hello") == b"hello"
        yield connection


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), 5)


def ask(connection: socket.socket, data: bytes) -> bytes | None:
    """Send and return the answer: b"" if the connection ended, None if there was no answer for a while."""
    connection.settimeout(0.3)
    try:
        connection.sendall(data)
        answer = b""
        while len(answer) < len(data) and (part := connection.recv(1000)):
            answer += part
    except TimeoutError:
        return None
    except OSError:
        return b""
    return answer


def test_delay(proxy: Proxy, client: socket.socket) -> None:
    """Delayed bytes come, later, both ways."""
    proxy.strike(modes.delay(0.1))
    begin = time.monotonic()
    assert ask(client, b"x") == b"x"
    assert time.monotonic() - begin > 0.19


def test_cut(proxy: Proxy, client: socket.socket) -> None:
    """A cut ends the open connections only."""
    proxy.cut()
    assert ask(client, b"x") == b""
    with connect(proxy) as other:
        assert ask(other, b"y") == b"y"


def test_refuse(proxy: Proxy, client: socket.socket) -> None:
    """New connections can be refused while the open ones live, until the proxy is healed."""
    proxy.strike(modes.REFUSE, existing=0, new=True)
    assert ask(client, b"x") == b"x"
    with connect(proxy) as other:
        assert ask(other, b"y") == b""
    proxy.heal()
    with connect(proxy) as other:
        assert ask(other, b"y") == b"y"


def test_blackhole(proxy: Proxy, echo: Echo, client: socket.socket) -> None:
    """A blackhole swallows all in silence, and what it swallowed never comes, nor anything after it."""
    proxy.strike(modes.BLACKHOLE, new=True)
    assert ask(client, b"x") is None
    with connect(proxy) as other:
        assert ask(other, b"y") is None
    proxy.heal()
    assert ask(client, b"z") is None
    assert echo.heard == b"hello"


def test_swallow(proxy: Proxy, echo: Echo, client: socket.socket) -> None:
    """With swallowed replies the server hears all and the client nothing."""
    proxy.strike(modes.SWALLOW)
    assert ask(client, b"x") is None
    assert echo.hears(b"hellox")


def test_hold(proxy: Proxy, echo: Echo, client: socket.socket) -> None:
    """What is held comes when the proxy is healed."""
    proxy.strike(modes.HOLD)
    assert ask(client, b"x") is None
    assert echo.heard == b"hello"
    proxy.heal()
    assert client.recv(10) == b"x"


def test_late(proxy: Proxy, echo: Echo, client: socket.socket) -> None:
    """What is late arrives though the client has gone."""
    proxy.strike(modes.late(0.3))
    client.sendall(b"x")
    time.sleep(0.1)
    client.close()
    assert echo.heard == b"hello"
    assert echo.hears(b"hellox")


def test_mid_reply(proxy: Proxy, echo: Echo, client: socket.socket) -> None:
    """A cut in mid-reply lets the first bytes of it through; the server has heard all."""
    proxy.strike(modes.mid_reply(3))
    assert ask(client, b"123456") == b"123"
    assert echo.heard == b"hello123456"


def test_mid_command(proxy: Proxy, echo: Echo, client: socket.socket) -> None:
    """A cut in mid-command lets the server hear the first bytes only."""
    proxy.strike(modes.mid_command(3))
    assert ask(client, b"123456") in (b"", b"123")
    assert echo.hears(b"hello123")


def test_trickle(proxy: Proxy, client: socket.socket) -> None:
    """Bytes that trickle all come, in order."""
    proxy.strike(modes.TRICKLE)
    data = bytes(range(256)) * 4
    assert ask(client, data) == data


def test_share(proxy: Proxy, client: socket.socket) -> None:
    """A strike at a share of the connections leaves the others alone."""
    with connect(proxy) as second, connect(proxy) as third:
        everyone = [client, second, third]
        assert [ask(connection, b"x") for connection in everyone] == [b"x"] * 3
        proxy.cut(0.5)
        assert sorted(ask(connection, b"y") or b"" for connection in everyone) == [b"", b"", b"y"]


def test_server_gone(proxy: Proxy, echo: Echo) -> None:
    """A connection to a server that isn't there ends at once."""
    echo.close()
    with connect(proxy) as connection:
        assert ask(connection, b"x") == b""
