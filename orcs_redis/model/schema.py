"""How the parts of a session are declared: the types of numbers, and what must be in the data but not in Python.

A field with ``= value`` may be missing in what is decoded. A field with ``= initial(...)`` is required there, as in
orcs; only who makes a part in Python gets a default. Unknown nested fields are dropped, as serde does.

msgspec has one default for both. So a metaclass keeps what `initial` declares from msgspec, which then sees a required
field, and fills it in when the class is called; msgspec decodes without calling it
(docs/decisions/0001-required-fields-by-a-metaclass.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Final, NamedTuple, Self, TypeAlias

from msgspec import Meta, Struct, StructMeta
from msgspec.structs import asdict, replace

__all__ = ["F32", "MAX_TIME_MS", "U8", "U32", "U64", "FreeForm", "Noted", "Part", "Time", "initial"]

MAX_TIME_MS: Final = 253_402_300_799_999  # the last millisecond of the year 9999
_F32_MAX: Final = 3.4028235677973362e38  # the largest double that is rounded to an f32, not to infinity

U64 = Annotated[int, Meta(ge=0)]  # msgspec has no bound beyond int64; encoding.py sees to the upper one
U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
U8 = Annotated[int, Meta(ge=0, le=255)]
Time = Annotated[int, Meta(ge=0, le=MAX_TIME_MS)]
F32 = Annotated[float, Meta(ge=-_F32_MAX, le=_F32_MAX)]
FreeForm: TypeAlias = dict[str, Any]


class _Initial(NamedTuple):
    make: Callable[[], Any]


def initial(make: Callable[[], Any]) -> Any:
    """Declare what a field is at first in Python alone: what is decoded must have it."""
    return _Initial(make)


class _PartMeta(StructMeta):
    """Keeps what `initial` declares from msgspec, and fills it in when the class is called."""

    _initial: dict[str, Callable[[], Any]]
    _derive: Any

    def __new__(mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **config: Any) -> Any:
        own = {key: value.make for key, value in namespace.items() if isinstance(value, _Initial)}
        kept = {key: value for key, value in namespace.items() if key not in own}
        cls = super().__new__(mcls, name, bases, kept, **{"kw_only": True, **config})
        cls._initial = getattr(cls, "_initial", {}) | own
        return cls

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        for name, make in cls._initial.items():
            if name not in fields:
                # With a plain make() CPython's adaptive interpreter would soon skip this very method: once it
                # has seen `dict` there, it calls types by their own vectorcall, which msgspec's have.
                fields[name] = make(*())
        part = super().__call__(*args, **fields)
        if cls._derive is not None:
            cls._derive(part)
        return part


class Part(Struct, metaclass=_PartMeta):
    """What parts have in common: no repr shows what a user or a model wrote."""

    _shown: ClassVar[tuple[str, ...]] = ()  # the fields that a repr may show; of a container, its length
    _derive: ClassVar[Any] = None  # a method that sets fields by others when a part is made in Python

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        fields = [(name, getattr(self, name)) for name in self._shown]
        return [(name, len(v) if isinstance(v, (list, dict)) else v) for name, v in fields]

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({shown})"


class Noted(Part, dict=True):
    """A part that carries what a store notes of it: no fields, but copied and pickled with it."""

    def __copy__(self) -> Self:
        new = replace(self)
        vars(new).update(vars(self))
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = memo[id(self)] = replace(self, **copy.deepcopy(asdict(self), memo))
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), asdict(self), vars(self))


def _restored(kind: type[Noted], fields: dict[str, Any], notes: dict[str, Any]) -> Noted:
    new = kind(**fields)
    vars(new).update(notes)
    return new
