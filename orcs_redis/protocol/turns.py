"""Turns as Redis holds them: msgpack arrays of seven elements, or of nine with a raw item: its format, its bytes.

With a raw item the content is stored empty, and derived when it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec.structs import astuple

from ..errors import CorruptSessionError, SerializationError
from ..model.encoding import REFUSALS, attempt, check_refusal, encode, free_values_sound, pack
from ..model.raw import RawItem, content_of, raw_fault
from ..model.sections import ConversationTurn, ToolCallRecord

__all__ = ["are_encoded", "decode_id", "decode_turns", "encode_known_turn", "encode_turn", "id_of"]


class _WireCall(ToolCallRecord, array_like=True, gc=False):
    pass


class _WireTurn(ConversationTurn, array_like=True, gc=False):
    """A turn as an array: without the names of its fields it is smaller."""

    tool_calls: list[_WireCall]  # type: ignore[assignment]
    raw: str | None = None  # type: ignore[assignment]  # the format alone


class _RawFields(msgspec.Struct, array_like=True):
    """A turn with a raw item, decoded once more for this alone."""

    id: msgspec.Raw
    timestamp_ms: msgspec.Raw
    role: msgspec.Raw
    content: msgspec.Raw
    tool_calls: msgspec.Raw
    tags: msgspec.Raw
    metadata: msgspec.Raw
    format: str
    data: bytes


_decode_raw_fields = msgspec.msgpack.Decoder(_RawFields).decode
_decode_wire_turns = msgspec.msgpack.Decoder(list[_WireTurn]).decode
_decode_id = msgspec.msgpack.Decoder(str).decode
_turn_is_sound = free_values_sound(ConversationTurn)


def encode_turn(turn: ConversationTurn, where: str) -> bytes:
    """Encode a turn.

    Raises:
        SerializationError: a value that would not come back.

    """
    data = _encode_turn(turn)
    # Converting took any sequence for a list.
    if not (data and type(turn.tags) is list and type(turn.tool_calls) is list and _turn_is_sound(turn)):
        pack(turn, ConversationTurn, where, level=4)  # says what is wrong, if anything is
        if turn.raw is not None and (fault := raw_fault(turn.raw, turn.role, turn.content, turn.metadata)):
            raise SerializationError(f"{where}.{fault[0]}", fault[1])
    if not data:
        raise SerializationError(where, "it has no encoding")  # never to be stored
    return data


def encode_known_turn(turn: ConversationTurn) -> bytes:
    """Encode a turn without checking it, to compare it with what is stored; nothing if it has no encoding."""
    return _encode_turn(turn, check=False)


def decode_turns(id: str, turns: Sequence[bytes]) -> list[ConversationTurn]:
    """Decode a history's turns; CorruptSessionError names the first that can't be."""
    # As one array: a call for each turn would cost as much again.
    wire, refusal = attempt(_decode_wire_turns, b"\xdd" + len(turns).to_bytes(4) + b"".join(turns))
    if refusal is None:
        found, any_raw = _as_public(wire)
        if any_raw:
            _add_raw(id, found, turns)
        return found
    for n, data in enumerate(turns):
        if attempt(_decode_wire_turns, b"\x91" + data)[1] is not None:
            raise CorruptSessionError(id, f"history.turns[{n}]")
    raise CorruptSessionError(id, "history.turns")


def _as_public(turns: list[_WireTurn]) -> tuple[list[ConversationTurn], bool]:
    """Give decoded turns the public class; return whether any has a raw item, too.

    The layout is the same: to convert them would double the cost.
    """
    any_raw = False
    for turn in turns:
        turn.__class__ = ConversationTurn  # type: ignore[assignment]
        if calls := turn.tool_calls:  # quicker than to find out by iterating
            for call in calls:
                call.__class__ = ToolCallRecord  # type: ignore[assignment]
        if turn.raw is not None:
            any_raw = True
    return turns, any_raw  # type: ignore[return-value]


def _add_raw(id: str, turns: list[ConversationTurn], data: Sequence[bytes]) -> None:
    """Add their raw items to the turns that have one, and the content."""
    for n, turn in enumerate(turns):
        if turn.raw is not None:
            turn.raw, refusal = attempt(_raw_item, data[n])
            if refusal is not None:
                raise CorruptSessionError(id, f"history.turns[{n}].raw")
            turn.content = content_of(turn.raw, turn.role)


def _raw_item(data: bytes) -> RawItem:
    fields = _decode_raw_fields(data)
    return RawItem(fields.format, fields.data)


def _fields(turn: ConversationTurn) -> tuple[Any, ...]:
    """Return the array that a turn is encoded as.

    TypeError if it, its calls or its raw item are of another type than their own, or if this has a fault.
    """
    calls: list[Any] = turn.tool_calls
    if type(turn) is not ConversationTurn or type(calls) is not list:
        raise TypeError
    if calls:
        calls = []
        for call in turn.tool_calls:  # of one or two, quicker than a comprehension
            if type(call) is not ToolCallRecord:
                raise TypeError
            calls.append(astuple(call))
    # In the class' order; written out, as this is in the way of each save.
    raw = turn.raw
    if raw is None:
        return turn.id, turn.timestamp_ms, turn.role, turn.content, calls, turn.tags, turn.metadata
    if raw_fault(raw, turn.role, turn.content, turn.metadata):
        raise TypeError
    return turn.id, turn.timestamp_ms, turn.role, "", calls, turn.tags, turn.metadata, raw.format, raw.data


def _encode_turn(turn: ConversationTurn, check: bool = True) -> bytes:
    """Encode a turn; nothing if that is refused, or if a check finds a field of another type than its own."""
    try:
        fields = _fields(turn)
        if check:
            msgspec.convert(fields, _WireTurn)
        return encode(fields)
    except REFUSALS as error:
        check_refusal(error)
        return b""


def are_encoded(turns: list[ConversationTurn], data: Sequence[bytes]) -> bool:
    """Whether turns are encoded as this data, of which there is as much."""

    def compare(turns: list[ConversationTurn]) -> bool:
        array_header = encode([None] * len(data))[: -len(data)]
        return encode(list(map(_fields, turns))) == b"".join((array_header, *data))

    return attempt(compare, turns) == (True, None)


def decode_id(data: bytes) -> str:
    """Decode what `id_of` has returned; "" of no turn."""
    id: str = _decode_id(data) if data else ""
    return id


def id_of(turn: bytes) -> bytes:
    """Return the id of an encoded turn as it is encoded, without decoding what follows; b"" if it is no turn."""
    head = turn[1] if len(turn) > 1 else 0
    if 0xA0 <= head < 0xC0:
        return turn[1 : head - 0xA0 + 2]
    widths = {0xD9: 1, 0xDA: 2, 0xDB: 4}
    if head not in widths:
        return b""
    end = 2 + widths[head]
    return turn[1 : end + int.from_bytes(turn[2:end])]
