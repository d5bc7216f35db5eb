"""A machine: a folder, what is in the memory of the process that syncs it, and a plan that is stopped at each step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import orcs_redis.sync
from orcs_redis import CorruptSessionError, SessionAsset, StorageError
from orcs_redis.errors import OutcomeUnknownError, StoreFullError, StoreResetError, UnavailableError
from orcs_redis.stores.hybrid import files, journal, kept, local, rounds
from orcs_redis.stores.hybrid.installing import SyncOptions
from orcs_redis.stores.hybrid.shared import Shared
from orcs_redis.stores.hybrid.steps import Connect, Each, Here, Pause, There

from .model import View, Violation, name_of, view_of

if TYPE_CHECKING:
    from .world import World

__all__ = ["Killed", "Machine", "acting", "instrumented"]

_STEPS = 2000  # more than any plan has
_START_NS = 1_700_000_000 * 10**9  # before any file was written


class Killed(BaseException):
    """The process ends here: nothing that it does after this has an effect."""


class Gate:
    """What each durable call of a machine goes through."""

    def __init__(self) -> None:
        self.is_dead = False
        self._decide: Callable[[], str] | None = None

    def arm(self, decide: Callable[[], str]) -> None:
        """Have calls go wrong from now on; what is decided is "", "full", "killed" or "killed after"."""
        self._decide = decide

    def disarm(self) -> None:
        """Have calls work again, if they were not killed."""
        self._decide = None

    def passes(self, call: Callable[[], Any], full: Callable[[], Any] | None = None) -> Any:
        """Do it, or not."""
        if self.is_dead:
            raise Killed
        fault = "" if self._decide is None else self._decide()
        if fault == "full" and full is not None:
            return full()
        if fault == "killed":
            self.is_dead = True
            raise Killed
        result = call()
        if fault == "killed after":
            self.is_dead = True
            raise Killed
        return result


class Clock:
    """A machine's clock. What is read from it is the same in each run, whatever the time is."""

    def __init__(self) -> None:
        self.offset = 0  # seconds

    def time_ns(self) -> int:
        """Return the time: before all files were written, or an hour after."""
        return _START_NS + (10**18 if self.offset > 0 else 0)

    def time(self) -> float:
        """Return the same in seconds."""
        return self.time_ns() / 1e9

    def monotonic(self) -> float:
        """Return the same, without the hour."""
        return _START_NS / 1e9


_acting: list[Machine] = []


def acting() -> Machine:
    """Return the machine that acts."""
    return _acting[-1]


