"""Commands and replies: bytes only. Calls of a script that follow one another are merged into one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import hiredis
import msgspec

__all__ = [
    "MAX_MERGED",
    "Argument",
    "Batch",
    "CallPrefix",
    "Command",
    "Packed",
    "Reply",
    "ScriptCall",
    "as_error",
    "as_map",
    "batches",
    "has_errors",
    "merge",
    "pack",
]

Argument: TypeAlias = str | bytes | int

# A reply is whatever RESP can hold: bytes, int, None, list, dict, or an error as a value.
Reply: TypeAlias = Any

MAX_MERGED = 16
"""How many calls go out as one at most."""
_MAX_MERGED_BYTES = 64 * 1024  # of all of them, so that none keeps the server for long


class CallPrefix(NamedTuple):
    """What the calls of a script that may be merged have in common."""

    verb: str
    script: bytes
    keys: tuple[str, ...]
    arguments: tuple[Argument, ...]


class ScriptCall(msgspec.Struct):
    """A call of a script that does the work of several calls in one: their keys and arguments follow one another.

    The reply is an array with an item for each; each caller gets an array of its own item.

    In a call no key may vanish and be used again: where a cluster's slot is moving, the server stops the script there.
    """

    prefix: CallPrefix
    keys: Sequence[str]
    arguments: Sequence[Argument]
    empties: bool = False  # its own keys may vanish
    alone: bool = False  # so may those of the prefix

    def size(self) -> int:
        """Return about how many bytes it has."""
        return sum([len(argument) for argument in self.arguments if type(argument) is bytes])


Command: TypeAlias = tuple[Argument, ...] | ScriptCall


def merge(calls: Sequence[ScriptCall]) -> tuple[Argument, ...]:
    """Return calls of one prefix as one command."""
    prefix = calls[0].prefix
    keys: list[Argument] = [*prefix.keys]
    arguments: list[Argument] = [*prefix.arguments]
    for call in calls:
        keys += call.keys
        arguments += call.arguments
    return (prefix.verb, prefix.script, b"%d" % len(keys), *keys, *arguments)


class Packed(msgspec.Struct):
    """Commands of one caller as they go over the wire, with nothing of others' in between."""

    data: bytes
    count: int

    def size(self) -> int:
        """Return how many bytes it has."""
        return len(self.data)


class Batch(msgspec.Struct):
    """Commands that go out as one: script calls of one prefix, merged, or anything else alone."""

    commands: Sequence[Command | Packed]

    def frame(self) -> tuple[Argument, ...]:
        """Return the command that goes out."""
        calls = cast(Sequence[ScriptCall], self.commands)
        return merge(calls) if type(calls[0]) is ScriptCall else cast(tuple[Argument, ...], calls[0])

    def pack(self) -> bytes:
        """Return what goes over the wire."""
        first = self.commands[0]
        return first.data if type(first) is Packed else pack((self.frame(),))

    def split(self, reply: Reply) -> list[Reply]:
        """Return what each of the commands gets of their reply; an error of the whole is the answer to each."""
        number = len(self.commands)
        if number == 1:
            return [reply]
        if type(reply) is list and len(reply) == number:
            return [[item] for item in reply]
        return [reply if as_error(reply) else None] * number  # whose item was whose is not known


def batches(commands: Iterable[Command | Packed]) -> Iterator[Batch]:
    """Yield the commands in their order, as many at a time as can go out as one."""
    run: list[Command | Packed] = []
    prefix: CallPrefix | None = None  # of the run; None: of what goes out alone
    size = 0
    emptied: set[str] = set()  # keys that may have vanished in the run
    for command in commands:
        if type(command) is not ScriptCall:
            if run:
                yield Batch(run)
            run, prefix = [command], None
            continue
        own = command.size()
        if (
            command.prefix is prefix
            and len(run) < MAX_MERGED
            and size + own <= _MAX_MERGED_BYTES
            and not command.alone
            and (not emptied or emptied.isdisjoint(command.keys))
        ):
            run.append(command)
            size += own
        else:
            if run:
                yield Batch(run)
            run, prefix, size = [command], None if command.alone else command.prefix, own
            emptied = set()
        if command.empties:
            emptied.update(command.keys)
    if run:
        yield Batch(run)


def pack(commands: Sequence[Command]) -> bytes:
    """Return the commands as they go over the wire."""
    return b"".join(
        [_pack_command(_texts(merge((command,)) if type(command) is ScriptCall else command)) for command in commands]
    )


_pack_command: Callable[[object], bytes] = hiredis.pack_command  # type: ignore[assignment]  # it takes any tuple
_TEXT = frozenset({bytes, str})


def _texts(command: Any) -> Any:
    """Return a command with numbers as text: hiredis crashes if a signal handler raises while it converts one."""
    return command if _TEXT.issuperset(map(type, command)) else tuple([_bytes(argument) for argument in command])


def _bytes(argument: Argument) -> bytes:
    if isinstance(argument, bytes):
        return bytes(argument)
    if isinstance(argument, int):
        return b"%d" % argument
    if isinstance(argument, str):
        return argument.encode()
    raise TypeError(f"an argument of a command is text, bytes or an integer, not {type(argument).__name__}")


def as_error(reply: Reply) -> str | None:
    """Return the text of an error reply, None for any other."""
    return str(reply) if isinstance(reply, hiredis.ReplyError) else None


def as_map(reply: Reply) -> Mapping[bytes, Reply]:
    """Return a map that RESP2 sends as a flat array and RESP3 as a map."""
    if isinstance(reply, dict):
        return reply
    return dict(zip(reply[::2], reply[1::2], strict=True))


def has_errors(replies: Sequence[Reply]) -> bool:
    """Return whether there is an error among the replies."""
    return hiredis.ReplyError in map(type, replies)
