"""The judge: it knows every fact that was ever written, who had seen it, and what must come of it.

A write is an event with its past: the events that its writer had seen. Turns have ids of their own, and so has each
value of a part, so that what is stored tells which events came to be there. Sets of events are bits of an integer.

    covered    a write that some deletion had seen: its session may be gone
    taken      resolve(keep="remote") brought what is there: no edit of that machine (hybrid.md 2.4, rows 9 and 15)
    weak       what a program wrote from an old version in its memory, or an act that was killed half-way: it may count
               or not (hybrid.md 2.6)
    unprotected    what was in one file only, never in the shared store, when another program overwrote it (the same)
"""

from __future__ import annotations

import hashlib
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from orcs_redis import SessionAsset
from orcs_redis.model.parts import TIMES, digest, digests

__all__ = ["CONTENT", "REMOTE", "Event", "Judge", "View", "Violation", "name_of", "random_id", "view_of"]

REMOTE = "shared"
"""The place that is the shared store; others are machines."""

CONTENT = "as it was said"
"""The content of a turn that was not edited."""

NAME = "project_context.name"
ROOT = "project_context.root_path"


_names: dict[str, str] = {}


def random_id(name: str) -> str:
    """Return a turn's id that no other turn can have, as orcs makes them; the judge knows the turn by this name."""
    digest = hashlib.sha256(name.encode()).digest()[:16]
    id = str(uuid.UUID(bytes=digest, version=4))
    _names[id] = name
    return id


def name_of(id: str) -> str:
    """Return the name of a turn, by its id."""
    return _names.get(id, id)


