"""Commands that look at sessions: ls, count, show, records, record."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from ..errors import NotFoundError
from ..model.filters import FilterArguments
from ..model.labels import check_labels
from .common import DONE, FAILED, Absent, Commands, CommonOptions, Files, IdArgument, Redis, finish
from .terminal import (
    complain,
    describe_session,
    print_bytes,
    print_document,
    print_json,
    print_list,
    print_records,
    print_text,
    records_json,
)

__all__ = ["commands"]

commands = Commands("Look at sessions")

LimitOption = Annotated[int, typer.Option(min=1, metavar="N", help="At most so many.")]
AllOption = Annotated[bool, typer.Option("--all", help="Without a limit.")]
ProjectOption = Annotated[str | None, typer.Option(metavar="PATH", help="Only those of this project.")]
LabelOption = Annotated[
    list[str] | None, typer.Option("--label", metavar="NAME=VALUE", help="Only those with this label; repeatable.")
]


@commands.command("ls")
def ls(
    options: CommonOptions,
    limit: LimitOption = 50,
    everything: AllOption = False,
    project: ProjectOption = None,
    label: LabelOption = None,
) -> int:
    """List sessions, the last updated first."""
    filters = _filters(project, label)
    with options.open() as store:
        metas = store.list(limit=None if everything else limit + 1, **filters)
        code = _code_of_list(store)
    if not everything and len(metas) > limit:
        del metas[limit:]
        complain(f"there are more than {limit}: see --limit and --all")
    if options.json:
        print_json([msgspec.to_builtins(meta) for meta in metas])
    else:
        print_list(metas)
    return code


@commands.command("count")
def count(options: CommonOptions, project: ProjectOption = None, label: LabelOption = None) -> int:
    """Print the number of sessions."""
    filters = _filters(project, label)
    with options.open() as store:
        number = store.count(**filters)
        code = _code_of_list(store)
    finish(options, str(number), {"count": number})
    return code


@commands.command("show")
def show(
    options: CommonOptions,
    id: IdArgument,
    turns: Annotated[int, typer.Option(min=0, metavar="N", help="Show the last N turns.")] = 20,
) -> None:
    """Show a session and its last turns; with --json all of it, exactly as in orcs' file."""
    with options.open() as store:
        asset = store.load(id) if options.json or isinstance(store, Files) else store.load(id, last=turns)
    if options.json:
        print_document(asset.to_json())
    else:
        print_text(describe_session(asset, turns))


@commands.command("records")
def records(
    options: CommonOptions,
    id: IdArgument,
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Only keys that begin so.")] = "",
    limit: LimitOption = 50,
    everything: AllOption = False,
    reverse: Annotated[bool, typer.Option("--reverse", help="The last keys first.")] = False,
) -> None:
    """List the keys and sizes of a session's records; with --json their values, too.

    A value is "json" if it is JSON, and "base64" if it is not.
    """
    with options.open_redis("files have no records") as store:
        found = store.records(id, prefix, limit=None if everything else limit + 1, reverse=reverse)
        if not found and not store.exists(id):
            raise NotFoundError(id)
    if not everything and len(found) > limit:
        del found[limit:]
        complain(f"there are more than {limit}: see --limit and --all")
    if options.json:
        print_document(records_json(found))
    else:
        print_records(found)


@commands.command("record")
def record(
    options: CommonOptions, id: IdArgument, key: Annotated[str, typer.Argument(metavar="KEY", help="The record's key.")]
) -> None:
    """Print a record's bytes just as they are; to a terminal, what it could obey is escaped."""
    with options.open_redis("files have no records") as store:
        found = store.get_records(id, [key])
        if not found and not store.exists(id):
            raise NotFoundError(id)
    if not found:
        raise Absent(f"session {id} has no record {key}")
    if options.json:
        print_document(records_json([*found.items()]))
    else:
        print_bytes(found[key])


def _filters(project: str | None, labels: list[str] | None) -> FilterArguments:
    """Return what lists and counts filter by."""
    wanted: dict[str, str] = {}
    for label in labels or ():
        name, equals, value = label.partition("=")
        if not equals:
            raise ValueError(f"--label {label}: a label is given as NAME=VALUE")
        if wanted.setdefault(name, value) != value:
            raise ValueError(f"--label {label}: a session has one value of {name}, not two")
    return FilterArguments(project_path=project, labels=check_labels(wanted))


def _code_of_list(store: Redis | Files) -> int:
    return FAILED if isinstance(store, Files) and store.unreadable() else DONE  # the log says which
