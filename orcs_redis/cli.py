"""The command line, `orcs-redis`: a look at a store's sessions, files in and out, and the demo.

Results go to standard output, as text or with --json as one document; everything else, one line each, to standard
error. What sessions contain is shown, never obeyed: control characters are escaped, markup is text.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json as jsonlib
import logging
import re
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias, TypeVar

import msgspec

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as error:  # they are in the extra "cli"; a traceback would not say so
    raise SystemExit(f"orcs-redis: {error.name} is missing: pip install 'orcs-redis[cli]'") from None

from .address import Address, EmbeddedFolder, FileFolder, MemoryName
from .asset import ConversationTurn, SessionAsset, to_datetime
from .core import resolve
from .errors import ConflictError, NotFoundError, StorageError
from .meta import SessionMeta
from .sync import LocalFileStore, RedisSessionStore

__all__ = ["app", "main"]

DONE, FAILED, USAGE, NOT_FOUND, INTERRUPTED = 0, 1, 2, 3, 130
CODES = "Exit codes: 0 done; 1 failed, if only in part; 2 wrong usage; 3 no such session; 130 interrupted."

T = TypeVar("T")
R = TypeVar("R")

_BATCH = 32  # sessions in memory at once
_EXCERPT = 200  # characters shown of a tool call's arguments or result

# What can move the cursor, recolour or reorder a line: C0, DEL, C1, directions, line separators. And lone
# surrogates, which can't be printed.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


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


class Target(NamedTuple):
    """The options that every command has."""

    url: str | None
    namespace: str | None
    json: bool

    @contextmanager
    def open(self) -> Iterator[Store]:
        """Open the store."""
        where = resolve(self.url)
        if isinstance(where, FileFolder):
            yield Files(where.path)
            return
        with RedisSessionStore.connect(self.url, namespace=self.namespace or "orcs") as store:
            yield store


Url = Annotated[str | None, typer.Option("--url", metavar="URL", help="default: $ORCS_REDIS_URL, else embedded:")]
Namespace = Annotated[str | None, typer.Option("--namespace", metavar="NAME", help="default: orcs")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

app = typer.Typer(
    epilog=CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        _print(f"orcs-redis {importlib.metadata.version('orcs-redis')}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]


@app.callback()
def options(
    context: typer.Context,
    url: Url = None,
    namespace: Namespace = None,
    json: Json = False,
    version: Version = False,
) -> None:
    """Sessions of AI agents, in Redis, Valkey or files."""
    context.obj = Target(url, namespace, json)


def command(name: str) -> Callable[[Callable[..., int | None]], None]:
    """Add a command, which takes a Target. Its options may stand before the command's name and after it."""

    def add(call: Callable[..., int | None]) -> None:
        def run(
            context: typer.Context, url: Url = None, namespace: Namespace = None, json: Json = False, **own: Any
        ) -> int | None:
            before: Target = context.obj
            target = Target(url or before.url, namespace or before.namespace, json or before.json)
            return call(target, **own)

        common = list(inspect.signature(run, eval_str=True).parameters.values())[:-1]
        own = list(inspect.signature(call, eval_str=True).parameters.values())[1:]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *common)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__ = call.__doc__
        app.command(name, epilog=CODES)(run)

    return add


@command("ls")
def ls(
    target: Target,
    limit: Annotated[int, typer.Option(min=1, help="So many at most.")] = 50,
    everything: Annotated[bool, typer.Option("--all", help="Without a limit.")] = False,
    project: Annotated[str | None, typer.Option(metavar="PATH", help="Only those of this project.")] = None,
) -> int:
    """List sessions, the last updated first."""
    with target.open() as store:
        if isinstance(store, Files):
            metas = [meta for meta in store.list() if project in (None, meta.project_path)]
            code = FAILED if store.unreadable() else DONE  # the log has told which
        else:
            metas = store.list(limit=None if everything else limit + 1, project_path=project)
            code = DONE
    if not everything and len(metas) > limit:
        del metas[limit:]
        _complain(f"there are more than {limit}: see --limit and --all")
    if target.json:
        _print_json([msgspec.to_builtins(meta) for meta in metas])
    else:
        _print(_table(metas))
    return code


@command("show")
def show(
    target: Target,
    id: Annotated[str, typer.Argument(metavar="ID")],
    turns: Annotated[int, typer.Option(min=0, metavar="N", help="Show the last N turns.")] = 20,
) -> None:
    """Show a session; with --json exactly as in orcs' file."""
    with target.open() as store:
        asset = store.load(id)
    if target.json:
        _print_document(asset.to_json())
    else:
        _print(_describe(asset, turns))


