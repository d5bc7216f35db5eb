"""The command line, `orcs-redis`: a look at a store's sessions and changes, files in and out, and the demo.

Results go to standard output, as text or with --json as one document (watch: one per line); everything else, one line
each, to standard error.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias, TypeVar

import msgspec

try:
    import typer
    from rich.text import Text
except ModuleNotFoundError as error:  # they are in the extra "cli"; a traceback would not say so
    raise SystemExit(f"orcs-redis: {error.name} is missing: pip install 'orcs-redis[cli]'") from None

from ..errors import ConflictError, NotFoundError, StorageError
from ..model.asset import SessionAsset
from ..sync import LocalFileStore, RedisSessionStore
from ..transport.address import Address, FileFolder, Target, resolve
from .terminal import (
    change_line,
    complain,
    describe_session,
    list_table,
    output,
    print_document,
    print_json,
    print_line,
    print_text,
    progress_bar,
    safe,
)

__all__ = ["app", "main"]

DONE, FAILED, USAGE, NOT_FOUND, INTERRUPTED = 0, 1, 2, 3, 130
CODES = (
    "Exit codes: 0 done; 1 failed, if only in part; 2 wrong usage; 3 no such session; 130 interrupted, 143 terminated."
)

T = TypeVar("T")
R = TypeVar("R")

_BATCH = 32  # sessions in memory at once


class Ended(SystemExit):
    """A signal asked the process to end."""

    code: int


class Files(LocalFileStore[SessionAsset]):
    """A folder of files, with the Redis store's ways to do many at once."""

    def save_many(self, assets: Iterable[SessionAsset]) -> list[int | StorageError]:
        """Save assets; an error stands in the place of one that failed."""
        return [_attempt(self.save, asset) for asset in assets]

    def load_many(self, ids: Iterable[str]) -> list[SessionAsset | StorageError]:
        """Load sessions; an error stands in the place of one that failed."""
        return [_attempt(self.load, id) for id in ids]

    def delete_many(self, ids: Iterable[str]) -> list[StorageError | None]:
        """Delete sessions; an error stands in the place of one that failed."""
        return [_attempt(self.delete, id) for id in ids]


Store: TypeAlias = RedisSessionStore[SessionAsset] | Files


class CommonOptions(NamedTuple):
    """The options that every command has."""

    url: str | None
    namespace: str | None
    json: bool

    @contextmanager
    def open(self, *, creates: bool = False) -> Iterator[Store]:
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


def address_of(where: Target) -> str:
    """Return an address without its user and password; nothing for a place that has none."""
    return str(where if isinstance(where, Address) else getattr(where, "path", None) or "")


