"""What an attempt can end in, and when the next one is due.

Here alone, what goes wrong between a store and its server gets its name. `AttemptError` and its kinds are what an
attempt may end in while another one may still succeed. They never reach the caller: when the deadline has come, `Retry`
turns the last one into a StorageError.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Protocol, TypeVar

import hiredis

from ..errors import (
    LayoutError,
    OutcomeUnknownError,
    PermissionDeniedError,
    StorageError,
    StoreFullError,
    UnavailableError,
    UnsupportedServerError,
)
from ..interrupts import raise_interruption
from .commands import Reply, as_map

__all__ = [
    "AttemptError",
    "AttemptTimeout",
    "ConnectionLost",
    "OperationEvicted",
    "Retried",
    "Retry",
    "ScriptNotLoaded",
    "ServerBusy",
    "TornRead",
    "WrongServer",
    "check",
    "check_server",
    "copy_of_error",
    "not_callable_error",
    "translate",
    "without_traceback",
]

E = TypeVar("E", bound=Exception)
_LARGE = 256 * 1024  # bytes of a request from which on a hosted server may have a limit


class AttemptError(Exception):
    """An attempt failed, and the operation may be tried again."""

    sent = False  # whether it may have been, or may yet be, executed all the same
    pause = True  # whether to wait before the next attempt
    large = False  # whether sending it again is expensive, and likely to fail again

    def final(self, before: str, *, maybe_applied: bool) -> StorageError:
        """Return the error to raise when there is no time for another attempt; `before`: an earlier reason."""
        text = f"{self}; before that: {before}" if before and isinstance(self, AttemptTimeout) else str(self)
        if maybe_applied:
            return OutcomeUnknownError(f"no answer in time, and the write may have been applied: {text}")
        return UnavailableError(text)


class ConnectionLost(AttemptError):
    """There is no connection, it broke, or no answer came over it."""

    def __init__(self, reason: str, *, sent: bool, size: int = 0) -> None:
        """`size`: bytes of the request over which a connection broke, 0 if it did not break."""
        self.sent = sent
        self.large = size >= _LARGE
        hint = f": does the server limit the size of requests? This one has {size} bytes" if self.large else ""
        super().__init__(reason + hint)


class AttemptTimeout(ConnectionLost):
    """The time was over: the reason may be that of an earlier attempt."""


class ServerBusy(AttemptError):
    """The server refused for now: it was not executed."""


class WrongServer(ServerBusy):
    """The connection leads to a server that can't serve the request (a replica, say): another connection may."""


class ScriptNotLoaded(AttemptError):
    """The server doesn't know the script's digest: it was not executed."""

    pause = False


class TornRead(AttemptError):
    """A write came between the commands of one read."""

    pause = False


class OperationEvicted(AttemptError):
    """The server has evicted operations among which an earlier attempt at this one may have been."""

    pause = False


def copy_of_error(error: E) -> E:
    """Return an error like this one: each caller raises its own, as a raised one gets a traceback."""
    copy = type(error).__new__(type(error), *error.args)
    vars(copy).update(vars(error))
    copy.__cause__ = error.__cause__
    return copy


def without_traceback(error: E) -> E:
    """Return the error, its causes included, without tracebacks: their frames would keep alive what was being done."""
    found: BaseException | None = error
    while found is not None:
        found.__traceback__ = found.__context__ = None
        found = found.__cause__
    return error


class Retried(Protocol):
    """What `Retry` asks of an operation."""

    @property
    def writes(self) -> bool:
        """Whether it changes something."""
        ...

    def is_conclusive(self, error: StorageError) -> bool:
        """Whether a refusal also means that no earlier attempt, still on its way perhaps, will be applied."""
        ...


_MIN_LAST_ATTEMPT = 0.15  # seconds for the last attempt at a write


class Retry:
    """The attempts at one operation: when the next one is due, and what it comes to when none is left."""

    __slots__ = ("_before", "_delay", "_expires", "_maybe_applied")

    def __init__(self, expires: float) -> None:
        self._expires = expires
        self._delay = 0.0  # the second attempts come at once, in the order of the first
        self._maybe_applied = False
        self._before = ""  # the last reason other than that the time was over

    def after(self, problem: AttemptError | StorageError, now: float, request: Retried) -> float:
        """Return how many seconds to wait before the next attempt (backoff with jitter).

        Raises:
            UnavailableError: the deadline has come; a write was certainly not applied.
            OutcomeUnknownError: the deadline has come, or the answer is not conclusive; it may have been applied,
                or may yet be.
            StorageError: the final answer.

        """
        if isinstance(problem, StorageError):
            if self._maybe_applied and not request.is_conclusive(problem):
                raise OutcomeUnknownError(f"an answer was lost, and the next attempt was refused: {problem}") from None
            try:
                raise problem
            finally:
                del problem  # else it and this frame are a cycle
        self._maybe_applied |= problem.sent and request.writes
        if isinstance(problem, OperationEvicted) and self._maybe_applied:
            raise OutcomeUnknownError("an answer was lost, and the server has evicted what it knew of it") from None
        delay = self._delay * random.uniform(0.5, 1.5) if problem.pause else 0.0
        # Refused so far: an attempt that is cut short by the deadline would only leave the outcome open.
        least = _MIN_LAST_ATTEMPT if request.writes and not self._maybe_applied else 0.0
        if now + delay + least >= self._expires:
            raise problem.final(self._before, maybe_applied=self._maybe_applied) from None
        if not isinstance(problem, AttemptTimeout):
            self._before = str(problem)
        if problem.large:
            self._delay = min(max(2 * self._delay, 0.1), 5.0)
        elif problem.pause:
            self._delay = min(2 * self._delay or 0.005, 0.2)
        return delay


