"""What to do after a conflict, and after a write whose outcome is unknown.

    python examples/retry.py [URL]

Without a URL it uses $ORCS_REDIS_URL, else an embedded server.
"""

import asyncio
import sys

from orcs_redis import (
    ConflictError,
    ConversationTurn,
    OutcomeUnknownError,
    RedisSessionStore,
    SessionAsset,
    UnavailableError,
    open_store,
)

Store = RedisSessionStore[SessionAsset]


async def count_up(store: Store, id: str) -> None:
    """Increment a counter. `update` loads, changes and saves, and begins again if others have changed the same part."""

    def increment(asset: SessionAsset) -> None:
        asset.metadata["count"] = asset.metadata.get("count", 0) + 1

    await store.update(id, increment)


async def rename_if_untouched(store: Store, id: str, name: str) -> bool:
    """Rename a session, unless somebody else writes it meanwhile: the caller decides, not the store."""
    asset, revision = await store.load_versioned(id)
    asset.project_context.name = name
    asset.touch()  # so that it moves to the front of the list; without it, it keeps its place
    try:
        await store.save(asset, if_revision=revision)
    except ConflictError as error:
        print(f"{error.id} is at revision {error.actual}, no more at {error.expected}")
        return False
    return True


async def append_once(store: Store, id: str, turn: ConversationTurn) -> None:
    """Append a turn, and make sure of it if its reply was lost.

    The store repeats a write by itself, without doubling it, until its deadline. Only then it is OutcomeUnknownError.
    """
    try:
        await store.append(id, turn)
    except UnavailableError:
        raise  # certainly not applied: repeat it later, as it is
    except OutcomeUnknownError:
        await store.append(id, turn, once=True)  # unless it is among the last 1,000


async def main(url: str | None = None) -> None:
    """Let tasks compete."""
    async with open_store(url) as store:
        id = "retry-1"
        await store.save(SessionAsset(id=id))
        await asyncio.gather(*(count_up(store, id) for _ in range(20)))
        asset = await store.load(id)
        assert asset.metadata["count"] == 20
        print(f"20 tasks counted to {asset.metadata['count']}")

        won = await asyncio.gather(*(rename_if_untouched(store, id, name) for name in ("shop", "store", "market")))
        print(f"{won.count(True)} of {len(won)} renamed it")

        turn = ConversationTurn.user("hello")
        await append_once(store, id, turn)
        assert [each.id for each in await store.turns(id)] == [turn.id]
        await store.delete(id)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
