"""Raw turns: an agent framework's own item as bytes, what is shown of it, and that it comes back."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcs_redis import ConversationTurn, RawItem, SessionAsset, sync
from orcs_redis.errors import CorruptSessionError, NotFoundError, SerializationError
from orcs_redis.model.parts import changed, digests
from orcs_redis.model.raw import embedded
from orcs_redis.protocol.turns import are_encoded, decode_turns, encode_known_turn, encode_turn

SECRET = "hunter2"
OPENAI, ADK, CLAUDE, PYDANTIC = "openai-agents/1", "google-adk/1", "claude-agent-sdk/1", "pydantic-ai/1"
FORMATS = (OPENAI, ADK, CLAUDE, PYDANTIC)


def raw_item(item: object, format: str = OPENAI) -> RawItem:
    return RawItem(format, json.dumps(item).encode())


HELLO = raw_item({"role": "user", "content": "hello"})
UNKNOWN = RawItem("langgraph/4.1", b"\xff\x00" + SECRET.encode())


def session(*turns: ConversationTurn) -> SessionAsset:
    asset = SessionAsset(id="s", created_at_ms=1, updated_at_ms=2)
    asset.history.turns = list(turns)
    return asset


# The item


@pytest.mark.parametrize("format", ["a/1", "openai-agents/1", "X.y_z-0/2.0-rc.1", "a" * 98 + "/1"])
def test_formats(format: str) -> None:
    """A format is a name and a version."""
    assert RawItem(format, b"x").format == format


@pytest.mark.parametrize(
    "format", ["", "a", "a/", "/1", "a/b/c", "a 1/1", "a/1\n", "-a/1", "é/1", "a/é", "a" * 99 + "/1", "a/\x00"]
)
def test_what_is_no_format(format: str) -> None:
    """Anything else is refused, and shown escaped and shortened."""
    with pytest.raises(ValueError, match="name/version") as caught:
        RawItem(format, b"x")
    assert len(str(caught.value)) < 120
    assert str(caught.value).isprintable()


def test_data_is_bytes() -> None:
    """Data is bytes, of which there is at least one."""
    with pytest.raises(ValueError, match="empty"):
        RawItem("a/1", b"")
    for data in ("x", bytearray(b"x"), memoryview(b"x"), None, [1]):
        with pytest.raises(TypeError, match="bytes"):
            RawItem("a/1", data)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="str"):
        RawItem(1, b"x")  # type: ignore[arg-type]


def test_an_item_is_a_value() -> None:
    """Items are compared, hashed, copied and pickled by value, and can't be changed."""
    other = RawItem(format=HELLO.format, data=bytes(bytearray(HELLO.data)))
    assert HELLO.projection is not None
    assert other == HELLO
    assert hash(other) == hash(HELLO)
    assert pickle.loads(pickle.dumps(HELLO)) == copy.deepcopy(HELLO) == HELLO
    assert other != RawItem("a/1", HELLO.data)
    with pytest.raises(AttributeError):
        HELLO.data = b"y"  # type: ignore[misc]


def test_a_repr_does_not_show_data() -> None:
    """Format and size, but nothing of the data."""
    assert repr(UNKNOWN) == "RawItem(format='langgraph/4.1', size=9)"
    assert SECRET not in repr(ConversationTurn.from_raw(raw_item({"role": "user", "content": SECRET})))


# What is shown