UrlOption = Annotated[str | None, typer.Option("--url", metavar="URL", help="default: $ORCS_REDIS_URL, else embedded:")]
NamespaceOption = Annotated[str | None, typer.Option("--namespace", metavar="NAME", help="default: orcs")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

app = typer.Typer(
    epilog=CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


def command(name: str) -> Callable[[Callable[..., int | None]], None]:
    """Add a command, which takes CommonOptions. Its options may stand before the command's name and after it."""

    def add(call: Callable[..., int | None]) -> None:
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
        app.command(name, epilog=CODES)(run)

    return add


@command("ls")
def ls(
    options: CommonOptions,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of sessions.")] = 50,
    everything: Annotated[bool, typer.Option("--all", help="Without a limit.")] = False,
    project: Annotated[str | None, typer.Option(metavar="PATH", help="Only those of this project.")] = None,
) -> int:
    """List sessions, the last updated first."""
    with options.open() as store:
        if isinstance(store, Files):
            metas = [meta for meta in store.list() if project in (None, meta.project_path)]
            code = FAILED if store.unreadable() else DONE  # the log says which
        else:
            metas = store.list(limit=None if everything else limit + 1, project_path=project)
            code = DONE
    if not everything and len(metas) > limit:
        del metas[limit:]
        complain(f"there are more than {limit}: see --limit and --all")
    if options.json:
        print_json([msgspec.to_builtins(meta) for meta in metas])
    else:
        print_text(list_table(metas))
    return code


@command("show")
def show(
    options: CommonOptions,
    id: Annotated[str, typer.Argument(metavar="ID")],
    turns: Annotated[int, typer.Option(min=0, metavar="N", help="Show the last N turns.")] = 20,
) -> None:
    """Show a session; with --json exactly as in orcs' file."""
    with options.open() as store:
        asset = store.load(id)
    if options.json:
        print_document(asset.to_json())
    else:
        print_text(describe_session(asset, turns))


@command("import")
def import_(
    options: CommonOptions,
    folder: Annotated[Path, typer.Argument(metavar="DIR", exists=True, file_okay=False)],
    if_absent: Annotated[bool, typer.Option("--if-absent", help="Skip sessions that the store has.")] = False,
) -> int:
    """Store every session file (*.json) of a folder of orcs."""
    imported, skipped, failed = 0, 0, list[dict[str, str]]()
    files = Files(folder)
    names = sorted(path.stem for path in folder.iterdir() if path.suffix == ".json" and path.name[0] != ".")
    with options.open(creates=True) as store, progress_bar("importing", len(names)) as advance:

        def save_absent(asset: SessionAsset) -> int:
            if isinstance(store, RedisSessionStore):
                return store.save(asset, if_revision=0)
            if store.exists(asset.id):
                raise ConflictError(asset.id, 0, 1)
            return store.save(asset)

        for batch in _batches(names):
            loaded = files.load_many(batch)
            good = [asset for asset in loaded if not isinstance(asset, StorageError)]
            saved = iter([_attempt(save_absent, asset) for asset in good] if if_absent else store.save_many(good))
            for name, asset in zip(batch, loaded, strict=True):
                result = asset if isinstance(asset, StorageError) else next(saved)
                if if_absent and isinstance(result, ConflictError):
                    skipped += 1
                elif isinstance(result, StorageError):
                    failed.append(_failure(f"{name}.json", result))
                else:
                    imported += 1
                advance()
    summary = f"{imported} imported, {skipped} skipped, {len(failed)} failed"
    _finish(options, summary, {"imported": imported, "skipped": skipped, "failed": failed})
    return FAILED if failed else DONE


@command("export")
def export(options: CommonOptions, folder: Annotated[Path, typer.Argument(metavar="DIR", file_okay=False)]) -> int:
    """Write every session to a folder as orcs' own file."""
    exported, failed = 0, list[dict[str, str]]()
    with options.open() as store:
        ids = [meta.id for meta in store.list()]
        if isinstance(store, Files):
            failed += [_failure(path.stem, error) for path, error in store.unreadable()]
        files = Files(folder)
        with progress_bar("exporting", len(ids)) as advance:
            for batch in _batches(ids):
                for id, asset in zip(batch, store.load_many(batch), strict=True):
                    result = asset if isinstance(asset, StorageError) else _attempt(files.save, asset)
                    if not isinstance(result, StorageError):
                        exported += 1
                    elif not isinstance(result, NotFoundError):  # which was deleted meanwhile
                        failed.append(_failure(id, result))
                    advance()
    _finish(options, f"{exported} exported, {len(failed)} failed", {"exported": exported, "failed": failed})
    return FAILED if failed else DONE


@command("rm")
def rm(options: CommonOptions, ids: Annotated[list[str], typer.Argument(metavar="ID...")]) -> int:
    """Delete sessions."""
    with options.open() as store:
        results = list(zip(ids, store.delete_many(ids), strict=True))
    deleted = [id for id, error in results if error is None]
    failed = [_failure(id, error) for id, error in results if error is not None]
    _finish(options, f"{len(deleted)} deleted, {len(failed)} failed", {"deleted": deleted, "failed": failed})
    codes = {_code(error) for _, error in results if error is not None} or {DONE}
    return codes.pop() if len(codes) == 1 else FAILED


@command("ping")
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
    _finish(options, text, found)


@command("watch")
def watch(
    options: CommonOptions,
    since: Annotated[str | None, typer.Option(metavar="CURSOR", help="Go on from there; default: from now.")] = None,
    ids: Annotated[list[str] | None, typer.Option("--id", metavar="ID", help="Only this session; repeatable.")] = None,
) -> int:
    """Print every change as it comes, until Ctrl-C or SIGTERM; with --json a JSON document a line.

    In the end the cursor to go on from is printed.
    """
    if isinstance(resolve(options.url), FileFolder):
        raise ValueError("files publish no changes: watch needs a Redis store")
    with options.open() as store:
        assert isinstance(store, RedisSessionStore)  # noqa: S101  # of a file: URL alone it is another
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


@command("demo")
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
        return _code(exc)


def _code(error: BaseException) -> int:
    if isinstance(error, NotFoundError):
        return NOT_FOUND
    if isinstance(error, ValueError):  # a URL, namespace or id that can't be
        return USAGE
    return int(getattr(error, "exit_code", FAILED))  # that of typer's own errors


def _attempt(call: Callable[[T], R], item: T) -> R | StorageError:
    try:
        return call(item)
    except StorageError as error:
        return error


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[start : start + _BATCH] for start in range(0, len(items), _BATCH))


def _failure(name: str, error: StorageError) -> dict[str, str]:
    complain(error if name in str(error) else f"{name}: {error}")
    return {"id": name, "error": str(error)}


def _finish(options: CommonOptions, text: str, document: object) -> None:
    if options.json:
        print_json(document)
    else:
        print_text(Text(safe(text)))
