"""Labels: what a session's metadata says of it for lists to find it by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeGuard

from .asset import SessionAsset

__all__ = ["MAX_LABELS", "MAX_LABEL_BYTES", "check_labels", "labels_of", "valid_labels"]

MAX_LABELS: Final = 8
MAX_LABEL_BYTES: Final = 200
"""Of a name, and of a value, in UTF-8. Neither is empty."""


def labels_of(asset: SessionAsset) -> dict[str, str]:
    """Return a session's labels in the order of their names' bytes: `metadata["labels"]`, if it can be labels."""
    labels = asset.metadata.get("labels")
    return dict(sorted(labels.items())) if valid_labels(labels) else {}


def valid_labels(value: object) -> TypeGuard[Mapping[str, str]]:
    """Whether it is a map of at most 8 names to strings, each of 1 to 200 bytes of UTF-8."""
    return (
        isinstance(value, Mapping)
        and len(value) <= MAX_LABELS
        and all(_is_text(name) and _is_text(text) for name, text in value.items())
    )


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return a copy, or raise ValueError if these are no labels."""
    if not valid_labels(labels):
        raise ValueError(
            f"labels are a map of at most {MAX_LABELS} names to strings, each of 1 to {MAX_LABEL_BYTES} bytes of UTF-8"
        )
    return dict(labels)


def _is_text(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return 0 < len(value.encode()) <= MAX_LABEL_BYTES
    except UnicodeEncodeError:
        return False
