"""Make the blocking stores from those for asyncio: `python tools/unasync.py`; with --check, say whether they are so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

STORES = Path(__file__).parents[1] / "orcs_redis/stores"
MADE = STORES / "blocking"
MODULES = ("base", "files", "leasing", "opening", "redis")
SOURCES = {name: name for name in MODULES} | {"hybrid/store": "hybrid"}
HEAD = "# Made from ../{name}.py: change that one, then run `python tools/unasync.py`.\n"

WORDS = {  # whole lines and sentences first
    "RuntimeError after a fork, and of a live store in another event loop": "RuntimeError after a fork",
    "        async with await ": "        with ",
    "All tasks of the event loop that opened it share it, over one connection.": "Any number of threads may use it; "
    "each that waits has a connection for that time.",
    "RuntimeError if the store was opened in another event loop or before a fork": "RuntimeError if the store was "
    "opened before a fork",
    "for tasks and processes at once; what touches the files runs in threads.": "for threads and processes at once.",
    "Done when the lease is no longer held; each access gives another future, which may be cancelled.": "Set when the "
    "lease is no longer held.",
    "is called in this thread at each connecting": "is called at each connecting, in the thread that needs it",
    "a redis-py asyncio client": "a blocking redis-py client",
    "lest another task changes": "lest another thread changes",
    "an async context manager": "a context manager",
    "an `async with`": "a `with`",
    "The Redis store for asyncio": "The Redis store, blocking",
    "every asyncio store": "every blocking store",
    "import redis.asyncio": "import redis",
    "redis.asyncio.Redis": "redis.Redis",
    "The hybrid store for asyncio": "The hybrid store, blocking",
    "Opening a store of any kind, for asyncio": "Opening a store of any kind, blocking",
    "import asyncio": "import threading",
    "asyncio.Future[None]": "threading.Event",
    "asyncio.Event": "threading.Event",
    "asyncio.Lock": "threading.Lock",
    "AsyncGenerator[Change, None]": "Generator[Change, None, None]",
    "AsyncGenerator": "Generator",
    "AsyncIterator": "Iterator",
    "AbstractAsyncContextManager": "AbstractContextManager",
    "asynccontextmanager": "contextmanager",
    "aclose": "close",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "async ": "",
    "await ": "",
    "  # noqa: ASYNC109  # it is the contract's": "",
}


def blocking(text: str, name: str) -> str:
    """Return the blocking form of a module."""
    text = re.sub(r"\(await (.*)\)(\.\w+)$", r"\1\2", text, flags=re.MULTILINE)
    for old, new in WORDS.items():
        text = text.replace(old, new)
    text = re.sub(r"^(\s*from \.+[\w.]*)\bdriver import", r"\1threads import", text, flags=re.MULTILINE)
    folder, _, _ = name.rpartition("/")
    made = "|".join(MODULES)
    if folder:  # as deep as what is made; what is beside it remains there
        text = re.sub(r"^(\s*from \.)(?=\w)", rf"\1.{folder}.", text, flags=re.MULTILINE)
        return re.sub(rf"^(\s*from \.)\.(?=(?:{made}) import)", r"\1", text, flags=re.MULTILINE)
    # One folder deeper: what is not made itself is found there.
    text = re.sub(rf"^(\s*from \.)(?!(?:{made}) import)", r"\1.", text, flags=re.MULTILINE)
    return re.sub(r"^(\s*from \.)\.hybrid\.store import", r"\1hybrid import", text, flags=re.MULTILINE)


def formatted(text: str, path: Path) -> str:
    """Return it as ruff leaves it."""
    for command in (["check", "--quiet", "--fix-only", "--select=I"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, f"--stdin-filename={path}", "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


def main() -> int:
    """Make the files, or compare them with those that are there."""
    stale = []
    for name, made in SOURCES.items():
        path = MADE / f"{made}.py"
        text = formatted(HEAD.format(name=name) + blocking((STORES / f"{name}.py").read_text(), name), path)
        if not path.exists() or path.read_text() != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(text)
    if stale and "--check" in sys.argv:
        print("not what `python tools/unasync.py` makes: run it", *(MADE / name for name in stale), sep="\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
