"""Commands that change sessions: rename, set, unset, pop, fork, rm.

None of them reads the turns, but for pop those that it removes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer

from ..errors import ConflictError, CorruptSessionError, StorageError
from ..model.asset import SessionAsset
from ..model.encoding import parse_json
from ..model.parts import Place, drop_part, place_of, set_part
from ..model.sections import new_id
from .common import DONE, FAILED, Commands, CommonOptions, Files, IdArgument, Redis, exit_code, failure, finish
from .terminal import complain, describe_turns, print_json, print_text, turns_json

__all__ = ["commands"]

commands = Commands("Change sessions")

PartArgument = Annotated[
    str, typer.Argument(metavar="PART", help="Such as metadata.title, project_context.name, extra.x.")
]


@commands.command("rename")
def rename(
    options: CommonOptions,
    id: IdArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The new name; an empty one removes it.")],
) -> None:
    """Give a session another name, that of its project context."""

    def change(asset: SessionAsset) -> None:
        asset.project_context.name = name or None

    with options.open() as store:
        revision = _change(store, id, change)
    finish(options, f"renamed {id}, revision {revision}", {"id": id, "revision": revision})


@commands.command("set")
def set_(
    options: CommonOptions,
    id: IdArgument,
    part: PartArgument,
    value: Annotated[str, typer.Argument(metavar="JSON", help="The new value; a text stands in double quotes.")],
) -> None:
    """Set a part of a session to a value, whatever it was.

    After -- a value may begin with a hyphen: set ID metadata.offset -- -1
    """
    place = _changeable(part)
    parsed = _parsed(part, value, place)
    with options.open() as store:
        revision = _change(store, id, lambda asset: set_part(asset, part, parsed))
    finish(options, f"set {part} of {id}, revision {revision}", {"id": id, "part": part, "revision": revision})


@commands.command("unset")
def unset(options: CommonOptions, id: IdArgument, part: PartArgument) -> None:
    """Remove a part of a session, or bring it back to its default; it need not be there."""
    _changeable(part)

    def change(asset: SessionAsset) -> None:
        with suppress(KeyError):
            drop_part(asset, part)

    with options.open() as store:
        revision = _change(store, id, change)
    finish(options, f"unset {part} of {id}, revision {revision}", {"id": id, "part": part, "revision": revision})


@commands.command("pop")
def pop(
    options: CommonOptions,
    id: IdArgument,
    count: Annotated[int, typer.Argument(metavar="N", min=1, help="How many.")] = 1,
) -> None:
    """Remove a session's last turns and print them; with --json as in orcs' file."""
    with options.open_redis("of files no turns are removed") as store:
        turns = store.pop(id, count)
    if options.json:
        print_json(turns_json(turns))
    elif turns:
        print_text(describe_turns(turns))
    else:
        complain("the session has no turns: nothing was removed")


@commands.command("fork")
def fork(
    options: CommonOptions,
    id: IdArgument,
    new: Annotated[str | None, typer.Argument(metavar="NEW_ID", help="Default: a new UUID.")] = None,
    length: Annotated[int | None, typer.Option(min=0, metavar="N", help="Only the first N turns.")] = None,
    records: Annotated[bool, typer.Option("--records", help="With the session's records.")] = False,
) -> None:
    """Make a session with the same parts and turns, and print its id."""
    new = new or new_id()
    with options.open_redis("files are not forked") as store:
        try:
            revision = store.fork(id, new, length=length, records=records)
        except ConflictError:
            raise StorageError(f"there is a session {new} already") from None
    finish(options, new, {"id": new, "revision": revision, "forked_from": id})


@commands.command("rm")
def rm(
    options: CommonOptions, ids: Annotated[list[str], typer.Argument(metavar="ID...", help="The sessions' ids.")]
) -> int:
    """Delete sessions."""
    with options.open() as store:
        results = list(zip(ids, store.delete_many(ids), strict=True))
    deleted = [id for id, error in results if error is None]
    failed = [failure(id, error) for id, error in results if error is not None]
    finish(options, f"{len(deleted)} deleted, {len(failed)} failed", {"deleted": deleted, "failed": failed})
    codes = {exit_code(error) for _, error in results if error is not None} or {DONE}
    return codes.pop() if len(codes) == 1 else FAILED


def _change(store: Redis | Files, id: str, change: Callable[[SessionAsset], None]) -> int:
    """Change parts of a session, and return its revision; of a Redis store no turn is read."""
    while True:
        asset = store.load(id) if isinstance(store, Files) else store.load(id, last=0)
        change(asset)
        try:
            return store.save(asset)
        except ConflictError:
            continue  # others have changed the same since: this change is the later one. A session that is gone: load


def _changeable(name: str) -> Place:
    """Find a part that can be set or unset; ValueError for others."""
    place = place_of(name, SessionAsset)
    if place.fields[0] in ("id", "version"):
        raise ValueError(f"{place.fields[0]} can't be changed")
    if place.fields[:2] == ("history", "turns"):
        raise ValueError("a turn is no such part: see pop")
    return place


def _parsed(part: str, text: str, place: Place) -> Any:
    data = text.encode()
    for hint, what in ((Any, "JSON (a text stands in double quotes)"), (place.hint, f"a value of {part}")):
        try:
            value = parse_json(data, hint)
        except CorruptSessionError as error:
            raise ValueError(f"that is not {what}" + f", at {error.field}" * bool(error.field)) from None
    return value
