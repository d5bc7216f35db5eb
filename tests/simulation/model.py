"""The reference model of writes. It judges each reply when the server gives it, and each outcome when all is over.

A log is what was applied in a partition, in order. A restore puts it back; the model then goes on in another epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from orcs_redis.errors import OutcomeUnknownError, StorageError
from orcs_redis.protocol.commands import Reply, as_error
from orcs_redis.protocol.keys import Partition
from orcs_redis.protocol.writes import FORK, Identified, Write, Written

from .driver import CANCELLED
from .leases import LeaseModel
from .reference import Change, Made, Outcome, Stored, perform
from .rules import INJECTED, Violation
from .views import View, view_of

if TYPE_CHECKING:
    from .driver import Writer
    from .intents import Intent
    from .world import World

__all__ = ["AttemptToken", "Entry", "Model", "Record", "Session"]


class Session(NamedTuple):
    """A session as it is stored, or the tombstone of one."""

    revision: int
    stored: Stored | None  # None: deleted


@dataclass(eq=False)
class Record:
    """A write: what its caller wanted, and what came of it."""

    number: int
    writer: Writer
    change: Change
    id: str
    partition: Partition
    source: str  # of a fork
    intent: Intent
    goal: Any  # of the intent, when the write was made
    write: Write
    begun: int  # moments of the model
    ended: int | None = None
    outcome: Any = None  # a revision, an error, or CANCELLED
    epoch: int = 0  # when it ended, or when the server refused it last
    refused: int | None = None  # the epoch in which the server refused it last, before it ended
    idle: set[int] = field(default_factory=set)  # revisions at which the server had nothing to do for it
    ids: set[bytes] = field(default_factory=set)  # its operation ids: a new one after FORGOTTEN

    def __str__(self) -> str:
        return f"write {self.number} ({self.change.kind.decode()}{''.join(self.change.groups)} {self.id})"


class Entry(NamedTuple):
    """A write that was applied."""

    record: Record
    op: bytes
    revision: int
    epoch: int
    moment: int
    before: Stored | None
    made: Made


class Identity(NamedTuple):
    """Who has an operation id, or had it; and the epoch of the last attempt."""

    writer: Writer
    operation: Identified[Any]
    epoch: int


class AttemptToken(NamedTuple):
    """What an attempt at a write is known by."""

    op: bytes
    high_water_mark: int


def token_of(write: Write) -> AttemptToken:
    token = write._token
    assert token is not None
    return AttemptToken(token.operation_id, token.high_water_mark)


def packed_bits(bits: tuple[bool, ...]) -> bytes:
    """Return the bits of an answer as they come, 7 bytes for each 56 of them."""
    padded = "".join("01"[bit] for bit in bits).ljust(-(-len(bits) // 56) * 56, "0")
    return int("0" + padded, 2).to_bytes(len(padded) // 8)


def _source(write: Write) -> str:
    if write._kind_and_groups[:1] != FORK:
        return ""
    return write._more_keys[2].partition(":session:")[2]


class Model:
    """The logs of all partitions, and what they make."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.epoch = self.moment = 0
        self.records: list[Record] = []
        self.by_id: dict[bytes, Record] = {}
        self.identities: dict[bytes, Identity] = {}  # by operation id, also of claims
        self.bars: dict[bytes, set[bytes]] = {}  # by a write's id: those that must not be applied after it
        self.logs: list[list[Entry]] = [[] for _ in world.partitions]
        self.applied: dict[bytes, Entry] = {}  # in the present epoch
        self.sessions: dict[str, Session] = {}
        self.contents: dict[tuple[str, int], list[Stored]] = {}  # by id and revision, of all epochs
        self.history: dict[str, list[Stored | None]] = {id: [None] for id in world.ids}  # what each session was
        self.ever: set[tuple[bytes, int]] = set()
        self.graves: list[dict[str, int]] = [{} for _ in world.partitions]  # revisions of the tombstones, oldest first
        self.compacted = [0] * len(world.partitions)  # revision of the last tombstone that was dropped
        self.forgotten = [0] * len(world.partitions)  # `forgotten`, as the server has it
        self.dedup_bytes = [0] * len(world.partitions)  # of the windows
        self.leases = LeaseModel(world)

    # What writers do

    def begin(self, writer: Writer, write: Write, intent: Intent) -> Record:
        """Note a new write."""
        self.moment += 1
        record = Record(
            len(self.records), writer, Change.of(write), write._id, write._partition, _source(write), intent,
            intent.goal(), write, self.moment,
        )  # fmt: skip
        self.records.append(record)
        return record

    def sent(self, record: Record) -> AttemptToken:
        """Note the operation id of an attempt."""
        token = token_of(record.write)
        if token.op not in record.ids:
            record.ids.add(token.op)
            self.bars[token.op] = self._given_up(record)
        self.identified(record.writer, record.write)
        other = self.by_id.setdefault(token.op, record)
        if other is not record:
            raise Violation("identity", f"{record} has the operation id of {other}")
        return token

    def identified(self, writer: Writer, operation: Identified[Any]) -> None:
        """Note an attempt at a write or a claim."""
        assert operation._token is not None
        self.identities[operation._token.operation_id] = Identity(writer, operation, self.epoch)

    def _given_up(self, record: Record) -> set[bytes]:
        """Return the ids that a new write's store has finished with: they must not be applied after it."""
        return {
            id
            for id, (writer, operation, _) in self.identities.items()
            if writer is record.writer
            and operation._partition is record.partition
            and (operation._token is None or operation._token.operation_id != id)
        }

    def check_late(self, what: object, op: bytes, number: int) -> None:
        """Refuse what its store has given up, once a write that it began later is applied."""
        if self.identities[op].epoch == self.epoch:  # what was barred is open again after a restore
            for other in self._barring(op, number)[:1]:
                raise Violation("late", f"{what}, which was given up, was applied after {other.record}")

    def _barring(self, op: bytes, number: int) -> list[Entry]:
        return [other for other in self.logs[number] if op in self.bars[other.op]]

    def settle(self, record: Record, outcome: Any) -> None:
        """Note how a write ended for its caller."""
        self.moment += 1
        record.outcome = outcome.revision if isinstance(outcome, Written) else outcome
        record.ended = self.moment
        if not isinstance(outcome, StorageError) or record.refused is None:
            record.epoch = self.epoch
        else:
            record.epoch = record.refused
        self.world.count(CANCELLED if outcome is CANCELLED else type(outcome).__name__)

    # What the server answers

    def answered(self, record: Record, token: AttemptToken, item: Reply) -> None:
        """Judge the answer to one attempt at a write."""
        if as_error(item) is not None:
            return self.refused(item)
        answer, value, at = (*item, None, None)[:3]
        bits = item[3] if len(item) > 3 else b""
        mark = token.high_water_mark
        entry = self.applied.get(token.op)
        if answer == b"FORGOTTEN":
            if (
                self._live(record, token)
                and self.forgotten[record.partition.number] <= mark
                and not record.writer.cloned
            ):
                raise Violation("answer", f"{record} is FORGOTTEN, though no window of after {mark} was evicted")
            self.world.count("forgotten")
            return None
        if answer == b"RESET":
            if value < 0 or value != len(self.logs[record.partition.number]) or value >= mark:
                raise Violation("answer", f"{record} gets RESET {value}: its high-water mark is {mark}")
            return None
        if answer == b"STAGING":
            if self.world.profile.calm:
                raise Violation("answer", f"{record}: its staged turns are gone")
            return None
        if entry is not None:
            if answer != b"OK":
                raise Violation("refused", f"{record}, applied as {entry.revision}, is answered {answer.decode()}")
            if at or value != entry.revision:
                raise Violation("doubled", f"{record}, applied as {entry.revision}, was applied again as {value}")
            if bits != packed_bits(entry.made.bits):
                raise Violation("placed", f"{record} is told {bits!r} again, it was {entry.made.bits}")
            return None
        if answer == b"OK" and not at:
            if self._barring(token.op, record.partition.number) and not self._live(record, token):
                return None  # nobody waits for it
            raise Violation("lost", f"{record} is said to have been applied as {value}, and was not")
        outcome = self._outcome(record, token.op)
        if answer != b"OK":
            if record.ended is None:
                record.refused = self.epoch
            if outcome != tuple(item):
                raise Violation("answer", f"{record} gets {item}, and not {outcome!r:.300}")
            return None
        if not isinstance(outcome, Made):
            raise Violation("condition", f"{record} was applied as {value}, and not {outcome}")
        if bits != packed_bits(outcome.bits):
            raise Violation("placed", f"{record} is told {bits!r}, and not {outcome.bits}")
        if outcome.writes:
            self._apply(record, token, value, outcome)
        elif outcome.session is None or value != outcome.session.revision:
            raise Violation("answer", f"{record}, which changes nothing, gets {item}")
        else:
            record.idle.add(value)
        return None

    def stored(self, id: str) -> Stored | None:
        """Return a session as it must be stored."""
        session = self.sessions.get(id)
        return None if session is None else session.stored

    def _outcome(self, record: Record, op: bytes) -> Outcome:
        token = "foreign" if record.id in self.leases.foreign else self.leases.token(record.id)
        revision = len(self.logs[record.partition.number]) + 1
        now = self.world.clock.milliseconds()
        source = self.stored(record.source) if record.source else None
        return perform(record.change, self.stored(record.id), source, record.source, token, now, revision, op)

    def refused(self, error: Reply) -> None:
        """Judge an error in place of an answer: only the network makes up some."""
        text = as_error(error) or ""
        if not text.startswith(INJECTED):
            raise Violation("crash", f"the server answered {text}")

    def _live(self, record: Record, token: AttemptToken) -> bool:
        return record.ended is None and record.write._token is not None and token_of(record.write).op == token.op

    def _apply(self, record: Record, token: AttemptToken, revision: int, made: Made) -> None:
        self.moment += 1
        log, before = self.logs[record.partition.number], self.stored(record.id)
        if revision != len(log) + 1:
            raise Violation("revisions", f"{record} was applied as {revision} after {len(log)} writes")
        if any(op in self.applied for op in record.ids):
            raise Violation("doubled", f"{record} was applied again as {revision}")
        if token.high_water_mark >= revision:
            raise Violation(
                "condition", f"{record} was applied as {revision}, with the high-water mark {token.high_water_mark}"
            )
        self.check_late(record, token.op, record.partition.number)
        entry = Entry(record, token.op, revision, self.epoch, self.moment, before, made)
        log.append(entry)
        self.applied[token.op] = entry
        self.ever.add((token.op, revision))
        self.sessions[record.id] = Session(revision, made.session)
        self.history[record.id].append(made.session)
        graves = self.graves[record.partition.number]
        if made.session is not None:
            self.contents.setdefault((record.id, revision), []).append(made.session)
            graves.pop(record.id, None)
        else:
            graves[record.id] = revision
            if len(graves) > self.world.limits.max_tombstones:
                self.compacted[record.partition.number] = graves.pop(next(iter(graves)))
        record.intent.applied(entry)

    def at(self, id: str, revision: int) -> Stored | None:
        """Return a session as it was last stored at a revision."""
        found = self.contents.get((id, revision))
        return found[-1] if found else None

    def loaded(self, id: str, revision: int, view: View) -> None:
        """Judge what a load has returned."""
        if not any(view.is_end_of(view_of(stored)) for stored in self.contents.get((id, revision), ())):
            raise Violation("loaded", f"{id} at {revision} was loaded with {view}")

    # What the server keeps

    def check_partition(self, partition: Partition, state: dict[bytes, bytes], wrote: bool) -> None:
        """Judge a partition's counters and windows after what was executed."""
        log, limits = self.logs[partition.number], self.world.limits
        if int(state[b"revision"]) != len(log):
            raise Violation("revisions", f"the counter is {int(state[b'revision'])} after {len(log)} writes")
        if int(state[b"compacted"]) != self.compacted[partition.number]:
            raise Violation("state", f"{int(state[b'compacted'])} is compacted, not {self.compacted[partition.number]}")
        windows = {name[1:]: value for name, value in state.items() if name[:1] == b"w" and len(name) == 13}
        sizes = [len(value) for value in windows.values()]
        if len(sizes) > limits.max_windows:
            raise Violation("windows", f"there are {len(sizes)}, and {limits.max_windows} are allowed")
        if sum(sizes) != int(state[b"dedup_bytes"]):
            raise Violation("windows", f"they have {sum(sizes)} bytes, and {int(state[b'dedup_bytes'])} are counted")
        grew = sum(sizes) > self.dedup_bytes[partition.number]  # else nothing need be looked for
        self.dedup_bytes[partition.number] = sum(sizes)
        if wrote and grew and sum(sizes) > limits.max_dedup_bytes and max(sizes) > 64:
            raise Violation("windows", f"they have {sum(sizes)} bytes, and {limits.max_dedup_bytes} are allowed")
        for writer, value in windows.items():  # beside what is barred
            identities = {value[at : at + 8] for at in range(16, len(value), 16)}  # some have bits besides
            applied = sum(writer + identity in self.applied for identity in identities)
            if applied > 2 * self.world.window + 4:
                raise Violation(
                    "windows", f"one has {applied} writes, though writers begin a new one after {self.world.window}"
                )

    # Restores

    def snapshot(self) -> tuple[Any, ...]:
        """Return what `restore` takes."""
        logs = [list(log) for log in self.logs]
        graves = [dict(graves) for graves in self.graves]
        counters = graves, list(self.compacted), list(self.forgotten)
        return logs, dict(self.applied), dict(self.sessions), counters, self.leases.snapshot()

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Go back to a snapshot, in a new epoch."""
        logs, applied, sessions, (graves, compacted, forgotten), leases = snapshot
        self.logs = [list(log) for log in logs]
        self.applied, self.sessions = dict(applied), dict(sessions)
        self.graves, self.compacted, self.forgotten = [dict(some) for some in graves], list(compacted), list(forgotten)
        self.leases.restore(leases)
        for id, states in self.history.items():
            states.append(self.stored(id))
        self.epoch += 1
        self.moment += 1

    # When all is over

    def check_outcomes(self) -> None:
        """Judge what the callers were told."""
        applied = {entry.record: entry for entry in self.applied.values()}
        for record in self.records:
            entry, outcome = applied.get(record), record.outcome
            if isinstance(outcome, int):
                if outcome in record.idle:
                    if entry is not None and entry.epoch == record.epoch:
                        raise Violation("late", f"{record} had nothing to do, and was applied as {entry.revision}")
                    continue
                if not any((op, outcome) in self.ever for op in record.ids):
                    raise Violation("lost", f"{record} was acknowledged as {outcome}, and never applied")
                if self.epoch == 0 and (entry is None or entry.revision != outcome):
                    raise Violation("lost", f"{record} was acknowledged as {outcome}; it is {entry}")
            elif isinstance(outcome, StorageError) and not isinstance(outcome, OutcomeUnknownError):
                if entry is None or record.ended is None:
                    continue
                if entry.epoch > record.epoch:
                    self.world.count("applied after a restore that came after its refusal")
                else:
                    raise Violation(
                        "refused", f"{record} ended in {outcome!r:.120}, and was applied as {entry.revision}"
                    )