CALL = {"type": "function_call", "call_id": "c", "name": "grep", "arguments": '{"x":1}'}
SHOWN: list[tuple[str, Any, str, str]] = [
    (OPENAI, {"role": "user", "content": "hi"}, "user", "hi"),
    (OPENAI, {"role": "user", "content": ""}, "user", ""),
    (OPENAI, {"role": "developer", "content": "be brief"}, "system", "be brief"),
    (
        OPENAI,
        {
            "type": "message",
            "role": "user",
            "content": [
                {"type": "input_text", "text": "look"},
                {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "auto"},
                {"type": "input_image", "image_url": "https://x/y.png"},
                {"type": "input_image", "file_id": "f-1"},
                {"type": "input_file", "filename": "a.pdf", "file_data": "AAAA"},
                {"type": "input_audio", "input_audio": {"format": "wav", "data": "AAAA"}},
                {"type": "hologram", "data": "AAAA"},
            ],
        },
        "user",
        "look\n[image: image/png]\n[image: https://x/y.png]\n[image: f-1]\n[file: a.pdf]\n[audio: wav]\n[hologram]",
    ),
    (
        OPENAI,
        {
            "type": "message",
            "role": "assistant",
            "id": "m",
            "content": [{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "no"}],
        },
        "assistant",
        "a\n[refusal] no",
    ),
    (OPENAI, CALL, "assistant", '[call grep] {"x":1}'),
    (OPENAI, CALL | {"namespace": "fs"}, "assistant", '[call fs.grep] {"x":1}'),
    (OPENAI, {"type": "function_call_output", "call_id": "c", "output": "3 hits"}, "tool", "[result] 3 hits"),
    (
        OPENAI,
        {"type": "function_call_output", "call_id": "c", "name": "shot", "output": [{"type": "input_image"}]},
        "tool",
        "[result of shot] [image]",
    ),
    (
        OPENAI,
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "so"}], "encrypted_content": "A"},
        "assistant",
        "[reasoning] so",
    ),
    (OPENAI, {"type": "reasoning", "summary": [], "encrypted_content": "AAAA"}, "assistant", "[reasoning] (encrypted)"),
    (
        OPENAI,
        {"type": "computer_call", "call_id": "c", "action": {"type": "click", "x": 1, "y": 2}},
        "assistant",
        '[computer] {"type":"click","x":1,"y":2}',
    ),
    (
        OPENAI,
        {"type": "computer_call_output", "output": {"type": "computer_screenshot", "image_url": "data:image/png;,A"}},
        "tool",
        "[result of computer] [image: image/png]",
    ),
    (
        OPENAI,
        {"type": "file_search_call", "queries": ["a", "b"], "results": [{"filename": "x.md", "text": "..."}]},
        "assistant",
        "[file search] a, b\n[found] x.md",
    ),
    (OPENAI, {"type": "web_search_call", "action": {"type": "search", "query": "q"}}, "assistant", "[web search] q"),
    (
        OPENAI,
        {"type": "web_search_call", "action": {"type": "find_in_page", "pattern": "p", "url": "u"}},
        "assistant",
        "[web search] p u",
    ),
    (OPENAI, {"type": "tool_search_call", "arguments": {"q": 1}}, "assistant", '[tool search] {"q":1}'),
    (
        OPENAI,
        {"type": "tool_search_output", "tools": [{"type": "function", "name": "f"}, {"type": "local_shell"}]},
        "tool",
        "[result of tool search] f, local_shell",
    ),
    (OPENAI, {"type": "additional_tools", "tools": [{"name": "f"}]}, "system", "[tools] f"),
    (
        OPENAI,
        {"type": "configuration_update", "id": "i", "reasoning": {"effort": "low"}},
        "system",
        '[configuration] {"reasoning":{"effort":"low"}}',
    ),
    (OPENAI, {"type": "compaction", "encrypted_content": "AAAA"}, "assistant", "[compaction] (encrypted)"),
    (OPENAI, {"type": "compaction_trigger"}, "system", "[compaction asked for]"),
    (
        OPENAI,
        {"type": "image_generation_call", "result": "AAAA", "revised_prompt": "a cat"},
        "assistant",
        "[image] a cat",
    ),
    (
        OPENAI,
        {"type": "image_generation_call", "result": None, "error": {"message": "no"}},
        "assistant",
        "[error of image generation] no",
    ),
    (
        OPENAI,
        {"type": "code_interpreter_call", "code": "1+1", "outputs": [{"type": "logs", "logs": "2"}]},
        "assistant",
        "[code] 1+1\n2",
    ),
    (
        OPENAI,
        {"type": "local_shell_call", "action": {"type": "exec", "command": ["ls", "-l"]}},
        "assistant",
        "[shell] ls -l",
    ),
    (OPENAI, {"type": "local_shell_call_output", "output": "a b"}, "tool", "[result of shell] a b"),
    (OPENAI, {"type": "shell_call", "action": {"commands": ["cd x", "ls"]}}, "assistant", "[shell] cd x\nls"),
    (
        OPENAI,
        {
            "type": "shell_call_output",
            "output": [
                {"stdout": "out", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}},
                {"stdout": "", "stderr": "err", "outcome": {"type": "exit", "exit_code": 2}},
                {"stdout": "", "stderr": "", "outcome": {"type": "timeout"}},
            ],
        },
        "tool",
        "[result of shell] out\nerr\n[exit code 2]\n[timeout]",
    ),
    (
        OPENAI,
        {"type": "apply_patch_call", "operation": {"type": "update_file", "path": "a.py", "diff": "+x"}},
        "assistant",
        "[update_file a.py]\n+x",
    ),
    (
        OPENAI,
        {"type": "apply_patch_call_output", "status": "completed", "output": "ok"},
        "tool",
        "[result of patch] ok",
    ),
    (OPENAI, {"type": "apply_patch_call_output", "status": "failed"}, "tool", "[error of patch]"),
    (
        OPENAI,
        {"type": "mcp_list_tools", "server_label": "s", "tools": [{"name": "a"}, {"name": "b"}]},
        "system",
        "[tools of s] a, b",
    ),
    (
        OPENAI,
        {"type": "mcp_approval_request", "server_label": "s", "name": "rm", "arguments": "{}"},
        "assistant",
        "[may I call s.rm?] {}",
    ),
    (OPENAI, {"type": "mcp_approval_response", "approve": True}, "user", "[approved]"),
    (OPENAI, {"type": "mcp_approval_response", "approve": False, "reason": "no"}, "user", "[refused] no"),
    (
        OPENAI,
        {"type": "mcp_call", "server_label": "s", "name": "ls", "arguments": "{}", "output": "a"},
        "assistant",
        "[call s.ls] {}\n[result] a",
    ),
    (
        OPENAI,
        {"type": "mcp_call", "server_label": "s", "name": "ls", "arguments": "{}", "error": "gone"},
        "assistant",
        "[call s.ls] {}\n[error] gone",
    ),
    (OPENAI, {"type": "custom_tool_call", "name": "sql", "input": "select"}, "assistant", "[call sql] select"),
    (OPENAI, {"type": "custom_tool_call_output", "call_id": "c", "output": "1"}, "tool", "[result] 1"),
    (OPENAI, {"id": "m-1"}, "system", "[reference] m-1"),
    (OPENAI, {"type": "item_reference", "id": "m-1"}, "system", "[reference] m-1"),
    (OPENAI, {"type": "program", "code": "x()"}, "assistant", "[program] x()"),
    (OPENAI, {"type": "program_output", "result": "1"}, "tool", "[result of program] 1"),
    (
        ADK,
        {"author": "user", "content": {"role": "user", "parts": [{"text": "hi"}, {"text": "you"}]}},
        "user",
        "hi\nyou",
    ),
    (
        ADK,
        {
            "author": "root_agent",
            "content": {
                "role": "model",
                "parts": [
                    {"text": "hm", "thought": True, "thought_signature": "AAAA"},
                    {"function_call": {"id": "f", "name": "roll", "args": {"sides": 6}}},
                    {"executableCode": {"code": "1", "language": "PYTHON"}},
                    {"code_execution_result": {"outcome": "OUTCOME_FAILED", "output": "no"}},
                    {"inline_data": {"mime_type": "image/png", "data": "AAAA"}},
                    {"fileData": {"fileUri": "gs://x", "mimeType": "text/plain"}},
                ],
            },
        },
        "assistant",
        '[thinking] hm\n[call roll] {"sides":6}\n[code] 1\n[error of code] no\n[file: image/png]\n[file: gs://x]',
    ),
    (
        ADK,
        {
            "author": "root_agent",
            "content": {"role": "user", "parts": [{"functionResponse": {"name": "roll", "response": {"result": 4}}}]},
            "actions": {"stateDelta": {"rolls": [4]}, "artifactDelta": {}, "transferToAgent": None},
        },
        "tool",
        '[result of roll] {"result":4}\n[state] {"rolls":[4]}',
    ),
    (
        ADK,
        {"author": "a", "actions": {"transfer_to_agent": "b", "escalate": True, "artifact_delta": {"x.txt": 2}}},
        "assistant",
        '[artifacts] {"x.txt":2}\n[transfer to b]\n[escalate]',
    ),
    (
        ADK,
        {"author": "a", "actions": {"compaction": {"compactedContent": {"parts": [{"text": "before"}]}}}},
        "assistant",
        "[summary] before",
    ),
    (
        ADK,
        {
            "author": "a",
            "content": {"parts": [{"video_metadata": {}}, {"tool_call": {"tool_type": "MAPS", "args": {"q": 1}}}]},
            "actions": {
                "requestedToolConfirmations": {"f": {"hint": "Delete it?"}},
                "requested_auth_configs": {"f": {"key": "AAAA"}},
                "rewindBeforeInvocationId": "i-1",
            },
        },
        "assistant",
        '[call MAPS] {"q":1}\n[may I go on?] Delete it?\n[credentials asked for]\n[rewind] i-1',
    ),
    (ADK, {"author": "a", "error_code": "E1", "errorMessage": "no"}, "assistant", "[error] E1\nno"),
    (
        ADK,
        {"author": "a", "outputTranscription": {"text": "said"}, "output": {"x": 1}},
        "assistant",
        'said\n[output] {"x":1}',
    ),
    (ADK, {"author": "a", "actions": {}}, "assistant", "[event of a]"),
    (CLAUDE, {"type": "user", "message": {"role": "user", "content": "hi"}}, "user", "hi"),
    (
        CLAUDE,
        {
            "type": "assistant",
            "message": {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "A"},
                    {"type": "thinking", "thinking": "", "signature": "A"},
                    {"type": "text", "text": "ok"},
                    {"type": "tool_use", "id": "t", "name": "Bash", "input": {"command": "ls"}},
                    {"type": "server_tool_use", "id": "t", "name": "web_search", "input": {"query": "q"}},
                    {"type": "web_search_tool_result", "tool_use_id": "t", "content": [{"type": "web_search_result"}]},
                ],
            },
        },
        "assistant",
        '[thinking] hm\n[thinking] (hidden)\nok\n[call Bash] {"command":"ls"}\n[call web_search] {"query":"q"}\n'
        "[result] [web_search_result]",
    ),
    (
        CLAUDE,
        {
            "type": "user",
            "message": {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "a.py"}]},
                    {"type": "tool_result", "tool_use_id": "t", "content": "no", "is_error": True},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
                ],
            },
        },
        "user",
        "[result] a.py\n[error] no\n[image: image/png]",
    ),
    (
        CLAUDE,
        {
            "type": "user",
            "message": {
                "content": [
                    {"type": "redacted_thinking", "data": "AAAA"},
                    {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "read me"}},
                    {"type": "document", "title": "T", "source": {"type": "base64", "data": "AAAA"}},
                    {"type": "hologram", "data": "AAAA"},
                ]
            },
        },
        "user",
        "[thinking] (encrypted)\nread me\n[file: T]\n[hologram]",
    ),
    (CLAUDE, {"type": "system", "subtype": "compact_boundary", "content": "compacted"}, "system", "compacted"),
    (CLAUDE, {"type": "system", "subtype": "init"}, "system", "[init]"),
    (CLAUDE, {"type": "summary", "summary": "so far", "leafUuid": "u"}, "system", "[summary] so far"),
    (CLAUDE, {"type": "custom-title", "customTitle": "T"}, "system", "[title] T"),
    (
        PYDANTIC,
        {
            "kind": "request",
            "instructions": "be brief",
            "parts": [
                {"part_kind": "system-prompt", "content": "you are"},
                {
                    "part_kind": "user-prompt",
                    "content": [
                        "look",
                        {"kind": "image-url", "url": "https://x"},
                        {"kind": "binary", "media_type": "image/png", "data": "AAAA"},
                        {"kind": "text-content", "content": "more"},
                        {"kind": "cache-point"},
                    ],
                },
            ],
        },
        "user",
        "you are\nlook\n[image: https://x]\n[file: image/png]\nmore",
    ),
    (
        PYDANTIC,
        {
            "kind": "response",
            "parts": [
                {"part_kind": "thinking", "content": "hm"},
                {"part_kind": "text", "content": "ok"},
                {"part_kind": "tool-call", "tool_name": "add", "args": '{"a":1}', "tool_call_id": "c"},
                {"part_kind": "file", "content": {"kind": "binary", "media_type": "image/png", "data": "AAAA"}},
                {"part_kind": "hologram"},
            ],
        },
        "assistant",
        '[thinking] hm\nok\n[call add] {"a":1}\n[file: image/png]\n[hologram]',
    ),
    (
        PYDANTIC,
        {
            "kind": "request",
            "parts": [
                {"part_kind": "tool-return", "tool_name": "add", "content": {"sum": 3}, "outcome": "success"},
                {"part_kind": "tool-return", "tool_name": "add", "content": "no", "outcome": "failed"},
                {"part_kind": "retry-prompt", "tool_name": "add", "content": "again"},
            ],
        },
        "tool",
        '[result of add] {"sum":3}\n[error of add] no\n[retry add] again',
    ),
    (
        PYDANTIC,
        {
            "kind": "request",
            "parts": [
                {"part_kind": "speech", "speaker": "user", "transcript": "hi"},
                {"part_kind": "speech", "audio": {"kind": "binary", "media_type": "audio/wav", "data": "AAAA"}},
                {"part_kind": "user-prompt", "content": [{"kind": "uploaded-file", "file_id": "f"}, {"kind": "odd"}]},
                {"part_kind": "retry-feedback", "content": "again"},
                {"part_kind": "instruction-baseline", "instructions": [{"content": "a"}, {"content_hash": "AAAA"}]},
                {"part_kind": "tool-availability-delta", "tools_added": ["f", "g"]},
            ],
        },
        "user",
        'hi\n[audio: audio/wav]\n[file: f]\n{"kind":"odd"}\n[retry] again\n[instructions] a\n[tools] f, g',
    ),
    (PYDANTIC, {"kind": "request", "parts": [], "instructions": "be brief"}, "system", "[instructions] be brief"),
    (PYDANTIC, {"kind": "response", "parts": []}, "assistant", "[response]"),
    (
        PYDANTIC,
        [
            {"kind": "request", "parts": [{"part_kind": "user-prompt", "content": "a"}]},
            {"kind": "response", "parts": [{"part_kind": "text", "content": "b"}]},
        ],
        "user",
        "a\nb",
    ),
]


