"""The commands of a folder with a shared store, as a user meets them: sync, status, resolve, kept."""

from __future__ import annotations

import json
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from orcs_redis import ConversationTurn, SessionAsset, StoreResetError, SyncReport
from orcs_redis.sync import HybridSessionStore, LocalFileStore, RedisSessionStore, open_store
from orcs_redis.transport import embedded

from .command_line import Run, in_a_terminal
from .conftest import Server

EVIL = "\x1b[31mred\x1b]0;title\x07 [bold]markup[/bold] \x9b2J \u202ereversed"


@dataclass
class Fleet:
    """A shared store, a folder of three sessions, and what a user would do with both."""

    run: Run
    where: tuple[str, ...]
    folder: Path

    @property
    def files(self) -> LocalFileStore[SessionAsset]:
        """The folder, as orcs has it."""
        return LocalFileStore(self.folder)

    def peer(self) -> RedisSessionStore[SessionAsset]:
        """Another's store."""
        return RedisSessionStore.connect(self.where[1], namespace=self.where[3])

    def sync(self, *arguments: str | Path, folder: Path | None = None, code: int = 0) -> dict[str, Any]:
        """Make a round, and return its report."""
        outcome = self.run("sync", folder or self.folder, *arguments, *self.where, "--json")
        assert outcome.code == code, outcome.err
        assert isinstance(outcome.json, dict)
        return outcome.json

    def status(self, *arguments: str) -> dict[str, Any]:
        """Return how things stand."""
        outcome = self.run("status", self.folder, *arguments, *self.where, "--json")
        assert (outcome.code, outcome.err) == (0, "")
        assert isinstance(outcome.json, dict)
        return outcome.json

    def titles(self, here: str, there: str) -> None:
        """Give s1 a title on each side."""
        asset = self.files.load("s1")
        asset.metadata["title"] = here
        self.files.save(asset)
        with self.peer() as peer:
            asset = peer.load("s1")
            asset.metadata["title"] = there
            peer.save(asset)

    def conflict(self) -> None:
        """Bring s1 into conflict; the others are the same on both sides."""
        self.sync()
        self.titles("ours", "theirs")
        assert self.sync(code=4)["conflicts"] == ["s1"]


@pytest.fixture
def where(embedded_server: embedded.Attachment) -> tuple[str, ...]:
    """Options for a namespace that no other test has."""
    return ("--url", f"embedded://{embedded_server.folder}", "--namespace", f"cli-{secrets.token_hex(4)}")


@pytest.fixture
def fleet(run: Run, where: tuple[str, ...], tmp_path: Path) -> Fleet:
    fill(tmp_path / "here", 3)
    return Fleet(run, where, tmp_path / "here")


def fill(folder: Path, count: int) -> None:
    """Write so many sessions."""
    files = LocalFileStore(folder)
    for number in range(count):
        asset = SessionAsset(id=f"s{number}", created_at_ms=1, updated_at_ms=number)
        asset.project_context.name = f"project {number}"
        asset.history.turns = [ConversationTurn.user(f"turn {turn}.") for turn in range(3)]
        files.save(asset)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.json")}


NOTHING: dict[str, list[str]] = {
    "uploaded": [], "downloaded": [], "merged": [], "deleted": [], "revived": [],
    "conflicts": [], "failed": [], "kept": [],
}  # fmt: skip


def test_two_folders_come_to_the_same_state(fleet: Fleet, tmp_path: Path) -> None:
    """The first round uploads, that of a new folder downloads, the next ones find nothing to do."""
    before = contents(fleet.folder)
    first = fleet.run("sync", fleet.folder, *fleet.where)
    assert (first.code, first.err) == (0, "")
    *rows, line = first.out.splitlines()
    assert [row.split() for row in rows] == [["session", "done"], *([f"s{n}", "uploaded"] for n in range(3))]
    assert line == "3 uploaded"
    assert fleet.sync(folder=tmp_path / "there") == NOTHING | {"downloaded": ["s0", "s1", "s2"]}
    assert contents(tmp_path / "there") == contents(fleet.folder) == before
    again = fleet.run("sync", fleet.folder, *fleet.where)
    assert (again.code, again.out, again.err) == (0, "nothing to do\n", "")
    assert fleet.sync("--verify") == NOTHING


