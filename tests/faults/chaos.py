"""One run: a server, a proxy before it, workers behind the proxy, faults, and in the end the checker.

Everything that is drawn comes from one seed. What the faults meet is up to the machine, so a seed gives the same faults
again, not the same history: what is needed to look into a failure is kept in the run's folder.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

import orcs_redis.sync
from orcs_redis import StorageError

from ..servers import BINARY, free_port
from . import proxy as modes
from .history import FALSEHOODS, Faults, Op, Violation, check, read_history
from .leases import check_leases
from .proxy import Mode, Proxy
from .watching import check_watches, read_chains, unfinished
from .workers import DEADLINE, STILL, Recorder, new_session

__all__ = ["FAULTS", "Report", "check_folder", "run", "take_dump"]

NAMESPACE = "chaos"
PARTITIONS = 2
WORKERS = 3
CALM = 3.0  # seconds without faults, before and after
USER, PASSWORD = "worker", "secret"
# Any command that a write needs and some that a read needs, channels, or the user as a whole.
RIGHTS = (
    "-hset", "-hdel", "-hget", "-hgetall", "-hmget", "-rpush", "-ltrim", "-lset", "-lrange", "-rename", "-persist",
    "-pexpire", "-unlink", "-zadd", "-zrem", "-zrangebyscore", "-zremrangebyscore", "-publish", "-evalsha", "-@write",
    "resetchannels", "off",
)  # fmt: skip
ROOT = Path(__file__).parents[2]


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
            f"  faults: {self.faults}",
            f"  {len(self.violations)} violations {self.rules or ''} (checked in {self.check_seconds:.1f} s)",
            *(f"    {violation}" for violation in self.violations[:20]),
        ]
        if self.violations:
            lines.append(f"  history, faults and dump are in {self.folder}")
        return "\n".join(lines)


class Server:
    """A server that is killed, stopped and started again, and has forgotten nothing that it acknowledged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.stopped = False
        self.admin: Any = redis.Redis(
            port=self.port, socket_timeout=2, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0)
        )

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._folder.mkdir(exist_ok=True)
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        arguments += ["--appendonly", "yes", "--appendfsync", "always", "--repl-diskless-sync-delay", "0"]
        arguments += ["--user", USER, "on", f">{PASSWORD}", "~*", "&*", "+@all"]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen([BINARY, *arguments], stdout=log, stderr=log)
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(redis.RedisError):
                if self.admin.ping():
                    return
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError((self._folder / "server.log").read_text()[-2000:])
            time.sleep(0.01)

    def is_complete_replica(self) -> bool:
        """Whether it has all that its master has, or nearly so, and would have it after a kill too."""
        facts = self.admin.info()
        rewriting = facts["aof_rewrite_in_progress"] or facts["aof_rewrite_scheduled"]
        return facts["role"] == "slave" and facts["master_link_status"] == "up" and not rewriting

    def kill(self) -> None:
        """Kill it as kill -9 does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self.stopped = False
        self.admin.connection_pool.disconnect()

    def stop(self) -> None:
        """Let it stand still."""
        assert self._process is not None
        self.stopped = True
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """End the standstill."""
        if self._process is not None and self.stopped:
            self._process.send_signal(signal.SIGCONT)
        self.stopped = False

    def close(self) -> None:
        self.kill()
        self.admin.close()


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


class Chaos:
    """Strikes, and heals what it struck after a while."""

    def __init__(
        self,
        server: Server,
        replica: Server,
        proxies: Sequence[Proxy],
        fleet: Fleet,
        watchers: Watchers,
        rng: random.Random,
        log: Path,
    ) -> None:
        self._server = server  # the master
        self._replica = replica
        self._proxies = proxies
        self._fleet = fleet
        self._watchers = watchers
        self._rng = rng
        self._log = log.open("a")
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._passing = 0  # faults of the proxy under way: the last one to end heals
        self.counts: Counter[str] = Counter()
        self.moved: list[tuple[int, int]] = []
        self.denied: list[tuple[int, int]] = []
        self.restarts: list[int] = []  # ns of the monotonic clock at which a killed server could be reached again

    def run(self, until: float, only: Sequence[str] | None = None) -> None:
        """Strike every 0.3 to 1 s until then, and heal everything."""
        names = list(only or FAULTS)
        weights = [FAULTS[name][1] for name in names]
        strike_at = time.monotonic() + self._rng.uniform(0.3, 1)
        while (now := time.monotonic()) < until:
            while self._due and self._due[0][0] <= now:
                heapq.heappop(self._due)[2]()
            if now >= strike_at:
                name = self._rng.choices(names, weights)[0]
                # Drawn before it is known whether the server can be reached, so that a seed says what comes.
                strength, duration = self._rng.random(), self._rng.random()
                with contextlib.suppress(redis.RedisError):
                    FAULTS[name][0](self, strength, duration)
                strike_at = now + self._rng.uniform(0.3, 1)
            time.sleep(0.01)
        while self._due:
            heapq.heappop(self._due)[2]()
        self._heal()
        self._log.close()

    @property
    def master(self) -> Server:
        """The server that takes writes."""
        return self._server

    def _note(self, name: str, **details: Any) -> None:
        self.counts[name] += 1
        self._log.write(json.dumps({"at": time.monotonic_ns(), "fault": name, **details}) + "\n")
        self._log.flush()

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._due, (time.monotonic() + seconds, self._number, do))

    # The proxy

    def _heal(self) -> None:
        for proxy in self._proxies:
            proxy.heal()

    def _pass(self, mode: Mode, seconds: float, *, new: bool = False, feeds: bool = False) -> None:
        existing = self._share()
        name = f"{mode.name} of pub/sub" if feeds else mode.name
        self._note(name, seconds=round(seconds, 3), existing=existing, new=new, mode=asdict(mode))
        self._passing += 1
        for proxy in self._proxies:
            proxy.strike(mode, existing=existing, new=new, feeds=feeds)

        def heal() -> None:
            self._passing -= 1
            if not self._passing:
                self._heal()

        self._later(seconds, heal)

    def _share(self) -> float:
        return self._rng.choice((0.3, 0.3, 0.6, 1.0))

    def delay(self, strength: float, duration: float) -> None:
        self._pass(modes.delay(0.005 + 0.15 * strength**2), 0.2 + 0.8 * duration, new=True)

    def late(self, strength: float, duration: float) -> None:
        self._pass(modes.late(1.2 + 2 * strength), 0.3 + duration)

    def cut(self, strength: float, duration: float) -> None:
        self._note("cut")
        share = self._share()
        for proxy in self._proxies:
            proxy.cut(share)

    def refuse(self, strength: float, duration: float) -> None:
        self._pass(modes.REFUSE, (3.5 if strength > 0.9 else 0.7) * duration, new=True)

    def blackhole(self, strength: float, duration: float) -> None:
        self._pass(modes.BLACKHOLE, (4 if strength > 0.9 else 1) * duration, new=strength > 0.7)

    def hold(self, strength: float, duration: float) -> None:
        self._pass(modes.HOLD, 0.1 + 2.5 * duration**2, new=strength > 0.7)

    def swallow(self, strength: float, duration: float) -> None:
        self._pass(modes.SWALLOW, 0.1 + 2 * duration**2, new=strength > 0.8)

    def trickle(self, strength: float, duration: float) -> None:
        self._pass(modes.TRICKLE, 0.2 + 0.5 * duration, new=True)

    def mid_reply(self, strength: float, duration: float) -> None:
        self._pass(modes.mid_reply(1 + int(60 * strength)), 0.1 + 0.3 * duration, new=duration > 0.7)

    def mid_command(self, strength: float, duration: float) -> None:
        self._pass(modes.mid_command(1 + int(600 * strength)), 0.1 + 0.3 * duration, new=duration > 0.7)

    def deaf(self, strength: float, duration: float) -> None:
        self._pass(modes.BLACKHOLE, 0.1 + 2 * duration, feeds=True)

    def late_news(self, strength: float, duration: float) -> None:
        self._pass(modes.HOLD, 0.1 + 2 * duration**2, feeds=True)

    # The server

    def pubsub_kill(self, strength: float, duration: float) -> None:
        if not self._server.stopped:
            self._server.admin.client_kill_filter(_type="pubsub")
            self._note("CLIENT KILL TYPE pubsub")

    def client_kill(self, strength: float, duration: float) -> None:
        if not self._server.stopped:
            self._server.admin.client_kill_filter(_type="normal", skipme=True)
            self._note("CLIENT KILL")

    def client_pause(self, strength: float, duration: float) -> None:
        if not self._server.stopped:
            # What heals other faults waits for the end of the pause.
            self._server.admin.client_pause(int(100 + 1400 * duration), all=strength > 0.5)
            self._note("CLIENT PAUSE")

    def script_flush(self, strength: float, duration: float) -> None:
        if not self._server.stopped:
            self._server.admin.script_flush()
            self._note("SCRIPT FLUSH")

    def standstill(self, strength: float, duration: float) -> None:
        if not self._server.stopped:
            seconds = 0.2 + 2.8 * duration**2
            self._server.stop()
            self._note("SIGSTOP", seconds=round(seconds, 3))
            self._later(seconds, self._server.go_on)

    def restart(self, strength: float, duration: float) -> None:
        self._server.kill()
        down = 0.5 * duration if strength > 0.5 else 0.0
        time.sleep(down)
        self._server.start()
        if not self._passing:
            self.restarts.append(time.monotonic_ns())
        self._note("kill -9", down=round(down, 3))

    def _set(self, name: str, value: str, back: str, duration: float) -> None:
        server = self._server
        if server.stopped:
            return
        server.admin.config_set(name, value)
        self._note(f"{name} {value}")

        def undo() -> None:
            with contextlib.suppress(redis.RedisError):  # a restart undoes it too
                server.go_on()
                server.admin.config_set(name, back)

        self._later(0.05 + duration, undo)

    def no_replicas(self, strength: float, duration: float) -> None:
        self._set("min-replicas-to-write", "2", "0", 0.6 * duration)

    def full(self, strength: float, duration: float) -> None:
        self._set("maxmemory", "1", "0", 0.6 * duration)

    def failover(self, strength: float, duration: float) -> None:
        """Let master and replica change places, without loss; the endpoint follows, and no connection is closed."""
        old, new = self._server, self._replica
        if old.stopped or not new.is_complete_replica():
            return
        begin = time.monotonic_ns()
        old.admin.client_unpause()
        old.admin.execute_command("FAILOVER", "TO", "127.0.0.1", new.port, "TIMEOUT", 1000)
        until = time.monotonic() + 20
        while (role := self._role(old)) is None:
            if time.monotonic() > until:
                raise RuntimeError("the failover does not end")
            time.sleep(0.002)
        if role == "master":
            return  # the replica was too slow
        self._server, self._replica = new, old
        after = 0.5 * duration**2 if strength > 0.5 else 0.0
        self._note("failover", after=round(after, 3))
        at = len(self.moved)
        self.moved.append((begin, 2**63))

        def move() -> None:
            for proxy in self._proxies:
                proxy.target = self._server.port
            self.moved[at] = begin, time.monotonic_ns()

        self._later(after, move)

    @staticmethod
    def _role(server: Server) -> str | None:
        """Return what a server is; None while it changes, or does not answer."""
        with contextlib.suppress(redis.RedisError):
            facts: dict[str, str] = server.admin.info("replication")
            if facts["master_failover_state"] == "no-failover":
                return facts["role"]
        return None

    def rights(self, strength: float, duration: float) -> None:
        """Take one or two rights from the workers' user, and give them back."""
        taken = self._rng.sample(RIGHTS, 1 if strength < 0.7 else 2)
        servers = self._server, self._replica
        if any(server.stopped for server in servers):
            return
        begin = time.monotonic_ns()
        for server in servers:
            server.admin.execute_command("ACL", "SETUSER", USER, *taken)
        self._note("rights", taken=taken)
        at = len(self.denied)
        self.denied.append((begin, 2**63))

        def give_back() -> None:
            for server in servers:
                server.go_on()
                with contextlib.suppress(redis.RedisError):  # a restart gives them back too
                    server.admin.execute_command("ACL", "SETUSER", USER, "on", "+@all", "allchannels")
            self.denied[at] = begin, time.monotonic_ns()

        self._later(0.05 + 0.8 * duration, give_back)

    # The workers

    def signals(self, strength: float, duration: float) -> None:
        """A volley of signals whose handler raises."""
        for _ in range(10 + int(40 * duration)):
            self._fleet.strike()
            time.sleep(self._rng.uniform(0, 0.01 * strength))
        self._note("signals")

    def worker_stops(self, strength: float, duration: float) -> None:
        seconds = 0.2 + 3.8 * duration**2
        self._later(seconds, self._fleet.stop())
        self._note("worker stopped", seconds=round(seconds, 3))

    def worker(self, strength: float, duration: float) -> None:
        self._fleet.replace()
        self._note("worker killed")

    def watcher(self, strength: float, duration: float) -> None:
        self._watchers.replace()
        self._note("watcher killed and resumed")


