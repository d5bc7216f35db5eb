"""The command line: `python -m benchmarks store`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

import msgspec
from rich.console import Console

from . import bulk, limits, store
from .bench import Bench
from .report import Figure, Run, document, show
from .servers import open_server

FIGURES = store.FIGURES | limits.FIGURES | bulk.FIGURES


async def figures(measure: Callable[[Bench], Awaitable[list[Figure]]], bench: Bench) -> list[Figure]:
    return await measure(bench)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    figures_ = commands.add_parser("store", help="the store's own figures and their targets")
    figures_.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    figures_.add_argument("--quick", action="store_true", help="fewer repeats, 100,000 sessions at most")
    figures_.add_argument(
        "--server",
        action="append",
        metavar="redis|embedded|URL",
        help="where; may be given twice. Default: a redis-server of its own, and an embedded server",
    )
    figures_.add_argument(
        "--figure", action="append", type=int, choices=list(FIGURES), default=[], help="only this; may be given twice"
    )
    arguments = parser.parse_args()

    progress = Console(stderr=True, highlight=False)
    begin = time.monotonic()
    runs: list[Run] = []
    for what in arguments.server or ["redis", "embedded"]:
        run: Run | None = None
        for number in sorted(set(arguments.figure)) or FIGURES:
            # A fresh server each time: a large heap, or a table that is still being rehashed, spoils what comes after.
            with open_server(what) as server:
                run = run or Run(server.name, server.version, [])

                def say(text: str, name: str = server.name) -> None:
                    progress.print(f"[dim]{time.monotonic() - begin:6.1f} s  {name}  {text}[/]")

                run.figures += asyncio.run(figures(FIGURES[number], Bench(server, arguments.quick, say)))
        if run is not None:
            runs.append(run)
    result = document(arguments.benchmark, arguments.quick, runs)
    if arguments.json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    else:
        show(result, Console(width=None if sys.stdout.isatty() else 200))


if __name__ == "__main__":
    main()
