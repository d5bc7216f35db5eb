"""An asset as Redis holds it: sections of a hash and values of a list, all msgpack, and what of them has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from ..errors import CorruptSessionError, SerializationError
from ..interrupts import raise_interruption
from ..model.asset import SESSION_VERSION, SessionAsset, check_asset, check_version, json_fields
from ..model.encoding import attempt, encode, named, pack
from ..model.sections import ConversationHistory, ConversationTurn
from .turns import are_encoded, decode_turns, encode_known_turn, encode_turn

__all__ = [
    "VERSION",
    "Baseline",
    "Codec",
    "Encoded",
    "Patch",
    "baseline_of",
    "decode_version",
    "set_baseline",
]

A = TypeVar("A", bound=SessionAsset)

VERSION = encode(SESSION_VERSION)
_MAX_EDITS = 64  # turns changed in place; beyond that it is cheaper to send the history anew
_BLOCK_BYTES = 1 << 16  # of turns that are compared at once: one by one costs more, and so do larger blocks

_ID = encode("id")
_NO_TURNS = encode("turns") + encode([])

_decode_int = msgspec.msgpack.Decoder(int).decode
_decode_any = msgspec.msgpack.Decoder().decode

# The history without its turns, which are a list of their own.
_HistoryRest = msgspec.defstruct(
    "HistoryRest",
    [
        (f.name, f.type) if f.required else (f.name, f.type, f.default)
        for f in msgspec.structs.fields(ConversationHistory)
        if f.name != "turns"
    ],
    kw_only=True,
)


class Encoded(NamedTuple):
    """An asset in Redis' form."""

    sections: dict[str, bytes]
    turns: list[bytes]
    metadata_tail: bytes  # of the index metadata: what only the client knows


class Baseline(NamedTuple):
    """What an asset was when it was loaded or last saved; kept in `vars(asset)`."""

    incarnation: object  # the namespace's incarnation
    id: str
    revision: int
    operation_id: bytes  # of the write that made the revision: a restore can reuse a revision
    sections: Mapping[str, bytes]
    turns: Sequence[bytes]


class Patch(NamedTuple):
    """What has to be sent so that the stored becomes the new."""

    sections: dict[str, bytes]
    removed: list[str]
    keep: tuple[int, int]  # index of the first and last turn to keep
    edits: list[tuple[int, bytes]]  # counted from the first one kept
    pushed: list[bytes]
    reshapes: bool  # whether there is more to do to the turns than to push

    @property
    def is_empty(self) -> bool:
        """Whether nothing has to be sent."""
        return not (self.sections or self.removed or self.pushed or self.reshapes)


class _Section(NamedTuple):
    name: str  # of the attribute
    key: str  # of the section
    kind: Any
    decode: Callable[[bytes], Any]
    required: bool


@cache
def _sections(asset_type: type[SessionAsset]) -> list[_Section]:
    found = []
    for name, field in json_fields(asset_type).items():
        if name != "id":
            kind = _HistoryRest if name == "history" else field.hint
            decode = msgspec.msgpack.Decoder(kind).decode
            found.append(_Section(name, field.key, kind, decode, field.required))
    return found