FAULTS: Mapping[str, tuple[Callable[[Chaos, float, float], None], float]] = {
    "delay": (Chaos.delay, 1),
    "late": (Chaos.late, 1.5),
    "cut": (Chaos.cut, 1.5),
    "refuse": (Chaos.refuse, 0.7),
    "blackhole": (Chaos.blackhole, 1),
    "hold": (Chaos.hold, 1),
    "swallow": (Chaos.swallow, 2),
    "trickle": (Chaos.trickle, 0.5),
    "mid-reply": (Chaos.mid_reply, 1.5),
    "mid-command": (Chaos.mid_command, 1.5),
    "client-kill": (Chaos.client_kill, 1),
    "client-pause": (Chaos.client_pause, 0.7),
    "script-flush": (Chaos.script_flush, 1),
    "sigstop": (Chaos.standstill, 1.5),
    "kill-9": (Chaos.restart, 1.5),
    "no-replicas": (Chaos.no_replicas, 0.5),
    "full": (Chaos.full, 0.5),
    "failover": (Chaos.failover, 1.5),
    "rights": (Chaos.rights, 1.5),
    "signals": (Chaos.signals, 1.5),
    "worker-stops": (Chaos.worker_stops, 0.7),
    "worker": (Chaos.worker, 0.5),
    "deaf": (Chaos.deaf, 1),
    "late-news": (Chaos.late_news, 1),
    "pubsub-kill": (Chaos.pubsub_kill, 1),
    "watcher": (Chaos.watcher, 1),
}


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
    report.unknown = sum(op.unknown for op in ops if op.writes)
    report.rules = dict(Counter(violation.rule for violation in violations))
    report.lost, report.doubled = report.rules.get("lost", 0), report.rules.get("doubled", 0)
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


