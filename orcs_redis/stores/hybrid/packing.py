"""Digests to bytes and back, in little space. Pure."""

from __future__ import annotations

import itertools
import uuid
import zlib
from typing import Final

import msgspec

from ...model.encoding import attempt
from ...model.parts import Digests, Entry

__all__ = ["Packing"]

_SIZE: Final = 16  # of a digest
_UUID_LENGTH: Final = 36


class Packing:
    """How the digests of a session's parts are stored.

    Args:
        defaults: the digests of the parts of an empty session. Those that a session has as well are left out, and
            their names are a dictionary to compress names with.

    """

    def __init__(self, defaults: dict[str, bytes]) -> None:
        self._defaults = defaults
        self._names = " ".join(defaults).encode()

    def pack(self, parts: Digests) -> bytes:
        """Encode digests: names apart, since they can be compressed, and without what every empty session has."""
        values = {name: data for name, data in parts.values.items() if self._defaults.get(name) != data}
        missing = [name for name in self._defaults if name not in parts.values]
        lists = {path: entries for path, entries in parts.lists.items() if entries}
        keys = {path: _pack_keys(lists[path]) for path in lists}
        numbers = [len(entries) for entries in lists.values()]
        names = list(values), missing, list(lists), numbers, [*parts.lists.keys() - lists.keys()]
        packer = zlib.compressobj(zdict=self._names)
        compressed = packer.compress(msgspec.msgpack.encode(names)) + packer.flush()
        data = b"".join(itertools.chain(values.values(), *([item for _, item in lists[path]] for path in keys)))
        return msgspec.msgpack.encode((compressed, [*keys.values()], data))

    def unpack(self, packed: bytes) -> Digests:
        """Return the digests that were packed; errors of many kinds if these bytes are none."""
        compressed, keys, data = msgspec.msgpack.decode(
            packed, type=tuple[bytes, list[list[str] | bytes | None], bytes]
        )
        names, missing, paths, numbers, empty = msgspec.msgpack.decode(
            zlib.decompressobj(zdict=self._names).decompress(compressed),
            type=tuple[list[str], list[str], list[str], list[int], list[str]],
        )
        pieces = iter([data[at : at + _SIZE] for at in range(0, len(data), _SIZE)])
        values = {name: item for name, item in self._defaults.items() if name not in missing}
        values |= {name: next(pieces) for name in names}
        lists: dict[str, list[Entry]] = {path: [] for path in empty}
        for path, number, found in zip(paths, numbers, keys, strict=True):
            items = [next(pieces) for _ in range(number)]
            lists[path] = [*zip(_unpack_keys(found, items), items, strict=True)]
        return Digests(values, lists)


def _pack_keys(entries: list[Entry]) -> list[str] | bytes | None:
    """Return the keys of a list as they are stored: of UUIDs the bytes, nothing where they are the digests."""
    keys = [key for key, _ in entries]
    if keys == [data.hex() for _, data in entries]:
        return None
    if all(len(key) == _UUID_LENGTH for key in keys):
        packed = b"".join([attempt(bytes.fromhex, key.replace("-", ""))[0] or b"" for key in keys])
        if keys == _unpack_keys(packed, []):
            return packed
    return keys


def _unpack_keys(keys: list[str] | bytes | None, items: list[bytes]) -> list[str]:
    if keys is None:
        return [item.hex() for item in items]
    if isinstance(keys, bytes):
        return [str(uuid.UUID(bytes=keys[at : at + 16].ljust(16))) for at in range(0, len(keys), 16)]
    return keys
