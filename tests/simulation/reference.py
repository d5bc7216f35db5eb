"""The reference of the writing script: what a session is, and what a write makes of it, as write.lua's head says it.

It is written from that page alone, and knows nothing of windows and attempts: those are the model's (model.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha1
from typing import Any, NamedTuple

import msgspec

from orcs_redis.protocol.writes import DELETE, FORK, Write

__all__ = ["Change", "Made", "Outcome", "Stored", "perform"]

_MAX_LABELS = 8
_MAX_COMPARED = 64
_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.decode


class Stored(NamedTuple):
    """A session as the server has it."""

    revision: int
    op: bytes
    born: int
    reshaped: int
    parts: int
    fields: dict[str, bytes]
    turns: tuple[bytes, ...]
    records: dict[bytes, bytes]
    updated_at: int  # these of the index, in ms
    written_at: int
    created_at: int
    labels: dict[str, str]
    names: tuple[str | None, str | None]  # the project's name and path

    @property
    def ids(self) -> list[str]:
        """The ids of the turns."""
        return [_id(turn) for turn in self.turns]


class Change(NamedTuple):
    """What a write says."""

    kind: bytes
    groups: dict[str, list[Any]]
    staged: Sequence[bytes]

    @classmethod
    def of(cls, write: Write) -> Change:
        """Read the groups of arguments of a write, without those that each attempt adds."""
        letters, arguments, at = write._kind_and_groups, list(write._arguments), 0
        groups = {}
        for n in range(1, len(letters), 5):
            count = int.from_bytes(letters[n + 1 : n + 5])
            groups[chr(letters[n])] = arguments[at : at + count]
            at += count
        return cls(letters[:1], groups, write._staged)

    @property
    def cuts_end(self) -> bool:
        """Whether turns at the end go."""
        groups = self.groups
        return any(letter in groups for letter in "zqhS") or ("x" in groups and int(groups["x"][1]) != -1)


class Made(NamedTuple):
    """What a write came to: the session then, None if it is deleted; and the bits of the answer."""

    session: Stored | None
    bits: tuple[bool, ...] = ()
    writes: bool = True  # False: there was nothing to do


Outcome = Made | tuple[Any, ...]  # or a refusal, as in a reply


class _Refused(Exception):
    pass


def perform(
    change: Change, current: Stored | None, source: Stored | None, source_id: str, token: Any, now: int, revision: int,
    op: bytes,
) -> Outcome:  # fmt: skip
    """Return what comes of a write, once it is known not to be a repetition.

    Args:
        change: the write.
        current: the session.
        source: of a fork.
        source_id: the same.
        token: of the session's lease: None, there is none; "foreign": the key is somebody else's.
        now: the server's time.
        revision: that it gets.
        op: its operation id.

    """
    try:
        later = _check_conditions(change, current, token)
        if change.kind == DELETE:
            return Made(None)
        if change.kind == FORK:
            return _fork(change, source, source_id, now, revision, op)
        return _write(change, current, now, revision, op, later=later)
    except _Refused as refusal:
        return refusal.args


def pairs(values: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(values[::2], values[1::2], strict=True)


def text(argument: Any) -> str:
    return argument.decode() if isinstance(argument, bytes) else str(argument)


def data(argument: Any) -> bytes:
    return argument if isinstance(argument, bytes) else str(argument).encode()


def _place(argument: Any) -> tuple[int, bytes]:
    revision, _, op = data(argument).partition(b":")
    return int(revision), op


def _id(turn: bytes) -> str:
    return str(_decode(turn)[0])


def _check_conditions(change: Change, current: Stored | None, token: Any) -> bool:
    """Return whether others have changed `updated_at_ms`, too."""
    groups, revision = change.groups, 0 if current is None else current.revision
    later = False
    if "l" in groups and token == "foreign":
        raise _Refused(b"LAYOUT", b"lease")
    if "l" in groups and token != groups["l"][0]:
        raise _Refused(b"LEASELOST")
    if change.kind == FORK:
        if current is not None:
            raise _Refused(b"CONFLICT", revision)
        return False
    if "r" in groups:
        expected, op = _place(groups["r"][0])
        if expected != revision or (op and (current is None or current.op != op)):
            raise _Refused(b"CONFLICT", revision)
    if "g" in groups:
        later = _check_base(change, current)
    if current is None and not {"W", "c"} & groups.keys():
        raise _Refused(b"NOTFOUND")
    if "i" in groups:
        last = None if current is None or not current.turns else _id(current.turns[-1])
        if last is None or last != _decode(groups["i"][0]):
            raise _Refused(b"CONFLICT", revision, b"last")
    return later


def _check_base(change: Change, current: Stored | None) -> bool:
    groups = change.groups
    (base, op), base_turns = _place(groups["g"][0]), int(groups["g"][1])
    revision = 0 if current is None else current.revision
    if revision == base and (not op or (current is not None and op == current.op)):
        return False
    if current is None:
        raise _Refused(b"CONFLICT", 0)
    if 0 < base < current.born:
        raise _Refused(b"CONFLICT", revision)
    if revision <= base:
        raise _Refused(b"CHANGED", revision, b"parts")
    more = len(current.turns) - base_turns
    if {"p", "x", "y"} & groups.keys() or change.cuts_end:
        others = {_id(turn) for turn in current.turns[base_turns:]}
        brought = [*groups.get("p", []), *groups.get("y", [])[1::2]]
        if (
            current.reshaped > base
            or more < 0
            or (change.cuts_end and more > 0)
            or (brought and (more > _MAX_COMPARED or any(_id(turn) in others for turn in brought)))
        ):
            raise _Refused(b"CHANGED", revision, b"turns")
    names = [text(name) for name in (*groups.get("s", [])[::2], *groups.get("u", []))] if "e" in groups else []
    later = False
    for name, digest in zip(names, map(text, groups.get("e", [])), strict=True):
        value = current.fields.get(name)
        if (sha1(value).hexdigest()[:16] if value else "") != digest:
            if name != "updated_at_ms":
                raise _Refused(b"CHANGED", revision, b"parts")
            later = True
    return later


def _kept(groups: dict[str, list[Any]], turns: tuple[bytes, ...]) -> tuple[bytes, ...]:
    if "x" in groups:
        first, last = map(int, groups["x"])
        return turns[first : len(turns) if last == -1 else last + 1]
    if "z" in groups:
        return turns[: max(len(turns) - int(groups["z"][0]), 0)]
    return turns[: int(groups["q"][0])] if "q" in groups else turns


def _turns(change: Change, current: Stored | None, revision: int) -> tuple[tuple[bytes, ...], bool]:
    """Return the turns, and whether any was changed other than by pushing."""
    groups, old = change.groups, () if current is None else current.turns
    if "S" in groups:
        return (*change.staged,), True
    if "h" in groups:
        return (*groups["h"],), True
    turns = list(_kept(groups, old))
    reshaped = len(turns) < len(old)
    for index, turn in pairs(groups.get("y", [])):
        turns[int(index)] = turn
        reshaped = True
    if "v" in groups:
        index, id, turn = groups["v"]
        index = int(index) + (len(old) if int(index) < 0 else 0)
        if not 0 <= index < len(old) or _id(old[index]) != _decode(id):
            raise _Refused(b"CHANGED", revision - 1, b"parts")
        turns[index] = turn
        reshaped = True
    return (*turns, *groups.get("p", ())), reshaped


def _labels(change: Change, current: Stored | None) -> tuple[dict[str, str], bool]:
    """Return the labels, and whether the session's own part is set to them."""
    groups = change.groups
    labels = {} if current is None or "W" in groups else dict(current.labels)
    if "L" in groups:
        labels = _decode(groups["L"][0])
    for name, value in pairs(groups.get("j", [])):
        labels.pop(text(name), None)
        if data(value):
            labels[text(name)] = text(value)
    if len(labels) > _MAX_LABELS:
        raise _Refused(b"LABELS")
    none = "W" in groups or current is None or not current.labels
    return labels, "j" in groups and not (none and not labels)


