"""What a list holds of sessions, and the state of synchronisation."""

from __future__ import annotations

import builtins
from datetime import UTC, datetime
from enum import Enum
from typing import Generic, NamedTuple, Self, TypeVar

from msgspec import Struct, field

from .asset import SessionAsset
from .labels import labels_of

__all__ = [
    "Committed",
    "Page",
    "SessionMeta",
    "SyncMode",
    "SyncState",
    "SyncStatus",
    "Versioned",
]

T = TypeVar("T")
A = TypeVar("A", bound=SessionAsset)


class SyncState(Enum):
    """How a session here stands to the one in the other store."""

    LOCAL_ONLY = "LocalOnly"
    SYNCED = "Synced"
    LOCAL_AHEAD = "LocalAhead"
    REMOTE_AHEAD = "RemoteAhead"
    CONFLICT = "Conflict"

    def is_synced(self) -> bool:
        """Whether both are the same."""
        return self is SyncState.SYNCED

    def has_pending_changes(self) -> bool:
        """Whether one is ahead of the other."""
        return self in (SyncState.LOCAL_AHEAD, SyncState.REMOTE_AHEAD)

    def has_conflict(self) -> bool:
        """Whether both were changed."""
        return self is SyncState.CONFLICT


class SyncMode(Enum):
    """Whether a store reaches its server."""

    OFFLINE = "Offline"
    ONLINE = "Online"
    SYNCING = "Syncing"
    ERROR = "Error"


class SyncStatus(Struct, frozen=True):
    """How a store stands to its server; ``conflicts`` are ids of sessions."""

    mode: SyncMode = SyncMode.OFFLINE
    last_sync: datetime | None = None
    pending_uploads: int = 0
    pending_downloads: int = 0
    conflicts: list[str] = field(default_factory=list)

    @classmethod
    def offline(cls) -> Self:
        """Make the status of a store without a server."""
        return cls()

    @classmethod
    def online(cls) -> Self:
        """Make the status of a store that reached its server just now."""
        return cls(mode=SyncMode.ONLINE, last_sync=datetime.now(UTC))

    def is_fully_synced(self) -> bool:
        """Whether the server is reached and nothing is pending or in conflict."""
        pending = self.pending_uploads or self.pending_downloads or self.conflicts
        return self.mode is SyncMode.ONLINE and not pending


class SessionMeta(Struct, frozen=True):
    """A session's line in a list; times are aware, in UTC.

    ``updated_at`` is when the conversation moved, ``written_at`` when anything of the session was last written, by the
    server's clock; of a file, when it was last modified.
    """

    id: str
    name: str | None
    created_at: datetime
    updated_at: datetime
    project_path: str | None
    turn_count: int
    written_at: datetime
    sync_state: SyncState = SyncState.LOCAL_ONLY
    revision: int = 0
    labels: dict[str, str] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.id, self.revision))  # without the labels, which have none

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("id", self.id), ("turns", self.turn_count), ("revision", self.revision)]

    def __repr__(self) -> str:
        return f"SessionMeta(id={self.id!r}, turns={self.turn_count}, revision={self.revision})"

    @classmethod
    def from_asset(cls, asset: SessionAsset, revision: int = 0, written_at: datetime | None = None) -> Self:
        """Make the metadata of a session; one that was never written has the time of its last update for both."""
        return cls(
            id=asset.id,
            name=asset.project_context.name,
            created_at=asset.created_at,
            updated_at=asset.updated_at,
            project_path=asset.project_context.root_path,
            turn_count=len(asset.history),
            written_at=written_at or asset.updated_at,
            revision=revision,
            labels=labels_of(asset),
        )


class Versioned(NamedTuple, Generic[A]):
    """An asset and the revision that it was read at."""

    asset: A
    revision: int


class Committed(NamedTuple):
    """What a commit came to.

    Attributes:
        revision: the session's new one.
        created: whether the commit made the session.
        placed: of each key of `put_new`, whether it was put: there was no such record.

    """

    revision: int
    created: bool
    placed: dict[str, bool]


class Page(NamedTuple, Generic[T]):
    """Part of a list, and the cursor of the next part (None: there is no more)."""

    items: builtins.list[T]
    cursor: str | None
