"""Which sessions a list is to have."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TypedDict

from .encoding import utf8_of
from .labels import check_labels
from .meta import SessionMeta

__all__ = ["FilterArguments", "Filters", "check_limit"]


class FilterArguments(TypedDict, total=False):
    """Which sessions: those of which all that is given holds."""

    project_path: str | None
    """Of this project: `project_context.root_path`, exactly."""
    updated_after: datetime | None
    """Updated then or later. Aware, else ValueError."""
    updated_before: datetime | None
    """Updated before that. Aware, else ValueError."""
    labels: Mapping[str, str] | None
    """With all of these labels."""


class Filters:
    """The same, checked; ValueError for what can't be, TypeError for what is none of them."""

    __slots__ = ("labels", "project_path", "updated_after", "updated_before")

    def __init__(
        self,
        project_path: str | None = None,
        updated_after: datetime | None = None,
        updated_before: datetime | None = None,
        labels: Mapping[str, str] | None = None,
        **others: object,
    ) -> None:
        for name in others:
            raise TypeError(f"there is no filter {name}")
        for moment in (updated_after, updated_before):
            if moment is not None and (not isinstance(moment, datetime) or moment.utcoffset() is None):
                raise ValueError("a datetime with a time zone is needed")
        if project_path is not None:
            utf8_of(project_path, "a project's path")
        self.project_path = project_path
        self.updated_after = updated_after
        self.updated_before = updated_before
        self.labels = {} if labels is None else check_labels(labels)

    def match(self, meta: SessionMeta) -> bool:
        """Whether all of them hold."""
        return (
            self.project_path in (None, meta.project_path)
            and (self.updated_after is None or meta.updated_at >= self.updated_after)
            and (self.updated_before is None or meta.updated_at < self.updated_before)
            and self.labels.items() <= meta.labels.items()
        )


def check_limit(limit: int, least: int = 0) -> int:
    """Return a number of items, or raise ValueError."""
    if type(limit) is not int or limit < least:
        raise ValueError(f"limit is {least} or more")
    return min(limit, 2**53)
