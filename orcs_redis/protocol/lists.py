"""Lists of sessions: requests for runs of the index, and plans that merge those of the partitions."""

from __future__ import annotations

import base64
import builtins
import itertools
import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

import msgspec

from .. import scripts
from ..errors import CorruptSessionError, LayoutError
from ..interrupts import raise_interruption
from ..model.asset import to_datetime
from ..model.encoding import attempt
from ..model.meta import Page, SessionMeta, SyncState
from ..model.schema import Time
from .commands import Argument, Command, Reply, as_error, as_map
from .keys import Partition
from .request import Plan, Request, Together
from .writer import Namespace

__all__ = ["AllMeta", "Lists", "MetaRun", "Position", "decode_meta"]

_log = logging.getLogger("orcs_redis")
Position: TypeAlias = tuple[Argument, Argument]  # a place in the index: updated_at_ms and id
_ALL: tuple[Argument, Argument] = ("-inf", "+inf")
_UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_LIST_CHUNK = 10_000  # sessions looked at in one go, in all partitions, where few may be wanted

_decode_meta = msgspec.msgpack.Decoder(
    tuple[int, Time, int, bytes, Time, Time, dict[str, str], str | None, str | None]
).decode


class Lists:
    """What there is to ask about many sessions, as plans."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace

    def list(
        self,
        limit: int | None,
        project_path: str | None,
        updated_after: datetime | None,
        updated_before: datetime | None,
    ) -> Plan[builtins.list[SessionMeta]]:
        """Metadata, newest first."""
        span = _span(updated_after, updated_before)
        if limit is None and span == _ALL:
            runs = yield Together(map(AllMeta, self._namespace.keyspace.partitions))
            found = builtins.list(itertools.chain.from_iterable(runs))
            found = [meta for meta in found if project_path is None or meta.project_path == project_path]
            found.sort(key=_position, reverse=True)
            return found
        if limit is not None:
            limit = _limit(limit, least=0)
        return (yield from self._run(limit, project_path, span, None))

    def page(
        self,
        limit: int,
        cursor: str | None,
        project_path: str | None,
        updated_after: datetime | None,
        updated_before: datetime | None,
    ) -> Plan[Page[SessionMeta]]:
        """One page of metadata, newest first, and where the next begins."""
        after = None if cursor is None else _decode_cursor(cursor)
        span = _span(updated_after, updated_before)
        found = yield from self._run(_limit(limit, least=1) + 1, project_path, span, after)
        if len(found) <= limit:
            return Page(found, None)
        items = found[:limit]
        return Page(items, _encode_cursor(_position(items[-1])))

    def _run(
        self,
        limit: int | None,
        project_path: str | None,
        span: tuple[Argument, Argument],
        after: tuple[int, str] | None,
    ) -> Plan[builtins.list[SessionMeta]]:
        """Collect runs of all partitions, until none can have more of the first `limit`."""
        found: builtins.list[SessionMeta] = []
        positions: dict[Partition, Position] = {}
        if limit != 0:
            positions = dict.fromkeys(self._namespace.keyspace.partitions, after or ("", ""))
        while positions:
            share = 1 + _LIST_CHUNK // len(positions)
            if limit is not None and project_path is None:
                share = min(limit, share, 2 + 2 * limit // len(positions))  # about as many as each has of the first
            runs = yield Together(MetaRun(partition, share, span, at) for partition, at in positions.items())
            positions = {partition: end for partition, (end, _) in zip(positions, runs, strict=True) if end is not None}
            for _, metas in runs:
                found += [meta for meta in metas if project_path is None or meta.project_path == project_path]
            if limit is not None and len(found) >= limit:
                found.sort(key=_position, reverse=True)
                del found[limit:]
                milliseconds, id = _position(found[-1])
                last: Any = milliseconds, id.encode()
                positions = {partition: end for partition, end in positions.items() if end > last}
        found.sort(key=_position, reverse=True)
        return found


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


class MetaRun(Request["tuple[Position | None, list[SessionMeta]]"]):
    """A run of a partition's index (scripts/page.lua): where it ended (None: at the end) and its metadata."""

    __slots__ = ("_arguments", "_limit", "_partition")

    def __init__(self, partition: Partition, limit: int, span: tuple[Argument, Argument], after: Position) -> None:
        super().__init__()
        self._partition = partition
        self._limit = limit
        self._arguments = (limit, *span, *after)

    def commands(self) -> Sequence[Command]:
        """Call the script."""
        keys = (self._partition.updated, self._partition.meta)
        return [self._script(scripts.PAGE, keys, self._arguments)]

    def decode(self, replies: Sequence[Reply]) -> tuple[Position | None, list[SessionMeta]]:
        """Return the end, and the metadata of those where it can be decoded."""
        _check_index(self._partition, replies)
        self._check(replies)
        time_of_last, *flat = replies[0]
        ids = flat[::2]
        last = (int(float(time_of_last)), ids[-1]) if len(ids) == self._limit else None
        return last, _metas(zip(ids, flat[1::2], strict=True))


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
        sync_state=SyncState.SYNCED,
        revision=revision,
        labels=labels,
        written_at=to_datetime(written),
    )


def _metas(pairs: Any) -> list[SessionMeta]:
    metas = []
    for id, packed in pairs:
        try:
            metas.append(decode_meta(id.decode(), packed))
        except (CorruptSessionError, UnicodeDecodeError):
            _log.warning("a list leaves out session %r: its metadata can't be decoded", id)
    return metas


def _check_index(partition: Partition, replies: Sequence[Reply]) -> None:
    if "WRONGTYPE" in (as_error(replies[0]) or ""):
        raise LayoutError(f"the index of {partition.prefix} is not of this store's layout")


def _position(meta: SessionMeta) -> tuple[int, str]:
    """Return a session's place in the order of lists, in which equal times are ordered by id."""
    return (meta.updated_at - _UNIX_EPOCH) // _MILLISECOND, meta.id


def _span(after: datetime | None, before: datetime | None) -> tuple[Argument, Argument]:
    """Return the bounds in ms: the first included, the second not."""
    return "-inf" if after is None else _ms(after), "+inf" if before is None else _ms(before)


def _ms(moment: datetime) -> int:
    if not isinstance(moment, datetime) or moment.utcoffset() is None:
        raise ValueError("a datetime with a time zone is needed")
    return -((_UNIX_EPOCH - moment) // _MILLISECOND)  # rounded up


def _limit(limit: int, least: int) -> int:
    if type(limit) is not int or limit < least:
        raise ValueError(f"limit is {least} or more")
    return min(limit, 2**53)


def _encode_cursor(position: tuple[int, str]) -> str:
    return base64.urlsafe_b64encode(msgspec.msgpack.encode(position)).decode()


def _decode_cursor(cursor: str) -> tuple[int, str]:
    try:
        return msgspec.msgpack.decode(base64.urlsafe_b64decode(cursor), type=tuple[int, str])
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise_interruption(error)
        raise ValueError("that is not a cursor of a page") from None
