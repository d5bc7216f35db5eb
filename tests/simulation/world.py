"""One schedule: a world of writers, workers and watchers around a private server, all moved by one seed."""

from __future__ import annotations

import collections
import contextlib
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import hiredis

from orcs_redis import ConversationTurn, SessionAsset, scripts
from orcs_redis.model import sections
from orcs_redis.model.meta import Versioned
from orcs_redis.protocol import attempts, changes, leases, reads, request, sessions, watching
from orcs_redis.protocol import writer as writers
from orcs_redis.protocol.attempts import ConnectionLost
from orcs_redis.protocol.commands import Argument, Batch, Command, batches
from orcs_redis.protocol.keys import Keyspace
from orcs_redis.protocol.namespace import Create
from orcs_redis.protocol.request import Plan, single
from orcs_redis.protocol.writer import Namespace
from orcs_redis.protocol.writes import Identified, Write

from .clock import Clock
from .driver import CANCELLED, Call, Flow, Wake, Writer
from .leases import Holding, Requested
from .lua import NOW, Edit, Limits, instrumented
from .model import AttemptToken, Model
from .profiles import Profile
from .rules import INJECTED, Violation
from .server import Server
from .watches import Consumer, check_messages, check_since

__all__ = ["World"]

_HEARTBEAT = 5.0
_SNAPSHOTS = 4
_DRAIN = 3000  # rounds
_ATTEMPTS = 5  # when nothing fails
_REFUSALS = tuple(code for code in INJECTED if code != "NOSCRIPT")


@dataclass(eq=False)
class Member:
    """A call's part of a transmission."""

    call: Call
    attempt: int
    first: int  # of its commands
    count: int
    token: AttemptToken | None

    @property
    def awaited(self) -> bool:
        """Whether the call still waits for this answer."""
        return self.call.waiting and self.call.attempt == self.attempt


