"""The private server of a simulation."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hiredis

from orcs_redis.protocol.commands import Command, as_error
from orcs_redis.transport.embedded import _die_with_parent, find_server

# Small hashes keep the order in which they were filled, so that the server's own randomness has nothing to choose from.
_OPTIONS = ("--port", "0", "--save", "", "--hash-max-listpack-entries", "1000", "--hash-max-listpack-value", "100000")
_COPY = "for _, key in ipairs(redis.call('KEYS', '*')) do redis.call('COPY', key, key, 'DB', ARGV[1]) end"

_pack: Callable[[Any], bytes] = hiredis.pack_command


class Server:
    """A server in a temporary folder, without any network. RESP3 brings the messages over the same connection."""

    def __init__(self, binary: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="orcs-redis-simulation-")
        path = f"{self._folder.name}/s"
        command = [str(binary or find_server()), *_OPTIONS, "--unixsocket", path, "--dir", self._folder.name]
        prepare = _die_with_parent() if sys.platform == "linux" else None
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=prepare
        )
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        deadline = time.monotonic() + 20
        while self._socket.connect_ex(path):
            assert self._process.poll() is None, f"{command[0]} did not start"
            assert time.monotonic() < deadline, f"{command[0]} did not start"
            time.sleep(0.01)
        self._reader = hiredis.Reader(notEnoughData=...)
        self._messages: list[tuple[str, bytes]] = []
        self._scripts: set[bytes] = set()
        self.run(("HELLO", 3))
        self._socket.sendall(_pack(("PSUBSCRIBE", "*")))  # it is answered by a push

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def run(self, *commands: Command) -> list[Any]:
        """Return the replies; errors are values."""
        self._socket.sendall(b"".join(map(_pack, commands)))
        replies: list[Any] = []
        while len(replies) < len(commands):
            while (reply := self._reader.gets()) is ...:
                self._reader.feed(self._socket.recv(1 << 16))
            if isinstance(reply, hiredis.PushNotification):
                if reply[0] == b"pmessage":
                    self._messages.append((reply[2].decode(), reply[3]))
            else:
                replies.append(reply)
        return replies

    def check(self, *commands: Command) -> list[Any]:
        """Return the replies, of which none is an error."""
        replies = self.run(*commands)
        for command, reply in zip(commands, replies, strict=True):
            assert as_error(reply) is None, f"{command}: {reply}"
        return replies

    def messages(self) -> list[tuple[str, bytes]]:
        """Return what was published since: channel and message. Complete after a command that publishes nothing."""
        messages, self._messages = self._messages, []
        return messages

    def reset(self, scripts: list[Any]) -> None:
        """Forget all data, and know these scripts."""
        missing = [script for script in scripts if script.sha not in self._scripts]
        self.check(("FLUSHALL",), *(("SCRIPT", "LOAD", script.source) for script in missing))
        self._scripts.update(script.sha for script in missing)

    def snapshot(self, number: int) -> None:
        """Copy all data to another database."""
        self.check(("EVAL", _COPY, 0, number))

    def restore(self, number: int) -> None:
        """Put all data back to what it was at a snapshot."""
        self.check(("FLUSHDB",), ("SELECT", number), ("EVAL", _COPY, 0, 0), ("SELECT", 0))
