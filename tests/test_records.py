"""Reads of records: ranges, keys, their order, what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orcs_redis import CorruptSessionError, InvalidIdError, SessionAsset, open_store
from orcs_redis.protocol.records import check_record_key

from .conftest import Place


@pytest.fixture
def put(store: Any) -> Callable[..., Awaitable[None]]:
    async def put(id: str, *keys: str, value: bytes | None = None) -> None:
        for at in range(0, len(keys), 500):
            records = {key: key.encode() if value is None else value for key in keys[at : at + 500]}
            await store.commit(id, put=records, create=True)

    return put


async def keys(store: Any, *arguments: Any, **options: Any) -> list[str]:
    return [key for key, _ in await store.records(*arguments, **options)]


async def test_ranges(store: Any, put: Any) -> None:
    """Pairs come in the order of the keys' bytes; a prefix and bounds, which are not included, select some."""
    names = ["a", "a/1", "a/2", "a0", "b*x", "b*y", "\uffff", "\U0001f600"]
    await put("s", *names)
    await put("other", "x")
    assert await store.records("s") == [(name, name.encode()) for name in names]
    assert await keys(store, "s", reverse=True) == names[::-1]
    assert await keys(store, "s", "a/") == ["a/1", "a/2"]
    assert await keys(store, "s", "a", limit=2) == ["a", "a/1"]
    assert await keys(store, "s", "a", limit=2, reverse=True) == ["a0", "a/2"]
    assert await keys(store, "s", "b*") == ["b*x", "b*y"]
    assert await keys(store, "s", "a/1x") == await keys(store, "s", "*") == await keys(store, "s", limit=0) == []
    assert await keys(store, "s", after="a/1", before="b*x") == ["a/2", "a0"]
    assert await keys(store, "s", after="a/1", before="b*x", reverse=True, limit=1) == ["a0"]
    assert await keys(store, "s", "a/", after="a") == await keys(store, "s", "a/", before="b") == ["a/1", "a/2"]
    assert await keys(store, "s", "a/", after="b") == await keys(store, "s", after="b", before="a") == []
    assert await store.records("absent") == []


async def test_by_keys(store: Any, put: Any) -> None:
    """What is there comes back under its key, in the order that was asked for, whatever its bytes."""
    await put("s", "a", "b")
    await put("s", "\r\n", value=b"\x00\xff")
    assert await store.get_records("s", ["b", "x", "a", "b"]) == {"b": b"b", "a": b"a"}
    assert await store.get_records("s", iter(["\r\n"])) == {"\r\n": b"\x00\xff"}
    assert await store.get_records("s", []) == await store.get_records("absent", ["a"]) == {}
    many = [f"{n:04}" for n in range(2500)]
    await put("many", *many)
    found = await store.get_records("many", many[::-1])
    assert list(found) == many[::-1]


async def test_many_and_large_ones(place: Place, store: Any, put: Any) -> None:
    """All of a range comes, however many and however large they are."""
    count = 500 if place.row.server == "memory" else 20_000
    await put("many", *(f"{n:06}" for n in range(count)))
    assert await keys(store, "many") == [f"{n:06}" for n in range(count)]
    assert await keys(store, "many", limit=450, reverse=True) == [f"{n:06}" for n in range(count - 450, count)][::-1]
    await put("large", *(f"{n:03}" for n in range(250)), value=b"x" * 100_000)
    assert sum(len(value) for _, value in await store.records("large")) == 25_000_000


async def test_what_is_dropped_in_between(place: Place, store: Any, put: Any) -> None:
    """A key whose record is gone when it is asked for is not there; a limit is filled by others."""
    await put("s", *"abcdef")
    place.raw.hdel(place.key("records:s"), "b", "c")
    assert await keys(store, "s") == ["a", "d", "e", "f"]
    assert await keys(store, "s", limit=3) == ["a", "d", "e"]
    assert await keys(store, "s", limit=4, reverse=True) == ["f", "e", "d", "a"]


async def test_what_is_no_record(place: Place, store: Any, put: Any) -> None:
    """Keys of another type, and a name that is no text, are a corrupt session."""
    place.raw.set(place.key("names:s"), "x")
    place.raw.set(place.key("records:s"), "x")
    for call, part in ((store.records("s"), "names"), (store.get_records("s", ["a"]), "records")):
        with pytest.raises(CorruptSessionError) as caught:
            await call
        assert caught.value.field == part
    place.raw.zadd(place.key("names:t"), {b"a\xff": 0})
    with pytest.raises(CorruptSessionError):
        await store.records("t", reverse=True)


async def test_bad_input(store: Any) -> None:
    """It is refused, and what is quoted of it is short."""
    bad: list[Any] = ["", "k" * 1025, "\u00e9" * 513, "\udc80", b"k", 1]
    for key in bad:
        for call in (
            partial(store.get_records, "s", ["a", key]),
            partial(store.records, "s", after=key),
            partial(store.records, "s", before=key),
        ):
            with pytest.raises(ValueError, match=r"record's key") as caught:
                await call()
            assert len(str(caught.value)) < 120
    for prefix in ("\udc80", b"x", None):
        with pytest.raises(ValueError, match="prefix"):
            await store.records("s", prefix)
    for limit in (-1, 1.0, "1", True):
        with pytest.raises(ValueError, match="limit"):
            await store.records("s", limit=limit)
    with pytest.raises(ValueError, match="several"):
        await store.get_records("s", "abc")
    with pytest.raises(InvalidIdError):
        await store.records("a/b")
    with pytest.raises(InvalidIdError):
        await store.get_records("a/b", ["a"])
    assert await store.records("s", "p" * 2000) == []
    assert check_record_key("k" * 1024) == b"k" * 1024


KEYS = st.text("ab*\xff\uffff\U0001f600", min_size=1, max_size=4)


@settings(max_examples=50)
@given(
    names=st.sets(KEYS.filter(lambda key: not key.endswith("*")), max_size=30),  # those are no keys
    prefix=st.text("ab*\xff", max_size=2),
    after=st.none() | KEYS,
    before=st.none() | KEYS,
    limit=st.none() | st.integers(0, 6),
    reverse=st.booleans(),
)
def test_ranges_against_a_model(
    names: set[str], prefix: str, after: str | None, before: str | None, limit: int | None, reverse: bool
) -> None:
    """For any keys, prefix, bounds and limit, what comes is what a sorted list of UTF-8 has."""
    expected = [
        name
        for name in sorted(names, key=str.encode, reverse=reverse)
        if name.startswith(prefix)
        and (after is None or name.encode() > after.encode())
        and (before is None or name.encode() < before.encode())
    ][:limit]

    async def run() -> None:
        async with open_store("memory://") as store:
            await store.save(SessionAsset(id="s"))
            if names:
                await store.commit("s", put={name: name.encode() for name in names})
            found = await store.records("s", prefix, after=after, before=before, limit=limit, reverse=reverse)
            assert found == [(name, name.encode()) for name in expected]

    asyncio.run(run())
