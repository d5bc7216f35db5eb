"""What commands share: their options, the store they open, exit codes, results."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple, TypeAlias, TypeVar

import typer
from rich.text import Text

from ..errors import NotFoundError, StorageError
from ..model.asset import SessionAsset
from ..sync import LocalFileStore, RedisSessionStore
from ..transport.address import Address, FileFolder, Target, resolve
from .terminal import complain, print_json, print_text, safe

__all__ = [
    "CODES",
    "CONFLICTS",
    "DONE",
    "FAILED",
    "INTERRUPTED",
    "Absent",
    "Commands",
    "CommonOptions",
    "Ended",
    "Files",
    "IdArgument",
    "JsonOption",
    "NamespaceOption",
    "Redis",
    "UrlOption",
    "address_of",
    "attempt",
    "exit_code",
    "failure",
    "finish",
]

DONE, FAILED, USAGE, NOT_FOUND, CONFLICTS, INTERRUPTED = 0, 1, 2, 3, 4, 130
CODES = (
    "Exit codes: 0 done; 1 failed, if only in part; 2 wrong usage; 3 no such session or record; 4 conflicts are left "
    "(sync); 130 interrupted, 143 terminated."
)

T = TypeVar("T")
R = TypeVar("R")

UrlOption = Annotated[str | None, typer.Option("--url", metavar="URL", help="default: $ORCS_REDIS_URL, else embedded:")]
NamespaceOption = Annotated[str | None, typer.Option("--namespace", metavar="NAME", help="default: orcs")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The session's id.")]


class Ended(SystemExit):
    """A signal asked the process to end."""

    code: int


class Absent(Exception):  # it is never raised to a caller of the package
    """Something in a session is not there."""

    exit_code = NOT_FOUND


class Files(LocalFileStore[SessionAsset]):
    """A folder of files, with the Redis store's ways to do many at once."""

    def save_many(self, assets: Iterable[SessionAsset]) -> list[int | StorageError]:
        """Save assets; an error stands in the place of one that failed."""
        return [attempt(self.save, asset) for asset in assets]

    def load_many(self, ids: Iterable[str]) -> list[SessionAsset | StorageError]:
        """Load sessions; an error stands in the place of one that failed."""
        return [attempt(self.load, id) for id in ids]

    def delete_many(self, ids: Iterable[str]) -> list[StorageError | None]:
        """Delete sessions; an error stands in the place of one that failed."""
        return [attempt(self.delete, id) for id in ids]


Redis: TypeAlias = RedisSessionStore[SessionAsset]


class CommonOptions(NamedTuple):
    """The options that every command has."""

    url: str | None
    namespace: str | None
    json: bool

    @contextmanager
    def open(self, *, creates: bool = False) -> Iterator[Redis | Files]:
        """Open the store; warn of a namespace that is not there, unless the command creates it."""
        where = resolve(self.url)
        if isinstance(where, FileFolder):
            yield Files(where.path)
            return
        name = self.namespace or "orcs"
        with RedisSessionStore.connect(self.url, namespace=name) as store:
            if not creates and store._core.lifecycle.absent is not None:
                place = f"{where.kind} {address_of(where)}".rstrip()
                complain(f"no namespace {name!r} on {place}: nothing has been written to it")
            yield store

    @contextmanager
    def open_redis(self, why: str) -> Iterator[Redis]:
        """Open a store that is no folder of files; ``why`` says what these lack."""
        if isinstance(resolve(self.url), FileFolder):
            raise ValueError(f"{why}: that needs a Redis store")
        with self.open() as store:
            assert isinstance(store, RedisSessionStore)  # noqa: S101  # of a file: URL alone it is another
            yield store


class Commands:
    """Commands that stand together in the help."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._calls: list[tuple[str, Callable[..., int | None]]] = []

    def command(self, name: str) -> Callable[[Callable[..., int | None]], None]:
        """Add a command: it takes CommonOptions, which may stand before its name and after it."""
        return lambda call: self._calls.append((name, call))

    def add_to(self, app: typer.Typer) -> None:
        """Add them to the application."""
        for name, call in self._calls:
            app.command(name, rich_help_panel=self._title, epilog=CODES)(_with_common_options(call))


def _with_common_options(call: Callable[..., int | None]) -> Callable[..., int | None]:
    def run(
        context: typer.Context,
        url: UrlOption = None,
        namespace: NamespaceOption = None,
        json: JsonOption = False,
        **own: Any,
    ) -> int | None:
        before: CommonOptions = context.obj
        options = CommonOptions(url or before.url, namespace or before.namespace, json or before.json)
        return call(options, **own)

    shared = list(inspect.signature(run, eval_str=True).parameters.values())[:-1]
    own = list(inspect.signature(call, eval_str=True).parameters.values())[1:]
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *shared)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = call.__doc__
    return run


def address_of(where: Target) -> str:
    """Return an address without its user and password; nothing for a place that has none."""
    return str(where if isinstance(where, Address) else getattr(where, "path", None) or "")


def exit_code(error: BaseException) -> int:
    """Return the exit code that an error ends a command with."""
    if isinstance(error, NotFoundError):
        return NOT_FOUND
    if isinstance(error, ValueError):  # a URL, namespace or id that can't be
        return USAGE
    return int(getattr(error, "exit_code", FAILED))  # that of typer's own errors


def attempt(call: Callable[[T], R], item: T) -> R | StorageError:
    """Return what a call returns, or its error."""
    try:
        return call(item)
    except StorageError as error:
        return error


def failure(name: str, error: StorageError) -> dict[str, str]:
    """Complain of one thing that failed, and return it as JSON has it."""
    complain(error if name in str(error) else f"{name}: {error}")
    return {"id": name, "error": str(error)}


def finish(options: CommonOptions, text: str, document: object) -> None:
    """Print what a command has come to."""
    if options.json:
        print_json(document)
    else:
        print_text(Text(safe(text)))
