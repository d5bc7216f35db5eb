"""What a list holds of sessions, the state of synchronisation, and what every store can do."""

from __future__ import annotations

import builtins
from datetime import UTC, datetime
from enum import Enum
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

from msgspec import Struct, field

from .asset import SessionAsset

__all__ = [
    "BlockingSessionStore",
    "Page",
    "SessionMeta",
    "SessionStore",
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
    """A session's line in a list; times are aware, in UTC."""

    id: str
    name: str | None
    created_at: datetime
    updated_at: datetime
    project_path: str | None
    turn_count: int
    sync_state: SyncState = SyncState.LOCAL_ONLY
    revision: int = 0

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("id", self.id), ("turns", self.turn_count), ("revision", self.revision)]

    def __repr__(self) -> str:
        return f"SessionMeta(id={self.id!r}, turns={self.turn_count}, revision={self.revision})"

    @classmethod
    def from_asset(cls, asset: SessionAsset, revision: int = 0) -> Self:
        """Make the metadata of a session."""
        return cls(
            id=asset.id,
            name=asset.project_context.name,
            created_at=asset.created_at,
            updated_at=asset.updated_at,
            project_path=asset.project_context.root_path,
            turn_count=len(asset.history),
            revision=revision,
        )


class Versioned(NamedTuple, Generic[A]):
    """An asset and the revision that it was read at."""

    asset: A
    revision: int


class Page(NamedTuple, Generic[T]):
    """Part of a list, and the cursor of the next part (None: there is no more)."""

    items: builtins.list[T]
    cursor: str | None


class SessionStore(Protocol[A]):
    """What every asyncio store can do. Each method may raise a StorageError."""

    async def save(self, asset: A) -> int:
        """Store the whole asset, overwriting one of the same id; return its revision."""
        ...

    async def load(self, id: str) -> A:
        """Read a session; NotFoundError if it is absent."""
        ...

    async def list(self) -> builtins.list[SessionMeta]:
        """List all sessions, the last updated first."""
        ...

    async def delete(self, id: str) -> None:
        """Delete a session; NotFoundError if it is absent."""
        ...

    async def exists(self, id: str) -> bool:
        """Return whether there is such a session."""
        ...

    def sync_status(self) -> SyncStatus:
        """Return how the store stands with its server, at once, without I/O."""
        ...


class BlockingSessionStore(Protocol[A]):
    """What every blocking store can do. Each method may raise a StorageError."""

    def save(self, asset: A) -> int:
        """Store the whole asset, overwriting one of the same id; return its revision."""
        ...

    def load(self, id: str) -> A:
        """Read a session; NotFoundError if it is absent."""
        ...

    def list(self) -> builtins.list[SessionMeta]:
        """List all sessions, the last updated first."""
        ...

    def delete(self, id: str) -> None:
        """Delete a session; NotFoundError if it is absent."""
        ...

    def exists(self, id: str) -> bool:
        """Return whether there is such a session."""
        ...

    def sync_status(self) -> SyncStatus:
        """Return how the store stands with its server, at once, without I/O."""
        ...
