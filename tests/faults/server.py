"""A server to be killed, stopped and demoted."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ..servers import BINARY, free_port

__all__ = ["PASSWORD", "USER", "Server"]

USER, PASSWORD = "worker", "secret"


class Server:
    """A server that is killed, stopped and started again, and has forgotten nothing that it acknowledged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.stopped = False
        self.admin: Any = redis.Redis(
            port=self.port, socket_timeout=2, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0)
        )

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._folder.mkdir(exist_ok=True)
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        arguments += ["--appendonly", "yes", "--appendfsync", "always", "--repl-diskless-sync-delay", "0"]
        arguments += ["--user", USER, "on", f">{PASSWORD}", "~*", "&*", "+@all"]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen([BINARY, *arguments], stdout=log, stderr=log)
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(redis.RedisError):
                if self.admin.ping():
                    return
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError((self._folder / "server.log").read_text()[-2000:])
            time.sleep(0.01)

    def is_complete_replica(self) -> bool:
        """Whether it has all that its master has, or nearly so, and would have it after a kill too."""
        facts = self.admin.info()
        rewriting = facts["aof_rewrite_in_progress"] or facts["aof_rewrite_scheduled"]
        return facts["role"] == "slave" and facts["master_link_status"] == "up" and not rewriting

    def kill(self) -> None:
        """Kill it as kill -9 does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self.stopped = False
        self.admin.connection_pool.disconnect()

    def stop(self) -> None:
        """Let it stand still."""
        assert self._process is not None
        self.stopped = True
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """End the standstill."""
        if self._process is not None and self.stopped:
            self._process.send_signal(signal.SIGCONT)
        self.stopped = False

    def close(self) -> None:
        self.kill()
        self.admin.close()
