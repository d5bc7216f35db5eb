"""How a fault is planted: an edit of a script, or a patch of the package."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

from .lua import Edit

__all__ = ["Plant", "after", "before", "changes_script", "lease_script", "replaced", "write"]

Patch = Callable[[], contextlib.AbstractContextManager[Any]]


class Plant(NamedTuple):
    """A fault: an edit of a script, or a patch of the package; and where it is surely caught."""

    name: str
    breaks: str  # the rule of the protocol
    profile: str
    schedules: int
    edit: Edit | None = None
    patch: Patch = contextlib.nullcontext

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """Have the package's fault for as long as the block lasts; a script's is planted by the world."""
        with self.patch():
            yield


def write(name: str, breaks: str, profile: str, schedules: int, old: str, new: str) -> Plant:
    return Plant(name, breaks, profile, schedules, Edit("WRITE", old, new))


def lease_script(name: str, breaks: str, profile: str, schedules: int, old: str, new: str) -> Plant:
    return Plant(name, breaks, profile, schedules, Edit("LEASE", old, new))


def changes_script(name: str, breaks: str, profile: str, schedules: int, old: str, new: str) -> Plant:
    return Plant(name, breaks, profile, schedules, Edit("CHANGES", old, new))


def replaced(target: Any, name: str, make: Callable[[Any], Any]) -> Patch:
    """Return a patch: the attribute is what `make` makes of it."""
    return lambda: mock.patch.object(target, name, make(getattr(target, name)))


def after(target: Any, name: str, then: Callable[..., Any]) -> Patch:
    """Return a patch: when the method has run, `then` is called with its result and its arguments."""

    def make(original: Any) -> Any:
        def method(*arguments: Any) -> Any:
            result = original(*arguments)
            then(result, *arguments)
            return result

        return method

    return replaced(target, name, make)


def before(target: Any, name: str, first: Callable[..., Any]) -> Patch:
    """Return a patch: before the method runs, `first` is called with its arguments."""

    def make(original: Any) -> Any:
        def method(*arguments: Any) -> Any:
            first(*arguments)
            return original(*arguments)

        return method

    return replaced(target, name, make)
