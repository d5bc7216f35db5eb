"""What goes wrong: with the network, the server, the processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hiredis

from orcs_redis.protocol.attempts import ConnectionLost
from orcs_redis.protocol.writes import Identified

from .driver import DEADLINE, Writer
from .rules import INJECTED

if TYPE_CHECKING:
    from .world import World

__all__ = ["Faults"]

_REFUSALS = tuple(code for code in INJECTED if code != "NOSCRIPT")


class Faults:
    """Steps of a world, by the names that profiles give weights; False: there is nothing for it to do."""

    def __init__(self, world: World) -> None:
        self.world, self.random, self.network = world, world.random, world.network

    def do_stall(self, writer: Writer) -> bool | None:
        """Nothing is answered in time, while something is read."""
        if not any(call.waiting and not isinstance(call.operation, Identified) for call in writer.calls):
            return False
        self.world.clock.advance(DEADLINE + 1.0)
        return None

    def do_lose_sending(self, writer: Writer) -> bool | None:
        if not self.network.out:
            return False
        transmission = self.network.out.pop(self.random.randrange(len(self.network.out)))
        self.network.lost(transmission)
        return None

    def do_lose_reply(self, writer: Writer) -> bool | None:
        if not self.network.back:
            return False
        transmission = self.network.back.pop(self.random.randrange(len(self.network.back)))
        self.network.lost(transmission)
        return None

    def do_cut(self, writer: Writer) -> bool | None:
        """Only the first frames arrive before the connection breaks."""
        long = [transmission for transmission in self.network.out if len(transmission.frames) > 1]
        if not long:
            return False
        transmission = self.random.choice(long)
        self.network.arrive(transmission, self.random.randrange(len(transmission.frames)))
        self.network.back.remove(transmission)
        self.network.lost(transmission)
        return None

    def do_give_up(self, writer: Writer) -> bool | None:
        """The writer gives the transmission up, and it arrives later."""
        if not self.network.out:
            return False
        transmission = self.random.choice(self.network.out)
        if self.random.random() < 0.6:  # much later
            self.network.out.remove(transmission)
            self.network.stuck.append(transmission)
        self.network.lost(transmission)
        return None

    def do_revive(self, writer: Writer) -> bool | None:
        if not self.network.stuck:
            return False
        self.network.out.append(self.network.stuck.pop(self.random.randrange(len(self.network.stuck))))
        return None

    def do_unreachable(self, writer: Writer) -> bool | None:
        ready = [call for call in writer.calls if call.ready()]
        for call in ready:
            call.commands()  # as the drivers do, before they learn that there is no connection
            if call.record is not None:
                self.world.model.sent(call.record)
            call.failed(ConnectionLost("no connection", sent=False))
        return bool(ready)

    def do_refuse(self, writer: Writer) -> bool | None:
        """The server refuses a transmission, or does not know its scripts."""
        if not self.network.out:
            return False
        transmission = self.network.out.pop(self.random.randrange(len(self.network.out)))
        code = self.random.choice((*_REFUSALS, "NOSCRIPT", "NOSCRIPT", "NOSCRIPT"))
        if code == "NOSCRIPT":
            self.network.execute(transmission, forget_scripts=True)
        else:
            transmission.fill(hiredis.ReplyError(f"{code} refused"))
        self.network.back.append(transmission)
        return None

    def do_cancel(self, writer: Writer) -> bool | None:
        calls = [call for call in writer.calls if isinstance(call.operation, Identified) and call.operation._token]
        if not calls:
            return False
        self.random.choice(calls).cancel()
        return None

    def do_renew(self, writer: Writer) -> None:
        writer.namespace.begin_epoch()

    def do_break_watch(self, writer: Writer) -> bool | None:
        if not self.world.consumers:
            return False
        self.random.choice(self.world.consumers).disconnect()
        return None

    def do_lose_message(self, writer: Writer) -> bool | None:
        if not self.world.consumers:
            return False
        self.random.choice(self.world.consumers).lose()
        return None

    def do_leave(self, writer: Writer) -> None:
        """The process is killed: what it sent may still arrive. Another begins."""
        self.world.leave(writer)
        self.world.enter()

    def do_take_away(self, writer: Writer) -> None:
        """The server loses a lease, as by an eviction."""
        id = self.random.choice(self.world.ids)
        self.world.server.check(("DEL", self.world.keyspace.of(id).lease(id)))
        self.world.model.leases.take_away(id)

    def do_spoil(self, writer: Writer) -> None:
        """Somebody else's key is where a lease belongs, or is gone again."""
        id = self.random.choice(self.world.ids)
        key, there = self.world.keyspace.of(id).lease(id), id in self.world.model.leases.foreign
        self.world.model.leases.take_away(id)
        self.world.server.check(("DEL", key), *([] if there else [("SET", key, "x")]))
        if not there:
            self.world.model.leases.foreign.add(id)
