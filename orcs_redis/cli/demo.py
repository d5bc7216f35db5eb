"""The demo: processes work on shared sessions, then their own logs are held against what is stored.

A worker writes down each operation before it sends it, and how it ended. So the verdict does not rest on what the
store says about itself: an acknowledged turn must be there once, a refused one not at all, one whose outcome is
unknown at most once, and a counter must have every acknowledged increment. A watch in this process must have received
each session's final revision, and nothing twice.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import random
import signal
import tempfile
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from fcntl import LOCK_EX, LOCK_NB, flock
from importlib import resources
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..errors import OutcomeUnknownError, StorageError, UnavailableError
from ..model.asset import SessionAsset
from ..model.meta import SessionMeta
from ..model.sections import ConversationTurn
from ..protocol.attempts import AttemptError
from ..protocol.changes import Change
from ..protocol.keys import Keyspace
from ..stores.redis import RedisSessionStore, open_store
from ..sync import RedisSessionStore as BlockingStore
from ..transport.address import FileFolder, MemoryName, resolve
from .terminal import change_line
from .verdict import COUNTER, Entry, Seen, Verdict, describe, judge

__all__ = ["Result", "run"]

_TASKS = 8  # per worker
_THINK_TIME = 0.04  # seconds between a task's operations, at most: agents think longer
_NEW_SESSIONS = 9  # beside the samples
_SHOWN_CHANGES = 8
_REFRESH_TIME = 0.125  # seconds
_PATIENCE = 30.0  # seconds a worker may take beyond its time, for its start and for a server that doesn't answer
_STOP_TIME = 10.0  # seconds the embedded server may take to stop
_NEWS_TIME = 10.0  # seconds the last changes may take to the watcher


class Result(Struct, frozen=True):
    """How a demo went; of each worker how many operations ended how."""

    seconds: float
    sessions: int
    workers: list[dict[str, int]]
    crashed: int
    verdict: Verdict

    @property
    def ok(self) -> bool:
        """Whether the store kept its word, and every worker lived to see it."""
        return self.verdict.ok and not self.crashed


class Job(NamedTuple):
    """What a worker is started with."""

    name: str
    url: str
    namespace: str
    sessions: list[str]
    seconds: float
    log: Path


class Worker:
    """What happens in a worker's process."""

    def __init__(self, job: Job, store: RedisSessionStore[SessionAsset], log: BinaryIO) -> None:
        self._job = job
        self._store = store
        self._log = log

    async def work(self, task: int, until: float) -> None:
        """Do one thing after the other, until the loop's clock says so."""
        parent = multiprocessing.parent_process()
        for number in itertools.count():
            op, id = f"{self._job.name}-{task}-{number}", random.choice(self._job.sessions)
            turns = [ConversationTurn.assistant(f"{op}: step {step}") for step in range(random.randint(1, 3))]
            for step, turn in enumerate(turns):
                turn.id = f"{op}-{step}"
            ids = tuple(turn.id for turn in turns)
            match random.choices(("append", "update", "save"), weights=(6, 3, 1))[0]:
                case "append":
                    await self._attempt(Entry(op, "append", "tried", id, ids), self._append(id, turns))
                case "update":
                    await self._attempt(Entry(op, "update", "tried", id, (), 1), self._update(id))
                case _:
                    await self._attempt(Entry(op, "save", "tried", id, ids, 1), self._save(id, turns))
            await asyncio.sleep(random.uniform(0, _THINK_TIME))
            if asyncio.get_running_loop().time() > until or (parent and not parent.is_alive()):
                return

    async def _attempt(self, entry: Entry, action: Awaitable[int]) -> None:
        self._write(entry)
        try:
            revision = await action
        except OutcomeUnknownError:
            pass  # it stays "tried"
        except StorageError:  # any other says that nothing was written
            self._write(replace(entry, outcome="refused"))
        else:
            self._write(replace(entry, outcome="done", revision=revision))

    def _write(self, entry: Entry) -> None:
        self._log.write(msgspec.json.encode(entry) + b"\n")

    async def _append(self, id: str, turns: Sequence[ConversationTurn]) -> int:
        await self._store.load(id)  # as an agent does before it goes on
        return await self._store.append(id, *turns)

    async def _update(self, id: str) -> int:
        return (await self._store.update(id, _increment)).revision

    async def _save(self, id: str, turns: Sequence[ConversationTurn]) -> int:
        asset, revision = await self._store.load_versioned(id)
        _increment(asset)
        for turn in turns:
            asset.add_turn(turn)
        return await self._store.save(asset, if_revision=revision)


def _increment(asset: SessionAsset) -> None:
    asset.metadata[COUNTER] = asset.metadata.get(COUNTER, 0) + 1
    asset.touch()


