"""An asset as Redis holds it: parts in a hash and turns in a list, all msgpack, and what of them has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar, get_args

import msgspec

from ..errors import CorruptSessionError, SerializationError
from ..interrupts import raise_interruption
from ..model.asset import SESSION_VERSION, SessionAsset, check_asset, check_version, json_fields
from ..model.encoding import attempt, encode, named, pack
from ..model.labels import labels_of
from ..model.parts import MAPS, Place, drop_part
from ..model.sections import ConversationHistory, ConversationTurn
from .baseline import Baseline
from .turns import are_encoded, decode_turns, encode_known_turn, encode_turn

__all__ = [
    "VERSION",
    "Codec",
    "Encoded",
    "IndexFields",
    "decode_version",
]

A = TypeVar("A", bound=SessionAsset)

VERSION = encode(SESSION_VERSION)
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

    fields: dict[str, bytes]
    turns: list[bytes]
    about: IndexFields


class IndexFields(NamedTuple):
    """What the index metadata takes over from parts."""

    created_at: bytes
    names: bytes
    labels: bytes


class _Section(NamedTuple):
    name: str  # of the attribute
    key: str  # in JSON and in the hash
    kind: Any  # its type; of a map that of its values
    decode: Callable[[bytes], Any]
    required: bool
    is_map: bool  # of which each value is a part


@cache
def _sections(asset_type: type[SessionAsset]) -> list[_Section]:
    found = []
    for name, field in json_fields(asset_type).items():
        if name != "id":
            is_map = name in MAPS
            kind = _HistoryRest if name == "history" else get_args(field.hint)[1] if is_map else field.hint
            decode = msgspec.msgpack.Decoder(kind).decode
            found.append(_Section(name, field.key, kind, decode, field.required, is_map))
    return found


class Codec(Generic[A]):
    """Translates assets of one type.

    A field of a session's hash is a part: a value of one of the maps in `MAPS`, or another top-level field of the
    asset: `history` without its turns, unknown ones (`asset.extra`) each under its own name.
    """

    def __init__(self, asset_type: type[A], max_asset_bytes: int, max_turn_bytes: int, max_fields: int) -> None:
        self.asset_type = asset_type
        self.max_asset_bytes = max_asset_bytes
        self.max_turn_bytes = max_turn_bytes
        self.max_fields = max_fields
        self._sections = {section.key: section for section in _sections(asset_type)}
        self._names = {key.encode(): key for key in self._sections}
        self._encoded_keys = {key: encode(key) for key in self._sections}
        self._maps = [key for key, section in self._sections.items() if section.is_map]
        self._decode = msgspec.msgpack.Decoder(asset_type).decode

    def of(self, asset: A) -> Codec[A]:
        """Return a codec of an asset's own type, which may be a subclass."""
        if type(asset) is self.asset_type:
            return self
        return Codec(type(asset), self.max_asset_bytes, self.max_turn_bytes, self.max_fields)

    def encode(self, asset: A, known: Baseline | None) -> Encoded:
        """Encode an asset, checking only what differs from what is known to be stored.

        Raises:
            SerializationError: a value that would not come back, or too many bytes.
            VersionIncompatibleError: the asset says it is of another version.

        """
        fields = self._encode_fields(asset, known.fields if known is not None else {})
        turns = self._turns(asset.history.turns, known.turns if known is not None else ())
        total = sum(map(len, turns)) + sum(map(len, fields.values()))
        if total > self.max_asset_bytes:
            raise SerializationError("asset", f"{total} bytes, of {self.max_asset_bytes} allowed")
        return Encoded(fields, turns, index_fields(asset))

    def _encode_fields(self, asset: A, old: Mapping[str, bytes]) -> dict[str, bytes]:
        if not isinstance(asset, self.asset_type):
            raise SerializationError("asset", f"a {type(asset).__name__} is not a {self.asset_type.__name__}")
        check_asset(asset)
        fields = {}
        sections = _sections(type(asset))  # a subclass' own fields are kept, too
        for name, key, kind, _, _, is_map in sections:
            value = getattr(asset, name)
            if is_map:
                for part, data in _map_parts(key, value, kind, old):
                    fields[part] = data
            else:
                value = self._history_rest(value) if name == "history" else value
                fields[key] = encoded_part(value, kind, name, old.get(key))
        for name, value in asset.extra.items():
            field = stored_name(name)
            fields[field] = encoded_part(value, Any, named(name), old.get(field))
        if len(sections) + len(asset.extra) > self.max_fields:
            number = len(sections) + len(asset.extra)
            raise SerializationError("extra", f"{number} top-level fields, of {self.max_fields} allowed")
        if not all(fields.values()):
            raise SerializationError("asset", "it has no encoding")  # never to be stored
        return fields

    def encode_part(self, place: Place, value: object) -> tuple[str, bytes]:
        """Encode a part that can be set by itself (`model.parts.settable`): its field, its value."""
        section, key = place.fields[0], place.key
        where = named(key) if section == "extra" and key is not None else section
        if section != "extra" and key is not None:
            where = f"{section}.{named(key)}"
        data = pack(value, place.hint, where, level=2 if key is None or section == "extra" else 3)
        if len(data) > self.max_asset_bytes:
            raise SerializationError(where, f"{len(data)} bytes, of {self.max_asset_bytes} allowed")
        return self.field_of(place), data

    def field_of(self, place: Place) -> str:
        """Return the field of a part that is stored by itself."""
        section, key = place.fields[0], place.key
        if section == "extra" and key is not None:
            return stored_name(key)
        name = json_fields(self.asset_type)[section].key
        return name if key is None else f"{name}.{key}"

    def is_required(self, field: str) -> bool:
        """Whether every session has this field."""
        return field in self._sections and self._sections[field].required

    def part_of(self, field: str) -> str:
        """Return the name of the part that a field is (`model.parts`)."""
        if field in self._sections:
            return self._sections[field].name
        section = field.partition(".")[0]
        return field if section and section != field else f"extra.{_unescape(field)}"

    def field_of_part(self, part: str) -> str | None:
        """Return the field that a part is stored in; None: it is a turn."""
        section, _, key = part.partition(".")
        if section in MAPS:
            return part
        known = json_fields(self.asset_type).get(section)
        return stored_name(key) if section == "extra" else known.key if known else None

    def new_session(self) -> Encoded:
        """Encode what a session of this type has at first.

        Raises:
            ValueError: it has fields without a default.

        """
        try:
            asset = self.asset_type()
        except TypeError as error:
            raise_interruption(error)
            raise ValueError(f"a {self.asset_type.__name__} can't be made without values for its fields") from None
        return Encoded(self._encode_fields(asset, {}), [], index_fields(asset))

    def turns(self, turns: Sequence[ConversationTurn]) -> list[bytes]:
        """Encode some turns, by themselves."""
        if len(turns) == 1:
            return [self.turn(turns[0], "turn")]
        data = [self.turn(turn, f"turns[{n}]") for n, turn in enumerate(turns)]
        if sum(map(len, data)) > self.max_asset_bytes:
            raise SerializationError("turns", f"more than {self.max_asset_bytes} bytes")
        return data

    def turn(self, turn: ConversationTurn, where: str) -> bytes:
        """Encode one turn.

        Raises:
            SerializationError: a value that would not come back, or too many bytes.

        """
        data = encode_turn(turn, where)
        if len(data) > self.max_turn_bytes:
            raise SerializationError(where, f"{len(data)} bytes, of {self.max_turn_bytes} allowed")
        return data

    def decode(self, id: str, fields: Mapping[str, bytes], turns: Sequence[bytes]) -> A:
        """Build an asset.

        Raises:
            CorruptSessionError: a part or turn can't be decoded, or is missing.
            VersionIncompatibleError: it was saved under another version of the schema.

        """
        check_version(decode_version(id, fields.get("version", b"")))
        # As one map: to decode each part by itself costs twice as much.
        parts = [_ID, encode(id)]
        maps: dict[str, list[tuple[str, bytes]]] = {
            key: [] for key, section in self._sections.items() if section.is_map
        }
        extra = {}
        for field, data in fields.items():
            section, _, key = field.partition(".")
            if field in self._sections:
                parts += (self._encoded_keys[field], _with_turns(id, data) if field == "history" else data)
            elif not section or section == field:
                extra[_unescape(field)] = data
            elif section in maps:
                maps[section].append((key, data))
        for section, items in maps.items():
            parts += (self._encoded_keys[section], _map_of(items))
        data = b"\xde" + (len(parts) // 2).to_bytes(2) + b"".join(parts)
        try:
            whole: tuple[A, str | None] = attempt(self._decode, data)
        except (ArithmeticError, LookupError) as error:  # of a subclass' own __post_init__
            raise_interruption(error)
            raise CorruptSessionError(id, "asset") from error
        asset, refusal = whole
        if refusal is not None:
            self._find_fault(id, fields)
        asset.history.turns = decode_turns(id, turns)
        if extra:
            # A hash has no order.
            asset.extra = {name: _decoded(id, named(name), _decode_any, extra[name]) for name in sorted(extra)}
        return asset

    def decode_part(self, id: str, field: str, data: bytes) -> Any:
        """Decode the value of one field of the hash; `history` has no turns."""
        section, _, key = field.partition(".")
        known = self._sections.get(section)
        if known is None:
            return _decoded(id, named(_unescape(field)), _decode_any, data)
        return _decoded(id, f"{section}.{named(key)}" if known.is_map else known.name, known.decode, data)

    def encode_field(self, asset: A, field: str) -> bytes | None:
        """Encode one field as it is in an asset that can be stored; None if it has none, or no encoding."""
        owner, key = self._owner(asset, field)
        if key is None:
            name = self._sections[field].name
            value = getattr(asset, name)
            value = self._history_rest(value) if name == "history" else value
        elif key in owner:
            value = owner[key]
        else:
            return None
        data: bytes | None = attempt(encode, value)[0]
        return data

    def set_field(self, asset: A, field: str, value: Any) -> None:
        """Set a field to what `decode_part` has returned."""
        owner, key = self._owner(asset, field)
        if key is not None:
            owner[key] = value
        elif field == "history":
            for name in _HistoryRest.__struct_fields__:
                setattr(asset.history, name, getattr(value, name))
        else:
            setattr(asset, self._sections[field].name, value)

    def drop_field(self, asset: A, field: str) -> None:
        """Remove a field that is not required, or set it to its default."""
        owner, key = self._owner(asset, field)
        if key is not None:
            owner.pop(key, None)
        else:
            drop_part(asset, self._sections[field].name)

    def _owner(self, asset: A, field: str) -> tuple[Any, str | None]:
        """Return the map that a field lies in, and its key there; None: it is a section."""
        section, _, key = field.partition(".")
        if field in self._sections:
            return None, None
        if section and section != field:
            return getattr(asset, self._sections[section].name), key
        return asset.extra, _unescape(field)

    @staticmethod
    def assign(asset: A, other: A) -> None:
        """Make an asset equal to another one; its history and list of turns stay the same objects."""
        history = asset.history
        for name in asset.__struct_fields__:
            if name != "history":
                setattr(asset, name, getattr(other, name))
        for name in _HistoryRest.__struct_fields__:
            setattr(history, name, getattr(other.history, name))
        history.turns[:] = other.history.turns

    def _find_fault(self, id: str, fields: Mapping[str, bytes]) -> NoReturn:
        for key, section in self._sections.items():
            if section.is_map:
                for field in fields:
                    if field.startswith(f"{key}."):
                        self.decode_part(id, field, fields[field])
            elif section.required or key in fields:
                _decoded(id, section.name, section.decode, fields.get(key, b""))
        raise CorruptSessionError(id, "asset")

    def parts(self, hash: Mapping[bytes, bytes]) -> dict[str, bytes]:
        """Return the parts among a session's hash fields: those that are not the store's own."""
        parts = {}
        for name, data in hash.items():
            if known := self._names.get(name):
                parts[known] = data
                continue
            try:
                field = name.decode()
            except UnicodeDecodeError:
                continue  # not from any orcs: left alone
            section, _, _ = field.partition(".")
            if field.startswith("..") or section == field or section in self._maps:
                parts[field] = data  # else the store's own, or of what is not known here
        return parts

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


def index_fields(asset: SessionAsset) -> IndexFields:
    """Return what the index metadata takes over from an asset that can be stored."""
    context = asset.project_context
    names = encode(context.name) + encode(context.root_path)
    return IndexFields(asset.created_at_ms.to_bytes(8), names, encode(labels_of(asset)))


def encoded_part(value: object, kind: Any, where: str, old: bytes | None, level: int = 2) -> bytes:
    """Encode a part; what is stored already was checked before."""
    if old is not None and attempt(encode, value) == (old, None):
        return old
    return pack(value, kind, where, level)


def _map_parts(section: str, value: object, kind: Any, old: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    if not isinstance(value, dict) or not {*map(type, value)} <= {str} or attempt(encode, [*value])[1] is not None:
        pack(value, dict[str, kind], section)  # says what is wrong
        raise SerializationError(section, "it has no encoding")
    for key, item in value.items():
        part = f"{section}.{key}"
        yield part, encoded_part(item, kind, f"{section}.{named(key)}", old.get(part), level=3)


def _map_of(items: list[tuple[str, bytes]]) -> bytes:
    """Return a msgpack map; a hash has no order."""
    items.sort()
    header = b"\xdf" + len(items).to_bytes(4)
    return header + b"".join([encode(key) + data for key, data in items])


def _with_turns(id: str, history: bytes) -> bytes:
    """Add an empty list of turns to the section, a map of few fields."""
    if not history or not 0x80 <= history[0] < 0x8F:
        raise CorruptSessionError(id, "history")
    return bytes((history[0] + 1,)) + _NO_TURNS + history[1:]


def decode_version(id: str, data: bytes) -> int:
    """Decode the number of a schema's version."""
    version: int = _decoded(id, "version", _decode_int, data)
    return version


def _decoded(id: str, name: str, decode: Callable[[Any], Any], data: bytes) -> Any:
    value, refusal = attempt(decode, data)
    if refusal is not None:
        raise CorruptSessionError(id, name)
    return value


def stored_name(name: str) -> str:
    """Return the field of a top-level name: one with a dot would look like a part of a map, or the store's own."""
    return f"..{name}" if "." in name else name


def _unescape(field: str) -> str:
    return field[2:] if field.startswith("..") else field
