"""Messages of pydantic-ai, as JSON: one, or a list of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from .text import Fields, Projection, called, joined, list_of, map_of, media, ms_of, returned, tagged, text_of, texts_of

__all__ = ["project"]

_KINDS: Final = {"request", "response"}


def project(item: Any) -> Projection | None:
    """Return what messages say; None if there are none. Role and time are the first one's."""
    messages = item if isinstance(item, list) else [item]
    if not messages or any(map_of(message).get("kind") not in _KINDS for message in messages):
        return None
    first = messages[0]
    parts = list_of(first.get("parts"))
    times = [first.get("timestamp"), *(part.get("timestamp") for part in parts)]
    known = (ms for time in times if (ms := ms_of(time)) is not None)
    return Projection(joined(map(_message, messages)), _role(first, parts), timestamp_ms=next(known, None))


def _role(message: Fields, parts: list[Fields]) -> str:
    if message["kind"] == "response":
        return "assistant"
    kinds = {text_of(part.get("part_kind")) for part in parts}
    if kinds & {"user-prompt", "speech", "retry-feedback"}:
        return "user"
    return "tool" if any(kind.endswith("tool-return") or kind == "retry-prompt" for kind in kinds) else "system"


def _message(message: Fields) -> str:
    parts = [_part(part) for part in list_of(message.get("parts"))]
    instructions = message.get("instructions")
    # They are the same in each request of a run, and so shown only where there is nothing else.
    return joined(parts) or tagged("instructions" if instructions else text_of(message["kind"]), instructions)


def _part(part: Fields) -> str:
    kind = text_of(part.get("part_kind"))
    return _PARTS[kind](part) if kind in _PARTS else f"[{kind}]" if kind else ""


def _content(content: object) -> str:
    """Return what a user or a tool gave: text, a list of texts and files, or any value."""
    if isinstance(content, list):
        return joined(map(_content, content))
    return _file(content) if isinstance(content, dict) and "kind" in content else text_of(content)


def _file(file: Fields) -> str:
    kind = text_of(file["kind"])
    if kind in ("text-content", "structured-content"):
        return text_of(file.get("content"))
    if kind == "cache-point":
        return ""
    if kind.endswith("-url"):
        return media(kind.removesuffix("-url"), file.get("url"))
    if kind in ("binary", "uploaded-file"):
        return media("file", file.get("file_id"), file.get("media_type"))
    return text_of(file)


def _returned(part: Fields) -> str:
    failed = part.get("outcome") not in (None, "success", "retried")
    return returned(part.get("tool_name"), _content(part.get("content")), failed)


def _retry(part: Fields) -> str:
    tool = part.get("tool_name")
    return tagged(f"retry {text_of(tool)}" if tool else "retry", part.get("content"))


def _called(part: Fields) -> str:
    return called(part.get("tool_name"), part.get("args"))


def _speech(part: Fields) -> str:
    return text_of(part.get("transcript")) or media("audio", map_of(part.get("audio")).get("media_type"))


_PARTS: Final[dict[str, Callable[[Fields], str]]] = {
    "system-prompt": lambda part: text_of(part.get("content")),
    "user-prompt": lambda part: _content(part.get("content")),
    "tool-return": _returned,
    "builtin-tool-return": _returned,
    "retry-prompt": _retry,
    "retry-feedback": _retry,
    "instruction-delta": lambda part: tagged("instructions", part.get("content")),
    "instruction-baseline": lambda part: tagged("instructions", texts_of(_contents(part.get("instructions")))),
    "tool-availability-delta": lambda part: tagged("tools", texts_of(part.get("tools_added") or part.get("added"))),
    "capability-load-delta": lambda part: tagged("capabilities", texts_of(part.get("loaded"))),
    "model-settings-delta": lambda part: tagged("settings", part.get("settings")),
    "text": lambda part: text_of(part.get("content")),
    "thinking": lambda part: tagged("thinking", part.get("content") or "(encrypted)"),
    "compaction": lambda part: tagged("summary", part.get("content") or "(encrypted)"),
    "file": lambda part: _content(part.get("content")),
    "speech": _speech,
    "tool-call": _called,
    "builtin-tool-call": _called,
}


def _contents(parts: object) -> list[Any]:
    return [part["content"] for part in list_of(parts) if part.get("content")]
