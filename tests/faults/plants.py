"""Mistakes of a store, planted into the workers, that the checker has to find."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence

from orcs_redis import PermissionDeniedError, UnavailableError
from orcs_redis.protocol.attempts import ConnectionLost
from orcs_redis.protocol.commands import Command, Reply
from orcs_redis.protocol.writes import Write, Written
from orcs_redis.transport.sockets import SocketLink

from .signals import STRUCK

__all__ = ["PLANTS"]


# Mistakes that the checker has to find


def make_naive() -> None:
    """Give every attempt an operation id of its own."""
    commands = Write.commands

    def renewed(self: Write) -> Sequence[Command]:
        self.end()
        return commands(self)

    Write.commands = renewed  # type: ignore[method-assign]


def make_lying() -> None:
    """Say of some writes that were applied that they were denied."""
    decode, rng = Write.decode, random.Random(1)

    def lying(self: Write, replies: Sequence[Reply]) -> Written:
        written = decode(self, replies)
        if rng.random() < 0.02:
            raise PermissionDeniedError("planted")
        return written

    Write.decode = lying  # type: ignore[method-assign]


def make_faithful() -> None:
    """Stay with a server that takes no writes any more."""
    decode = Write.decode

    def faithful(self: Write, replies: Sequence[Reply]) -> Written:
        for reply in replies:
            if isinstance(reply, Exception) and "READONLY" in str(reply):
                raise UnavailableError("planted")
        return decode(self, replies)

    Write.decode = faithful  # type: ignore[method-assign]


def make_swallowing() -> None:
    """Take what a signal's handler raises for a lost connection."""
    call = SocketLink.call

    def swallowing(self: SocketLink, commands: Sequence[Command], expires: float) -> list[Reply]:
        with contextlib.suppress(*STRUCK):
            return call(self, commands, expires)
        raise ConnectionLost("planted", sent=True)  # here, where nothing leads to the handler any more

    SocketLink.call = swallowing  # type: ignore[method-assign, assignment]


PLANTS = {"naive": make_naive, "lying": make_lying, "faithful": make_faithful, "swallowing": make_swallowing}
