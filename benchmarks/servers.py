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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import redis

from orcs_redis.transport.embedded import attach, find_server

from .harness import Counters


class Server(Counters):
    """A running server: `url` is the store's, `plain` is redis-py's, `tcp` is that of both over TCP."""

    def __init__(self, name: str, url: str, plain: str, tcp: str | None) -> None:
        self.name, self.url, self.plain, self.tcp = name, url, plain, tcp
        self.client = redis.Redis.from_url(plain)
        super().__init__(self.client.info)
        self._prefix = f"bench-{uuid.uuid4().hex[:8]}"
        self._namespaces = 0
        about = self.info("server")
        self.version = f"{about.get('server_name', 'redis')} {about.get('valkey_version') or about['redis_version']}"

    def namespace(self) -> str:
        """Return a new namespace."""
        self._namespaces += 1
        return f"{self._prefix}-{self._namespaces}"

    def usec(self, *commands: str) -> int:
        """Return the µs of CPU that commands have taken so far, with those that they call."""
        stats = self.info("commandstats")
        return sum(stats[f"cmdstat_{name}"]["usec"] for name in commands if f"cmdstat_{name}" in stats)

    def traffic(self) -> tuple[int, int]:
        """Return the bytes that came in and went out so far."""
        stats = self.info("stats")
        return int(stats["total_net_input_bytes"]), int(stats["total_net_output_bytes"])

    def clear(self) -> None:
        """Remove all that was written, in small steps."""
        for pattern in (f"{{{self._prefix}-*", f"{self._prefix}-*"):
            for key in self.client.scan_iter(match=pattern, count=5000):
                self.client.unlink(key)


@contextlib.contextmanager
def open_server(what: str, command: Sequence[str] = ()) -> Iterator[Server]:
    """Start a server ("redis", "embedded"), or use the one at a URL; what was written there is removed at the end.

    `command` starts another "redis" than the redis-server on the PATH.
    """
    with contextlib.ExitStack() as stack:
        if what == "redis":
            server = stack.enter_context(_redis_server(command))
        elif what == "embedded":
            folder = Path(tempfile.mkdtemp(prefix="orcs-bench-"))
            stack.callback(_until, lambda: _removed(folder))
            attachment = attach(folder, 20.0)
            server = Server("embedded", f"embedded://{folder}", f"unix://{attachment.socket}", None)
            pid = server.info("server")["process_id"]
            stack.callback(_until, lambda: not _runs(pid))
            stack.callback(attachment.release)
        else:
            server = Server("given", what, what, what if what.startswith("redis://") else None)
            stack.callback(server.clear)
        stack.callback(server.client.close)
        yield server


def _removed(folder: Path) -> bool:
    """Remove a folder in which the server or its supervisor may still be leaving files as they end."""
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _runs(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def _until(condition: Callable[[], bool]) -> None:
    """Wait for it, ten seconds at most."""
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)


@contextlib.contextmanager
def _redis_server(command: Sequence[str]) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="orcs-bench-") as folder:
        path = f"{folder}/s"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        own = ["--port", str(port), "--bind", "127.0.0.1", "--unixsocket", path, "--save", "", "--dir", folder]
        command = command or [shutil.which("redis-server") or str(find_server())]
        process = subprocess.Popen([*command, *own], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _until(Path(path).exists)
            yield Server("redis", f"unix://{path}", f"unix://{path}", f"redis://127.0.0.1:{port}/0")
        finally:
            process.kill()
            process.wait()
