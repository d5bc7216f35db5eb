"""One run: a server, a proxy before it, workers behind the proxy, faults, and in the end the checker.

Everything that is drawn comes from one seed. What the faults meet is up to the machine, so a seed gives the same faults
again, not the same history: what is needed to look into a failure is kept in the run's folder.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orcs_redis.sync
from orcs_redis import StorageError

from .chaos import FAULTS, Chaos
from .dump import NAMESPACE, PARTITIONS, take_dump
from .fleet import Fleet, Watchers
from .history import check
from .leases import check_leases
from .ops import FALSEHOODS, Faults, Op, Violation, judged, read_history
from .proxy import Proxy
from .recorder import Recorder, new_session
from .replay import check_parts
from .server import PASSWORD, USER, Server
from .watching import check_watches, read_chains
from .workers import STILL

__all__ = ["Report", "check_folder", "run"]

WORKERS = 3
CALM = 3.0  # seconds without faults, before and after


@dataclass
class Report:
    """What a run came to."""

    seed: int
    seconds: float
    folder: str
    plants: Sequence[str] = ()
    naive_watchers: bool = False
    operations: int = 0
    writes: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)  # of operations that were acknowledged
    faults: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    doubled: int = 0
    falsely: int = 0  # told so
    unknown: int = 0
    told: int = 0  # changes, to all watches
    resumed: int = 0  # watches
    grants: int = 0  # leases
    calm_rate: float = 0.0  # acknowledged operations per second, before the faults
    fault_rate: float = 0.0
    recovery_median: float | None = None  # seconds from a restarted server's first answer to a worker's next write
    recovery_worst: float | None = None
    check_seconds: float = 0.0
    violations: list[str] = field(default_factory=list)
    rules: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}, {self.seconds:.0f} s{', planted: ' + ', '.join(self.plants) if self.plants else ''}"
            f"{', naive watchers' if self.naive_watchers else ''}: {self.operations} operations "
            f"({self.writes} writes), {sum(self.faults.values())} faults",
            f"  lost {self.lost}, doubled {self.doubled}, told falsely {self.falsely}, unknown {self.unknown}; "
            f"{self.outcomes}",
            f"  {self.told} changes told to watchers, which resumed {self.resumed} times; {self.grants} leases",
            f"  {self.calm_rate:.0f} op/s without faults, {self.fault_rate:.0f} under them; "
            + (
                f"writing again after a restart: median {self.recovery_median:.3f} s, worst {self.recovery_worst:.3f} s"
                if self.recovery_median is not None
                else "no restart"
            ),
            f"  acknowledged: {self.kinds}",
            f"  faults: {self.faults}",
            f"  {len(self.violations)} violations {self.rules or ''} (checked in {self.check_seconds:.1f} s)",
            *(f"    {violation}" for violation in self.violations[:20]),
        ]
        if self.violations:
            lines.append(f"  history, faults and dump are in {self.folder}")
        return "\n".join(lines)


def run(
    seconds: float,
    seed: int,
    folder: Path,
    *,
    plants: Sequence[str] = (),
    naive_watchers: bool = False,
    only: Sequence[str] | None = None,
) -> Report:
    """Run workers and watchers for so long under faults, and some seconds before and after; check what came of it."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    with contextlib.ExitStack() as stack:
        server, replica = Server(folder / "a"), Server(folder / "b")
        for one in (server, replica):
            stack.callback(one.close)
            one.start()
        if "failover" in (only or FAULTS):
            replica.admin.replicaof("127.0.0.1", str(server.port))
        setup(f"redis://127.0.0.1:{server.port}/0", folder)
        proxy = stack.enter_context(Proxy(server.port))
        watching = stack.enter_context(Proxy(server.port))  # their connections last longer than the workers'
        watchers = Watchers(f"redis://127.0.0.1:{watching.port}/0", folder, rng, naive=naive_watchers)
        stack.callback(watchers.close)
        watchers.start()
        # The workers need some time to start.
        begin = time.monotonic() + 2
        over = begin + CALM + seconds
        until = over + CALM
        url = f"redis://{USER}:{PASSWORD}@127.0.0.1:{proxy.port}/0"
        fleet = Fleet(url, folder, rng, int(until * 1e9), plants=plants)
        stack.callback(fleet.close)
        for _ in range(WORKERS):
            fleet.start()
        fleet.start(blocking=True)
        fleet.ready()
        time.sleep(max(0.0, begin + CALM - time.monotonic()))
        chaos = Chaos(server, replica, (proxy, watching), fleet, watchers, rng, folder / "faults.jsonl")
        chaos.run(over, only)
        alive = fleet.settled()
        problems = fleet.join(20)
        drain(proxy)
        dump = take_dump(chaos.master.admin)
        problems += watchers.finish(dump, 10)
        problems += [path.read_text()[-2000:] for path in folder.glob("watch-*.err") if path.stat().st_size]
    (folder / "dump.json").write_text(json.dumps(dump))
    about: dict[str, Any] = {
        "seed": seed,
        "seconds": seconds,
        "plants": plants,
        "naive_watchers": naive_watchers,
        "begin": begin,
    }
    about |= {"over": over, "restarts": chaos.restarts, "counts": chaos.counts}
    about["faults"] = asdict(Faults(chaos.moved, chaos.denied, int(over * 1e9), alive))
    (folder / "run.json").write_text(json.dumps(about))
    return check_folder(folder, problems)


