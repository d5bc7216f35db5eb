"""A process that is interrupted while it works at a store: test_interruptions.py runs it.

Its signal handler raises, in the midst of a save, an append and so on. It strikes by a timer, or at each call in turn:
a handler runs when a function was entered or a function of C has returned, and at both points Python calls a profiler.
What was acknowledged is written down, and compared with what is read meanwhile and in the end.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import redis
import redis.asyncio

import orcs_redis
import orcs_redis.sync
from orcs_redis import ConversationTurn, NotFoundError, SessionAsset, ToolCallRecord

PACKAGE = str(Path(orcs_redis.__file__).parent)


class Limit(Exception):
    """What a task queue raises when a task's time is over."""


KINDS: dict[str, type[BaseException]] = {
    "limit": Limit,
    "timeout": TimeoutError,
    "value": ValueError,
    "memory": MemoryError,
    "interrupt": KeyboardInterrupt,
}


class Strikes:
    """A signal handler that raises, and what it has raised."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind
        self.package_only = False
        self.number = 0
        self.lost = 0  # by Python itself, in a finalizer or a callback of the loop's
        self.forget()
        signal.signal(signal.SIGALRM, self.strike)
        sys.unraisablehook = self.note

    def forget(self) -> None:
        self.raised: BaseException | None = None

    def strike(self, signal_number: int, frame: FrameType | None) -> None:
        self.number += 1
        self.raised = self.kind("struck")
        raise self.raised

    def note(self, unraisable: Any) -> None:
        self.lost += unraisable.exc_value is self.raised

    def note_of_loop(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        while error is not None:
            if error is self.raised:
                self.lost += 1
                return
            error = error.__cause__ or error.__context__


class Timer:
    """Strikes once, after some time: then, or when the package is at work the next time."""

    def __init__(self, longest: float, strike: Callable[..., None], *, package_only: bool) -> None:
        self._longest = longest
        self._strike = strike
        self._package_only = package_only

    def __enter__(self) -> None:
        self._over = False
        signal.signal(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, self._longest))

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self._over:
            return  # it rang just before it was turned off
        if self._package_only and frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            signal.setitimer(signal.ITIMER_REAL, 1e-5)
        else:
            self._strike(number, frame)

    def __exit__(self, *_: object) -> None:
        self._over = True
        signal.setitimer(signal.ITIMER_REAL, 0)


class AfterCalls:
    """Strikes once, when so many calls were made."""

    def __init__(self, left: int, strike: Callable[..., None], *, package_only: bool) -> None:
        self._left = left
        self._strike = strike
        self._package_only = package_only

    def __enter__(self) -> None:
        sys.setprofile(self._note)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event not in ("call", "c_return") or name == __file__ or "<frozen importlib" in name:
            return
        if self._package_only and not name.startswith(PACKAGE):
            return
        self._left -= 1
        if self._left == 0:
            sys.setprofile(None)
            self._strike(signal.SIGALRM, frame)


class Blocking:
    """Calls a blocking store."""

    def __init__(self, url: str, namespace: str, strikes: Strikes, *, injected: bool) -> None:
        self.client = redis.Redis.from_url(url) if injected else None
        self.store = orcs_redis.sync.RedisSessionStore.connect(
            None if injected else url, client=self.client, namespace=namespace, deadline=10
        )

    def call(self, name: str, *arguments: Any) -> Any:
        return getattr(self.store, name)(*arguments)

    def close(self) -> None:
        self.store.close()


class Asyncio:
    """Calls an asyncio store.

    A task that an interrupted loop has left behind is cancelled, as asyncio.run does. After a KeyboardInterrupt, which
    asyncio lets pass wherever it is, there is no going on: a new loop opens a new store.
    """

    def __init__(self, url: str, namespace: str, strikes: Strikes, *, injected: bool) -> None:
        self.again = partial(self.__init__, url, namespace, strikes, injected=injected)  # type: ignore[misc]
        self.for_good = issubclass(strikes.kind, KeyboardInterrupt)
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(strikes.note_of_loop)
        self.client = redis.asyncio.Redis.from_url(url) if injected else None
        connect = orcs_redis.RedisSessionStore.connect
        self.store: Any = self.loop.run_until_complete(
            connect(None if injected else url, client=self.client, namespace=namespace, deadline=4)
        )
        self.task: asyncio.Task[Any] | None = None

    def call(self, name: str, *arguments: Any) -> Any:
        self.task = self.loop.create_task(getattr(self.store, name)(*arguments))
        return self.loop.run_until_complete(self.task)

    def recover(self) -> None:
        if self.for_good:
            self.loop.close()
            self.again()
        elif self.task is not None and not self.task.done():
            self.task.cancel()
            self.loop.run_until_complete(asyncio.wait([self.task], timeout=20))
            assert self.task.done(), "a cancelled call does not end"
        if self.task is not None and not self.task.cancelled():
            self.task.exception()

    def close(self) -> None:
        self.loop.run_until_complete(self.store.aclose())
        if self.client is not None:
            self.loop.run_until_complete(self.client.aclose())
        self.loop.close()


class Work:
    """Two sessions: to one turns are added, the other is saved. What comes back must fit what was acknowledged."""

    def __init__(self, face: Blocking | Asyncio) -> None:
        self.face = face
        self.added: dict[int, bool] = {}  # by number: whether it was acknowledged
        self.saved: dict[int, bool] = {}
        for id in "as":
            face.call("save", SessionAsset(id=id))
        self.asset = face.call("load", "s")

    def append(self) -> None:
        number = len(self.added)
        self.added[number] = False
        turn = ConversationTurn.user(str(number))
        if number % 3 == 0:
            turn.with_tool_calls([ToolCallRecord(tool_name="t", args={"a": [number]})])
        revision = self.face.call("append", "a", turn)
        assert type(revision) is int
        self.added[number] = True

    def save(self) -> None:
        number = len(self.saved)
        if not self.saved.get(number - 1, True):  # it may have been applied: then this one would collide with it
            self.asset = self.face.call("load", "s")
        self.saved[number] = False
        asset = self.asset
        asset.metadata["n"] = number
        del asset.history.turns[: len(asset.history.turns) // 25 * 20]
        asset.add_turn(ConversationTurn.user(str(number)))
        revision = self.face.call("save", asset)
        assert type(revision) is int
        self.saved[number] = True

    def save_new(self) -> None:
        self.asset = SessionAsset(id="s", history=self.asset.history)
        self.save()

    def load(self) -> None:
        self.check_turns(self.face.call("load", "a").history.turns)

    def load_saved(self) -> None:
        asset = self.face.call("load", "s")
        number = asset.metadata.get("n", -1)
        assert max([-1, *(n for n, known in self.saved.items() if known)]) <= number < len(self.saved)
        assert number == -1 or asset.history.turns[-1].content == str(number)
        self.asset = asset

    def turns(self) -> None:
        known = [n for n, known in self.added.items() if known][:6]
        found = [int(turn.content) for turn in self.face.call("turns", "a", 0, 5)]
        assert found == sorted(set(found))
        assert len(found) == 6 or set(known) <= set(found)

    def last_turns(self) -> None:
        self.face.call("turns", "a", -3, -1)

    def list_all(self) -> None:
        assert {meta.id for meta in self.face.call("list")} == {"a", "s"}

    def exists(self) -> None:
        assert self.face.call("exists", "a") is True
        with pytest.raises(NotFoundError):
            self.face.call("load", "absent")

    def check_turns(self, turns: list[ConversationTurn]) -> None:
        found = [int(turn.content) for turn in turns]
        assert found == sorted(set(found)), "doubled, or out of order"
        assert {n for n, known in self.added.items() if known} <= set(found) <= self.added.keys(), "lost, or not ours"


def interrupted(work: Work, name: str, how: Timer | AfterCalls, strikes: Strikes) -> bool:
    """Do one step while being struck; return whether the caller was told of it, or nothing struck."""
    strikes.forget()
    lost = strikes.lost
    try:
        with how:
            getattr(work, name)()
    except strikes.kind as error:
        # Python's own code may raise another one from it, of the same type.
        if strikes.raised is None or strikes.raised not in (error, error.__cause__, error.__context__):
            raise
    else:
        if strikes.raised is not None:
            return strikes.lost > lost
    finally:
        sys.setprofile(None)
        signal.setitimer(signal.ITIMER_REAL, 0)
    if isinstance(work.face, Asyncio):
        work.face.recover()
    return True


STEPS = ("append", "save", "load", "turns", "last_turns", "list_all", "load_saved", "exists", "save_new")


def by_timer(work: Work, strikes: Strikes, number: int) -> Iterator[tuple[str, Timer]]:
    """Strike so often, at random; some are late."""
    usual = {}
    for name in STEPS:
        began = time.monotonic()
        getattr(work, name)()
        usual[name] = time.monotonic() - began
    for _ in range(10 * number):
        if strikes.number >= number:
            return
        name = random.choice(STEPS)
        yield name, Timer(1.2 * usual[name], strikes.strike, package_only=strikes.package_only)


def by_call(work: Work, strikes: Strikes, stride: int) -> Iterator[tuple[str, AfterCalls]]:
    """Strike after each call in turn, or each of so many, until the step is through before."""
    for name in STEPS:
        count = random.randint(1, stride)
        while True:
            yield name, AfterCalls(count, strikes.strike, package_only=strikes.package_only)
            if strikes.raised is None:
                break
            count += stride


def main(url: str, namespace: str, face: str, kind: str, how: str, number: int, injected: bool) -> dict[str, Any]:
    gc.disable()  # what strikes in a finalizer Python itself suppresses
    strikes = Strikes(KINDS[kind])
    # asyncio's own code has no protection from such handlers, and Python's suppresses a ValueError here and there.
    strikes.package_only = face == "asyncio" or kind == "value"
    open_face: Any = Blocking if face == "blocking" else Asyncio
    work = Work(open_face(url, namespace, strikes, injected=injected))
    failures: list[str] = []
    swallowed: list[str] = []
    for name, strike in (by_timer if how == "timer" else by_call)(work, strikes, number):
        try:
            if not interrupted(work, name, strike, strikes):
                swallowed.append(name)
            if strikes.number % 10 == 0:
                work.load()
        except BaseException:
            failures.append(f"{name}: {traceback.format_exc()}")
            break
    began = time.monotonic()
    for name in () if failures else STEPS:
        getattr(work, name)()
    pending = work.face.store.sync_status().pending_uploads
    work.face.close()
    if pending or time.monotonic() - began > 3:
        failures.append(f"{pending} pending, {time.monotonic() - began} s for the last steps and closing")
    return {"struck": strikes.number, "lost": strikes.lost, "swallowed": swallowed, "failures": failures}


if __name__ == "__main__":
    print(json.dumps(main(*json.loads(sys.argv[1]))))