def test_a_dry_run_writes_nothing(fleet: Fleet) -> None:
    """It says what a round would do, and the next one says the same."""
    expected = NOTHING | {"uploaded": ["s0", "s1", "s2"]}
    assert fleet.sync("--dry-run") == expected
    assert fleet.run("sync", fleet.folder, "--dry-run", *fleet.where).out.endswith("\ndry run: 3 uploaded\n")
    with fleet.peer() as peer:
        assert peer.list() == []
    assert fleet.sync() == expected


def test_many_of_a_kind_are_counted(run: Run, where: tuple[str, ...], tmp_path: Path) -> None:
    """A table has the first 20 of a kind, and how many more there are; JSON has all."""
    fill(tmp_path, 25)
    outcome = run("sync", tmp_path, "--dry-run", *where)
    lines = outcome.out.splitlines()
    assert len(lines) == 1 + 20 + 1 + 1
    assert lines[-2].split() == ["...", "5", "more", "uploaded"]
    assert lines[-1] == "dry run: 25 uploaded"
    document = run("sync", tmp_path, *where, "--json").json
    assert isinstance(document, dict)
    assert len(document["uploaded"]) == 25


def test_status_says_what_differs(fleet: Fleet) -> None:
    """States are those that are known here; --fresh looks at the shared store, and changes nothing."""
    lines = fleet.run("status", fleet.folder, *fleet.where).out.splitlines()
    assert lines[0].split() == ["session", "name", "state"]
    assert sorted(line.split()[0] for line in lines[1:4]) == ["s0", "s1", "s2"]
    assert all(line.endswith("LocalOnly") for line in lines[1:4])
    assert lines[4] == "0 synced, 3 to upload"
    fleet.sync()
    synced = fleet.run("status", fleet.folder, *fleet.where).out
    assert re.fullmatch(r"3 synced; last synced \d+ s ago\n", synced)
    asset = fleet.files.load("s0")
    asset.add_turn(ConversationTurn.user("here"))
    fleet.files.save(asset)
    with fleet.peer() as peer:
        peer.append("s1", ConversationTurn.user("there"))
    found = fleet.status()
    assert [(each["id"], each["state"]) for each in found["sessions"]] == [("s0", "LocalAhead")]
    assert (found["synced"], found["pending_uploads"], found["pending_downloads"]) == (2, 1, 0)
    before = contents(fleet.folder)
    fresh = fleet.status("--fresh")
    assert {each["id"]: each["state"] for each in fresh["sessions"]} == {"s0": "LocalAhead", "s1": "RemoteAhead"}
    assert (fresh["pending_uploads"], fresh["pending_downloads"], fresh["conflicts"]) == (1, 1, [])
    assert contents(fleet.folder) == before
    assert fleet.sync() == NOTHING | {"uploaded": ["s0"], "downloaded": ["s1"]}


def test_a_deletion_counts_as_an_upload(fleet: Fleet) -> None:
    """A session that is deleted here is not listed, but counted, until the next round deletes it there."""
    fleet.sync()
    (fleet.folder / "s2.json").unlink()
    found = fleet.status()
    assert (found["synced"], found["pending_uploads"], found["sessions"]) == (2, 1, [])
    report = fleet.sync()
    (kept,) = report.pop("kept")
    assert "/kept/s2/" in kept
    assert report == {name: ids for name, ids in (NOTHING | {"deleted": ["s2"]}).items() if name != "kept"}
    with fleet.peer() as peer:
        assert not peer.exists("s2")


def test_without_a_server(fleet: Fleet) -> None:
    """A round fails in one line, without the password; status and kept work."""
    where = ("--url", "redis://user:hidden@127.0.0.1:1")
    for command in ("sync", "status"):
        outcome = fleet.run(command, fleet.folder, *where, *(["--fresh"] if command == "status" else []))
        assert (outcome.code, outcome.out) == (1, "")
        assert len(outcome.err.splitlines()) == 1
        assert "127.0.0.1:1" in outcome.err
        assert "hidden" not in outcome.err
    assert fleet.run("status", fleet.folder, *where).out.endswith("\n0 synced, 3 to upload\n")
    kept = fleet.run("kept", fleet.folder, *where)
    assert (kept.code, kept.err) == (0, "orcs-redis: no copies are kept\n")


