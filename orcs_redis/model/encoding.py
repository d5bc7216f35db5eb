"""The one place that encodes and decodes.

What `pack` encodes comes back equal, or a SerializationError names the field. A value is packed, decoded as its
type and compared, which is quicker in C than to check it in Python. That leaves what msgpack can carry but JSON
can't (infinities, bytes, times, other keys than str, deep nesting): only free-form values can hold it, and they
are walked. Whatever fails one of the two is examined slowly, by type, to say where and why.

No error raised here holds a value, not even as its context: exceptions of msgspec and codecs may quote it. Keys of
values are named in paths, escaped and shortened.
"""

from __future__ import annotations

import ctypes
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from functools import cache, partial
from types import UnionType
from typing import Annotated, Any, Final, TypeVar, Union, cast, get_args, get_origin

import msgspec

from ..errors import CorruptSessionError, SerializationError
from ..interrupts import raise_interruption

__all__ = [
    "REFUSALS",
    "attempt",
    "check_refusal",
    "dump_json",
    "encode",
    "f32_text",
    "free_values_sound",
    "named",
    "pack",
    "parse_json",
    "parse_written",
    "repeated_field",
]

T = TypeVar("T")

# All that msgspec and codecs raise to refuse a value or data. Anything else says nothing about these.
REFUSALS: Final = (
    msgspec.MsgspecError,
    TypeError,  # what can't be encoded
    ValueError,  # text that is no UTF-8 or has surrogates, too; and what a __post_init__ raises
    OverflowError,  # integers
    RecursionError,  # nested too deep
    AttributeError,  # a field that is not set
)
_MAX_NAME: Final = 40

MAX_DEPTH: Final = 127
"""Nested containers that serde_json reads, the document's root counted."""

_QUICK_DEPTH: Final = 64  # up to here a free-form value can't be too deep, wherever it is in a session
_INT_RANGE: Final = range(-(2**63), 2**64)

_Walk = Callable[[Any], bool]
_Fault = tuple[str, str]

encode: Final = msgspec.msgpack.Encoder().encode
_decode_any: Final = msgspec.msgpack.Decoder().decode
_decode_json: Final = msgspec.json.Decoder().decode
_DEEPEST: Final = b"\x91" * MAX_DEPTH + b"\xc0"


def attempt(call: Callable[[Any], Any], value: object) -> tuple[Any, str | None]:
    """Call what encodes or decodes. Return the result and None; if it refuses the value, None and the reason.

    The reason may quote the value. Anything else that is raised meanwhile passes.
    """
    try:
        return call(value), None
    except REFUSALS as error:
        check_refusal(error)
        return None, str(error)


def check_refusal(error: Exception) -> None:
    """Raise what is no refusal though it is of such a type: a signal handler's error, or that of a full stack."""
    raise_interruption(error)
    if isinstance(error, RecursionError):
        _decode_any(_DEEPEST)  # raises the same if not the value is deep, but the caller's stack


def pack(value: object, hint: Any, where: str, level: int = 2) -> bytes:
    """Encode ``value``, which must be of type ``hint``, as msgpack.

    Args:
        value: a part of a session.
        hint: its type.
        where: its path in the session.
        level: how many containers it is in, itself counted.

    Raises:
        SerializationError: it would not come back equal.

    """
    decode, walk = _tools(hint)
    data = b""
    try:
        data = encode(value)
        if (walk is None or walk(value)) and decode(data) == value:
            return data
    except REFUSALS as error:
        check_refusal(error)
        data = b""
    fault = next(_faults(value, hint, where, level), None)  # outside of the block above, whose error may quote it
    if fault is None and data:
        return data  # equal but for subclasses of dict and list
    raise SerializationError(*(fault or (where, f"unsupported {type(value).__name__}")))


