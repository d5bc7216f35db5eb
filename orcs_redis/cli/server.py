"""Commands about a server and what happens there: ping, watch, demo."""

from __future__ import annotations

import statistics
from contextlib import suppress
from typing import Annotated

import msgspec
import typer

from ..sync import RedisSessionStore
from ..transport.address import resolve
from .common import DONE, FAILED, INTERRUPTED, Commands, CommonOptions, Ended, address_of, finish
from .terminal import change_line, complain, output, print_json, print_line, print_text

__all__ = ["commands"]

commands = Commands("Server and changes")


@commands.command("ping")
def ping(
    options: CommonOptions, count: Annotated[int, typer.Option(min=1, help="The number of round trips.")] = 10
) -> None:
    """Print whether the store can be reached, and how long a round trip takes."""
    where = resolve(options.url)
    address = address_of(where)
    found: dict[str, object] = {"kind": where.kind, "address": address}
    text = f"{found['kind']} {address}".rstrip()
    with options.open(creates=True) as store:
        if isinstance(store, RedisSessionStore):
            median = statistics.median(store.ping() for _ in range(count)) * 1000
            found |= {"namespace": options.namespace or "orcs", "round_trip_ms": round(median, 4)}
            text += f", namespace {found['namespace']}: {median:.3f} ms, median of {count}"
    finish(options, text, found)


@commands.command("watch")
def watch(
    options: CommonOptions,
    since: Annotated[str | None, typer.Option(metavar="CURSOR", help="Go on from there; default: from now.")] = None,
    ids: Annotated[list[str] | None, typer.Option("--id", metavar="ID", help="Only this session; repeatable.")] = None,
) -> int:
    """Print every change as it comes, until Ctrl-C or SIGTERM; with --json a JSON document a line.

    In the end the cursor to go on from is printed.
    """
    with options.open_redis("files publish no changes") as store:
        cursor = since or store.cursor()
        try:
            for change in store.watch(since=cursor, ids=ids or None):
                if options.json:
                    document = change._asdict() | {"updated_at": change.updated_at.isoformat()}
                    print_line(document)
                else:
                    print_text(change_line(change))
                cursor = change.cursor
        except (KeyboardInterrupt, Ended) as end:
            with suppress(OSError):  # the terminal may be gone
                complain(f"go on with: watch --since {cursor}")
            return INTERRUPTED if isinstance(end, KeyboardInterrupt) else end.code
    return DONE


@commands.command("demo")
def demo(
    options: CommonOptions,
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="How long the workers work.")] = 10.0,
    workers: Annotated[int, typer.Option(min=1, max=64, help="The number of processes.")] = 4,
) -> int:
    """Let processes work on shared sessions, then report whether anything was lost or doubled.

    It ignores $ORCS_REDIS_URL: without --url it starts a server in a temporary folder. On the server of --url it uses
    a new namespace, which it removes in the end; --namespace is refused.
    """
    from .demo import run

    if options.namespace is not None:
        raise ValueError("the demo makes a namespace of its own")
    result = run(options.url, seconds=seconds, workers=workers, console=output(stderr=options.json))
    if options.json:
        print_json(msgspec.to_builtins(result) | {"ok": result.ok})
    return DONE if result.ok else FAILED
