"""Bring a folder of orcs' session files into a shared store; what the store has already stays as it is there.

    python examples/import_orcs.py FOLDER [URL]

`orcs-redis import --if-absent FOLDER` does the same; this is how, for an import with rules of its own.
"""

import asyncio
import sys

from orcs_redis import ConflictError, LocalFileStore, StorageError, open_store


async def main(folder: str = "~/.orcs/sessions", url: str | None = None) -> int:
    """Import all sessions; return how many failed."""
    imported = skipped = failed = 0
    async with LocalFileStore(folder) as files, open_store(url) as store:
        for meta in await files.list():
            try:
                await store.save(await files.load(meta.id), if_revision=0)  # only if the session is absent
                imported += 1
            except ConflictError:
                skipped += 1
            except StorageError as error:
                print(f"{meta.id}: {error}", file=sys.stderr)
                failed += 1
        for path, reason in files.unreadable():  # files that `list` left out
            print(f"{path.name}: {reason}", file=sys.stderr)
            failed += 1
    print(f"{imported} imported, {skipped} skipped, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(bool(asyncio.run(main(*sys.argv[1:]))))