def test_a_conflict_is_shown(fleet: Fleet) -> None:
    """What both changed differently has the exit code 4, and table and status say which part it is."""
    fleet.conflict()
    outcome = fleet.run("sync", fleet.folder, *fleet.where)
    assert outcome.code == 4
    assert outcome.out.splitlines()[1].split() == ["s1", "conflict", "metadata.title"]
    assert outcome.out.splitlines()[-1] == "1 in conflict"
    lines = fleet.run("status", fleet.folder, *fleet.where).out.splitlines()
    assert lines[1].split() == ["s1", "project", "1", "Conflict", "metadata.title"]
    assert lines[2].startswith("2 synced, 1 in conflict; last synced ")
    found = fleet.status()
    assert found["conflicts"] == ["s1"]
    assert [(each["state"], each["why"]) for each in found["sessions"]] == [("Conflict", "metadata.title")]


@pytest.mark.parametrize(("keep", "title"), [("local", "ours"), ("remote", "theirs"), ("FILE", "both")])
def test_a_conflict_is_resolved(fleet: Fleet, tmp_path: Path, keep: str, title: str) -> None:
    """The chosen version holds on both sides, and both are kept."""
    fleet.conflict()
    asset = fleet.files.load("s1")
    asset.metadata["title"] = "both"
    chosen = tmp_path / "chosen.json"
    chosen.write_text(asset.to_json())
    outcome = fleet.run("resolve", fleet.folder, "s1", "--keep", keep.replace("FILE", str(chosen)), *fleet.where)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("resolved s1: ")
    assert fleet.files.load("s1").metadata["title"] == title
    with fleet.peer() as peer:
        assert peer.load("s1").metadata["title"] == title
    copies = fleet.run("kept", fleet.folder, "s1", *fleet.where, "--json").json
    assert isinstance(copies, list)
    kept = {copy["side"]: SessionAsset.from_json(Path(copy["path"]).read_bytes()) for copy in copies}
    assert {side: asset.metadata["title"] for side, asset in kept.items()} == {"here": "ours", "there": "theirs"}
    assert fleet.sync() == NOTHING


@pytest.mark.parametrize(("side", "title"), [("local", "ours"), ("remote", "theirs")])
def test_a_preferred_side(fleet: Fleet, side: str, title: str) -> None:
    """With --prefer there is no conflict, and what loses is kept."""
    fleet.sync()
    fleet.titles("ours", "theirs")
    report = fleet.sync("--prefer", side)
    assert report["conflicts"] == []
    assert len(report["kept"]) == 1
    assert fleet.files.load("s1").metadata["title"] == title


def test_a_copy_is_restored(fleet: Fleet) -> None:
    """It is the session here, what it replaces is kept in turn, and the next round uploads it."""
    fleet.conflict()
    fleet.run("resolve", fleet.folder, "s1", "--keep", "local", *fleet.where)

    def copies() -> dict[str, str]:
        found = fleet.run("kept", fleet.folder, *fleet.where, "--json").json
        assert isinstance(found, list)
        return {
            copy["copy"]: SessionAsset.from_json(Path(copy["path"]).read_bytes()).metadata["title"] for copy in found
        }

    before = copies()
    (name,) = [name for name, title in before.items() if title == "theirs"]
    shown = fleet.run("kept", fleet.folder, *fleet.where).out.splitlines()
    assert len(shown) == 1 + len(before)
    assert any(line.startswith("s1 ") and name in line for line in shown)
    lines = fleet.run("kept", fleet.folder, "s1", *fleet.where).out.splitlines()
    assert lines[0].split() == ["copy", "why"]
    assert any(line.startswith(f"{name} ") for line in lines)
    assert fleet.run("kept", fleet.folder, "s2", *fleet.where).out == ""
    outcome = fleet.run("kept", fleet.folder, "s1", "--restore", name, *fleet.where)
    assert (outcome.code, outcome.out) == (0, "restored s1\n")
    assert fleet.files.load("s1").metadata["title"] == "theirs"
    assert "ours" in copies().values()
    assert fleet.sync()["uploaded"] == ["s1"]
    with fleet.peer() as peer:
        assert peer.load("s1").metadata["title"] == "theirs"
    absent = fleet.run("kept", fleet.folder, "--restore", "nope", *fleet.where)
    assert (absent.code, absent.err) == (3, "orcs-redis: there is no copy nope\n")


def test_a_deleted_session_is_restored(fleet: Fleet) -> None:
    """What was deleted there is deleted here, and comes back by its copy."""
    fleet.sync()
    with fleet.peer() as peer:
        peer.delete("s1")
    report = fleet.sync()
    assert (report["deleted"], len(report["kept"])) == (["s1"], 1)
    assert fleet.run("kept", fleet.folder, "--restore", Path(report["kept"][0]).name, *fleet.where).code == 0
    assert fleet.sync()["uploaded"] == ["s1"]
    with fleet.peer() as peer:
        assert len(peer.load("s1").history) == 3


