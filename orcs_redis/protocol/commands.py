"""Commands and replies: bytes only. Calls of a script that follow one another are merged into one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import hiredis
import msgspec

__all__ = [
    "MAX_MERGED",
    "Argument",
    "Batch",
    "CallPrefix",
    "Command",
    "Reply",
    "ScriptCall",
    "as_error",
    "as_map",
    "has_errors",
    "merge",
    "next_batch",
    "pack",
    "split_reply",
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
    """

    head: CallPrefix
    keys: Sequence[str]
    arguments: Sequence[Argument]

    def size(self) -> int:
        """Return about how many bytes it has."""
        return sum([len(argument) for argument in self.arguments if type(argument) is bytes])


Command: TypeAlias = tuple[Argument, ...] | ScriptCall


def next_batch(commands: Iterable[Command | None]) -> list[ScriptCall]:
    """Return the first of the commands, as many as can go out as one."""
    run: list[ScriptCall] = []
    size = 0
    for command in commands:
        if type(command) is not ScriptCall or (run and command.head is not run[0].head):
            break
        size += command.size()
        if run and (size > _MAX_MERGED_BYTES or len(run) == MAX_MERGED):
            break
        run.append(command)
    return run


def split_reply(reply: Reply, number: int) -> list[Reply]:
    """Return what each of the merged calls gets of their reply; an error of the whole is the answer to each."""
    if type(reply) is list and len(reply) == number:
        return [[item] for item in reply]
    return [reply] * number


def merge(calls: Sequence[ScriptCall]) -> tuple[Argument, ...]:
    """Return calls of one head as one command."""
    head = calls[0].head
    keys: list[Argument] = [*head.keys]
    arguments: list[Argument] = [*head.arguments]
    for call in calls:
        keys += call.keys
        arguments += call.arguments
    return (head.verb, head.script, b"%d" % len(keys), *keys, *arguments)


class Batch:
    """Commands that go out together: script calls that follow one another are merged."""

    def __init__(self, commands: Sequence[Command]) -> None:
        self.frames: list[Command] = []  # what goes out
        self._widths: list[int] = []  # of how many commands each consists
        at = 0
        while at < len(commands):
            calls = next_batch(itertools.islice(commands, at, None))
            self.frames.append(merge(calls) if len(calls) > 1 else commands[at])
            self._widths.append(len(calls) or 1)
            at += self._widths[-1]

    def split(self, replies: Sequence[Reply]) -> list[Reply]:
        """Return each command's reply."""
        own: list[Reply] = []
        for reply, width in zip(replies, self._widths, strict=True):
            own += split_reply(reply, width) if width > 1 else [reply]
        return own


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
