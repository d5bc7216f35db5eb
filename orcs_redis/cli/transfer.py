"""Commands that bring files in and out: import, export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from ..errors import ConflictError, NotFoundError, StorageError
from ..model.asset import SessionAsset
from ..sync import RedisSessionStore
from .common import DONE, FAILED, Commands, CommonOptions, Files, attempt, failure, finish
from .terminal import progress_bar

__all__ = ["commands"]

commands = Commands("Files in and out")

T = TypeVar("T")
_BATCH = 32  # sessions in memory at once


@commands.command("import")
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
            saved = iter([attempt(save_absent, asset) for asset in good] if if_absent else store.save_many(good))
            for name, asset in zip(batch, loaded, strict=True):
                result = asset if isinstance(asset, StorageError) else next(saved)
                if if_absent and isinstance(result, ConflictError):
                    skipped += 1
                elif isinstance(result, StorageError):
                    failed.append(failure(f"{name}.json", result))
                else:
                    imported += 1
                advance()
    summary = f"{imported} imported, {skipped} skipped, {len(failed)} failed"
    finish(options, summary, {"imported": imported, "skipped": skipped, "failed": failed})
    return FAILED if failed else DONE


@commands.command("export")
def export(options: CommonOptions, folder: Annotated[Path, typer.Argument(metavar="DIR", file_okay=False)]) -> int:
    """Write every session to a folder as orcs' own file."""
    exported, failed = 0, list[dict[str, str]]()
    with options.open() as store:
        ids = [meta.id for meta in store.list()]
        if isinstance(store, Files):
            failed += [failure(path.stem, error) for path, error in store.unreadable()]
        files = Files(folder)
        with progress_bar("exporting", len(ids)) as advance:
            for batch in _batches(ids):
                for id, asset in zip(batch, store.load_many(batch), strict=True):
                    result = asset if isinstance(asset, StorageError) else attempt(files.save, asset)
                    if not isinstance(result, StorageError):
                        exported += 1
                    elif not isinstance(result, NotFoundError):  # which was deleted meanwhile
                        failed.append(failure(id, result))
                    advance()
    finish(options, f"{exported} exported, {len(failed)} failed", {"exported": exported, "failed": failed})
    return FAILED if failed else DONE


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[start : start + _BATCH] for start in range(0, len(items), _BATCH))