def test_a_wiped_server_is_adopted(run: Run, start_server: Callable[..., Server], tmp_path: Path) -> None:
    """A round does nothing and says how to go on; --adopt brings everything there again."""
    fill(tmp_path, 3)
    server = start_server()
    fleet = Fleet(run, ("--url", server.url, "--namespace", "orcs"), tmp_path)
    fleet.sync()
    server.raw().flushall()
    before = contents(tmp_path)
    stopped = run("sync", tmp_path, *fleet.where)
    assert (stopped.code, stopped.out) == (1, "")
    assert len(stopped.err.splitlines()) == 1
    assert "--adopt" in stopped.err
    with fleet.peer() as peer:
        assert peer.list() == []
    assert fleet.sync("--adopt") == NOTHING | {"uploaded": ["s0", "s1", "s2"]}
    assert contents(tmp_path) == before
    assert fleet.sync() == NOTHING


def test_who_is_live_follows_an_adoption(run: Run, start_server: Callable[..., Server], tmp_path: Path) -> None:
    """What one process of a folder has adopted, the others take without being asked."""
    fill(tmp_path, 3)
    server = start_server()
    fleet = Fleet(run, ("--url", server.url, "--namespace", "orcs"), tmp_path)
    reports = SimpleQueue[SyncReport]()
    with HybridSessionStore(tmp_path, server.url, on_sync=reports.put, heartbeat=0.5) as live:
        assert reports.get(timeout=20).uploaded == ["s0", "s1", "s2"]
        server.raw().flushall()
        with pytest.raises(StoreResetError):
            live.sync()
        assert fleet.sync("--adopt")["uploaded"] == ["s0", "s1", "s2"]
        assert live.sync().failed == []
        with fleet.peer() as peer:
            peer.append("s1", ConversationTurn.user("there"))
            while reports.get(timeout=40).downloaded != ["s1"]:
                pass
        assert len(live.load("s1").history) == 4


def test_deletions_in_bulk_stop(run: Run, where: tuple[str, ...], tmp_path: Path) -> None:
    """Where most files are gone all else is done, and a line says how many it are; --deletions goes on."""
    fill(tmp_path, 40)
    fleet = Fleet(run, where, tmp_path)
    fleet.sync()
    for number in range(30):
        (tmp_path / f"s{number}.json").unlink()
    asset = fleet.files.load("s39")
    asset.add_turn(ConversationTurn.user("new"))
    fleet.files.save(asset)
    stopped = run("sync", tmp_path, *where)
    assert stopped.code == 1
    assert len(stopped.err.splitlines()) == 1
    assert "30" in stopped.err
    assert "--deletions" in stopped.err
    with fleet.peer() as peer:
        assert peer.count() == 40
        assert len(peer.load("s39").history) == 4
    assert len(fleet.sync("--deletions")["deleted"]) == 30
    with fleet.peer() as peer:
        assert peer.count() == 10


def test_deletions_in_bulk_stop_live(run: Run, where: tuple[str, ...], tmp_path: Path) -> None:
    """Where most files vanish under a live store it ends, says how many they are, and deletes none of them there."""
    fill(tmp_path, 40)
    fleet = Fleet(run, where, tmp_path)
    with Live(tmp_path, *where, "--json") as live, fleet.peer() as peer:
        for _ in range(40):
            live.document()
        vanished = tmp_path / "vanished"
        vanished.mkdir()
        live.process.send_signal(signal.SIGSTOP)  # it is to find all of them gone, not one after the other
        for number in range(30):
            (tmp_path / f"s{number}.json").rename(vanished / f"s{number}.json")
        live.process.send_signal(signal.SIGCONT)
        errors = live.error() + live.error()
        assert "--deletions" in errors
        assert "30 sessions" in errors
        assert live.process.wait(30) == 1
        assert peer.count() == 40


def test_an_unreadable_file_is_a_conflict(fleet: Fleet) -> None:
    """It is named, left alone, and the others go on."""
    (fleet.folder / "s1.json").write_text("{")
    outcome = fleet.run("sync", fleet.folder, *fleet.where)
    assert outcome.code == 4
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("s1")]
    assert "can't be read" in line
    assert outcome.out.splitlines()[-1] == "2 uploaded, 1 in conflict"
    assert (fleet.folder / "s1.json").read_text() == "{"


