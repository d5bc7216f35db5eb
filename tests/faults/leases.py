"""The checker of leases, pure as that of the history.

The rules, by the names that violations bear:

    lease token      a token that was given twice, or is not higher than one that was given before it was asked for
    lease holders    two who certainly held a session at the same time
    lease fence      a write under a lease that came after a write, or after the grant, of a later one
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from zlib import crc32

from .ops import Op, Violation

__all__ = ["check_leases"]


def check_leases(ops: Sequence[Op], partitions: int) -> list[Violation]:
    """Return what violates the contract of leases."""
    grants = [op for op in ops if op.kind == "acquire" and op.ok]
    violations: list[Violation] = []
    by_partition: dict[int, list[Op]] = defaultdict(list)
    by_session: dict[str, list[Op]] = defaultdict(list)
    for grant in grants:
        by_partition[crc32(grant.session.encode()) % partitions].append(grant)
        by_session[grant.session].append(grant)
    for of_partition in by_partition.values():
        violations += _check_tokens(of_partition)
    released = {(op.session, op.args["token"]): op.called for op in ops if op.kind == "release"}
    fenced: dict[str, list[Op]] = defaultdict(list)
    for op in ops:
        if op.writes and op.ok and op.args.get("lease") is not None:
            fenced[op.session].append(op)
    for session, of_session in by_session.items():
        violations += _check_holders(of_session, released)
        violations += _check_fence(fenced[session], of_session)
    return violations


def _token(grant: Op) -> int:
    token: int = grant.result["token"]
    return token


def _check_tokens(grants: list[Op]) -> list[Violation]:
    found = []
    grants.sort(key=_token)
    for first, second in pairwise(grants):
        if _token(first) == _token(second):
            found.append(Violation("lease token", f"{first} and {second} were given {_token(first)}"))
    # Of those with higher tokens, the one that returned first must not have returned before this one was called.
    earliest: Op | None = None
    for grant in reversed(grants):
        if earliest is not None and earliest.returned < grant.called:
            tokens = f"{_token(earliest)} was given to {earliest} before {grant} began, which was given {_token(grant)}"
            found.append(Violation("lease token", tokens))
        if earliest is None or grant.returned < earliest.returned:
            earliest = grant
    return found


def _check_holders(grants: list[Op], released: dict[tuple[str, int], int]) -> list[Violation]:
    """A lease is held from its grant's return at the latest to its ttl after the call at least, unless given back."""
    found = []
    held = []
    for grant in grants:
        end = min(grant.called + int(grant.args["ttl"] * 1e9), released.get((grant.session, _token(grant)), 2**63))
        if grant.returned < end:
            held.append((grant.returned, end, grant))
    held.sort(key=lambda span: span[0])
    for (_, end, first), (begin, _, second) in pairwise(held):
        if begin < end:
            found.append(Violation("lease holders", f"{first} and {second} held {first.session!r} together"))
    return found


def _check_fence(writes: list[Op], grants: list[Op]) -> list[Violation]:
    found = []
    writes.sort(key=lambda op: op.revision)
    for first, second in pairwise(writes):
        if second.args["lease"] < first.args["lease"]:
            tokens = f"{second.args['lease']} after {first.args['lease']}"
            found.append(Violation("lease fence", f"{second} came after {first}: token {tokens}"))
    for write in writes:
        for grant in grants:
            if _token(grant) > write.args["lease"] and grant.returned < write.called:
                text = f"{write} with token {write.args['lease']} began after {grant} with {_token(grant)}"
                found.append(Violation("lease fence", text))
                break
    return found
