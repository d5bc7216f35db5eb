"""Worker processes share sessions: a lease gives a session to one worker, and to another when that one is killed.

    python examples/fleet.py [URL]

Nine sessions wait for an answer. Three workers take them; one is killed with SIGKILL in the middle of an answer (its
lease ends when its time to live is over) and one is asked to stop with SIGTERM (it gives its lease back at once). In
the end every session has one answer.
"""

import asyncio
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.synchronize import Barrier
from typing import Any

import orcs_redis.sync
from orcs_redis import (
    ConversationTurn,
    Lease,
    LeaseHeldError,
    LeaseLostError,
    RedisSessionStore,
    SessionAsset,
    open_store,
)

TTL = 1.0  # seconds after which the lease of a killed worker is free; 30 is a good value for real work
PREFIX = "fleet-"


async def model(asset: SessionAsset) -> str:
    """Stand in for the call of a language model."""
    await asyncio.sleep(0.3)
    return f"answer to {asset.history.turns[-1].content!r}"


async def answer(store: RedisSessionStore[SessionAsset], lease: Lease) -> None:
    """Answer a session's last turn, unless that was done, or the lease is lost meanwhile."""
    asset = await store.load(lease.id)  # under the lease: what others did before us is there
    if asset.history.turns[-1].role == "assistant":
        return
    call = asyncio.create_task(model(asset))
    try:
        either: list[asyncio.Future[Any]] = [call, lease.lost]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not call.done():
            return  # another worker has the session now: don't pay for an answer that can't be written
        # Refused with LeaseLostError if the lease ended meanwhile, even if this process was stopped and woke up late.
        await store.append(lease.id, ConversationTurn.assistant(call.result()), lease=lease)
        print(f"{lease.id}: answered by {os.getpid()}", flush=True)
    finally:
        call.cancel()


async def work(url: str | None, start: Barrier) -> None:
    """Answer sessions until none waits."""
    me = asyncio.current_task()
    assert me is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, me.cancel)
    async with open_store(url) as store:
        await asyncio.to_thread(start.wait)  # only so that this example's workers begin together
        while waiting := [meta.id for meta in await store.list() if meta.id.startswith(PREFIX) and meta.turn_count % 2]:
            for id in random.sample(waiting, len(waiting)):
                try:
                    async with store.lease(id, ttl=TTL) as lease:
                        await answer(store, lease)
                except (LeaseHeldError, LeaseLostError):
                    pass  # another worker has it
            await asyncio.sleep(0.05)


def worker(url: str | None, start: Barrier) -> None:
    """Run one worker process."""
    try:
        asyncio.run(work(url, start))
    except asyncio.CancelledError:
        print(f"{os.getpid()} was asked to stop, and gave its lease back", flush=True)


def main(url: str | None = None) -> None:
    """Start the fleet, harm it, and look at what it did."""
    with orcs_redis.sync.open_store(url) as store:
        ids = [f"{PREFIX}{number}" for number in range(9)]
        for id in ids:
            asset = SessionAsset(id=id)
            asset.add_turn(ConversationTurn.user(f"question {id}"))
            store.save(asset)

        context = multiprocessing.get_context("spawn")  # a store belongs to the process that opened it: don't fork one
        start = context.Barrier(3)
        workers = [context.Process(target=worker, args=(url, start)) for _ in range(3)]
        for process in workers:
            process.start()
        while len(store.leases()) < 3 and all(process.is_alive() for process in workers):
            time.sleep(0.01)
        print(f"SIGKILL for {workers[0].pid}, SIGTERM for {workers[1].pid}", flush=True)
        workers[0].kill()
        workers[1].terminate()
        for process in workers:
            process.join()

        for id in ids:
            roles = [turn.role for turn in store.turns(id)]
            assert roles == ["user", "assistant"], roles
        print(f"{len(ids)} sessions, one answer each")
        store.delete_many(ids)


if __name__ == "__main__":
    main(*sys.argv[1:])