def utf8_of(text: str, what: str) -> bytes:
    """Return text as UTF-8; ValueError, which begins with `what`, if it is none."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is a str, not {type(text).__name__}")
    data, refusal = attempt(str.encode, text)
    if refusal is not None:
        raise ValueError(f"{what} has no lone surrogates")
    return cast(bytes, data)


def named(name: str) -> str:
    """Return a key as a path has it: printable, and shortened to 40 characters."""
    return _shortened(name if name.isprintable() else repr(name[:_MAX_NAME])[1:-1])


def _shortened(name: str) -> str:
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"


def free_values_sound(hint: type[msgspec.Struct]) -> Callable[[Any], bool]:
    """Return a quick test of the free-form values in a Struct: whether they would come back equal."""
    return _tools(hint)[1] or (lambda value: True)


def parse_json(data: bytes | msgspec.Raw, hint: Any, id: str = "", where: str = "") -> Any:
    """Decode JSON as serde_json does, or raise CorruptSessionError(id, field)."""

    def decode(data: bytes | msgspec.Raw) -> Any:
        bare = bytes(data)
        if hint != dict[str, msgspec.Raw] and b"0" * 19 in bare.translate(_DIGITS):
            bare = msgspec.json.encode(_without_long_integers(_decode_json(bare)))
        return _json_decoder(hint).decode(bare)

    value, refusal = attempt(decode, data)
    if refusal is None:
        return value
    path = re.search(r" - at `\$(.*)`$", refusal)
    missing = re.match(r"Object missing required field `(.*?)`", refusal)
    parts = [where, path[1].lstrip(".") if path else "", missing[1] if missing else ""]
    raise CorruptSessionError(id, ".".join(part for part in parts if part).replace(".[", "["))


def parse_written(data: bytes, hint: type[T], document: Callable[[T], object]) -> T | None:
    """Decode JSON; None unless ``document`` of what comes of it is encoded as the same text, but for whitespace.

    If it is, nothing was passed over or taken for something else, and no field is there twice.
    """

    def decode(data: bytes) -> T | None:
        value: T = _json_decoder(cast(Any, hint)).decode(data)
        encode(value)  # in msgpack, which refuses integers that are too long
        return value if _is_json_of(document(value), data) else None

    value: T | None = attempt(decode, data)[0]
    return value


def _is_json_of(value: object, data: bytes) -> bool:
    return msgspec.json.encode(value) == msgspec.json.format(data, indent=-1)


def repeated_field(data: bytes, fields: Mapping[str, Any]) -> str | None:
    """Return the path of a field that is there twice, which serde refuses; None without one, "" if it is no JSON.

    Args:
        data: an object in UTF-8.
        fields: its fields' types by name. In maps, and of fields that are unknown, the last of a key holds.

    """
    if attempt(lambda data: _is_json_of(_decode_json(data), data), data) == (True, None):
        return None
    found = False

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found
        unique = dict(pairs)
        if len(unique) == len(pairs):
            return unique
        found = True
        return _Repeated(pairs)

    # As floats, integers can't be too long.
    document, refusal = attempt(partial(json.loads, object_pairs_hook=collect, parse_int=float), data)
    if refusal is not None:
        return ""
    return next(_repeats(document, fields, ""), None) if found else None


class _Repeated(dict[str, Any]):
    """An object in which keys are twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs)
        self.repeated = {key for key, count in counts.items() if count > 1}


def _repeats(value: Any, fields: Mapping[str, Any], path: str) -> Iterator[str]:
    if isinstance(value, _Repeated):
        yield from (_step(path, name) for name in fields if name in value.repeated)
    for name, hint in fields.items():
        if name in value:
            yield from _repeats_within(value[name], hint, _step(path, name))


def _repeats_within(value: Any, hint: Any, path: str) -> Iterator[str]:
    origin, args = _shape(hint)
    if origin in (Union, UnionType):
        for arg in args:
            yield from _repeats_within(value, arg, path)
    elif isinstance(value, list) and origin is list:
        for n, item in enumerate(value):
            yield from _repeats_within(item, args[0], f"{path}[{n}]")
    elif isinstance(value, dict) and origin is dict:
        for key, item in value.items():
            yield from _repeats_within(item, args[1], _step(path, key))
    elif isinstance(value, dict) and isinstance(origin, msgspec.StructMeta):
        infos = msgspec.structs.fields(cast(type, origin))
        yield from _repeats(value, {f.encode_name: f.type for f in infos}, path)


def dump_json(document: dict[str, Any]) -> str:
    """Encode what was packed before, and is thus sound, exactly as serde_json's to_string_pretty does."""
    text = msgspec.json.format(msgspec.json.encode(document), indent=2).decode()
    return _EXPONENT.sub("e+", text)


