"""What to do with a session: a pure function of what both sides had, what is here, and what is there.

Here is orcs' file, there the shared store, the base what was last common. No clock decides anything: here is compared
by digests, there by revision and operation, which the server counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from enum import Enum
from hashlib import blake2b
from itertools import islice
from typing import Any, Final, Generic, Literal, NamedTuple, Self, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from ...errors import StorageError
from ...model.asset import SessionAsset
from ...model.merge import merge, settled
from ...model.meta import SyncState
from ...model.parts import TIMES, Digests, Entry, changed, digest, digests
from .results import SideName

__all__ = [
    "SAME",
    "Act",
    "Base",
    "Pending",
    "Same",
    "Side",
    "Standing",
    "Step",
    "Unreadable",
    "VersionHere",
    "VersionThere",
    "caught_up",
    "content_digest",
    "forced",
    "lacking_turns",
    "plan",
    "sent_turns",
    "sides_of",
    "standing",
]

A = TypeVar("A", bound=SessionAsset)

_TURNS: Final = "history.turns"
_COMPACTED: Final = "history.compacted"
_CREATED: Final = "created_at_ms"
_SHARED: Final = (_COMPACTED, "project_context.root_path")  # changed on both sides: the shared store's stand
_OWN: Final = "component_snapshots."  # changed on both sides: ours stand, since the component runs on

_HERE: Final[tuple[SideName, ...]] = ("here",)
_THERE: Final[tuple[SideName, ...]] = ("there",)

_is_random: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}").fullmatch
"""Says of a turn's id whether it is a UUID of version 4: no other turn has it."""

_encode: Final = msgspec.msgpack.Encoder(order="sorted").encode


def content_digest(parts: Digests) -> bytes:
    """Return a digest of all parts but the times, which are no change by themselves."""
    values = {name: data for name, data in parts.values.items() if name not in TIMES}
    return blake2b(_encode((values, parts.lists)), digest_size=16).digest()


class Side(NamedTuple, Generic[A]):
    """A version of a session that could be read."""

    asset: A
    parts: Digests
    digest: bytes  # of the content

    @classmethod
    def of(cls, asset: A) -> Self:
        """Return an asset with its digests."""
        parts = digests(asset)
        return cls(asset, parts, content_digest(parts))


class Unreadable(NamedTuple):
    """A version that can't be read, and why."""

    error: StorageError
    file: str = ""  # its name, if it is a file

    @property
    def reason(self) -> str:
        """Why, and which file."""
        return f"{self.file}: {self.error}" if self.file else str(self.error)


class Same(Enum):
    """The version there, where it is known to be the base's: it was not read."""

    SAME = "same"


SAME: Final = Same.SAME
VersionHere: TypeAlias = Side[A] | Unreadable | None
VersionThere: TypeAlias = Side[A] | Unreadable | Same | None


class Base(Struct, frozen=True):
    """The last version that both sides had.

    ``revision`` 0: its content was there once, but the write that brought it is not known.
    """

    parts: Digests
    digest: bytes
    revision: int = 0
    operation: bytes = b""


class Pending(Struct, frozen=True):
    """A version that is being installed.

    ``revision`` is known of a version that came from the shared store, or once it has arrived there. Of one that is
    sent there, ``over`` is the digest of what was there, ``mine`` what was here then, and ``sent`` are the turns that
    it brings.
    """

    digest: bytes
    revision: int = 0
    operation: bytes = b""
    mine: Digests | None = None
    sent: list[Entry] = []
    over: bytes = b""


class Act(Enum):
    """What a step does."""

    NOTHING = "nothing"
    ADOPT = "adopt"  # both have the same: note it as the base
    FORGET = "forget"  # neither has it
    INSTALL = "install"
    DELETE_HERE = "delete here"
    DELETE_THERE = "delete there"


class Step(NamedTuple, Generic[A]):
    """How a session stands, and what follows."""

    state: SyncState | None  # None: there is no session, or it is deleted here
    act: Act = Act.NOTHING
    version: Side[A] | None = None  # to be installed
    write_here: bool = False
    write_there: bool = False
    keep: tuple[SideName, ...] = ()  # the sides whose version is kept before it is overwritten
    parts: tuple[str, ...] = ()  # that collide
    reason: str = ""  # of a conflict
    revives: bool = False


