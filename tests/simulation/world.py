"""One schedule: a world of writers, workers and watchers around a private server, all moved by one seed."""

from __future__ import annotations

import collections
import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

from orcs_redis import scripts
from orcs_redis.model import sections
from orcs_redis.protocol import attempts, changes, leases, reads, saving, sessions, watching
from orcs_redis.protocol import writer as writers
from orcs_redis.protocol.keys import Keyspace
from orcs_redis.protocol.namespace import Create, Probe
from orcs_redis.protocol.writer import Namespace

from .audit import check_state
from .clock import Clock
from .driver import CANCELLED, Call, Wake, Writer
from .faults import Faults
from .leases import Holding
from .lua import NOW, Edit, Limits, instrumented
from .model import Model
from .network import Network
from .profiles import Profile
from .rules import Violation
from .server import Server
from .watches import Consumer
from .work import Work

__all__ = ["World"]

_HEARTBEAT = 5.0
_SNAPSHOTS = 4
_DRAIN = 3000  # rounds
_ATTEMPTS = 5  # when nothing fails


class World:
    """One schedule."""

    def __init__(
        self, server: Server, seed: int, profile: Profile, edit: Edit | None = None, *, trace: bool = False
    ) -> None:
        self.random = rng = random.Random(f"{profile.name}/{seed}")
        self.server, self.profile, self.edit, self.tracing = server, profile, edit, trace
        self.lines: list[str] = []
        self.clock = Clock()
        few = profile.evicts_windows
        self.limits = Limits(
            max_windows=rng.choice((1, 1, 2, 5)) if few else 1000,
            max_dedup_bytes=rng.choice((100, 300, 1 << 20)) if few else 1 << 20,
            max_tombstones=rng.choice((1, 2, 1000)),
        )
        self.window, self.batch, self.pending = (
            rng.choice((2, 3, 1024, 1024)),
            rng.choice((2, 3, 1000)),
            rng.choice((2, 10_000)),
        )
        self.ids = ("s0", "s1", "s2")
        self.keyspace = Keyspace("sim", rng.choice((1, 1, 1, 2)))
        self.partitions = self.keyspace.partitions
        self.model = Model(self)
        self.network = Network(self)
        self.faults = Faults(self)
        self.work = Work(self)
        self.counts: collections.Counter[str] = collections.Counter()
        self.writers: list[Writer] = []
        self.here: list[Writer] = []  # those that have not left
        self.consumers: list[Consumer] = []
        self.holdings: list[Holding] = []
        self.wakes: list[tuple[str, Wake]] = []
        self.snapshots: list[tuple[Any, ...]] = []
        self.faultless = True  # now
        self._missing: list[str] = []  # the sessions of what was lost by the last restore
        mood = rng.choice(profile.moods)
        self._mood = tuple(mood), tuple(mood.values())
        self._actions = tuple(profile.actions), tuple(profile.actions.values())

    def say(self, text: str) -> None:
        self.lines.append(f"{self.clock.now:8.3f} {text}")

    def count(self, what: str) -> None:
        self.counts[what] += 1

    # The schedule

    def run(self) -> None:
        """Run it, and raise Violation if a rule is broken."""
        with self._installed():
            self._open()
            self.faultless = self.profile.calm
            for _ in range(self.random.choice((10, 20, 40, 80))):
                self._step()
            self.faultless = True
            for id in sorted(self.model.leases.foreign):
                self.server.check(("DEL", self.keyspace.of(id).lease(id)))
            self.model.leases.foreign.clear()
            self._drain()
            for consumer in self.consumers:
                if not consumer.lossy and consumer.epoch == self.model.epoch:  # else the heartbeat may have to tell it
                    consumer.check()
            for holding in self.holdings:
                holding.finish()
            self._pass_time(_HEARTBEAT)
            self._rest()
            self.model.check_outcomes()
            check_state(self)
            for consumer in self.consumers:
                consumer.check()

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        found = instrumented(self.limits, self.edit)
        self.server.reset(list(found.values()))
        swaps: list[tuple[Any, str, Any]] = [(scripts, name, script) for name, script in found.items()]
        swaps += [(module, "time", self.clock) for module in (sections, leases, reads, writers, changes, watching)]
        swaps += [(module, "random", self.random) for module in (sessions, saving, attempts)]
        swaps += [
            (os, "urandom", self.random.randbytes), (writers, "_MAX_SPREAD", self.window),
            (changes, "_MAX_READ", self.batch), (watching, "_MAX_READ", self.batch),
            (watching, "_MAX_PENDING", self.pending),
        ]  # fmt: skip
        old = [(target, name, getattr(target, name)) for target, name, _ in swaps]
        try:
            for target, name, value in swaps:
                setattr(target, name, value)
            yield
        finally:
            for target, name, value in old:
                setattr(target, name, value)

    def _open(self) -> None:
        create = Create("sim", len(self.partitions))
        self.server.check(("SET", NOW, self.clock.milliseconds()), *create.commands())
        self.incarnation: bytes = self.server.check(("HGET", Keyspace.layout("sim"), "incarnation"))[0]
        self.server.messages()
        namespace = Namespace("sim", len(self.partitions), self.incarnation)
        self.change_channels = {namespace.channel(partition.changes): partition.number for partition in self.partitions}
        for _ in range(self.random.randint(1, 3)):
            self.enter()
        for id in self.ids[:2]:
            self.work.make(self.writers[0], id)
            self._perform(self.writers[0])

    def _step(self) -> None:
        for _ in range(20):
            (action,) = self.random.choices(*self._actions)
            writer = self.random.choice(self.here)
            do = getattr(self, f"_do_{action}", None) or getattr(self.faults, f"do_{action}")
            if do(writer) is not False:
                return

    def _drain(self) -> None:
        """Let all that is on its way arrive, in any order, and answer everybody."""
        for _ in range(_DRAIN):
            busy = bool(self.network.out or self.network.back or self.network.stuck)
            if self.network.stuck and self.random.random() < 0.2:
                self.faults.do_revive(self.writers[0])
            if self.network.out:
                self.network.arrive(self.random.choice(self.network.out))
            if self.network.back:
                self.network.reply(self.random.choice(self.network.back))
            for writer in self.here:
                if writer.calls:
                    busy = True
                    self._do_send(writer)
                for flow in list(writer.flows):
                    if flow.ready():
                        busy = True
                        flow.resume()
            for consumer in self.consumers:
                busy |= consumer.step(receive=True)
            if not busy:
                return
            if not (self.network.out or self.network.back or self.network.stuck):
                self.clock.advance(0.01)
        raise Violation("rest", "something goes on without end")

    def _pass_time(self, seconds: float) -> None:
        """Let time pass without faults, from one thing that falls due to the next."""
        self._drain()
        until = self.clock.now + seconds
        while self.clock.now < until:
            self.clock.advance_to(min(until, self.clock.next()))
            self._drain()

    def _rest(self) -> None:
        """Judge what goes on when nothing happens: heartbeats."""
        before = self.counts["transmissions"]
        self._pass_time(2 * _HEARTBEAT)
        transmissions = self.counts["transmissions"] - before
        allowed = 4 * sum(len(writer.flows) for writer in self.here) + 8
        if transmissions > allowed:
            raise Violation("rest", f"{transmissions} transmissions in {2 * _HEARTBEAT:g} s, though nothing happens")

    # Steps. Each does one thing, or returns False if there is nothing for it to do.

    def _do_start(self, writer: Writer) -> bool | None:
        if len(writer.calls) >= 6:
            return False
        (name,) = self.random.choices(*self._mood)
        return self.work.begin(writer, name, self.random.choice(self.ids))

    def _do_send(self, writer: Writer) -> bool | None:
        ready = [call for call in writer.calls if call.ready()]
        if not ready:
            return False
        some = (
            ready[: self.random.randint(1, len(ready))] if self.random.random() < 0.5 else [self.random.choice(ready)]
        )
        self.network.send(some)
        return None

    def _do_arrive(self, writer: Writer) -> bool | None:
        if not self.network.out:
            return False
        first = self.profile.calm or self.random.random() < 0.5
        self.network.arrive(self.network.out[0] if first else self.random.choice(self.network.out))
        return None

    def _do_halt(self, writer: Writer) -> bool | None:
        """The server executes a part of a transmission; others come in between."""
        long = [transmission for transmission in self.network.out if transmission.halts()]
        if not long:
            return False
        transmission = self.random.choice(long)
        self.network.execute(transmission, self.random.choice(transmission.halts()))
        return None

    def _do_reply(self, writer: Writer) -> bool | None:
        if not self.network.back:
            return False
        self.network.reply(self.random.choice(self.network.back))
        return None

    def _do_watch(self, writer: Writer) -> bool | None:
        for flow in list(writer.flows):
            if flow.ready():
                flow.resume()
        if len(self.consumers) < 2 and self.random.random() < 0.3:
            ids = None if self.random.random() < 0.7 else self.random.sample(self.ids, 2)
            since = None
            if self.random.random() < 0.5:
                since = writer.changes.encode([self.random.randint(0, len(log)) for log in self.model.logs])
            self.consumers.append(Consumer(self, writer, ids, since))
            return None
        return bool(self.consumers) and self.random.choice(self.consumers).step(receive=self.random.random() < 0.5)

    def _do_tick(self, writer: Writer) -> None:
        self.clock.advance(self.random.choice((0.001, 0.01, 0.05, 0.3)))

    def _do_pause(self, writer: Writer) -> None:
        self.clock.advance(self.random.choice((0.5, 2.0, 6.0)))

    def _do_burst(self, writer: Writer) -> None:
        """Others come, write once, and go."""
        for _ in range(self.random.randint(1, min(self.limits.max_windows, 6) + 1)):
            self._pass_by(self.random.choice(self.ids))

    def _do_clone(self, writer: Writer) -> bool | None:
        if len(self.here) > 4:
            return False
        self._add(writer.twin(len(self.writers)))
        return None

    def _do_snapshot(self, writer: Writer) -> bool | None:
        if len(self.snapshots) == _SNAPSHOTS:
            return False
        self.server.snapshot(len(self.snapshots) + 1)
        self.snapshots.append(self.model.snapshot())
        return None

    def _do_restore(self, writer: Writer) -> bool | None:
        """Data goes back."""
        if not self.snapshots:
            return False
        number = self.random.randrange(len(self.snapshots))
        before = [entry.record.id for log in self.model.logs for entry in log]
        self.server.restore(number + 1)
        self.model.restore(self.snapshots[number])
        if self.tracing:
            self.say(f"restored: {[len(log) for log in self.model.logs]} writes")
        self.count("restores")
        if self.random.random() < 0.6:  # by a restart; else on a running server
            for consumer in self.consumers:
                consumer.disconnect()
        lost = before[sum(map(len, self.model.logs)) :][:20]
        again = self.random.random() < 0.5  # the same sessions, in the same order
        self._missing = lost if again else [self.random.choice(self.ids) for _ in lost]
        if self.random.random() < 0.3:
            self._do_catch_up(writer)
        return None

    def _do_catch_up(self, writer: Writer) -> bool | None:
        """Others write until the data is where it was before it went back: revisions are given anew."""
        if not self._missing:
            return False
        for id in self._missing:
            self._pass_by(id)
        self._missing = []
        return None

    # Writers

    def _add(self, writer: Writer) -> Writer:
        self.writers.append(writer)
        self.here.append(writer)
        return writer

    def enter(self) -> Writer:
        namespace = Namespace("sim", len(self.partitions), self.incarnation)
        writer = self._add(Writer(len(self.writers), namespace, _HEARTBEAT))
        if self.tracing:
            self.say(f"writer {writer.number} opens: {namespace.origin.hex()}")
        Call(self, writer, Probe(namespace), lambda _: None)
        self._perform(writer)
        return writer

    def leave(self, writer: Writer) -> None:
        self.here.remove(writer)
        for call in list(writer.calls):
            call.cancel()
        for flow in list(writer.flows):
            flow.stop()
        for holding in self.holdings:
            holding.over |= holding.writer is writer
        for consumer in self.consumers:
            if consumer.writer is writer and consumer.ended is None:
                consumer.ended = CANCELLED

    def _pass_by(self, id: str) -> None:
        writer = self.enter()
        self.work.append(writer, id)
        self._perform(writer)
        self.leave(writer)
        if len(self.model.records[-1].ids) > 1:
            raise Violation("answer", f"the first write of a new store was forgotten: {self.model.records[-1]}")

    def _perform(self, writer: Writer) -> None:
        """Do all that a writer has begun, at once and without faults."""
        for _ in range(_ATTEMPTS):
            if not writer.calls:
                return
            transmission = self.network.send([call for call in writer.calls if not call.waiting])
            self.network.arrive(transmission)
            self.network.reply(transmission)
        raise Violation("rest", f"{writer.calls[0]} takes more than {_ATTEMPTS} attempts, and nothing fails")
