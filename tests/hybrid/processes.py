"""Real processes on folders, killed at random moments, behind proxies that fail; then what must be there."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orcs_redis.sync
from orcs_redis import SessionAsset
from tests.faults.proxy import HOLD, REFUSE, SWALLOW, Proxy, delay, mid_command, mid_reply
from tests.servers import Server, free_port

from .model import view_of
from .writer import SESSIONS

__all__ = ["Outcome", "chaos", "run"]

_ROOT = Path(__file__).parents[2]
_PATIENCE = 90.0  # seconds
_MODES = (REFUSE, HOLD, SWALLOW, delay(0.05), mid_reply(20), mid_command(20))


@dataclass
class Outcome:
    """What came of it."""

    tried: dict[str, list[str]] = field(default_factory=dict)  # by session
    done: dict[str, list[str]] = field(default_factory=dict)
    kills: int = 0
    faults: list[str] = field(default_factory=list)


class _Fleet:
    """Processes that are started anew when they are killed."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self._folder = folder
        self._random = rng
        self._count = 0
        self._running: list[tuple[list[str], subprocess.Popen[bytes]]] = []

    def start_sync(self, machine: Path, url: str) -> None:
        self._start(["-m", "orcs_redis.cli", "sync", str(machine), "--live", "--url", url])

    def start_writer(self, machine: Path | None, url: str, *options: str) -> None:
        command = ["-m", "tests.hybrid.writer", "--url", url, *options]
        self._start(command + ([] if machine is None else ["--folder", str(machine)]))

    def _start(self, command: list[str]) -> None:
        self._count += 1
        more: list[str] = []
        if "tests.hybrid.writer" in command:
            name = f"w{self._count}"
            more = ["--name", name, "--log", str(self._folder / f"{name}.log")]
            more += ["--seed", str(self._random.randrange(2**32))]
        errors = self._folder / f"{self._count}.err"
        with errors.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command, *more],
                cwd=_ROOT,
                env=os.environ | {"PYTHONPATH": str(_ROOT)},
                stdout=output,
                stderr=output,
            )
        self._running.append((command, process))

    def kill_one(self) -> None:
        """Kill one as kill -9 does, and start another like it."""
        command, process = self._running.pop(self._random.randrange(len(self._running)))
        process.kill()
        process.wait()
        self._start(command)

    def acknowledged(self) -> int:
        """How many turns were."""
        return sum(log.read_text().count("done ") for log in self._folder.glob("w*.log"))

    def end(self) -> None:
        """Kill all."""
        for _, process in self._running:
            process.kill()
            process.wait()


def chaos(folder: Path, seed: int, turns: int = 200, kills: int = 8) -> Outcome:
    """Let two machines with four processes each, and a peer, write to the same sessions; then check what is there.

    It goes on until so many turns were acknowledged and so many processes killed.
    """
    rng = random.Random(seed)
    outcome = Outcome()
    server = Server(free_port(), folder)
    server.start()
    machines = [folder / "a", folder / "b"]
    try:
        with orcs_redis.sync.open_store(server.url) as shared:
            for number, id in enumerate(SESSIONS):
                shared.save(SessionAsset(id=id, created_at_ms=1_700_000_000_000 + number))
        proxies = [Proxy(server.port) for _ in machines]
        try:
            _sync(machines, server.url)
            fleet = _Fleet(folder, rng)
            try:
                for machine, proxy in zip(machines, proxies, strict=True):
                    url = f"redis://127.0.0.1:{proxy.port}/0"
                    fleet.start_sync(machine, url)
                    fleet.start_sync(machine, url)
                    fleet.start_writer(machine, url)
                    fleet.start_writer(machine, url, "--live")
                fleet.start_writer(None, server.url)
                end = time.monotonic() + _PATIENCE
                while (outcome.kills < kills or fleet.acknowledged() < turns) and time.monotonic() < end:
                    time.sleep(rng.uniform(0.1, 1.0))
                    if rng.random() < 0.7:
                        fleet.kill_one()
                        outcome.kills += 1
                    else:
                        proxy = rng.choice(proxies)
                        proxy.strike(rng.choice(_MODES), new=rng.random() < 0.3)
                        time.sleep(rng.uniform(0, 0.3))
                        proxy.heal()
            finally:
                fleet.end()
        finally:
            for proxy in proxies:
                proxy.close()
        _read_logs(folder, outcome)
        _check(machines, server.url, outcome)
    finally:
        server.stop()
    return outcome


def _sync(machines: list[Path], url: str) -> list[Any]:
    reports = []
    for machine in machines:
        with orcs_redis.sync.HybridSessionStore(machine, url, live=False) as store:
            reports.append(store.sync())
    return reports


def _read_logs(folder: Path, outcome: Outcome) -> None:
    for log in sorted(folder.glob("w*.log")):
        for line in log.read_text().splitlines():
            kind, session, turn = line.split()
            (outcome.tried if kind == "try" else outcome.done).setdefault(session, []).append(turn)


def _check(machines: list[Path], url: str, outcome: Outcome) -> None:
    """Every turn that was acknowledged is there once, on all sides, in its writer's order; and nothing else is."""
    for _ in range(3):
        reports = _sync(machines, url)
    for machine, report in zip(machines, reports, strict=True):
        if report.uploaded or report.downloaded or report.merged or report.conflicts or report.failed:
            outcome.faults.append(f"{machine.name} does not come to rest: {report}")
    for id in SESSIONS:
        with orcs_redis.sync.open_store(url) as shared:
            there = view_of(shared.load(id))
        for machine in machines:
            if view_of(SessionAsset.from_json((machine / f"{id}.json").read_bytes())) != there:
                outcome.faults.append(f"{id} differs on {machine.name}")
        counts = Counter(there.turns)
        if doubled := [turn for turn, count in counts.items() if count > 1]:
            outcome.faults.append(f"{id}: twice there: {doubled}")
        if lost := [turn for turn in outcome.done.get(id, []) if turn not in counts]:
            outcome.faults.append(f"{id}: lost: {lost}")
        if strange := counts.keys() - outcome.tried.get(id, []):
            outcome.faults.append(f"{id}: nobody has written {strange}")
        for writer in {turn.partition(".")[0] for turn in there.turns}:
            own = [turn for turn in there.turns if turn.startswith(f"{writer}.")]
            if own != sorted(own, key=lambda turn: int(turn.partition(".")[2])):
                outcome.faults.append(f"{id}: out of order: {own}")


def run(seed: int, runs: int) -> int:
    """Do it several times, and print what came of it."""
    failed = 0
    for number in range(seed, seed + runs):
        with tempfile.TemporaryDirectory(prefix="hybrid-") as folder:
            outcome = chaos(Path(folder), number)
        tried, done = (sum(map(len, found.values())) for found in (outcome.tried, outcome.done))
        failed += bool(outcome.faults)
        said = "; ".join(outcome.faults) or "none"
        print(f"seed {number}: {tried} turns, {done} acknowledged, {outcome.kills} kills; faults: {said}", flush=True)
    return int(failed > 0)