def plan(
    base: Base | None,
    here: VersionHere[A],
    there: VersionThere[A],
    *,
    removed: Collection[str] = (),
    merging: bool = True,
    prefer: Literal["local", "remote"] | None = None,
) -> Step[A]:
    """Say how a session stands and what to do.

    Args:
        base: what was last common.
        here: the file's version.
        there: the shared store's; SAME can't be used where `lacking_turns` says that turns must come back.
        removed: ids of turns that were removed here knowingly since the base.
        merging: whether to merge what both sides changed.
        prefer: whose parts hold where both changed the same; None: that is a conflict.

    """
    if isinstance(here, Unreadable):
        return _conflict(f"the file can't be read: {here.reason}")
    if isinstance(there, Unreadable):
        return _conflict(f"what is stored can't be read: {there.reason}")
    if base is None:
        return _plan_first(here, _read(there), merging, prefer)
    if here is None:
        return _plan_deleted_here(base, there)
    if there is None:
        if here.digest == base.digest:
            return Step(SyncState.REMOTE_AHEAD, Act.DELETE_HERE, keep=("here",))
        return Step(SyncState.LOCAL_AHEAD, Act.INSTALL, here, write_there=True, revives=True)
    if not isinstance(there, Same) and not _is_of(base.parts, there.parts):
        return _plan_made_anew(base, here, there, merging, prefer)
    return _plan_changed(base, here, there, removed, merging, prefer)


def _plan_first(
    here: Side[A] | None, there: Side[A] | None, merging: bool, prefer: Literal["local", "remote"] | None
) -> Step[A]:
    """Nothing is known to have been common."""
    if here is None:
        if there is None:
            return Step(None, Act.FORGET)
        return Step(SyncState.REMOTE_AHEAD, Act.INSTALL, there, write_here=True)
    if there is None:
        return Step(SyncState.LOCAL_ONLY, Act.INSTALL, here, write_there=True)
    if here.digest == there.digest:
        return Step(SyncState.SYNCED, Act.ADOPT)
    mine, theirs = Counter(here.parts.lists[_TURNS]), Counter(there.parts.lists[_TURNS])
    same_birth = here.parts.values.get(_CREATED) == there.parts.values.get(_CREATED)
    if not (same_birth or mine & theirs or not mine or not theirs):
        return _conflict("two sessions of one id")
    if not merging:
        return _conflict("changed on both sides", tuple(sorted(changed(here.parts, there.parts) - TIMES)))
    if prefer is None and mine != theirs and mine >= theirs:
        prefer = "local"  # the larger one stands where values differ
    elif prefer is None and theirs >= mine:
        prefer = "remote"
    return _merged(Digests(), here, there, prefer)


def _plan_deleted_here(base: Base, there: Side[A] | Same | None) -> Step[A]:
    if there is None:
        return Step(None, Act.FORGET)
    if isinstance(there, Same):
        return Step(None, Act.DELETE_THERE)
    if there.digest == base.digest and _is_of(base.parts, there.parts):
        return Step(None, Act.DELETE_THERE, keep=("there",))
    return Step(SyncState.REMOTE_AHEAD, Act.INSTALL, there, write_here=True, revives=True)


def _read(there: Side[A] | Same | None) -> Any:
    """Return a version that had to be read."""
    if isinstance(there, Same):
        raise ValueError("what is there has to be read first")
    return there


def _is_of(base: Digests, parts: Digests) -> bool:
    """Whether a version is of the session that the base is of: it was not deleted and made anew meanwhile."""
    if base.values.get(_CREATED) == parts.values.get(_CREATED):
        return True
    old, new = base.lists.get(_TURNS, []), parts.lists[_TURNS]
    ids = {key for key, _ in old}
    return not {*old}.isdisjoint(new) or any(key in ids and _is_random(key) for key, _ in new)  # it may be edited


def _plan_made_anew(
    base: Base, here: Side[A], there: Side[A], merging: bool, prefer: Literal["local", "remote"] | None
) -> Step[A]:
    """What is there is another session than the base was of."""
    if here.digest == base.digest:
        return Step(SyncState.REMOTE_AHEAD, Act.INSTALL, there, write_here=True, keep=("here",))
    return _plan_first(here, there, merging, prefer)


def _plan_changed(
    base: Base,
    here: Side[A],
    there: Side[A] | Same,
    removed: Collection[str],
    merging: bool,
    prefer: Literal["local", "remote"] | None,
) -> Step[A]:
    here_changed = here.digest != base.digest
    there_changed = not isinstance(there, Same) and there.digest != base.digest
    stale = here_changed and bool(lacking_turns(base.parts, here, removed))  # of an old version
    if not here_changed and not there_changed:
        return Step(SyncState.SYNCED, Act.NOTHING if isinstance(there, Same) else Act.ADOPT)
    if not there_changed and not stale:
        return Step(SyncState.LOCAL_AHEAD, Act.INSTALL, here, write_there=True)
    theirs: Side[A] = _read(there)
    if not here_changed:
        keep: tuple[SideName, ...] = ("here",) if _loses(here, theirs, base.parts, whole=True) else ()
        return Step(SyncState.REMOTE_AHEAD, Act.INSTALL, theirs, write_here=True, keep=keep)
    if here.digest == theirs.digest:
        return Step(SyncState.SYNCED, Act.ADOPT)
    if stale:
        return _put_back(base.parts, here, theirs, removed)
    if not merging:
        both = changed(base.parts, here.parts) & changed(base.parts, theirs.parts) - TIMES
        return _conflict("changed on both sides", tuple(sorted(both)))
    return _merged(base.parts, here, theirs, prefer)


