"""A store's plans: what it can do, once it is open. Nothing here waits."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from ..errors import UnavailableError
from ..model.asset import SessionAsset
from ..protocol.changes import Changes
from ..protocol.codec import Codec
from ..protocol.leases import Leases
from ..protocol.lists import Lists
from ..protocol.namespace import open_namespace
from ..protocol.records import Records
from ..protocol.request import Plan
from ..protocol.saving import Saving
from ..protocol.sessions import Sessions
from ..transport.address import FileFolder, Target
from ..transport.lifecycle import Lifecycle
from ..transport.opening import ConnectionSpec
from .options import Options

__all__ = ["Core"]

A = TypeVar("A", bound=SessionAsset)
T = TypeVar("T")


class Core(Generic[A]):
    """What a store knows beside its driver."""

    def __init__(self, options: Options[A]) -> None:
        self.options = options
        self.lifecycle = Lifecycle(options.deadline)
        self._sessions: Sessions[A] | None = None
        self._saving: Saving[A] | None = None
        self._lists: Lists | None = None
        self._records: Records | None = None
        self._leases: Leases | None = None
        self._changes: Changes | None = None

    @property
    def sessions(self) -> Sessions[A]:
        """What the store can do, once it is open."""
        return _opened(self._sessions)

    @property
    def saving(self) -> Saving[A]:
        """What the store can do with whole assets, once it is open."""
        return _opened(self._saving)

    @property
    def lists(self) -> Lists:
        """What there is to ask about many sessions, once it is open."""
        return _opened(self._lists)

    @property
    def records(self) -> Records:
        """What there is to ask about a session's records, once it is open."""
        return _opened(self._records)

    @property
    def leases(self) -> Leases:
        """What there is to ask about leases, once it is open."""
        return _opened(self._leases)

    @property
    def changes(self) -> Changes:
        """What there is to ask about changes, once it is open."""
        return _opened(self._changes)

    def connection_spec(self, target: Target | None, client: Any) -> ConnectionSpec:
        """Return what is to be reached, and how; ValueError if it is no server."""
        if isinstance(target, FileFolder):
            raise ValueError("file: is a LocalFileStore's: use open_store")
        options = self.options
        return ConnectionSpec(
            target, client, options.deadline, options.heartbeat, options.max_connections, self._on_connect
        )

    def _on_connect(self) -> None:
        """Note that a connection was opened: a process that was cloned since must not go on as its twin does."""
        if self._sessions is not None:
            self._sessions.begin_epoch()

    def open(self) -> Plan[None]:
        """Look for the namespace, and find out whether writing is allowed; what was known before is forgotten."""
        options = self.options
        namespace, denied = yield from open_namespace(options.namespace, options.partitions)
        codec = Codec(options.asset_type, options.max_asset_bytes, options.max_turn_bytes, options.max_fields)
        if denied is not None:
            self.lifecycle.deny(denied)
        self._sessions = Sessions(namespace, codec)
        self._saving = Saving(namespace, codec)
        self._lists = Lists(namespace)
        self._records = Records(namespace)
        self._leases = Leases(namespace)
        self._changes = Changes(namespace, options.heartbeat)
        self.lifecycle.namespace = namespace


def _opened(part: T | None) -> T:
    if part is None:
        raise UnavailableError("the store is not connected")
    return part
