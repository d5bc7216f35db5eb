"""The reference model of leases, and the workers that hold them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orcs_redis.errors import LeaseHeldError
from orcs_redis.protocol.commands import Reply, as_error
from orcs_redis.protocol.request import Plan

from .driver import CANCELLED, Call, Flow, Wake, Writer
from .rules import Violation

if TYPE_CHECKING:
    from .world import World

__all__ = ["Holding", "LeaseModel", "Requested"]

_TOLERANCE = 0.002  # seconds: the server counts in ms


@dataclass(frozen=True)
class Grant:
    """A lease as the server has it."""

    id: str
    claim: bytes
    token: int
    deadline: int  # ms


@dataclass(frozen=True)
class Requested:
    """A request as it goes over the wire."""

    kind: str
    id: str
    mine: Any  # the claim's operation id, or a token
    ttl: int  # ms
    seen: int
    writer: Writer
    call: Call

    @classmethod
    def read(cls, call: Call, command: Any) -> Requested:
        _, kind, id, mine, *rest = command[3 + int(command[2]) :]
        ttl = int(rest[0]) if rest else 0
        seen = int(rest[2]) if len(rest) > 2 else 0
        return cls(kind, id, mine, ttl, seen, call.writer, call)


class LeaseModel:
    """Who has which lease, until when."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.grants: dict[str, Grant] = {}
        self.last = [0] * len(world.partitions)  # tokens
        self.answered: set[bytes] = set()  # claims that the server has noted
        self.deadlines: dict[tuple[str, int], int] = {}  # by id and token, also of those that are over
        self.foreign: set[str] = set()  # sessions where the lease's key is somebody else's

    def token(self, id: str) -> int | None:
        grant = self.grants.get(id)
        return None if grant is None else grant.token

    def expire(self) -> list[str]:
        """Return the ids of those whose time is over."""
        now = self.world.clock.milliseconds()
        over = [id for id, grant in self.grants.items() if now > grant.deadline]
        for id in over:
            del self.grants[id]
        return over

    def take_away(self, id: str) -> None:
        """Note that the server has lost one, or what was in its place."""
        self.grants.pop(id, None)
        self.foreign.discard(id)

    def judge(self, request: Requested, reply: Reply) -> None:
        """Judge the server's answer."""
        if as_error(reply) is not None:
            return self.world.model.refused(reply)
        grant, now = self.grants.get(request.id), self.world.clock.milliseconds()
        number = self.world.keyspace.of(request.id).number
        answer, value = (*reply, None)[:2]
        mine = grant is not None and (
            grant.claim == request.mine if request.kind == "acquire" else grant.token == request.mine
        )
        if answer == b"OK" and request.kind == "acquire" and not mine:
            if grant is not None:
                raise Violation("lease", f"{request.id} is given to {request.call}, another has token {grant.token}")
            if value <= self.last[number]:
                raise Violation("token", f"{value} was given out after {self.last[number]}")
            if request.seen > len(self.world.model.logs[number]):
                raise Violation(
                    "lease", f"{request.id} is given to {request.call}, whose store had seen {request.seen}"
                )
            self._check_owner(request)
            self.world.model.check_late(f"the claim of {request.call}", request.mine, number)
            self.last[number] = value
        elif answer == b"OK" and not (mine and grant is not None and value == grant.token):
            raise Violation("lease", f"{request.kind} of {request.mine} is granted: {grant} has it")
        elif answer == b"HELD" and (grant is None or mine or value != grant.deadline - now):
            raise Violation("lease", f"HELD for {value} ms: {grant}")
        elif answer == b"LEASELOST" and mine:
            raise Violation("lease", f"{request.kind} finds it lost: {grant}")
        elif answer == b"RESET" and not self.world.model.epoch:
            raise Violation("answer", f"{request.kind} gets RESET {value}")
        elif answer == b"LAYOUT" and request.id in self.foreign:
            pass
        elif answer not in (b"OK", b"HELD", b"LEASELOST", b"RESET", b"FORGOTTEN"):
            raise Violation("answer", f"{request.kind} gets {answer}")
        if request.kind == "acquire" and answer in (b"OK", b"HELD"):
            self.answered.add(request.mine)
        if answer == b"OK" and request.kind == "release":
            del self.grants[request.id]
        elif answer == b"OK":
            claim = request.mine if request.kind == "acquire" else grant.claim if grant is not None else b""
            self.grants[request.id] = Grant(request.id, claim, value, now + request.ttl)
            self.deadlines[request.id, value] = now + request.ttl
        return None

    def _check_owner(self, request: Requested) -> None:
        """Refuse what is given to who is done with it: nobody would give it back."""
        model = self.world.model
        if request.mine in self.answered and not self.world.profile.evicts_windows and not model.epoch:
            raise Violation("lease", f"{request.id} is given to a claim of {request.call}, which was answered before")

    def check_server(self, request: Requested, deadline: int) -> None:
        """Judge the time to live that the server has for it."""
        if request.id in self.foreign:
            return
        grant = self.grants.get(request.id)
        wanted = -2 if grant is None else grant.deadline
        if deadline != wanted:
            raise Violation("lease", f"{request.id} ends at {deadline}, not at {wanted}")

    def snapshot(self) -> tuple[Any, ...]:
        return dict(self.grants), list(self.last), set(self.foreign)

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        grants, last, foreign = snapshot
        self.grants, self.last, self.foreign = dict(grants), list(last), set(foreign)


