"""The demo: that it ends well, that it can end badly, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from orcs_redis import ConversationTurn, SessionAsset
from orcs_redis.cli.verdict import KINDS, Entry, Final, Rates, Seen, Verdict, judge, rates
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


def session(*turns: str, counter: int = 0, name: str | None = None, phase: str = "", note: str = "") -> SessionAsset:
    """Return a session "s" with these turns and parts."""
    asset = SessionAsset(id="s", created_at_ms=1, updated_at_ms=2)
    asset.history.turns = [ConversationTurn(id=id, role="user", content="", timestamp_ms=3) for id in turns]
    asset.project_context.name = name
    asset.metadata |= {"demo_counter": counter}
    asset.metadata |= {"labels": {"phase": phase}} if phase else {}
    asset.metadata |= {"demo_note": note} if note else {}
    return asset


def good(*more: str, counter: int = 2, phase: str = "test") -> SessionAsset:
    """Return a session that is as the log says, with more turns."""
    return session("x", "b", "c", *more, counter=counter, name="second", phase=phase, note="n")


FIRST = {"s": session("x", "y")}

LOG = [
    Entry("0-0-1", "append", "tried", "s", ("a", "b")),
    Entry("0-0-1", "append", "done", "s", ("a", "b"), revision=5),
    Entry("0-1-1", "count", "tried", "s", increments=1),
    Entry("0-1-1", "count", "done", "s", increments=1, revision=6),
    Entry("1-0-1", "append", "tried", "s", ("c",)),
    Entry("1-0-1", "append", "done", "s", ("c",), revision=7),
    Entry("1-0-2", "append", "tried", "s", ("refused",)),
    Entry("1-0-2", "append", "refused", "s", ("refused",)),
    Entry("1-0-3", "append", "tried", "s", ("unknown",)),
    Entry("0-2-1", "pop", "tried", "s", pops=2),
    Entry("0-2-1", "pop", "done", "s", ("a", "y"), pops=2),
    Entry("0-3-1", "rename", "done", "s", values={"name": "second"}, revision=9),
    Entry("0-3-2", "rename", "done", "s", values={"name": "first"}, revision=8),
    Entry("0-4-1", "label", "done", "s", values={"label phase": "test"}, revision=10),
    Entry("0-4-2", "label", "tried", "s", values={"label phase": "done"}),
    Entry("0-4-3", "label", "refused", "s", values={"label phase": "plan"}),
    Entry("0-5-1", "note", "done", "s", values={"note": "n"}, revision=11),
    Entry("0-6-1", "count", "done", "s", increments=1, revision=12),
    Entry("0-6-2", "count", "tried", "s", increments=1),
    Entry("0-7-1", "refresh", "tried", "s"),
    Entry("0-7-1", "refresh", "done", "s", revision=12, state="same", loaded="same"),
]


def seen(*revisions: int) -> Seen:
    """Return what a watcher has seen that was told of these revisions of the session."""
    found = Seen()
    for revision in revisions:
        found.add("s", revision)
    return found


def verdict_of(
    *stored: SessionAsset, log: Sequence[Entry] = LOG, revisions: Sequence[int] = (5, 12), listed_wrong: int = 0
) -> Verdict:
    """Return the verdict on what is stored in the end."""
    there = {asset.id: asset for asset in stored}
    return judge(log, FIRST, seen(*revisions), Final(there, {"s": 12}, there, listed_wrong))


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(good(), id="the unknown not applied"),
        pytest.param(good("unknown", counter=3, phase="done"), id="the unknown applied"),
    ],
)
def test_a_good_store_passes(stored: SessionAsset) -> None:
    """All that was acknowledged is there once, or was popped; what is unknown may be."""
    verdict = verdict_of(stored)
    assert verdict.ok
    assert (verdict.acknowledged, verdict.found, verdict.refused, verdict.unknown) == (3, 3, 1, 1)
    assert (verdict.popped, verdict.counts_acknowledged, verdict.parts_acknowledged) == (2, 2, 4)
    assert (verdict.refreshes, verdict.refreshes_compared) == (1, 1)


def test_a_pop_of_unknown_outcome_may_have_been_one() -> None:
    """As many turns may be missing as such pops would have removed, and no more."""
    log = [*LOG, Entry("1-1-1", "pop", "tried", "s", pops=1)]
    fields = {"counter": 2, "name": "second", "phase": "test", "note": "n"}
    assert verdict_of(session("x", "b", **fields), log=log).ok  # type: ignore[arg-type]
    assert verdict_of(session("x", **fields), log=log).lost == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "stored"),
    [
        pytest.param("lost", (session("x", "b", counter=2),), id="a lost turn"),
        pytest.param("lost", (session("b", "c", counter=2),), id="a lost turn that was there before"),
        pytest.param("lost", (), id="a lost session"),
        pytest.param("doubled", (good("b"),), id="a doubled turn"),
        pytest.param("doubled", (good("unknown", "unknown"),), id="an unknown turn doubled"),
        pytest.param("refused_found", (good("refused"),), id="a refused turn"),
        pytest.param("unexpected", (good("nobody's"),), id="a turn that nobody has appended"),
        pytest.param("popped_found", (good("a"),), id="a popped turn"),
        pytest.param("misordered", (session("x", "c", "b", counter=2),), id="turns out of order"),
        pytest.param("counts_lost", (good(counter=1),), id="a lost increment"),
        pytest.param("counts_doubled", (good(counter=4),), id="a doubled increment"),
        pytest.param("parts_wrong", (session("x", "b", "c", name="first", phase="test", note="n"),), id="an old name"),
        pytest.param("parts_wrong", (session("x", "b", "c", name="second", phase="test"),), id="a lost note"),
        pytest.param("parts_wrong", (good(phase="plan"),), id="a refused label"),
    ],
)
def test_a_bad_store_fails(field: str, stored: tuple[SessionAsset, ...]) -> None:
    """Each way in which a store may break its word is counted, and makes the verdict bad."""
    verdict = verdict_of(*stored)
    assert not verdict.ok
    assert getattr(verdict, field) > 0


@pytest.mark.parametrize(
    ("field", "entry"),
    [
        pytest.param("popped_again", Entry("1-1-1", "pop", "done", "s", ("a",), 1), id="popped twice"),
        pytest.param(
            "refreshes_wrong",
            Entry("1-1-1", "refresh", "done", "s", revision=12, state="one", loaded="other"),
            id="a refresh that is no load",
        ),
        pytest.param(
            "refreshes_wrong",
            Entry("0-7-1", "refresh", "done", "s", revision=11, state="same", loaded="same"),
            id="a refresh that is older than what was known",
        ),
    ],
)
def test_a_bad_answer_fails(field: str, entry: Entry) -> None:
    """What a worker was given is judged, too."""
    assert verdict_of(good()).ok
    verdict = verdict_of(good(), log=[*LOG, entry])
    assert not verdict.ok
    assert getattr(verdict, field) == 1


def test_what_was_kept_must_be_what_is_stored() -> None:
    """An asset that was refreshed in the end and differs from a load makes the verdict bad, and so does a list."""
    final = Final({"s": good()}, {"s": 12}, {"s": good("older")})
    assert judge(LOG, FIRST, seen(5, 12), final).refreshes_wrong == 1
    assert not verdict_of(good(), listed_wrong=1).ok


@pytest.mark.parametrize("kind", ["append", "pop", "note", "count", "refresh"])
def test_nothing_done_proves_nothing(kind: str) -> None:
    """A verdict over logs without one of the kinds is not good."""
    log = [entry for entry in LOG if entry.kind != kind]
    assert not verdict_of(session(), log=log).ok
    assert not verdict_of(session(), log=[]).ok


@pytest.mark.parametrize(
    ("missed", "again", "revisions"),
    [
        pytest.param(1, 0, (5, 6), id="the final revision was missed"),
        pytest.param(0, 1, (5, 12, 12), id="a change twice"),
        pytest.param(1, 1, (12, 5), id="an older change after a newer one"),
        pytest.param(1, 0, (), id="nothing seen"),
    ],
)
def test_a_bad_watch_fails(missed: int, again: int, revisions: tuple[int, ...]) -> None:
    """A watcher that was not told of the end, or was told something twice, makes the verdict bad."""
    verdict = verdict_of(good(), revisions=revisions)
    assert not verdict.ok
    assert (verdict.sessions_missed, verdict.changes_again) == (missed, again)


def test_rates() -> None:
    """They are of the first and the last second in which all workers worked; without such a second there are none."""
    early = [Entry(f"0-0-{n}", "note", "done", "s", at=100 + n / 10) for n in range(31)]  # until 103.0
    late = [Entry(f"1-0-{n}", "note", "done", "s", at=101 + n / 5) for n in range(16)]  # until 104.0
    tried = [Entry("1-0-99", "note", "tried", "s", at=102.9)]
    assert rates(early + late + tried) == Rates(first=15, last=15, ratio=1.0)
    assert rates(early + late[:4]) is None
    assert rates([]) is None


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
    assert all(sum(worker.get(f"{kind} done", 0) for worker in document["workers"]) > 0 for kind in KINDS)
    assert document["rates"]["ratio"] > 0
    verdict = Verdict(**document["verdict"])
    assert verdict.ok
    assert verdict.changes > verdict.sessions_final > 9
    assert "changes watched" in err
    assert "operations in the first second" in err
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
