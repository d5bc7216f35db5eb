"""Items of openai-agents' sessions: the Responses API's input items, as JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from .text import Fields, Projection, called, joined, list_of, map_of, media, returned, tagged, text_of, texts_of

__all__ = ["project"]

_ROLES: Final = {"developer": "system"}
_TEXTS: Final = {"text", "input_text", "output_text", "summary_text", "reasoning_text"}


def project(item: Any) -> Projection | None:
    """Return what an item says; None for a type that is not known."""
    fields = map_of(item)
    kind = fields.get("type")
    if kind is None:  # messages and references may leave it out
        kind = "message" if "role" in fields else "item_reference" if "id" in fields else None
    if kind == "message":
        role = text_of(fields.get("role")) or "user"
        return Projection(_content(fields.get("content")), _ROLES.get(role, role))
    if not isinstance(kind, str) or kind not in _KINDS:
        return None
    role, show = _KINDS[kind]
    return Projection(show(fields), role)


def _content(content: object) -> str:
    """Return a message's or an output's content: text, or a list of parts."""
    return joined(map(_part, list_of(content))) if isinstance(content, list) else text_of(content)


def _part(part: Fields) -> str:
    kind = text_of(part.get("type"))
    if kind in _TEXTS:
        return text_of(part.get("text"))
    if kind == "refusal":
        return tagged("refusal", part.get("refusal"))
    if kind in ("input_image", "image", "computer_screenshot"):
        return media("image", part.get("image_url"), part.get("url"), part.get("file_id"))
    if kind == "input_file":
        return media("file", part.get("file_url"), part.get("file_id"), name=part.get("filename"))
    if kind == "input_audio":
        return media("audio", map_of(part.get("input_audio")).get("format"))
    if kind == "logs":
        return text_of(part.get("logs"))
    return f"[{kind}]" if kind else ""


def _name(item: Fields) -> str:
    """Return a tool's name, with that of the server or namespace it is of."""
    owner = item.get("namespace") or item.get("server_label")
    return ".".join(filter(None, (text_of(owner), text_of(item.get("name")))))


def _names(tools: object) -> str:
    return ", ".join(text_of(tool.get("name") or tool.get("type")) for tool in list_of(tools))


def _rest(item: Fields) -> Fields | None:
    return {key: value for key, value in item.items() if key not in ("type", "id")} or None


def _reasoning(item: Fields) -> str:
    text = joined((_content(item.get("summary")), _content(item.get("content"))))
    return tagged("reasoning", text or ("(encrypted)" if item.get("encrypted_content") else ""))


def _computer_call(item: Fields) -> str:
    return tagged("computer", item.get("actions") or item.get("action"))


def _file_search(item: Fields) -> str:
    found = ", ".join(text_of(result.get("filename")) for result in list_of(item.get("results")))
    return joined((tagged("file search", texts_of(item.get("queries"))), found and f"[found] {found}"))


def _web_search(item: Fields) -> str:
    action = map_of(item.get("action"))
    asked = action.get("query") or texts_of(action.get("queries"))
    wanted = filter(None, (asked, action.get("pattern"), action.get("url")))
    return tagged("web search", " ".join(map(text_of, wanted)))


def _image(item: Fields) -> str:
    error = map_of(item.get("error")).get("message")
    return returned("image generation", error, failed=True) if error else tagged("image", item.get("revised_prompt"))


def _interpreter(item: Fields) -> str:
    return joined((tagged("code", item.get("code")), _content(item.get("outputs"))))


def _local_shell(item: Fields) -> str:
    command = map_of(item.get("action")).get("command")
    return tagged("shell", " ".join(map(text_of, command)) if isinstance(command, list) else command)


def _shell(item: Fields) -> str:
    commands = map_of(item.get("action")).get("commands")
    return tagged("shell", joined(map(text_of, commands)) if isinstance(commands, list) else commands)


