"""Raw items: what an agent framework keeps of a turn, as its own bytes, and how they are shown.

In a turn, `content` is derived from them. In Redis they are stored in its place; in orcs' JSON they are
`metadata["raw"]`, with a digest of the content that was derived:

    {"format": "openai-agents/1", "content_digest": "...", "json": "{...}"}      "base64" for what is no JSON

JSON stands there as text, not as a value: whoever writes the file anew may reorder a value's keys.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Callable
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final

import msgspec

from .encoding import attempt, named
from .projections import claude_agent_sdk, google_adk, openai_agents, pydantic_ai
from .projections.text import Projection
from .schema import FreeForm

__all__ = ["Projection", "RawItem", "content_of", "embedded", "extracted", "project", "raw_fault"]

_PROJECTIONS: Final[dict[str, Callable[[Any], Projection | None]]] = {
    "claude-agent-sdk/1": claude_agent_sdk.project,
    "google-adk/1": google_adk.project,
    "openai-agents/1": openai_agents.project,
    "pydantic-ai/1": pydantic_ai.project,
}
"""Of the items that are JSON, by format."""

_FORMAT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_MAX_FORMAT: Final = 100  # characters

_decode_json: Final = msgspec.json.Decoder().decode


class RawItem(msgspec.Struct, frozen=True, dict=True):
    """An agent framework's own item, as bytes that come back as they are.

    ``format`` is ``name/version``: letters, digits, dots, hyphens and underscores, at most 100 characters.

    Raises:
        TypeError: the format is no str, or the data no bytes.
        ValueError: the format is not of this form, or the data is empty.

    """

    format: str
    data: bytes

    def __post_init__(self) -> None:
        if type(self.format) is not str or type(self.data) is not bytes:
            raise TypeError("a raw item has a format, a str, and data, bytes")
        if len(self.format) > _MAX_FORMAT or not _FORMAT.fullmatch(self.format):
            raise ValueError(f"a raw item's format is name/version, not {named(self.format)!r}")
        if not self.data:
            raise ValueError("a raw item's data is empty")

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("format", self.format), ("size", len(self.data))]

    def __repr__(self) -> str:
        return f"RawItem(format={self.format!r}, size={len(self.data)})"

    @cached_property
    def projection(self) -> Projection | None:
        """What the item says; None if its format is not known, or it can't be read."""
        return project(self)


def project(raw: RawItem) -> Projection | None:
    """Return what an item says; None if its format is not known, or it can't be read."""
    show = _PROJECTIONS.get(raw.format)
    projection: Projection | None = show and attempt(lambda data: show(_decode_json(data)), raw.data)[0]
    return projection


def content_of(raw: RawItem, role: str) -> str:
    """Return the content of a turn with this item."""
    if raw.projection is not None:
        return raw.projection.content
    return f"[{named(str(role))}: {raw.format}, {len(raw.data)} bytes]"


def raw_fault(raw: object, role: str, content: str, metadata: FreeForm) -> tuple[str, str] | None:
    """Return what of a turn with a raw item would not come back: field and reason."""
    if type(raw) is not RawItem:
        return "raw", f"expected RawItem, got {type(raw).__name__}"
    if content and content != content_of(raw, role):
        return "content", 'with a raw item it is derived: leave it ""'
    if "raw" in metadata:
        return "metadata.raw", "the turn has a raw item, whose place in orcs' JSON this is"
    return None


def embedded(raw: RawItem, content: str) -> FreeForm:
    """Return a raw item as `metadata["raw"]` in orcs' JSON, of a turn with this content."""
    text, refusal = attempt(_json_text, raw.data)
    data = {"json": text} if refusal is None else {"base64": b64encode(raw.data).decode()}
    digest = blake2b(content.encode(), digest_size=8).hexdigest()
    return {"format": raw.format, "content_digest": digest, **data}


def extracted(value: object, content: str) -> RawItem | None:
    """Return the raw item in `metadata["raw"]`; None unless it is just what `embedded` made of it.

    So another content, edited by whoever reads the file, and what only looks alike stay what they are. The digest
    allows for a content that another version of the projection derived.
    """
    raw: RawItem | None = attempt(_extracted, value)[0] if isinstance(value, dict) else None
    return raw if raw is not None and embedded(raw, content) == value else None


def _extracted(value: FreeForm) -> RawItem:
    data = value["json"].encode() if "json" in value else b64decode(value.get("base64", ""), validate=True)
    return RawItem(value.get("format", ""), data)


def _json_text(data: bytes) -> str:
    _decode_json(data)
    return data.decode()
