"""The processes of a run: workers and watchers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .dump import NAMESPACE
from .watching import read_chains, unfinished
from .workers import DEADLINE

__all__ = ["Fleet", "Watchers"]

ROOT = Path(__file__).parents[2]


@dataclass
class Worker:
    """A worker's process."""

    name: str
    process: subprocess.Popen[bytes]
    blocking: bool
    started: float = field(default_factory=time.monotonic)


class Fleet:
    """The worker processes."""

    def __init__(self, url: str, folder: Path, rng: random.Random, until: int, *, plants: Sequence[str]) -> None:
        self._url = url
        self._folder = folder
        self._rng = rng
        self._until = until
        self._plants = plants
        self._count = 0
        self._processes: list[Worker] = []

    def start(self, *, blocking: bool = False) -> None:
        """Start one more."""
        self._count += 1
        name = f"w{self._count}"
        command = [sys.executable, "-m", "tests.faults.workers", "--url", self._url, "--namespace", NAMESPACE]
        command += ["--name", name, "--log", str(self._folder / f"history-{name}.jsonl")]
        command += ["--seed", str(self._rng.randrange(2**32)), "--until", str(self._until)]
        for plant in self._plants:
            command += ["--plant", plant]
        if blocking:
            command.append("--blocking")
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with (self._folder / f"{name}.err").open("wb") as errors:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors)
        self._processes.append(Worker(name, process, blocking))

    def ready(self) -> None:
        """Wait until each has connected."""
        for worker in self._processes:
            assert worker.process.stdout is not None
            worker.process.stdout.readline()

    def replace(self) -> None:
        """Kill one as kill -9 does, and start another."""
        worker = self._processes.pop(self._rng.randrange(len(self._processes)))
        worker.process.kill()
        self._end(worker.process)
        self.start(blocking=worker.blocking)

    def stop(self) -> Callable[[], None]:
        """Let one stand still, and return what ends that."""
        process = self._rng.choice(self._processes).process
        process.send_signal(signal.SIGSTOP)
        return lambda: process.send_signal(signal.SIGCONT)  # which does nothing if it was killed

    def strike(self) -> None:
        """Interrupt the blocking ones in whatever their stores are doing."""
        for worker in self._processes:
            if worker.blocking:
                worker.process.send_signal(signal.SIGURG)

    def settled(self) -> list[str]:
        """Return the names of those that had some time to start."""
        return [worker.name for worker in self._processes if worker.started < time.monotonic() - 2]

    def join(self, patience: float) -> list[str]:
        """Wait for the end of all; return what is wrong with how they ended."""
        until = time.monotonic() + patience
        wrong = []
        for worker in self._processes:
            try:
                code = worker.process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            if code != 0:
                wrong.append(f"worker {worker.name} ended with {code}")
        self.close()
        for path in self._folder.glob("w[0-9]*.err"):
            # They may say that they were denied something.
            lines = [line for line in path.read_text().splitlines() if "denied" not in line]
            wrong += lines[-3:]
        return wrong

    def close(self) -> None:
        for worker in self._processes:
            if worker.process.poll() is None:
                worker.process.kill()
            self._end(worker.process)
        self._processes.clear()

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


class Watchers:
    """Watcher processes, of which the last two are killed now and then, and resumed by others from their cursors."""

    def __init__(self, url: str, folder: Path, rng: random.Random, *, naive: bool) -> None:
        self._url = url
        self._folder = folder
        self._rng = rng
        self._naive = naive
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._kinds: dict[str, list[str]] = {
            "watch-1": ["--some"], "watch-2": ["--blocking"], "watch-3": [], "watch-4": ["--ids"],
        }  # fmt: skip

    def start(self) -> None:
        """Start them and wait until each has begun."""
        for name in self._kinds:
            self._start(name)
        for process in self._processes.values():
            assert process.stdout is not None
            process.stdout.readline()

    def _start(self, name: str, *more: str) -> None:
        command = [sys.executable, "-m", "tests.faults.watchers", "--url", self._url, "--namespace", NAMESPACE]
        command += ["--name", name, "--log", str(self._log(name)), "--seed", str(self._rng.randrange(2**32)), *more]
        kind = self._kinds[name]
        command += ["--naive", *({"--ids"} & set(kind))] if self._naive else kind
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with (self._folder / f"{name}.err").open("ab") as errors:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors)
        self._processes[name] = process

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.jsonl"

    def replace(self) -> None:
        """Kill one of the last two as kill -9 does, and let another go on from its cursor."""
        name = self._rng.choice(list(self._kinds)[-2:])
        process = self._processes.pop(name)
        process.kill()
        self._end(process)
        (chain,) = read_chains([self._log(name)])
        cursors = [told.cursor for told in chain.told[-1:] if told.cursor]
        if cursors:
            self._start(name, "--since", cursors[0])
        else:
            since = json.loads(self._log(name).read_text().partition("\n")[0])["since"]
            self._start(name, "--since", since)

    def finish(self, dump: Sequence[Mapping[str, Any]], patience: float) -> list[str]:
        """Wait until each has told the end, for so long at most; return what is wrong with how they ended."""
        until = time.monotonic() + patience
        while time.monotonic() < until:
            chains = read_chains(map(self._log, self._kinds))
            if len(chains) >= len(self._kinds) and not any(unfinished(chain, dump) for chain in chains):
                break
            time.sleep(0.3)
        time.sleep(0.3)  # what comes twice would come now
        wrong = []
        for name, process in self._processes.items():
            if process.poll() is None:
                process.terminate()
            try:
                code = process.wait(DEADLINE + 5)
            except subprocess.TimeoutExpired:
                code = None
            if code != 0:
                wrong.append(f"{name} ended with {code}")
        self.close()
        return wrong

    def close(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
            self._end(process)
        self._processes.clear()

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