def drain(proxy: Proxy) -> None:
    """Wait until what is still on its way has arrived, then close the proxy."""
    expires = time.monotonic() + 10
    while proxy.connections() and time.monotonic() < expires:
        time.sleep(0.05)
    proxy.close()
    time.sleep(0.2)


def check_folder(folder: Path, problems: Sequence[str] = ()) -> Report:
    """Check what a run has left."""
    about = json.loads((folder / "run.json").read_text())
    started = time.monotonic()
    ops = read_history(sorted(folder.glob("history-*.jsonl")))
    violations = [Violation("worker", problem) for problem in problems]
    dump = json.loads((folder / "dump.json").read_text())
    violations += check(ops, dump, Faults(**about["faults"]))
    violations += check_parts([judged(op, about["faults"]["moved"]) for op in ops], dump)
    violations += check_leases(ops, len(dump))
    chains = read_chains(sorted(folder.glob("watch-*.jsonl")))
    violations += check_watches(chains, ops, dump)
    report = Report(about["seed"], about["seconds"], str(folder), about["plants"], about["naive_watchers"])
    report.faults = about["counts"]
    report.told, report.resumed = sum(len(chain.told) for chain in chains), sum(chain.resumed for chain in chains)
    report.grants = sum(op.kind == "acquire" and op.ok for op in ops)
    report.check_seconds = time.monotonic() - started
    report.operations = len(ops)
    report.writes = sum(op.writes for op in ops)
    report.outcomes = dict(Counter(str(op.outcome) for op in ops).most_common())
    report.kinds = dict(Counter(op.kind for op in ops if op.ok).most_common())
    report.unknown = sum(op.unknown for op in ops if op.writes)
    report.rules = dict(Counter(violation.rule for violation in violations))
    report.lost = report.rules.get("lost", 0) + report.rules.get("lost turn", 0)
    report.doubled = report.rules.get("doubled", 0) + report.rules.get("extra turn", 0)
    report.falsely = sum(report.rules.get(rule, 0) for rule in FALSEHOODS)
    report.violations = [str(violation) for violation in violations]
    middle = about["begin"] + CALM
    report.calm_rate = _rate(ops, about["begin"] + 0.5, middle)
    report.fault_rate = _rate(ops, middle, about["over"])
    strikes = [json.loads(line)["at"] for line in (folder / "faults.jsonl").read_text().splitlines()]
    recoveries = _recoveries(ops, about["restarts"], strikes)
    if recoveries:
        report.recovery_median, report.recovery_worst = statistics.median(recoveries), max(recoveries)
    (folder / "report.txt").write_text(f"{report}\n\n" + "\n".join(report.violations))
    return report


def _rate(ops: Sequence[Op], begin: float, end: float) -> float:
    return sum(op.ok and begin * 1e9 <= op.returned < end * 1e9 for op in ops) / max(0.001, end - begin)


def _recoveries(ops: Sequence[Op], restarts: Sequence[int], strikes: Sequence[int]) -> list[float]:
    """Return for each restart and each worker the seconds until its next write, unless something else struck."""
    by_worker: dict[str, list[int]] = {}
    for op in ops:
        if op.ok and op.writes:
            by_worker.setdefault(op.uid.partition("-")[0], []).append(op.returned)
    recoveries = []
    for restart in restarts:
        # The restart itself is noted a moment later.
        struck = min((at for at in strikes if at > restart + 20_000_000), default=restart)
        for returns in by_worker.values():
            after = min((moment for moment in returns if moment >= restart), default=struck)
            if after < struck:
                recoveries.append((after - restart) / 1e9)
    return recoveries


def setup(url: str, folder: Path) -> None:
    """Create the namespace, and sessions that stay as they are."""
    log = Recorder(str(folder / "history-setup.jsonl"), "setup")
    with orcs_redis.sync.open_store(url, namespace=NAMESPACE, partitions=PARTITIONS) as store:
        for n in range(STILL):
            uid, session = log.uid(), f"still-{n}"
            ids = [f"{uid}.{turn}" for turn in range(n)]
            log.call(uid, "create", session, ids=ids, base=0)
            try:
                revision = store.save(new_session(session, uid, ids), if_revision=0)
            except StorageError as error:
                log.done(uid, type(error).__name__)
            else:
                log.done(uid, "ok", revision=revision)
    log.close()
