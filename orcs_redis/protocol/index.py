"""Requests that read a partition's index: sessions by time, sessions by label, how many there are."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from .. import scripts
from ..errors import CorruptSessionError, LayoutError
from ..model.asset import SessionAsset, to_datetime
from ..model.encoding import attempt
from ..model.labels import labels_of
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
    "Row",
    "Sizes",
    "decode_meta",
    "decode_rows",
    "encode_meta",
    "label_key",
    "origin_of",
    "revision_of",
]

_log = logging.getLogger("orcs_redis")

Bounds: TypeAlias = tuple[str | int, str | int]
"""Of updated_at_ms: the first is included, the second not."""
ALL: Bounds = ("-inf", "+inf")
Place: TypeAlias = tuple[int, bytes]
"""A session's place in the order of lists: updated_at_ms and id, the greatest first."""
Row: TypeAlias = tuple[int, bytes, bytes]
"""A session's place and its index metadata, so that rows are in the order of lists before they are decoded."""

_decode_meta = msgspec.msgpack.Decoder(
    tuple[int, Time, int, bytes, Time, Time, dict[str, str], str | None, str | None]
).decode


class AllMeta(Request[list[Row]]):
    """Every session of a partition, in no order."""

    __slots__ = ("_partition",)

    def __init__(self, partition: Partition) -> None:
        super().__init__()
        self._partition = partition

    def commands(self) -> Sequence[Command]:
        """One plain command; the metadata has what they are to be ordered by."""
        return [("HGETALL", self._partition.meta)]

    def decode(self, replies: Sequence[Reply]) -> list[Row]:
        """Return them."""
        _check_index(self._partition, replies)
        self._check(replies)
        return _rows(as_map(replies[0]).items())


class MetaRun(Request["tuple[Place | None, list[Row]]"]):
    """A run of a partition's sessions by time (scripts/page.lua): where it ended (None: at the end), and the rows."""

    __slots__ = ("_arguments", "_partition")

    def __init__(
        self, partition: Partition, limit: int, bounds: Bounds, after: Place | None, labels: Sequence[bytes]
    ) -> None:
        super().__init__()
        self._partition = partition
        self._arguments = (b"%d" % limit, *bounds, *(after or ("", "")), *labels)

    def commands(self) -> Sequence[Command]:
        """Call the script."""
        keys = (self._partition.updated, self._partition.meta, self._partition.labels)
        return [self._script(scripts.PAGE, keys, self._arguments)]

    def decode(self, replies: Sequence[Reply]) -> tuple[Place | None, list[Row]]:
        """Return the end and the rows."""
        _check_index(self._partition, replies)
        self._check(replies)
        time, id, *flat = replies[0]
        return (int(float(time)), bytes(id)) if time else None, _rows(zip(flat[::2], flat[1::2], strict=True))


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
        """Where the run ended (None: at the end), how many were found in it, rows in no order."""

        end: bytes | None
        found: int
        rows: list[Row]

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
        self._arguments = (b"%d" % count, b"%d" % limit, *bounds, *(after or ("", "")), after_id, *labels)

    def commands(self) -> Sequence[Command]:
        """Call the script."""
        keys = (self._partition.labels, self._partition.updated, self._partition.meta)
        return [self._script(scripts.LABEL, keys, self._arguments)]

    def decode(self, replies: Sequence[Reply]) -> Result:
        """Return what was found."""
        _check_index(self._partition, replies)
        self._check(replies)
        end, found, *flat = replies[0]
        rows = [(int(time), bytes(id), bytes(meta)) for time, id, meta in zip(*[iter(flat)] * 3, strict=True)]
        return LabelRun.Result(bytes(end) or None, int(found), rows)


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


def encode_meta(asset: SessionAsset, revision: int) -> bytes:
    """Return index metadata of a session that was read by itself; when it was written is not known then."""
    updated, context = asset.updated_at_ms, asset.project_context
    turns, labels = len(asset.history.turns), labels_of(asset)
    values = (revision, updated, turns, b"", updated, asset.created_at_ms, labels, context.name, context.root_path)
    return msgspec.msgpack.encode(values)


def revision_of(packed: bytes) -> int:
    """Return the revision that index metadata is of."""
    return int.from_bytes(packed[2:10])


def origin_of(packed: bytes) -> bytes:
    """Return the store that made the revision."""
    return packed[26:34]


def decode_rows(rows: Iterable[Row]) -> list[SessionMeta]:
    """Return metadata, without those where it can't be decoded: these show themselves when loaded."""
    metas = []
    for _, id, packed in rows:
        try:
            metas.append(decode_meta(id.decode(), packed))
        except (CorruptSessionError, UnicodeDecodeError):
            _warn(id)
    return metas


def _rows(pairs: Iterable[tuple[bytes, bytes]]) -> list[Row]:
    rows = []
    for id, packed in pairs:
        if packed[:1] == b"\x99" and packed[10:11] == b"\xcf":
            rows.append((int.from_bytes(packed[11:19]), bytes(id), packed))
        else:
            _warn(id)
    return rows


def _warn(id: bytes) -> None:
    _log.warning("a list leaves out session %r: its metadata can't be decoded", id)


def _check_index(partition: Partition, replies: Sequence[Reply]) -> None:
    if any("WRONGTYPE" in (as_error(reply) or "") for reply in replies):
        raise LayoutError(f"the index of {partition.prefix} is not of this store's layout")