@command("import")
def import_(
    target: Target,
    folder: Annotated[Path, typer.Argument(metavar="DIR", exists=True, file_okay=False)],
    if_absent: Annotated[bool, typer.Option("--if-absent", help="Skip sessions that the store has.")] = False,
) -> int:
    """Store every session file (*.json) of a folder of orcs."""
    imported, skipped, failed = 0, 0, list[dict[str, str]]()
    files = Files(folder)
    names = sorted(path.stem for path in folder.iterdir() if path.suffix == ".json" and path.name[0] != ".")
    with target.open() as store, _progress("importing", len(names)) as advance:

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
    _finish(target, summary, {"imported": imported, "skipped": skipped, "failed": failed})
    return FAILED if failed else DONE


@command("export")
def export(target: Target, folder: Annotated[Path, typer.Argument(metavar="DIR", file_okay=False)]) -> int:
    """Write every session to a folder as orcs' own file."""
    exported, failed = 0, list[dict[str, str]]()
    with target.open() as store:
        ids = [meta.id for meta in store.list()]
        if isinstance(store, Files):
            failed += [_failure(path.stem, error) for path, error in store.unreadable()]
        files = Files(folder)
        with _progress("exporting", len(ids)) as advance:
            for batch in _batches(ids):
                for id, asset in zip(batch, store.load_many(batch), strict=True):
                    result = asset if isinstance(asset, StorageError) else _attempt(files.save, asset)
                    if not isinstance(result, StorageError):
                        exported += 1
                    elif not isinstance(result, NotFoundError):  # which was deleted meanwhile
                        failed.append(_failure(id, result))
                    advance()
    _finish(target, f"{exported} exported, {len(failed)} failed", {"exported": exported, "failed": failed})
    return FAILED if failed else DONE


@command("rm")
def rm(target: Target, ids: Annotated[list[str], typer.Argument(metavar="ID...")]) -> int:
    """Delete sessions."""
    with target.open() as store:
        results = list(zip(ids, store.delete_many(ids), strict=True))
    deleted = [id for id, error in results if error is None]
    failed = [_failure(id, error) for id, error in results if error is not None]
    _finish(target, f"{len(deleted)} deleted, {len(failed)} failed", {"deleted": deleted, "failed": failed})
    codes = {_code(error) for _, error in results if error is not None} or {DONE}
    return codes.pop() if len(codes) == 1 else FAILED


@command("ping")
def ping(target: Target, count: Annotated[int, typer.Option(min=1, help="The number of round trips.")] = 10) -> None:
    """Tell whether the store can be reached, and how long a round trip takes."""
    where = resolve(target.url)
    kinds = {Address: "server", EmbeddedFolder: "embedded", FileFolder: "files", MemoryName: "memory"}
    # As text an address has no user and no password.
    address = str(where if isinstance(where, Address) else getattr(where, "path", None) or "")
    found: dict[str, object] = {"kind": kinds[type(where)], "address": address}
    text = f"{found['kind']} {address}".rstrip()
    with target.open() as store:
        if isinstance(store, RedisSessionStore):
            median = statistics.median(store.ping() for _ in range(count)) * 1000
            found |= {"namespace": target.namespace or "orcs", "round_trip_ms": round(median, 4)}
            text += f", namespace {found['namespace']}: {median:.3f} ms, median of {count}"
    _finish(target, text, found)


@command("demo")
def demo(
    target: Target,
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="How long the workers work.")] = 10.0,
    workers: Annotated[int, typer.Option(min=1, max=64, help="The number of processes.")] = 4,
) -> int:
    """Let processes work on shared sessions, then tell whether anything was lost or doubled.

    Without --url it has a server of its own in a temporary folder. Of any other server it uses a new namespace, which
    it removes in the end.
    """
    from .demo import run

    if target.namespace is not None:
        raise ValueError("the demo makes a namespace of its own")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that it cleans up
    result = run(target.url, seconds=seconds, workers=workers, console=_console(stderr=target.json))
    if target.json:
        _print_json(msgspec.to_builtins(result) | {"ok": result.ok})
    return DONE if result.ok else FAILED


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="orcs-redis: %(message)s", level=logging.WARNING)
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    try:
        return app(list(arguments) or ["--help"], prog_name="orcs-redis", standalone_mode=False) or DONE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as exc:  # whatever it is: one line
        _complain(exc)
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


