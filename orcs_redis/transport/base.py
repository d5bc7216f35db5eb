"""What a store needs of a way to a server, whatever it is made of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeAlias

from ..protocol.commands import Command, Reply

__all__ = ["AsyncLink", "BlockingLink", "OnMessage", "Prepare", "PubSub", "attempt_timeout", "nothing"]

# Called before each connecting, in a thread, with the seconds that it may take (an embedded server is started by it).
Prepare: TypeAlias = Callable[[float], object]

# Called with a channel and a message; None: the subscription was confirmed.
OnMessage: TypeAlias = Callable[[str, bytes | None], None]


def nothing() -> None:
    """Do nothing: the default of what is called at each connecting."""


def attempt_timeout(deadline: float) -> float:
    """Return after how many silent seconds a connection is given up, to leave time for another within the deadline."""
    return 0.4 * deadline


class AsyncLink(Protocol):
    """What the asyncio store needs of a way to a server."""

    def call(self, commands: Sequence[Command], expires: float) -> Awaitable[list[Reply]]:
        """Return the commands' replies, errors among them as values.

        Raises:
            ConnectionLost: no answer before `expires`, in seconds of the loop's clock, or the connection broke.
            StorageError: no connection can be had, for a reason that waiting does not mend.

        """
        ...

    def drop(self, before: float) -> None:
        """Use no connection any more that was opened before a time of `time.monotonic`: it leads to a wrong server."""
        ...

    async def open_pubsub(self, on_message: OnMessage, heartbeat: float) -> PubSub:
        """Open a connection for what is published."""
        ...

    async def close(self) -> None:
        """Close what this link has opened, without its subscriptions. Later calls raise UnavailableError."""
        ...


class BlockingLink(Protocol):
    """What the blocking store needs of a way to a server."""

    def call(self, commands: Sequence[Command], expires: float) -> list[Reply]:
        """Return the commands' replies, errors among them as values.

        Raises:
            ConnectionLost: no answer before `expires`, in seconds of `time.monotonic`, or the connection broke.
            StorageError: no connection can be had, for a reason that waiting does not mend.

        """
        ...

    def drop(self, before: float) -> None:
        """Use no connection any more that was opened before a time of `time.monotonic`: it leads to a wrong server."""
        ...

    async def open_pubsub(self, on_message: OnMessage, heartbeat: float) -> PubSub:
        """Open a connection for what is published, in the event loop of a thread for that."""
        ...

    def close(self) -> None:
        """Close what this link has opened, without its subscriptions. Later calls raise UnavailableError."""
        ...


class PubSub(Protocol):
    """A connection that messages come over. A confirmed subscription is delivered as None in place of a message."""

    def subscribe(self, channels: Sequence[str]) -> None:
        """Ask for channels, in one command."""
        ...

    def unsubscribe(self, channels: Sequence[str]) -> None:
        """Ask for no more of channels, in one command."""
        ...

    async def watch(self) -> None:
        """Raise ConnectionLost when the connection broke, or the server has not answered for a heartbeat."""
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...