@pytest.mark.parametrize(("format", "item", "role", "content"), SHOWN)
def test_what_is_shown(format: str, item: Any, role: str, content: str) -> None:
    """Texts as they are; calls, results and files as what they are. No bytes of files, nothing that is encrypted."""
    turn = ConversationTurn.from_raw(raw_item(item, format))
    assert (turn.content, turn.role) == (content, role)
    assert "AAAA" not in content


UNREADABLE: list[tuple[str, bytes]] = [
    ("langgraph/4.1", b'{"role":"user","content":"hi"}'),
    ("openai-agents/2", b'{"role":"user","content":"hi"}'),
    *(
        (format, data)
        for format in FORMATS
        for data in (b"\xff", b"{", b"1", b"null", b"[]", b"{}", b'"x"', b"[" * 9999)
    ),
    (OPENAI, b'{"type":"hologram"}'),
    (OPENAI, b'{"type":["message"]}'),
    (CLAUDE, b'{"type":"hologram"}'),
    (PYDANTIC, b'{"kind":"hologram","parts":[]}'),
    (PYDANTIC, b'{"kind":[]}'),
]


@pytest.mark.parametrize(("format", "data"), UNREADABLE)
def test_what_cannot_be_read(format: str, data: bytes) -> None:
    """Of an unknown format, damaged data or an unknown type there are role, format and size."""
    turn = ConversationTurn.from_raw(RawItem(format, data), role="assistant")
    assert turn.content == f"[assistant: {format}, {len(data)} bytes]"
    assert ConversationTurn.from_raw(RawItem(format, data)).role == "system"