class Codec(Generic[A]):
    """Translates assets of one type.

    A section is a field of the asset: `history` without its turns, unknown ones (`asset.extra`) each under its own
    name. Names that begin with a dot are the store's own; an unknown field so named gets one more dot.
    """

    def __init__(self, asset_type: type[A], max_asset_bytes: int, max_turn_bytes: int, max_fields: int) -> None:
        self.asset_type = asset_type
        self.max_asset_bytes = max_asset_bytes
        self.max_turn_bytes = max_turn_bytes
        self.max_fields = max_fields
        self._sections = _sections(asset_type)
        self._known = {section.key for section in self._sections}
        self._names = {section.key.encode(): section.key for section in self._sections}
        self._encoded_keys = {section.key: encode(section.key) for section in self._sections}
        self._decode = msgspec.msgpack.Decoder(asset_type).decode

    def encode(self, asset: A, known: Baseline | None) -> Encoded:
        """Encode an asset, checking only what differs from what is known to be stored.

        Raises:
            SerializationError: a value that would not come back, or too many bytes.
            VersionIncompatibleError: the asset says it is of another version.

        """
        if not isinstance(asset, self.asset_type):
            raise SerializationError("asset", f"a {type(asset).__name__} is not a {self.asset_type.__name__}")
        check_asset(asset)
        old = known.sections if known is not None else {}
        sections = {}
        for name, key, kind, _, _ in _sections(type(asset)):  # a subclass' own fields are kept, too
            value = getattr(asset, name)
            if name == "history":
                value = self._history_rest(value)
            sections[key] = self._section(name, value, kind, old.get(key))
        for name, value in asset.extra.items():
            stored_name = _stored_name(name)
            sections[stored_name] = self._section(named(name), value, Any, old.get(stored_name))
        if len(sections) > self.max_fields:
            raise SerializationError("extra", f"{len(sections)} top-level fields, of {self.max_fields} allowed")
        turns = self._turns(asset.history.turns, known.turns if known is not None else ())
        if not all(sections.values()):
            raise SerializationError("asset", "it has no encoding")  # never to be stored
        total = sum(map(len, turns)) + sum(map(len, sections.values()))
        if total > self.max_asset_bytes:
            raise SerializationError("asset", f"{total} bytes, of {self.max_asset_bytes} allowed")
        context = asset.project_context
        metadata_tail = encode(asset.created_at_ms) + encode(context.name) + encode(context.root_path)
        return Encoded(sections, turns, metadata_tail)

    def turn(self, turn: ConversationTurn, where: str) -> bytes:
        """Encode one turn.

        Raises:
            SerializationError: a value that would not come back, or too many bytes.

        """
        data = encode_turn(turn, where)
        if len(data) > self.max_turn_bytes:
            raise SerializationError(where, f"{len(data)} bytes, of {self.max_turn_bytes} allowed")
        return data

    def decode(self, id: str, sections: Mapping[str, bytes], turns: Sequence[bytes]) -> A:
        """Build an asset.

        Raises:
            CorruptSessionError: a section or turn can't be decoded, or is missing.
            VersionIncompatibleError: it was saved under another version of the schema.

        """
        check_version(decode_version(id, sections.get("version", b"")))
        unknown = sections.keys() - self._known
        # As one map: to decode each section by itself costs twice as much.
        parts = [_ID, encode(id)]
        for key, data in sections.items():
            if key not in unknown:
                parts += (self._encoded_keys[key], _with_turns(id, data) if key == "history" else data)
        data = b"\xde" + (len(parts) // 2).to_bytes(2) + b"".join(parts)
        try:
            whole: tuple[A, str | None] = attempt(self._decode, data)
        except (ArithmeticError, LookupError) as error:  # of a subclass' own __post_init__
            raise_interruption(error)
            raise CorruptSessionError(id, "asset") from error
        asset, refusal = whole
        if refusal is not None:
            for name, key, _, decode, required in self._sections:
                if required or key in sections:
                    _decoded(id, name, decode, sections.get(key, b""))
            raise CorruptSessionError(id, "asset")
        asset.history.turns = decode_turns(id, turns)
        if unknown:
            # A hash has no order.
            asset.extra = {
                _unescape(name): _decoded(id, named(name), _decode_any, sections[name]) for name in sorted(unknown)
            }
        return asset

    def sections(self, fields: Mapping[bytes, bytes]) -> dict[str, bytes]:
        """Return the sections among a session's hash fields: those that are not the store's own."""
        sections = {}
        for name, data in fields.items():
            if known := self._names.get(name):
                sections[known] = data
            elif not name.startswith(b".") or name.startswith(b".."):
                try:
                    sections[name.decode()] = data
                except UnicodeDecodeError:
                    continue  # not from any orcs: left alone
        return sections

    @staticmethod
    def compare(stored: Baseline, new: Encoded) -> Patch | None:
        """Return how the new differs from the stored; None if it is better sent whole."""
        old_turns, turns = stored.turns, new.turns
        first = 0
        if old_turns and (not turns or old_turns[0] != turns[0]):
            # The oldest turns were dropped (compaction), or the first one was edited.
            first = old_turns.index(turns[0]) if turns and turns[0] in old_turns else 0
        kept = min(len(old_turns) - first, len(turns))
        edits = [(i, turns[i]) for i in range(kept) if old_turns[first + i] != turns[i]]
        if (old_turns and not kept) or len(edits) > _MAX_EDITS:
            return None
        return Patch(
            {name: data for name, data in new.sections.items() if stored.sections.get(name) != data},
            [name for name in stored.sections if name not in new.sections],
            (first, first + kept - 1),
            edits,
            turns[kept:],
            bool(edits) or first > 0 or kept < len(old_turns),
        )

    def _section(self, name: str, value: object, kind: Any, old: bytes | None) -> bytes:
        if old is not None and attempt(encode, value) == (old, None):
            return old
        return pack(value, kind, name)

    def _turns(self, turns: list[ConversationTurn], old: Sequence[bytes]) -> list[bytes]:
        """Encode a history; turns whose bytes are stored already were checked before."""
        data: list[bytes] = []
        known: set[bytes] = set()
        size = 1 + _BLOCK_BYTES * len(old) // (1 + sum(map(len, old)))
        for start in range(0, min(len(old), len(turns)), size):
            stored = old[start : min(start + size, len(turns))]
            block = turns[start : start + len(stored)]
            if are_encoded(block, stored):
                data += stored
                continue
            known = known or set(old)
            for n, turn in enumerate(block, start):
                quick = encode_known_turn(turn)
                data.append(quick if quick in known else self.turn(turn, f"history.turns[{n}]"))
        pushed = enumerate(turns[len(data) :], len(data))
        return data + [self.turn(turn, f"history.turns[{n}]") for n, turn in pushed]

    @staticmethod
    def _history_rest(history: object) -> object:
        if type(history) is not ConversationHistory:  # fields of a subclass would be dropped
            raise SerializationError("history", f"expected ConversationHistory, got {type(history).__name__}")
        if type(history.turns) is not list:
            raise SerializationError("history.turns", f"expected list, got {type(history.turns).__name__}")
        return _HistoryRest(**{name: getattr(history, name) for name in _HistoryRest.__struct_fields__})


def _with_turns(id: str, history: bytes) -> bytes:
    """Add an empty list of turns to the section, a map of few fields."""
    if not history or not 0x80 <= history[0] < 0x8F:
        raise CorruptSessionError(id, "history")
    return bytes((history[0] + 1,)) + _NO_TURNS + history[1:]


def decode_version(id: str, data: bytes) -> int:
    """Decode the number of a schema's version."""
    version: int = _decoded(id, "version", _decode_int, data)
    return version


def set_baseline(asset: SessionAsset, baseline: Baseline) -> None:
    """Keep with an asset what is stored of it."""
    vars(asset)["_baseline"] = baseline


def baseline_of(asset: SessionAsset) -> Baseline | None:
    """Return what was stored of an asset when it was loaded or last saved; None if it was not."""
    return vars(asset).get("_baseline")


def _decoded(id: str, name: str, decode: Callable[[Any], Any], data: bytes) -> Any:
    value, refusal = attempt(decode, data)
    if refusal is not None:
        raise CorruptSessionError(id, name)
    return value


def _stored_name(name: str) -> str:
    return f".{name}" if name.startswith(".") else name


def _unescape(name: str) -> str:
    return name[1:] if name.startswith(".") else name
