"""How a store waits, in threads: performs requests and plans over a link, with the verbs of driver.py."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar, cast

from ..errors import StorageError, UnavailableError
from ..interrupts import raise_interruption
from ..protocol.attempts import AttemptError, Retry, WrongServer, copy_of_error, without_traceback
from ..protocol.commands import Command, Reply, batches
from ..protocol.namespace import create, on_namespace
from ..protocol.request import Listener, Pause, Plan, Request, single
from .base import BlockingLink
from .lifecycle import IN_FLIGHT, NO_ANSWER, NOT_SENT, Lifecycle, decode_replies
from .opening import ConnectionSpec, open_blocking_link
from .pubsub import Background, Subscription

if TYPE_CHECKING:
    from .embedded import Attachment

__all__ = ["BackgroundWork", "Driver", "Latch", "Workers", "pause"]

T = TypeVar("T")
X = TypeVar("X")
P = ParamSpec("P")
Answer: TypeAlias = Sequence[Reply] | AttemptError | StorageError


class Driver:
    """Performs a store's requests and plans, for any number of threads.

    Each call may raise RuntimeError in a fork of the process.
    """

    def __init__(
        self, lifecycle: Lifecycle, link: BlockingLink, attachment: Attachment | None = None, heartbeat: float = 5.0
    ) -> None:
        self.lifecycle = lifecycle
        self.link = link
        self._attachment = attachment
        self._heartbeat = heartbeat
        self._listening = threading.RLock()  # a signal handler may want it, too
        self._listeners: tuple[Background, Subscription] | None = None

    @classmethod
    def open(cls, lifecycle: Lifecycle, spec: ConnectionSpec, plan: Plan[None]) -> Driver:
        """Connect, and run the plan that opens the store."""
        expires = time.monotonic() + lifecycle.deadline
        driver = cls(lifecycle, *open_blocking_link(spec), spec.heartbeat)
        try:
            driver.execute(plan, expires)
        except BaseException:
            driver.close()
            raise
        return driver

    def close(self) -> None:
        """Let what other threads have under way end, then close the connections."""
        lifecycle = self.lifecycle
        lifecycle.closed = True
        if not lifecycle.is_forked:  # the child of a fork has nobody to wait for
            expires = time.monotonic() + lifecycle.deadline + 1
            while lifecycle.is_busy() and time.monotonic() < expires:
                time.sleep(0.005)
            with self._listening:
                listeners, self._listeners = self._listeners, None
            if listeners is not None:
                background, subscription = listeners
                background.close(subscription.close, expires)
        self.link.close()
        if self._attachment is not None:
            self._attachment.release()

    def perform(self, make: Callable[P, Request[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Send the request that `make` returns; bad input raises before anything is sent."""
        if self.lifecycle.absent is None:
            return self.send(make(*args, **kwargs))
        return self.run(single, partial(make, *args, **kwargs))

    def run(self, make: Callable[P, Plan[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Execute the plan that `make` returns."""
        return self.execute(self._plan(partial(make, *args, **kwargs)))

    def create(self) -> None:
        """Create the namespace, if it is absent: for a write that is not sent by `perform` or `run`."""
        if (absent := self.lifecycle.absent) is not None:
            self.execute(create(absent))

    def _plan(self, make: Callable[[], Plan[T]]) -> Plan[T]:
        absent = self.lifecycle.absent
        return make() if absent is None else on_namespace(absent, make)

    def send(self, request: Request[T], expires: float | None = None, call: object = None) -> T:
        """Send a request until there is an answer or the deadline has come: that of the call that it is part of."""
        lifecycle = self.lifecycle
        retry: Retry | None = None
        error: BaseException | None = None
        sent = -math.inf
        try:
            lifecycle.begin(request, call)
            expires = expires or time.monotonic() + (request.deadline or lifecycle.deadline)
            while True:
                try:
                    commands = request.commands()
                    sent = time.monotonic()
                    return decode_replies(request, self.link.call(commands, expires), self.link)
                except (AttemptError, StorageError) as problem:
                    raise_interruption(problem)
                    if isinstance(problem, WrongServer):
                        self.link.drop(sent)
                    retry = retry or Retry(expires)
                    delay = retry.after(problem, time.monotonic(), request)
                if delay:
                    time.sleep(delay)
        except BaseException as exc:
            error = exc
            raise
        finally:
            if call is None:
                lifecycle.active.pop(request, None)
            lifecycle.end(request, error, time.monotonic(), asked=sent > -math.inf)
            error = None  # else it, this frame and those of its callers are a cycle

    def execute(self, plan: Plan[T], expires: float | None = None) -> T:
        """Perform a plan's requests, one after the other, within a deadline; `close` waits for the last."""
        lifecycle = self.lifecycle
        try:
            lifecycle.begin_plan(plan)
            return self.follow(plan, expires or time.monotonic() + lifecycle.deadline, plan)
        finally:
            lifecycle.active.pop(plan, None)

    def follow(self, plan: Plan[T], expires: float | None = None, call: object = None) -> T:
        """Perform a plan's requests, one after the other, until the store is closed.

        With `expires` they have one deadline, which begins anew when the plan has paused.
        """
        with contextlib.closing(plan):
            try:
                step = next(plan)
                while True:
                    pauses = isinstance(step, Pause)
                    step = self._step(plan, step, expires, call)
                    if pauses and expires is not None:
                        expires = time.monotonic() + self.lifecycle.deadline
            except StopIteration as stop:
                raise_interruption(stop)
                return cast(T, stop.value)

    def _step(self, plan: Plan[Any], step: Any, expires: float | None = None, call: object = None) -> Any:
        """Do what a plan asks for and return what it asks for next."""
        if isinstance(step, Pause):
            pause(step)
            return plan.send(None)
        try:
            result = self.send(step, expires, call)
        except StorageError as error:
            raise_interruption(error)
            return plan.throw(error)
        return plan.send(result)

    def each(self, make: Callable[[X], Plan[T]], items: Iterable[X]) -> list[T | StorageError]:
        """Run a plan for each item, in step with each other, so many at a time; return what each came to.

        A dead server is waited for once.
        """
        lifecycle = self.lifecycle
        plans = [self._plan(partial(make, item)) for item in items]
        results: list[Any] = [None] * len(plans)
        dead = False
        for start in range(0, len(plans), IN_FLIGHT):
            batch = range(start, min(start + IN_FLIGHT, len(plans)))
            began, call = time.monotonic(), object()
            try:
                try:
                    if dead:
                        raise UnavailableError(NOT_SENT)
                    lifecycle.begin_plan(call)
                except UnavailableError as error:  # it may have been closed meanwhile
                    for n in batch:
                        results[n] = UnavailableError(str(error))
                else:
                    self._run_batch(plans, batch, results, call)
            finally:
                lifecycle.active.pop(call, None)
            dead |= lifecycle.last_answer_at < began and any(isinstance(results[n], NO_ANSWER) for n in batch)
        return results

    def in_background(self, plan: Plan[None], ended: Callable[[], None]) -> Callable[[], object]:
        """Follow a plan in a thread, and call `ended` when it has ended; return how to stop it."""
        stopped = threading.Event()

        def work() -> None:
            try:
                with contextlib.closing(plan), contextlib.suppress(StopIteration):
                    step = next(plan)
                    while not (isinstance(step, Pause) and stopped.wait(step.seconds)):
                        step = plan.send(None) if isinstance(step, Pause) else self._step(plan, step)
            finally:
                ended()

        threading.Thread(target=work, name="orcs-redis-lease", daemon=True).start()
        return stopped.set

    def listen(self, listeners: Mapping[str, Listener]) -> Callable[[], None]:
        """Have each channel's listener called, in another thread, with its messages; return how to end that."""
        self.lifecycle.check_process()  # first: in the child of a fork, the lock may be held for ever
        with self._listening:
            self.lifecycle.check_open()
            if self._listeners is None:
                self._listeners = Background(), Subscription(self.link.open_pubsub, self._heartbeat)
            background, subscription = self._listeners
        background.call(subscription.listen, listeners)
        return partial(background.call, subscription.leave, listeners)

    def _run_batch(self, plans: Sequence[Plan[Any]], batch: Iterable[int], results: list[Any], call: object) -> None:
        """Run plans of a call; the requests that they have come to go out in one write, further attempts too."""
        lifecycle = self.lifecycle
        sent: dict[int, Request[Any]] = {}
        steps: dict[int, Request[Any]] = {}
        for n in batch:
            self._advance(n, partial(next, plans[n]), steps, results)
        expires = time.monotonic() + lifecycle.deadline
        retries: dict[Request[Any], Retry] = {}
        try:
            while steps:
                sent, steps, delay = steps, {}, 0.0
                lifecycle.active[call] = sum(request.writes for request in sent.values()), threading.get_ident()
                commands, refused = self._commands(sent)
                began = time.monotonic()
                for n, answer in (refused | self._send_together(commands, expires)).items():
                    request, plan = sent[n], plans[n]
                    try:
                        move = partial(plan.send, self._read(request, answer))
                        lifecycle.end(request, None, time.monotonic(), asked=True)
                    except (AttemptError, StorageError) as problem:
                        raise_interruption(problem)
                        if isinstance(problem, WrongServer):
                            self.link.drop(began)
                        try:
                            retry = retries.setdefault(request, Retry(expires))
                            delay = max(delay, retry.after(problem, time.monotonic(), request))
                            steps[n] = request
                            continue
                        except StorageError as error:
                            raise_interruption(error)
                            lifecycle.end(request, error, time.monotonic(), asked=n in commands)
                            move = partial(plan.throw, error)
                    self._advance(n, move, steps, results)
                if delay:
                    time.sleep(delay)
        finally:
            for request in (*sent.values(), *steps.values()):  # those, too, that an exception has left over
                request.end()

    @staticmethod
    def _advance(n: int, move: Callable[[], Any], steps: dict[int, Request[Any]], results: list[Any]) -> None:
        try:
            steps[n] = move()
        except StopIteration as stop:
            raise_interruption(stop)
            results[n] = stop.value
        except StorageError as error:
            raise_interruption(error)
            results[n] = without_traceback(error)

    def _commands(self, requests: dict[int, Request[Any]]) -> tuple[dict[int, Sequence[Command]], dict[int, Answer]]:
        """Return each request's commands, and why others are not to be sent."""
        commands: dict[int, Sequence[Command]] = {}
        refused: dict[int, Answer] = {}
        for n, request in requests.items():
            try:
                self.lifecycle.check_right(request)
                commands[n] = request.commands()
            except StorageError as error:
                raise_interruption(error)
                refused[n] = error
        return commands, refused

    def _send_together(self, commands: dict[int, Sequence[Command]], expires: float) -> dict[int, Answer]:
        """Send commands of several requests in one write; return what came of each."""
        if not commands:
            return {}
        together = list(batches(itertools.chain.from_iterable(commands.values())))
        try:
            found = self.link.call([batch.frame() for batch in together], expires)
        except (AttemptError, StorageError) as problem:
            raise_interruption(problem)
            return {n: copy_of_error(problem) for n in commands}
        replies = (own for batch, reply in zip(together, found, strict=True) for own in batch.split(reply))
        return {n: list(itertools.islice(replies, len(own))) for n, own in commands.items()}

    def _read(self, request: Request[T], answer: Answer) -> T:
        if isinstance(answer, Exception):
            raise answer
        return decode_replies(request, answer, self.link)


class Latch:
    """Is set once, and remains so."""

    def __init__(self) -> None:
        self.waitable = threading.Event()

    def set(self) -> None:
        """Wake those that wait."""
        self.waitable.set()


def pause(step: Pause) -> None:
    """Wait as a plan wants to."""
    (step.wake or threading.Event()).wait(None if step.seconds == math.inf else step.seconds)


class BackgroundWork:
    """Something that goes on beside the caller, in a thread."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=work, name="orcs-redis-background", daemon=True)
        self._thread.start()

    def check_caller(self) -> None:
        """Have nothing to check: it goes on beside every thread."""

    def join(self, seconds: float) -> None:
        """Wait until it has ended, at most so many seconds."""
        if threading.current_thread() is not self._thread:  # which may be the one that closes the store
            self._thread.join(seconds)


class Workers:
    """The caller's own thread."""

    def __init__(self, most: int, name: str) -> None:
        """Have nothing to prepare."""

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function."""
        return function(*arguments)

    complete = call

    def close(self) -> None:
        """Have nothing to end."""