def take_dump(client: redis.Redis) -> list[dict[str, Any]]:
    """Return what the server holds, read without any of the store's own code: one mapping for each partition."""
    keys = {key.decode() for key in client.scan_iter(match="*", count=10_000)}
    keys.discard(f"{NAMESPACE}:layout")
    dump = []
    for number in range(PARTITIONS):
        prefix = f"{{{NAMESPACE}/{number}}}:"
        read: Any = client

        def scores(name: str, prefix: str = prefix, read: Any = read) -> dict[str, int]:
            return {id.decode(): int(score) for id, score in read.zrange(prefix + name, 0, -1, withscores=True)}

        own = {key for key in keys if key.startswith(prefix)}
        sessions = {}
        for key in sorted(own):
            if key.startswith(f"{prefix}session:"):
                id = key.removeprefix(f"{prefix}session:")
                fields = read.hgetall(key)
                turns = [msgspec.msgpack.decode(turn) for turn in read.lrange(f"{prefix}turns:{id}", 0, -1)]
                sessions[id] = {
                    "revision": int(fields[b".revision"]),
                    "turns": int(fields[b".turns"]),
                    "ids": [turn[0] for turn in turns],
                    "metadata": msgspec.msgpack.decode(fields[b"metadata"]),
                    "updated_at_ms": msgspec.msgpack.decode(fields[b"updated_at_ms"]),
                }
                own -= {key, f"{prefix}turns:{id}"}
        # Staged turns of a save that never came run out by themselves, and so do leases.
        passing = (f"{prefix}staging:", f"{prefix}lease:")
        strays = {key for key in own if not key.startswith(passing) or read.pttl(key) == -1}
        strays -= {
            prefix + name
            for name in ("state", "updated", "meta", "changes", "deleted", "deleted:meta", "fence", "leases")
        }
        state = read.hgetall(f"{prefix}state")
        dump.append(
            {
                "revision": int(state[b"revision"]),
                "sessions": sessions,
                "meta": {
                    id.decode(): msgspec.msgpack.decode(data)[:3] for id, data in read.hgetall(f"{prefix}meta").items()
                },
                "updated": scores("updated"),
                "changes": scores("changes"),
                "deleted": scores("deleted"),
                "deleted_meta": sorted(id.decode() for id in read.hkeys(f"{prefix}deleted:meta")),
                "windows": [_revisions(data) for name, data in state.items() if name.startswith(b"w")],
                "strays": sorted(strays),
            }
        )
    return dump


def _revisions(window: bytes) -> list[int]:
    return [int.from_bytes(window[at + 9 : at + 16]) for at in range(16, len(window), 16)]
