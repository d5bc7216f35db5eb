"""The demo: processes work on shared sessions, then their own logs are held against what is stored.

A worker writes down each operation before it sends it, and how it ended. So the verdict does not rest on what the
store says about itself: an acknowledged turn must be there once, or popped once; a refused one not at all, one whose
outcome is unknown at most once. A name, a label and a note must be those of the last acknowledged write, and a counter
must have every acknowledged increment. What a refresh gives must be what a load gives. A watch in this process must
have received each session's final revision, and nothing twice.
"""

from __future__ import annotations

import copy
import multiprocessing
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from importlib import resources
from multiprocessing.process import BaseProcess
from pathlib import Path
from urllib.parse import quote

from msgspec import Struct
from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..errors import StorageError, UnavailableError
from ..model.asset import SessionAsset
from ..model.meta import SessionMeta
from ..protocol.attempts import AttemptError
from ..protocol.keys import Keyspace
from ..sync import RedisSessionStore as BlockingStore
from ..transport.address import FileFolder, MemoryName, resolve
from .progress import Logbook, Watching, progress_line, view
from .verdict import PHASES, Final, Rates, Verdict, describe, judge, rates
from .worker import Job, process

__all__ = ["Result", "run"]

_NEW_SESSIONS = 9  # beside the samples
_REFRESH_TIME = 0.125  # seconds
_PATIENCE = 30.0  # seconds a worker may take beyond its time, for its start and for a server that doesn't answer
_STOP_TIME = 10.0  # seconds the embedded server may take to stop


class Result(Struct, frozen=True):
    """How a demo went; of each worker how many operations ended how."""

    seconds: float
    sessions: int
    workers: list[dict[str, int]]
    crashed: int
    rates: Rates | None
    verdict: Verdict

    @property
    def ok(self) -> bool:
        """Whether the store kept its word, and every worker lived to see it."""
        return self.verdict.ok and not self.crashed


def run(url: str | None, *, seconds: float, workers: int, console: Console) -> Result:
    """Let `workers` processes work for so long on sessions of a new namespace of this server, and judge.

    Every other one has the blocking store. Without a URL the server is an embedded one in a temporary folder. Whatever
    happens, the processes, the namespace and the folder are gone in the end.

    Raises:
        StorageError: the server can't be reached, or denies access.
        ValueError: a URL of a store that processes can't share like this.

    """
    if url is not None and isinstance(resolve(url), (FileFolder, MemoryName)):
        raise ValueError("the demo needs a server that several processes can reach")
    namespace = f"orcs-demo-{uuid.uuid4().hex[:12]}"
    assets = _sessions()
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
        console.print(f"{len(ids) - _NEW_SESSIONS} sample sessions and {_NEW_SESSIONS} new ones, {workers} workers")
        initial = {asset.id: copy.deepcopy(asset) for asset in assets}
        for saved in store.save_many(assets):
            if isinstance(saved, StorageError):
                raise saved
        jobs = [Job(str(n), url, namespace, ids, seconds, folder / f"{n}.log", n % 2 == 1) for n in range(workers)]
        logs = [Logbook(job) for job in jobs]
        with _started(jobs) as processes:
            _show(processes, logs, store, watching, seconds, console)
            crashed = sum(process.exitcode != 0 for process in processes)
        final = _final(store, assets)
        watching.wait_until_told(final.revisions)
        entries = [entry for log in logs for entry in log.entries]
        verdict = judge(entries, initial, watching.seen, final)
        result = Result(seconds, len(ids), [dict(log.counts) for log in logs], crashed, rates(entries), verdict)
        _tell(result, console)
    return result


def _sessions() -> list[SessionAsset]:
    samples = resources.files(__package__) / "demo_sessions"
    texts = [file.read_bytes() for file in samples.iterdir() if file.name.endswith(".json")]
    assets = [SessionAsset.from_json(text) for text in texts]
    return assets + [SessionAsset.for_project("/repos/demo") for _ in range(_NEW_SESSIONS)]


@contextmanager
def _started(jobs: Sequence[Job]) -> Iterator[list[BaseProcess]]:
    """Start the workers; in the end none is left."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=process, args=(job,), daemon=True) for job in jobs]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which they inherit: Ctrl-C is for us to answer
    try:
        for each in processes:
            each.start()
        signal.signal(signal.SIGINT, before)
        yield list(processes)
    finally:
        signal.signal(signal.SIGINT, before)
        for each in processes:
            if each.pid is not None:
                each.kill()
                each.join()


def _final(store: BlockingStore[SessionAsset], assets: Sequence[SessionAsset]) -> Final:
    """Return what there is in the end; what can't be reached is not lost: that is an error, and no verdict."""
    store.ping()
    loaded = store.load_many([asset.id for asset in assets])
    for asset in loaded:
        if isinstance(asset, UnavailableError):
            raise asset
    stored = {asset.id: asset for asset in loaded if isinstance(asset, SessionAsset)}
    metas = store.list()
    for asset in assets:
        with suppress(StorageError):  # it is another than what is stored then
            store.refresh(asset)
    phases = [meta.labels.get("phase") for meta in metas]
    wrong = sum(not _says(meta, stored.get(meta.id)) for meta in metas) + abs(len(metas) - len(stored))
    wrong += sum(store.count(labels={"phase": phase}) != phases.count(phase) for phase in PHASES)
    refreshed = {asset.id: asset for asset in assets}
    return Final(stored, {meta.id: meta.revision for meta in metas}, refreshed, wrong)


def _says(meta: SessionMeta, asset: SessionAsset | None) -> bool:
    """Whether a line of a list says what is stored."""
    if asset is None:
        return False
    expected = SessionMeta.from_asset(asset)
    names = ("name", "labels", "turn_count", "project_path", "created_at")
    return all(getattr(meta, name) == getattr(expected, name) for name in names)


def _tell(result: Result, console: Console) -> None:
    console.print(describe(result.verdict))
    if (found := result.rates) is not None:
        console.print(
            f"rates      {found.first:,} operations in the first second, {found.last:,} in the last: {found.ratio:.2f}"
        )
    if result.crashed:
        console.print(Text(f"{result.crashed} workers crashed", "bold red"))
    good = Text("verdict: nothing lost, nothing doubled", "bold green")
    console.print(good if result.ok else Text("verdict: FAILED", "bold red"))


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
                    live.update(view(store.list(limit=10), logs, watching, console.width), refresh=True)
            elif passed >= next_line:
                next_line += 1.0
                console.print(progress_line(passed, logs, watching))
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
        rest = (part.state, part.updated, part.meta, part.changes, part.deleted, part.deleted_meta, part.labels)
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
