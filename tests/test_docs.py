"""README.md and docs/ say what is so: their examples run, and their tables agree with the code.

Each block of Python is a program of its own, begins with an empty server and must end without an error or a warning.
One with `await` at the top level is run as `python -m asyncio` would. Of a block nothing is changed but
`redis://localhost:6379/0`, which becomes the test's own server, and `/path/to/dir`, a folder of the test's.
"""

from __future__ import annotations

import ast
import asyncio
import gc
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import orcs_redis.sync
from orcs_redis import (
    ConversationTurn,
    LeaseHeldError,
    NotFoundError,
    PermissionDeniedError,
    SessionAsset,
)
from orcs_redis.transport import embedded

from .conftest import Server, every_server

ROOT = Path(__file__).parent.parent
PACKAGE = Path(orcs_redis.__file__).parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def blocks() -> Iterator[Any]:
    for document in DOCUMENTS:
        text = document.read_text()
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            yield pytest.param(match[1], f"{document}:{line}", id=f"{document.name}:{line}")


Run = Callable[[str, str], None]


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[embedded.Attachment]:
    """A server that may be emptied."""
    with embedded.attach(tmp_path_factory.mktemp("docs"), 20) as attachment:
        yield attachment


@pytest.fixture
def run(own_server: embedded.Attachment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a block as a program."""
    url = f"unix://{own_server.socket}"
    with redis.Redis(unix_socket_path=str(own_server.socket)) as raw:
        raw.flushall()
        raw.script_flush()
    monkeypatch.setenv("ORCS_REDIS_URL", url)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def run_block(text: str, where: str) -> None:
        text = text.replace("redis://localhost:6379/0", url).replace("/path/to/dir", str(tmp_path))
        assert "localhost" not in text, "an example would reach for a server that isn't ours"
        module = types.ModuleType("docs_example")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        code = compile(text, where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        running = eval(code, vars(module))
        if inspect.iscoroutine(running):
            asyncio.run(running)
        gc.collect()  # what was left open warns now, and a warning is an error

    return run_block


@pytest.mark.parametrize(("text", "where"), list(blocks()))
def test_example(run: Run, text: str, where: str) -> None:
    """An example does what it says."""
    run(text, where)


@pytest.mark.parametrize(
    "text",
    [
        "1 / 0",
        "import asyncio\nawait asyncio.sleep(0)\nassert False",
        "from orcs_redis import no_such_name",
        "from orcs_redis import open_store\nasync with open_store() as store:\n    await store.load('absent')",
        "import warnings\nwarnings.warn('x')",
        "import redis\nredis.Redis.from_url('redis://localhost:6380/0')",
    ],
)
def test_a_broken_example_fails(run: Run, text: str) -> None:
    """The test of the examples is seen to fail."""
    with pytest.raises((ArithmeticError, AssertionError, ImportError, NotFoundError, UserWarning)):
        run(text, "broken")


def test_every_document_is_looked_at() -> None:
    """There are examples in README and in the protocol, and no Python block that the test would overlook."""
    found = [param.id for param in blocks()]
    assert {str(id).partition(":")[0] for id in found} >= {"README.md", "protocol.md"}
    fences = sum(len(re.findall(r"```[ \t]*py", document.read_text(), re.IGNORECASE)) for document in DOCUMENTS)
    assert len(found) == fences


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links(document: Path) -> None:
    """Links between files, and to headings, lead somewhere; no line is too long but tables and commands."""
    text = document.read_text()
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        path = document if not target else document.parent / target
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "ACL "))] == []


# The house

LEVELS = {  # a folder, or a module beside them, imports only from those of lower levels and from its own folder
    "errors": 0, "interrupts": 0, "scripts": 0,
    "model": 1,
    "protocol": 2,
    "transport": 3,
    "stores": 4,
    "names": 5,
    "__init__": 6, "sync": 6,
    "cli": 7,
}  # fmt: skip


def modules() -> dict[str, Path]:
    """The modules by their paths below the package, such as `model/asset` and `scripts/__init__`."""
    return {str(path.relative_to(PACKAGE).with_suffix("")): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """The package's modules that a module imports, whenever it does, and also for types only."""
    known = modules()
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            source = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for target in [source, *(source / name.name for name in node.names)]:
                name = str(target.relative_to(PACKAGE))
                found.update({name, f"{name}/__init__"} & known.keys())
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and "orcs_redis" in ast.unparse(node):
            raise AssertionError(f"{path}: imports in the package are relative")
    return found


def test_every_module_has_its_place() -> None:
    """The tables of modules have each of them once, and each folder has its level."""
    tables = read("docs/architecture.md").partition("## A save's way")[0]
    documented = re.findall(r"^\| `([\w/]+?)(?:\.py|/)` \|", tables, re.MULTILINE)
    assert len(set(documented)) == len(documented)
    made = {name for name in modules() if name.startswith("stores/blocking/")}
    packages = {name for name in modules() if name.endswith("__init__") and name != "scripts/__init__"}
    there = modules().keys() - made - packages - {"cli/__main__"} | {"stores/blocking"}
    assert set(documented) == {name.removesuffix("/__init__") for name in there}
    assert {name.partition("/")[0] for name in modules()} == LEVELS.keys()


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_folder_imports_from_lower_ones(name: str) -> None:
    """No arrow leads upwards, nor from one folder to another of its level."""
    room = name.partition("/")[0]
    for imported in imports(modules()[name]):
        other = imported.partition("/")[0]
        assert other == room or LEVELS[other] < LEVELS[room], imported


def test_no_module_imports_itself() -> None:
    """There is no circle of modules, whatever is imported late or for types only."""
    left = {name: imports(path) for name, path in modules().items()}
    while free := [name for name, wanted in left.items() if not wanted & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


# The protocol


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("scripts/*.lua")), ids=lambda path: path.name)
def test_scripts_are_described(path: Path) -> None:
    """Each script has its chapter, with every reply that its header names and no other key."""
    protocol = read("docs/protocol.md")
    header = path.read_text().partition("\n\n")[0] if path.name != "write.lua" else path.read_text()
    assert f"### {path.name}" in protocol
    chapter = protocol.partition(f"### {path.name}")[2].partition("\n### ")[0]
    for reply in re.findall(r'"([A-Z]{2,})"', header):
        assert f"| `{reply}`" in chapter
    for key in re.findall(r"^--\s.*?(?:\d|\.) (\{p\}:[\w:<>]+)", header, re.MULTILINE):
        assert key.replace("<op>", "<name>") in chapter


