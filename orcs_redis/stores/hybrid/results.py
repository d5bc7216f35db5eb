"""What a hybrid store returns: what a sync did, what is in conflict, what is kept."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeAlias, TypeVar

from msgspec import Struct, field

from ...errors import StorageError
from ...model.asset import SessionAsset

__all__ = ["Conflict", "Kept", "SideName", "SyncReport"]

A = TypeVar("A", bound=SessionAsset)
SideName: TypeAlias = Literal["here", "there"]


class SyncReport(Struct):
    """What a sync did; each list has ids in order. A session is in one of the first five at most."""

    uploaded: list[str] = field(default_factory=list)
    """Written to the shared store as they are here."""

    downloaded: list[str] = field(default_factory=list)
    """Written here as they are in the shared store."""

    merged: list[str] = field(default_factory=list)
    """Changed on both sides; both have the merge now."""

    deleted: list[str] = field(default_factory=list)
    """Deleted on one side, and now on the other."""

    revived: list[str] = field(default_factory=list)
    """Deleted on one side but edited on the other, so that both have it again."""

    conflicts: list[str] = field(default_factory=list)
    """In conflict after the sync, also those that were before; `resolve` ends it."""

    failed: list[tuple[str, StorageError]] = field(default_factory=list)
    """What could not be synced, and why; the next sync tries again."""

    kept: list[Path] = field(default_factory=list)
    """Copies of what was overwritten or deleted here, or lost to what is here."""


class Conflict(NamedTuple, Generic[A]):
    """A session that both sides have changed so that no merge is possible."""

    id: str
    parts: list[str]
    """What both changed differently, such as ``metadata.title``; empty if it is all or nothing."""
    reason: str
    """Why there is no merge, in words."""
    local: A | None
    """The session in the folder; None if it is deleted or can't be read."""
    remote: A | None
    """The session in the shared store; None if it is deleted or can't be read."""


class Kept(NamedTuple):
    """A copy of a session as it was, kept for some time after it was overwritten or deleted."""

    id: str
    side: SideName
    """Where it was: in the folder, or in the shared store."""
    at: datetime
    """When it was kept, in UTC by this machine's clock."""
    why: str
    path: Path