def test_what_fails_is_named(run: Run, start_server: Callable[..., Server], tmp_path: Path) -> None:
    """A round that some sessions fail in has the exit code 1, and a line for each of them."""
    fill(tmp_path / "here", 3)
    server = start_server()
    where = ("--url", server.url)
    fleet = Fleet(run, (*where, "--namespace", "orcs"), tmp_path / "here")
    fleet.sync()
    raw: Any = server.raw()
    raw.execute_command(
        "ACL", "SETUSER", "reader", "on", ">secret", "~*", "&*", "+@all", "-@write", "+evalsha", "+eval"
    )
    asset = fleet.files.load("s1")
    asset.add_turn(ConversationTurn.user("new"))
    fleet.files.save(asset)
    outcome = run("sync", fleet.folder, "--url", f"redis://reader:secret@127.0.0.1:{server.port}/0", "--json")
    assert outcome.code == 1
    assert isinstance(outcome.json, dict)
    assert [each["id"] for each in outcome.json["failed"]] == ["s1"]
    assert len(outcome.err.splitlines()) == 1
    assert "s1" in outcome.err
    assert "secret" not in outcome.err
    with Live(fleet.folder, "--url", f"redis://reader:secret@127.0.0.1:{server.port}/0", "--json") as live:
        found = live.document()
        assert (found["kind"], found["id"]) == ("failed", "s1")
        assert found["why"]
        with fleet.peer() as peer:
            peer.append("s0", ConversationTurn.user("there"))
        assert live.document()["id"] == "s0"  # s1 was not told again
        assert "secret" not in live.end(signal.SIGINT)
    assert fleet.sync()["uploaded"] == ["s1"]


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        pytest.param(2, "exclude each other", ("sync", "{here}", "--live", "--dry-run"), id="live dry run"),
        pytest.param(2, "'local', 'remote'", ("sync", "{here}", "--prefer", "mine"), id="bad side"),
        pytest.param(2, "is a file", ("sync", "{here}/s1.json"), id="a file"),
        pytest.param(2, "does not exist", ("status", "{here}/nope"), id="status of none"),
        pytest.param(2, "does not exist", ("kept", "{here}/nope"), id="copies of none"),
        pytest.param(2, "no folder of files", ("sync", "{here}", "--url", "file:///tmp/x"), id="no server"),
        pytest.param(2, "unknown scheme", ("status", "{here}", "--url", "http://user:hidden@host"), id="bad URL"),
        pytest.param(2, "namespace", ("sync", "{here}", "--namespace", "{{x}}"), id="bad namespace"),
        pytest.param(2, "local, or remote?", ("resolve", "{here}", "s1", "--keep", "mine"), id="no such file"),
        pytest.param(2, "session s2, not s1", ("resolve", "{here}", "s1", "--keep", "{here}/s2.json"), id="another's"),
        pytest.param(1, "can't be decoded", ("resolve", "{here}", "s1", "--keep", "{here}/../bad"), id="no session"),
        pytest.param(
            3, "session not found: nope", ("resolve", "{here}", "nope", "--keep", "local"), id="no session here"
        ),
        pytest.param(2, "a session id has", ("resolve", "{here}", "a/b", "--keep", "local"), id="bad id"),
        pytest.param(2, "a session id has", ("kept", "{here}", "a/b"), id="copies of a bad id"),
        pytest.param(2, "Missing option", ("resolve", "{here}", "s1"), id="no side"),
    ],
)
def test_errors_are_one_line(fleet: Fleet, code: int, message: str, arguments: Sequence[str]) -> None:
    """Whatever goes wrong is said in one line on standard error, and has an exit code."""
    (fleet.folder / "../bad").write_text("no session")
    filled = [argument.format(here=fleet.folder) for argument in arguments]
    outcome = fleet.run(*(() if "--url" in filled else fleet.where), *filled)
    assert outcome.code == code
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert outcome.out == ""
    assert "hidden" not in outcome.err


