"""What the plans of a hybrid store yield: things to be done here, in the folder, and there, in the shared store.

Between two of them nothing lasting happens, so a plan can be stopped at each: that is how tests kill it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from ...protocol.request import Pause
from ...protocol.request import Plan as RedisPlan

__all__ = ["Connect", "Each", "Here", "Listen", "Pause", "Plan", "RedisPlan", "Step", "There"]

T = TypeVar("T")


class Here(NamedTuple):
    """A blocking call in the folder. In asyncio it runs in a thread."""

    call: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


class There(NamedTuple):
    """A plan of the Redis store's."""

    make: Callable[..., RedisPlan[Any]]
    arguments: tuple[Any, ...] = ()


class Each(NamedTuple):
    """A plan of the Redis store's for each item. Sent is the list of results, of which some may be StorageErrors."""

    make: Callable[[Any], RedisPlan[Any]]
    items: Sequence[Any]


class Connect(NamedTuple):
    """Open the Redis store, if it is not open; `anew`: take its namespace as it is now. Sent is a `Shared`."""

    anew: bool = False


class Listen(NamedTuple):
    """Listen to channels. Sent is how to end that."""

    listeners: dict[str, Any]


Step: TypeAlias = Here | There | Each | Connect | Listen | Pause
Plan: TypeAlias = Generator[Step, Any, T]