def f32_text(value: float) -> msgspec.Raw:
    """Return a number as serde_json writes an f32: the shortest digits that give the same 32 bits."""
    single = _to_f32(value)
    sign = "-" if math.copysign(1, single) < 0 else ""
    number = Decimal(_shortest(abs(single)))
    exponent = number.adjusted()
    if -6 <= exponent <= 12:
        plain = f"{number:f}"
        return msgspec.Raw(f"{sign}{plain if '.' in plain else plain + '.0'}".encode())
    first, *rest = map(str, number.as_tuple().digits)
    return msgspec.Raw(f"{sign}{first}{'.' * bool(rest)}{''.join(rest)}e{exponent:+d}".encode())


def _shortest(single: float) -> str:
    """Return the shortest digits of an f32 that is not negative, and of these the nearest."""
    for count in range(9):
        digits, _, exponent = f"{single:.{count}e}".partition("e")
        nearest = int(digits.replace(".", ""))
        # Below a power of two f32s are twice as dense as above: the nearest number may be another's, the next one not.
        for number in (nearest, nearest + 1, nearest - 1):
            text = f"{number}e{int(exponent) - count}"
            if _to_f32(float(text)) == single:
                return text
    raise AssertionError("nine digits are enough")


def _to_f32(value: float) -> float:
    return ctypes.c_float(value).value


# serde_json writes 1e+16 where msgspec writes 1e16. In a pretty-printed text no string ends a line with a digit.
_EXPONENT: Final = re.compile(r"e(?=[0-9]+,?$)", re.MULTILINE)

_DIGITS: Final = bytes.maketrans(b"123456789", b"000000000")
_json_decoder: Final = cache(msgspec.json.Decoder)


def _without_long_integers(value: Any) -> Any:
    """serde_json reads an integer that neither i64 nor u64 can hold as a float."""
    if type(value) is dict:
        return {key: _without_long_integers(item) for key, item in value.items()}
    if type(value) is list:
        return [_without_long_integers(item) for item in value]
    return float(value) if type(value) is int and value not in _INT_RANGE else value


# Quick: is a value of this type sound, as far as a typed round trip can't tell?


@cache
def _tools(hint: Any) -> tuple[Callable[[bytes], Any], _Walk | None]:
    return msgspec.msgpack.Decoder(hint).decode, _walk_for(hint, frozenset())


def _is_sound(value: object, depth: int = 0) -> bool:
    kind = type(value)
    if kind is dict:
        if depth > _QUICK_DEPTH:
            return False
        for key, item in value.items():  # type: ignore[attr-defined]
            if type(key) is not str or (type(item) not in _ATOMS and not _is_sound(item, depth + 1)):
                return False
        return True
    if kind is list:
        if depth > _QUICK_DEPTH:
            return False
        for item in value:  # type: ignore[attr-defined]  # noqa: SIM110  # all() takes twice as long
            if type(item) not in _ATOMS and not _is_sound(item, depth + 1):
                return False
        return True
    return kind in _ATOMS or (kind is float and math.isfinite(value))  # type: ignore[arg-type]


_ATOMS: Final = frozenset({str, int, bool, type(None)})
_EMPTIES: Final = _ATOMS | {float, dict, list}


def _of_each(item: _Walk) -> _Walk:
    return lambda value: type(value) is list and all(map(item, value))


def _of_values(item: _Walk) -> _Walk:
    return lambda value: type(value) is dict and all(map(item, value.values()))


def _passes(value: object) -> bool:
    return True


def _walk_for(hint: Any, above: frozenset[Any]) -> _Walk | None:
    """Return a test of what a typed round trip lets pass in values of type ``hint``; None: of nothing.

    Of any value at all it raises nothing.
    """
    origin, args = _shape(hint)
    if origin is Any or (origin is dict and args == (str, Any)):
        return _is_sound
    if origin is float:
        return lambda value: type(value) is not float or math.isfinite(value)
    if origin in (Union, UnionType):
        walks = {_shape(arg)[0]: walk for arg in args if (walk := _walk_for(arg, above))}
        return (lambda value: walks.get(type(value), _passes)(value)) if walks else None
    if origin is list:
        return (item := _walk_for(args[0], above)) and _of_each(item)
    if origin is dict:
        return (item := _walk_for(args[1], above)) and _of_values(item)
    if isinstance(origin, msgspec.StructMeta):
        if origin in above:  # a recursive type: what is in it is known only later
            return lambda value: cast(_Walk, _tools(origin)[1])(value)
        kind = cast(type, origin)
        fields = msgspec.structs.fields(kind)
        parts = [(f.name, walk) for f in fields if (walk := _walk_for(f.type, above | {origin}))]

        def walk_struct(value: object) -> bool:
            if type(value) is not kind:  # a subclass may say that it is equal
                return False
            for name, walk in parts:
                part = getattr(value, name)
                if (part or type(part) not in _EMPTIES) and type(part) is not str and not walk(part):
                    return False
            return True

        return walk_struct
    return None