def test_in_a_terminal(where: tuple[str, ...], tmp_path: Path) -> None:
    """A round has a bar and a table; ids are whole, no line is longer than 80, and nothing acts on the terminal."""
    asset = SessionAsset.for_project("/p")
    asset.project_context.name = EVIL + "a long name " * 10
    asset.metadata["a" * 60 + EVIL] = 1
    files = LocalFileStore[SessionAsset](tmp_path)
    files.save(asset)
    (tmp_path / f"{EVIL[-8:]}.json").write_text("{")
    plain = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

    def shown(*arguments: str, code: int = 0) -> str:
        got = in_a_terminal(*arguments, *where, code=code)
        for sequence in ("\x1b]", "\x07", "\x9b", "\u202e"):
            assert sequence not in got
        lines = plain.sub("", got).splitlines()
        assert all(len(line.rstrip()) <= 80 for line in lines), lines
        return "\n".join(lines)

    first = shown("sync", str(tmp_path), code=4)
    assert "syncing" in first
    assert re.search(rf"^{asset.id} +uploaded", first, re.MULTILINE)
    asset.metadata = {"title": "ours"}
    files.save(asset)
    with open_store(where[1], namespace=where[3]) as peer:
        other = peer.load(asset.id)
        other.metadata = {"title": "theirs"}
        peer.save(other)
    shown("sync", str(tmp_path), code=4)
    assert re.search(rf"^{asset.id} .*Conflict +metadata.", shown("status", str(tmp_path)), re.MULTILINE)
    shown("resolve", str(tmp_path), asset.id, "--keep", "local")
    assert re.search(rf"^{asset.id} .*-there-", shown("kept", str(tmp_path)), re.MULTILINE)


class Live:
    """`orcs-redis sync --live` in a process of its own."""

    def __init__(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "orcs_redis.cli", "sync", "--live", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def line(self) -> str:
        """Return a line of standard output, which comes though the process goes on."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def document(self) -> dict[str, str]:
        """Return a line of --json."""
        return dict[str, str](json.loads(self.line()))

    def error(self) -> str:
        """Return a line of standard error."""
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def end(self, number: signal.Signals) -> str:
        """Send a signal, and return what was said on standard error."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        assert out == ""
        return err

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_live_prints_what_it_does(fleet: Fleet) -> None:
    """A line for each thing done, on either side, until Ctrl-C; with --json a document a line."""
    with Live(fleet.folder, *fleet.where, "--json") as live, fleet.peer() as peer:
        began = [live.document() for _ in range(3)]
        assert [(each["kind"], each["id"]) for each in began] == [("uploaded", f"s{n}") for n in range(3)]
        assert datetime.fromisoformat(began[0]["at"]).tzinfo is not None
        peer.append("s1", ConversationTurn.user("there"))
        assert live.document()["kind"] == "downloaded"
        asset = fleet.files.load("s0")
        asset.add_turn(ConversationTurn.user("here"))
        fleet.files.save(asset)
        found = live.document()
        assert (found["kind"], found["id"]) == ("uploaded", "s0")
        assert len(peer.load("s0").history) == 4
        peer.delete("s2")
        assert sorted(live.document()["kind"] for _ in range(2)) == ["deleted", "kept"]
        assert not (fleet.folder / "s2.json").exists()
        assert live.end(signal.SIGINT) == ""
        assert live.process.returncode == 130


def test_live_in_words(fleet: Fleet) -> None:
    """Without --json a line has the time, what was done, and the id; SIGTERM ends it as well."""
    with Live(fleet.folder, *fleet.where) as live:
        lines = [live.line() for _ in range(3)]
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d uploaded   s\d\n", line) for line in lines)
        assert live.end(signal.SIGTERM) == ""
        assert live.process.returncode == 143


def test_live_says_a_conflict_once(fleet: Fleet) -> None:
    """It goes on with the others, and the conflict is told again only after something was done about it."""
    fleet.conflict()
    with Live(fleet.folder, *fleet.where, "--json") as live, fleet.peer() as peer:
        assert live.document()["kind"] == "conflict"
        peer.append("s1", ConversationTurn.user("in conflict"))
        peer.append("s0", ConversationTurn.user("there"))
        assert (live.document())["id"] == "s0"
        live.end(signal.SIGINT)


def test_live_waits_for_the_server(run: Run, start_server: Callable[..., Server], tmp_path: Path) -> None:
    """A server that can't be reached is waited for, with a line; what is wrong for good ends it, with another."""
    fill(tmp_path, 3)
    server = start_server()
    server.kill()
    with Live(tmp_path, "--url", server.url, "--json") as live:
        assert live.error() == "orcs-redis: the server can't be reached: waiting for it\n"
        server.start()
        assert {live.document()["id"] for _ in range(3)} == {"s0", "s1", "s2"}
        assert live.error() == "orcs-redis: the server is reached\n"
        server.raw().flushall()
        assert "--adopt" in live.error()
        assert live.process.wait(30) == 1
