"""The public API as a type checker sees it. Checked by mypy, never run."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import assert_type

import redis
import redis.asyncio

from orcs_redis import (
    Conflict,
    ConversationTurn,
    HybridSessionStore,
    Kept,
    LocalFileStore,
    Page,
    RawItem,
    RedisSessionStore,
    SessionAsset,
    SessionMeta,
    SessionStore,
    StorageError,
    StorePool,
    SyncReport,
    SyncStatus,
    Versioned,
    foreign_id,
    open_store,
    sync,
)


class Ticket(SessionAsset):
    """A session with a field of one's own."""

    priority: int = 0


def touch(asset: SessionAsset) -> None:
    asset.touch()


def raise_priority(asset: Ticket) -> None:
    asset.priority += 1


async def asyncio_stores(client: redis.asyncio.Redis, turn: ConversationTurn) -> None:
    assert_type(open_store(), AbstractAsyncContextManager[RedisSessionStore[SessionAsset]])
    assert_type(open_store(client=client, namespace="n"), AbstractAsyncContextManager[RedisSessionStore[SessionAsset]])
    assert_type(open_store("memory://", asset_type=Ticket), AbstractAsyncContextManager[RedisSessionStore[Ticket]])
    assert_type(open_store(Path("p")), AbstractAsyncContextManager[LocalFileStore[SessionAsset]])
    assert_type(open_store(Path("p"), asset_type=Ticket), AbstractAsyncContextManager[LocalFileStore[Ticket]])
    assert_type(await RedisSessionStore.connect("memory://"), RedisSessionStore[SessionAsset])
    assert_type(await RedisSessionStore.connect(asset_type=Ticket, deadline=1.0), RedisSessionStore[Ticket])

    async with open_store() as plain:
        assert_type(await plain.load("id"), SessionAsset)
        assert_type(await plain.update("id", touch), Versioned[SessionAsset])

    async with open_store(asset_type=Ticket) as store:
        ticket = await store.load("id")
        assert_type(ticket, Ticket)
        assert_type(await store.save(ticket), int)
        assert_type(await store.save(ticket, if_revision=1), int)
        assert_type(await store.load_versioned("id"), Versioned[Ticket])
        assert_type(await store.append("id", turn, turn, if_revision=1), int)
        assert_type(await store.turns("id", -20), list[ConversationTurn])
        assert_type(await store.update("id", raise_priority), Versioned[Ticket])
        assert_type(await store.update("id", touch), Versioned[Ticket])
        assert_type(await store.list(limit=1), list[SessionMeta])
        assert_type(await store.list(project_path=None, labels={"user": "u1"}), list[SessionMeta])
        assert_type(await store.page(10, None), Page[SessionMeta])
        assert_type(await store.count(labels={"user": "u1"}), int)
        assert_type(await store.records("s", "checkpoint/", limit=1, reverse=True), list[tuple[str, bytes]])
        assert_type(await store.get_records("s", ["a"]), dict[str, bytes])
        assert_type((await store.page(10)).items, list[SessionMeta])
        assert_type((await store.page(10)).cursor, str | None)
        assert_type(await store.exists("id"), bool)
        assert_type(await store.save_many([ticket]), list[int | StorageError])
        assert_type(await store.load_many(["id"]), list[Ticket | StorageError])
        assert_type(await store.delete_many(["id"]), list[StorageError | None])
        assert_type(await store.ping(), float)
        assert_type(store.sync_status(), SyncStatus)
        await store.save(SessionAsset.new())  # type: ignore[arg-type]  # it has no priority
        await store.update("id", 1)  # type: ignore[arg-type]
        open_store(retries=3)  # type: ignore[call-overload]  # no such option

    async with open_store(Path("p"), asset_type=Ticket) as files:
        assert_type(await files.load("id"), Ticket)
        await files.append("id", turn)  # type: ignore[attr-defined]  # files have what SessionStore has
        files.watch()  # type: ignore[attr-defined]
        open_store(Path("p"), namespace="n")  # type: ignore[call-overload]  # and no option of Redis
        await RedisSessionStore.connect(Path("p"))  # type: ignore[call-overload]


async def hybrid_stores(turn: ConversationTurn) -> None:
    assert_type(open_store(local="p"), AbstractAsyncContextManager[HybridSessionStore[SessionAsset]])
    assert_type(
        open_store("redis://h", local=Path("p"), live=False, prefer="remote", asset_type=Ticket),
        AbstractAsyncContextManager[HybridSessionStore[Ticket]],
    )
    assert_type(HybridSessionStore("p", "redis://h", scan=1.0), HybridSessionStore[SessionAsset])
    async with open_store(local="p", asset_type=Ticket) as store:
        assert_type(await store.load("id", fresh=True), Ticket)
        assert_type(await store.append("id", turn), int)
        assert_type(await store.update("id", raise_priority), Versioned[Ticket])
        assert_type(await store.sync("id", dry_run=True), SyncReport)
        assert_type(await store.conflict("id"), Conflict[Ticket] | None)
        assert_type(store.kept("id"), list[Kept])
        assert_type(store.remote, RedisSessionStore[Ticket])
        await store.resolve("id", "local")
        await store.resolve("id", SessionAsset())  # type: ignore[arg-type]  # it has no priority
        await store.save(Ticket(), lease=None)  # type: ignore[call-arg]  # that is the shared store's
    with sync.open_store(local="p", asset_type=Ticket) as blocking:
        assert_type(blocking, sync.HybridSessionStore[Ticket])
        assert_type(blocking.load("id"), Ticket)
        assert_type(blocking.remote, sync.RedisSessionStore[Ticket])
    open_store(local="p", scanning=1.0)  # type: ignore[call-overload]  # no such option
    open_store(live=True)  # type: ignore[call-overload]  # without local