def check(replies: Sequence[Reply]) -> None:
    """Raise the first error among the replies, translated."""
    for reply in replies:
        if isinstance(reply, hiredis.ReplyError):
            raise translate(str(reply))


_MINIMUM = {"redis": 7, "valkey": 7}  # major versions


def check_server(hello: Reply) -> None:
    """Raise UnsupportedServerError if the answer to HELLO comes from a server that can't be used."""
    try:
        about = as_map(hello)
        server = str(about.get(b"server", b"redis"), errors="replace")
        version = str(about.get(b"version", b"0"), errors="replace")
    except (TypeError, ValueError) as error:
        raise_interruption(error)
        raise UnsupportedServerError("what answers there is neither Redis nor Valkey") from None
    if about.get(b"mode") == b"cluster":
        raise UnsupportedServerError("this server is a node of a cluster")
    major = version.split(".", 1)[0]
    if server in _MINIMUM and (not major.isdigit() or int(major) < _MINIMUM[server]):
        raise UnsupportedServerError(f"{server} {version} is too old: Redis 7.0 or Valkey 7.2 is needed")


# Refusals that may pass: nothing was executed. In a script they come before its first write.
_TRANSIENT_CODES = {
    "BUSY": "a script keeps it busy",
    "CLUSTERDOWN": "its cluster is down",
    "LOADING": "it is loading its data",
    "MISCONF": "it can't save to its disk",
    "NOREPLICAS": "too few replicas are connected to it",
    "TRYAGAIN": "a slot is moving",
}
_WRONG_SERVER_CODES = {
    "MASTERDOWN": "it is a replica without its master",
    "NOAUTH": "the connection is not authenticated any more",
    "READONLY": "it is a replica",
}
_COMMAND = re.compile(r"unknown command ['`]([A-Za-z|]{1,30})['`]")
_DENIED = ("NOPERM", "NOAUTH", "WRONGPASS", "DENIED")


def translate(text: str, *, opening: bool = False) -> StorageError | AttemptError:
    """Return the error to raise for a server's error reply; `opening`: it refuses a new connection.

    Arguments that it quotes (they may be a payload) are left out.
    """
    code, _, rest = text.partition(" ")
    gist = text.partition("'")[0].partition("`")[0].strip()[:160]
    if code == "NOSCRIPT":
        return ScriptNotLoaded(gist)
    if code == "EXECABORT" and (why := text.partition("because of: ")[2]):
        return translate(why, opening=opening)
    if code in _TRANSIENT_CODES:
        return ServerBusy(f"the server refuses for now: {_TRANSIENT_CODES[code]} ({code})")
    if "max number of clients" in text:
        return ServerBusy(f"the server refuses for now: {gist}")
    if code in _WRONG_SERVER_CODES and not (opening and code == "NOAUTH"):
        return WrongServer(f"the server refuses: {_WRONG_SERVER_CODES[code]} ({code})")
    if code == "NOPROTO" or "nknown command" in text or "Unknown Redis command" in text:
        found = _COMMAND.search(text)
        name = f"the command {found[1].upper()}" if found else "a command"
        return UnsupportedServerError(f"the server lacks {name}: Redis 7.0 or Valkey 7.2 is needed, nothing renamed")
    if code in _DENIED or "ACL failure" in text or "The user executing the script" in text:
        return PermissionDeniedError(f"the server denied it: {gist}")
    if code == "ERR" and ("invalid password" in rest or "AUTH" in rest):
        return PermissionDeniedError("the server denied it: wrong user name or password")
    if code == "OOM":
        return StoreFullError("the server is out of memory (maxmemory)")
    if code == "WRONGTYPE":
        return LayoutError("a key holds another type than this store's")
    if code in ("MOVED", "ASK", "CROSSSLOT"):
        return UnsupportedServerError("this server is a node of a cluster")
    return StorageError(f"the server answered: {gist}")


def not_callable_error(answer: bytes, commands: str) -> StorageError:
    """Return the error for a script's answer that commands can't be called: `answer` is DENIED or MISSING."""
    if answer == b"DENIED":
        return PermissionDeniedError(f"the user may not call {commands}: nothing was written")
    return UnsupportedServerError(f"the server has no command {commands}, or it was renamed")
