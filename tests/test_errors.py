"""The error tree as a caller sees it."""

from __future__ import annotations

import copy
import pickle

import pytest

from orcs_redis import errors
from orcs_redis.errors import (
    ChecksumMismatchError,
    ConflictError,
    CorruptSessionError,
    InvalidIdError,
    LayoutError,
    LeaseHeldError,
    LeaseLostError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    SerializationError,
    StorageError,
    StoreFullError,
    StoreResetError,
    SyncStoppedError,
    UnavailableError,
    UnsupportedServerError,
    VersionIncompatibleError,
)

EXAMPLES = [
    StorageError(),
    NotFoundError("a"),
    ConflictError("a", 3, 4),
    LeaseHeldError("a", 1.5),
    LeaseHeldError("a"),
    LeaseLostError("a"),
    InvalidIdError("no"),
    SerializationError("metadata.x", "unsupported set"),
    CorruptSessionError("a", "history.turns[0].role"),
    CorruptSessionError("", ""),
    VersionIncompatibleError(2, 1),
    ChecksumMismatchError("a", "0", "1"),
    PermissionDeniedError(),
    UnavailableError("no server"),
    OutcomeUnknownError(),
    StoreFullError(),
    StoreResetError(),
    LayoutError("8 partitions, not 4"),
    UnsupportedServerError(),
    SyncStoppedError(12),
]
RECOVERABLE = {NotFoundError, ConflictError, LeaseHeldError, UnavailableError, OutcomeUnknownError}


def test_examples_are_complete() -> None:
    """Every public error is tried below."""
    assert {type(error).__name__ for error in EXAMPLES} == set(errors.__all__)


@pytest.mark.parametrize("error", EXAMPLES, ids=repr)
def test_survives_copies(error: StorageError) -> None:
    """Pickled and copied errors keep type, message and attributes."""
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert (str(twin), twin.args, vars(twin)) == (str(error), error.args, vars(error))


@pytest.mark.parametrize("error", EXAMPLES, ids=repr)
def test_is_recoverable(error: StorageError) -> None:
    """What a later attempt can cure is recoverable, all else is not."""
    assert error.is_recoverable is (type(error) in RECOVERABLE)


def test_messages() -> None:
    """Messages name what is concerned; without one, the docstring speaks."""
    assert str(NotFoundError("abc")) == "session not found: abc"
    assert str(StoreFullError()) == "The store is out of space."
    assert "history.x" in str(SerializationError("history.x", "unsupported set"))
    assert isinstance(InvalidIdError("x"), ValueError)


def test_texts_end() -> None:
    """No text has more than 500 characters, and no path more than 300."""
    for error in (StorageError("x" * 9999), UnavailableError("x" * 501), NotFoundError("x" * 9999)):
        assert len(str(error)) == 500
        assert str(error).endswith("x…")
    assert str(UnavailableError("x" * 500)) == "x" * 500
    for named in (SerializationError("x" * 9999, "y" * 9999), CorruptSessionError("a", "x" * 9999)):
        assert len(named.field) == 300
        assert len(str(named)) <= 500