def _process(job: Job) -> None:
    async def work() -> None:
        async with open_store(job.url, namespace=job.namespace) as store:
            with job.log.open("ab", buffering=0) as log:  # unbuffered: written is written, even if we are killed
                worker = Worker(job, store, log)
                until = asyncio.get_running_loop().time() + job.seconds
                await asyncio.gather(*(worker.work(task, until) for task in range(_TASKS)))

    try:
        asyncio.run(work())
    except StorageError as error:
        raise SystemExit(f"worker {job.name}: {error}") from None


@contextmanager
def _started(jobs: Sequence[Job]) -> Iterator[list[BaseProcess]]:
    """Start the workers; in the end none is left."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_process, args=(job,), daemon=True) for job in jobs]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which they inherit: Ctrl-C is for us to answer
    try:
        for process in processes:
            process.start()
        signal.signal(signal.SIGINT, before)
        yield list(processes)
    finally:
        signal.signal(signal.SIGINT, before)
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


class Logbook:
    """A worker's log, read as it grows."""

    def __init__(self, job: Job) -> None:
        self.entries: list[Entry] = []
        self.counts: Counter[str] = Counter()  # like "append done"
        self._path = job.log
        self._path.touch()
        self._position = 0
        self._past: deque[tuple[float, Counter[str]]] = deque(maxlen=8)

    def read(self) -> None:
        """Read what is new."""
        with self._path.open("rb") as file:
            file.seek(self._position)
            *lines, rest = file.read().split(b"\n")
            self._position = file.tell() - len(rest)  # which is a line half-written
        new = [msgspec.json.decode(line, type=Entry) for line in lines]
        self.entries += new
        self._past.append((time.monotonic(), self.counts.copy()))
        self.counts.update(f"{entry.kind} {entry.outcome}" for entry in new)

    def rate(self, kind: str) -> float:
        """Return how many operations a second were acknowledged lately."""
        then, counts = self._past[0]
        passed = max(time.monotonic() - then, 0.001)
        return (self.counts[f"{kind} done"] - counts[f"{kind} done"]) / passed


class Watching:
    """A thread that watches all changes."""

    def __init__(self, store: BlockingStore[SessionAsset], since: str) -> None:
        self.seen = Seen()
        self._store = store
        self._since = since
        self._last: deque[Change] = deque(maxlen=_SHOWN_CHANGES)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="demo-watch", daemon=True)
        self._thread.start()

    def last(self) -> list[Change]:
        """Return the last changes."""
        with self._lock:
            return list(self._last)

    def wait_until_told(self, final: Mapping[str, int]) -> None:
        """Wait until each session was seen at its final revision, but not for ever."""
        until = time.monotonic() + _NEWS_TIME
        while self.seen.missing(final) and self._thread.is_alive() and time.monotonic() < until:
            time.sleep(0.02)

    def _run(self) -> None:
        with suppress(StorageError):  # it has not seen the last revisions then
            for change in self._store.watch(since=self._since):
                with self._lock:
                    self._last.append(change)
                self.seen.add(change.id, change.revision)


def _view(metas: Sequence[SessionMeta], logs: Sequence[Logbook], watching: Watching) -> Group:
    sessions = Table("session", "project", "turns", "revision", "updated", title="sessions, newest first")
    now = datetime.now(UTC)
    for meta in metas:
        age = f"{(now - meta.updated_at).total_seconds() * 1000:.0f} ms ago"
        sessions.add_row(meta.id, meta.name, f"{meta.turn_count:,}", f"{meta.revision:,}", age)
    workers = Table("worker", "appends/s", "updates/s", "saves/s", "conflicts and errors", title="workers")
    for number, log in enumerate(logs):
        rates = [f"{log.rate(kind):,.0f}" for kind in ("append", "update", "save")]
        refused = sum(count for name, count in log.counts.items() if name.endswith("refused"))
        workers.add_row(str(number), *rates, f"{refused:,}")
    for column in (*sessions.columns[2:], *workers.columns[1:]):
        column.justify = "right"
    changes = Text("changes as they come", "italic")
    for change in watching.last():
        changes.append("\n").append_text(change_line(change))
    return Group(sessions, workers, changes)


def _line(seconds: float, logs: Sequence[Logbook], watching: Watching) -> str:
    total = sum((log.counts for log in logs), Counter())
    rates = " ".join(f"{sum(map(log.rate, ('append', 'update', 'save'))):,.0f}" for log in logs)
    done = ", ".join(f"{total[f'{kind} done']:,} {kind}s" for kind in ("append", "update", "save"))
    return f"{seconds:4.1f} s: {done}; operations/s per worker: {rates}; {watching.seen.changes:,} changes watched"


