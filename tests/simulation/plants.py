"""Planted faults: one for each rule of the protocol. A simulation that does not catch one checks nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .lua import Edit

__all__ = ["PLANTS", "Plant"]


class Plant(NamedTuple):
    """A fault: an edit of a script, or a patch of the package; and where it is surely caught."""

    name: str
    breaks: str  # the rule of the protocol
    profile: str
    schedules: int
    edit: Edit | None = None
    patch: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        with self.patch():
            yield


PLANTS: dict[str, Plant] = {}
