"""The command line: `python -m benchmarks store`."""

from __future__ import annotations

import argparse
import asyncio
import inspect

from .figures import fleet, hybrid, limits, parts, rates, sizes
from .figures.bench import FIGURES, Bench, Skip
from .report import Document, Figure, Run, environment, heading, progress, sheets, show, versions
from .servers import open_server

__all__ = ["fleet", "hybrid", "limits", "parts", "rates", "sizes"]  # they fill FIGURES


async def figures(number: int, bench: Bench) -> list[Figure]:
    """Measure one of them."""
    found: list[Figure] = []
    try:
        async for figure in FIGURES[number](bench):
            figure.number = number
            found.append(figure)
    except Skip as reason:
        bench.say(f"{number}: not here, or not all: {reason}")
    return found


def main() -> None:
    about = [f"{number:2}  {inspect.getdoc(measure)}" for number, measure in sorted(FIGURES.items())]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="\n".join(text.replace("\n\n", "\n").replace("\n", "\n    ") for text in about),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", choices=["store"], help="the store's own figures; the peers': benchmarks.peers")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, 100,000 sessions at most")
    parser.add_argument(
        "--server",
        action="append",
        metavar="redis|embedded|URL",
        help="where; may be given twice. Default: a redis-server of its own, and an embedded server",
    )
    parser.add_argument(
        "--figure", action="append", type=int, choices=sorted(FIGURES), help="only this; may be given twice"
    )
    options = parser.parse_args()

    say = progress()
    runs: list[Run] = []
    for what in options.server or ["redis", "embedded"]:
        run: Run | None = None
        for number in sorted(options.figure or FIGURES):
            # A fresh server each time: a large heap, or a table that is still being rehashed, spoils what comes after.
            with open_server(what) as server:
                say(f"{server.name}  {number}: {inspect.getdoc(FIGURES[number])}".partition("\n")[0])
                if run is None:
                    run = Run(server.name, server.version, [])
                    runs.append(run)
                run.figures += asyncio.run(figures(number, Bench(server, options.quick, say)))
    document = Document(versions=versions(), quick=options.quick, runs=runs, **environment())
    show(document, heading(document), sheets(document), json=options.json)


if __name__ == "__main__":
    main()