def _merged(base: Digests, here: Side[A], there: Side[A], prefer: Literal["local", "remote"] | None) -> Step[A]:
    """Merge what both have changed."""
    result = merge(base, here.asset, there.asset, concede=_SHARED)
    colliding = tuple(name for name in result.conflicts if name not in _SHARED and not name.startswith(_OWN))
    if colliding and prefer is None:
        return _conflict("both sides changed the same", colliding)
    if colliding and prefer == "remote":
        result = merge(base, here.asset, there.asset, concede={*_SHARED, *colliding})
    return _install(Side.of(result.asset), base, here, there)


def _put_back(base: Digests, here: Side[A], there: Side[A], removed: Collection[str]) -> Step[A]:
    """Install what is there with the new turns of a file that was written from an old version.

    What else differs in the file may be old or new: what is there stands.
    """
    left = Counter(key for key, _ in base.lists[_TURNS])
    old = []
    for entry in here.parts.lists[_TURNS]:
        if left[entry[0]]:
            left[entry[0]] -= 1
            old.append(entry)
    old += [entry for entry in base.lists[_TURNS] if left[entry[0]] and entry[0] in removed]
    unchanged = Digests(here.parts.values, {**here.parts.lists, _TURNS: old})
    edited = merge(unchanged, here.asset, there.asset).conflicts  # there, and removed here: they stay
    result = merge(unchanged, here.asset, there.asset, concede=edited)
    return _install(Side.of(result.asset), base, here, there)


def _install(version: Side[A], base: Digests, here: Side[A], there: Side[A]) -> Step[A]:
    keep: list[SideName] = []
    if _loses(here, version, base, whole=False):
        keep.append("here")
    if _loses(there, version, base, whole=False):
        keep.append("there")
    write_here, write_there = version.digest != here.digest, version.digest != there.digest
    return Step(SyncState.LOCAL_AHEAD, Act.INSTALL, version, write_here, write_there, tuple(keep))


def _loses(side: Side[A], version: Side[A], base: Digests, *, whole: bool) -> bool:
    """Whether a version lacks something of a side: what that side has changed; with `whole`, or any of its turns."""
    for name, data in side.parts.values.items():
        if name not in TIMES and data not in (base.values.get(name), version.parts.values.get(name)):
            return True
    for path, entries in side.parts.lists.items():
        lacking = Counter(entries) - Counter(version.parts.lists.get(path, []))
        if lacking - Counter(base.lists.get(path, [])):
            return True
    if not whole:
        return False
    ids = {key for key, _ in version.parts.lists[_TURNS]}
    dropped = [entry for entry in side.parts.lists[_TURNS] if entry[0] not in ids]
    return bool(dropped) and not _is_compacted(side.parts, version, dropped)


def lacking_turns(base: Digests, here: Side[A], removed: Collection[str]) -> list[Entry]:
    """Return turns of the base that a file lacks, and that were not removed knowingly.

    Such a file was written from an old version that a program had in its memory, as orcs does.
    """
    left = Counter(key for key, _ in here.parts.lists[_TURNS])
    missing = []
    for entry in base.lists.get(_TURNS, []):
        if left[entry[0]]:
            left[entry[0]] -= 1
        else:
            missing.append(entry)
    missing = [entry for entry in missing if entry[0] not in removed]
    return [] if not missing or _is_compacted(base, here, missing, removed) else missing


def _is_compacted(old: Digests, new: Side[A], missing: list[Entry], removed: Collection[str] = ()) -> bool:
    """Whether turns are missing because they were compacted: they are the first, and new summaries are of as many."""
    turns = (entry for entry in old.lists.get(_TURNS, []) if entry[0] not in removed)
    if [*islice(turns, len(missing))] != missing:
        return False
    compacted, before = new.asset.history.compacted, old.values.get(_COMPACTED)
    known = next((n for n in range(len(compacted)) if digest(compacted[:n]) == before), len(compacted))
    return sum(summary.turn_count for summary in compacted[known:]) >= len(missing)


def _conflict(reason: str, parts: tuple[str, ...] = ()) -> Step[A]:
    return Step(SyncState.CONFLICT, parts=parts, reason=reason)