class _Time:
    """Stands for the module time in the modules that look at the clock."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_acting[-1].clock, name)


def _full() -> Any:
    raise StoreFullError("no space left: planted")


@contextlib.contextmanager
def instrumented() -> Iterator[None]:
    """Have every durable call go through the gate of the machine that acts, for as long as the block lasts."""
    with contextlib.ExitStack() as stack:
        for owner, names in (
            (files.Files, ("replace_locked", "remove")),
            (kept.KeptCopies, ("keep",)),
            (journal.Journal, ("note", "note_seen", "note_removal", "set_removal", "forget_bases")),
        ):
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, _gated(getattr(owner, name), _full)))
        stack.enter_context(mock.patch.object(files.Files, "replace", _gated_replace(files.Files.replace)))
        for module, name in ((files, "exchange"), (files, "move"), (kept, "move")):
            stack.enter_context(mock.patch.object(module, name, _gated_rename(getattr(module, name))))
        for module in (files, kept):
            stack.enter_context(mock.patch.object(module, "discard", _unless_dead(module.discard)))
        for module in (local, rounds):
            stack.enter_context(mock.patch.object(module, "time", _Time()))
        yield


def _gated(method: Callable[..., Any], full: Callable[[], Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def gated(*args: Any, **kwargs: Any) -> Any:
        return _acting[-1].gate.passes(functools.partial(method, *args, **kwargs), full)

    return gated


def _gated_replace(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def gated(self: Any, replacements: Any) -> Any:
        full = [StoreFullError("no space left: planted") for _ in replacements]
        return _acting[-1].gate.passes(lambda: method(self, replacements), lambda: full)

    return gated


def _gated_rename(rename: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(rename)
    def gated(source: Path, target: Path) -> Any:
        machine = _acting[-1]
        machine.world.interlude_here(machine, target)
        return machine.gate.passes(lambda: rename(source, target))

    return gated


def _unless_dead(discard: Callable[..., None]) -> Callable[..., None]:
    def discarding(paths: Any) -> None:
        if not (_acting and _acting[-1].gate.is_dead):
            discard(paths)

    return discarding


class _Faulty(Shared[SessionAsset]):
    """The way to the shared store, on which calls and replies are lost."""

    def __init__(self, core: Any, machine: Machine) -> None:
        super().__init__(core)
        self._machine = machine

    def index(self) -> Any:
        return (yield from self._read("index", super().index()))

    def glance(self, ids: Any) -> Any:
        return (yield from self._read(f"glance {' '.join(ids)}", super().glance(ids)))

    def read(self, id: str) -> Any:
        version = yield from self._read(f"read {id}", super().read(id))
        self._machine.world.judge.read_there(self._machine.name, id)
        return version

    def put(self, asset: Any, revision: int) -> Any:
        return (
            yield from self._write(
                f"put {asset.id} over {revision}", asset.id, lambda: Shared.put(self, asset, revision)
            )
        )

    def clear(self, id: str, revision: int) -> Any:
        return (yield from self._write(f"clear {id} at {revision}", id, lambda: Shared.clear(self, id, revision)))

    def remove(self, id: str, revision: int) -> Any:
        return (yield from self._write(f"remove {id} at {revision}", id, lambda: Shared.remove(self, id, revision)))

    def _read(self, text: str, plan: Any) -> Any:
        machine = self._machine
        fault = "unsent" if machine.offline else machine.world.there_fault()
        machine.world.note(f"{machine.name} there: {text} {fault}")
        if fault in ("killed", "killed after"):
            machine.gate.is_dead = True
            raise Killed
        if fault:
            raise UnavailableError("planted")
        return (yield from plan)

    def _write(self, text: str, id: str, make: Callable[[], Any]) -> Any:
        machine, world = self._machine, self._machine.world
        world.interlude_there(machine, id)
        fault = "unsent" if machine.offline else world.there_fault()
        world.note(f"{machine.name} there: {text} {fault}")
        if fault == "killed":
            machine.gate.is_dead = True
            raise Killed
        if fault == "unsent":
            raise UnavailableError("planted")
        if fault == "unknown, not applied":
            raise OutcomeUnknownError("planted")
        try:
            result = yield from make()
        finally:
            world.observe_there(machine)
        if fault == "unknown, applied":
            raise OutcomeUnknownError("planted")
        if fault == "killed after":
            machine.gate.is_dead = True
            raise Killed
        return result


class Machine:
    """A folder with a store, which may be killed at any step."""

    def __init__(self, name: str, folder: Path, url: str, world: World) -> None:
        self.name = name
        self.folder = folder
        self.world = world
        self.clock = Clock()
        self.gate = Gate()
        self.offline = False
        self.plan: Any = None
        self.step: Any = None
        self.resolving: str | None = None  # the session that the plan resolves
        self.report: Any = None  # of the last round, None if it was not completed
        self.error: StorageError | None = None  # that it ended in
        self.pushed: set[str] = set()  # by the plan
        self.is_performing = False  # a step
        self._wanted: set[str] = set()  # the sessions of the round
        self._kept: set[str] = set()
        self._url = url
        self._remote: Any = None
        self._shared: _Faulty | None = None
        self._signatures: dict[str, tuple[int, int, int]] = {}
        self.store: Any = None
        self._open()

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Have what is done in the block be done by this machine."""
        _acting.append(self)
        try:
            yield
        finally:
            _acting.pop()

    # Its process

    def _open(self) -> None:
        self.gate = Gate()
        with self.acting():
            self.store = self.another_store()

    def another_store(self) -> Any:
        """Open the folder as another process does."""
        return orcs_redis.sync.HybridSessionStore(self.folder, self._url, live=False)

    def close(self) -> None:
        """End the process, as it should."""
        self._drop()
        with self.acting():
            self.store.close()

    def _drop(self) -> None:
        if self.plan is not None:
            with self.acting():
                self.plan.close()
        self.plan = self.step = self.resolving = None
        if self._remote is not None:
            self._remote.close()
        self._remote = self._shared = None

    def reopen(self, *, forgets: bool = False) -> None:
        """Kill the process and start another, which may find no database."""
        self.gate.is_dead = True
        with contextlib.suppress(Killed):
            self._drop()
        with self.acting(), contextlib.suppress(Killed):
            self.store.close()
        self.observe_kept()
        self._observe_leftovers()
        self.world.judge.interrupted(self.name, self.pushed)
        self.pushed = set()
        if forgets:
            for path in (self.folder / ".orcs-redis").glob("state.db*"):
                path.unlink()
        self._open()

    # Plans

    def begin_sync(self, ids: list[str] | None, *, adopt: bool = False) -> None:
        """Begin a round."""
        self._wanted = {*(ids or self.world.sessions)}
        self._begin(self.store._rounds.sync(ids, SyncOptions(adopt=adopt)))

    def begin_resolve(self, id: str, keep: str) -> None:
        """Begin to resolve a session."""
        self.world.note(f"{self.name} resolves {id}: {keep}")
        self._begin(self.store._rounds.resolve(id, keep))
        self.resolving = id

    def _begin(self, plan: Any) -> None:
        assert self.plan is None
        self.plan, self.report, self.error = plan, None, None
        self.pushed = set()
        self._go_on(lambda: next(plan))

    def finish_plan(self) -> None:
        """Go on to the end of the plan."""
        for _ in range(_STEPS):
            if self.plan is None:
                return
            self.advance()
        raise Violation("endless", f"a plan of {self.name} does not end")

    def advance(self) -> None:
        """Do the plan's next step."""
        if self.plan is None:
            return
        plan, step = self.plan, self.step
        if self.world.here_fault():
            self.gate.arm(self.world.gate_fault)
        try:
            with self.acting():
                self.is_performing = True
                result = self._perform(step)
        except StorageError as error:
            found = error
            self._observe()
            self._go_on(lambda: plan.throw(found))
        except Killed:
            self.gate.disarm()
            self._observe()
            self.world.note(f"{self.name} is killed at {_name(step)}")
            self.reopen()
        else:
            self._observe()
            self._go_on(lambda: plan.send(result))
        finally:
            self.gate.disarm()
            self.is_performing = False

    def _perform(self, step: Any) -> Any:
        match step:
            case Here(call, arguments):
                if call.__name__ == "_read_here":
                    self.world.judge.read(self.name, arguments[0])
                return call(*arguments)
            case There(make, arguments):
                return self._remote._driver.run(make, *arguments)
            case Each(make, items):
                return [self._one(make, item) for item in items]
            case Connect(anew):
                return self._connected(anew)
            case Pause():
                return None
        raise AssertionError(step)

    def _one(self, make: Any, item: Any) -> Any:
        try:
            return self._remote._driver.run(make, item)
        except StorageError as error:
            return error

    def _connected(self, anew: bool) -> Any:
        if self.offline:
            raise UnavailableError("planted")
        if anew and self._remote is not None:
            self._remote.close()
            self._remote = None
        if self._remote is None:
            self._remote = orcs_redis.sync.RedisSessionStore.connect(self._url)
            self._shared = _Faulty(self._remote._core, self)
        return self._shared

    def _go_on(self, move: Callable[[], Any]) -> None:
        """Let the plan say what comes next."""
        try:
            with self.acting():
                self.step = move()
        except StopIteration as stop:
            self._ended(stop.value, None)
        except StorageError as error:
            self._ended(None, error)

    def _ended(self, report: Any, error: StorageError | None) -> None:
        resolving, self.resolving, self.plan, self.step = self.resolving, None, None, None
        self.observe_kept()
        judge, world = self.world.judge, self.world
        if error is not None:
            world.note(f"{self.name} fails: {type(error).__name__}")
            self.error = error
            judge.interrupted(self.name, self.pushed)
            if isinstance(error, StoreResetError) and world.wiped:
                self.begin_sync(None, adopt=True)
            return
        if resolving is not None:
            world.note(f"{self.name} has resolved {resolving}")
            judge.settled(self.name, [resolving])
            return
        self.report = report
        failed = {id for id, _ in report.failed}
        world.note(f"{self.name} is done: {_said(report)}")
        for id in report.conflicts:
            judge.check_conflict(self.name, id, self.conflict_parts(id))
        judge.interrupted(self.name, self.pushed & failed)
        judge.settled(self.name, self._wanted - failed - {*report.conflicts})

    # What there is

    def path(self, id: str) -> Path:
        """Return a session's file."""
        return self.folder / f"{id}.json"

    def view(self, id: str) -> View | None:
        """Return what a session's file has."""
        try:
            return view_of(SessionAsset.from_json(self.path(id).read_bytes()))
        except FileNotFoundError:
            return None

    def states(self) -> dict[str, str]:
        """Return how each session stands, as far as the store knows."""
        with self.acting():
            return {meta.id: meta.sync_state.value for meta in self.store.list()}

    def conflicts(self) -> list[str]:
        """Return the sessions in conflict, as far as the store knows."""
        return sorted(id for id, state in self.states().items() if state == "Conflict")

    def conflict_parts(self, id: str) -> tuple[str, ...]:
        """Return what collides."""
        parts: tuple[str, ...] = self.store._local.journal.rows[id].parts
        return tuple("/".join((*path, name_of(name))) for *path, name in (part.split("/") for part in parts))

    def noted(self, id: str) -> None:
        """Take a session's file as it is now for what the judge knows."""
        self._signatures.pop(id, None)
        if (found := self._signature(id)) is not None:
            self._signatures[id] = found

    def _signature(self, id: str) -> tuple[int, int, int] | None:
        try:
            status = self.path(id).stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _observe(self) -> None:
        self.observe_here()
        self.observe_kept()

    def observe_here(self) -> None:
        """Tell the judge which files a step of the plan has changed."""
        for id in self.world.sessions:
            if self._signature(id) == self._signatures.get(id):
                continue
            self.noted(id)
            view = self.view(id)
            self.world.note(f"{self.name} has installed {id}: {self.world.text(view)}")
            self.world.judge.installed(self.name, id, view, resolving=self.resolving == id)

    def _observe_leftovers(self) -> None:
        """Tell the judge what came out of an exchange, and was not put back: after an hour it is among the copies."""
        for path in (self.folder / ".orcs-redis").glob("*.tmp"):
            with contextlib.suppress(CorruptSessionError):
                left = SessionAsset.from_json(path.read_bytes())
                self.world.judge.left(self.name, left.id, view_of(left), self.view(left.id))

    def observe_kept(self) -> None:
        """Tell the judge which copies are new."""
        for path in (self.folder / ".orcs-redis" / "kept").glob("*/*.json"):
            if path.name not in self._kept:
                self._kept.add(path.name)
                view = view_of(SessionAsset.from_json(path.read_bytes()))
                self.world.note(f"{self.name} has kept {path.parent.name}: {self.world.text(view)}")
                self.world.judge.keeps(path.parent.name, view)


def _name(step: Any) -> str:
    call = getattr(step, "call", None) or getattr(step, "make", None)
    return f"{type(step).__name__} {getattr(call, '__name__', '')}"


def _said(report: Any) -> str:
    names = ("uploaded", "downloaded", "merged", "deleted", "revived", "conflicts")
    said = [f"{name} {' '.join(getattr(report, name))}" for name in names if getattr(report, name)]
    said += [f"failed {id} {type(error).__name__}" for id, error in report.failed]
    return ", ".join(said) or "nothing"
