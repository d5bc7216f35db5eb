"""Requests that read a partition's index: sessions by time, sessions by label, how many there are."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from .. import scripts
from ..errors import CorruptSessionError, LayoutError
from ..model.asset import to_datetime
from ..model.encoding import attempt
from ..model.meta import SessionMeta, SyncState
from ..model.schema import Time
from .commands import Command, Reply, as_error, as_map
from .keys import Partition
from .request import Request

__all__ = [
    "ALL",
    "AllMeta",
    "Bounds",
    "IndexSizes",
    "LabelRun",
    "MetaRun",
    "Place",
    "Sizes",
    "decode_meta",
    "label_key",
]

_log = logging.getLogger("orcs_redis")

Bounds: TypeAlias = tuple[str | int, str | int]
"""Of updated_at_ms: the first is included, the second not."""
ALL: Bounds = ("-inf", "+inf")
Place: TypeAlias = tuple[int, bytes]
"""A place in the order of lists: updated_at_ms and id. Later ones are less."""

_decode_meta = msgspec.msgpack.Decoder(
    tuple[int, Time, int, bytes, Time, Time, dict[str, str], str | None, str | None]
).decode


class AllMeta(Request[list[SessionMeta]]):
    """The metadata of every session of a partition, in no order."""

    __slots__ = ("_partition",)

    def __init__(self, partition: Partition) -> None:
        super().__init__()
        self._partition = partition

    def commands(self) -> Sequence[Command]:
        """One plain command; the metadata holds what they are to be ordered by."""
        return [("HGETALL", self._partition.meta)]

    def decode(self, replies: Sequence[Reply]) -> list[SessionMeta]:
        """Decode them, without those that can't be: they show themselves when loaded."""
        _check_index(self._partition, replies)
        self._check(replies)
        return _metas(as_map(replies[0]).items())


class MetaRun(Request["tuple[Place | None, list[SessionMeta]]"]):
    """A run of a partition's sessions by time (scripts/page.lua): where it ended (None: at the end), its metadata."""

    __slots__ = ("_arguments", "_partition")

    def __init__(
        self, partition: Partition, limit: int, bounds: Bounds, after: Place | None, labels: Sequence[bytes]
    ) -> None:
        super().__init__()
        self._partition = partition
        self._arguments = (limit, *bounds, *(after or ("", "")), *labels)

    def commands(self) -> Sequence[Command]:
        """Call the script."""
        keys = (self._partition.updated, self._partition.meta, self._partition.labels)
        return [self._script(scripts.PAGE, keys, self._arguments)]

    def decode(self, replies: Sequence[Reply]) -> tuple[Place | None, list[SessionMeta]]:
        """Return the end, and the metadata of those where it can be decoded."""
        _check_index(self._partition, replies)
        self._check(replies)
        time, id, *flat = replies[0]
        return (int(float(time)), bytes(id)) if time else None, _metas(_pairs(flat))


class LabelRun(Request["LabelRun.Result"]):
    """The newest of a run of a partition's sessions that have a label (scripts/label.lua).

    Args:
        partition: is asked.
        count: how many to look at, in the order of their ids.
        limit: how many to return.
        bounds: of updated_at_ms.
        after: only those that come later in the order of lists.
        after_id: the last one looked at before, b"" at first.
        labels: that of the run, then others that they must have too.

    """

    class Result(NamedTuple):
        """Where it ended (None: at the end), how many there were, metadata, how many had none that can be decoded."""

        end: bytes | None
        found: int
        metas: list[SessionMeta]
        broken: int

    __slots__ = ("_arguments", "_partition")

    def __init__(
        self,
        partition: Partition,
        count: int,
        limit: int,
        bounds: Bounds,
        after: Place | None,
        after_id: bytes,
        labels: Sequence[bytes],
    ) -> None:
        super().__init__()
        self._partition = partition
        self._arguments = (count, limit, *bounds, *(after or ("", "")), after_id, *labels)

    def commands(self) -> Sequence[Command]:
        """Call the script."""
        keys = (self._partition.labels, self._partition.updated, self._partition.meta)
        return [self._script(scripts.LABEL, keys, self._arguments)]

    def decode(self, replies: Sequence[Reply]) -> Result:
        """Decode the metadata, where that is possible."""
        _check_index(self._partition, replies)
        self._check(replies)
        end, found, *flat = replies[0]
        metas = _metas(_pairs(flat))
        return LabelRun.Result(bytes(end) or None, int(found), metas, len(flat) // 2 - len(metas))


class Sizes(NamedTuple):
    """How many sessions a partition has: in all, updated within bounds, with each of some labels."""

    partition: Partition
    total: int
    within: int
    labels: list[int]


class IndexSizes(Request[Sizes]):
    """How many sessions a partition has."""

    __slots__ = ("_bounds", "_labels", "_partition")

    def __init__(self, partition: Partition, bounds: Bounds, labels: Sequence[bytes]) -> None:
        super().__init__()
        self._partition = partition
        self._bounds = bounds
        self._labels = labels

    def commands(self) -> Sequence[Command]:
        """Each counts without looking at the sessions."""
        first, stop = self._bounds
        updated, labels = self._partition.updated, self._partition.labels
        return [
            ("ZCARD", updated),
            ("ZCOUNT", updated, first, stop if stop == "+inf" else f"({stop}"),
            *[("ZLEXCOUNT", labels, b"[" + label, b"(" + label + b"\xff") for label in self._labels],
        ]

    def decode(self, replies: Sequence[Reply]) -> Sizes:
        """Return the numbers."""
        _check_index(self._partition, replies)
        self._check(replies)
        total, within, *labels = map(int, replies)
        return Sizes(self._partition, total, within, labels)


def label_key(name: str, value: str) -> bytes:
    """Return how the members of {p}:labels begin, before the id; the project's path is the label without a name."""
    key, text = name.encode(), value.encode()
    return len(key).to_bytes(1) + key + len(text).to_bytes(4) + text


def decode_meta(id: str, packed: bytes) -> SessionMeta:
    """Decode a session's index metadata; CorruptSessionError if it is none."""
    found, refusal = attempt(_decode_meta, packed)
    if refusal is not None:
        raise CorruptSessionError(id, "meta")
    revision, updated, turns, _, written, created, labels, name, root_path = found
    return SessionMeta(
        id=id,
        name=name,
        created_at=to_datetime(created),
        updated_at=to_datetime(updated),
        project_path=root_path,
        turn_count=turns,
        written_at=to_datetime(written),
        sync_state=SyncState.SYNCED,
        revision=revision,
        labels=labels,
    )


def _pairs(flat: Sequence[bytes]) -> Iterable[tuple[bytes, bytes]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _metas(pairs: Iterable[tuple[bytes, bytes]]) -> list[SessionMeta]:
    metas = []
    for id, packed in pairs:
        try:
            metas.append(decode_meta(id.decode(), packed))
        except (CorruptSessionError, UnicodeDecodeError):
            _log.warning("a list leaves out session %r: its metadata can't be decoded", id)
    return metas


def _check_index(partition: Partition, replies: Sequence[Reply]) -> None:
    if any("WRONGTYPE" in (as_error(reply) or "") for reply in replies):
        raise LayoutError(f"the index of {partition.prefix} is not of this store's layout")
