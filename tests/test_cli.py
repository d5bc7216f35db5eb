"""The command line, as a user meets it: what it prints where, and its exit codes."""

from __future__ import annotations

import base64
import json
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from orcs_redis import ConversationTurn, RawItem, SessionAsset
from orcs_redis.sync import LocalFileStore, open_store

from .command_line import Run, in_a_terminal

EVIL = "\x1b[31mred\x1b]0;title\x07 [bold]markup[/bold] \x9b2J \u202ereversed"


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


def test_show_reads_no_more_turns_than_it_shows(run: Run, embedded: str) -> None:
    """A turn that can't be decoded does no harm unless it is to be shown; numbers count from the first turn."""
    with open_store(embedded, namespace="long") as store:
        store.append("s", *(ConversationTurn.user(f"turn {n}.") for n in range(30)), create=True)
        store._driver.link.call([("LSET", "{long/0}:turns:s", "0", b"\xc1")], time.monotonic() + 5)
    where = ("--url", embedded, "--namespace", "long")
    shown = run("show", "s", "--turns", "29", *where)
    assert shown.code == 0
    assert "... 1 earlier turn\n" in shown.out
    assert "#1 user" in shown.out
    assert "30, and 0 summarised" in shown.out
    assert run("show", "s", "--turns", "30", *where).code == 1


def test_show_tells_labels_and_what_raw_turns_say(run: Run, url: str) -> None:
    """A raw turn is shown as what its item says, with its format; labels have a line of their own."""
    asset = SessionAsset(id="s")
    call = {"type": "function_call", "call_id": "c-1", "name": "grep", "arguments": '{"pattern":"x"}'}
    asset.add_turn(ConversationTurn.from_raw(RawItem("openai-agents/1", json.dumps(call).encode())))
    asset.add_turn(ConversationTurn.from_raw(RawItem("other/1", b"\x00\x01"), role="tool"))
    asset.metadata |= {"labels": {"user": "u1", "team": "core"}, "title": "x"}
    with open_store(url) as store:
        store.save(asset)
    out = run("show", "s", "--url", url).out
    assert "labels        team=core, user=u1\n" in out
    assert 'metadata      {"title": "x"}\n' in out
    assert out.count(' openai-agents/1\n    [call grep] {"pattern":"x"}\n') == 1
    assert out.endswith(" other/1\n    [tool: other/1, 2 bytes]\n")


@pytest.fixture
def labelled(url: str) -> str:
    """The URL of a store of sessions with labels."""
    assets = [SessionAsset(id=f"s{n}", created_at_ms=n, updated_at_ms=n) for n in range(4)]
    assets[1].metadata["labels"] = {"user": "ann", "team": "core"}
    assets[2].metadata["labels"] = {"user": "ann", "x": "a=b"}
    assets[3].project_context.root_path = "/p"
    with open_store(url) as store:
        for asset in assets:
            store.save(asset)
    return url


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ((), ["s3", "s2", "s1", "s0"]),
        (("--label", "user=ann"), ["s2", "s1"]),
        (("--label", "user=ann", "--label", "team=core"), ["s1"]),
        (("--label", "x=a=b"), ["s2"]),
        (("--label", "user=bob"), []),
        (("--project", "/p"), ["s3"]),
        (("--project", "/p", "--label", "user=ann"), []),
    ],
    ids=str,
)
def test_filters_of_ls_and_count(run: Run, labelled: str, filters: tuple[str, ...], ids: list[str]) -> None:
    """Sessions are listed, and counted, of which all that is asked for holds."""
    listed = run("ls", *filters, "--url", labelled, "--json").json
    assert isinstance(listed, list)
    assert [item["id"] for item in listed] == ids
    assert run("count", *filters, "--url", labelled).out == f"{len(ids)}\n"
    assert run("count", *filters, "--url", labelled, "--json").json == {"count": len(ids)}


def test_ls_shows_labels(run: Run, labelled: str) -> None:
    """Labels have a column, if there are any."""
    lines = run("ls", "--url", labelled).out.splitlines()
    assert lines[0].split() == ["id", "name", "turns", "updated", "project", "labels"]
    assert lines[3].endswith("team=core, user=ann")
    assert "labels" not in run("ls", "--project", "/p", "--url", labelled).out


@pytest.mark.parametrize("columns", [60, 80, 100, 120, 200])
def test_ls_in_a_terminal_keeps_ids_whole(columns: int, tmp_path: Path) -> None:
    """Whatever the width, a session has one line with its whole id and its age; names are cut."""
    asset = SessionAsset.for_project("/a/very/long/path" * 10)
    asset.project_context.name = "a long name " * 10
    asset.metadata["labels"] = {"user": "u" * 100}
    LocalFileStore(tmp_path).save(asset)
    lines = in_a_terminal("ls", "--url", f"file://{tmp_path}", columns=columns).splitlines()
    assert len(lines) == 2
    assert len(lines[1].rstrip()) <= columns
    assert asset.id in lines[1]
    assert " s ago" in lines[1]


