"""Which errors are no answer to what was asked, but come out of the caller's signal handler.

A handler runs between two instructions of the main thread, so what it raises comes out of whatever is done there at
that moment. A TimeoutError looks like a lost connection then, a ValueError like bad data. So wherever an error is
caught and taken for one of these, `raise_interruption` is called first.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal.getsignal has a try of its own, in which it would lose a handler's ValueError
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import CodeType, FrameType, TracebackType

__all__ = ["interruption", "raise_interruption", "suppress"]


def interruption(error: BaseException) -> BaseException | None:
    """Return what a signal handler raised, if that is ``error`` or what ``error`` was made from; else None.

    Only Python handlers that are still installed are recognised.
    """
    # Not current_thread: a handler's KeyError in it, once, and it takes this for another thread from then on.
    if threading.get_ident() != threading.main_thread().ident or not (handlers := set(_handlers())):
        return None
    stack = set(map(id, _stack()))  # no frames: this one would be among them, and a cycle
    found: BaseException | None = error
    while found is not None:
        frames = list(_frames(found))
        if found is not error and frames and id(frames[0]) in stack:
            return None  # our caller is handling it: it is the context of all that is raised here, and older
        if any(frame.f_code in handlers for frame in frames):
            return found
        found = found.__cause__ or found.__context__
    return None


def raise_interruption(error: BaseException) -> None:
    """Raise what a signal handler raised, if ``error`` is that or was made from it."""
    if (found := interruption(error)) is not None:
        raise found


class suppress(contextlib.suppress):  # noqa: N801  # as it is called there
    """`contextlib.suppress`, but for what a signal handler raised."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Suppress the error, or raise what a signal handler raised."""
        if error is not None:
            raise_interruption(error)
        return super().__exit__(kind, error, trace)


def _handlers() -> Iterator[CodeType]:
    for number in range(1, signal.NSIG):
        handler = _signal.getsignal(number)
        if callable(handler):
            handler = getattr(handler, "func", handler)  # of a partial
            code = getattr(handler, "__code__", None) or getattr(type(handler).__call__, "__code__", None)
            if code is not None:
                yield code


def _frames(error: BaseException) -> Iterator[FrameType]:
    entry = error.__traceback__
    while entry is not None:
        yield entry.tb_frame
        entry = entry.tb_next


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
