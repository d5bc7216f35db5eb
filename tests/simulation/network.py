"""The network: what is on its way, and what the server does with it when it arrives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import hiredis

from orcs_redis.protocol import leases, request
from orcs_redis.protocol.attempts import ConnectionLost
from orcs_redis.protocol.commands import Argument, Batch, Command, batches

from .driver import Call
from .leases import Requested
from .lua import NOW
from .model import AttemptToken
from .rules import Violation
from .watches import check_messages, check_since

if TYPE_CHECKING:
    from .world import World

__all__ = ["Member", "Network", "Transmission"]


@dataclass(eq=False)
class Member:
    """A call's part of a transmission."""

    call: Call
    attempt: int
    first: int  # of its commands
    count: int
    token: AttemptToken | None

    @property
    def last(self) -> int:
        """The last of its commands."""
        return self.first + self.count - 1

    @property
    def awaited(self) -> bool:
        """Whether the call still waits for this answer."""
        return self.call.waiting and self.call.attempt == self.attempt


@dataclass(eq=False)
class Transmission:
    """What goes out together; calls may have been merged, so that frames are fewer than commands."""

    members: list[Member]
    batches: list[Batch]
    replies: list[Any] = field(default_factory=list)  # of each command that was executed
    done: int = 0  # frames that were executed

    def __post_init__(self) -> None:
        self.frames = [batch.frame() for batch in self.batches]
        self.widths = [len(batch.commands) for batch in self.batches]

    def fill(self, reply: Any) -> None:
        """Have this reply to what was not executed."""
        self.replies += [reply] * (sum(self.widths) - len(self.replies))

    def halts(self) -> list[int]:
        """Return the numbers of frames after which other connections' may come."""
        return [
            n
            for n in range(self.done + 1, len(self.frames))
            if self.frames[:n].count(("MULTI",)) == self.frames[:n].count(("EXEC",))
        ]

    def __str__(self) -> str:
        return ", ".join(f"{member.call} #{member.attempt}" for member in self.members)