TYPES = {  # of the Responses API's input items, openai 3.57
    "message", "file_search_call", "computer_call", "computer_call_output", "web_search_call", "function_call",
    "function_call_output", "tool_search_call", "tool_search_output", "additional_tools", "configuration_update",
    "reasoning", "compaction", "image_generation_call", "code_interpreter_call", "local_shell_call",
    "local_shell_call_output", "shell_call", "shell_call_output", "apply_patch_call", "apply_patch_call_output",
    "mcp_list_tools", "mcp_approval_request", "mcp_approval_response", "mcp_call", "custom_tool_call_output",
    "custom_tool_call", "compaction_trigger", "item_reference", "program", "program_output",
}  # fmt: skip


def test_every_type_is_shown() -> None:
    """There is an item of each type above, and one that has nothing but its type is shown as well."""
    assert {item.get("type", "message") for format, item, _, _ in SHOWN if format == OPENAI} == TYPES
    for kind in TYPES - {"message"}:
        assert ConversationTurn.from_raw(raw_item({"type": kind})).content.startswith("[")


NAMES = sorted(
    {key for _, item, _, _ in SHOWN for key in json.dumps(item).split('"')[1::2]} | {"stderr", "leafUuid", "transcript"}
)
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 2**70)
    | st.floats(allow_nan=False)
    | st.sampled_from([*NAMES, "", "\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw: st.DrawFn) -> RawItem:
    """Items like those above with other values somewhere."""
    format, item, _, _ = draw(st.sampled_from(SHOWN))

    def spoil(value: Any) -> Any:
        if draw(st.integers(0, 4)) == 0:
            return draw(anything)
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        return [spoil(item) for item in value] if isinstance(value, list) else value

    return raw_item(spoil(item), draw(st.sampled_from(FORMATS)) if draw(st.booleans()) else format)


@given(damaged() | st.builds(raw_item, anything, st.sampled_from(FORMATS)))
def test_a_projection_never_raises(item: RawItem) -> None:
    """Whatever an item looks like, there is a text of it that can be stored as JSON."""
    turn = ConversationTurn.from_raw(item)
    assert SessionAsset.from_json(session(turn).to_json()) == session(turn)
    assert turn.timestamp_ms >= 0


def test_lone_surrogates() -> None:
    """Text that is no UTF-8 is not shown, and the item is kept."""
    turn = ConversationTurn.from_raw(RawItem(OPENAI, rb'{"role":"user","content":"\ud800"}'), role="user")
    assert turn.content == "[user: openai-agents/1, 34 bytes]"
    assert SessionAsset.from_json(session(turn).to_json()) == session(turn)


# Making turns


@pytest.mark.parametrize(
    ("format", "item", "id", "ms"),
    [
        (ADK, {"id": "e-1", "author": "user", "timestamp": 1700000000.25}, "e-1", 1_700_000_000_250),
        (
            CLAUDE,
            {"type": "user", "uuid": "u-1", "timestamp": "2024-01-01T00:00:00.5Z", "message": {}},
            "u-1",
            1_704_067_200_500,
        ),
        (
            PYDANTIC,
            {"kind": "response", "parts": [], "timestamp": "2024-01-01T01:00:00+01:00"},
            None,
            1_704_067_200_000,
        ),
        (
            PYDANTIC,
            {
                "kind": "request",
                "parts": [{"part_kind": "user-prompt", "content": "x", "timestamp": "2024-01-01T00:00"}],
            },
            None,
            1_704_067_200_000,
        ),
        (ADK, {"id": "", "author": "user", "timestamp": -1}, None, None),
        (ADK, {"id": 5, "author": "user", "timestamp": 1e300}, None, None),
        (CLAUDE, {"type": "user", "uuid": None, "timestamp": "soon", "message": {}}, None, None),
        (OPENAI, {"id": "__fake_id__", "role": "user", "content": "x"}, None, None),
    ],
)
def test_ids_and_times(format: str, item: Any, id: str | None, ms: int | None) -> None:
    """An item's own id and time are the turn's; else it has a UUID, and is of now. What is given goes first."""
    raw = raw_item(item, format)
    before = ConversationTurn.user("x").timestamp_ms
    turn = ConversationTurn.from_raw(raw)
    assert (turn.id == id) if id else (len(turn.id) == 36)
    assert (turn.timestamp_ms == ms) if ms else (before <= turn.timestamp_ms <= before + 60_000)
    given_all = ConversationTurn.from_raw(raw, role="critic", id="mine", timestamp_ms=0)
    assert (given_all.role, given_all.id, given_all.timestamp_ms) == ("critic", "mine", 0)


def test_content_is_derived_when_made() -> None:
    """A turn with a raw item has its content at once, however it is made."""
    turn = ConversationTurn(id="t", timestamp_ms=5, role="user", content="", raw=HELLO)
    assert turn.content == "hello"
    assert ConversationTurn.from_raw(HELLO, id="t", timestamp_ms=5) == turn
    assert copy.deepcopy(turn) == pickle.loads(pickle.dumps(turn)) == turn
    assert ConversationTurn.user("").content == ""


# In Redis


def test_turns_without_raw_are_as_before() -> None:
    """Seven elements; nine with a raw item, whose content is empty."""
    assert len(msgspec.msgpack.decode(encode_turn(ConversationTurn.user("x"), ""))) == 7
    turn = ConversationTurn.from_raw(HELLO, id="t", timestamp_ms=5)
    data = encode_turn(turn, "")
    assert msgspec.msgpack.decode(data) == ["t", 5, "user", "", [], [], {}, HELLO.format, HELLO.data]
    turn.content = ""
    assert encode_turn(turn, "") == encode_known_turn(turn) == data


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
raws = (
    damaged()
    | st.builds(RawItem, st.sampled_from([*FORMATS, "x/1"]), st.binary(min_size=1))
    | st.builds(raw_item, anything, st.sampled_from([*FORMATS, "x/1"]))
    | st.builds(lambda text: RawItem("x/1", b"\xef\xbb\xbf" + text.encode()), texts)
)
maybe_raw = st.none() | raws
small = st.integers(0, 9) | texts
metadata = st.dictionaries(texts.filter(lambda key: key != "raw"), small, max_size=2)


@st.composite
def histories(draw: st.DrawFn) -> list[ConversationTurn]:
    turns = []
    for raw in draw(st.lists(maybe_raw, max_size=4)):
        content = "" if raw else draw(texts)
        turn = ConversationTurn(role=draw(texts), content=content, raw=raw, metadata=draw(metadata))
        if not raw and draw(st.booleans()):
            turn.metadata["raw"] = draw(small | st.dictionaries(st.sampled_from(["format", "json"]), texts))
        turns.append(turn)
    return turns


@given(histories())
def test_turns_come_back_from_redis(turns: list[ConversationTurn]) -> None:
    """What is decoded is equal to what was encoded, and is known to be unchanged."""
    data = [encode_turn(turn, "") for turn in turns]
    back = decode_turns("s", data)
    assert back == turns
    assert [type(turn.raw) for turn in back] == [type(turn.raw) for turn in turns]
    assert not turns or are_encoded(back, data)
    assert [encode_known_turn(turn) for turn in back] == data


@pytest.mark.parametrize(
    "rest", [["x/1"], ["x", b"x"], ["x/1", b""], ["x/1", "x"], ["x/1", None], [5, b"x"], [b"x/1", b"x"]]
)
def test_damaged_raw_items(rest: list[Any]) -> None:
    """A raw item that can't be one is a corrupt turn, and it is said which."""
    sound = encode_turn(ConversationTurn.user("x"), "")
    data = msgspec.msgpack.encode(["t", 5, "user", "", [], [], {}, *rest])
    with pytest.raises(CorruptSessionError) as caught:
        decode_turns("s", [sound, data])
    assert caught.value.field.startswith("history.turns[1]")


def test_later_elements_are_passed_over() -> None:
    """A later version may add elements beyond the raw item, and leave that out."""
    plain = ["t", 5, "user", "x", [], [], {}]
    data = [
        msgspec.msgpack.encode([*plain, HELLO.format, HELLO.data, "new"]),
        msgspec.msgpack.encode([*plain, None, None, "new"]),
    ]
    assert [turn.raw for turn in decode_turns("s", data)] == [HELLO, None]


Sub: Any = type("Sub", (RawItem,), {})


def with_content(content: str) -> ConversationTurn:
    turn = ConversationTurn.from_raw(HELLO)
    turn.content = content
    return turn


def with_raw(raw: Any) -> ConversationTurn:
    turn = ConversationTurn.user("")
    turn.raw = raw
    return turn


REFUSED = [
    (lambda: with_content(SECRET), "content"),
    (lambda: ConversationTurn(role="user", content=SECRET, raw=HELLO), "content"),
    (lambda: ConversationTurn(role="user", content="", raw=HELLO, metadata={"raw": 1}), "metadata.raw"),
    (lambda: with_raw(b"x"), "raw"),
    (lambda: with_raw({"format": "x/1", "data": b"x"}), "raw"),
    (lambda: with_raw(Sub("x/1", b"x")), "raw"),
]


@pytest.mark.parametrize(("make", "field"), REFUSED)
async def test_what_would_be_lost_is_refused(store: Any, make: Any, field: str) -> None:
    """Content that is not the item's, or a key where the item goes: refused before anything is sent, and by JSON."""
    await store.save(session(ConversationTurn.user("kept")))
    new = session(ConversationTurn.user("x"), make())
    new.id = "new"
    for write, path in (
        (store.save(new), "history.turns[1]"),
        (store.append("s", ConversationTurn.user("x"), make()), "turns[1]"),
    ):
        with pytest.raises(SerializationError) as caught:
            await write
        assert caught.value.field == f"{path}.{field}"
        assert SECRET not in str(caught.value)
    with pytest.raises(SerializationError) as caught:
        new.to_json()
    assert caught.value.field == f"history.turns[1].{field}"
    with pytest.raises(NotFoundError):
        await store.load("new")
    assert [turn.content for turn in await store.turns("s")] == ["kept"]


async def test_an_edit_is_refused(store: Any) -> None:
    """Another content in place of what was derived can't be saved; the other changes can, without it."""
    await store.save(session(ConversationTurn.from_raw(HELLO)))
    asset = await store.load("s")
    asset.history.turns[0].content = "edited"
    with pytest.raises(SerializationError, match="derived"):
        await store.save(asset)
    asset.history.turns[0].content = ""
    asset.metadata["x"] = 1
    await store.save(asset)
    assert [turn.content for turn in await store.turns("s")] == ["hello"]


async def test_raw_turns_come_back(store: Any) -> None:
    """Saved or appended, loaded or as turns: the same bytes, and the content to read and to search in."""
    turns = [
        ConversationTurn.from_raw(HELLO),
        ConversationTurn.user("plain"),
        ConversationTurn.from_raw(UNKNOWN, role="assistant").with_tags(["blob"]),
        ConversationTurn.from_raw(raw_item(CALL)),
    ]
    asset = session(*turns[:2])
    await store.save(asset)
    assert await store.load("s") == asset
    await store.append("s", *turns[2:])
    loaded = await store.load("s")
    assert loaded.history.turns == await store.turns("s") == turns
    assert [turn.raw for turn in loaded.history.turns] == [turn.raw for turn in turns]
    assert loaded.history.search("grep") == [turns[3]]
    assert loaded.history.search("4.1, 9 bytes") == [turns[2]]


async def test_content_is_not_stored_twice(store: Any, place: Any) -> None:
    """In the server there is the item alone, and a save of what was loaded changes nothing of the turn."""
    await store.save(session(ConversationTurn.from_raw(HELLO)))
    (stored,) = place.raw.lrange(place.key("turns:s"), 0, -1)
    assert stored.count(b"hello") == 1
    await store.save(await store.load("s"))
    assert place.raw.lrange(place.key("turns:s"), 0, -1) == [stored]


# In orcs' JSON


@given(histories())
def test_turns_come_back_from_json(turns: list[ConversationTurn]) -> None:
    """Equal, with the very bytes; with the same digests, whether the content is derived already or not."""
    asset = session(*turns)
    back = SessionAsset.from_json(asset.to_json())
    assert back == asset
    bare = copy.deepcopy(asset)
    for turn in bare.history.turns:
        if turn.raw is not None:
            turn.content = ""
    assert SessionAsset.from_json(bare.to_json()) == asset
    assert digests(back) == digests(asset) == digests(bare)


def test_digests_see_another_item() -> None:
    """A turn whose item, content or role was changed is another part."""
    turn = ConversationTurn.from_raw(HELLO, id="t")
    before = digests(session(turn))
    for change in ({"raw": RawItem(OPENAI, HELLO.data + b" ")}, {"content": "edited"}, {"role": "system"}):
        assert changed(before, digests(session(msgspec.structs.replace(turn, **change)))) == {"turn/t"}


def embedded_turn(turn: ConversationTurn) -> Any:
    return json.loads(session(turn).to_json())["history"]["turns"][0]


def parsed(turn: Any) -> ConversationTurn:
    document = json.loads(session().to_json())
    document["history"]["turns"] = [turn]
    return SessionAsset.from_json(json.dumps(document, sort_keys=True)).history.turns[0]


def test_orcs_can_read_it() -> None:
    """The content is there to read, the item is in the metadata: JSON as text, anything else as base64."""
    turn = ConversationTurn.from_raw(HELLO)
    turn.metadata["mine"] = 1
    found = embedded_turn(turn)
    assert found.keys() == {"id", "timestamp_ms", "role", "content", "tool_calls", "tags", "metadata"}
    assert found["content"] == "hello"
    assert found["metadata"]["raw"]["format"] == OPENAI
    assert found["metadata"]["raw"]["json"] == HELLO.data.decode()
    assert turn.metadata == {"mine": 1}  # to_json changes nothing
    assert parsed(found) == turn  # though whoever writes it anew sorts the keys
    assert embedded_turn(ConversationTurn.from_raw(UNKNOWN))["metadata"]["raw"]["base64"] == "/wBodW50ZXIy"
    assert embedded_turn(ConversationTurn.user("x"))["metadata"] == {}


def test_edited_content_is_kept() -> None:
    """If somebody edited the text in the file, it is not thrown away: the item stays in the metadata as it is."""
    found = embedded_turn(ConversationTurn.from_raw(HELLO))
    found["content"] = "edited"
    turn = parsed(found)
    assert (turn.raw, turn.content, turn.metadata) == (None, "edited", found["metadata"])
    assert embedded_turn(turn) == found


def test_another_version_of_the_projection() -> None:
    """A content that another version derived was not edited: the item comes back, and the content is ours."""
    found = embedded_turn(ConversationTurn.from_raw(HELLO))
    found["content"] = "hello!"
    found["metadata"]["raw"] = embedded(HELLO, "hello!")
    turn = parsed(found)
    assert (turn.raw, turn.content, turn.metadata) == (HELLO, "hello", {})


NOT_OURS: list[Any] = [
    None,
    5,
    "x",
    [],
    {},
    {"format": OPENAI},
    {"format": OPENAI, "json": "{}"},
    lambda it: it | {"format": "a"},
    lambda it: it | {"format": 5},
    lambda it: it | {"format": None},
    lambda it: it | {"json": {}},
    lambda it: it | {"json": ""},
    lambda it: it | {"json": "{"},
    lambda it: it | {"base64": "AAAA"},
    lambda it: it | {"more": 1},
    lambda it: it | {"content_digest": "0" * 16},
    lambda it: it | {"content_digest": None},
    lambda it: {key: it[key] for key in ("format", "content_digest")},
    lambda it: {key: it[key] for key in ("format", "content_digest")} | {"base64": "e30="},
    lambda it: {key: it[key] for key in ("format", "content_digest")} | {"base64": "/w=\n="},
    lambda it: {key: it[key] for key in ("format", "content_digest")} | {"base64": "/x=="},
    lambda it: {key: it[key] for key in ("format", "content_digest")} | {"base64": ["/w=="]},
    lambda it: {key: it[key] for key in ("format", "content_digest")} | {"base64": "é"},
]


@pytest.mark.parametrize("value", NOT_OURS)
async def test_what_is_not_ours_stays(value: Any) -> None:
    """Metadata under that name that is a caller's own, or damaged, is metadata: nothing of it is lost."""
    found = embedded_turn(ConversationTurn.from_raw(HELLO))
    found["metadata"]["raw"] = value(found["metadata"]["raw"]) if callable(value) else value
    turn = parsed(found)
    assert (turn.raw, turn.content, turn.metadata) == (None, "hello", found["metadata"])
    assert embedded_turn(turn) == found
    assert decode_turns("s", [encode_turn(turn, "")]) == [turn]


def test_metadata_that_would_become_an_item() -> None:
    """Metadata that is just as if it were ours would not come back as what it is."""
    turn = ConversationTurn.user("hello")
    turn.metadata["raw"] = embedded(HELLO, "hello")
    with pytest.raises(SerializationError, match="raw item") as caught:
        session(turn).to_json()
    assert caught.value.field == "history.turns[0].metadata.raw"


@pytest.mark.parametrize("key", ["raw", "orcs_redis.raw"])
def test_unknown_fields_are_no_items(key: str) -> None:
    """What a file has in a turn under the name of the field is an unknown field, as to orcs."""
    found = embedded_turn(ConversationTurn.user("x"))
    found[key] = {"format": "x/1", "data": "AAAA"}
    assert parsed(found).raw is None
    if key == "raw":
        found[key] = 5
        assert parsed(found).raw is None


def test_files(tmp_path: Any) -> None:
    """A file store keeps items, too."""
    asset = session(ConversationTurn.from_raw(HELLO), ConversationTurn.from_raw(UNKNOWN))
    store = sync.LocalFileStore(tmp_path)
    store.save(asset)
    assert store.load("s") == asset