def _shape(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the type without its constraints, and its arguments; bare list, dict, object are free-form."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if hint in (Any, object, list, dict):
        return Any, ()
    return get_origin(hint) or hint, get_args(hint)


# Slow: what is wrong with it, and where?


def _step(path: str, key: str) -> str:
    return f"{path}.{named(key)}" if path else named(key)


def _faults(value: Any, hint: Any, path: str, depth: int) -> Iterator[_Fault]:
    """Find path and reason of all in ``value`` that can't be stored, in order; ``depth`` is its own level."""
    origin, args = _shape(hint)
    if isinstance(value, (dict, list, tuple, msgspec.Struct)) and depth > MAX_DEPTH:
        yield path, f"nested deeper than {MAX_DEPTH} levels"
    elif origin is Any:
        yield from _free_faults(value, path, depth)
    elif isinstance(origin, type) and issubclass(origin, msgspec.Struct):
        if type(value) is not origin:
            yield path, f"expected {origin.__name__}, got {type(value).__qualname__}"
            return
        for f in msgspec.structs.fields(origin):
            name = _step(path, f.name)
            if hasattr(value, f.name):
                yield from _faults(getattr(value, f.name), f.type, name, depth + 1)
            else:
                yield name, "is not set"
        yield from _leaf_faults(value, hint, path)  # what __post_init__ refuses
    elif origin is list and isinstance(value, list):
        for n, item in enumerate(value):
            yield from _faults(item, args[0], f"{path}[{n}]", depth + 1)
    elif origin is dict and isinstance(value, dict):
        for key, item in value.items():
            if args[0] is str and (fault := _key_fault(key)):
                yield path, fault
            else:
                yield from _faults(item, args[1], _step(path, str(key)), depth + 1)
    else:
        yield from _leaf_faults(value, hint, path)


def _free_faults(value: Any, path: str, depth: int) -> Iterator[_Fault]:
    if isinstance(value, dict):
        yield from _faults(value, dict[str, Any], path, depth)
    elif isinstance(value, list):
        for n, item in enumerate(value):
            yield from _faults(item, Any, f"{path}[{n}]", depth + 1)
    elif type(value) is int and value not in _INT_RANGE:
        yield path, "an integer outside of -2**63 to 2**64 - 1"
    elif fault := _text_fault(value) or _float_fault(value):
        yield path, fault
    elif not _returns(value, str | int | float | bool | None):
        yield path, f"unsupported {type(value).__name__}"


def _leaf_faults(value: Any, hint: Any, path: str) -> Iterator[_Fault]:
    if fault := _text_fault(value) or _float_fault(value):
        yield path, fault
    elif not _returns(value, hint):
        kind, expected = type(value).__name__, _names(hint)
        yield path, "out of range" if kind in expected else f"expected {' or '.join(expected)}, got {kind}"


def _names(hint: Any) -> list[str]:
    origin, args = _shape(hint)
    if origin in (Union, UnionType):
        return [name for arg in args for name in _names(arg)]
    return ["None" if origin is type(None) else getattr(origin, "__name__", str(origin))]


def _returns(value: Any, hint: Any) -> bool:
    data, refusal = attempt(encode, value)
    if refusal is None:
        back, refusal = attempt(partial(msgspec.msgpack.decode, type=hint), data)
    return refusal is None and bool(back == value)


def _key_fault(key: object) -> str | None:
    return _text_fault(key) if isinstance(key, str) else f"a key is {type(key).__name__}, not str"


def _text_fault(value: object) -> str | None:
    try:
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError:
        return "text with a lone surrogate"
    return None


def _float_fault(value: object) -> str | None:
    return "not a finite number" if isinstance(value, float) and not math.isfinite(value) else None
