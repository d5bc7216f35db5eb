"""A process that writes to sessions, through a folder or at the shared store, and logs each turn before and after.

A line of the log is "try <session> <turn>" or "done <session> <turn>".
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import orcs_redis.sync
from orcs_redis import ConflictError, ConversationTurn, SessionAsset, StorageError

__all__ = ["SESSIONS"]

SESSIONS = ("s0", "s1", "s2")


class Writer:
    """Adds turns to sessions in one of several ways; all of its turns carry its name."""

    def __init__(self, store: Any, name: str, log: Path, seed: int) -> None:
        self._store = store
        self._name = name
        self._log = log.open("a", buffering=1)
        self._random = random.Random(seed)
        self._count = 0

    def run(self) -> None:
        """Write until the process is killed."""
        while True:
            self._write(self._random.choice(SESSIONS))
            time.sleep(self._random.uniform(0, 0.03))

    def _write(self, id: str) -> None:
        self._count += 1
        turn = ConversationTurn.user(self._name)
        turn.id = f"{self._name}.{self._count}"
        how = self._random.choices((self._append, self._save, self._update), (6, 2, 2))[0]
        self._log.write(f"try {id} {turn.id}\n")
        try:
            how(id, turn)
        except (ConflictError, StorageError):
            return  # it may be there or not
        self._log.write(f"done {id} {turn.id}\n")

    def _append(self, id: str, turn: ConversationTurn) -> None:
        self._store.append(id, turn)

    def _save(self, id: str, turn: ConversationTurn) -> None:
        asset = self._store.load(id)
        time.sleep(self._random.uniform(0, 0.01))
        self._change(asset, turn)
        self._store.save(asset)

    def _update(self, id: str, turn: ConversationTurn) -> None:
        self._store.update(id, lambda asset: self._change(asset, turn))

    def _change(self, asset: SessionAsset, turn: ConversationTurn) -> None:
        asset.add_turn(turn)
        asset.metadata[self._name] = turn.id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="default: at the shared store")
    parser.add_argument("--url", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--live", action="store_true")
    options = parser.parse_args()
    if options.folder is None:
        with orcs_redis.sync.open_store(options.url) as shared:
            Writer(shared, options.name, options.log, options.seed).run()
        return
    with orcs_redis.sync.HybridSessionStore(options.folder, options.url, live=options.live, scan=0.2) as store:
        Writer(store, options.name, options.log, options.seed).run()


if __name__ == "__main__":
    main()