def run(url: str | None, *, seconds: float, workers: int, console: Console) -> Result:
    """Let `workers` processes work for so long on sessions of a new namespace of this server, and judge.

    Without a URL the server is an embedded one in a temporary folder. Whatever happens, the processes, the namespace
    and the folder are gone in the end.

    Raises:
        StorageError: the server can't be reached, or denies access.
        ValueError: a URL of a store that processes can't share like this.

    """
    if url is not None and isinstance(resolve(url), (FileFolder, MemoryName)):
        raise ValueError("the demo needs a server that several processes can reach")
    namespace = f"orcs-demo-{uuid.uuid4().hex[:12]}"
    samples = resources.files(__package__) / "demo_sessions"
    texts = [file.read_bytes() for file in samples.iterdir() if file.name.endswith(".json")]
    assets = [SessionAsset.from_json(text) for text in texts]
    assets += [SessionAsset.for_project("/repos/demo") for _ in range(_NEW_SESSIONS)]
    ids = [asset.id for asset in assets]
    with tempfile.TemporaryDirectory(prefix="orcs-demo-", ignore_cleanup_errors=True) as name, ExitStack() as stack:
        folder = Path(name)
        if url is None:
            url = f"embedded://{quote(str(folder / 'server'))}"
            stack.callback(_wait_for_end, folder / "server" / "supervisor.lock")
        store = stack.enter_context(BlockingStore.connect(url, namespace=namespace))
        stack.callback(_clean_up, store, namespace, ids, console)
        watcher = stack.enter_context(BlockingStore.connect(url, namespace=namespace))
        watching = Watching(watcher, watcher.cursor())
        console.print(f"{len(texts)} sample sessions and {_NEW_SESSIONS} new ones, {workers} worker processes")
        for saved in store.save_many(assets):
            if isinstance(saved, StorageError):
                raise saved
        jobs = [Job(str(n), url, namespace, ids, seconds, folder / f"{n}.log") for n in range(workers)]
        logs = [Logbook(job) for job in jobs]
        with _started(jobs) as processes:
            _show(processes, logs, store, watching, seconds, console)
            crashed = sum(process.exitcode != 0 for process in processes)
        store.ping()  # what can't be reached is not lost: then there is an error and no verdict
        loaded = store.load_many(ids)
        for asset in loaded:
            if isinstance(asset, UnavailableError):
                raise asset
        stored = {asset.id: asset for asset in loaded if isinstance(asset, SessionAsset)}
        final = {meta.id: meta.revision for meta in store.list()}
        watching.wait_until_told(final)
        verdict = judge((entry for log in logs for entry in log.entries), stored, watching.seen, final)
        result = Result(seconds, len(ids), [dict(log.counts) for log in logs], crashed, verdict)
        console.print(describe(verdict))
        if crashed:
            console.print(Text(f"{crashed} workers crashed", "bold red"))
        good = Text("verdict: nothing lost, nothing doubled", "bold green")
        console.print(good if result.ok else Text("verdict: FAILED", "bold red"))
    return result


def _show(
    processes: Sequence[BaseProcess],
    logs: Sequence[Logbook],
    store: BlockingStore[SessionAsset],
    watching: Watching,
    seconds: float,
    console: Console,
) -> None:
    """Show how it goes until every worker has ended, but not for ever."""
    began = time.monotonic()
    next_line = 1.0
    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        while True:
            over = all(process.exitcode is not None for process in processes)
            for log in logs:
                log.read()
            passed = time.monotonic() - began
            if live is not None:
                with suppress(UnavailableError):  # that is for the verdict to tell
                    live.update(_view(store.list(limit=10), logs, watching), refresh=True)
            elif passed >= next_line:
                next_line += 1.0
                console.print(_line(passed, logs, watching))
            if over or passed > seconds + _PATIENCE:
                return
            time.sleep(_REFRESH_TIME)


def _clean_up(store: BlockingStore[SessionAsset], namespace: str, ids: Sequence[str], console: Console) -> None:
    """Remove the sessions and then the namespace's own keys, by their names."""
    try:
        store.ping()  # else every session would wait for a server that is gone
        store.delete_many(ids)
        keys = Keyspace(namespace, 1)
        part = keys.partitions[0]
        rest = (part.state, part.updated, part.meta, part.changes, part.deleted, part.deleted_meta)
        commands = [("UNLINK", *rest), ("UNLINK", keys.layout(namespace))]
        store._driver.link.call(commands, time.monotonic() + 5.0)
    except (StorageError, AttemptError):
        console.print(f"the server is gone: keys of the namespace {namespace} may be left there", style="red")


def _wait_for_end(lock: Path) -> None:
    """Wait until the embedded server's supervisor, and so the server, has let go of its folder."""
    until = time.monotonic() + _STOP_TIME
    with suppress(OSError), lock.open("rb") as file:
        while time.monotonic() < until:
            try:
                flock(file, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)
            else:
                break
