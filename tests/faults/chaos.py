"""Faults: strikes at the server, the proxies before it, and the workers, and heals what it struck after a while."""

from __future__ import annotations

import contextlib
import heapq
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import redis

from . import proxy as modes
from .fleet import Fleet, Watchers
from .proxy import Mode, Proxy
from .server import USER, Server

__all__ = ["FAULTS", "Chaos"]

# Any command that a write needs and some that a read needs, channels, or the user as a whole.
RIGHTS = (
    "-hset", "-hdel", "-hget", "-hgetall", "-hmget", "-rpush", "-ltrim", "-lset", "-lrange", "-rename", "-persist",
    "-pexpire", "-unlink", "-zadd", "-zrem", "-zrangebyscore", "-zremrangebyscore", "-publish", "-evalsha", "-@write",
    "-copy", "-hexists", "-hkeys", "-llen", "-lindex", "-zrange", "-time", "resetchannels", "off",
)  # fmt: skip


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
