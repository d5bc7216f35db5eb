"""How a store waits, in asyncio: performs requests and plans over a link. threads.py has the same verbs, blocking.

`send` and `execute` take a request and a plan as they are. `perform`, `run` and `each` take what makes them: where the
namespace may be absent, it is made again once that is known (protocol/namespace.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from ..errors import StorageError, UnavailableError
from ..interrupts import raise_interruption, suppress
from ..protocol.attempts import AttemptError, Retry, WrongServer, without_traceback
from ..protocol.namespace import create, on_namespace
from ..protocol.request import Listener, Pause, Plan, Request, single
from .base import AsyncLink
from .lifecycle import IN_FLIGHT, NO_ANSWER, NOT_SENT, Lifecycle, decode_replies
from .opening import ConnectionSpec, open_link
from .pubsub import Subscription

if TYPE_CHECKING:
    from .embedded import Attachment

__all__ = ["BackgroundWork", "Driver", "Latch", "Workers", "pause"]

T = TypeVar("T")
X = TypeVar("X")
P = ParamSpec("P")


class Driver:
    """Performs a store's requests and plans in the event loop that it was made in.

    Each call may raise RuntimeError: in another loop, or in a fork of the process.
    """

    def __init__(
        self, lifecycle: Lifecycle, link: AsyncLink, attachment: Attachment | None = None, heartbeat: float = 5.0
    ) -> None:
        self.lifecycle = lifecycle
        self.link = link
        self._attachment = attachment
        self._loop = asyncio.get_running_loop()
        self._idle: asyncio.Future[None] | None = None
        self._waiting: OrderedDict[object, asyncio.Future[None]] = OrderedDict()  # calls that have no slot yet
        self._subscription = Subscription(link.open_pubsub, heartbeat)

    @classmethod
    async def open(cls, lifecycle: Lifecycle, spec: ConnectionSpec, plan: Plan[None]) -> Driver:
        """Connect, and run the plan that opens the store."""
        expires = asyncio.get_running_loop().time() + lifecycle.deadline
        driver = cls(lifecycle, *await open_link(spec), spec.heartbeat)
        try:
            await driver.execute(plan, expires)
        except BaseException:
            await driver.close()
            raise
        return driver

    async def close(self) -> None:
        """Let what is under way end, then close the connection. Later calls raise UnavailableError."""
        lifecycle = self.lifecycle
        lifecycle.closed = True
        if lifecycle.is_forked:  # sockets and selector are the parent's
            return
        async with contextlib.AsyncExitStack() as stack:  # also if this is cancelled while it waits
            if self._attachment is not None:
                stack.callback(self._attachment.release)
            stack.push_async_callback(self.link.close)
            stack.push_async_callback(self._subscription.close)
            if lifecycle.active:
                self._idle = self._idle or self._loop.create_future()
                await asyncio.wait([self._idle], timeout=lifecycle.deadline + 1)

    def perform(self, make: Callable[P, Request[T]], /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        """Send the request that `make` returns; bad input raises before anything is sent."""
        if self.lifecycle.absent is None:
            return self.send(make(*args, **kwargs))
        return self.run(single, partial(make, *args, **kwargs))

    def run(self, make: Callable[P, Plan[T]], /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        """Execute the plan that `make` returns."""
        return self.execute(self._plan(partial(make, *args, **kwargs)))

    async def create(self) -> None:
        """Create the namespace, if it is absent: for a write that is not sent by `perform` or `run`."""
        if (absent := self.lifecycle.absent) is not None:
            await self.execute(create(absent))

    def _plan(self, make: Callable[[], Plan[T]]) -> Plan[T]:
        absent = self.lifecycle.absent
        return make() if absent is None else on_namespace(absent, make)

    async def send(self, request: Request[T], expires: float | None = None, call: object = None) -> T:
        """Send a request until there is an answer or the deadline has come: that of the call that it is part of."""
        lifecycle, loop = self.lifecycle, self._loop
        if asyncio.get_running_loop() is not loop:
            self._refuse_loop()
        retry: Retry | None = None
        error: BaseException | None = None
        began, sent = math.inf, -math.inf
        try:
            lifecycle.begin(request, call)
            if call is None and len(lifecycle.active) - len(self._waiting) > IN_FLIGHT:
                await self._wait_for_slot(request)
            began = loop.time()
            expires = expires or began + (request.deadline or lifecycle.deadline)
            while True:
                try:
                    commands = request.commands()
                    sent = time.monotonic()
                    return decode_replies(request, await self.link.call(commands, expires), self.link)
                except (AttemptError, StorageError) as problem:
                    raise_interruption(problem)
                    if isinstance(problem, WrongServer):
                        self.link.drop(sent)
                    retry = retry or Retry(expires)
                    delay = retry.after(problem, loop.time(), request)
                if delay:
                    await asyncio.sleep(delay)
        except BaseException as exc:
            error = exc
            if self._waiting and isinstance(exc, NO_ANSWER):
                self._give_up(began, expires or 0.0)
            raise
        finally:
            if call is None:
                lifecycle.active.pop(request, None)
            lifecycle.end(request, error, loop.time(), asked=sent > -math.inf)
            error = None  # else it, this frame and those of its callers are a cycle
            if call is None:
                self._free_slot()

    async def execute(self, plan: Plan[T], expires: float | None = None) -> T:
        """Perform a plan's requests, one after the other, within a deadline; `close` waits for the last."""
        lifecycle, loop = self.lifecycle, self._loop
        if asyncio.get_running_loop() is not loop:
            self._refuse_loop()
        try:
            lifecycle.begin_plan(plan)
            if len(lifecycle.active) - len(self._waiting) > IN_FLIGHT:
                await self._wait_for_slot(plan)
            return await self.follow(plan, expires or loop.time() + lifecycle.deadline, plan)
        finally:
            lifecycle.active.pop(plan, None)
            self._free_slot()

    async def follow(self, plan: Plan[T], expires: float | None = None, call: object = None) -> T:
        """Perform a plan's requests, one after the other, until the store is closed.

        With `expires` they have one deadline, which begins anew when the plan has paused.
        """
        with contextlib.closing(plan):
            try:
                step = next(plan)
                while True:
                    if isinstance(step, Pause):
                        await pause(step)
                        if expires is not None:
                            expires = self._loop.time() + self.lifecycle.deadline
                        step = plan.send(None)
                        continue
                    try:
                        result = await self.send(step, expires, call)
                    except StorageError as error:
                        raise_interruption(error)
                        step = plan.throw(error)
                    else:
                        step = plan.send(result)
            except StopIteration as stop:
                raise_interruption(stop)
                return cast(T, stop.value)

    async def each(self, make: Callable[[X], Plan[T]], items: Iterable[X]) -> list[T | StorageError]:
        """Run a plan for each item, so many at a time; return what each came to. A dead server is waited for once."""
        waiting = deque(enumerate([partial(make, item) for item in items]))
        results: list[Any] = [None] * len(waiting)
        dead = False

        async def work() -> None:
            nonlocal dead
            while waiting:
                n, made = waiting.popleft()
                began = self._loop.time()
                try:
                    if dead:
                        raise UnavailableError(NOT_SENT)
                    results[n] = await self.run(made)
                except StorageError as error:
                    raise_interruption(error)
                    results[n] = without_traceback(error)
                    dead |= isinstance(error, NO_ANSWER) and self.lifecycle.last_answer_at < began

        await _all(work() for _ in range(min(len(waiting), IN_FLIGHT // 2)))  # other callers have their half
        return results

    def in_background(self, plan: Plan[None], ended: Callable[[], None]) -> Callable[[], object]:
        """Follow a plan beside the caller, and call `ended` when it has ended; return how to stop it."""

        async def work() -> None:
            try:
                await self.follow(plan)
            finally:
                ended()

        return self._loop.create_task(work()).cancel

    def listen(self, listeners: Mapping[str, Listener]) -> Callable[[], None]:
        """Have each channel's listener called with its messages; return how to end that."""
        self._subscription.listen(listeners)
        return partial(self._subscription.leave, listeners)

    def _refuse_loop(self) -> None:
        self.lifecycle.check_process()
        raise RuntimeError("this store belongs to another event loop: open one in this loop")

    async def _wait_for_slot(self, call: Request[Any] | Plan[Any]) -> None:
        """Wait until one of the calls under way has ended; the deadline begins only then.

        Raises:
            UnavailableError: those that were sent before it got no answer.

        """
        if isinstance(call, Request) and call.deadline is not None:
            return  # the renewal of a lease has no time to wait
        slot = self._waiting[call] = self._loop.create_future()
        try:
            await slot
        finally:
            self._waiting.pop(call, None)

    def _free_slot(self) -> None:
        """Give the slots of calls that have ended to those that wait."""
        active, waiting = self.lifecycle.active, self._waiting
        while waiting and len(active) - len(waiting) < IN_FLIGHT:
            _, slot = waiting.popitem(last=False)
            if not slot.done():  # else its caller was cancelled
                slot.set_result(None)
        if self._idle is not None and not active and not self._idle.done():
            self._idle.set_result(None)

    def _give_up(self, began: float, expires: float) -> None:
        """Fail the calls that wait for a slot if none was answered for a deadline: a dead server is waited for once."""
        if self.lifecycle.last_answer_at < began <= expires - 0.9 * self.lifecycle.deadline:
            for slot in self._waiting.values():
                if not slot.done():
                    slot.set_exception(UnavailableError(NOT_SENT))


class Latch:
    """Is set once, and remains so."""

    def __init__(self) -> None:
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def set(self) -> None:
        """Wake those that wait."""
        if not self._future.done():
            self._future.set_result(None)

    @property
    def waitable(self) -> asyncio.Future[None]:
        """Done when it is set; each time another future, which may be cancelled."""
        return asyncio.shield(self._future)


class Workers:
    """Threads for what blocks; dedicated, since those of the loop may all be busy."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads: ThreadPoolExecutor | None = None

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in one of the threads."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop or self._threads is None:
            self.close()
            self._loop, self._threads = loop, ThreadPoolExecutor(self._most, self._name)
        return await loop.run_in_executor(self._threads, function, *arguments)

    async def complete(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in one of the threads, and wait until it has ended, also if the caller is cancelled."""
        work = asyncio.ensure_future(self.call(function, *arguments))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            while not work.done():
                with contextlib.suppress(asyncio.CancelledError):  # once more
                    await asyncio.wait([work])
            if not work.cancelled():
                work.exception()  # nobody is left to whom it matters
            raise

    def close(self) -> None:
        """End the threads once they have nothing to do; a later call begins others."""
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False)


class BackgroundWork:
    """Something that goes on beside the caller; made in a running loop."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._task = asyncio.get_running_loop().create_task(work())

    def check_caller(self) -> None:
        """Raise RuntimeError in another event loop than that in which it goes on, or went on."""
        if self._task.get_loop() is not asyncio.get_running_loop():
            raise RuntimeError("this store belongs to another event loop: open one in this loop")

    async def join(self, seconds: float) -> None:
        """Wait until it has ended. After so many seconds it is cancelled."""
        if self._task.done():  # its event loop may have ended with it
            return
        try:
            await asyncio.wait([self._task], timeout=seconds)
        finally:
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def _all(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines side by side; an error ends all of them, and is raised when they have ended."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def pause(step: Pause) -> None:
    """Wait as a plan wants to."""
    if step.wake is None:
        await asyncio.sleep(step.seconds)
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(None if step.seconds == math.inf else step.seconds):
            await step.wake.wait()