@dataclass(eq=False)
class Transmission:
    """What goes out together; calls may have been merged, so that frames are fewer than commands."""

    members: list[Member]
    batches: list[Batch]
    replies: list[Any] = field(default_factory=list)  # of each command

    def __post_init__(self) -> None:
        self.frames = [batch.frame() for batch in self.batches]
        self.widths = [len(batch.commands) for batch in self.batches]

    def __str__(self) -> str:
        return ", ".join(f"{member.call} #{member.attempt}" for member in self.members)


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
        self.counts: collections.Counter[str] = collections.Counter()
        self.writers: list[Writer] = []
        self.here: list[Writer] = []  # those that have not left
        self.consumers: list[Consumer] = []
        self.holdings: list[Holding] = []
        self.wakes: list[tuple[str, Wake]] = []
        self.out: list[Transmission] = []  # on their way to the server
        self.stuck: list[Transmission] = []  # the same, of connections that were given up
        self.back: list[Transmission] = []  # replies
        self.snapshots: list[tuple[Any, ...]] = []
        self.faultless = True  # now
        self._missing: list[str] = []  # the sessions of what was lost by the last restore
        self._turns = 0
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
            self.model.check_state()
            for consumer in self.consumers:
                consumer.check()

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        found = instrumented(self.limits, self.edit)
        self.server.reset(list(found.values()))
        swaps: list[tuple[Any, str, Any]] = [(scripts, name, script) for name, script in found.items()]
        swaps += [(module, "time", self.clock) for module in (sections, leases, reads, writers, changes, watching)]
        swaps += [(module, "random", self.random) for module in (sessions, attempts)]
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
            self._enter()
        for id in self.ids[:2]:
            made = SessionAsset(id=id)
            made.history.turns.append(self._turn())
            self._save(self.writers[0], made, None, None)
            self._perform(self.writers[0])

    def _step(self) -> None:
        for _ in range(20):
            (action,) = self.random.choices(*self._actions)
            writer = self.random.choice(self.here)
            if getattr(self, f"_do_{action}")(writer) is not False:
                return

    def _drain(self) -> None:
        """Let all that is on its way arrive, in any order, and answer everybody."""
        for _ in range(_DRAIN):
            busy = bool(self.out or self.back or self.stuck)
            if self.stuck and self.random.random() < 0.2:
                self._do_revive(self.writers[0])
            if self.out:
                self._arrive(self.random.choice(self.out))
            if self.back:
                self._reply(self.random.choice(self.back))
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
            if not (self.out or self.back or self.stuck):
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
        self._begin(writer, name, self.random.choice(self.ids))
        return None

    def _do_send(self, writer: Writer) -> bool | None:
        ready = [call for call in writer.calls if call.ready()]
        if not ready:
            return False
        some = (
            ready[: self.random.randint(1, len(ready))] if self.random.random() < 0.5 else [self.random.choice(ready)]
        )
        self._send(some)
        return None

    def _do_arrive(self, writer: Writer) -> bool | None:
        if not self.out:
            return False
        first = self.profile.calm or self.random.random() < 0.5
        self._arrive(self.out[0] if first else self.random.choice(self.out))
        return None

    def _do_reply(self, writer: Writer) -> bool | None:
        if not self.back:
            return False
        self._reply(self.random.choice(self.back))
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

    def _do_lose_sending(self, writer: Writer) -> bool | None:
        if not self.out:
            return False
        transmission = self.out.pop(self.random.randrange(len(self.out)))
        self._lost(transmission)
        return None

    def _do_lose_reply(self, writer: Writer) -> bool | None:
        if not self.back:
            return False
        transmission = self.back.pop(self.random.randrange(len(self.back)))
        self._lost(transmission)
        return None

    def _do_cut(self, writer: Writer) -> bool | None:
        """Only the first frames arrive before the connection breaks."""
        long = [transmission for transmission in self.out if len(transmission.frames) > 1]
        if not long:
            return False
        transmission = self.random.choice(long)
        self._arrive(transmission, self.random.randrange(len(transmission.frames)))
        self.back.remove(transmission)
        self._lost(transmission)
        return None

    def _do_give_up(self, writer: Writer) -> bool | None:
        """The writer gives the transmission up, and it arrives later."""
        if not self.out:
            return False
        transmission = self.random.choice(self.out)
        if self.random.random() < 0.6:  # much later
            self.out.remove(transmission)
            self.stuck.append(transmission)
        self._lost(transmission)
        return None

    def _do_revive(self, writer: Writer) -> bool | None:
        if not self.stuck:
            return False
        self.out.append(self.stuck.pop(self.random.randrange(len(self.stuck))))
        return None

    def _do_unreachable(self, writer: Writer) -> bool | None:
        ready = [call for call in writer.calls if call.ready()]
        for call in ready:
            call.commands()  # as the drivers do, before they learn that there is no connection
            if call.record is not None:
                self.model.sent(call.record)
            call.failed(ConnectionLost("no connection", sent=False))
        return bool(ready)

    def _do_refuse(self, writer: Writer) -> bool | None:
        """The server refuses a transmission, or does not know its scripts."""
        if not self.out:
            return False
        transmission = self.out.pop(self.random.randrange(len(self.out)))
        code = self.random.choice((*_REFUSALS, "NOSCRIPT", "NOSCRIPT", "NOSCRIPT"))
        if code == "NOSCRIPT":
            self._execute(transmission, len(transmission.frames), forget_scripts=True)
        else:
            transmission.replies = [hiredis.ReplyError(f"{code} refused")] * sum(transmission.widths)
        self.back.append(transmission)
        return None

    def _do_cancel(self, writer: Writer) -> bool | None:
        calls = [call for call in writer.calls if isinstance(call.operation, Identified) and call.operation._token]
        if not calls:
            return False
        self.random.choice(calls).cancel()
        return None

    def _do_renew(self, writer: Writer) -> None:
        writer.namespace.begin_epoch()

    def _do_break_watch(self, writer: Writer) -> bool | None:
        if not self.consumers:
            return False
        self.random.choice(self.consumers).disconnect()
        return None

    def _do_lose_message(self, writer: Writer) -> bool | None:
        if not self.consumers:
            return False
        self.random.choice(self.consumers).lose()
        return None

    def _do_leave(self, writer: Writer) -> None:
        """The process is killed: what it sent may still arrive. Another begins."""
        self._leave(writer)
        self._enter()

    def _do_take_away(self, writer: Writer) -> None:
        """The server loses a lease, as by an eviction."""
        id = self.random.choice(self.ids)
        self.server.check(("DEL", self.keyspace.of(id).lease(id)))
        self.model.leases.take_away(id)

    def _do_spoil(self, writer: Writer) -> None:
        """Somebody else's key is where a lease belongs, or is gone again."""
        id = self.random.choice(self.ids)
        key, there = self.keyspace.of(id).lease(id), id in self.model.leases.foreign
        self.model.leases.take_away(id)
        self.server.check(("DEL", key), *([] if there else [("SET", key, "x")]))
        if not there:
            self.model.leases.foreign.add(id)

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

    def _enter(self) -> Writer:
        namespace = Namespace("sim", len(self.partitions), self.incarnation)
        writer = self._add(Writer(len(self.writers), namespace, _HEARTBEAT))
        if self.tracing:
            self.say(f"writer {writer.number} opens: {namespace.origin.hex()}")
        Call(self, writer, writer.sessions.probe(), lambda _: None, [])
        self._perform(writer)
        return writer

    def _leave(self, writer: Writer) -> None:
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
        writer = self._enter()
        self._append(writer, id, None, None)
        self._perform(writer)
        self._leave(writer)
        if len(self.model.records[-1].ids) > 1:
            raise Violation("answer", f"the first write of a new store was forgotten: {self.model.records[-1]}")

    def _perform(self, writer: Writer) -> None:
        """Do all that a writer has begun, at once and without faults."""
        for _ in range(_ATTEMPTS):
            if not writer.calls:
                return
            transmission = self._send([call for call in writer.calls if not call.waiting])
            self._arrive(transmission)
            self._reply(transmission)
        raise Violation("rest", f"{writer.calls[0]} takes more than {_ATTEMPTS} attempts, and nothing fails")

    # What they do

    def _turn(self) -> ConversationTurn:
        self._turns += 1
        turn = ConversationTurn.user("t")
        turn.id = f"t{self._turns}"
        return turn

    def _begin(self, writer: Writer, name: str, id: str) -> None:
        rng = self.random
        held = [holding for holding in self.holdings if holding.writer is writer and holding.held]
        under = rng.choice(held) if held and rng.random() < 0.6 else None
        if under is not None:
            id = under.id
        known = rng.choice(
            [record.outcome for record in self.model.records[-9:] if record.id == id and type(record.outcome) is int]
            or [1]
        )
        if name in ("append", "append_if"):
            self._append(writer, id, known if name == "append_if" else None, under)
        elif name.startswith("save"):
            found = writer.assets.get(id) if name == "save_known" else None
            found = found or SessionAsset(id=id)
            turns = found.history.turns
            if name == "save_big":
                turns.extend(self._turn() for _ in range(17))  # they are staged
            elif turns and rng.random() < 0.2:
                del turns[0]
            turns.append(self._turn())
            writer.assets[id] = found
            self._save(writer, found, 0 if name == "save_new" else known if rng.random() < 0.3 else None, under)
        elif name == "update":
            self._update(writer, id, under)
        elif name in ("delete", "delete_if"):
            plan = single(writer.sessions.delete, id, known if name == "delete_if" else None, under)
            Flow(self, writer, plan, lambda _: None)
        elif name == "lease":
            ttl = rng.choice((0.3, 2.0, 10.0))
            self.holdings.append(Holding(self, writer, id, ttl, rng.choice((0.0, 3.0))))
        elif name == "release" and held:
            rng.choice(held).release()
        elif name == "changes":
            since = writer.changes.encode([rng.randint(0, len(log)) for log in self.model.logs])
            Flow(self, writer, writer.changes.changes(since, rng.choice((1, 2, 100))), lambda _: None)
        else:
            Flow(self, writer, single(writer.sessions.load, id), lambda found: self._loaded(writer, found))

    def _append(self, writer: Writer, id: str, expected: int | None, under: Any) -> None:
        turns = [self._turn() for _ in range(self.random.choice((1, 1, 2)))]
        plan = single(writer.sessions.append, id, turns, expected, under)
        Flow(self, writer, plan, lambda _: None, [turn.id for turn in turns])

    def _save(self, writer: Writer, found: SessionAsset, expected: int | None, under: Any) -> None:
        plan: Plan[int] = writer.sessions.save(found, expected, under)
        Flow(self, writer, plan, lambda _: None, [turn.id for turn in found.history.turns])

    def _update(self, writer: Writer, id: str, under: Any) -> None:
        content: list[str] = []

        def change(found: SessionAsset) -> None:
            found.history.turns.append(self._turn())
            content[:] = [turn.id for turn in found.history.turns]

        Flow(self, writer, writer.sessions.update(id, change, under), lambda _: None, content)

    def _loaded(self, writer: Writer, found: Any) -> None:
        if isinstance(found, Versioned):
            loaded = found.asset
            self.model.loaded(loaded.id, found.revision, tuple(turn.id for turn in loaded.history.turns))
            writer.assets[loaded.id] = loaded

    # The network

    def _send(self, calls: Sequence[Call]) -> Transmission:
        members: list[Member] = []
        commands: list[Command] = []
        for call in calls:
            own = call.commands()
            token = None if call.record is None else self.model.sent(call.record)
            if isinstance(call.operation, leases._Claim):
                self.model.identified(call.writer, call.operation)
            members.append(Member(call, call.attempt, len(commands), len(own), token))
            commands += own
        merges = self.random.random() < 0.8
        transmission = Transmission(
            members, list(batches(commands)) if merges else [Batch([command]) for command in commands]
        )
        self.out.append(transmission)
        self.count("transmissions")
        if self.tracing:
            self.say(f"sent: {transmission}")
        return transmission

    def _lost(self, transmission: Transmission) -> None:
        """Those who still wait for it learn that the connection broke; most reconnect."""
        for member in transmission.members:
            if member.awaited:
                if self.random.random() < 0.3:
                    member.call.writer.namespace.begin_epoch()
                member.call.failed(ConnectionLost("the connection broke", sent=True))
        if self.tracing:
            self.say(f"lost: {transmission}")

    def _reply(self, transmission: Transmission) -> None:
        self.back.remove(transmission)
        for member in transmission.members:
            if member.awaited:
                member.call.answered(transmission.replies[member.first : member.first + member.count])

    def _arrive(self, transmission: Transmission, frames: int | None = None) -> None:
        """Have the server execute it, or its first frames."""
        self.out.remove(transmission)
        self._execute(transmission, len(transmission.frames) if frames is None else frames)
        self.back.append(transmission)

    def _execute(self, transmission: Transmission, count: int, *, forget_scripts: bool = False) -> None:
        before = [len(log) for log in self.model.logs]
        over = [self.keyspace.of(id).lease(id) for id in self.model.leases.expire()]
        frames = [
            ("PING",) if forget_scripts and frame[0] == "EVALSHA" else frame for frame in transmission.frames[:count]
        ]
        if frames.count(("MULTI",)) > frames.count(("EXEC",)):
            frames[-1:] = [("DISCARD",)] if frames[-1] != ("MULTI",) else [("PING",)]  # the connection broke
        requests = self._requests(transmission)
        setup: list[Command] = [("SET", NOW, self.clock.milliseconds()), *([("DEL", *over)] if over else [])]
        looks: list[Command] = [("HGETALL", partition.state) for partition in self.partitions]
        looks += [("PEXPIRETIME", self.keyspace.of(request.id).lease(request.id)) for request in requests.values()]
        replies = self.server.run(*setup, *frames, *looks)
        states = replies[len(setup) + count :]
        transmission.replies = []
        for n, (batch, width) in enumerate(zip(transmission.batches, transmission.widths, strict=True)):
            if n >= count:
                transmission.replies += [None] * width
            elif forget_scripts and transmission.frames[n][0] == "EVALSHA":
                transmission.replies += [hiredis.ReplyError("NOSCRIPT No matching script")] * width
            else:
                reply = replies[len(setup) + n]
                if width > 1 and type(reply) is list and len(reply) != width:
                    raise Violation("answer", f"{width} calls in one get {len(reply)} answers")
                transmission.replies += batch.split(reply)
        if self.tracing:
            self.say(f"executed: {transmission}: {transmission.replies!r:.300}")
        for partition, state in zip(self.partitions, states, strict=False):
            self.model.forgotten[partition.number] = int(state[b"forgotten"])
        self._judge(transmission, requests)
        check_messages(self, messages := self.server.messages(), before)
        for channel, message in messages:
            for consumer in self.consumers:
                consumer.publish(channel, message)
            for waiting, wake in self.wakes:
                if waiting == channel and (self.faultless or self.random.random() < 0.8):
                    wake.set()
        wrote = before != [len(log) for log in self.model.logs] and not requests  # a claim makes no room
        for partition, state in zip(self.partitions, states, strict=False):
            self.model.check_partition(partition, state, wrote)
        if count == len(transmission.frames) and not forget_scripts:
            for request, deadline in zip(requests.values(), states[len(self.partitions) :], strict=True):
                self.model.leases.check_server(request, deadline)

    def _requests(self, transmission: Transmission) -> dict[Member, Requested]:
        found: dict[Member, Requested] = {}
        for member in transmission.members:
            if isinstance(member.call.operation, leases._Request):
                frame = self._frame(transmission, member)
                found[member] = Requested.read(member.call, frame)
        return found

    def _frame(self, transmission: Transmission, member: Member) -> tuple[Argument, ...]:
        at = 0
        for frame, width in zip(transmission.frames, transmission.widths, strict=True):
            if at == member.first:
                return frame
            at += width
        raise AssertionError("a member without a frame")

    def _judge(self, transmission: Transmission, requests: dict[Member, Requested]) -> None:
        for member in transmission.members:
            operation = member.call.operation
            replies = transmission.replies[member.first : member.first + member.count]
            if None in replies[-1:] and isinstance(operation, (Write, leases._Request)):
                continue  # it was cut off
            if member.token is not None and member.call.record is not None:
                item = replies[-1]
                self.model.answered(member.call.record, member.token, item[0] if type(item) is list else item)
            elif member in requests:
                self.model.leases.judge(requests[member], replies[0])
            elif isinstance(operation, request.Together):
                self._judge_reads(transmission, member, replies)

    def _judge_reads(self, transmission: Transmission, member: Member, replies: Sequence[Any]) -> None:
        """Judge those of changes.lua."""
        at = 0
        for frame, width in zip(transmission.frames, transmission.widths, strict=True):
            if member.first <= at < member.first + member.count and frame[0] in ("EVALSHA", "EVAL") and frame[2] == 4:
                reply = transmission.replies[at]
                if reply is not None:
                    number = next(p.number for p in self.partitions if p.state == frame[3])
                    check_since(self, number, frame[8], int(frame[9]), [str(id) for id in frame[10:]], reply)
            at += width