@cache  # one for each stream: what is printed while a bar moves must go above it
def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 100_000  # for a program or a file nothing is cut off
    return console


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    console = _console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def _line(text: str) -> str:
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _block(text: str) -> str:
    return "\n".join("    " + _line(line.replace("\t", "    ")) for line in text.split("\n"))


def _complain(problem: object) -> None:
    text = getattr(problem, "format_message", lambda: str(problem) or type(problem).__name__)()
    _console(stderr=True).print(Text(f"orcs-redis: {_line(text)}"), soft_wrap=True)


def _failure(name: str, error: StorageError) -> dict[str, str]:
    _complain(error if name in str(error) else f"{name}: {error}")
    return {"id": name, "error": str(error)}


def _finish(target: Target, text: str, document: object) -> None:
    if target.json:
        _print_json(document)
    else:
        _print(Text(_line(text)))


def _print(what: str | Text | Table) -> None:
    _console().print(what, soft_wrap=not isinstance(what, Table))


def _print_json(document: object) -> None:
    _print_document(jsonlib.dumps(document, indent=2) + "\n")


def _print_document(text: str) -> None:
    """Print JSON: to a program or a file exactly, to a terminal without what it could obey."""
    console = _console()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    if console.is_terminal:
        escaped = _UNSAFE.sub(lambda m: m[0] if m[0] == "\n" else f"\\u{ord(m[0]):04x}", text)
        console.out(escaped, highlight=False)
    else:
        console.out(text, highlight=False, end="")


def _when(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S}"


def _age(time: datetime) -> str:
    seconds = (datetime.now(UTC) - time).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def _table(metas: Sequence[SessionMeta]) -> Table:
    wide = _console().width >= 120  # else the time of the update leaves no room for the names
    table = Table(box=None, header_style="bold")
    # A UUID stays in one piece.
    table.add_column("id", no_wrap=all(len(meta.id) <= 36 for meta in metas), overflow="fold")
    table.add_column("name", overflow="fold")
    table.add_column("turns", no_wrap=True, justify="right")
    table.add_column("updated", no_wrap=True, justify="right")
    table.add_column("project", overflow="fold")
    for meta in metas:
        updated = f"{_when(meta.updated_at)} UTC, " * wide + _age(meta.updated_at)
        cells = (meta.id, meta.name or "", str(meta.turn_count), updated, meta.project_path or "")
        table.add_row(*(Text(_line(cell)) for cell in cells))
    return table


def _describe(asset: SessionAsset, turns: int) -> Text:
    project, history = asset.project_context, asset.history
    lines = {
        "name": project.name or "",
        "project": project.root_path or "",
        "technologies": ", ".join(project.technologies),
        "created": f"{_when(asset.created_at)} UTC",
        "updated": f"{_when(asset.updated_at)} UTC, {_age(asset.updated_at)}",
        "turns": f"{len(history)}, and {sum(part.turn_count for part in history.compacted)} summarised",
        "skills": ", ".join(asset.skill_configs),
        "snapshots": ", ".join(asset.component_snapshots),
        "grants": ", ".join(grant.pattern for grant in asset.granted_commands),
        "facts": "; ".join(f"{fact.key}: {fact.value}" for fact in project.learned_facts),
        "metadata": _excerpt(asset.metadata),
    }
    text = Text.assemble((_line(asset.id), "bold"))
    for name, value in lines.items():
        if value:
            text.append(f"\n{name:<14}", "dim").append(_line(value))
    first = max(len(history) - turns, 0)
    if first:
        text.append(f"\n\n... {first} earlier turns", "dim")
    for number, turn in enumerate(history.turns[first:], first):
        _append_turn(text, number, turn)
    return text


def _append_turn(text: Text, number: int, turn: ConversationTurn) -> None:
    tags = f" [{', '.join(turn.tags)}]" if turn.tags else ""
    text.append(f"\n\n#{number} {_line(turn.role)}", "bold").append(f" {_when(to_datetime(turn.timestamp_ms))}", "dim")
    text.append(_line(tags) + "\n" + _block(turn.content))
    for call in turn.tool_calls:
        how = "ok" if call.success else "failed"
        text.append(f"\n    {_line(call.tool_name)} ", "cyan").append(_excerpt(call.args))
        text.append(f"\n        {how} in {call.duration_ms} ms: ", "dim").append(_excerpt(call.result))


def _excerpt(value: object) -> str:
    text = _line(jsonlib.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 3] + "..."


if __name__ == "__main__":
    main()