class Violation(AssertionError):
    """A rule is broken."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule


@dataclass(frozen=True)
class View:
    """What the judge looks at of an asset."""

    turns: tuple[str, ...]
    parts: Mapping[str, str]
    created: int
    digest: bytes  # of all but its times

    def __repr__(self) -> str:
        parts = " ".join(f"{name.rpartition('.')[2]}={value}" for name, value in sorted(self.parts.items()))
        return f"[{' '.join(self.turns)}] {parts} made {self.created % 10_000}"

    def is_other(self, than: View, *, by_id: bool = True) -> bool:
        """Whether these are two sessions of one id: hybrid.md 2.4.

        An id that was chosen by hand can be another turn's, so without `by_id` one that was edited is not in common.
        """
        common = {*self.turns} & {*than.turns}
        if not by_id:
            common = {turn for turn in common if self.parts.get(f"turn/{turn}") == than.parts.get(f"turn/{turn}")}
        alike = self.created == than.created or common
        return bool(self.turns and than.turns) and not alike


def view_of(asset: SessionAsset) -> View:
    """Return what the judge looks at."""
    context = asset.project_context
    parts = {f"metadata.{key}": str(value) for key, value in asset.metadata.items()}
    parts |= {f"component_snapshots.{name}": str(each.state) for name, each in asset.component_snapshots.items()}
    parts |= {f"project_context.learned_facts.{fact.key}": fact.value for fact in context.learned_facts}
    parts |= {f"project_context.technologies {name}": name for name in context.technologies}
    parts |= {f"turn/{name_of(turn.id)}": turn.content for turn in asset.history.turns if turn.content != CONTENT}
    parts |= {name: value for name in (NAME, ROOT) if (value := getattr(context, name.partition(".")[2])) is not None}
    found = digests(asset)
    values = sorted((name, data.hex()) for name, data in found.values.items() if name not in TIMES)
    lists = sorted((path, [(key, data.hex()) for key, data in entries]) for path, entries in found.lists.items())
    return View(
        tuple(name_of(turn.id) for turn in asset.history.turns), parts, asset.created_at_ms, digest([values, lists])
    )


@dataclass(frozen=True)
class Event:
    """A write, a deletion, or what someone decided about a conflict."""

    bit: int
    session: str
    place: str
    kind: str  # write, anew, delete, resolve, taken; attempt: it was not done, or not wholly
    past: int
    view: View | None  # what was there afterwards
    adds: tuple[str, ...] = ()
    removes: frozenset[str] = frozenset()
    drops: frozenset[str] = frozenset()  # turns of the session before, where one is made anew: it need not have them
    sets: Mapping[str, str | None] = field(default_factory=dict)
    weak: bool = False

    def __repr__(self) -> str:
        text = f"the {self.kind} at {self.place} that left {self.view}"
        return text + (f", removed {' '.join(sorted(self.removes))}" if self.removes else "")


@dataclass(frozen=True)
class Version:
    """What was at a place at a time."""

    view: View | None
    past: int


class Judge:
    """Follows all that is written and moved, and says what must not be."""

    def __init__(self) -> None:
        self.events: dict[str, list[Event]] = defaultdict(list)
        self.past: dict[tuple[str, str], int] = defaultdict(int)  # by place and session
        self.views: dict[tuple[str, str], View | None] = defaultdict(lambda: None)
        self.versions: dict[str, list[Version]] = defaultdict(list)  # of the shared store
        self.kept: dict[str, list[View]] = defaultdict(list)
        self.unprotected: set[str] = set()  # turns
        self.unprotected_values: set[tuple[str, str]] = set()  # names of parts and values
        self.sent: dict[tuple[str, str], set[str]] = {}  # by machine and session: turns of rounds that are under way
        self.unsettled: dict[tuple[str, str], set[str]] = {}  # of rounds that were cut off: not known to have arrived
        self._gone: set[tuple[str, str]] = set()  # what was sent, and deleted by others
        self.returning: set[str] = set()  # sessions that may come back: hybrid.md 2.5, not decidable
        self.lenient: set[str] = set()  # sessions of which the bases were dropped
        self._read: dict[tuple[str, str], Version] = {}  # machine, session: the file, as a round has read it
        self._read_there: dict[tuple[str, str], Version] = {}  # what is there, likewise
        self._pushed: dict[tuple[str, str], bytes] = {}  # by machine and session: the last version, as a digest
        self._wiped: dict[str, int] = defaultdict(int)  # so many versions there are lost
        self._coming_back: set[str] = set()  # turns that were sent, and removed before it was known that they arrived
        # Of parts of what was sent, by machine and session: the values before and as they were sent.
        self._sent_parts: dict[tuple[str, str], dict[str, tuple[str | None, str | None]]] = {}
        self._values_coming_back: dict[tuple[str, str], set[str | None]] = defaultdict(set)  # by session and part
        self._edited: set[str] = set()  # turns that may be twice
        # By the bit of a deletion that was not sent: what was there when resolve took that again.
        self._undone: dict[int, int] = defaultdict(int)
        self._taken: dict[int, int] = {}  # by the bit of an event: the past of the version that was taken
        self._stale: set[str] = set()  # sessions of which a file was overwritten with an old version
        self._replaced: dict[tuple[str, str], Version] = {}  # by a round, the last time
        self._before: dict[str, str] = {}  # of a turn: the last one of its writer that was there when it was added
        self.random_ids = False  # of turns
        self._void = 0  # writes after which a file was as it was before them
        self._count = 0

    # What happens

    def wrote(
        self,
        place: str,
        session: str,
        view: View,
        *,
        writer: str = "",
        seen: int = 0,
        removes: Iterable[str] = (),
        drops: Iterable[str] = (),
        kind: str = "write",
        weak: bool = False,
        anew: bool = False,
        other: View | None = None,
    ) -> Event:
        """Note that someone wrote a version at a place, over what was there.

        Args:
            place: a machine, or the shared store.
            session: its id.
            view: what is there now.
            writer: whose turns are in its order.
            seen: further events that were seen: those of the asset that was changed.
            removes: the turns that were removed on purpose.
            drops: turns that it need not have, and that others may bring back.
            kind: of the event.
            weak: whether it may count or not.
            anew: whether it is another session, over whatever had its id.
            other: the version that lost, where someone decided.

        """
        old = self.views[place, session]
        had = old.turns if old else ()
        parts = old.parts if old else {}
        adds = tuple(turn for turn in view.turns if turn not in had)
        changed = {name for name in parts.keys() | view.parts.keys() if parts.get(name) != view.parts.get(name)}
        if other is not None:
            names = other.parts.keys() | view.parts.keys()
            changed |= {name for name in names if other.parts.get(name) != view.parts.get(name)}
        past = self.past[place, session] | seen
        if anew or old is None:
            changed |= {name for event in self._of(session, past) for name in event.sets}
        if anew and old is not None:
            past |= self.deleted(place, session).bit
        if anew or (old is None and past and kind == "write"):
            kind = "anew"
        before = [] if old and not anew else [each.view.turns for each in self._of(session, past) if each.view]
        event = self._event(
            session,
            place,
            kind,
            past,
            view,
            adds,
            frozenset(removes).difference(view.turns),
            {name: view.parts.get(name) for name in changed},
            weak,
            frozenset(drops) | {turn for turns in before for turn in turns if turn not in view.turns},
        )
        if writer:
            for turn in adds:
                mine = [each for each in view.turns[: view.turns.index(turn)] if each.startswith(f"{writer}.")]
                if mine:
                    self._before.setdefault(turn, mine[-1])
        self._put(place, session, view, past | event.bit)
        if place == REMOTE:
            for (_, sent), turns in self.unsettled.items():
                self._coming_back |= turns & event.removes if sent == session else set()
            for machine, sent in self.unsettled:
                if sent == session:
                    self._note_reverted(machine, session)
        if place != REMOTE and kind not in ("resolve", "taken"):
            arrived = 0
            for version in self.versions[session]:
                arrived |= version.past
            for version in self.versions[session]:
                since = (past | event.bit) & ~version.past
                same = version.view and (version.view.digest, version.view.created) == (view.digest, view.created)
                if same and not since & arrived:
                    self._void |= since
        return event

    def overwrote(self, place: str, session: str, view: View, writer: str) -> Event:
        """Note that a program wrote a version from its memory over what was there, without having looked at that."""
        old = self.views[place, session]
        known = [each.view for each in self.versions[session][self._wiped[session] :] if each.view]
        synced_turns = {turn for each in known for turn in each.turns}
        synced = {item for each in known for item in each.parts.items()}
        if synced_turns - {*view.turns}:
            self._stale.add(session)
        if old is not None:
            self.unprotected |= {*old.turns} - {*view.turns} - synced_turns
            self.unprotected_values |= {*old.parts.items()} - {*view.parts.items()} - synced
        return self.wrote(place, session, view, writer=writer, weak=True)

    def deleted(self, place: str, session: str, *, weak: bool = False, seen: int = 0) -> Event:
        """Note that someone deleted a session on purpose, who had seen these further events."""
        past = self.past[place, session] | seen
        event = self._event(session, place, "delete", past, None, (), frozenset(), {}, weak)
        self._put(place, session, None, past | event.bit)
        if place == REMOTE:
            self._gone_there(session, "")
        return event

    def pushed(self, machine: str, session: str, view: View | None, *, resolving: bool = False) -> None:
        """Note that a machine's round has changed a session in the shared store."""
        old = self.views[REMOTE, session]
        here, past = self._read[machine, session], self.past[REMOTE, session]
        parts = (old.parts if old else {}), (view.parts if view else {})
        self._sent_parts[machine, session] = {
            name: values
            for name in parts[0].keys() | parts[1].keys()
            if (values := (parts[0].get(name), parts[1].get(name)))[0] != values[1]
        }
        self.sent[machine, session] = {*(view.turns if view else ())} - {*(old.turns if old else ())}
        if view is None:
            seen = [each for each in self.versions[session] if each.view and not each.past & ~here.past]
            digests_seen = {each.view.digest for each in seen if each.view} | {self._pushed.get((machine, session))}
            if old is None or (not resolving and old.digest not in digests_seen):
                raise Violation("deleted", f"{session}, by {machine}, which had not seen {old}")
            self._event(session, REMOTE, "delete", past | here.past, None, (), frozenset(), {}, False)
            self._put(REMOTE, session, None, past | here.past)
            self._gone_there(session, machine)
            return
        # A turn that was sent, and then edited by another, can't be told from a new one of the same id.
        # The id of one that is random can be no other's.
        self._edited |= {
            turn
            for turn in self.unsettled.get((machine, session), ())
            if f"turn/{turn}" in view.parts and not self.random_ids
        }
        self._edited |= self._made_on_both(session, here, old)
        self._check_version(session, old, view, machine, resolving=resolving)
        if resolving:
            had = {*(old.turns if old else ()), *(here.view.turns if here.view else ())}
            removes, drops = had - {*view.turns}, set[str]()
            if old and view.created != old.created and not {*view.turns} & {*old.turns}:
                # For who has the other as a base this is made anew (section 3 of hybrid.md): it may bring back turns.
                removes, drops = removes - {*old.turns}, removes & {*old.turns}
            self.wrote(
                REMOTE, session, view, seen=here.past, removes=removes, drops=drops, kind="resolve", other=here.view
            )
            self.past[machine, session] |= self.past[REMOTE, session]
        else:
            self._put(REMOTE, session, view, past | here.past)
        self._pushed[machine, session] = view.digest
        self._unite(machine, session)

    def installed(self, machine: str, session: str, view: View | None, *, resolving: bool = False) -> None:
        """Note that a machine's round has changed or removed a session's file."""
        past = self.past[machine, session]
        if view is None:
            if resolving:
                self.deleted(machine, session)
                self.past[machine, session] |= self.past[REMOTE, session]
                return
            if self.views[REMOTE, session] is not None and not any(
                version.view is None for version in self.versions[session]
            ):
                raise Violation("deleted", f"{session} was removed on {machine}, and nobody had deleted it there")
            self._put(machine, session, None, past | self.past[REMOTE, session])
            return
        self._check_doubled(session, view, machine)
        before, self._replaced[machine, session] = (
            self._replaced.get((machine, session)),
            Version(self.views[machine, session], past),
        )
        there = self.views[REMOTE, session]
        is_taken = resolving and there is not None and there.digest == view.digest
        is_back = before and before.view and before.view.digest == view.digest and self.views[machine, session]
        if before and is_back and not is_taken:
            self._put(machine, session, before.view, before.past)  # it was put back: another had written it meanwhile
            return
        known = [version for version in self.versions[session] if version.view and version.view.digest == view.digest]
        if not known:
            raise Violation("foreign", f"{machine} has a file of {session} that was never in the shared store: {view}")
        if resolving:
            here = self.views[machine, session]
            if here is None or here.digest != view.digest:
                self._took(machine, session, here, view, known[-1].past)
                self.past[REMOTE, session] |= self.past[machine, session]
        self._put(machine, session, view, self.past[machine, session] | known[-1].past)

    def _took(self, machine: str, session: str, here: View | None, view: View, source: int) -> None:
        """Note that a conflict was resolved for what is there: only what never was there is removed by that."""
        lost = {*(here.turns if here else ())} - {*view.turns}
        synced = {turn for version in self.versions[session] if version.view for turn in version.view.turns}
        for deletion in self._of(session, self.past[machine, session] & ~source):
            if here is None and deletion.kind == "delete":
                self._undone[deletion.bit] |= source
        event = self.wrote(
            machine, session, view, seen=source, removes=lost - synced, drops=lost & synced, kind="taken"
        )
        self._taken[event.bit] = source

    def read(self, machine: str, sessions: Iterable[str]) -> None:
        """Note that a machine's round reads these sessions' files."""
        for session in sessions:
            place = machine, session
            self._read[place] = Version(self.views[place], self.past[place])

    def read_there(self, machine: str, session: str) -> None:
        """Note that a machine's round has read a session in the shared store."""
        place = REMOTE, session
        self._read_there[machine, session] = Version(self.views[place], self.past[place])

    def keeps(self, session: str, view: View) -> None:
        """Note that a copy was kept."""
        self.kept[session].append(view)

    def left(self, machine: str, session: str, view: View, file: View | None) -> None:
        """Note what is in a temporary file of a process that was killed, and what the session's file has."""
        replaced = self._replaced.get((machine, session))
        for old in (self.views[machine, session], replaced.view if replaced else None):
            if old is not None and old.digest == view.digest:
                self.unprotected |= {*view.turns} - {*(file.turns if file else ())}
                self.unprotected_values |= {*view.parts.items()} - {*(file.parts.items() if file else ())}

    def settled(self, machine: str, sessions: Iterable[str]) -> None:
        """Note that a machine's round has finished with these sessions."""
        sessions = [*sessions]
        done = {(machine, session) for session in sessions}
        for session in sessions:
            self._unite(machine, session)
        for place in done:
            self.unsettled.pop(place, None)
            self.sent.pop(place, None)
        self._gone -= done

    def interrupted(self, machine: str, sessions: Iterable[str]) -> None:
        """Note that a machine's round was cut off after it had sent these sessions."""
        for session in sessions:
            if (machine, session) in self._gone:
                self.returning.add(session)
            self.unsettled[machine, session] = self.sent.get((machine, session), set())
            there = self.views[REMOTE, session]
            self._coming_back |= self.unsettled[machine, session] - {*(there.turns if there else ())}
            self._note_reverted(machine, session)

    def _note_reverted(self, machine: str, session: str) -> None:
        """Note which parts of a sending that arrived, which is not known, others have set back to what they were.

        They may be sent again: not decidable (hybrid.md 2.5).
        """
        there = self.views[REMOTE, session]
        for name, (before, sent) in self._sent_parts.get((machine, session), {}).items():
            if (there.parts.get(name) if there else None) == before:
                self._values_coming_back[session, name].add(sent)

    def attempted(self, machine: str, session: str, removes: Iterable[str]) -> None:
        """Note that turns were to be removed, and are still there: this may have been noted or not."""
        past = self.past[machine, session]
        self._event(session, machine, "attempt", past, None, (), frozenset(removes), {}, True)

    def wiped(self, machines: Iterable[str]) -> None:
        """Note that the shared store has lost everything; the bases will be dropped."""
        machines = tuple(machines)
        for session in [*self.events]:
            old = self.views[REMOTE, session]
            here = [view for machine in machines if (view := self.views[machine, session]) is not None]
            if old is not None:
                self.unprotected |= {*old.turns} - {turn for view in here for turn in view.turns}
                self.unprotected_values |= {*old.parts.items()}
            self._void |= self.past[REMOTE, session]
            for machine in machines:
                self._void &= ~self.past[machine, session]
            self._put(REMOTE, session, None, 0)
            self._wiped[session] = len(self.versions[session])
            self.lenient.add(session)

    # What must be

    def check_conflict(self, machine: str, session: str, parts: Iterable[str]) -> None:
        """A conflict stands where both sides have changed one part, unseen by each other."""
        if session in self.lenient:
            return
        here, there = self._read[machine, session], self._read_there[machine, session]
        mine, theirs = here.past & ~there.past, there.past & ~here.past
        parts = tuple(parts)
        # What was sent without turns, and then overwritten by another, can't be told from an edit of that one.
        sent = self.unsettled.get((machine, session))
        unchanged = (
            {turn for turn in there.view.turns if f"turn/{turn}" not in there.view.parts} if there.view else set()
        )
        is_lost = sent is not None and not (sent and sent <= unchanged)
        made_anew = any(event.kind == "anew" for event in self._of(session, mine | theirs))
        for part in parts:
            if made_anew or self._is_several(session):
                continue  # what one of them had may be a change of the other
            stale = [event for event in self._of(session, mine) if event.weak and _touches(event, part)]
            is_stale = bool(stale)
            discarded = {view.parts.get(part) for view in self.kept[session]} - {None}
            if stale and any(each.weak and each.sets.get(part) in discarded for each in self._of(session, here.past)):
                continue  # what was there stood against an older value of the same program: hybrid.md 2.6
            value = there.view.parts.get(part) if there.view else None
            writers = {
                each.place for each in self._of(session, there.past) if part in each.sets and each.sets[part] == value
            }
            if is_stale and writers - {machine}:
                continue  # who wrote it had not looked at what was there
            if is_lost and any(_touches(event, part) for event in self._of(session, theirs)):
                continue
            sides = [any(_touches(event, part) for event in self._of(session, side)) for side in (mine, theirs)]
            if not all(sides):
                raise Violation("conflict", f"{machine}, {session}: {part} was not changed on both sides: {sides}")
        if parts or (session in self.returning and sent is not None):
            return
        if not (here.view and there.view and here.view.is_other(there.view, by_id=self.random_ids) and mine):
            raise Violation("conflict", f"{machine}, {session}: no conflict: {here}, {there}")

    def check_file(self, machine: str, session: str, view: View | None, event: Event) -> None:
        """Who has written reads what was written."""
        if view is None or event.view is None or view.digest != event.view.digest:
            raise Violation("stale read", f"{machine}, {session}: {view} after {event.view}")

    def check_synced(self, machine: str, session: str) -> None:
        """A session that is said to be synced has nothing that the shared store never had."""
        view = self.views[machine, session]
        known = [version.view.digest for version in self.versions[session] if version.view]
        if view is None or view.digest not in known:
            raise Violation("state", f"{machine} says of {session} that it is synced: {view}")

    def check_end(self, session: str, standing: Iterable[View] = ()) -> None:
        """At the end: the shared store has what it must, and nothing else.

        Args:
            session: its id.
            standing: the files of machines on which a conflict was left.

        """
        there = self.views[REMOTE, session]
        present = [view for view in (there, *standing) if view is not None]
        if there is not None:
            self._check_doubled(session, there, REMOTE)
        self._check_lost(session, present)
        self._check_presence(session, present)
        if there is not None:
            self._check_removed(session, there)
        if present:
            self._check_parts(session, present)

    # Rules

    def _check_version(self, session: str, old: View | None, view: View, machine: str, *, resolving: bool) -> None:
        self._check_doubled(session, view, machine)
        if session in self.lenient:
            return
        moved = {turn for event in self.events[session] for turn in event.removes} | self._edited
        places = {turn: n for n, turn in enumerate(view.turns)}
        if old is not None and not old.is_other(view):
            common = [turn for turn in old.turns if turn in places and turn not in moved]
            if common != sorted(common, key=places.__getitem__):
                raise Violation("misordered", f"{session}, pushed by {machine}: {old.turns} became {view.turns}")
            added = [turn for turn in view.turns if turn not in old.turns and turn not in moved]
            if added and common and not resolving and places[added[0]] < places[common[-1]]:
                raise Violation("misordered", f"{session}, pushed by {machine}: {old.turns} became {view.turns}")
        for turn, before in self._before.items():
            if turn in places and before in places and not {turn, before} & moved and places[before] > places[turn]:
                raise Violation("misordered", f"{session}, pushed by {machine}: {turn} before {before}: {view.turns}")

    def _check_doubled(self, session: str, view: View, place: str) -> None:
        if session in self.lenient:
            return  # without a base, a turn that was edited and the one that was not are two
        if twice := {turn for turn in view.turns if view.turns.count(turn) > 1} - self._edited:
            raise Violation("doubled", f"{session} on {place}: {sorted(twice)} in {view.turns}")

    def _made_on_both(self, session: str, here: Version, there: View | None) -> set[str]:
        """Return the turns that both stay: with other content on both sides, and in no base.

        Section 3 of hybrid.md, "same new id, other content on both sides": a deletion of the session with the turn was
        seen here, so the base is gone or of a later life. The file is of the earlier one.
        """
        if here.view is None or there is None:
            return set()
        found = set()
        for turn in {*here.view.turns} & {*there.turns}:
            name = f"turn/{turn}"
            added = [event for event in self.events[session] if turn in event.adds]
            deletions = [event for event in self._of(session, here.past) if event.kind == "delete"]
            if here.view.parts.get(name) != there.parts.get(name) and any(
                deletion.past & event.bit for deletion in deletions for event in added
            ):
                found.add(turn)
        return found

    def _check_lost(self, session: str, present: list[View]) -> None:
        """Each turn of a write that no deletion had seen is there, unless it was removed on purpose."""
        there = {turn for view in present for turn in view.turns}
        for event in self._live(session):
            assert event.view is not None
            # What it brought may be lost without protection (hybrid.md 2.6): then it keeps nothing else alive.
            is_partial = event.weak or self._is_kept(event) or self._is_unprotected(event)
            content = event.adds if is_partial else event.view.turns
            for turn in content:
                if turn in there or turn in self.unprotected or self._removals(session, turn):
                    continue
                if self._is_deleted(session, turn):
                    continue
                raise Violation("lost", f"{session}: {turn}, which {event.place} had at {event}; there is {present}")

    def _check_presence(self, session: str, present: list[View]) -> None:
        live = self._live(session)
        if present:
            # An act that was killed may have deleted it or not.
            if not live and session not in self.returning and session not in self.lenient:
                raise Violation("resurrected", f"{session} was deleted by who had seen all of it: {present}")
            return
        for event in live:
            if not event.weak and not self._is_unprotected(event) and not self._is_kept(event):
                raise Violation("deleted", f"{session} is gone, though nobody deleted {event}")

    def _check_removed(self, session: str, view: View) -> None:
        """A turn that was removed on purpose stays away, unless it was added again."""
        if session in self.lenient or session in self.returning:
            return
        live = self._live(session)
        for turn in view.turns:
            removals = [event for event in self._removals(session, turn) if turn in event.removes and not event.weak]
            adding = [event for event in self.events[session] if turn in event.adds]
            if (
                turn in self._coming_back
                or not removals
                or any(all(not event.bit & each.past for each in removals) for event in adding)
            ):
                continue
            # A removal is gone with its session, if that was deleted and comes back from who had not seen it.
            having = [event.past | event.bit for event in live if event.view and turn in event.view.turns]
            having += [each.past for each in self.versions[session] if each.view and turn in each.view.turns]
            if not all(
                (removal.kind == "anew" or self._covered(removal))
                and (
                    any(not removal.bit & past and past & ~removal.past for past in having)
                    or self._is_undone(removal, turn)
                )
                for removal in removals
            ):
                raise Violation("resurrected", f"{session}: {turn}, which was removed at {removals[-1]}")

    def _check_parts(self, session: str, present: list[View]) -> None:
        """Each value is there that no later one has replaced, or a copy of it is; and no value that was replaced is."""
        names = {name for event in self.events[session] for name in event.sets}
        for name in sorted(names):
            writes = [event for event in self.events[session] if name in event.sets and not self._covered(event)]
            latest = [*self._latest(writes)]
            strong = [*self._latest([event for event in writes if not event.weak])]
            there = {view.parts.get(name) for view in present}
            kept = {view.parts.get(name) for view in self.kept[session]}
            possible = {event.sets[name] for event in (*latest, *strong)} | self._values_coming_back[session, name]
            # Where all who wrote it are deleted, it comes back from whoever has an older one.
            if (
                strong
                and session not in self.lenient
                and (reverted := {present[0].parts.get(name)} - possible - {None})
            ):
                # Of two sessions that became one, the larger one may stand; of a stale file, what is there.
                excused: set[str | None] = {value for _, value in self.unprotected_values}
                if session in self._stale or self._is_several(session) or "learned_facts" in name:
                    excused |= kept | {None}
                if not possible & excused:
                    raise Violation("reverted", f"{session}: {name} is {reverted}, written last: {possible}")
            for event in strong:
                value = event.sets[name]
                if value in there or value in kept or value is None or self._is_gone(event, name):
                    continue
                if there & self._values_coming_back[session, name]:
                    continue
                turn = name.removeprefix("turn/")
                if any(view.turns.count(turn) > 1 for view in present):
                    continue  # both are there (section 3 of hybrid.md); a view has the last one's content
                if (name, value) not in self.unprotected_values and event in latest:
                    raise Violation("lost", f"{session}: {name} = {value} of {event}; there is {there}, kept {kept}")

    def _is_gone(self, event: Event, name: str) -> bool:
        """Whether a version was taken that who set this there was deleted with."""
        if event.kind != "taken":
            return False
        setters = [each for each in self._of(event.session, self._taken[event.bit]) if name in each.sets]
        return all(self._covered(each) for each in setters)

    def _is_several(self, session: str) -> bool:
        """Whether it was made more than once."""
        return len({event.view.created for event in self.events[session] if event.view}) > 1

    def _live(self, session: str) -> list[Event]:
        """The writes that no deletion had seen."""
        return [
            event
            for event in self.events[session]
            if event.view is not None
            and event.kind != "taken"
            and not event.bit & self._void
            and not self._covered(event)
        ]

    def _is_unprotected(self, event: Event) -> bool:
        """Whether something that a write brought was lost in a way that nothing protects from."""
        return bool({*event.adds} & self.unprotected or {*event.sets.items()} & self.unprotected_values)

    def _is_kept(self, event: Event) -> bool:
        """Whether all that a write brought has lost: it is in kept copies, or was replaced."""
        session = event.session
        turns = {turn for view in self.kept[session] for turn in view.turns}
        items = {item for view in self.kept[session] for item in view.parts.items()}
        later = {name for other in self.events[session] if event.bit & other.past for name in other.sets}
        values = {item for item in event.sets.items() if item[1] is not None and item[0] not in later}
        return values <= items and all(turn in turns or self._removals(session, turn) for turn in event.adds)

    def _is_deleted(self, session: str, turn: str) -> bool:
        """Whether a turn was deleted with its session, which came back from who had not seen it."""
        added = [event for event in self.events[session] if turn in event.adds]
        # What a program writes again from its memory, where the file was deleted, is as the base has it: unchanged
        # here, deleted there (hybrid.md 2.4, row 11). Once the deletion there was seen, the base has it no longer.
        again = [event for event in added if event.weak and event.kind == "anew"]
        added = [event for event in added if event not in again] or added
        if not all(self._covered(event) for event in added):
            return False
        deletions = [
            event.bit
            for event in self.events[session]
            if event.kind == "delete" and any(event.past & other.bit for other in added)
        ]
        if again and added[0] not in again:
            deletions = [bit for bit in deletions if not any(bit & event.past for event in again)]
        return session in self.returning | self.lenient or any(
            version.view and turn not in version.view.turns and any(bit & version.past for bit in deletions)
            for version in self.versions[session]
        )

    def _is_undone(self, removal: Event, turn: str) -> bool:
        """Whether a session came back with a turn that had been removed there, before it was deleted there.

        Who brought it back had an edit that neither had seen: hybrid.md 2.4, row 16. All later versions have seen both.
        """
        session = removal.session
        deletions = [each for each in self.events[session] if each.kind == "delete" and removal.bit & each.past]
        edits = [each for each in self.events[session] if each.view and turn in each.view.turns]
        return any(
            version.view and turn in version.view.turns and version.past & deletion.bit and version.past & edit.bit
            for deletion in deletions
            for edit in edits
            if not removal.bit & edit.past and not edit.bit & deletion.past
            for version in self.versions[session]
        )

    def _removals(self, session: str, turn: str) -> list[Event]:
        """The events that removed a turn on purpose, having seen it."""
        added = [event for event in self.events[session] if turn in event.adds]
        return [
            event
            for event in self.events[session]
            if turn in event.removes | event.drops and any(event.past & each.bit for each in added)
        ]

    def _latest(self, events: list[Event]) -> Iterator[Event]:
        return (event for event in events if not any(event.bit & other.past for other in events))

    def _covered(self, event: Event) -> bool:
        return any(
            other.kind == "delete" and event.bit & other.past & ~self._undone.get(other.bit, 0)
            for other in self.events[event.session]
        )

    def _unite(self, machine: str, session: str) -> None:
        """Both have the same: a machine has seen what led to what is there."""
        here, there = self.views[machine, session], self.views[REMOTE, session]
        if here and there and here.digest == there.digest:
            self.past[machine, session] |= self.past[REMOTE, session]

    def _of(self, session: str, bits: int) -> Iterator[Event]:
        return (event for event in self.events[session] if event.bit & bits)

    def _gone_there(self, session: str, by: str) -> None:
        if any(place != by for place, other in self.unsettled if other == session):
            self.returning.add(session)
        self._gone |= {(place, other) for place, other in self.sent if other == session and place != by}

    def _event(
        self,
        session: str,
        place: str,
        kind: str,
        past: int,
        view: View | None,
        adds: tuple[str, ...],
        removes: frozenset[str],
        sets: Mapping[str, str | None],
        weak: bool,
        drops: frozenset[str] = frozenset(),
    ) -> Event:
        event = Event(1 << self._count, session, place, kind, past, view, adds, removes, drops, sets, weak)
        self._count += 1
        self.events[session].append(event)
        return event

    def _put(self, place: str, session: str, view: View | None, past: int) -> None:
        self.views[place, session], self.past[place, session] = view, past
        if place == REMOTE:
            self.versions[session].append(Version(view, past))


def _touches(event: Event, part: str) -> bool:
    return event.kind == "delete" or part in event.sets or part.removeprefix("turn/") in event.removes | event.drops
