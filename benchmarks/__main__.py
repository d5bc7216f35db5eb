"""The command line: `python -m benchmarks store`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

import msgspec
from rich.console import Console

from .report import Run, document, show
from .servers import open_server
from .store import FIGURES, measure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    store = commands.add_parser("store", help="the store's own figures and their targets")
    store.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    store.add_argument("--quick", action="store_true", help="fewer repeats, 100,000 sessions at most")
    store.add_argument(
        "--server",
        action="append",
        metavar="redis|embedded|URL",
        help="where; may be given twice. Default: a redis-server of its own, and an embedded server",
    )
    store.add_argument(
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

                run.figures += asyncio.run(measure(server, number, arguments.quick, say))
        if run is not None:
            runs.append(run)
    result = document(arguments.benchmark, arguments.quick, runs)
    if arguments.json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    else:
        show(result, Console(width=None if sys.stdout.isatty() else 200))


if __name__ == "__main__":
    main()
