"""Many callers who commit at once: what is delivered more than once is there once, what is popped is popped once."""

from __future__ import annotations

import asyncio
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orcs_redis import ConflictError, RedisSessionStore, SessionAsset

from .conftest import ROWS, Connect, Server, every_server
from .support import turn
from .test_commit import ids, numbered

real = pytest.mark.parametrize("place", [ROWS[2], ROWS[4], ROWS[5]], ids=str, indirect=True)


async def test_created_by_many(connect: Connect) -> None:
    """Of many who append to an absent session one makes it, and the turns of all are there."""
    stores = [await connect() for _ in range(3)]
    for n in range(5):
        id = f"s {n}"
        await asyncio.gather(
            *(store.append(id, *numbered(10 * k, 10 * k + 1), create=True) for k, store in enumerate(stores * 4)),
            *(store.commit(id, put_new={"k": b"1"}, create=True) for store in stores),
        )
        found = await ids(stores[0], id)
        assert sorted(found) == sorted(10 * k + more for k in range(12) for more in (0, 1))
        assert all(found[i + 1] == found[i] + 1 for i in range(0, 24, 2))
        came = await asyncio.gather(*(store.commit(f"t {n}", put_new={"k": b"1"}, create=True) for store in stores * 4))
        assert sum(each.created for each in came) == sum(each.placed["k"] for each in came) == 1


async def test_once(connect: Connect) -> None:
    """Turns that are delivered many times, at once and from several stores, in several orders, are there once."""
    stores = [await connect() for _ in range(3)]
    await stores[0].append("s", *numbered(0), create=True)
    turns = numbered(*range(1, 31))
    deliveries = [turns[n : n + 3] for n in range(0, 30, 3)]
    await asyncio.gather(
        *(store.append("s", *delivery, once=True) for store in stores for delivery in deliveries + deliveries[::-1]),
        *(store.append("new", *delivery, once=True, create=True) for store in stores for delivery in deliveries),
        *(stores[0].append("s", *numbered(1000 + n)) for n in range(20)),
    )
    found = await ids(stores[0])
    assert sorted(found) == [*range(31), *range(1000, 1020)]
    for delivery in deliveries:
        at = found.index(int(delivery[0].id))
        assert found[at : at + 3] == [int(each.id) for each in delivery]
    assert sorted(await ids(stores[0], "new")) == [*range(1, 31)]
    revision = (await stores[0].load_versioned("s")).revision
    assert await stores[1].append("s", *turns, once=True) == revision
    await stores[1].append("s", *turns, *numbered(50), once=True)
    assert (await ids(stores[0]))[-1] == 50


@real
async def test_once_by_fifty_tasks(store: Any) -> None:
    """Fifty tasks that deliver the same turn at once, and as many another one each."""
    await store.save(SessionAsset(id="s"))
    same = numbered(0)
    await asyncio.gather(
        *(store.append("s", *same, once=True) for _ in range(50)),
        *(store.append("s", *numbered(n), once=True) for n in range(1, 51)),
    )
    assert sorted(await ids(store)) == [*range(51)]


@real
async def test_beyond_the_last_thousand(store: Any) -> None:
    """A turn is looked for among the last 1,000, and no further."""
    await store.append("s", *numbered(*range(1500)), create=True)
    assert await store.append("s", *numbered(500, 999, 1499), once=True) == 1
    await store.append("s", *numbered(499), once=True)
    assert await ids(store) == [*range(1500), 499]


@pytest.mark.parametrize("place", [ROWS[0], ROWS[2], ROWS[5]], ids=str, indirect=True)
async def test_ids_of_all_lengths(store: Any) -> None:
    """Whatever a turn's id, it is found by the script and by the client alike."""
    turns = []
    for length in (1, 2, 31, 32, 33, 255, 256, 257, 65_535, 65_536, 70_000):
        for letter in ("a", "\0", "\xe9"):
            turns.append(turn(f"{length} {letter!r}"))
            turns[-1].id = letter * (length if letter != "\xe9" else max(length // 2, 1)) + "!" * (len(turns) % 2)
    assert len({each.id for each in turns}) == len(turns)
    await store.save(SessionAsset(id="s"))
    await store.append("s", *turns, once=True)
    revision = (await store.load_versioned("s")).revision
    assert await store.append("s", *turns[::-1], once=True) == revision
    for each in turns:
        each.content += " again"
        await store.replace_turn("s", each)
    assert await store.turns("s") == turns
    while turns:
        last = turns.pop()
        with pytest.raises(ConflictError):
            await store.commit("s", pop=1, if_last=last.id + "!")
        assert (await store.commit("s", pop=1, if_last=last.id)).revision > revision
    assert await store.pop("s") == []


DELIVER = textwrap.dedent("""
    import asyncio, json, sys
    from orcs_redis import ConversationTurn, open_store

    async def main(url: str, name: str) -> None:
        async with open_store(url) as store:
            print("ready", flush=True)
            sys.stdin.readline()
            for n in range(200):
                turn = ConversationTurn.user(name)
                turn.id = str(n)
                await store.append("s", turn, once=True, create=True)
                if n % 20 == 19:
                    popped = [turn.id for turn in await store.pop("queue", 2)]
                    print(json.dumps(popped), flush=True)

    asyncio.run(main(*sys.argv[1:]))
""")


@every_server
async def test_two_processes(start_server: Callable[..., Server]) -> None:
    """Two processes deliver the same turns at the same time, and pop from one queue: each turn is once with one."""
    server = start_server()
    async with await RedisSessionStore.connect(server.url) as store:
        await store.append("queue", *numbered(*range(100)), create=True)
        processes = [
            await asyncio.create_subprocess_exec(
                sys.executable, "-c", DELIVER, server.url, name,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parent.parent,
            )
            for name in ("first", "second")
        ]  # fmt: skip
        for process in processes:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"
        outputs = await asyncio.gather(*(process.communicate(b"go\n") for process in processes))
        turns = await store.turns("s")
        assert [each.id for each in turns] == [str(n) for n in range(200)]
        assert {each.content for each in turns} <= {"first", "second"}
        popped = [id for output, _ in outputs for line in output.splitlines() for id in json.loads(line)]
        assert Counter(popped) == Counter(str(n) for n in range(60, 100))
        assert await ids(store, "queue") == [*range(60)]


async def test_pop_from_a_busy_session(connect: Connect) -> None:
    """Pops end while others append without a pause; what is popped and what is left is each turn once."""
    stores = [await connect() for _ in range(2)]
    await stores[0].append("s", *numbered(*range(50)), create=True)
    done = asyncio.Event()
    added = 50

    async def add(store: Any) -> None:
        nonlocal added
        while not done.is_set():
            numbers = range(added, added + 3)
            added += 3
            await store.append("s", *numbered(*numbers))

    adding = [asyncio.ensure_future(add(store)) for store in stores]
    async with asyncio.timeout(60):
        popped = await asyncio.gather(*(store.pop("s", 2) for store in stores * 5))
    done.set()
    await asyncio.gather(*adding)
    taken = [int(each.id) for turns in popped for each in turns]
    assert len(taken) == 20
    for turns in popped:
        assert int(turns[0].id) != int(turns[1].id)
    assert sorted(taken + await ids(stores[0])) == [*range(added)]