class Holding:
    """A worker that takes a lease, keeps it, and gives it back, as AsyncLeasing does."""

    def __init__(self, world: World, writer: Writer, id: str, ttl: float, wait: float) -> None:
        self.world, self.writer, self.id, self.ttl = world, writer, id, ttl
        self.token = 0
        self.lost = self.over = self._finishing = False
        self.wake = Wake()
        self._claim = writer.leases.acquire(id, ttl)
        self._given = 0.0
        self._keeper: Flow | None = None
        self._taking = Flow(world, writer, self._take(wait), self._taken)

    @property
    def held(self) -> bool:
        """Whether the worker goes by it."""
        return self.token > 0 and not self.lost and not self.over

    def _take(self, wait: float) -> Plan[int]:
        try:
            token: int = yield self._claim
            return token
        except LeaseHeldError:
            if wait <= 0:
                raise
        channel = self.writer.leases.channel(self.id)
        self.world.wakes.append((channel, self.wake))
        try:
            return (yield from self.writer.leases.acquire_when_free(self._claim, wait, self.wake))
        finally:
            self.world.wakes.remove((channel, self.wake))

    def _taken(self, outcome: Any) -> None:
        if not isinstance(outcome, int):
            self.over = True
            return
        self.token = outcome
        if self._finishing:
            self.release()
            return
        self._given = self.world.clock.now
        renewal = self.writer.leases.renew(self.id, self.token, self.ttl, self._claim.sent, weakref.ref(self))
        self._keeper = Flow(self.world, self.writer, renewal, self._ended)

    def _ended(self, outcome: Any) -> None:
        if outcome is CANCELLED:
            return
        self.lost = True
        now = self.world.clock.now
        if now > self._given:
            self.check()
        elif now - self._taking.sent_at < self.ttl / 2:
            raise Violation("held", f"the lease of {self.id} is lost when it is given")

    def _deadline(self) -> float:
        milliseconds = self.world.model.leases.deadlines[self.id, self.token]
        return self.world.clock.now + (milliseconds - self.world.clock.milliseconds()) / 1000

    def check(self) -> None:
        """Judge whether the worker still goes by a lease whose time is over."""
        late = self.world.clock.now - self._deadline()
        if late > _TOLERANCE:
            raise Violation("held", f"the lease of {self.id} was over {late:.3f} s before its holder noticed")

    def finish(self) -> None:
        """Give it back, now or as soon as it is there."""
        self._finishing = True
        if self.held:
            self.release()

    def release(self) -> None:
        """Leave the block."""
        self.over = True
        if self._keeper is not None:
            call = self._keeper.call
            if call is not None:
                call.cancel()
            else:
                self._keeper.stop()
        Call(self.world, self.writer, self.writer.leases.release(self.id, self.token), lambda _: None)
