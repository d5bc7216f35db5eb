"""The demo: that it ends well, that it can end badly, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orcs_redis import ConversationTurn, SessionAsset
from orcs_redis.cli.verdict import Entry, Seen, Verdict, judge
from orcs_redis.sync import RedisSessionStore, open_store
from orcs_redis.transport.embedded import find_server


def start(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "orcs_redis.cli", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
        start_new_session=True,
    )


def alive(group: int) -> list[str]:
    """Return the state of each process of a group, but for the dead whom nobody has fetched yet."""
    listing = subprocess.run(["ps", "-ax", "-o", "pgid=,stat="], capture_output=True, text=True, check=True)
    lines = [line.split() for line in listing.stdout.splitlines()]
    return [stat for pgid, stat in lines if int(pgid) == group and not stat.startswith("Z")]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for temporary files, with a path short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="od-") as folder:
        yield Path(folder)


def session(*turns: str, counter: int = 0) -> dict[str, SessionAsset]:
    """Return what the store has: a session "s" with these turns."""
    asset = SessionAsset.new()
    asset.id = "s"
    for id in turns:
        turn = ConversationTurn.user("")
        turn.id = id
        asset.history.turns.append(turn)
    asset.metadata["demo_counter"] = counter
    return {"s": asset}


LOG = [
    Entry("1", "append", "tried", "s", ("a", "b")),
    Entry("1", "append", "done", "s", ("a", "b"), revision=5),
    Entry("2", "update", "tried", "s", increments=1),
    Entry("2", "update", "done", "s", increments=1, revision=6),
    Entry("3", "save", "tried", "s", ("c",), 1),
    Entry("3", "save", "done", "s", ("c",), 1, revision=7),
    Entry("4", "save", "tried", "s", ("refused",), 1),
    Entry("4", "save", "refused", "s", ("refused",), 1),
    Entry("5", "save", "tried", "s", ("unknown",), 1),
]


def seen(*revisions: int) -> Seen:
    """Return what a watcher has seen that was told of these revisions of the session."""
    found = Seen()
    for revision in revisions:
        found.add("s", revision)
    return found


FINAL = {"s": 7}


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(session("x", "a", "b", "c", counter=2), id="the unknown not applied"),
        pytest.param(session("x", "a", "b", "c", "unknown", counter=3), id="the unknown applied"),
    ],
)
def test_a_good_store_passes(stored: dict[str, SessionAsset]) -> None:
    """All that was acknowledged is there once; what is unknown may be."""
    verdict = judge(LOG, stored, seen(5, 7), FINAL)
    assert verdict.ok
    assert (verdict.acknowledged, verdict.found, verdict.refused, verdict.unknown) == (3, 3, 1, 1)
    assert verdict.updates_acknowledged == 2


@pytest.mark.parametrize(
    ("field", "stored"),
    [
        pytest.param("lost", session("a", "b", counter=2), id="a lost turn"),
        pytest.param("lost", {}, id="a lost session"),
        pytest.param("doubled", session("a", "b", "c", "a", counter=2), id="a doubled turn"),
        pytest.param("doubled", session("a", "b", "c", "unknown", "unknown", counter=2), id="an unknown turn doubled"),
        pytest.param("refused_found", session("a", "b", "c", "refused", counter=2), id="a refused turn"),
        pytest.param("misordered", session("c", "a", "b", counter=2), id="turns out of order"),
        pytest.param("updates_lost", session("a", "b", "c", counter=1), id="a lost update"),
        pytest.param("updates_doubled", session("a", "b", "c", counter=4), id="a doubled update"),
    ],
)
def test_a_bad_store_fails(field: str, stored: dict[str, SessionAsset]) -> None:
    """Each way in which a store may break its word is counted, and makes the verdict bad."""
    verdict = judge(LOG, stored, seen(5, 7), FINAL)
    assert not verdict.ok
    assert getattr(verdict, field) > 0


def test_nothing_done_proves_nothing() -> None:
    """A verdict over empty logs is not good."""
    assert not judge([], session(), seen(7), FINAL).ok


@pytest.mark.parametrize(
    ("missed", "again", "revisions"),
    [
        pytest.param(1, 0, (5, 6), id="the final revision was missed"),
        pytest.param(0, 1, (5, 7, 7), id="a change twice"),
        pytest.param(1, 1, (7, 5), id="an older change after a newer one"),
        pytest.param(1, 0, (), id="nothing seen"),
    ],
)
def test_a_bad_watch_fails(missed: int, again: int, revisions: tuple[int, ...]) -> None:
    """A watcher that was not told of the end, or was told something twice, makes the verdict bad."""
    verdict = judge(LOG, session("a", "b", "c", counter=2), seen(*revisions), FINAL)
    assert not verdict.ok
    assert (verdict.sessions_missed, verdict.changes_again) == (missed, again)


def test_demo_on_a_server_of_its_own(folder: Path) -> None:
    """A short demo ends well, and its server and folder are gone."""
    with start("--seconds", "2", "--json", folder=folder) as process:
        out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    document = json.loads(out)
    assert document["ok"] is True
    assert document["crashed"] == 0
    assert len(document["workers"]) == 4
    assert all(worker["append done"] > 0 for worker in document["workers"])
    verdict = Verdict(**document["verdict"])
    assert verdict.ok
    assert verdict.changes > verdict.sessions_final > 9
    assert "changes watched" in err
    assert "verdict: nothing lost, nothing doubled" in err
    assert list(folder.iterdir()) == []


def keys_of(store: RedisSessionStore[SessionAsset]) -> int:
    (size,) = store._driver.link.call([("DBSIZE",)], time.monotonic() + 5)
    return int(size)


def test_demo_on_another_server_leaves_it_as_it_was(folder: Path) -> None:
    """On a given server the demo removes its namespace, and only that."""
    url = f"embedded://{folder / 'server'}"
    with open_store(url) as store:
        store.save(SessionAsset.new())
        before = keys_of(store)
        with start("--seconds", "1", "--workers", "2", "--url", url, folder=folder) as process:
            out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        assert "verdict: nothing lost, nothing doubled" in out
        assert keys_of(store) == before
        assert len(store.list()) == 1
    time.sleep(0.5)  # for the server, which is to go before its folder


def test_a_server_that_goes_away_gives_no_verdict(folder: Path) -> None:
    """What can't be reached in the end is neither lost nor found: the demo fails with an error in one line."""
    path = folder / "server"
    command = [str(find_server()), "--port", "0", "--unixsocket", str(path), "--dir", str(folder), "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        while not path.exists():
            time.sleep(0.01)
        with start("--seconds", "3", "--workers", "1", "--url", f"unix://{path}", folder=folder) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if "appends" in line and " 0 appends" not in line:
                    break
            server.kill()
            out, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert err.startswith("orcs-redis: ")
    assert len(err.splitlines()) == 1
    assert "verdict" not in out
    assert "may be left there" in out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_leaves_nothing(number: int, code: int, folder: Path) -> None:
    """Ctrl-C, which the whole process group gets, ends the demo and its workers, and the folder is gone."""
    with start("--seconds", "60", folder=folder) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "appends" in line and " 0 appends" not in line:
                break
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err == ""
    assert list(folder.iterdir()) == []
    until = time.monotonic() + 10  # multiprocessing's own helper takes a moment to see that it is alone
    while alive(process.pid):
        assert time.monotonic() < until
        time.sleep(0.05)
