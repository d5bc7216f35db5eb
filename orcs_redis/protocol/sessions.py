"""What a store can do with sessions, as requests and plans. Bad input is refused here, before anything is sent."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Generic, TypeVar

from ..errors import ConflictError, NotFoundError
from ..model.asset import SessionAsset
from ..model.encoding import attempt, encode
from ..model.ids import check_id
from ..model.meta import Committed, SessionMeta
from ..model.sections import ConversationTurn, now_ms
from .codec import Codec
from .commands import Argument
from .commits import CommitArguments, commit_groups, committed
from .groups import base_group, pairs, whole_groups
from .reads import Exists, Load, Ping, ReadStored, ReadTail, ReadWithRecords, Turns
from .request import Pause, Plan
from .turns import decode_turns, id_of
from .writer import Namespace
from .writes import DELETE, FORK, Group, LeaseToken, Outdated, PopUnseen, Write, check_lease, expectation

__all__ = ["Sessions"]

A = TypeVar("A", bound=SessionAsset)
_ONCE = 1000  # of the last turns, ids are compared
_POPS = 4  # attempts of a pop that looks before it removes
_SEARCHED = 8  # turns read at first to find one; then eight times as many


class Sessions(Generic[A]):
    """What a store can do with a session by its id. Bad input is refused here, before anything is sent."""

    def __init__(self, namespace: Namespace, codec: Codec[A]) -> None:
        self._namespace = namespace
        self._codec = codec

    def begin_epoch(self) -> None:
        """Begin a new epoch with the next write."""
        self._namespace.begin_epoch()

    def ping(self) -> Ping:
        """A round trip."""
        return Ping()

    def load(self, id: str, last: int | None = None) -> Load[A]:
        """A session and its revision."""
        if last is not None and (type(last) is not int or last < 0):
            raise ValueError("last is a number of turns")
        return Load(self._namespace, self._codec, check_id(id), last)

    def turns(self, id: str, start: int, stop: int) -> Turns:
        """Part of a history."""
        return Turns(self._namespace, check_id(id), _index(start), _index(stop))

    def exists(self, id: str) -> Exists:
        """Whether there is a session."""
        return Exists(self._namespace, check_id(id))

    def append(
        self,
        id: str,
        turns: Sequence[ConversationTurn],
        if_revision: int | None,
        lease: LeaseToken | None,
        *,
        create: bool = False,
    ) -> Write:
        """Add turns to a history."""
        check_id(id)
        if not turns:
            raise ValueError("append needs a turn")
        groups = [Group(b"p", self._codec.turns(turns))]
        if create:
            groups.insert(0, self._creation())
        return Write(self._namespace, id, [*_conditions(id, if_revision, lease), *groups], lease=lease)

    def append_once(
        self,
        id: str,
        turns: Sequence[ConversationTurn],
        if_revision: int | None,
        lease: LeaseToken | None,
        *,
        create: bool,
    ) -> Plan[int]:
        """Add those of the turns whose ids are not among those of the last turns."""
        self.append(id, turns, if_revision, lease, create=create)  # checked as by itself
        if not all(turn.id for turn in turns) or len({turn.id for turn in turns}) < len(turns):
            raise ValueError("once: each turn needs an id, and none twice")
        data = self._codec.turns(turns)
        while True:
            try:
                tail = yield ReadTail(self._namespace, id, _ONCE)
                known = {id_of(turn) for turn in tail.turns}
                base = base_group(tail)
                revision = tail.revision
            except NotFoundError:
                if not create:
                    raise
                known, base, revision = set(), Group(b"g", (0, 0)), 0
            if if_revision not in (None, revision):
                raise ConflictError(id, if_revision, revision)
            new = [turn for turn in data if id_of(turn) not in known]
            if not new:
                return int(revision)
            groups = [*_conditions(id, if_revision, lease), base, Group(b"p", new)]
            if create:
                groups.insert(-1, self._creation())
            try:
                written = yield Write(self._namespace, id, groups, lease=lease)
            except Outdated:
                continue
            except ConflictError:
                if if_revision is not None:
                    raise
                continue  # it was deleted or made meanwhile
            return int(written.revision)

    def pop(
        self, id: str, count: int, if_revision: int | None, lease: LeaseToken | None
    ) -> Plan[list[ConversationTurn]]:
        """Remove the last turns, and return them."""
        check_id(id)
        conditions = _conditions(id, if_revision, lease)
        number = _count(count, "count", least=1)
        delay = 0.001
        for _ in range(_POPS if if_revision is None else 1):
            tail = yield ReadTail(self._namespace, id, number)
            if if_revision not in (None, tail.revision):
                raise ConflictError(id, if_revision or 0, tail.revision)
            if not tail.turns:
                return []
            popped = decode_turns(id, tail.turns)
            base = base_group(tail)
            groups = [*conditions, base, Group(b"z", (len(tail.turns),))]
            try:
                yield Write(self._namespace, id, groups, lease=lease)
                return popped
            except ConflictError:
                if if_revision is not None:
                    raise
            yield Pause(random.uniform(0, delay))
            delay *= 2
        # Others write all the time.
        written = yield PopUnseen(self._namespace, id, number, lease)
        return decode_turns(id, written.popped)

    def truncate(self, id: str, length: int, if_revision: int | None, lease: LeaseToken | None) -> Write:
        """Keep the first turns."""
        groups = [*_conditions(check_id(id), if_revision, lease), Group(b"q", (_count(length, "length", least=0),))]
        return Write(self._namespace, id, groups, lease=lease)

    def replace_turn(
        self, id: str, turn: ConversationTurn, if_revision: int | None, lease: LeaseToken | None
    ) -> Plan[int]:
        """Put a turn in the place of the last one with its id."""
        conditions = _conditions(check_id(id), if_revision, lease)
        data = self._codec.turn(turn, "turn")
        wanted, index = id_of(data), -1
        while True:
            groups = [*conditions, Group(b"v", (index, wanted, data))]
            try:
                return int((yield Write(self._namespace, id, groups, lease=lease)).revision)
            except Outdated:
                index = yield from self._find(id, turn.id, wanted)

    def _find(self, id: str, turn_id: str, wanted: bytes) -> Plan[int]:
        """Return the index of the last turn with an id; `wanted`: as it is encoded."""
        most = _SEARCHED
        while True:
            tail = yield ReadTail(self._namespace, id, most)
            for n in reversed(range(len(tail.turns))):
                if id_of(tail.turns[n]) == wanted:
                    return int(tail.turn_count - len(tail.turns) + n)
            if len(tail.turns) == tail.turn_count:
                raise NotFoundError(id, turn_id)
            most *= 8

    def commit(
        self,
        id: str,
        changes: CommitArguments,
        if_revision: int | None,
        if_last: str | None,
        lease: LeaseToken | None,
        *,
        create: bool,
    ) -> Plan[Committed]:
        """Change some parts of a session, all or nothing."""
        groups = _conditions(check_id(id), if_revision, lease)
        if if_last is not None:
            if not isinstance(if_last, str) or attempt(encode, if_last)[1] is not None:
                raise ValueError("if_last is a turn's id")
            groups.append(Group(b"i", (encode(if_last),)))
        if create:
            groups.append(self._creation())
        write = Write(self._namespace, id, [*groups, *commit_groups(self._codec, changes)], lease=lease)
        return committed(changes, (yield write))

    def touch(self, id: str, if_revision: int | None, lease: LeaseToken | None) -> Write:
        """Move `updated_at` to the server's now."""
        return Write(self._namespace, id, [*_conditions(check_id(id), if_revision, lease), Group(b"n")], lease=lease)

    def delete_listed(self, session: str | SessionMeta) -> Write:
        """Remove a session; one of which metadata is given only at its revision."""
        if isinstance(session, SessionMeta):
            return self.delete(session.id, session.revision, None)
        return self.delete(session, None, None)

    def delete(self, id: str, if_revision: int | None, lease: LeaseToken | None) -> Write:
        """Remove a session."""
        return Write(self._namespace, id, _conditions(check_id(id), if_revision, lease), kind=DELETE, lease=lease)

    def fork(self, id: str, new_id: str, length: int | None, if_revision: int | None, *, records: bool) -> Plan[int]:
        """Make a session from another one."""
        if check_id(id) == check_id(new_id):
            raise ValueError("a fork needs an id of its own")
        expected = expectation(if_revision)
        most = None if length is None else _count(length, "length", least=0)
        keyspace = self._namespace.keyspace
        if keyspace.of(id) is not keyspace.of(new_id):
            return (yield from self._fork_elsewhere(id, new_id, most, expected, records))
        groups = [] if expected is None else [Group(b"r", (expected,))]
        if most is not None:
            groups.append(Group(b"q", (most,)))
        if records:
            groups.append(Group(b"O"))
        return int((yield Write(self._namespace, new_id, groups, kind=FORK, source=id)).revision)

    def _fork_elsewhere(
        self, id: str, new_id: str, length: int | None, expected: int | None, records: bool
    ) -> Plan[int]:
        """Fork into another partition: one script may not use keys of both."""
        found: list[Argument] = []
        if records:
            stored, found = yield ReadWithRecords(self._namespace, self._codec, id)
        else:
            stored = yield ReadStored(self._namespace, self._codec, id)
        if expected not in (None, stored.revision):
            raise ConflictError(id, expected or 0, stored.revision)
        turns = list(stored.turns[:length])
        asset = self._codec.decode(new_id, stored.fields, ())
        asset.created_at_ms = asset.updated_at_ms = now_ms()
        asset.metadata["forked_from"] = {"id": id, "revision": stored.revision, "length": len(turns)}
        new = self._codec.encode(asset, None)
        groups = [Group(b"r", (0,)), *whole_groups(asset, new)]
        if found:
            groups.append(Group(b"P", found))
        if not turns:
            groups.append(Group(b"h"))
        return int((yield Write(self._namespace, new_id, groups, staged=turns)).revision)

    def _creation(self) -> Group:
        """Return what makes a session that is absent."""
        new = self._codec.new_session()
        return Group(b"c", (new.about.names, *pairs(new.fields)))


def _conditions(id: str, if_revision: int | None, lease: LeaseToken | None) -> list[Group]:
    check_lease(id, lease)
    expected = expectation(if_revision)
    return [] if expected is None else [Group(b"r", (expected,))]


def _index(index: int) -> int:
    if type(index) is not int:
        raise ValueError("the index of a turn is an integer")  # as for every other bad argument
    return max(-(2**62), min(index, 2**62))


def _count(number: int, name: str, least: int) -> int:
    if type(number) is not int or number < least:
        raise ValueError(f"{name} is {least} or more")
    return min(number, 2**31)
