"""What to ask of a server: a request is a value that knows its commands and how to read their replies.

A plan is a generator that yields requests and is sent their results. Nothing here waits: the drivers do.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from ..errors import StorageError
from ..scripts import Script
from .attempts import AttemptError, ScriptNotLoaded, check
from .commands import Argument, Command, Reply

__all__ = ["Listener", "Pause", "Plan", "Request", "Together", "single"]

T = TypeVar("T")


class Request(Generic[T]):
    """Commands, and what their replies mean. A driver may send it several times until there is an answer."""

    __slots__ = ("_evaluate", "deadline")
    writes = False

    def __init__(self) -> None:
        self.deadline: float | None = None  # seconds for all attempts, where it is not the store's
        self._evaluate = False  # send the script's text, since the server doesn't know its digest

    def commands(self) -> Sequence[Command]:
        """Return the commands of the next attempt."""
        raise NotImplementedError

    def decode(self, replies: Sequence[Reply]) -> T:
        """Return what the replies mean, or raise: a StorageError, or an AttemptError if another attempt may succeed."""
        raise NotImplementedError

    def is_conclusive(self, error: StorageError) -> bool:
        """Whether a refusal also means that no earlier attempt, still on its way perhaps, will be applied."""
        return True

    def in_absence(self) -> StorageError | None:
        """Return what a write comes to where there is no namespace; None: one is made for it."""
        return None

    def end(self) -> None:
        """Note that it is finished, however it ended, and will not be sent again."""

    def _script(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> Command:
        verb, text = ("EVAL", script.source) if self._evaluate else ("EVALSHA", script.sha)
        return (verb, text, b"%d" % len(keys), *keys, *arguments)

    def _check(self, replies: Sequence[Reply]) -> None:
        try:
            check(replies)
        except ScriptNotLoaded:
            self._evaluate = True
            raise


Listener: TypeAlias = Callable[[bytes | None], None]
"""Called with a channel's message, or with None: messages may have been missed, or begin to come now."""


class Pause(NamedTuple):
    """What a plan yields to wait for some seconds, or until an asyncio.Event or threading.Event is set."""

    seconds: float
    wake: Any = None


class Together(Request[builtins.list[Any]]):
    """Reads that are asked for at the same time, as one request: the list of their results, or the first's error.

    An attempt sends those that have no result yet.
    """

    __slots__ = ("_missing", "_results", "_widths")

    def __init__(self, requests: Iterable[Request[Any]]) -> None:
        super().__init__()
        self._missing = dict(enumerate(requests))
        self._results: builtins.list[Any] = [None] * len(self._missing)
        self._widths: builtins.list[int] = []
        if any(request.writes for request in self._missing.values()):
            raise ValueError("writes have outcomes of their own: they are not performed as one request")

    def commands(self) -> Sequence[Command]:
        """Return the commands of all that are missing."""
        parts = [request.commands() for request in self._missing.values()]
        self._widths = [len(part) for part in parts]
        return [command for part in parts for command in part]

    def decode(self, replies: Sequence[Reply]) -> builtins.list[Any]:
        """Return the results; if some are missing still, raise why."""
        first: AttemptError | None = None
        at = 0
        for (n, request), width in zip(tuple(self._missing.items()), self._widths, strict=True):
            try:
                self._results[n] = request.decode(replies[at : at + width])
            except AttemptError as problem:
                first = first or problem
            else:
                del self._missing[n]
            at += width
        if first is not None:
            raise first
        return self._results


Plan = Generator[Request[Any] | Pause, Any, T]


def single(make: Callable[..., Request[T]], *arguments: Any) -> Plan[T]:
    """Return the plan of one request, made when the plan begins."""
    result: T = yield make(*arguments)
    return result