def _shell_output(item: Fields) -> str:
    output = item.get("output")
    if not isinstance(output, list):
        return returned("shell", output)
    chunks = [(chunk, map_of(chunk.get("outcome"))) for chunk in list_of(output)]
    return returned("shell", joined(joined(_chunk(chunk, outcome)) for chunk, outcome in chunks))


def _chunk(chunk: Fields, outcome: Fields) -> tuple[str, ...]:
    code = outcome.get("exit_code")
    ended = f"exit code {text_of(code)}" if code else "timeout" if outcome.get("type") == "timeout" else ""
    return text_of(chunk.get("stdout")), text_of(chunk.get("stderr")), f"[{ended}]" if ended else ""


def _patch(item: Fields) -> str:
    operation = map_of(item.get("operation"))
    what = f"{text_of(operation.get('type')) or 'patch'} {text_of(operation.get('path'))}".rstrip()
    return joined((f"[{what}]", text_of(operation.get("diff"))))


def _mcp_call(item: Fields) -> str:
    error, output = item.get("error"), item.get("output")
    text = called(_name(item), item.get("arguments"))
    if error:
        return joined((text, returned(None, error, failed=True)))
    return joined((text, returned(None, output))) if output is not None else text


def _mcp_tools(item: Fields) -> str:
    return tagged(f"tools of {text_of(item.get('server_label'))}", item.get("error") or _names(item.get("tools")))


def _approval(item: Fields) -> str:
    return tagged("approved" if item.get("approve") is True else "refused", item.get("reason"))


def _output(item: Fields) -> str:
    return returned(_name(item), _content(item.get("output")))


_KINDS: Final[dict[str, tuple[str, Callable[[Fields], str]]]] = {
    "additional_tools": ("system", lambda item: tagged("tools", _names(item.get("tools")))),
    "apply_patch_call": ("assistant", _patch),
    "apply_patch_call_output": (
        "tool",
        lambda item: returned("patch", item.get("output"), failed=item.get("status") == "failed"),
    ),
    "code_interpreter_call": ("assistant", _interpreter),
    "compaction": ("assistant", lambda item: tagged("compaction", "(encrypted)")),
    "compaction_summary": ("assistant", lambda item: tagged("compaction", "(encrypted)")),
    "compaction_trigger": ("system", lambda item: tagged("compaction asked for")),
    "computer_call": ("assistant", _computer_call),
    "computer_call_output": (
        "tool",
        lambda item: returned("computer", _part({"type": "image"} | map_of(item.get("output")))),
    ),
    "configuration_update": ("system", lambda item: tagged("configuration", _rest(item))),
    "custom_tool_call": ("assistant", lambda item: called(_name(item), item.get("input"))),
    "custom_tool_call_output": ("tool", _output),
    "file_search_call": ("assistant", _file_search),
    "function_call": ("assistant", lambda item: called(_name(item), item.get("arguments"))),
    "function_call_output": ("tool", _output),
    "image_generation_call": ("assistant", _image),
    "item_reference": ("system", lambda item: tagged("reference", item.get("id"))),
    "local_shell_call": ("assistant", _local_shell),
    "local_shell_call_output": ("tool", lambda item: returned("shell", item.get("output"))),
    "mcp_approval_request": ("assistant", lambda item: tagged(f"may I call {_name(item)}?", item.get("arguments"))),
    "mcp_approval_response": ("user", _approval),
    "mcp_call": ("assistant", _mcp_call),
    "mcp_list_tools": ("system", _mcp_tools),
    "program": ("assistant", lambda item: tagged("program", item.get("code"))),
    "program_output": ("tool", lambda item: returned("program", item.get("result"))),
    "reasoning": ("assistant", _reasoning),
    "shell_call": ("assistant", _shell),
    "shell_call_output": ("tool", _shell_output),
    "tool_search_call": ("assistant", lambda item: tagged("tool search", item.get("arguments"))),
    "tool_search_output": ("tool", lambda item: returned("tool search", _names(item.get("tools")))),
    "web_search_call": ("assistant", _web_search),
}
