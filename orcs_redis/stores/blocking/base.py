# Made from ../base.py: change that one, then run `python tools/unasync.py`.
"""What every store can do."""

from __future__ import annotations

import builtins
from typing import Protocol, TypeVar, Unpack

from ...model.asset import SessionAsset
from ...model.filters import FilterArguments
from ...model.meta import SessionMeta, SyncStatus

__all__ = ["SessionStore"]

A = TypeVar("A", bound=SessionAsset)


class SessionStore(Protocol[A]):
    """What every blocking store can do. Each method may raise a StorageError."""

    def save(self, asset: A) -> int:
        """Store the whole asset, overwriting one of the same id; return its revision."""
        ...

    def load(self, id: str) -> A:
        """Read a session; NotFoundError if it is absent."""
        ...

    def list(self, *, limit: int | None = None, **filters: Unpack[FilterArguments]) -> builtins.list[SessionMeta]:
        """List sessions, the last updated first; so many at most, and only those of which all that is given holds."""
        ...

    def count(self, **filters: Unpack[FilterArguments]) -> int:
        """Return the number of sessions of which all that is given holds."""
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
