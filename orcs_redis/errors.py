"""Everything that goes wrong is a StorageError.

    StorageError
    ├── NotFoundError                   recoverable
    ├── ConflictError                   recoverable
    ├── LeaseHeldError                  recoverable
    ├── LeaseLostError
    ├── InvalidIdError                  (also a ValueError)
    ├── SerializationError
    ├── CorruptSessionError
    ├── VersionIncompatibleError
    ├── ChecksumMismatchError
    ├── PermissionDeniedError
    ├── UnavailableError                recoverable
    ├── OutcomeUnknownError             recoverable
    ├── StoreFullError
    ├── StoreResetError
    ├── LayoutError
    ├── UnsupportedServerError
    └── SyncStoppedError

Messages name sessions and fields, never what is in them; they end at 500 characters. All errors survive pickle and
copy: ``args`` are always the constructor's arguments.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

__all__ = [
    "ChecksumMismatchError",
    "ConflictError",
    "CorruptSessionError",
    "InvalidIdError",
    "LayoutError",
    "LeaseHeldError",
    "LeaseLostError",
    "NotFoundError",
    "OutcomeUnknownError",
    "PermissionDeniedError",
    "SerializationError",
    "StorageError",
    "StoreFullError",
    "StoreResetError",
    "SyncStoppedError",
    "UnavailableError",
    "UnsupportedServerError",
    "VersionIncompatibleError",
]

_MAX_TEXT: Final = 500  # characters of a message
_MAX_FIELD: Final = 300  # of a path in it


def _shortened(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + "…"


class StorageError(Exception):
    """The session store could not do what was asked."""

    _recoverable: ClassVar[bool] = False

    def __init__(self, *args: object) -> None:
        super().__init__(*(args or [(self.__doc__ or "").partition("\n")[0]]))

    def __str__(self) -> str:
        return _shortened(self._text(), _MAX_TEXT)

    def _text(self) -> str:
        return super().__str__()

    @property
    def is_recoverable(self) -> bool:
        """Whether the same call can succeed later, or after reloading, with nothing repaired."""
        return self._recoverable


class NotFoundError(StorageError):
    """There is no session of this id, or no turn ``turn_id`` in it."""

    _recoverable = True

    def __init__(self, id: str, turn_id: str | None = None) -> None:
        super().__init__(id, turn_id)
        self.id = id
        self.turn_id = turn_id

    def _text(self) -> str:
        if self.turn_id is None:
            return f"session not found: {self.id}"
        shown = self.turn_id if self.turn_id.isprintable() else ascii(self.turn_id)[1:-1]
        return f"session {self.id} has no turn {shown[:40]}"


class ConflictError(StorageError):
    """The session is at another revision than the caller expected (``actual`` 0: it is absent), or what it changes is.

    ``parts`` names what a save has changed and others have changed otherwise, such as ``metadata.title``,
    ``project_context.name``, ``turn/<id>``. It is empty if the session is gone or was made anew, if the turns of a
    partial asset were cut, and for `if_revision` and `if_last`.
    """

    _recoverable = True

    def __init__(self, id: str, expected: int, actual: int, parts: tuple[str, ...] = (), reason: str = "") -> None:
        super().__init__(id, expected, actual, parts, reason)
        self.id = id
        self.expected = expected
        self.actual = actual
        self.parts = parts
        self._reason = reason

    def _text(self) -> str:
        shown = ", ".join(part if len(part) <= 40 else f"{part[:39]}…" for part in self.parts[:5])
        why = f"others have changed {shown}" if self.parts else self._reason
        if not why:
            why = f"expected revision {self.expected}, found {self.actual}"
        else:
            why = f"{why} (it is at revision {self.actual})"
        text = f"conflict on session {self.id}: {why}"
        return text if text.isprintable() else ascii(text)[1:-1]


class LeaseHeldError(StorageError):
    """Another worker holds the session's lease, for ``remaining`` seconds more (None: unknown)."""

    _recoverable = True

    def __init__(self, id: str, remaining: float | None = None) -> None:
        super().__init__(id, remaining)
        self.id = id
        self.remaining = remaining

    def _text(self) -> str:
        more = "" if self.remaining is None else f", for {self.remaining:.3f} s more unless renewed"
        return f"the lease of session {self.id} is held by another worker{more}"


class LeaseLostError(StorageError):
    """The lease ended or passed to another worker."""

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self.id = id

    def _text(self) -> str:
        return f"the lease of session {self.id} is lost"


class InvalidIdError(StorageError, ValueError):
    """That can't be a session id."""


class SerializationError(StorageError):
    """The value of ``field`` (a dotted path) can't be stored so that it comes back equal."""

    def __init__(self, field: str, reason: str) -> None:
        field = _shortened(field, _MAX_FIELD)
        super().__init__(field, reason)
        self.field = field
        self.reason = reason

    def _text(self) -> str:
        return f"{self.field or 'value'} can't be encoded: {self.reason}"


class CorruptSessionError(StorageError):
    """What is stored for the session can't be decoded; ``field`` (a dotted path, may be empty) says where."""

    def __init__(self, id: str, field: str = "") -> None:
        field = _shortened(field, _MAX_FIELD)
        super().__init__(id, field)
        self.id = id
        self.field = field

    def _text(self) -> str:
        where = f" at {self.field}" if self.field else ""
        return f"session {self.id or '(unknown id)'} can't be decoded{where}"


class VersionIncompatibleError(StorageError):
    """The session was written in another version of the schema."""

    def __init__(self, found: int, supported: int) -> None:
        super().__init__(found, supported)
        self.found = found
        self.supported = supported

    def _text(self) -> str:
        return f"session version {self.found} is not supported (supported: {self.supported})"


class ChecksumMismatchError(StorageError):
    """What was read is not what was written."""

    def __init__(self, id: str, expected: str, actual: str) -> None:
        super().__init__(id, expected, actual)
        self.id = id
        self.expected = expected
        self.actual = actual

    def _text(self) -> str:
        return f"checksum mismatch for session {self.id}: expected {self.expected}, got {self.actual}"


class PermissionDeniedError(StorageError):
    """The server's ACL, the password or the file mode forbids it."""


class UnavailableError(StorageError):
    """Nothing could do it in time; a write was certainly not applied."""

    _recoverable = True


class OutcomeUnknownError(StorageError):
    """The write may have been applied: its answer was lost."""

    _recoverable = True


class StoreFullError(StorageError):
    """The store is out of space."""


class StoreResetError(StorageError):
    """The data was wiped or went back in time. `reopen` takes it as it is now."""


class LayoutError(StorageError):
    """The namespace has another layout version or number of partitions."""


class UnsupportedServerError(StorageError):
    """The server, or the folder's file system, lacks something that the store needs."""


class SyncStoppedError(StorageError):
    """All was synchronised but for ``deletions``: so many sessions are missing on one side that it may be a mistake.

    ``report`` is the SyncReport of what was done; None in a copy that was pickled.
    """

    def __init__(self, deletions: int) -> None:
        super().__init__(deletions)
        self.deletions = deletions
        self.report: Any = None

    def _text(self) -> str:
        return (
            f"{self.deletions} sessions are missing on one side, and are not deleted on the other without being asked"
        )