def blocking_stores(client: redis.Redis, turn: ConversationTurn) -> None:
    assert_type(sync.open_store(), AbstractContextManager[sync.RedisSessionStore[SessionAsset]])
    assert_type(sync.open_store(client=client), AbstractContextManager[sync.RedisSessionStore[SessionAsset]])
    assert_type(sync.open_store(asset_type=Ticket), AbstractContextManager[sync.RedisSessionStore[Ticket]])
    assert_type(sync.RedisSessionStore.connect("memory://"), sync.RedisSessionStore[SessionAsset])
    assert_type(sync.RedisSessionStore.connect(asset_type=Ticket), sync.RedisSessionStore[Ticket])

    with sync.open_store() as plain:
        assert_type(plain.load("id"), SessionAsset)

    with sync.open_store(Path("p"), asset_type=Ticket) as files:
        assert_type(files, sync.LocalFileStore[Ticket])
        files.append("id", turn)  # type: ignore[attr-defined]
        files.watch()  # type: ignore[attr-defined]

    with sync.open_store(asset_type=Ticket) as store:
        ticket = store.load("id")
        assert_type(ticket, Ticket)
        assert_type(store.save(ticket, if_revision=1), int)
        assert_type(store.load_versioned("id"), Versioned[Ticket])
        assert_type(store.append("id", turn), int)
        assert_type(store.turns("id", -20), list[ConversationTurn])
        assert_type(store.update("id", raise_priority), Versioned[Ticket])
        assert_type(store.list(limit=1), list[SessionMeta])
        assert_type(store.page(10), Page[SessionMeta])
        assert_type(store.count(labels={"user": "u1"}), int)
        assert_type(store.records("s"), list[tuple[str, bytes]])
        assert_type(store.exists("id"), bool)
        for saved in store.save_many([ticket]):
            assert_type(saved, int | StorageError)
        for loaded in store.load_many(["id"]):
            assert_type(loaded, Ticket | StorageError)
        for deleted in store.delete_many(["id"]):
            assert_type(deleted, StorageError | None)
        assert_type(store.ping(), float)
        assert_type(store.sync_status(), SyncStatus)
        store.save(SessionAsset.new())  # type: ignore[arg-type]  # it has no priority


async def pools() -> None:
    pool = StorePool("memory://", namespace="n", deadline=1.0)
    assert_type(pool, StorePool[SessionAsset])
    assert_type(StorePool(), StorePool[SessionAsset])
    assert_type(await pool.store(), RedisSessionStore[SessionAsset])
    assert_type(pool.blocking(), sync.RedisSessionStore[SessionAsset])
    async with StorePool(asset_type=Ticket) as tickets:
        assert_type(tickets, StorePool[Ticket])
        assert_type(await tickets.store(), RedisSessionStore[Ticket])
    with sync.StorePool(asset_type=Ticket) as tickets:
        assert_type(tickets.blocking(), sync.RedisSessionStore[Ticket])
    StorePool(Path("p"))  # type: ignore[call-overload]
    StorePool(client=None)  # type: ignore[call-overload]
    assert_type(foreign_id("a", "b"), str)
    assert_type(ConversationTurn.from_raw(RawItem("a/1", b"x")).raw, RawItem | None)


async def any_store(store: SessionStore[SessionAsset], asset: SessionAsset) -> None:
    assert_type(await store.save(asset), int)
    assert_type(await store.load("id"), SessionAsset)
    assert_type(await store.list(), list[SessionMeta])
    assert_type(await store.exists("id"), bool)
    assert_type(store.sync_status(), SyncStatus)


def any_blocking_store(store: sync.SessionStore[SessionAsset], asset: SessionAsset) -> None:
    assert_type(store.save(asset), int)
    assert_type(store.load("id"), SessionAsset)
    assert_type(store.list(), list[SessionMeta])


async def all_satisfy_the_protocol(
    asyncio_redis: RedisSessionStore[SessionAsset],
    blocking_redis: sync.RedisSessionStore[SessionAsset],
    tickets: RedisSessionStore[Ticket],
) -> None:
    assert_type(LocalFileStore(), LocalFileStore[SessionAsset])
    assert_type(LocalFileStore("p", asset_type=Ticket), LocalFileStore[Ticket])
    assert_type(sync.LocalFileStore("p"), sync.LocalFileStore[SessionAsset])

    await any_store(asyncio_redis, SessionAsset.new())
    await any_store(LocalFileStore(), SessionAsset.new())
    await any_store(HybridSessionStore("p"), SessionAsset.new())
    any_blocking_store(sync.HybridSessionStore("p"), SessionAsset.new())
    any_blocking_store(blocking_redis, SessionAsset.new())
    any_blocking_store(sync.LocalFileStore(), SessionAsset.new())

    store: SessionStore[Ticket] = tickets
    store = LocalFileStore("p", asset_type=Ticket)
    blocking: sync.SessionStore[Ticket] = sync.LocalFileStore("p", asset_type=Ticket)
    assert_type(await store.load("id"), Ticket)
    assert_type(blocking.load("id"), Ticket)

    await any_store(blocking_redis, SessionAsset.new())  # type: ignore[arg-type]  # the wrong form
    any_blocking_store(asyncio_redis, SessionAsset.new())  # type: ignore[arg-type]  # the wrong form
