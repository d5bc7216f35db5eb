"""Tests of code that uses a store, without a server: `memory://NAME` is fakeredis in this process.

    pip install '.[memory]' pytest
    pytest examples/test_greeter.py

Stores of one name share their data; a name for each test keeps tests apart.
"""

import uuid
from collections.abc import Iterator

import pytest

from orcs_redis import ConversationTurn, LeaseHeldError, SessionAsset
from orcs_redis.sync import RedisSessionStore, open_store


def greet(store: RedisSessionStore[SessionAsset], id: str, name: str) -> None:
    """Greet the user of a session once, whatever other workers do: the code under test."""
    with store.lease(id, ttl=10) as lease:
        if not any("greeting" in turn.tags for turn in store.turns(id)):
            greeting = ConversationTurn.assistant(f"Good day, {name}!").with_tags(["greeting"])
            store.append(id, greeting, lease=lease)


@pytest.fixture
def url() -> str:
    """A data set that no other test has."""
    return f"memory://{uuid.uuid4()}"


@pytest.fixture
def store(url: str) -> Iterator[RedisSessionStore[SessionAsset]]:
    """A store with one session."""
    with open_store(url) as store:
        store.save(SessionAsset(id="s"))
        yield store


def test_it_greets_once(store: RedisSessionStore[SessionAsset]) -> None:
    """A second call adds nothing."""
    greet(store, "s", "Ada")
    greet(store, "s", "Ada")
    assert [turn.content for turn in store.turns("s")] == ["Good day, Ada!"]


def test_it_leaves_a_leased_session_alone(store: RedisSessionStore[SessionAsset], url: str) -> None:
    """While another worker has the session, nothing is written."""
    with open_store(url) as other, other.lease("s"), pytest.raises(LeaseHeldError):
        greet(store, "s", "Ada")
    assert store.turns("s") == []
