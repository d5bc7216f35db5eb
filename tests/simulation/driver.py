"""Writers (processes with a store) and what a store's drivers do with operations and plans."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from orcs_redis import SessionAsset
from orcs_redis.errors import StorageError
from orcs_redis.protocol.attempts import AttemptError, ConnectionLost, Retry
from orcs_redis.protocol.changes import Changes
from orcs_redis.protocol.codec import Codec
from orcs_redis.protocol.commands import Command
from orcs_redis.protocol.leases import Leases
from orcs_redis.protocol.lists import Lists
from orcs_redis.protocol.records import Records
from orcs_redis.protocol.request import Pause, Plan, Request
from orcs_redis.protocol.saving import Saving
from orcs_redis.protocol.sessions import Sessions
from orcs_redis.protocol.writer import Namespace
from orcs_redis.protocol.writes import Write

if TYPE_CHECKING:
    from .held import Held
    from .intents import Intent
    from .model import Record
    from .world import World

__all__ = ["CANCELLED", "DEADLINE", "Call", "Flow", "Wake", "Writer"]

DEADLINE = 5.0
CANCELLED = "cancelled"
Outcome = Any  # a result, a StorageError, or CANCELLED


class Writer:
    """A process with an open store."""

    def __init__(self, number: int, namespace: Namespace, heartbeat: float) -> None:
        self.number = number
        self.namespace = namespace
        codec = Codec(SessionAsset, 1 << 20, 1 << 20, 1000)
        self.sessions, self.saving = Sessions(namespace, codec), Saving(namespace, codec)
        self.lists, self.records = Lists(namespace), Records(namespace)
        self.leases = Leases(namespace)
        self.changes = Changes(namespace, heartbeat)
        self.calls: list[Call] = []
        self.flows: list[Flow] = []
        self.assets: dict[str, Held] = {}
        self.cloned = False

    def twin(self, number: int) -> Writer:
        """Return a clone of the process, as of a snapshot of its virtual machine, after its first reconnecting."""
        namespace = copy.copy(self.namespace)
        copies: dict[int, Any] = {}
        for window in itertools.chain(namespace._windows, *namespace._retired):
            count = next(window.counters)  # such a counter can't be copied any more from Python 3.14 on
            window.counters = itertools.count(count)
            copies[id(window.counters)] = itertools.count(count)
        for name, value in vars(namespace).items():
            if isinstance(value, type(threading.RLock())):
                setattr(namespace, name, threading.RLock())
            elif name not in ("keyspace", "prefixes"):
                setattr(namespace, name, copy.deepcopy(value, copies))
        namespace.begin_epoch()
        twin = Writer(number, namespace, self.changes.heartbeat)
        self.cloned = twin.cloned = True
        return twin


class Call:
    """An operation until it is finished, as `_perform` does it; its replies come when the schedule says."""

    def __init__(
        self,
        world: World,
        writer: Writer,
        operation: Request[Any],
        ended: Callable[[Outcome], None],
        intent: Intent | None = None,
    ) -> None:
        self.world, self.writer, self.operation, self._ended = world, writer, operation, ended
        self.attempt = 0
        self.waiting = False  # for a reply
        self.done = False
        self.sent_at = 0.0
        self.due = world.clock.now
        self.expires = self.due + (operation.deadline or DEADLINE)
        self._retry: Retry | None = None
        self.record: Record | None = (
            world.model.begin(writer, operation, intent) if isinstance(operation, Write) and intent else None
        )
        writer.calls.append(self)
        world.clock.at(
            self.expires, lambda: None if self.done else self.failed(ConnectionLost("time is over", sent=self.waiting))
        )

    def ready(self) -> bool:
        """Whether an attempt is due."""
        return not self.waiting and not self.done and self.due <= self.world.clock.now

    def commands(self) -> list[Command]:
        """Return those of the next attempt, which is under way from now on."""
        commands = list(self.operation.commands())
        self.attempt += 1
        self.waiting = True
        self.sent_at = self.world.clock.now
        return commands

    def failed(self, problem: AttemptError | StorageError) -> None:
        """Go on as `Retry` says."""
        self.waiting = False
        self._retry = self._retry or Retry(self.expires)
        try:
            delay = self._retry.after(problem, self.world.clock.now, self.operation)
        except StorageError as error:
            self._finish(error)
        else:
            self.due = self.world.clock.now + delay
            self.world.clock.at(self.due, int)

    def answered(self, replies: list[Any]) -> None:
        """Go on with the replies to the last attempt."""
        try:
            result = self.operation.decode(replies)
        except (AttemptError, StorageError) as problem:
            self.failed(problem)
        else:
            self._finish(result)

    def cancel(self) -> None:
        """Give up: what was sent is on its way still."""
        self._finish(CANCELLED)

    def _finish(self, outcome: Outcome) -> None:
        self.done = True
        self.waiting = False
        self.operation.end()
        self.writer.calls.remove(self)
        if self.record is not None:
            self.world.model.settle(self.record, outcome)
        if self.world.tracing:
            self.world.say(f"{self} ended: {outcome!r:.150}")
        self._ended(outcome)

    def __str__(self) -> str:
        what = type(self.operation).__name__ if self.record is None else str(self.record)
        return f"writer {self.writer.number}: {what}"


class Wake:
    """An event that plans wait for."""

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        self._set = True

    def clear(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        return self._set


class Flow:
    """A plan until it has ended, as `_follow` does it."""

    def __init__(
        self,
        world: World,
        writer: Writer,
        plan: Plan[Any],
        ended: Callable[[Outcome], None],
        intent: Intent | None = None,
    ) -> None:
        self.world, self.writer, self._plan, self._ended = world, writer, plan, ended
        self.intent = intent
        self.call: Call | None = None
        self.pause: Pause | None = None
        self.until = 0.0
        self.sent_at = 0.0  # when the last operation was sent last
        self.done = False
        writer.flows.append(self)
        self._move(lambda: next(plan))

    def __str__(self) -> str:
        return f"writer {self.writer.number}: {self.intent}"

    def ready(self) -> bool:
        """Whether it waits no longer."""
        pause = self.pause
        return pause is not None and (
            self.until <= self.world.clock.now or (pause.wake is not None and pause.wake.is_set())
        )

    def resume(self) -> None:
        """Go on after a pause."""
        self.pause = None
        self._move(lambda: self._plan.send(None))

    def stop(self) -> None:
        """Cancel it."""
        if not self.done:
            self._plan.close()
            self._end(CANCELLED)

    def _move(self, move: Callable[[], Request[Any] | Pause]) -> None:
        try:
            step = move()
        except StopIteration as stop:
            self._end(stop.value)
        except (StorageError, TimeoutError) as error:
            self._end(error)
        else:
            if isinstance(step, Pause):
                self.pause, self.until = step, self.world.clock.now + step.seconds
                precise = step.wake is None  # a timer, which nothing delays
                self.world.clock.at(self.until, lambda: self.resume() if precise and self.pause is step else None)
            else:
                self.call = Call(self.world, self.writer, step, self._answered, self.intent)

    def _answered(self, outcome: Outcome) -> None:
        if self.call is not None:
            self.sent_at = self.call.sent_at
        self.call = None
        if outcome is CANCELLED:
            self.stop()
        elif isinstance(outcome, StorageError):
            self._move(lambda: self._plan.throw(outcome))
        else:
            self._move(lambda: self._plan.send(outcome))

    def _end(self, outcome: Outcome) -> None:
        self.done = True
        self.pause = None
        self.writer.flows.remove(self)
        if self.intent is not None:
            self.intent.end(outcome)
        self._ended(outcome)
