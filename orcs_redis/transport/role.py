"""Whether a connection leads to the right server: asked with HELLO, which every user may, before it is used again."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Protocol

from ..errors import StorageError
from ..interrupts import raise_interruption, suppress
from ..protocol.attempts import AttemptError, WrongServer, check
from ..protocol.commands import Command, Reply, as_map

__all__ = ["ASK_ROLE", "Checked", "Role"]

ASK_ROLE: list[Command] = [("HELLO",)]
"""Asks for the server's role."""

_PERIOD = 1.0  # for how many seconds a connection is used before the server is asked for its role again


class Checked(Protocol):
    """A connection that is asked from time to time where it leads to."""

    checked: float  # when it was last, of time.monotonic


class Role:
    """What a link knows of its server: where a master was, a replica is refused: it was demoted.

    if not role.is_due(connection, now):
        return connection
    with role.asking(connection, now):
        role.check(HELLO's answer)
        return connection
    open another one
    """

    def __init__(self) -> None:
        self._master = False
        self._dropped = -math.inf

    def drop(self, before: float) -> None:
        """Use no connection any more that was opened before then."""
        self._dropped = max(self._dropped, before)

    def is_dropped(self, opened: float) -> bool:
        """Whether what was opened at a time is to be used no more."""
        return opened < self._dropped

    @staticmethod
    def is_due(connection: Checked, now: float) -> bool:
        """Whether to ask before a connection is used."""
        return now >= connection.checked + _PERIOD

    def asking(self, connection: Checked, now: float) -> Asking:
        """Return the context in which the server is asked; behind it, the connection is of no use."""
        return Asking(self, connection, now)

    def check(self, hello: Reply) -> None:
        """Judge an answer to HELLO; raise WrongServer if it comes from a replica in a master's place."""
        check((hello,))
        with suppress(TypeError, ValueError):  # no map: what matters of it is checked elsewhere
            role = as_map(hello).get(b"role")
            if role == b"master":
                self._master = True
            elif role is not None and self._master:
                raise WrongServer("the server refuses: it is a replica now")


class Asking:
    """Notes when it was asked; what goes wrong ends the block and no more."""

    __slots__ = ("_connection", "_now", "_role")

    def __init__(self, role: Role, connection: Checked, now: float) -> None:
        self._role, self._connection, self._now = role, connection, now

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            self._connection.checked = self._now
            return False
        raise_interruption(error)
        if isinstance(error, WrongServer):
            self._role.drop(self._now)
        return isinstance(error, (AttemptError, StorageError))
