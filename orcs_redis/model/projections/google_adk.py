"""Events of google-adk, as JSON: under the names of their fields or the camel-cased ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from .text import Fields, Projection, called, joined, list_of, map_of, media, ms_of, returned, tagged, text_of

__all__ = ["project"]

_UNDERSCORE: Final = re.compile(r"_([a-z])")


def project(item: Any) -> Projection | None:
    """Return what an event says; None if it is no event."""
    if not isinstance(item, dict) or not item.keys() & {"author", "content", "actions"}:
        return None
    parts = list_of(map_of(item.get("content")).get("parts"))
    spoken = [_get(item, "input_transcription"), _get(item, "output_transcription")]
    error = joined((text_of(_get(item, "error_code")), text_of(_get(item, "error_message"))))
    text = joined(
        (
            *map(_part, parts),
            *(text_of(map_of(transcription).get("text")) for transcription in spoken),
            tagged("output", item["output"]) if item.get("output") is not None else "",
            tagged("error", error) if error else "",
            *_actions(map_of(item.get("actions"))),
        )
    )
    author = text_of(item.get("author"))
    is_result = bool(parts) and all(_get(part, "function_response") is not None for part in parts)
    role = "tool" if is_result else "user" if author == "user" else "assistant"
    id = item.get("id")
    return Projection(
        text or tagged(f"event of {author}" if author else "event"),
        role,
        id if isinstance(id, str) and id else None,
        ms_of(item.get("timestamp")),
    )


def _get(item: Fields, name: str) -> Any:
    """Return a field under its own name or the camel-cased one."""
    value = item.get(name)
    return item.get(_UNDERSCORE.sub(lambda match: match[1].upper(), name)) if value is None else value


def _part(part: Fields) -> str:
    text = part.get("text")
    if text:
        return tagged("thinking", text) if part.get("thought") is True else text_of(text)
    for name, show in _PARTS.items():
        value = _get(part, name)
        if isinstance(value, dict):
            return show(value)
    return ""


_PARTS: Final[dict[str, Callable[[Fields], str]]] = {
    "function_call": lambda call: called(call.get("name"), call.get("args")),
    "function_response": lambda result: returned(result.get("name"), result.get("response")),
    "tool_call": lambda call: called(_get(call, "tool_type"), call.get("args")),
    "tool_response": lambda result: returned(_get(result, "tool_type"), result.get("response")),
    "executable_code": lambda code: tagged("code", code.get("code")),
    "code_execution_result": lambda result: returned(
        "code", result.get("output"), failed=result.get("outcome") not in (None, "OUTCOME_OK")
    ),
    "inline_data": lambda blob: media("file", _get(blob, "mime_type"), name=_get(blob, "display_name")),
    "file_data": lambda file: media("file", _get(file, "file_uri"), name=_get(file, "display_name")),
    "audio_transcription": lambda speech: text_of(speech.get("text")),
}


def _actions(actions: Fields) -> Iterator[str]:
    for name, tag in (("state_delta", "state"), ("artifact_delta", "artifacts")):
        if delta := _get(actions, name):
            yield tagged(tag, delta)
    if agent := _get(actions, "transfer_to_agent"):
        yield tagged(f"transfer to {text_of(agent)}", _get(actions, "transfer_reason"))
    if actions.get("escalate") is True:
        yield tagged("escalate")
    if asked := map_of(_get(actions, "requested_tool_confirmations")):
        yield tagged("may I go on?", joined(text_of(map_of(value).get("hint")) for value in asked.values()))
    if map_of(_get(actions, "requested_auth_configs")):
        yield tagged("credentials asked for")
    if summary := map_of(_get(map_of(actions.get("compaction")), "compacted_content")):
        yield tagged("summary", joined(map(_part, list_of(summary.get("parts")))))
    if rewound := _get(actions, "rewind_before_invocation_id"):
        yield tagged("rewind", rewound)