def test_small_changes(run: Run, url: str, folder: Path) -> None:
    """A session is renamed, and its parts are set and unset, while its turns stay."""
    run("import", folder, "--url", url)

    def change(*arguments: str) -> SessionAsset:
        outcome = run("--url", url, *arguments)
        assert (outcome.code, outcome.err) == (0, "")
        assert "revision" in outcome.out
        with open_store(url) as store:
            asset = store.load("s1")
        assert len(asset.history) == 30
        return asset

    assert change("rename", "s1", "other").project_context.name == "other"
    assert change("rename", "s1", "").project_context.name is None
    assert change("set", "s1", "metadata.a.b", '{"x": [1, null]}').metadata == {"a.b": {"x": [1, None]}}
    assert change("set", "s1", "metadata.n", "--", "-1").metadata["n"] == -1
    assert change("unset", "s1", "metadata.a.b").metadata == {"n": -1}
    assert change("unset", "s1", "metadata.a.b").metadata == {"n": -1}  # it need not be there
    assert change("set", "s1", "project_context.name", '"set"').project_context.name == "set"
    assert change("set", "s1", "preferences.custom.theme", '"dark"').preferences.custom == {"theme": "dark"}
    assert change("set", "s1", "extra.owner", "true").extra == {"owner": True}
    assert change("unset", "s1", "project_context.name").project_context.name is None
    grant = {"pattern": "ls", "kind": "Persistent", "created_at_ms": 1}
    assert len(change("set", "s1", "granted_commands", json.dumps([grant])).granted_commands) == 1


def test_a_change_says_the_revision(run: Run, embedded: str) -> None:
    """With --json the id, the part and the new revision; what changes nothing has the old one."""
    where = ("--url", embedded, "--namespace", "small", "--json")
    with open_store(embedded, namespace="small") as store:
        revision = store.save(SessionAsset(id="s"))
    assert run("rename", "s", "x", *where).json == {"id": "s", "revision": revision + 1}
    expected = {"id": "s", "part": "metadata.a", "revision": revision + 2}
    assert run("set", "s", "metadata.a", "1", *where).json == expected
    assert run("set", "s", "metadata.a", "1", *where).json == expected
    assert run("unset", "s", "metadata.a", *where).json == expected | {"revision": revision + 3}


def test_a_change_does_not_read_turns(run: Run, embedded: str) -> None:
    """A history of which no turn can be read stays as it is while the session is renamed."""
    where = ("--url", embedded, "--namespace", "renamed")
    with open_store(embedded, namespace="renamed") as store:
        store.append("s", ConversationTurn.user("x"), create=True)
        store._driver.link.call([("LSET", "{renamed/0}:turns:s", "0", b"\xc1")], time.monotonic() + 5)
        assert run("rename", "s", "new", *where).code == 0
        assert run("set", "s", "metadata.a", "1", *where).code == 0
        assert [meta.name for meta in store.list()] == ["new"]


def test_pop_prints_what_it_removes(run: Run, embedded: str, folder: Path) -> None:
    """The last turns go, and are printed: as text, or with --json as orcs' file has them."""
    where = ("--url", embedded, "--namespace", "popped")
    run("import", folder, *where)
    turns = json.loads((folder / "s1.json").read_text())["history"]["turns"]
    popped = run("pop", "s1", *where).out
    assert popped.startswith("user ")
    assert popped.endswith("\n    turn 29.\n")
    assert run("pop", "s1", "2", *where, "--json").json == turns[27:29]
    assert run("pop", "s1", "100", *where).out.count("turn ") == 27
    empty = run("pop", "s1", *where)
    assert (empty.code, empty.out) == (0, "")
    assert "no turns" in empty.err
    assert run("pop", "s1", *where, "--json").out == "[]\n"


def test_pop_of_a_raw_turn(run: Run, embedded: str) -> None:
    """What is printed with --json has the raw item, as orcs' file would."""
    turn = ConversationTurn.from_raw(RawItem("other/1", b"\x00"))
    asset = SessionAsset(id="s")
    asset.add_turn(turn)
    with open_store(embedded, namespace="popped-raw") as store:
        store.save(asset)
    found = run("pop", "s", "--url", embedded, "--namespace", "popped-raw", "--json").json
    assert found == json.loads(asset.to_json())["history"]["turns"]


def test_fork(run: Run, embedded: str, folder: Path) -> None:
    """A fork has the first turns, prints its id, and never takes another's place."""
    where = ("--url", embedded, "--namespace", "forked")
    run("import", folder, *where)
    with open_store(embedded, namespace="forked") as store:
        store.commit("s1", put={"k": b"v"})
        assert run("fork", "s1", "new", "--length", "3", *where).out == "new\n"
        assert [turn.content for turn in store.load("new").history.turns] == ["turn 0.", "turn 1.", "turn 2."]
        assert store.records("new") == []
        made = run("fork", "s1", "--records", *where).out.strip()
        assert uuid.UUID(made)
        assert store.records(made) == [("k", b"v")]
        document = run("fork", "s1", "third", *where, "--json").json
        assert isinstance(document, dict)
        assert (document["id"], document["forked_from"]) == ("third", "s1")
        taken = run("fork", "s1", "new", *where)
        assert (taken.code, taken.out, taken.err) == (1, "", "orcs-redis: there is a session new already\n")
        assert len(store.load("new").history) == 3


