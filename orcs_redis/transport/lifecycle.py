"""What a store has under way and how much of it at a time, whether it is open, how it stands with its server.

Nothing here waits.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from ..errors import OutcomeUnknownError, PermissionDeniedError, StorageError, UnavailableError
from ..interrupts import raise_interruption
from ..model.meta import SyncMode, SyncStatus
from ..protocol.attempts import AttemptError
from ..protocol.commands import Reply
from ..protocol.request import Request
from ..protocol.writer import Namespace
from .base import AsyncLink, BlockingLink

__all__ = ["IN_FLIGHT", "NOT_SENT", "NO_ANSWER", "Lifecycle", "decode_replies"]

T = TypeVar("T")
_DENIAL_TIME = 1.0  # seconds

IN_FLIGHT = 256
"""How many calls a store has under way at a time; the others wait."""

NO_ANSWER = (UnavailableError, OutcomeUnknownError)
"""What a call ends in if no server gave it an answer that counts."""

NOT_SENT = "not sent: the server has done nothing for a deadline"
"""Why a call that waited for others failed: those got no answer."""

_UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # of decoding what is no answer


def decode_replies(request: Request[T], replies: Sequence[Reply], link: AsyncLink | BlockingLink) -> T:
    """Return what the replies mean, or raise what `Request.decode` raises.

    Raises:
        OutcomeUnknownError: the replies to a write can't be decoded.
        StorageError: those to a read can't be decoded.

    """
    try:
        return request.decode(replies)
    except (AttemptError, StorageError):
        raise
    except _UNREADABLE as error:
        raise_interruption(error)
        link.drop(time.monotonic())  # they may be another's, and so may those that follow
        text = f"the server's reply is no answer ({type(error).__name__})"
        if request.writes:
            raise OutcomeUnknownError(f"{text}, and the write may have been applied") from None  # it may quote a value
        raise StorageError(text) from None


class Lifecycle:
    """A store's calls from opening to closing.

    There is no lock: a signal handler or a finalizer may use the store wherever its thread was interrupted. What is
    under way is a dict, whose single steps can't be interrupted, and not a counter, which an exception out of a signal
    handler could leave wrong.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.namespace: Namespace | None = None  # None: it is not open yet
        self.closed = False
        self.active: dict[object, tuple[int, int]] = {}  # calls under way: how many writes they wait for; their thread
        self.last_answer_at = -math.inf  # of any request, by the clock of the driver's deadlines
        self._pid = os.getpid()
        self._last_success: float | None = None  # seconds since 1970
        self._failing = False
        self._denied: str | None = None  # why the server last refused writes; None: it did not
        self._denied_until = 0.0  # when it may be asked again

    def begin_plan(self, call: object) -> None:
        """Let a call of several requests in, which goes on though the store is closing, until it is out of `active`.

        Raises what `check_open` raises.
        """
        self.check_open()
        self.active[call] = 0, threading.get_ident()

    def begin(self, request: Request[Any], call: object = None) -> None:
        """Note that a request begins, by itself or in a call that `begin_plan` let in.

        Raises:
            RuntimeError: this process is a fork of the one that opened the store.
            UnavailableError: the store is closed.
            PermissionDeniedError: a write, and writing is not allowed.

        """
        if call is None:
            self.check_open()
        self.check_right(request)
        self.active[call or request] = request.writes, threading.get_ident()

    def end(self, request: Request[Any], error: BaseException | None, now: float, *, asked: bool) -> None:
        """Note how it ended; by itself, it is out of `active` already.

        Args:
            request: what was to be done.
            error: why it was not.
            now: of the clock that the driver's deadlines are of.
            asked: whether it was given to the link: else it was refused here, and the server is as before.

        """
        request.end()
        if not asked:
            return
        if self._denied is not None and request.writes:
            if error is None:
                self._denied = None
            elif isinstance(error, PermissionDeniedError) and time.monotonic() >= self._denied_until:
                self.deny(error)
        if error is None:
            self._failing = False
            self.last_answer_at, self._last_success = now, time.time()
        elif isinstance(error, NO_ANSWER):
            self._failing = True
        elif isinstance(error, StorageError):
            self.last_answer_at = now

    @property
    def absent(self) -> Namespace | None:
        """The namespace, if it was absent when the store last looked; None: it is there."""
        namespace = self.namespace
        return None if namespace is None or namespace.known else namespace

    def is_busy(self) -> bool:
        """Whether another thread has something under way."""
        me = threading.get_ident()
        return any(thread != me for _, thread in tuple(self.active.values()))

    @property
    def is_forked(self) -> bool:
        """Whether this process is a fork of the one that opened the store."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Raise RuntimeError in a fork of the process that opened the store."""
        if self.is_forked:
            raise RuntimeError("this store was opened before a fork: open one in the child")

    def check_open(self) -> None:
        """Raise RuntimeError in a fork of the process that opened the store, UnavailableError if it is closed."""
        self.check_process()
        if self.closed:
            raise UnavailableError("the store is closed")

    def check_right(self, request: Request[Any]) -> None:
        """Raise PermissionDeniedError for a write, if writing was denied just now."""
        if request.writes and self._denied is not None and time.monotonic() < self._denied_until:
            raise PermissionDeniedError(self._denied)

    def deny(self, error: StorageError) -> None:
        """Refuse writes for a while without asking the server."""
        self._denied, self._denied_until = str(error), time.monotonic() + _DENIAL_TIME

    def sync_status(self) -> SyncStatus:
        """How the store stands with its server, without asking it."""
        if self.closed or self.namespace is None:
            return SyncStatus.offline()
        last = self._last_success
        return SyncStatus(
            mode=SyncMode.ERROR if self._failing else SyncMode.ONLINE,
            last_sync=None if last is None else datetime.fromtimestamp(last, UTC),
            pending_uploads=sum(writes for writes, _ in tuple(self.active.values())),
        )
