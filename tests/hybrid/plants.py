"""Planted faults: one for each rule. A judge that does not catch one judges nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["PLANTS", "Plant"]

Patch = Callable[[], contextlib.AbstractContextManager[Any]]


class Plant(NamedTuple):
    """A fault, and within how many runs it is surely caught."""

    name: str
    breaks: str  # the rule
    runs: int
    patch: Patch


PLANTS: dict[str, Plant] = {}
