"""The options of a store, checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypedDict, TypeVar

from ..model.asset import SessionAsset
from ..protocol.keys import MAX_PARTITIONS, check_namespace
from ..transport.address import Address, Credentials, EmbeddedFolder, FileFolder, MemoryName, Target, resolve
from .hybrid.results import SyncReport

__all__ = ["HybridArguments", "OptionArguments", "Options", "check_arguments"]

A = TypeVar("A", bound=SessionAsset)


@dataclass(frozen=True, kw_only=True)
class Options(Generic[A]):
    """The options of a Redis store, checked."""

    asset_type: type[A]
    namespace: str = "orcs"
    partitions: int | None = None
    deadline: float = 5.0
    heartbeat: float = 5.0
    max_asset_bytes: int = 128 * 1024 * 1024
    max_turn_bytes: int = 16 * 1024 * 1024
    max_fields: int = 1000
    max_connections: int = 64
    credentials: Credentials | None = None

    def __post_init__(self) -> None:
        check_namespace(self.namespace)
        if not (isinstance(self.asset_type, type) and issubclass(self.asset_type, SessionAsset)):
            raise ValueError("asset_type is SessionAsset or a subclass of it")
        if self.partitions is not None and (
            type(self.partitions) is not int or not 1 <= self.partitions <= MAX_PARTITIONS
        ):
            raise ValueError(f"partitions is 1 to {MAX_PARTITIONS}")
        if type(self.max_connections) is not int or self.max_connections < 1:
            raise ValueError("max_connections is 1 or more")
        for name in ("deadline", "heartbeat", "max_asset_bytes", "max_turn_bytes", "max_fields"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < 2**31:
                raise ValueError(f"{name} is a number more than 0, below 2**31")
        if max(self.max_asset_bytes, self.max_turn_bytes) > 400 * 1024 * 1024:
            raise ValueError("a value in Redis has 512 MB at most: the limits end at 400 MiB")
        if self.max_fields > 3500:
            raise ValueError("max_fields is 3500 at most: a script in Redis can't pass on more at once")
        if self.credentials is not None and not callable(self.credentials):
            raise TypeError("credentials is a callable that returns a user name and a password")


class OptionArguments(TypedDict, total=False):
    """The options as `open_store` and `connect` take them; asset_type is apart, since it types the store."""

    namespace: str
    partitions: int | None
    deadline: float
    heartbeat: float
    max_asset_bytes: int
    max_turn_bytes: int
    max_fields: int
    max_connections: int
    credentials: Credentials | None


class HybridArguments(OptionArguments, total=False):
    """The options of a hybrid store, beside asset_type."""

    live: bool
    merge: bool
    prefer: Literal["local", "remote"] | None
    keep_days: float
    scan: float
    on_sync: Callable[[SyncReport], object] | None


# By target, the options that mean nothing there.
_INAPPLICABLE: dict[object, frozenset[str]] = {
    None: frozenset({"credentials"}),  # the caller's client
    MemoryName: frozenset({"credentials"}),
    EmbeddedFolder: frozenset({"credentials"}),
    FileFolder: frozenset(OptionArguments.__optional_keys__),
}


def check_arguments(
    function: str, url: str | os.PathLike[str] | None, client: object, arguments: Mapping[str, Any]
) -> tuple[Options[Any], Target | None]:
    """Check the arguments of a public function that opens a store.

    Returns:
        The options, and what the URL means; None: a client was given.

    Raises:
        TypeError: an option that this kind of store doesn't have.
        ValueError: a URL or value that can't be.

    """
    target: Target | None = None
    if client is None:
        target = FileFolder(Path(url)) if isinstance(url, os.PathLike) else resolve(url)
    elif url is not None:
        raise ValueError("a store takes a URL or a client, not both")
    for name in arguments:
        if name != "asset_type" and name not in OptionArguments.__optional_keys__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        if name in _INAPPLICABLE.get(target and type(target), ()):
            raise TypeError(f"{function}(): this kind of store has no option {name!r}")
    options: Options[Any] = Options(**{"asset_type": SessionAsset, **arguments})
    if isinstance(target, Address) and options.credentials is not None:
        if target.username is not None:
            raise ValueError("a store takes user name and password from its URL or from credentials, not from both")
        target = replace(target, credentials=options.credentials)
    return options, target