def test_numbers_of_the_protocol() -> None:
    """What the writing script keeps is what the protocol says."""
    script, protocol = (PACKAGE / "scripts/write.lua").read_text(), read("docs/protocol.md")
    numbers = dict(re.findall(r"^local (\w+) = (\d+)", script, re.MULTILINE))
    assert f"{int(numbers['WRITERS']):,} windows and {int(numbers['DEDUP_BYTES']) >> 20} MiB are kept" in " ".join(
        protocol.split()
    )
    assert f"{int(numbers['TOMBSTONES']):,} tombstones are kept" in protocol


# The server's settings


def acl() -> list[str]:
    (line,) = re.findall(r"^ACL SETUSER .*$", read("README.md"), re.MULTILINE)
    return str(line).split()


def test_rights_are_those_that_are_used() -> None:
    """The rights in README are the commands in the scripts and in the code, no more and no less."""
    used: set[str] = set()
    for path in PACKAGE.glob("scripts/*.lua"):
        used.update(re.findall(r"(?:call\(|look = .*?\{|or \{)'([A-Z]+)'", path.read_text()))
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "cli" and path.name not in ("embedded.py", "resp.py"):
            used.update(re.findall(r'(?<!\w)\("([A-Z]{3,})"(?:,|\))(?! *"[A-Z])', path.read_text()))
    granted = {word[1:].upper() for word in acl() if word.startswith("+")}
    assert used - {"HELLO", "SELECT", "INFO"} == granted


@every_server
def test_rights_suffice(start_server: Callable[..., Server]) -> None:
    """A user with the rights in README can do everything, and nothing outside of the namespace."""
    server = start_server()
    raw: Any = server.raw()
    raw.execute_command(*acl())
    with orcs_redis.sync.open_store(f"redis://worker:secret@127.0.0.1:{server.port}/0") as store:
        asset = SessionAsset(id="s")
        store.save(asset)
        for n in range(40):
            asset.add_turn(ConversationTurn.user(str(n)))
        store.save(asset)  # pushes
        del asset.history.turns[0]
        asset.history.turns[3].content = "edited"
        asset.extra["a"] = 1
        store.save(asset)  # edits
        del asset.extra["a"]
        store.save(asset)  # removes a section
        store.save(SessionAsset.from_json(asset.to_json()))  # stages
        store.save(SessionAsset(id="t"))  # replaces
        store.append("s", ConversationTurn.assistant("x"))
        assert store.load("s").history.turns[-1].content == "x"
        assert len(store.turns("s", -2)) == 2
        store.update("s", SessionAsset.touch)
        assert store.exists("s")
        assert len(store.list()) == 2
        page = store.page(1)
        page = store.page(1, page.cursor, updated_after=asset.created_at)
        store.ping()
        with store.lease("s"), pytest.raises(LeaseHeldError), store.lease("s", wait=0.1):
            pass
        assert store.leases() == []
        with store.lease("s") as lease:
            store.append("s", ConversationTurn.user("x"), lease=lease)
        store.delete("s")
        store.delete("t")
    with pytest.raises(PermissionDeniedError):
        orcs_redis.sync.RedisSessionStore.connect(
            f"redis://worker:secret@127.0.0.1:{server.port}/0", namespace="another"
        )
