"""The main job of a hybrid store, with the command line in processes of its own: the sample sessions on two machines.

Edits on every side, kills in the middle of rounds, and in the end all are equal: two folders and the shared store.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import msgspec
import pytest

from orcs_redis import ConversationTurn, SessionAsset
from orcs_redis.sync import LocalFileStore, RedisSessionStore, open_store

from .conftest import Server

ROOT = Path(__file__).parent.parent
COPIES = 100  # of each sample

Files = LocalFileStore[SessionAsset]
Peer = RedisSessionStore[SessionAsset]


def samples() -> list[SessionAsset]:
    """The sample sessions of the package."""
    folder = resources.files("orcs_redis.cli") / "demo_sessions"
    return [SessionAsset.from_json(file.read_bytes()) for file in folder.iterdir() if file.name.endswith(".json")]


def start(folder: Path, url: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "orcs_redis.cli", "sync", str(folder), "--url", url, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def sync(folder: Path, url: str) -> dict[str, list[str]]:
    """Make a round that must succeed, and return its report."""
    process = start(folder, url)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, "")
    return msgspec.json.decode(out, type=dict[str, list[str]])


def kill_during(folder: Path, url: str, wait: Callable[[], None]) -> None:
    """Start a round, and kill it without warning in the midst of what is waited for."""
    process = start(folder, url)
    try:
        wait()
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was faster than the kill"


def uploads(peer: Peer, count: int) -> Callable[[], None]:
    """Return what waits until so many sessions were written by others from now on."""
    changes = peer.watch(since=peer.cursor())

    def wait() -> None:
        for _ in range(count):
            next(changes)
        changes.close()

    return wait


class Machine:
    """A folder of orcs' files, in which a user works with orcs: whole files are written."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.files = Files(folder)
        self.name = name

    def downloads(self, count: int) -> Callable[[], None]:
        """Return what waits until there are so many files."""

        def wait() -> None:
            end = time.monotonic() + 60
            while not self.folder.exists() or len([*self.folder.glob("*.json")]) < count:
                assert time.monotonic() < end
                time.sleep(0.001)

        return wait

    def talk(self, id: str) -> None:
        """Add a turn, and set a key of the metadata that no other machine sets."""
        asset = self.files.load(id)
        asset.add_turn(ConversationTurn.user(f"on the {self.name}"))
        asset.metadata[self.name] = True
        self.files.save(asset)

    def contents(self) -> dict[str, SessionAsset]:
        return {meta.id: self.files.load(meta.id) for meta in self.files.list()}


def rename(asset: SessionAsset) -> None:
    asset.project_context.name = "renamed"


def said(asset: SessionAsset, count: int) -> list[str]:
    """What the turns say after the first ones."""
    return [turn.content for turn in asset.history.turns[count:]]


def test_all_are_equal_in_the_end(start_server: Callable[..., Server], tmp_path: Path) -> None:
    """Whatever was edited where, and wherever rounds were killed: nothing is lost, doubled or out of order."""
    url = start_server("--appendonly", "yes").url
    laptop, desktop = (Machine(tmp_path / name, name) for name in ("laptop", "desktop"))
    before: dict[str, SessionAsset] = {}
    for number in range(COPIES):
        for sample in samples():
            sample.id = f"{number:03}-{sample.id}"
            laptop.files.save(sample)
            before[sample.id] = sample
    ids = sorted(before)
    originals = {path.name: path.read_bytes() for path in laptop.folder.glob("*.json")}

    with open_store(url) as peer:
        kill_during(laptop.folder, url, uploads(peer, 40))
        uploaded = sync(laptop.folder, url)["uploaded"]
        assert len(uploaded) < len(ids)  # what had arrived is not sent again
        assert peer.count() == len(ids)
        assert {path.name: path.read_bytes() for path in laptop.folder.glob("*.json")} == originals

        kill_during(desktop.folder, url, desktop.downloads(40))
        downloaded = sync(desktop.folder, url)["downloaded"]
        assert len(downloaded) < len(ids)
        assert desktop.contents() == before

        # Everybody edits the same sessions; some are deleted on one side, some of these edited on another.
        talked, lonely, deleted, revived, renamed = ids[:150], ids[150:200], ids[200:210], ids[210:220], ids[220:280]
        for id in talked:
            laptop.talk(id)
            desktop.talk(id)
            peer.append(id, ConversationTurn.user("in the fleet"))
        for id in lonely:
            laptop.talk(id)
        for id in renamed:
            peer.update(id, rename)
            desktop.talk(id)
        for id in deleted:
            laptop.files.delete(id)
        for id in revived:
            laptop.files.delete(id)
            desktop.talk(id)
        new = SessionAsset(id="new")
        desktop.files.save(new)

        kill_during(laptop.folder, url, uploads(peer, 1))
        sync(laptop.folder, url)
        kill_during(desktop.folder, url, uploads(peer, 1))
        report = sync(desktop.folder, url)
        assert report["conflicts"] == []
        sync(laptop.folder, url)
        for folder in (desktop.folder, laptop.folder):
            assert not any(sync(folder, url).values())

        stored = {id: peer.load(id) for id in (meta.id for meta in peer.list())}
    assert laptop.contents() == desktop.contents() == stored
    assert stored.keys() == ({*ids} - {*deleted}) | {"new"}
    for id, asset in stored.items():
        if id == "new":
            continue
        old = before[id].history.turns
        assert asset.history.turns[: len(old)] == old
        more = said(asset, len(old))
        if id in talked:
            assert more == ["in the fleet", "on the laptop", "on the desktop"]
            assert (asset.metadata["laptop"], asset.metadata["desktop"]) == (True, True)
        elif id in lonely:
            assert more == ["on the laptop"]
        elif id in renamed:
            assert (more, asset.project_context.name) == (["on the desktop"], "renamed")
        elif id in revived:
            assert more == ["on the desktop"]
        else:
            assert asset == before[id]


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a path short enough for a socket in it."""
    with tempfile.TemporaryDirectory(prefix="oh-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_the_script_of_the_how_to(short: Path) -> None:
    """What the page says can be pasted ends with two equal folders."""
    page = (ROOT / "docs/howto/hybrid.md").read_text()
    script = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[-1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"TMPDIR": str(short), "PATH": path},
    )
    assert "orcs-redis:" not in done.stderr
    assert done.stdout.endswith("\nboth folders are equal\n"), done.stdout + done.stderr
    assert re.search(r"^3 synced; last synced", done.stdout, re.MULTILINE)
    (asset,) = [
        each
        for each in Machine(next(short.iterdir()) / "desktop", "").contents().values()
        if each.metadata.get("ticket")
    ]
    assert asset.project_context.name == "Seen on the desktop"