class Network:
    """What is on its way between the writers of a world and its server."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.out: list[Transmission] = []  # on their way to the server
        self.stuck: list[Transmission] = []  # the same, of connections that were given up
        self.back: list[Transmission] = []  # replies

    def send(self, calls: Sequence[Call]) -> Transmission:
        members: list[Member] = []
        commands: list[Command] = []
        for call in calls:
            own = call.commands()
            token = None if call.record is None else self.world.model.sent(call.record)
            if isinstance(call.operation, leases._Claim):
                self.world.model.identified(call.writer, call.operation)
            members.append(Member(call, call.attempt, len(commands), len(own), token))
            commands += own
        merges = self.world.random.random() < 0.8
        transmission = Transmission(
            members, list(batches(commands)) if merges else [Batch([command]) for command in commands]
        )
        self.out.append(transmission)
        self.world.count("transmissions")
        if self.world.tracing:
            self.world.say(f"sent: {transmission}")
        return transmission

    def lost(self, transmission: Transmission) -> None:
        """Those who still wait for it learn that the connection broke; most reconnect."""
        for member in transmission.members:
            if member.awaited:
                if self.world.random.random() < 0.3:
                    member.call.writer.namespace.begin_epoch()
                member.call.failed(ConnectionLost("the connection broke", sent=True))
        if self.world.tracing:
            self.world.say(f"lost: {transmission}")

    def reply(self, transmission: Transmission) -> None:
        self.back.remove(transmission)
        for member in transmission.members:
            if member.awaited:
                member.call.answered(transmission.replies[member.first : member.first + member.count])

    def arrive(self, transmission: Transmission, cut: int | None = None) -> None:
        """Have the server execute it; or only its first frames, before the connection breaks."""
        self.out.remove(transmission)
        self.execute(transmission, cut, cut=cut is not None)
        self.back.append(transmission)

    def execute(
        self, transmission: Transmission, upto: int | None = None, *, cut: bool = False, forget_scripts: bool = False
    ) -> None:
        """Have the server execute more frames of it, up to one or all."""
        model, clock = self.world.model, self.world.clock
        before = [len(log) for log in model.logs]
        over = [self.world.keyspace.of(id).lease(id) for id in model.leases.expire()]
        start = transmission.done
        transmission.done = stop = len(transmission.frames) if upto is None else max(upto, start)
        frames: list[Command] = [
            ("PING",) if forget_scripts and frame[0] == "EVALSHA" else frame
            for frame in transmission.frames[start:stop]
        ]
        if frames.count(("MULTI",)) > frames.count(("EXEC",)):
            frames[-1:] = [("DISCARD",)] if frames[-1] != ("MULTI",) else [("PING",)]  # the connection broke
        done = range(sum(transmission.widths[:start]), sum(transmission.widths[:stop]))  # of the commands
        requests = self._requests(transmission, done)
        setup: list[Command] = [("SET", NOW, clock.milliseconds()), *([("DEL", *over)] if over else [])]
        looks: list[Command] = [("HGETALL", partition.state) for partition in self.world.partitions]
        looks += [
            ("PEXPIRETIME", self.world.keyspace.of(request.id).lease(request.id)) for request in requests.values()
        ]
        replies = self.world.server.run(*setup, *frames, *looks)
        states = replies[len(setup) + len(frames) :]
        for n, reply in enumerate(replies[len(setup) : len(setup) + len(frames)], start):
            self._note_reply(transmission, n, reply, forget_scripts and transmission.frames[n][0] == "EVALSHA")
        if cut:
            transmission.fill(None)
        if self.world.tracing:
            self.world.say(f"executed: {transmission}: {transmission.replies[done.start : done.stop]!r:.300}")
        for partition, state in zip(self.world.partitions, states, strict=False):
            model.forgotten[partition.number] = int(state[b"forgotten"])
        self._judge(transmission, requests, done)
        check_messages(self.world, messages := self.world.server.messages(), before)
        self._publish(messages)
        wrote = before != [len(log) for log in model.logs] and not requests  # a claim makes no room
        for partition, state in zip(self.world.partitions, states, strict=False):
            model.check_partition(partition, state, wrote)
        if not forget_scripts:
            for request, deadline in zip(requests.values(), states[len(self.world.partitions) :], strict=True):
                model.leases.check_server(request, deadline)

    def _note_reply(self, transmission: Transmission, n: int, reply: Any, forgotten: bool) -> None:
        width = transmission.widths[n]
        if forgotten:
            transmission.replies += [hiredis.ReplyError("NOSCRIPT No matching script")] * width
            return
        if width > 1 and type(reply) is list and len(reply) != width:
            raise Violation("answer", f"{width} calls in one get {len(reply)} answers")
        transmission.replies += transmission.batches[n].split(reply)

    def _publish(self, messages: Sequence[tuple[str, bytes]]) -> None:
        for channel, message in messages:
            for consumer in self.world.consumers:
                consumer.publish(channel, message)
            for waiting, wake in self.world.wakes:
                if waiting == channel and (self.world.faultless or self.world.random.random() < 0.8):
                    wake.set()

    def _requests(self, transmission: Transmission, done: range) -> dict[Member, Requested]:
        found: dict[Member, Requested] = {}
        for member in transmission.members:
            if isinstance(member.call.operation, leases._Request) and member.last in done:
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

    def _judge(self, transmission: Transmission, requests: dict[Member, Requested], done: range) -> None:
        for member in transmission.members:
            if isinstance(member.call.operation, request.Together):
                self._judge_reads(transmission, member, done)
            if member.last not in done:
                continue
            item = transmission.replies[member.last]
            if member.token is not None and member.call.record is not None:
                self.world.model.answered(member.call.record, member.token, item[0] if type(item) is list else item)
            elif member in requests:
                self.world.model.leases.judge(requests[member], transmission.replies[member.first])

    def _judge_reads(self, transmission: Transmission, member: Member, done: range) -> None:
        """Judge those of changes.lua."""
        at = 0
        for frame, width in zip(transmission.frames, transmission.widths, strict=True):
            own = at in done and member.first <= at <= member.last
            if own and frame[0] in ("EVALSHA", "EVAL") and int(frame[2]) == 4:
                number = next(p.number for p in self.world.partitions if p.state == frame[3])
                ids = [str(id) for id in frame[10:]]
                check_since(self.world, number, frame[8], int(frame[9]), ids, transmission.replies[at])
            at += width
