"""Lists of sessions: plans that merge what the indexes of the partitions have (protocol/index.py)."""

from __future__ import annotations

import base64
import builtins
import itertools
import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypeAlias

import msgspec

from ..interrupts import raise_interruption
from ..model.filters import Filters, check_limit
from ..model.meta import Page, SessionMeta
from .index import ALL, AllMeta, Bounds, IndexSizes, LabelRun, MetaRun, Place, Row, Sizes, decode_rows, label_key
from .keys import Partition
from .request import Plan, Together
from .writer import Namespace

__all__ = ["Lists", "decode_cursor", "encode_cursor", "place_of"]

_UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_CHUNK = 1_000  # sessions looked at in one go, in all partitions: about 2 ms in which the server does nothing else
_LEAST = 16  # in one partition: a call costs as much as several sessions


class Lists:
    """What there is to ask about many sessions, as plans."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace

    @property
    def _partitions(self) -> Sequence[Partition]:
        return self._namespace.keyspace.partitions

    def list(self, limit: int | None, filters: Filters) -> Plan[builtins.list[SessionMeta]]:
        """Metadata, newest first."""
        if limit is not None:
            limit = check_limit(limit)
        query = _query(filters)
        if limit is None and query == _EVERYTHING:
            runs = yield Together(map(AllMeta, self._partitions))
            return decode_rows(sorted(itertools.chain.from_iterable(runs), reverse=True))
        return (yield from self._newest(limit, query, None))

    def page(self, limit: int, cursor: str | None, filters: Filters) -> Plan[Page[SessionMeta]]:
        """One page of metadata, newest first, and where the next begins."""
        after = None if cursor is None else decode_cursor(cursor)
        found = yield from self._newest(check_limit(limit, least=1) + 1, _query(filters), after)
        if len(found) <= limit:
            return Page(found, None)
        items = found[:limit]
        return Page(items, encode_cursor(items[-1]))

    def count(self, filters: Filters) -> Plan[int]:
        """How many sessions."""
        query = _query(filters)
        sizes = yield from self._sizes(query)
        if not query.labels:
            return sum(size.within for size in sizes)
        if len(query.labels) == 1 and query.bounds == ALL:
            return sum(size.labels[0] for size in sizes)
        scans = [_LabelScan(query, size, _share(len(sizes)), 0, None) for size in sizes]
        number = 0
        while scans:
            runs = yield Together(scan.request(None) for scan in scans)
            for scan, run in zip(scans, runs, strict=True):
                scan.take(run)
                number += run.found
            scans = [scan for scan in scans if not scan.ended]
        return number

    def _newest(self, limit: int | None, query: _Query, after: Place | None) -> Plan[builtins.list[SessionMeta]]:
        broken = 0  # so many more are asked for
        while True:
            rows = yield from self._rows(None if limit is None else limit + broken, query, after)
            metas = decode_rows(rows)
            if limit is None or len(metas) >= limit or len(rows) < limit + broken:
                return metas[:limit]
            broken = len(rows) - len(metas)

    def _rows(self, limit: int | None, query: _Query, after: Place | None) -> Plan[builtins.list[Row]]:
        """Scan the partitions at the same time, until none can have more of the first `limit`."""
        found: builtins.list[Row] = []
        scans: builtins.list[_Scan] = [] if limit == 0 else (yield from self._scans(limit, query, after))
        last: Place | None = None  # of the first `limit`
        while scans:
            runs = yield Together(scan.request(last) for scan in scans)
            for scan, run in zip(scans, runs, strict=True):
                found += scan.take(run)
            if limit is not None and len(found) >= limit:
                found.sort(reverse=True)
                del found[limit:]
                last = found[-1][:2]
            scans = [following for scan in scans if (following := scan.following(last)) is not None]
        found.sort(reverse=True)
        return found

    def _scans(self, limit: int | None, query: _Query, after: Place | None) -> Plan[builtins.list[_Scan]]:
        if query.labels:
            sizes = yield from self._sizes(query)
            return [_cheapest(limit, query, after, size, len(sizes)) for size in sizes]
        number = len(self._partitions)
        share = _share(number)
        count = share if limit is None else min(limit, _most(limit / number))
        return [_TimeScan(query, partition, count, share, after) for partition in self._partitions]

    def _sizes(self, query: _Query) -> Plan[builtins.list[Sizes]]:
        """Of the partitions that can have what is wanted."""
        requests = [IndexSizes(partition, query.bounds, query.labels) for partition in self._partitions]
        sizes: builtins.list[Sizes] = yield Together(requests)
        return [size for size in sizes if size.within and all(size.labels)]


class _Query(NamedTuple):
    """Filters as the index has them."""

    bounds: Bounds
    labels: tuple[bytes, ...]


_EVERYTHING = _Query(ALL, ())


class _TimeScan:
    """Looks at a partition's sessions from the newest on, `count` at first, then more at a time, up to `share`.

    Of those with labels it may meet few: if it has looked at as many as `instead` has, that goes on in its place.
    """

    def __init__(
        self,
        query: _Query,
        partition: Partition,
        count: int,
        share: int,
        at: Place | None,
        instead: _LabelScan | None = None,
    ) -> None:
        self._query = query
        self._partition = partition
        self._count = min(count, share)
        self._share = share
        self._at = at
        self._instead = instead
        self._looked_at = 0

    def request(self, last: Place | None) -> MetaRun:
        return MetaRun(self._partition, self._count, self._query.bounds, self._at, self._query.labels)

    def take(self, run: tuple[Place | None, list[Row]]) -> list[Row]:
        self._at, rows = run
        self._looked_at += self._count
        self._count = min(2 * self._count, self._share)
        return rows

    def following(self, last: Place | None) -> _Scan | None:
        """Return what goes on, None if there is nothing more above `last`."""
        if self._at is None or (last is not None and self._at <= last):
            return None
        if self._instead is not None and self._looked_at >= self._instead.size:
            self._instead.after = self._at
            return self._instead
        return self


class _LabelScan:
    """Looks at a partition's sessions with a label, the rarest one asked for, in the order of their ids."""

    def __init__(self, query: _Query, sizes: Sizes, share: int, limit: int | None, after: Place | None) -> None:
        by_size = sorted(zip(sizes.labels, query.labels, strict=True))
        self.size = by_size[0][0]
        self._labels = [label for _, label in by_size]
        self._bounds = query.bounds
        self._partition = sizes.partition
        self._count = share
        self._limit = share if limit is None else min(limit, share)
        self.after = after
        self.ended = False
        self._at = b""

    def request(self, last: Place | None) -> LabelRun:
        first, stop = self._bounds
        if last is not None:
            first = last[0] if first == "-inf" else max(int(first), last[0])
        bounds = first, stop
        return LabelRun(self._partition, self._count, self._limit, bounds, self.after, self._at, self._labels)

    def take(self, run: LabelRun.Result) -> list[Row]:
        self._at, self.ended = run.end or b"", run.end is None
        return run.rows

    def following(self, last: Place | None) -> _Scan | None:
        """Return what goes on, None if it has ended."""
        return None if self.ended else self


