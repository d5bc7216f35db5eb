"""How tests run the command line: in this process, by the fixture `run`, or in a terminal."""

from __future__ import annotations

import json
import os
import pty
import sys
from collections.abc import Callable

__all__ = ["Outcome", "Run", "in_a_terminal"]


class Outcome:
    """How a run of the command line went."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> object:
        return json.loads(self.out)


Run = Callable[..., Outcome]


def in_a_terminal(*arguments: str, until: str | None = None, code: int = 0, columns: int = 80) -> str:
    """Run the command line in a pseudo-terminal and return all that it got; press Ctrl-C after `until`."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(columns)}
        os.execv(sys.executable, [sys.executable, "-m", "orcs_redis.cli", *arguments])
    got = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux says so that the other end is closed
            break
        if not part:
            break
        got += part
        if until is not None and until.encode() in got:
            os.write(terminal, b"\x03")
            until = None
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    return got.decode()
