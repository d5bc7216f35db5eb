"""The store of orcs' own files."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, Unpack, cast, overload

from ..model.asset import SessionAsset
from ..model.filters import FilterArguments, Filters, check_limit
from ..model.meta import SessionMeta, SyncStatus
from ..transport.driver import Workers
from .disk import AnyPath
from .folder import Folder, Unreadable

__all__ = ["LocalFileStore"]

A = TypeVar("A", bound=SessionAsset)
_DEFAULT_FOLDER = "~/.orcs/sessions"


class LocalFileStore(Generic[A]):
    """Sessions as orcs' files in a folder, for tasks and processes at once; what touches the files runs in threads.

    A file is written beside the old one, synced and renamed over it: a reader sees one or the other whole.
    """

    @overload
    def __init__(self: LocalFileStore[SessionAsset], path: AnyPath = ..., *, asset_type: None = None) -> None: ...
    @overload
    def __init__(self, path: AnyPath = ..., *, asset_type: type[A]) -> None: ...
    def __init__(self, path: AnyPath = _DEFAULT_FOLDER, *, asset_type: type[Any] | None = None) -> None:
        self._folder = Folder(path, cast(type[A], asset_type or SessionAsset))
        self._workers = Workers(16, "orcs-redis-files")

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder.path

    async def save(self, asset: A) -> int:
        """Store the whole asset, overwriting one of the same id; return the file's modification time in ns.

        Raises:
            OutcomeUnknownError: it is written, but may not survive a power failure.

        """
        encoded = self._folder.encode(asset)  # here, lest another task changes the asset meanwhile
        return await self._workers.call(self._folder.write, *encoded)

    async def load(self, id: str) -> A:
        """Read a session; NotFoundError if it is absent."""
        return await self._workers.call(self._folder.load, id)

    async def list(self, *, limit: int | None = None, **filters: Unpack[FilterArguments]) -> builtins.list[SessionMeta]:
        """List the sessions that can be read, the last updated first; `unreadable` has the others. Reads every file.

        Args:
            limit: so many at most.
            filters: project_path, updated_after, updated_before, labels: only those of which all that is given holds.

        """
        limit = None if limit is None else check_limit(limit)
        return (await self._workers.call(self._folder.list, Filters(**filters)))[:limit]

    async def count(self, **filters: Unpack[FilterArguments]) -> int:
        """Return the number of sessions that `list` has. Reads every file."""
        return len(await self._workers.call(self._folder.list, Filters(**filters)))

    async def delete(self, id: str) -> None:
        """Delete a session; NotFoundError if it is absent."""
        await self._workers.call(self._folder.delete, id)

    async def exists(self, id: str) -> bool:
        """Return whether there is such a session."""
        return await self._workers.call(self._folder.exists, id)

    def sync_status(self) -> SyncStatus:
        """Return that there is no server."""
        return SyncStatus.offline()

    def unreadable(self) -> builtins.list[Unreadable]:
        """Return the files that the last `list` could not read."""
        return builtins.list(self._folder.unreadable)

    async def aclose(self) -> None:
        """Keep neither files open nor threads; the store can be used all the same."""
        self._workers.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
