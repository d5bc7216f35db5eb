"""The servers under test, and what they say about themselves."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import redis

from orcs_redis.transport.embedded import attach, find_server


class Server:
    """A running server: `url` is the store's, `plain` is redis-py's."""

    def __init__(self, name: str, url: str, plain: str) -> None:
        self.name = name
        self.url = url
        self.plain = plain
        self.client = redis.Redis.from_url(plain)
        self._prefix = f"bench-{uuid.uuid4().hex[:8]}"
        self._namespaces = 0
        about: Any = self.client.info("server")
        self.version = f"{about.get('server_name', 'redis')} {about.get('valkey_version') or about['redis_version']}"

    def namespace(self) -> str:
        """Return a new namespace."""
        self._namespaces += 1
        return f"{self._prefix}-{self._namespaces}"

    def info(self, section: str) -> dict[str, Any]:
        """Return a section of INFO."""
        answer: Any = self.client.info(section)
        return dict(answer)

    def used_memory(self) -> int:
        """Return the bytes in use."""
        return int(self.info("memory")["used_memory"])

    def cpu(self) -> float:
        """Return the seconds of CPU the server has used."""
        info = self.info("cpu")
        return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])

    def port(self) -> int | None:
        """Return the TCP port, if it has one."""
        return int(self.info("server")["tcp_port"]) or None

    def calls(self, *commands: str) -> tuple[int, int]:
        """Return how often commands were called, and their µs of CPU in all."""
        stats = self.info("commandstats")
        found = [stats[f"cmdstat_{name}"] for name in commands if f"cmdstat_{name}" in stats]
        return sum(s["calls"] for s in found), sum(s["usec"] for s in found)

    def traffic(self) -> tuple[int, int]:
        """Return the bytes that came in and went out so far."""
        stats = self.info("stats")
        return int(stats["total_net_input_bytes"]), int(stats["total_net_output_bytes"])

    def clear(self) -> None:
        """Remove all that was written, in small steps."""
        batch: list[Any] = []
        for pattern in (f"{{{self._prefix}-*", f"{self._prefix}-*"):
            for key in self.client.scan_iter(match=pattern, count=5000):
                batch.append(key)
                if len(batch) == 1000:
                    self.client.unlink(*batch)
                    batch.clear()
        if batch:
            self.client.unlink(*batch)


@contextlib.contextmanager
def open_server(what: str, command: Sequence[str] = ()) -> Iterator[Server]:
    """Start a server ("redis", "embedded"), or use the one at a URL; what was written there is removed at the end.

    `command` starts another "redis" than the redis-server on the PATH.
    """
    with contextlib.ExitStack() as stack:
        if what == "redis":
            server = stack.enter_context(_redis_server(command))
        elif what == "embedded":
            folder = tempfile.mkdtemp(prefix="orcs-bench-")
            stack.callback(_remove, Path(folder))
            attachment = attach(Path(folder), 20.0)
            server = Server("embedded", f"embedded://{folder}", f"unix://{attachment.socket}")
            stack.callback(_wait_for_end, server.info("server")["process_id"])
            stack.callback(attachment.release)
        else:
            server = Server("given", what, what)
            stack.callback(server.clear)
        stack.callback(server.client.close)
        yield server


def _remove(folder: Path) -> None:
    """Remove a folder in which the server or its supervisor may still be leaving files as they end."""
    for _ in range(500):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.02)


def _wait_for_end(pid: int) -> None:
    """Its supervisor stops it, since nobody is attached any more."""
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)


@contextlib.contextmanager
def _redis_server(command: Sequence[str]) -> Iterator[Server]:
    command = command or [shutil.which("redis-server") or str(find_server())]
    with tempfile.TemporaryDirectory(prefix="orcs-bench-") as folder:
        path = f"{folder}/s"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        own = ["--port", str(port), "--bind", "127.0.0.1", "--unixsocket", path]
        command = [*command, *own, "--save", "", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            for _ in range(200):
                if Path(path).exists():
                    break
                time.sleep(0.02)
            yield Server("redis", f"unix://{path}", f"unix://{path}")
        finally:
            process.kill()
            process.wait()