def _write(change: Change, current: Stored | None, now: int, revision: int, op: bytes, *, later: bool) -> Made:
    groups = change.groups
    whole, before = "W" in groups, None if current is None else current.updated_at
    labels, sets_labels = _labels(change, current)
    turns, reshaped = _turns(change, current, revision)
    if current is not None and not reshaped and not groups.keys() - {*"rlbgixzqc"}:
        return Made(current, writes=False)
    moves = "n" in groups or reshaped or "p" in groups
    named = int(groups["t"][0]) if "t" in groups else None
    updated_at = now
    if named is not None and (whole or not moves):
        updated_at = min(named, now)
    elif not moves and before is not None:
        updated_at = before
    if before is not None and ("k" in groups or not whole):
        updated_at = max(updated_at, before)
    fields = {} if current is None or whole else dict(current.fields)
    created_at, names = (now, (None, None)) if current is None else (current.created_at, current.names)
    if current is None and "c" in groups:
        name, *values = groups["c"]
        fields |= {text(key): value for key, value in pairs(values)}
        fields["created_at_ms"] = _u64(now)
        names = _names(name)
    if named is None and (moves or before is None):
        fields["updated_at_ms"] = _u64(updated_at)
    theirs = fields.get("updated_at_ms")
    fields |= {text(key): value for key, value in pairs(groups.get("s", []))}
    for key in groups.get("u", []):
        fields.pop(text(key), None)
    if later and theirs:
        fields["updated_at_ms"] = _encode(min(max(_decode(theirs), _decode(fields["updated_at_ms"])), now))
    if sets_labels:
        fields.pop("metadata.labels", None)
        if labels:
            fields["metadata.labels"] = _encode(dict(sorted(labels.items(), key=lambda item: item[0].encode())))
    if "m" in groups:
        created, about = groups["m"]
        created_at = int.from_bytes(created) if created else created_at
        names = _names(about) if about else names
    changes_parts = (
        current is None or {"W", "u", "j"} & groups.keys() or {*map(text, groups.get("s", [])[::2])} - {"updated_at_ms"}
    )
    records, placed = _records(groups, {} if current is None else current.records)
    bits = ((current is None and "c" in groups), *placed) if "c" in groups or "N" in groups else ()
    session = Stored(
        revision, op,
        revision if current is None else current.born,
        revision if current is None or reshaped else current.reshaped,
        revision if current is None or changes_parts else current.parts,
        fields, turns, records, updated_at, now, created_at, labels, names,
    )  # fmt: skip
    return Made(session, bits)


