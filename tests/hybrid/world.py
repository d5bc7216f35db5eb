"""Machines, peers and programs behind their back, in one thread; what goes wrong comes from the seed."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fakeredis

import orcs_redis.sync
from orcs_redis import (
    ComponentSnapshot,
    ConflictError,
    ConversationTurn,
    LearnedFact,
    NotFoundError,
    SessionAsset,
    StoreFullError,
    UnavailableError,
)
from orcs_redis.transport import clients

from .machine import Killed, Machine
from .model import CONTENT, REMOTE, Judge, View, Violation, name_of, random_id, view_of

__all__ = ["SESSIONS", "World"]

SESSIONS = ("s0", "s1", "s2", "s3")
KEYS = ("k0", "k1", "k2", "k3")
PARTS = (*(f"metadata.{key}" for key in KEYS), "component_snapshots.c0")
PEERS = ("p0", "p1")
CREATED = 1_700_000_000_000  # milliseconds; each session that is made has a time of its own


@dataclass
class Held:
    """An asset in the memory of a program, and what it had seen when it was read."""

    asset: SessionAsset
    past: int


class World:
    """A run: some machines, two peers at the shared store, and a judge."""

    def __init__(self, folder: Path, seed: int, machines: int, *, trace: bool = False) -> None:
        self.random = random.Random(seed)
        self.judge = Judge()
        self.lines: list[str] = []
        self.counts: Counter[str] = Counter()
        self._trace = trace
        self._url = f"memory://hybrid-{folder.name}-{seed}"
        self._number = 0
        self._peers = {name: orcs_redis.sync.RedisSessionStore.connect(self._url) for name in PEERS}
        self._revisions: dict[str, int] = {}
        self._held: dict[tuple[str, str], Held] = {}  # by program and session
        self._own: Counter[tuple[str, str]] = Counter()  # by program and session: the bits of what it has written
        self.judge.random_ids = seed % 2 == 1  # of turns; those of others were chosen by hand
        self.wiped = False
        self.sessions = SESSIONS
        self.text = _text
        self.calm = False  # nothing goes wrong any more
        # Some runs are rough and others are not: in a rough one hardly a round ends.
        self._rate = self.random.choice((0.0, 0.02, 0.06, 0.15))
        self._wipes = self.random.random() < 0.08
        self.machines = [Machine(f"m{n}", folder / f"m{n}", self._url, self) for n in range(machines)]

    def close(self) -> None:
        """Let go of all that is open."""
        for machine in self.machines:
            machine.close()
        for store in self._peers.values():
            store.close()

    def note(self, text: str) -> None:
        """Add a line to the trace."""
        if self._trace:
            self.lines.append(text)

    # The run

    def run(self, acts: int) -> None:
        """Do so many things at random, then check that all comes together."""
        choices: dict[Callable[[], None], float] = {
            self._local: 26, self._peer: 14, self._orcs: 12, self._start: 14, self._advance: 36, self._resolve: 5,
            self._crash: 3, self._network: 4, self._clock: 2, self._look: 4, self._wipe: 2 if self._wipes else 0,
        }  # fmt: skip
        if self.random.random() < 0.7:
            self._begin()
        for number in range(acts):
            self.note(f"-- {number}")
            self.random.choices(list(choices), list(choices.values()))[0]()
        self.finish()

    def _begin(self) -> None:
        """Have some sessions everywhere."""
        for id in SESSIONS[:3]:
            self._peers["p0"].save(self._made(id, "p0"))
            self._wrote_there("p0", id, 0, ())
        self.calm = True
        for machine in self.machines:
            self._sync_whole(machine)
        self.calm = False

    def finish(self) -> None:
        """Let everything come together, and look at what there is then."""
        self.calm = True
        self.note("-- the end")
        for machine in self.machines:
            machine.offline = False
            machine.finish_plan()
        for _ in range(3):
            for machine in self._shuffled():
                self._sync_whole(machine)
        for _ in range(4):
            conflicts = [(machine, id) for machine in self.machines for id in machine.conflicts()]
            if not conflicts:
                break
            machine, id = self.random.choice(conflicts)
            machine.begin_resolve(id, self.random.choice(("local", "remote")))
            machine.finish_plan()
            for _ in range(3):
                for each in self._shuffled():
                    self._sync_whole(each)
        self._check_idle()
        self._check_equal()

    def _sync_whole(self, machine: Machine) -> None:
        machine.begin_sync(None)
        machine.finish_plan()

    def _check_idle(self) -> None:
        before = self._everything()
        for machine in self._shuffled():
            self._sync_whole(machine)
            if machine.report is None or not _is_empty(machine.report):
                raise Violation("restless", f"{machine.name} still has something to do: {machine.report}")
        if (after := self._everything()) != before:
            raise Violation("restless", f"{sorted(set(before) ^ set(after))}")

    def _everything(self) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = [(REMOTE, meta.id, meta.revision) for meta in self._peers["p0"].list()]
        for machine in self.machines:
            for path in sorted(machine.folder.glob("*.json")):
                status = path.stat()
                found.append((machine.name, path.name, status.st_ino, status.st_mtime_ns))
        return found

    def _check_equal(self) -> None:
        for id in SESSIONS:
            there = self.judge.views[REMOTE, id]
            standing: list[View] = []
            for machine in self.machines:
                here = machine.view(id)
                state = machine.states().get(id)
                if id in machine.conflicts():
                    self.judge.check_conflict(machine.name, id, machine.conflict_parts(id))
                    if here is not None:
                        standing.append(here)
                    if state != "Conflict":
                        raise Violation("state", f"{id} on {machine.name} is {state}")
                    continue
                if (here and here.digest) != (there and there.digest):
                    raise Violation("diverged", f"{id} on {machine.name}: {here}, there {there}")
                if state != ("Synced" if here else None):
                    raise Violation("state", f"{id} on {machine.name} is {state} at the end")
            self.judge.check_end(id, standing)

    # Acts at the shared store

    def _peer(self, id: str | None = None) -> None:
        name, id = self.random.choice(PEERS), id or self._session(REMOTE)
        store, view = self._peers[name], self.judge.views[REMOTE, id]
        if view is None:
            if self.random.random() < 0.7:
                asset = self._made(id, name)
                store.save(asset, if_revision=0)
                self._wrote_there(name, id, 0, ())
            return
        acts: dict[Callable[[Any, str, str], None], float] = {
            self._peer_append: 8, self._peer_hold: 3, self._peer_save: 5, self._peer_set: 4, self._peer_delete: 1.5,
            self._peer_anew: 0.7, self._peer_cut: 1,
        }  # fmt: skip
        self.random.choices(list(acts), list(acts.values()))[0](store, name, id)

    def _peer_append(self, store: Any, name: str, id: str) -> None:
        store.append(id, self._turn(name))
        self._wrote_there(name, id, 0, ())

    def _peer_hold(self, store: Any, name: str, id: str) -> None:
        self._held[name, id] = Held(store.load(id), self.judge.past[REMOTE, id])
        self.note(f"{name} loads {id}")

    def _peer_save(self, store: Any, name: str, id: str) -> None:
        held = self._held.pop((name, id), None) or Held(store.load(id), self.judge.past[REMOTE, id])
        removed = self._changed(held.asset, name)
        try:
            store.save(held.asset)
        except ConflictError:
            self.note(f"{name} can't save {id}: conflict")
            return
        self._wrote_there(name, id, held.past, removed)

    def _peer_set(self, store: Any, name: str, id: str) -> None:
        part = self.random.choice(PARTS)
        if self.random.random() < 0.15:
            store.commit(id, unset=[part])
        elif part.startswith("metadata"):
            store.commit(id, set={part: self._value(name)})
        else:
            snapshot = ComponentSnapshot(component_fqn=part.partition(".")[2], state=self._value(name))
            store.commit(id, set={part: snapshot})
        self._wrote_there(name, id, 0, ())

    def _peer_delete(self, store: Any, name: str, id: str) -> None:
        store.delete(id)
        self._revisions.pop(id, None)
        self.judge.deleted(REMOTE, id)
        self.note(f"{name} deletes {id} there")

    def _peer_anew(self, store: Any, name: str, id: str) -> None:
        view = self.judge.views[REMOTE, id]
        assert view is not None
        if self.random.random() < 0.5:
            self._peer_delete(store, name, id)
        store.save(self._made(id, name))
        self._wrote_there(name, id, 0, (), anew=True)

    def _peer_cut(self, store: Any, name: str, id: str) -> None:
        view = self.judge.views[REMOTE, id]
        assert view is not None
        length = self.random.randint(max(0, len(view.turns) - 2), len(view.turns))
        store.truncate(id, length)
        self._wrote_there(name, id, 0, view.turns[length:])

    def _wrote_there(self, name: str, id: str, past: int, removed: Any, *, anew: bool = False) -> None:
        """Note what a peer has written."""
        store = self._peers["p0"]
        found = store.load_versioned(id)
        if found.revision == self._revisions.get(id):
            return  # nothing had changed
        self._revisions[id] = found.revision
        view = view_of(found.asset)
        self.judge.wrote(REMOTE, id, view, writer=name, seen=past, removes=removed, anew=anew)
        self.note(f"{name} has written {id} there: {_text(view)}")

    def observe_there(self, machine: Machine) -> bool:
        """Note what a machine's step has changed in the shared store; return whether it has."""
        metas = {meta.id: meta.revision for meta in self._peers["p0"].list()}
        if metas == self._revisions:
            return False
        for id in SESSIONS:
            if metas.get(id) == self._revisions.get(id):
                continue
            view = None
            if id in metas:
                view = view_of(self._peers["p0"].load(id))
            self.note(f"{machine.name} has pushed {id}: {_text(view)}")
            self.judge.pushed(machine.name, id, view, resolving=machine.resolving == id)
            machine.pushed.add(id)
        self._revisions = metas
        return True

    # Acts on machines

    def _local(self) -> None:
        machine = self._machine()
        id = self._session(machine.name)
        acts: dict[Callable[[Machine, str], None], float] = {
            self._append: 10, self._load: 4, self._save: 8, self._update: 6, self._new: 2, self._delete: 2,
        }  # fmt: skip
        self.random.choices(list(acts), list(acts.values()))[0](machine, id)

    def _append(self, machine: Machine, id: str) -> None:
        if machine.view(id) is None:
            return
        turn = self._turn(machine.name)
        self._act(machine, id, "appends to", lambda store: store.append(id, turn))

    def _load(self, machine: Machine, id: str) -> None:
        if machine.view(id) is None:
            return
        with machine.acting():
            asset = machine.store.load(id)
        if view_of(asset) != machine.view(id):
            raise Violation("stale read", f"{id} on {machine.name}: {view_of(asset)}, its file: {machine.view(id)}")
        self._held[machine.name, id] = Held(asset, self.judge.past[machine.name, id])
        self.note(f"{machine.name} loads {id}")

    def _save(self, machine: Machine, id: str) -> None:
        held = self._held.get((machine.name, id))
        if held is None:
            return
        removed = self._changed(held.asset, machine.name)
        done = self._act(machine, id, "saves", lambda store: store.save(held.asset), seen=held.past, removes=removed)
        held.past |= self.judge.past[machine.name, id] if done else 0
        if not done or self.random.random() < 0.6:
            self._held.pop((machine.name, id), None)

    def _update(self, machine: Machine, id: str) -> None:
        if machine.view(id) is None:
            return
        removed: list[str] = []
        seed = self.random.random()

        def change(asset: SessionAsset) -> None:  # may be called several times
            removed[:] = self._changed(asset, machine.name, random.Random(seed))

        self._act(machine, id, "updates", lambda store: store.update(id, change), removes=removed)

    def _new(self, machine: Machine, id: str) -> None:
        view = machine.view(id)
        if view is not None and self.random.random() < 0.8:
            return
        asset = self._made(id, machine.name)
        self._act(machine, id, "makes", lambda store: store.save(asset), removes=None)

    def _delete(self, machine: Machine, id: str) -> None:
        if machine.view(id) is None:
            return
        self._act(machine, id, "deletes", lambda store: store.delete(id))

    def _act(
        self,
        machine: Machine,
        id: str,
        verb: str,
        call: Callable[[Any], object],
        *,
        seen: int = 0,
        removes: Any = (),
    ) -> bool:
        """Call a store's method, which may be killed or find the disk full; return whether it is done."""
        outcome = ""
        with machine.acting():
            store, other = machine.store, None
            if self.random.random() < 0.2:
                store = other = machine.another_store()
            if self.random.random() < self._rate:
                machine.gate.arm(self.gate_fault)
            try:
                call(store)
            except ConflictError:
                outcome = "conflict"
            except StoreFullError:
                outcome = "full"
            except NotFoundError:
                outcome = "absent"
            except UnavailableError:
                outcome = "unavailable"
            except Killed:
                outcome = "killed"
            machine.gate.disarm()
            if other is not None:
                with contextlib.suppress(Killed):
                    other.close()
        if outcome == "killed":
            machine.reopen()
        before, view = self.judge.views[machine.name, id], machine.view(id)
        machine.noted(id)
        anew = removes is None
        if removes is None:
            removes = before.turns if before else ()
        self.note(f"{machine.name} {verb} {id}{' in another process' if other else ''}: {outcome or self.text(view)}")
        changed = (before and before.digest) != (view and view.digest)
        if changed and outcome not in ("", "killed"):
            raise Violation("refused", f"{verb} {id} on {machine.name}: {outcome}, but {before} became {view}")
        if outcome in ("killed", "full") and not changed and before is not None:
            self.judge.attempted(machine.name, id, before.turns if verb == "deletes" else removes)
        if not changed:
            return not outcome
        if view is None:
            self.judge.deleted(machine.name, id)
            return not outcome
        self._check_local_merge(machine, id, before, view, {*removes})
        weak = outcome == "killed" and bool(removes)
        event = self.judge.wrote(
            machine.name, id, view, writer=machine.name, seen=seen, removes=removes, weak=weak, anew=anew
        )
        if not outcome:
            with machine.acting():
                self.judge.check_file(machine.name, id, view_of(machine.store.load(id)), event)
        return not outcome

    def _check_local_merge(self, machine: Machine, id: str, before: View | None, view: View, removed: set[str]) -> None:
        lost = {*(before.turns if before else ())} - {*view.turns} - removed - self.judge.unprotected
        if lost:
            raise Violation("lost", f"{lost} of {id}, by a write on {machine.name}: {before} became {view}")

    def _look(self) -> None:
        """What a store says of itself is true."""
        machine = self._machine()
        if machine.plan is not None:
            return
        with machine.acting():
            metas = machine.store.list()
        for meta in metas:
            if meta.sync_state.value == "Synced":
                self.judge.check_synced(machine.name, meta.id)

    # Programs behind the back

    def _orcs(self, machine: Machine | None = None, id: str | None = None) -> None:
        """A program that reads and writes the files: it holds a session for long, and writes it whole."""
        machine = machine or self._machine()
        id = id or self._session(machine.name)
        name, path = f"o{machine.name[1:]}", machine.path(id)
        draw = self.random.random()
        if draw < 0.08:
            if machine.view(id) is not None:
                path.unlink()
                machine.noted(id)
                # It knows what it has written, though a round may be about to put that back (hybrid.md 2.5).
                self.judge.deleted(machine.name, id, seen=self._own[name, id])
                self.note(f"{name} removes {id}.json")
            return
        held = self._held.get((name, id))
        if held is None or draw < 0.3:
            if machine.view(id) is None:
                if draw > 0.85:
                    self._write(machine, name, self._made(id, name))
                return
            self._held[name, id] = Held(SessionAsset.from_json(path.read_bytes()), 0)
            self.note(f"{name} reads {id}.json")
            return
        if self.random.random() < 0.6:
            held.asset.add_turn(self._turn(name))
        else:
            held.asset.metadata[self.random.choice(KEYS)] = self._value(name)
        self._write(machine, name, held.asset)

    def _write(self, machine: Machine, name: str, asset: SessionAsset) -> None:
        path = machine.path(asset.id)
        temporary = path.with_suffix(".new")
        temporary.write_text(asset.to_json())
        temporary.replace(path)
        machine.noted(asset.id)
        view = view_of(asset)
        self._own[name, asset.id] |= self.judge.overwrote(machine.name, asset.id, view, name).bit
        self._held[name, asset.id] = Held(SessionAsset.from_json(asset.to_json()), 0)
        self.note(f"{name} writes {asset.id}.json: {_text(view)}")

    # Rounds

    def _start(self) -> None:
        machine = self._machine()
        if machine.plan is not None:
            return
        some = None if self.random.random() < 0.8 else self.random.sample(SESSIONS, self.random.randint(1, 2))
        self.note(f"{machine.name} begins a round of {'all' if some is None else some}")
        machine.begin_sync(some)
        if self.random.random() < 0.5:
            machine.finish_plan()

    def _advance(self) -> None:
        running = [machine for machine in self.machines if machine.plan is not None]
        if not running:
            self._start()
            return
        machine = self.random.choice(running)
        for _ in range(self.random.choice((1, 1, 2, 3, 5, 100))):
            machine.advance()

    def _resolve(self) -> None:
        machine = self._machine()
        if machine.plan is not None:
            return
        conflicts = machine.conflicts()
        if conflicts:
            machine.begin_resolve(self.random.choice(conflicts), self.random.choice(("local", "remote")))
        elif self.random.random() < 0.2 and machine.view(id := self._session()) is not None:
            machine.begin_resolve(id, self.random.choice(("local", "remote")))

    # What goes wrong

    def _crash(self) -> None:
        machine = self._machine()
        if self._rate:
            forgets = self.random.random() < 0.02
            self.note(f"{machine.name} is killed{', and forgets what was common' if forgets else ''}")
            machine.reopen(forgets=forgets)
            if forgets:
                self.judge.lenient |= {*SESSIONS}

    def _network(self) -> None:
        machine = self._machine()
        machine.offline = not machine.offline and self.random.random() < 0.5
        self.note(f"{machine.name} is {'offline' if machine.offline else 'online'}")

    def _clock(self) -> None:
        machine = self._machine()
        machine.clock.offset = self.random.choice((0, 3600, -3600))
        self.note(f"{machine.name}'s clock is off by {machine.clock.offset} s")

    def _wipe(self) -> None:
        """The shared store loses everything, and is taken as it is by all."""
        if self.wiped:
            return
        self.wiped = True
        self.note("the shared store is wiped")
        for machine in self.machines:
            machine.reopen()
        server = clients._memories[self._url.removeprefix("memory://")]
        fakeredis.FakeRedis(server=server).flushall()
        for store in self._peers.values():
            store.reopen()
        self.judge.wiped([machine.name for machine in self.machines])
        self._revisions = {}
        for held in [key for key in self._held if key[0] in PEERS]:
            del self._held[held]

    def interlude_here(self, machine: Machine, target: Path) -> None:
        """Let a program write a file in the moment in which it is replaced."""
        if self.calm or target.parent != machine.folder or self.random.random() > 0.1:
            return
        if machine.is_performing:
            machine.observe_here()
        self._orcs(machine, target.stem)

    def interlude_there(self, machine: Machine, id: str) -> None:
        """Let a peer be faster."""
        if not self.calm and self.random.random() < 0.1:
            self._peer(id)

    def there_fault(self) -> str:
        """Decide what goes wrong at a step towards the shared store; "" is nothing."""
        if self.calm or self.random.random() > 3 * self._rate:
            return ""
        return self.random.choice(("unsent", "unknown, not applied", "unknown, applied", "killed", "killed after"))

    def here_fault(self) -> bool:
        """Decide whether something goes wrong at a step in the folder."""
        return not self.calm and self.random.random() < self._rate

    def gate_fault(self) -> str:
        """Decide what goes wrong at a durable call; "" is nothing."""
        if self.calm or self.random.random() > 0.3:
            return ""
        return self.random.choice(("full", "killed", "killed after"))

    # What there is

    def _machine(self) -> Machine:
        return self.random.choice(self.machines)

    def _shuffled(self) -> list[Machine]:
        return self.random.sample(self.machines, len(self.machines))

    def _session(self, place: str = "") -> str:
        """Choose a session, mostly one that is at a place."""
        some = [id for id in SESSIONS if self.judge.views[place, id] is not None] if self.random.random() < 0.8 else []
        return self.random.choices(SESSIONS, (6, 3, 2, 1))[0] if not some else self.random.choice(some)

    def _next(self, writer: str) -> str:
        self._number += 1
        return f"{writer}.{self._number}"

    def _turn(self, writer: str) -> ConversationTurn:
        turn = ConversationTurn.user(CONTENT)
        name = self._next(writer)
        turn.id = random_id(name) if self.judge.random_ids else name
        turn.timestamp_ms = CREATED + 1000 * self._number
        if writer.startswith("m"):
            turn.timestamp_ms += 1000 * self.machines[int(writer[1:])].clock.offset
        return turn

    def _value(self, writer: str) -> str:
        return self._next(writer)

    def _made(self, id: str, writer: str) -> SessionAsset:
        """Make a session."""
        self._number += 1
        asset = SessionAsset(id=id, created_at_ms=CREATED + self._number)
        for _ in range(self.random.randint(0, 3)):
            asset.add_turn(self._turn(writer))
        if self.random.random() < 0.6:
            asset.metadata["k0"] = self._value(writer)
        return asset

    def _changed(self, asset: SessionAsset, writer: str, chooser: random.Random | None = None) -> list[str]:
        """Change an asset; return the turns that were removed from it."""
        chooser = chooser or self.random
        removed: list[str] = []
        for _ in range(chooser.choice((1, 1, 2))):
            self._change(asset, writer, chooser, removed)
        return removed

    def _change(self, asset: SessionAsset, writer: str, chooser: random.Random, removed: list[str]) -> None:
        context, turns = asset.project_context, asset.history.turns
        draw = chooser.random()
        if draw < 0.35:
            asset.add_turn(self._turn(writer))
        elif draw < 0.6:
            asset.metadata[chooser.choice(KEYS)] = self._value(writer)
        elif draw < 0.65:
            asset.metadata.pop(chooser.choice(KEYS), None)
        elif draw < 0.7:
            context.name = self._value(writer)
        elif draw < 0.73:
            context.root_path = self._value(writer)
        elif draw < 0.78:
            asset.save_snapshot(ComponentSnapshot(component_fqn="c0", state=self._value(writer)))
        elif draw < 0.81:
            context.learn(LearnedFact.new("f0", self._value(writer), writer))
        elif draw < 0.84:
            context.technologies.append(self._value(writer))
        elif draw < 0.92 and turns:
            chooser.choice(turns).content = self._value(writer)
        elif turns:
            turn = turns.pop(chooser.randrange(len(turns)))
            removed.append(name_of(turn.id))


def _is_empty(report: Any) -> bool:
    lists = (
        report.uploaded,
        report.downloaded,
        report.merged,
        report.deleted,
        report.revived,
        report.failed,
        report.kept,
    )
    return not any(lists)


def _text(view: View | None) -> str:
    return "gone" if view is None else repr(view)
