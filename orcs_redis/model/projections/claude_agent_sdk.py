"""Transcript entries of claude-agent-sdk, as JSON."""

from __future__ import annotations

from typing import Any, Final

from .text import Fields, Projection, called, joined, list_of, map_of, media, ms_of, returned, tagged, text_of

__all__ = ["project"]

# Entries beside the conversation: the field that says it, and how it is shown.
_NOTES: Final = {
    "summary": ("summary", "summary"),
    "custom-title": ("customTitle", "title"),
    "ai-title": ("aiTitle", "title"),
    "tag": ("tag", "tag"),
    "last-prompt": ("lastPrompt", "last prompt"),
    "agent_metadata": ("agentType", "agent"),
    "progress": ("data", "progress"),
    "attachment": ("attachment", "attachment"),
    "queue-operation": ("operation", "queue"),
    "mode": ("mode", "mode"),
    "permission-mode": ("permissionMode", "permission mode"),
    "file-history-snapshot": ("messageId", "file history"),
    "content-replacement": ("replacements", "replaced content"),
}


def project(item: Any) -> Projection | None:
    """Return what an entry says; None for a type that is not known."""
    entry = map_of(item)
    kind, uuid = entry.get("type"), entry.get("uuid")
    if kind in ("user", "assistant"):
        message = map_of(entry.get("message"))
        role, text = kind, _content(message.get("content"))
    elif kind == "system":
        role = "system"
        text = text_of(entry.get("content")) or tagged(text_of(entry.get("subtype")) or "system")
    elif isinstance(kind, str) and kind in _NOTES:
        field, tag = _NOTES[kind]
        role, text = "system", tagged(tag, entry.get(field))
    else:
        return None
    return Projection(text, role, uuid if isinstance(uuid, str) and uuid else None, ms_of(entry.get("timestamp")))


def _content(content: object) -> str:
    return joined(map(_block, list_of(content))) if isinstance(content, list) else text_of(content)


def _block(block: Fields) -> str:
    kind = text_of(block.get("type"))
    if kind == "text":
        return text_of(block.get("text"))
    if kind == "thinking":
        return tagged("thinking", block.get("thinking") or "(hidden)")
    if kind == "redacted_thinking":
        return tagged("thinking", "(encrypted)")
    if kind.endswith("tool_use"):  # server_tool_use, mcp_tool_use
        return called(block.get("name"), block.get("input"))
    if kind.endswith("tool_result"):  # and those of each of the server's tools
        return returned(None, _content(block.get("content")), failed=block.get("is_error") is True)
    if kind in ("image", "document"):
        source = map_of(block.get("source"))
        if source.get("type") == "text" and not block.get("title"):
            return text_of(source.get("data"))
        where = (source.get("url"), source.get("file_id"), source.get("media_type"))
        return media("image" if kind == "image" else "file", *where, name=block.get("title"))
    return f"[{kind}]" if kind else ""
