"""Mistakes of a store, planted into the workers, that the checker has to find."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from orcs_redis import ConflictError, PermissionDeniedError, UnavailableError
from orcs_redis.protocol import merging, saving
from orcs_redis.protocol.attempts import ConnectionLost
from orcs_redis.protocol.baseline import Baseline
from orcs_redis.protocol.commands import Command, Reply
from orcs_redis.protocol.saving import Saving
from orcs_redis.protocol.sessions import Sessions
from orcs_redis.protocol.writer import Namespace
from orcs_redis.protocol.writes import Group, Write, Written
from orcs_redis.transport.sockets import SocketLink

from .signals import STRUCK

__all__ = ["PLANTS"]


def make_naive() -> None:
    """Give every attempt an operation id of its own."""
    commands = Write.commands

    def renewed(self: Write) -> Sequence[Command]:
        self.end()
        return commands(self)

    Write.commands = renewed  # type: ignore[method-assign]


def make_lying() -> None:
    """Say of some writes that were applied that they were denied."""
    decode, rng = Write.decode, random.Random(1)

    def lying(self: Write, replies: Sequence[Reply]) -> Written:
        written = decode(self, replies)
        if rng.random() < 0.02:
            raise PermissionDeniedError("planted")
        return written

    Write.decode = lying  # type: ignore[method-assign]


def make_faithful() -> None:
    """Stay with a server that takes no writes any more."""
    decode = Write.decode

    def faithful(self: Write, replies: Sequence[Reply]) -> Written:
        for reply in replies:
            if isinstance(reply, Exception) and "READONLY" in str(reply):
                raise UnavailableError("planted")
        return decode(self, replies)

    Write.decode = faithful  # type: ignore[method-assign]


def make_swallowing() -> None:
    """Take what a signal's handler raises for a lost connection."""
    call = SocketLink.call

    def swallowing(self: SocketLink, commands: Sequence[Command], expires: float) -> list[Reply]:
        with contextlib.suppress(*STRUCK):
            return call(self, commands, expires)
        raise ConnectionLost("planted", sent=True)  # here, where nothing leads to the handler any more

    SocketLink.call = swallowing  # type: ignore[method-assign, assignment]


def change_groups(change: Callable[[list[Group]], list[Group]]) -> None:
    """Let all writes have other groups of arguments than they should."""
    make = Write.__init__

    def changed(self: Write, namespace: Namespace, id: str, groups: Iterable[Group], **options: Any) -> None:
        make(self, namespace, id, change(list(groups)), **options)

    Write.__init__ = changed  # type: ignore[method-assign]


def make_greedy() -> None:
    """Pop without asking whether the last turns are still those that were read."""

    def change(groups: list[Group]) -> list[Group]:
        letters = {group.letter for group in groups}
        return [group for group in groups if group.letter != b"g"] if b"z" in letters else groups

    change_groups(change)


def make_hasty() -> None:
    """Save what was changed without asking whether others have changed it."""

    def change(groups: list[Group]) -> list[Group]:
        letters = {group.letter for group in groups}
        return [group for group in groups if group.letter not in (b"g", b"e")] if b"e" in letters else groups

    change_groups(change)


def make_late() -> None:
    """Put a record that is there already."""
    change_groups(lambda groups: [Group(b"P", group.arguments) for group in groups if group.letter == b"N"] + groups)


def make_whole() -> None:
    """Save an asset whole, over whatever is there, as release 0.1 did."""
    save = Saving.save

    def whole(self: Saving[Any], asset: Any, if_revision: Any = None, lease: Any = None, **_: Any) -> Any:
        return save(self, asset, if_revision, lease, overwrite=if_revision is None)

    Saving.save = whole  # type: ignore[method-assign]


def make_forgiving() -> None:
    """Save an asset whose session is gone as a new one."""
    save_changes = Saving._save_changes

    def forgiving(self: Saving[Any], asset: Any, known: Any, expected: Any, lease: Any) -> Any:
        try:
            return (yield from save_changes(self, asset, known, expected, lease))
        except ConflictError as error:
            if error.actual:
                raise
            return (yield from self._save_whole(asset, None, None, lease))

    Saving._save_changes = forgiving  # type: ignore[method-assign]


def make_vague() -> None:
    """Name a part too many in a conflict."""
    make = ConflictError.__init__

    def vague(
        self: ConflictError, id: str, expected: int, actual: int, parts: tuple[str, ...] = (), reason: str = ""
    ) -> None:
        named = (*parts, "metadata.c") if parts and "metadata.c" not in parts else parts
        make(self, id, expected, actual, named, reason)

    ConflictError.__init__ = vague  # type: ignore[method-assign]


def make_dull() -> None:
    """Refresh an asset without its parts."""

    def dull(codec: Any, asset: Any, base: Baseline, theirs: Baseline, *more: Any) -> None:
        merging.bring_up(codec, asset, base, theirs._replace(fields=base.fields), *more)

    vars(saving)["bring_up"] = dull


def make_forgetful() -> None:
    """Deliver again what was delivered."""

    def again(self: Any, id: str, turns: Any, if_revision: Any, lease: Any, *, create: bool) -> Any:
        return (yield self.append(id, turns, if_revision, lease, create=create)).revision

    Sessions.append_once = again  # type: ignore[method-assign]


PLANTS: Mapping[str, Callable[[], None]] = {
    "naive": make_naive, "lying": make_lying, "faithful": make_faithful, "swallowing": make_swallowing,
    "greedy": make_greedy, "hasty": make_hasty, "late": make_late, "whole": make_whole, "forgiving": make_forgiving,
    "vague": make_vague, "dull": make_dull, "forgetful": make_forgetful,
}  # fmt: skip
