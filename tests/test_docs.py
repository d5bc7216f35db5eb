"""README.md and docs/ say what is so: their examples run, and their tables agree with the code.

Each block of Python is a program of its own, begins with an empty server and must end without an error or a warning.
One with `await` at the top level is run as `python -m asyncio` would. Of a block nothing is changed but
`redis://localhost:6379/0`, which becomes the test's own server, and `/path/to/dir`, the test's own folder.
"""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import gc
import importlib.metadata
import inspect
import re
import sys
import tomllib
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
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


def fences() -> Iterator[tuple[str, int, str]]:
    """The blocks of Python: document, line and text."""
    for document in DOCUMENTS:
        text = document.read_text()
        # The second form is for what is included: ruff would format it.
        for match in re.finditer(r"^```(?:python| { \.python .*})\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield name(document), text.count("\n", 0, match.start()) + 1, match[1]


def included(text: str) -> str | None:
    """The file that a block shows instead of having a text."""
    match = re.fullmatch(r'--8<-- "(.*)"\n', text)
    return match and match[1]


def blocks() -> Iterator[Any]:
    for document, line, text in fences():
        if not included(text):
            yield pytest.param(text, f"{ROOT / document}:{line}", id=f"{document}:{line}")


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
    """There are examples on these pages, and no Python block that the tests would overlook."""
    found = [param.id for param in blocks()]
    assert {str(id).partition(":")[0] for id in found} >= {"README.md", "docs/index.md", "docs/protocol.md"}
    shown = [included(text) for _, _, text in fences() if included(text)]
    every = sum(len(re.findall(r"(?:```|~~~)[ \t{.]*py", page.read_text(), re.IGNORECASE)) for page in DOCUMENTS)
    assert len(found) + len(shown) == every
    # Those are run by test_examples.
    assert set(shown) <= {name(path) for path in (ROOT / "examples").glob("*.py")}


def test_the_site_has_every_page() -> None:
    """The pages of the site are those of docs/."""
    pages = re.findall(r"^ +- (?:.*: )?([\w/.-]+\.md)$", read("mkdocs.yml"), re.MULTILINE)
    assert sorted(pages) == [str(page.relative_to(ROOT / "docs")) for page in sorted((ROOT / "docs").rglob("*.md"))]


def test_the_reference_has_every_public_name() -> None:
    """What is exported is on a page of the reference, and nothing else is."""
    text = "".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    for module in (orcs_redis, orcs_redis.sync):
        shown = set(re.findall(rf"^::: {module.__name__}\.(\w+)$", text, re.MULTILINE))
        public = set(module.__all__) - {"SESSION_VERSION"}
        if module is orcs_redis.sync:
            public = {each for each in public if getattr(module, each) is not getattr(orcs_redis, each)}
        assert shown == public


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
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


def test_readme_on_pypi() -> None:
    """PyPI's page has no link to a file of the repository."""
    settings = tomllib.loads(read("pyproject.toml"))["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = read("README.md")
    for each in settings["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []


# Tables


def table(document: str, heading: str) -> list[list[str]]:
    """The rows of the tables under a heading."""
    text = read(document).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [row.strip("| ").split(" | ") for row in re.findall(r"^\| .*\|$", text, re.MULTILINE)]
    assert rows, heading
    return rows


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]*)`", text)


def defined(name: str) -> Any:
    """What is defined under a name somewhere in the package."""
    modules = [module for key, module in sys.modules.items() if key.partition(".")[0] == "orcs_redis"]
    return next(vars(module)[name] for module in modules if name in vars(module))


def test_the_table_of_urls() -> None:
    """It has every scheme that there is."""
    shown = {url.partition(":")[0] for row in table("docs/reference/options.md", "URLs") for url in code(row[0])}
    with pytest.raises(ValueError, match="are known") as info:
        orcs_redis.sync.RedisSessionStore.connect("other://")
    known = re.search(r": ([\w, ]*) are known", str(info.value))
    assert known is not None
    assert shown == set(known[1].split(", "))


def test_the_table_of_options() -> None:
    """It has every option that there is, with its default."""
    shown = dict.fromkeys(("client", "asset_type"), "")
    for row in table("docs/reference/options.md", "Options"):
        shown |= {name: default for name, _, default in (text.partition("=") for text in code(row[0]))}
    assert shown.keys() == {"client", "asset_type", *defined("OptionArguments").__optional_keys__}
    defaults = {each.name: each.default for each in dataclasses.fields(defined("Options"))}
    for name, default in shown.items():
        if default and name != "asset_type":
            assert ast.literal_eval(default) == defaults[name]


@pytest.mark.parametrize("module", [orcs_redis, orcs_redis.sync], ids=["async", "blocking"])
def test_the_tables_of_methods(module: Any) -> None:
    """They have every public method of a store; a file store has those of SessionStore."""
    rows = table("docs/reference/options.md", "Methods")
    shown = {re.split(r"\W", text)[0] for row in rows for text in code(row[0])}
    opening = {"connect", "aclose", "close", "origin"}
    assert shown == {name for name in dir(module.RedisSessionStore) if not name.startswith("_")} - opening
    base = {name for name in dir(module.SessionStore) if not name.startswith("_")}
    assert base <= {name for name in dir(module.LocalFileStore) if not name.startswith("_")}
    assert {"append", "turns", "update", "page", "lease", "watch"}.isdisjoint(dir(module.LocalFileStore))  # README


@pytest.mark.parametrize("module", [orcs_redis, orcs_redis.sync], ids=["async", "blocking"])
def test_the_tables_of_a_hybrid_store(module: Any) -> None:
    """They have its own options with their defaults, and its methods beyond those of every store."""
    rows = table("docs/reference/options.md", "A folder with a shared store")
    shown = [text for row in rows for text in code(row[0])]
    kind = module.HybridSessionStore
    parameters = inspect.signature(kind).parameters.values()
    own = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY} | {"asset_type": None}
    defaults = dict(text.split("=") for text in shown if re.fullmatch(r"\w+=[^()]*", text))
    assert {name: ast.literal_eval(text) for name, text in defaults.items()} | {"asset_type": None} == own
    base = {name for name in dir(module.SessionStore) if not name.startswith("_")}
    methods = {name for name in dir(kind) if not name.startswith("_")} - base - {"aclose", "close", "path"}
    assert {re.split(r"\W", text)[0] for text in shown if text not in map("=".join, defaults.items())} == methods | {
        "load"
    }


def test_the_table_of_errors() -> None:
    """It has every error that there is, but the base and one that no store raises."""
    shown = {text.partition("(")[0] for row in table("docs/reference/options.md", "Errors") for text in code(row[0])}
    errors = {name for name in orcs_redis.__all__ if name.endswith("Error")}
    assert shown == errors - {"StorageError", "ChecksumMismatchError"}


def test_the_table_of_commands() -> None:
    """It has every command."""
    rows = table("docs/reference/options.md", "Command line")
    shown = {text.removeprefix("orcs-redis ").split()[0] for row in rows for text in code(row[0])}
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="orcs-redis")
    app = sys.modules[entry.load().__module__].app
    assert shown == {command.name for command in app.registered_commands}


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


def test_types_are_published() -> None:
    """Type checkers use the types of what is installed."""
    assert (PACKAGE / "py.typed").is_file()


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
        assert key in chapter


def test_numbers_of_the_protocol() -> None:
    """What the writing script keeps is what the protocol says."""
    script, protocol = (PACKAGE / "scripts/write.lua").read_text(), read("docs/protocol.md")
    numbers = dict(re.findall(r"^ *local (\w+) = (\d+)", script, re.MULTILINE))
    windows, mib = int(numbers["MAX_WINDOWS"]), int(numbers["MAX_DEDUP_BYTES"]) >> 20
    assert f"{windows:,} windows and {mib} MiB are kept" in " ".join(protocol.split())
    assert f"{int(numbers['MAX_TOMBSTONES']):,} tombstones are kept" in protocol
    assert f"a map of at most {numbers['MAX_LABELS']} names" in protocol
    assert f"or there are more than {numbers['MAX_COMPARED']}" in protocol
    most = re.search(r"if n > (\d+) then return redis.error_reply", script)
    assert most is not None
    assert f"several of a partition, {int(most[1]):,} at most" in " ".join(protocol.split())


def test_groups_of_the_protocol() -> None:
    """The groups of arguments that the writing script knows are those that the protocol describes."""
    script, protocol = (PACKAGE / "scripts/write.lua").read_text(), read("docs/protocol.md")
    chapter = protocol.partition("### write.lua")[2].partition("#### What is made of them")[0]
    known = re.findall(r"^--       (\w)( \d)? *: ", script, re.MULTILINE)
    shown = {row[0]: row[1] for row in re.findall(r"^\| `(\w)` \| ([^|]*) \| ", chapter, re.MULTILINE)}
    assert {letter for letter, _ in known} == shown.keys()
    assert {letter: number.strip() for letter, number in known if number} == {
        letter: number for letter, number in shown.items() if number.isdigit()
    }
    assert set(re.findall(r"(?:first|last)\.(\w)\b", script)) <= shown.keys()


def test_windows_are_written_once() -> None:
    """What both writing scripts know of commands and dedup windows is the same text."""
    function = re.compile(r"^( *)(?:local )?function (\w+)\(.*?^\1end$", re.MULTILINE | re.DOTALL)
    write, lease = (
        {found[2]: found[0] for found in function.finditer((PACKAGE / f"scripts/{name}.lua").read_text())}
        for name in ("write", "lease")
    )
    both = write.keys() & lease.keys()
    assert both >= {"struct_pack", "struct_unpack", "not_callable", "load_window", "find_entry", "pack_window"}
    assert {name: write[name] for name in both} == {name: lease[name] for name in both}


# The server's settings


def acl() -> list[str]:
    (line,) = re.findall(r"^ACL SETUSER .*$", read("docs/howto/servers.md"), re.MULTILINE)
    return str(line).split()


def test_rights_are_those_that_are_used() -> None:
    """The rights in the docs are the commands in the scripts and in the code, no more and no less."""
    used: set[str] = set()
    for path in PACKAGE.glob("scripts/*.lua"):
        used.update(re.findall(r"(?:call\(|look = .*?\{|or \{)'([A-Z]+)'", path.read_text()))
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "cli" and path.name not in ("embedded.py", "attempts.py", "commands.py"):
            used.update(re.findall(r'(?<!\w)\("([A-Z]{3,})"(?:,|\))(?! *"[A-Z])', path.read_text()))
    granted = {word[1:].upper() for word in acl() if word.startswith("+")}
    assert used - {"HELLO", "SELECT", "INFO"} == granted


@every_server
def test_rights_suffice(start_server: Callable[..., Server]) -> None:
    """A user with the rights in the docs can do everything, and nothing outside of the namespace."""
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
        store.refresh(asset)
        records: Any = {"put": {"a": b"1"}, "put_new": {"b": b"2"}, "drop": ["c", "d*"]}
        store.commit("u", set={"metadata.a": 1}, labels={"a": "b"}, append=asset.history.turns, create=True, **records)
        store.commit("u", unset=["metadata.a"], labels={"a": None})
        store.fork("u", "v", length=1, records=True)
        store.pop("u")
        store.replace_turn("u", asset.history.turns[0])
        store.touch("v")
        store.delete("u")
        store.delete("v")
        assert store.exists("s")
        assert len(store.list()) == 2
        page = store.page(1)
        page = store.page(1, page.cursor, updated_after=asset.created_at)
        assert store.list(labels={"a": "b"}) == []
        assert store.count(labels={"a": "b"}, project_path="/p") == 0
        assert store.records("s") == []
        assert store.get_records("s", ["a"]) == {}
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
