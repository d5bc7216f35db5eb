"""Save a session, append to it, read its tail, list it: the whole store in a minute.

    python examples/quickstart.py [URL]

Without a URL it uses $ORCS_REDIS_URL, else an embedded server.
"""

import asyncio
import sys

from orcs_redis import ConflictError, ConversationTurn, SessionAsset, ToolCallRecord, open_store


async def main(url: str | None = None) -> None:
    """Walk through the methods that most programs need."""
    async with open_store(url) as store:
        asset = SessionAsset.for_project("/src/shop")
        asset.project_context.name = "shop"
        asset.add_turn(ConversationTurn.user("Why does the build fail?"))
        revision = await store.save(asset)
        print(f"saved at revision {revision}")

        # Adds to the history in the server, however long it is, and without loading it.
        call = ToolCallRecord(tool_name="run", args={"command": "make"}, result="ImportError: no module 'cart'")
        answer = ConversationTurn.assistant("An import is missing.").with_tool_calls([call])
        await store.append(asset.id, answer)

        # This save is bound to the revision that it was made from, and the append came in between.
        asset.metadata["priority"] = 2
        try:
            await store.save(asset, if_revision=revision)
        except ConflictError as error:
            print(f"expected revision {error.expected}, found {error.actual}")

        # Load, change, save; again if another write came in between.
        def prioritise(current: SessionAsset) -> None:
            current.metadata["priority"] = 2

        asset, revision = await store.update(asset.id, prioritise)
        assert len(asset.history) == 2

        for turn in await store.turns(asset.id, -20):
            print(f"{turn.role}: {turn.content}")
        for meta in await store.list(limit=10):
            print(f"{meta.id}  {meta.name}  {meta.turn_count} turns  {meta.updated_at:%Y-%m-%d %H:%M}")
        await store.delete(asset.id)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