_Scan: TypeAlias = _TimeScan | _LabelScan


def _cheapest(limit: int | None, query: _Query, after: Place | None, size: Sizes, partitions: int) -> _Scan:
    """Return the scan that is likely to look at the fewest sessions of one of so many partitions."""
    share = _share(partitions)
    by_label = _LabelScan(query, size, share, limit, after)
    expected = size.within
    if limit is not None and by_label.size > share:
        # They are found among the newest, if these have the label as often as all have it.
        expected = min(expected, _most(limit * size.total / (by_label.size * partitions)))
    if 2 * expected >= by_label.size:
        return by_label
    return _TimeScan(query, size.partition, expected, share, after, by_label)


def _most(mean: float) -> int:
    """Return how many a partition has at most, but for one in some hundred, if each has so many on average."""
    return math.ceil(mean + 3 * math.sqrt(mean)) + 1


def _share(partitions: int) -> int:
    """Return how many sessions of each partition to look at in one go."""
    return max(_CHUNK // partitions, _LEAST)


def _query(filters: Filters) -> _Query:
    after, before = filters.updated_after, filters.updated_before
    labels = [label_key(name, value) for name, value in filters.labels.items()]
    if filters.project_path is not None:
        labels.append(label_key("", filters.project_path))
    return _Query(("-inf" if after is None else _ms(after), "+inf" if before is None else _ms(before)), tuple(labels))


def _ms(moment: datetime) -> int:
    return -((_UNIX_EPOCH - moment) // _MILLISECOND)  # rounded up


def place_of(meta: SessionMeta) -> Place:
    """Return a session's place in the order of lists."""
    return (meta.updated_at - _UNIX_EPOCH) // _MILLISECOND, meta.id.encode()


def encode_cursor(meta: SessionMeta) -> str:
    """Return the cursor of the page that comes after a session."""
    return base64.urlsafe_b64encode(msgspec.msgpack.encode(place_of(meta))).decode()


def decode_cursor(cursor: str) -> Place:
    """Return the place after which a page begins. ValueError: it is no cursor."""
    try:
        return msgspec.msgpack.decode(base64.urlsafe_b64decode(cursor), type=tuple[int, bytes])
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise_interruption(error)
        raise ValueError("that is not a cursor of a page") from None