def _records(groups: dict[str, list[Any]], old: dict[bytes, bytes]) -> tuple[dict[bytes, bytes], list[bool]]:
    records, placed, stay = dict(old), [], set()
    for key, value in pairs(groups.get("P", [])):
        records[data(key)] = value
        stay.add(data(key))
    for key, value in pairs(groups.get("N", [])):
        placed.append(data(key) not in records)
        records.setdefault(data(key), value)
        stay.add(data(key))
    for key in groups.get("D", []):
        records.pop(data(key), None)
    for prefix in map(data, groups.get("R", [])):
        for key in [key for key in records if key.startswith(prefix) and key not in stay]:
            del records[key]
    return records, placed


def _fork(change: Change, source: Stored | None, source_id: str, now: int, revision: int, op: bytes) -> Outcome:
    groups = change.groups
    if source is None:
        raise _Refused(b"NOTFOUND", b"", b"source")
    if "r" in groups and int(groups["r"][0]) != source.revision:
        raise _Refused(b"CONFLICT", source.revision, b"source")
    turns = source.turns[: int(groups["q"][0])] if "q" in groups else source.turns
    origin = {"id": source_id, "revision": source.revision, "length": len(turns)}
    fields = source.fields | {
        "metadata.forked_from": _encode(origin), "created_at_ms": _u64(now), "updated_at_ms": _u64(now)
    }  # fmt: skip
    records = dict(source.records) if "O" in groups else {}
    return Made(
        Stored(
            revision, op, revision, revision, revision, fields, turns, records, now, now, now, source.labels,
            source.names,
        )
    )  # fmt: skip


def _names(packed: bytes) -> tuple[str | None, str | None]:
    name, path = _decode(b"\x92" + packed)
    return name, path


def _u64(ms: int) -> bytes:
    return b"\xcf" + ms.to_bytes(8)