def forced(
    base: Base | None,
    here: Side[A] | None,
    there: Side[A] | None,
    keep: Literal["local", "remote"],
    *,
    removed: Collection[str] = (),
    merging: bool = True,
) -> Step[A]:
    """Say how a conflict is resolved: the parts that collide are as one side has them, all else is merged.

    Without a conflict, and of two different sessions, that side is taken whole.
    """
    wanted, other = (here, there) if keep == "local" else (there, here)
    natural = plan(base, here, there, removed=removed, merging=merging)
    sides = sides_of(here, there)
    if natural.state is SyncState.CONFLICT:
        step = plan(base, here, there, removed=removed, prefer=keep)
        if step.state is not SyncState.CONFLICT:
            return step._replace(keep=sides, reason="resolved")
    if wanted is None:
        if other is None:
            return Step(None, Act.FORGET)
        return Step(None, Act.DELETE_THERE if keep == "local" else Act.DELETE_HERE, keep=sides, reason="resolved")
    if other is not None and other.digest == wanted.digest:
        return Step(SyncState.SYNCED, Act.ADOPT)
    step = Step(SyncState.LOCAL_AHEAD, Act.INSTALL, wanted, keep=sides, reason="resolved")
    return step._replace(write_here=keep == "remote", write_there=keep == "local")


def sides_of(here: object, there: object) -> tuple[SideName, ...]:
    """Return the sides where there is a version."""
    return (*_HERE[: here is not None], *_THERE[: there is not None])


def sent_turns(mine: Digests, base: Digests | None, there: Digests | None) -> list[Entry]:
    """Return the turns that sending a version brings: those that neither the base nor the shared store has."""
    known = Counter[Entry]()
    for parts in (base, there):
        if parts is not None:
            known |= Counter(parts.lists.get(_TURNS, []))
    return [*(Counter(mine.lists[_TURNS]) - known).elements()]


def caught_up(base: Base | None, pending: Pending | None, there: VersionThere[A], *, revision: int = 0) -> Base | None:
    """Return the base, knowing that a version was sent and may have arrived.

    A save is atomic: if the shared store has all turns of it, it had arrived, and all that was here then is common.
    So it is if the revision that it got is known, and what is there is not older. Else each part that is there exactly
    as it was sent is.

    Args:
        base: what was last common.
        pending: what was sent.
        there: the shared store's version.
        revision: of that version; 0: it is not known.

    """
    if pending is None or pending.mine is None or not isinstance(there, Side):
        return base
    if 0 < pending.revision <= revision:
        return Base(pending.mine, content_digest(pending.mine))
    if there.digest == pending.over or (base is not None and there.digest == base.digest):
        return base
    # Without a base others may have had these turns, too: of a folder that was copied, or of a store that was wiped.
    if there.digest == pending.digest or (base is not None and _has_turns(there.parts, pending.sent, base)):
        parts = pending.mine
    elif base is None and pending.mine.values.get(_CREATED) != there.parts.values.get(_CREATED):
        return None
    else:
        parts = settled(Digests() if base is None else base.parts, pending.mine, there.parts)
    return Base(parts, content_digest(parts))


def _has_turns(parts: Digests, sent: list[Entry], base: Base) -> bool:
    """Whether all turns that were sent are there, as they were sent; or edited since, if they can only come from that.

    The id of such a turn is no other turn's, and it was new: of one that was edited here, what is there may be older.
    """
    theirs = parts.lists[_TURNS]
    lacking = Counter(sent) - Counter(theirs)
    new = {key for key, _ in theirs} - {key for key, _ in base.parts.lists.get(_TURNS, [])}
    return bool(sent) and all(key in new and _is_random(key) for key, _ in lacking)


class Standing(NamedTuple):
    """How a session stands by what is known without reading it, and whether it counts as pending."""

    state: SyncState | None
    upload: bool = False
    download: bool = False

    @property
    def is_conflict(self) -> bool:
        """Whether someone has to decide."""
        return self.state is SyncState.CONFLICT


def standing(*, based: bool, here: Literal["", "same", "changed"], there: Literal["", "same", "changed"]) -> Standing:
    """Say how a session stands.

    Args:
        based: whether there was something common.
        here: how the file's version compares to that; "": there is none.
        there: the same of the shared store's.

    """
    if not based:
        if here and there:
            return Standing(SyncState.LOCAL_AHEAD, upload=True, download=True)
        if here:
            return Standing(SyncState.LOCAL_ONLY, upload=True)
        return Standing(SyncState.REMOTE_AHEAD, download=True) if there else Standing(None)
    match here, there:
        case "", "":
            return Standing(None)
        case "", "same":
            return Standing(None, upload=True)
        case "", _:
            return Standing(SyncState.REMOTE_AHEAD, download=True)
        case "same", "same":
            return Standing(SyncState.SYNCED)
        case "same", _:
            return Standing(SyncState.REMOTE_AHEAD, download=True)
        case _, "changed":
            return Standing(SyncState.LOCAL_AHEAD, upload=True, download=True)
    return Standing(SyncState.LOCAL_AHEAD, upload=True)
