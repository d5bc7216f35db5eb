"""The command line, as a user meets it: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from orcs_redis import ConversationTurn, SessionAsset
from orcs_redis.cli import main
from orcs_redis.sync import LocalFileStore, open_store

EVIL = "\x1b[31mred\x1b]0;title\x07 [bold]markup[/bold] \x9b2J \u202ereversed"


class Outcome:
    """How a run of the command line went."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> object:
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command line and checks what holds for every run."""

    def run(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as info:
            main([str(argument) for argument in arguments])
        outcome = Outcome(int(info.value.code or 0), *capfd.readouterr())
        assert "Traceback" not in outcome.err
        assert all(line.startswith("orcs-redis: ") for line in outcome.err.splitlines())
        return outcome

    return run


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that stays for the whole module."""
    url = f"embedded://{tmp_path_factory.mktemp('server')}"
    with open_store(url):
        yield url


@pytest.fixture(params=["embedded", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store."""
    if request.param == "file":
        return f"file://{tmp_path / 'store'}"
    url = str(request.getfixturevalue("embedded"))
    with open_store(url) as store:
        store.delete_many([meta.id for meta in store.list()])
    return url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three sessions, the newest called s2."""
    folder = tmp_path / "sessions"
    files = LocalFileStore(folder)
    for number in range(3):
        asset = SessionAsset.for_project("/repos/even" if number % 2 == 0 else "/repos/odd")
        asset.id = f"s{number}"
        asset.project_context.name = f"project {number}"
        asset.history.turns = [ConversationTurn.user(f"turn {turn}.") for turn in range(30)]
        asset.created_at_ms = asset.updated_at_ms = 1_700_000_000_000 + number
        files.save(asset)
    return folder


def test_files_come_back_byte_for_byte(run: Run, url: str, folder: Path, tmp_path: Path) -> None:
    """What is imported and exported again is the same files."""
    imported = run("import", folder, "--url", url)
    assert (imported.code, imported.out) == (0, "3 imported, 0 skipped, 0 failed\n")
    exported = run("export", tmp_path / "out", "--url", url, "--json")
    assert (exported.code, exported.json) == (0, {"exported": 3, "failed": []})
    for number in range(3):
        name = f"s{number}.json"
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_a_namespace_that_is_not_there(run: Run, embedded: str, folder: Path, tmp_path: Path) -> None:
    """Commands that look into it say so on stderr, and end as for an empty store; one that writes says nothing."""
    where = ("--url", embedded, "--namespace", "mistyped")
    warning = f"orcs-redis: no namespace 'mistyped' on {embedded.replace('://', ' ')}: nothing has been written to it\n"
    listed = run("ls", *where, "--json")
    assert (listed.code, listed.out, listed.err) == (0, "[]\n", warning)
    exported = run("export", tmp_path / "out", *where)
    assert (exported.code, exported.out, exported.err) == (0, "0 exported, 0 failed\n", warning)
    shown = run("show", "s1", *where)
    assert (shown.code, shown.err.startswith(warning)) == (3, True)
    assert run("rm", "s1", *where).err.startswith(warning)
    assert run("ping", *where).err == ""
    assert run("ls", *where).err == warning
    imported = run("import", folder, *where)
    assert (imported.code, imported.err) == (0, "")
    assert run("ls", *where).err == ""


def test_if_absent_overwrites_nothing(run: Run, url: str, folder: Path) -> None:
    """With --if-absent a session that the store has is skipped, without it is overwritten."""
    mine = SessionAsset.new()
    mine.id = "s1"
    mine.add_turn(ConversationTurn.user("mine"))
    with open_store(url) as store:
        store.save(mine)
    assert run("import", folder, "--url", url, "--if-absent", "--json").json == {
        "imported": 2,
        "skipped": 1,
        "failed": [],
    }
    with open_store(url) as store:
        assert len(store.load("s1").history) == 1
    assert run("import", folder, "--url", url).code == 0
    with open_store(url) as store:
        assert len(store.load("s1").history) == 30


def test_a_bad_file_is_reported_and_the_others_are_imported(run: Run, url: str, folder: Path) -> None:
    """A file that is no session makes the exit code 1 and stops nothing."""
    (folder / "broken.json").write_text("{")
    (folder / "other.txt").write_text("not a session's name")
    (folder / "s0.json").rename(folder / "renamed.json")
    outcome = run("import", folder, "--url", url, "--json")
    assert outcome.code == 1
    assert isinstance(outcome.json, dict)
    assert outcome.json["imported"] == 2
    assert [failure["id"] for failure in outcome.json["failed"]] == ["broken.json", "renamed.json"]
    assert "broken" in outcome.err


def test_a_corrupt_session_is_reported_and_the_others_are_exported(
    run: Run, embedded: str, folder: Path, tmp_path: Path
) -> None:
    """A session that can't be decoded makes the exit code of an export 1 and stops nothing."""
    name = ("--url", embedded, "--namespace", "corrupt")
    assert run("import", folder, *name).code == 0
    with open_store(embedded, namespace="corrupt") as store:
        store._driver.link.call([("HSET", "{corrupt/0}:session:s1", "metadata", b"\xc1")], time.monotonic() + 5)
    outcome = run("export", tmp_path / "out", *name)
    assert (outcome.code, outcome.out) == (1, "2 exported, 1 failed\n")
    assert "s1" in outcome.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["s0.json", "s2.json"]


def test_ls_shows_the_newest_first(run: Run, url: str, folder: Path) -> None:
    """A list is ordered by the last update, and says what there is of each session."""
    run("import", folder, "--url", url)
    lines = run("ls", "--url", url).out.splitlines()
    assert [line.split()[0] for line in lines] == ["id", "s2", "s1", "s0"]
    assert "project 2" in lines[1]
    assert "2023-11-14 22:13:20" in lines[1]
    assert "/repos/even" in lines[1]


def test_ls_prints_json(run: Run, url: str, folder: Path) -> None:
    """With --json a list is one document with aware times."""
    run("import", folder, "--url", url)
    document = run("ls", "--url", url, "--json").json
    assert isinstance(document, list)
    assert [item["id"] for item in document] == ["s2", "s1", "s0"]
    assert document[0]["turn_count"] == 30
    assert datetime.fromisoformat(document[0]["updated_at"]).timestamp() == pytest.approx(1_700_000_000.002)


def test_ls_limits_and_filters(run: Run, url: str, folder: Path) -> None:
    """--limit cuts the list and says so, --all lifts the limit, --project filters."""
    run("import", folder, "--url", url)

    def ids(*arguments: str) -> list[str]:
        document = run("ls", "--url", url, "--json", *arguments).json
        assert isinstance(document, list)
        return [item["id"] for item in document]

    assert ids("--limit", "2") == ["s2", "s1"]
    assert "more than 2" in run("ls", "--url", url, "--limit", "2").err
    assert run("ls", "--url", url, "--limit", "3").err == ""
    assert ids("--limit", "2", "--all") == ["s2", "s1", "s0"]
    assert ids("--project", "/repos/odd") == ["s1"]


def test_ls_of_files_reports_what_it_can_not_read(folder: Path) -> None:
    """A list of a folder with a broken file has the others, and the exit code is 1."""
    (folder / "broken.json").write_text("{")
    done = subprocess.run(
        [sys.executable, "-m", "orcs_redis.cli", "ls", "--url", f"file://{folder}", "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert len(json.loads(done.stdout)) == 3
    assert done.stderr.startswith("orcs-redis: ")
    assert "broken.json" in done.stderr


def test_show(run: Run, url: str, folder: Path) -> None:
    """A session is shown with its last turns."""
    run("import", folder, "--url", url)
    out = run("show", "s1", "--url", url).out
    assert out.startswith("s1\n")
    assert "turn 29." in out
    assert "turn 10." in out
    assert "turn 9." not in out
    assert "10 earlier turns" in out
    out = run("show", "s1", "--turns", "0", "--url", url).out
    assert "turn 29." not in out


def test_show_prints_orcs_json(run: Run, url: str, folder: Path) -> None:
    """With --json a session is printed exactly as in orcs' file."""
    run("import", folder, "--url", url)
    assert run("show", "s1", "--url", url, "--json").out == (folder / "s1.json").read_text()


def test_rm_deletes_several(run: Run, url: str, folder: Path) -> None:
    """Several sessions are deleted at once; one that is absent stops nothing and makes the exit code 3."""
    run("import", folder, "--url", url)
    outcome = run("rm", "s0", "nope", "s1", "--url", url, "--json")
    assert outcome.code == 3
    assert isinstance(outcome.json, dict)
    assert outcome.json["deleted"] == ["s0", "s1"]
    assert "session not found: nope" in outcome.err
    assert run("rm", "s2", "--url", url).code == 0


def test_ping(run: Run, embedded: str, tmp_path: Path) -> None:
    """A ping tells the kind of store, and of a server the round trip."""
    document = run("ping", "--url", embedded, "--json").json
    assert isinstance(document, dict)
    assert document["kind"] == "embedded"
    assert 0 < document["round_trip_ms"] < 1000
    assert "median" in run("ping", "--url", embedded).out
    assert run("ping", "--url", f"file://{tmp_path}").out == f"files {tmp_path}\n"


def test_options_may_stand_before_the_command(run: Run, embedded: str, folder: Path) -> None:
    """--url, --namespace and --json are taken before the command and after it; after it counts."""
    assert run("--url", embedded, "--namespace", "before", "--json", "import", folder).code == 0
    before = run("--url", embedded, "--json", "ls", "--namespace", "before").json
    assert isinstance(before, list)
    assert len(before) == 3
    assert run("--namespace", "before", "ls", "--url", embedded, "--namespace", "other", "--json").json == []


def test_the_environment_gives_the_url(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --url that of $ORCS_REDIS_URL is taken."""
    monkeypatch.setenv("ORCS_REDIS_URL", f"file://{folder}")
    assert "s2" in run("ls").out


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        pytest.param(3, "session not found: nope", ("show", "nope"), id="not found"),
        pytest.param(2, "a session id has", ("show", "a/b"), id="bad id"),
        pytest.param(2, "No such command", ("bogus",), id="bad command"),
        pytest.param(2, "Missing argument", ("show",), id="missing argument"),
        pytest.param(2, "No such option", ("ls", "--bogus"), id="bad option"),
        pytest.param(2, "does not exist", ("import", "/nonexistent"), id="no folder"),
        pytest.param(2, "namespace", ("ls", "--namespace", "{x}"), id="bad namespace"),
        pytest.param(2, "unknown scheme", ("ls", "--url", "http://user:hidden@host"), id="bad scheme"),
        pytest.param(2, "malformed", ("ls", "--url", "redis://user:hidden@host:port"), id="bad port"),
        pytest.param(1, "127.0.0.1:1", ("ls", "--url", "redis://user:hidden@127.0.0.1:1"), id="no server"),
        pytest.param(2, "a namespace of its own", ("demo", "--namespace", "orcs"), id="demo's namespace"),
        pytest.param(2, "publish no changes", ("watch", "--url", "file:///nonexistent"), id="watch of files"),
        pytest.param(2, "several processes", ("demo", "--url", "memory://"), id="demo in memory"),
    ],
)
def test_errors_are_one_line(run: Run, embedded: str, code: int, message: str, arguments: tuple[str, ...]) -> None:
    """Whatever goes wrong is said in one line on standard error, without passwords, and has an exit code."""
    own = () if "--url" in arguments or arguments[0] == "demo" else ("--url", embedded)
    outcome = run(*own, *arguments)
    assert outcome.code == code
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert outcome.out == ""
    assert "hidden" not in outcome.err


class Watch:
    """`orcs-redis watch` in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "orcs_redis.cli", "watch", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def lines(self, count: int) -> list[str]:
        """Return so many lines, which come though the process goes on."""
        assert self.process.stdout is not None
        return [self.process.stdout.readline() for _ in range(count)]

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> str:
        """Press Ctrl-C, or send another signal, and return what was said on standard error."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        assert out == ""
        return err

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_watch_prints_json_lines(run: Run, embedded: str) -> None:
    """Each change is a JSON document in a line, at once; what Ctrl-C tells goes on without a gap."""
    name = ("--url", embedded, "--namespace", "watched-json")
    with open_store(embedded, namespace="watched-json") as store:
        since = store.cursor()
        revisions = [store.save(SessionAsset(id=f"s{number}")) for number in range(3)]
        with Watch(*name, "--json", "--since", since) as watch:
            changes = [json.loads(line) for line in watch.lines(3)]
            store.delete("s1")
            deleted = json.loads(*watch.lines(1))
            err = watch.interrupt()
        assert watch.process.returncode == 130
        assert [(change["kind"], change["id"]) for change in changes] == [("saved", f"s{n}") for n in range(3)]
        assert [change["revision"] for change in changes] == revisions
        assert {change["origin"] for change in changes} == {store.origin}
        assert datetime.fromisoformat(deleted["updated_at"]).tzinfo is not None
        assert (deleted["kind"], deleted["id"]) == ("deleted", "s1")
        # Interrupted just after a line, it may tell it once more; it never leaves one out.
        told = [change["cursor"] for change in (changes[-1], deleted)]
        assert err in [f"orcs-redis: go on with: watch --since {cursor}\n" for cursor in told]
        store.save(SessionAsset(id="later"))
        with Watch(*name, "--json", "--since", err.split()[-1]) as watch:
            assert json.loads(watch.lines(2 - told.index(err.split()[-1]))[-1])["id"] == "later"


def test_watch_of_some_sessions(embedded: str) -> None:
    """With --id only these sessions' changes come, in a line that says what they were."""
    with open_store(embedded, namespace="watched-some") as store:
        since = store.cursor()
        store.save_many([SessionAsset(id=f"s{number}", updated_at_ms=1_700_000_000_123) for number in range(5)])
        arguments = ("--url", embedded, "--namespace", "watched-some", "--since", since)
        with Watch(*arguments, "--id", "s3", "--id", "s1") as watch:
            assert watch.lines(2) == [
                f"2023-11-14 22:13:20.123 saved   s{n} @{n + 1} by {store.origin[:8]}\n" for n in (1, 3)
            ]


def test_watch_begins_now(embedded: str) -> None:
    """Without --since nothing old is told, and Ctrl-C before the first change tells where it began."""
    with open_store(embedded, namespace="watched-now") as store:
        store.save(SessionAsset(id="old"))
        cursor = store.cursor()
        with Watch("--url", embedded, "--namespace", "watched-now", "--json") as watch:
            raw = ("PUBSUB", "CHANNELS", "{watched-now/0}:changes*")
            until = time.monotonic() + 20
            while not store._driver.link.call([raw], time.monotonic() + 5)[0]:
                assert time.monotonic() < until
                time.sleep(0.02)
            err = watch.interrupt()
        assert err.split()[-1] == cursor


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_watch_told_to_end(embedded: str, number: signal.Signals) -> None:
    """SIGTERM and SIGHUP need no default action, which they don't have for the first process of a container."""
    with open_store(embedded, namespace="watched-end") as store:
        since = store.cursor()
        store.save(SessionAsset(id="s"))
        with Watch("--url", embedded, "--namespace", "watched-end", "--since", since) as watch:
            watch.lines(1)
            told = watch.interrupt(number).split()[-1]
            assert told in (since, store.cursor())  # it may have struck right after the line was printed
            assert watch.process.returncode == 128 + number


def test_watch_under_nohup(embedded: str) -> None:
    """A signal that is ignored when a command starts stays ignored."""
    with open_store(embedded, namespace="watched-nohup") as store:
        since = store.cursor()
        store.save(SessionAsset(id="s"))
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # is inherited
        try:
            watch = Watch("--url", embedded, "--namespace", "watched-nohup", "--since", since)
        finally:
            signal.signal(signal.SIGHUP, before)
        with watch:
            watch.lines(1)
            watch.process.send_signal(signal.SIGHUP)
            store.delete("s")
            assert "deleted" in watch.lines(1)[0]
            watch.interrupt()
            assert watch.process.returncode == 130


def test_watch_ends_when_nobody_reads(embedded: str) -> None:
    """A reader that goes away, as head does, ends the watch in silence at the next change."""
    with open_store(embedded, namespace="watched-head") as store:
        since = store.cursor()
        store.save(SessionAsset(id="s"))
        with Watch("--url", embedded, "--namespace", "watched-head", "--json", "--since", since) as watch:
            assert watch.process.stdout is not None
            assert watch.process.stderr is not None
            watch.lines(1)
            watch.process.stdout.close()
            store.save(SessionAsset(id="s"))
            assert watch.process.stderr.read() == ""
            assert watch.process.wait(30) != 0
            watch.process.stdout = None


def test_watch_of_another_namespace_cursor(run: Run, embedded: str) -> None:
    """A cursor of another namespace is refused in one line, and so is what is no cursor."""
    with open_store(embedded, namespace="watched-a") as store:
        cursor = store.cursor()
    outcome = run("watch", "--url", embedded, "--namespace", "watched-b", "--since", cursor)
    assert outcome.code == 1
    assert "list again" in outcome.err
    assert run("watch", "--url", embedded, "--since", "bogus").code == 2


def test_watch_in_a_terminal_has_colours(embedded: str) -> None:
    """In a terminal lines are coloured, and an id does not act on it."""
    with open_store(embedded, namespace="watched-tty") as store:
        since = store.cursor()
        store.save(SessionAsset(id="[red]\u202eid"))
    arguments = ("watch", "--url", embedded, "--namespace", "watched-tty", "--since", since)
    got = in_a_terminal(*arguments, until="by", code=130)
    assert "\x1b[32msaved" in got
    assert "[red]\\u202eid" in got


def in_a_terminal(*arguments: str, until: str | None = None, code: int = 0) -> str:
    """Run the command line in a pseudo-terminal and return all that it got; press Ctrl-C after `until`."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": "80"}
        os.execv(sys.executable, [sys.executable, "-m", "orcs_redis.cli", *arguments])
    got = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux says so that the other end is closed
            break
        if not part:
            break
        got += part
        if until is not None and until.encode() in got:
            os.write(terminal, b"\x03")
            until = None
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    return got.decode()


@pytest.mark.parametrize("command", [("ls",), ("show", "evil [red]x"), ("show", "evil [red]x", "--json")], ids=" ".join)
def test_contents_do_not_act_on_the_terminal(command: tuple[str, ...], tmp_path: Path) -> None:
    """Escape sequences and markup in a session are shown, not obeyed."""
    asset = SessionAsset.for_project("/repos/" + EVIL)
    asset.id = "evil [red]x"
    asset.project_context.name = EVIL
    turn = ConversationTurn.user(EVIL).with_tags([EVIL])
    turn.role = EVIL
    asset.add_turn(turn)
    LocalFileStore(tmp_path).save(asset)
    got = in_a_terminal(*command, "--url", f"file://{tmp_path}")
    for sequence in ("\x1b[31m", "\x1b]", "\x07", "\x9b", "\u202e"):
        assert sequence not in got
    assert "[red]" in got
    assert "[bold]" in got


def test_a_closed_pipe_is_no_error(folder: Path) -> None:
    """A reader that goes away, as head does, ends the command in silence."""
    with subprocess.Popen(
        [sys.executable, "-m", "orcs_redis.cli", "show", "s1", "--json", "--url", f"file://{folder}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_an_interrupt_ends_with_130(tmp_path: Path) -> None:
    """Ctrl-C ends a command at once, without a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        with (
            subprocess.Popen(
                [sys.executable, "-m", "orcs_redis.cli", "ls", "--url", f"redis://127.0.0.1:{port}"],
                stderr=subprocess.PIPE,
            ) as process,
            mute.accept()[0] as connection,
        ):
            connection.recv(1)
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            assert process.stderr.read() == b""
        assert process.returncode == 130


def test_without_its_libraries_it_says_what_to_install() -> None:
    """Where typer or rich is missing, one line says how to get them."""
    code = "import sys; sys.modules['typer'] = None; import orcs_redis.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "orcs-redis: typer is missing: pip install 'orcs-redis[cli]'\n"


def test_help_tells_the_exit_codes(run: Run) -> None:
    """The help of every command ends with the exit codes."""
    for arguments in (["--help"], ["ls", "-h"]):
        assert "Exit codes" in run(*arguments).out