RECORDS = {"a/1": b'{"x":1.50,"y":[]}', "a/2": b"\xff\x00", "b": EVIL.encode(), "b/2": b"12345678901234567890123"}


@pytest.fixture
def recorded(embedded: str) -> tuple[str, ...]:
    """Options for a store of a session "s" with records."""
    with open_store(embedded, namespace="records") as store:
        store.commit("s", put=RECORDS, create=True)
    return ("--url", embedded, "--namespace", "records")


def test_records_are_listed(run: Run, recorded: tuple[str, ...]) -> None:
    """Keys and sizes, in order or reversed, of a prefix, up to a limit."""
    lines = [line.split() for line in run("records", "s", *recorded).out.splitlines()]
    assert lines == [["key", "bytes"], *([key, str(len(data))] for key, data in RECORDS.items())]
    assert run("records", "s", "a/", *recorded).out.split() == ["key", "bytes", "a/1", "17", "a/2", "2"]
    limited = run("records", "s", "--reverse", "--limit", "1", *recorded)
    assert limited.out.split() == ["key", "bytes", "b/2", "23"]
    assert "more than 1" in limited.err
    assert run("records", "s", "--limit", "1", "--all", *recorded).err == ""


def test_records_as_json(run: Run, recorded: tuple[str, ...]) -> None:
    """With --json there are the values: JSON as it is, all else in base64."""
    outcome = run("records", "s", *recorded, "--json")
    items = json.loads(outcome.out, parse_float=str)
    assert [(item["key"], item["size"]) for item in items] == [(key, len(data)) for key, data in RECORDS.items()]
    assert items[0]["json"] == {"x": "1.50", "y": []}
    assert [base64.b64decode(item["base64"]) for item in items[1:3]] == [RECORDS["a/2"], RECORDS["b"]]
    assert items[3]["json"] == 12345678901234567890123
    assert run("records", "s", "nothing", *recorded, "--json").json == []


@pytest.mark.parametrize("key", ["a/2", "b"])
def test_a_record_is_printed_as_it_is(run: Run, recorded: tuple[str, ...], key: str) -> None:
    """A program gets the bytes; a terminal sees them escaped."""
    command = [sys.executable, "-m", "orcs_redis.cli", "record", "s", key, *recorded]
    assert subprocess.run(command, capture_output=True, check=True).stdout == RECORDS[key]
    items = run("record", "s", key, *recorded, "--json").json
    assert isinstance(items, list)
    assert [(item["key"], item["size"]) for item in items] == [(key, len(RECORDS[key]))]
    got = in_a_terminal("record", "s", key, *recorded)
    assert not any(char in got for char in "\x00\x07\x1b\x9b\u202e")


def test_what_is_not_there(run: Run, recorded: tuple[str, ...]) -> None:
    """A missing record and a missing session are told apart, and both have the exit code 3."""
    missing = run("record", "s", "nope", *recorded)
    assert (missing.code, missing.err) == (3, "orcs-redis: session s has no record nope\n")
    for arguments in (("record", "nope", "a"), ("records", "nope"), ("pop", "nope"), ("fork", "nope", "x")):
        outcome = run(*arguments, *recorded)
        assert (outcome.code, outcome.err) == (3, "orcs-redis: session not found: nope\n")


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
        pytest.param(2, "NAME=VALUE", ("ls", "--label", "user"), id="no label"),
        pytest.param(2, "at most 8 names", ("count", "--label", "=x"), id="bad label"),
        pytest.param(2, "one value of a", ("ls", "--label", "a=1", "--label", "a=2"), id="two values of a label"),
        pytest.param(3, "session not found: nope", ("rename", "nope", "x"), id="rename of none"),
        pytest.param(3, "session not found: nope", ("unset", "nope", "metadata.x"), id="unset of none"),
        pytest.param(2, "no such part: foo", ("set", "s", "foo", "1"), id="bad part"),
        pytest.param(2, "metadata.<key>", ("set", "s", "metadata", "{}"), id="a map"),
        pytest.param(2, "id can't be changed", ("set", "s", "id", '"x"'), id="the id"),
        pytest.param(2, "a turn is no such part", ("unset", "s", "turn/x"), id="a turn"),
        pytest.param(2, "is not JSON", ("set", "s", "metadata.x", "hello"), id="no JSON"),
        pytest.param(2, "is not a value of project", ("set", "s", "project_context.name", "5"), id="another type"),
        pytest.param(2, "greater than or equal to 1", ("pop", "s", "0"), id="pop of none"),
        pytest.param(2, "a session id has", ("fork", "s", "a/b"), id="fork to a bad id"),
        pytest.param(2, "a record's key", ("record", "s", "x" * 1025), id="bad key"),
        pytest.param(2, "files have no records", ("records", "s", "--url", "file:///nonexistent"), id="no records"),
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
    got = in_a_terminal(*command, "--url", f"file://{tmp_path}", columns=300)
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
