"""What a store can do with sessions, as requests and plans. Bad input is refused here, before anything is sent."""

from __future__ import annotations

import builtins
import inspect
import random
from collections.abc import Callable, Collection, Sequence
from typing import Generic, Protocol, TypeVar

from ..errors import ConflictError, CorruptSessionError, SerializationError
from ..model.asset import SessionAsset
from ..model.ids import check_id
from ..model.meta import SessionMeta, Versioned
from ..model.sections import ConversationTurn
from .codec import Baseline, Codec, Encoded, Patch, baseline_of, set_baseline
from .commands import Argument
from .namespace import Probe
from .reads import Exists, Load, Ping, Turns
from .request import Pause, Plan
from .writer import Namespace
from .writes import APPEND, DELETE, SAVE, Write, Written

__all__ = ["LeaseToken", "Sessions"]

A = TypeVar("A", bound=SessionAsset)
_STAGED_TURNS = 16  # from so many turns on, a history is staged by plain commands, not passed through Lua


class LeaseToken(Protocol):
    """A lease of either form."""

    id: str
    token: int


class Sessions(Generic[A]):
    """What a store can do, as requests and plans. Bad input is refused here, before anything is sent."""

    def __init__(self, namespace: Namespace, codec: Codec[A]) -> None:
        self._namespace = namespace
        self._codec = codec

    def probe(self) -> Probe:
        """Whether writing is allowed."""
        return Probe(self._namespace)

    def begin_epoch(self) -> None:
        """Begin a new epoch with the next write."""
        self._namespace.begin_epoch()

    def ping(self) -> Ping:
        """A round trip."""
        return Ping()

    def load(self, id: str) -> Load[A]:
        """A session and its revision."""
        return Load(self._namespace, self._codec, check_id(id))

    def turns(self, id: str, start: int, stop: int) -> Turns:
        """Part of a history."""
        return Turns(self._namespace, check_id(id), _index(start), _index(stop))

    def exists(self, id: str) -> Exists:
        """Whether there is a session."""
        return Exists(self._namespace, check_id(id))

    def append(
        self, id: str, turns: Sequence[ConversationTurn], if_revision: int | None, lease: LeaseToken | None
    ) -> Write:
        """Add turns to a history."""
        check_id(id)
        if not turns:
            raise ValueError("append needs a turn")
        if len(turns) == 1:
            data = [self._codec.turn(turns[0], "turn")]
        else:
            data = [self._codec.turn(turn, f"turns[{n}]") for n, turn in enumerate(turns)]
        if sum(map(len, data)) > self._codec.max_asset_bytes:
            raise SerializationError("turns", f"more than {self._codec.max_asset_bytes} bytes")
        return Write(self._namespace, APPEND, id, _revision(if_revision), data, fencing_token=_fencing_token(id, lease))

    def delete_listed(self, session: str | SessionMeta) -> Write:
        """Remove a session; one of which metadata is given only at its revision."""
        if isinstance(session, SessionMeta):
            return self.delete(session.id, session.revision, None)
        return self.delete(session, None, None)

    def delete(self, id: str, if_revision: int | None, lease: LeaseToken | None) -> Write:
        """Remove a session."""
        expected, fencing_token = _revision(if_revision), _fencing_token(check_id(id), lease)
        return Write(self._namespace, DELETE, id, expected, fencing_token=fencing_token)

    def save(
        self, asset: A, if_revision: int | None, lease: LeaseToken | None, *, only_changes: bool = False
    ) -> Plan[int]:
        """Store an asset: what has changed if it is what it was loaded from, else the whole.

        With `only_changes`, nothing is written if nothing has.
        """
        if isinstance(asset, SessionAsset):  # anything else is refused by the codec
            check_id(asset.id)
        expected = _revision(if_revision)
        fencing_token = _fencing_token(asset.id, lease) if lease is not None else None
        known = self._known(asset)
        new = self._codec.encode(asset, known)
        patch = None
        if known is not None and expected in (None, known.revision):
            patch = self._codec.compare(known, new)
        if known is not None and patch is not None:
            if only_changes and patch.is_empty:
                return known.revision
            try:
                written = yield self._save(asset, new, patch, known.revision, fencing_token, known)
                return self._saved(asset, new, written)
            except (ConflictError, CorruptSessionError):
                if expected is not None:
                    raise
        written = yield self._save(asset, new, None, expected, fencing_token, known)
        return self._saved(asset, new, written)

    def _known(self, asset: A) -> Baseline | None:
        stored = baseline_of(asset) if isinstance(asset, SessionAsset) else None
        if stored is None or stored.id != asset.id or stored.incarnation != self._namespace.incarnation:
            return None
        return stored

    def _save(
        self,
        asset: A,
        new: Encoded,
        patch: Patch | None,
        expected: int | None,
        fencing_token: int | None,
        known: Baseline | None,
    ) -> Write:
        sections = new.sections if patch is None else patch.sections
        removed: Collection[str] = () if known is None else known.sections.keys() - new.sections.keys()
        rest: builtins.list[Argument] = [asset.updated_at_ms, new.metadata_tail]
        changes: builtins.list[Argument] = [len(sections)]
        for section in sections.items():
            changes += section
        changes += [len(removed), *removed]
        staged: Sequence[bytes] = ()
        if patch is None and len(new.turns) < _STAGED_TURNS:
            rest += ["replace", *changes, *new.turns]
        elif patch is None:
            staged = new.turns
            rest += ["staged", *changes, len(new.turns)]
        elif patch.reshapes:
            rest += ["edit", *changes, *patch.keep, len(patch.edits)]
            for edit in patch.edits:
                rest += edit
            rest += patch.pushed
        else:
            rest += ["push", *changes, *patch.pushed]
        expected_op = None if known is None or patch is None else known.operation_id
        # Of a known session updated_at_ms is not lowered in the index; a new asset brings its own time.
        keeps_time = known is not None
        return Write(self._namespace, SAVE, asset.id, expected, rest, staged, fencing_token, expected_op, keeps_time)

    def _saved(self, asset: A, new: Encoded, written: Written) -> int:
        before = self._known(asset)
        if before is None or before.revision < written.revision:
            incarnation = self._namespace.incarnation
            set_baseline(
                asset, Baseline(incarnation, asset.id, written.revision, written.operation_id, new.sections, new.turns)
            )
        return written.revision

    def update(self, id: str, change: Callable[[A], object], lease: LeaseToken | None) -> Plan[Versioned[A]]:
        """Load, change and save, again and again until no other write came between."""
        delay = 0.001
        while True:
            asset, revision = yield self.load(id)
            if inspect.isawaitable(answer := change(asset)):
                if inspect.iscoroutine(answer):
                    answer.close()
                raise TypeError("update takes a plain function: what it does must not wait")
            if asset.id != id:
                raise ValueError("change must leave the id as it is")
            try:
                return Versioned(asset, (yield from self.save(asset, revision, lease, only_changes=True)))
            except ConflictError:
                yield Pause(random.uniform(0, delay))
                delay = min(2 * delay, 0.1)


def _index(index: int) -> int:
    if type(index) is not int:
        raise ValueError("the index of a turn is an integer")  # as for every other bad argument
    return max(-(2**62), min(index, 2**62))


def _revision(if_revision: int | None) -> int | None:
    if if_revision is not None and (type(if_revision) is not int or not 0 <= if_revision < 2**63):
        raise ValueError("if_revision is a revision, or 0 for an absent session")
    return if_revision


def _fencing_token(id: str, lease: LeaseToken | None) -> int | None:
    if lease is None:
        return None
    if lease.id != id:
        raise ValueError("the lease is of another session")
    return lease.token
