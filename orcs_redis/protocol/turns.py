"""Turns as Redis holds them: msgpack arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec.structs import astuple

from ..errors import CorruptSessionError, SerializationError
from ..model.encoding import REFUSALS, attempt, check_refusal, encode, free_values_sound, pack
from ..model.sections import ConversationTurn, ToolCallRecord

__all__ = ["are_encoded", "decode_turns", "encode_known_turn", "encode_turn", "id_of"]


class _WireCall(ToolCallRecord, array_like=True, gc=False):
    pass


class _WireTurn(ConversationTurn, array_like=True, gc=False):
    """A turn as an array: without the names of its fields it is smaller."""

    tool_calls: list[_WireCall]  # type: ignore[assignment]


_decode_wire_turns = msgspec.msgpack.Decoder(list[_WireTurn]).decode
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
        return _as_public(wire)
    for n, data in enumerate(turns):
        if attempt(_decode_wire_turns, b"\x91" + data)[1] is not None:
            raise CorruptSessionError(id, f"history.turns[{n}]")
    raise CorruptSessionError(id, "history.turns")


def _as_public(turns: list[_WireTurn]) -> list[ConversationTurn]:
    """Give decoded turns the public class. The layout is the same: to convert them would double the cost."""
    for turn in turns:
        turn.__class__ = ConversationTurn  # type: ignore[assignment]
        for call in turn.tool_calls:
            call.__class__ = ToolCallRecord  # type: ignore[assignment]
    return turns  # type: ignore[return-value]


def _fields(turn: ConversationTurn) -> tuple[Any, ...]:
    """Return the array that a turn is encoded as; TypeError if it or its calls are of another type than their own."""
    if type(turn) is not ConversationTurn or type(turn.tool_calls) is not list:
        raise TypeError
    if not turn.tool_calls:
        return astuple(turn)
    calls = [astuple(call) for call in turn.tool_calls if type(call) is ToolCallRecord]
    if len(calls) != len(turn.tool_calls):
        raise TypeError
    # In the class' order; written out, as this is in the way of each save.
    return turn.id, turn.timestamp_ms, turn.role, turn.content, calls, turn.tags, turn.metadata


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
