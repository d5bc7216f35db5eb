"""The command line, `orcs-redis`: sessions and changes to look at, small changes to make, files in and out, the demo.

Results go to standard output, as text or with --json as one document (watch: one per line); everything else, one line
each, to standard error.
"""

from __future__ import annotations

import importlib.metadata
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Annotated

try:
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as error:  # they are in the extra "cli"; a traceback would not say so
    raise SystemExit(f"orcs-redis: {error.name} is missing: pip install 'orcs-redis[cli]'") from None

from .common import CODES, DONE, INTERRUPTED, CommonOptions, Ended, JsonOption, NamespaceOption, UrlOption, exit_code
from .hybrid import commands as hybrid
from .reading import commands as reading
from .server import commands as server
from .terminal import complain, print_text
from .transfer import commands as transfer
from .writing import commands as writing

__all__ = ["app", "main"]

app = typer.Typer(
    epilog=CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)
for commands in (reading, writing, transfer, hybrid, server):  # in the order of the help
    commands.add_to(app)


def _version(asked: bool) -> None:
    if asked:
        print_text(f"orcs-redis {importlib.metadata.version('orcs-redis')}")
        raise typer.Exit


VersionOption = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]


@app.callback()
def common_options(
    context: typer.Context,
    url: UrlOption = None,
    namespace: NamespaceOption = None,
    json: JsonOption = False,
    version: VersionOption = False,
) -> None:
    """Sessions of AI agents, in Redis, Valkey or files."""
    context.obj = CommonOptions(url, namespace, json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="orcs-redis: %(message)s", level=logging.WARNING)
    with _ended_by_signals():
        code = _run(sys.argv[1:] if arguments is None else arguments)
    sys.exit(code)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Clean up and exit when asked to end; by itself the first process of a container would ignore that."""
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]  # not under nohup

    def end(number: int, _: object) -> None:
        raise Ended(128 + number)

    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _run(arguments: Sequence[str]) -> int:
    try:
        return app(list(arguments) or ["--help"], prog_name="orcs-redis", standalone_mode=False) or DONE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as exc:  # whatever it is: one line
        complain(exc)
        return exit_code(exc)
