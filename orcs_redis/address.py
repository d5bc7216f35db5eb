"""What a URL means: a server's address, an embedded server's folder, a name in this process, or a folder of files."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from .errors import PermissionDeniedError, UnsupportedServerError
from .resp import Command, Reply, as_error, as_map, translate

__all__ = ["Address", "EmbeddedFolder", "FileFolder", "MemoryName", "parse_url"]

_QUERY = {"protocol", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile"}
_MINIMUM = {"redis": 7, "valkey": 7}  # major versions


@dataclass(frozen=True, slots=True)
class Address:
    """Where one server listens and how to introduce oneself. The password stays out of its repr."""

    host: str = "localhost"
    port: int = 6379
    path: str | None = None  # of a unix socket, instead of host and port
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    db: int = 0
    protocol: int = 3

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"

    def introduction(self) -> list[Command]:
        """Return the commands that begin a connection: HELLO is allowed to every user, SELECT is not."""
        hello: list[str] = ["HELLO", str(self.protocol)]
        if self.password is not None or self.username is not None:
            hello += ["AUTH", self.username or "default", self.password or ""]
        hello += ["SETNAME", "orcs-redis"]
        return [tuple(hello), ("SELECT", str(self.db))] if self.db else [tuple(hello)]

    @staticmethod
    def check(replies: list[Reply]) -> None:
        """Judge the answers to `introduction`.

        Raises:
            UnsupportedServerError: older than Redis 7.0 or Valkey 7.2, or a cluster's node.
            PermissionDeniedError: wrong user or password.
            Trouble: not now.

        """
        for reply in replies:
            text = as_error(reply)
            if text is None:
                continue
            raise translate(text, opening=True)
        check_server(replies[0])


def check_server(hello: Reply) -> None:
    """Raise UnsupportedServerError if the answer to HELLO comes from a server that won't do."""
    try:
        about = as_map(hello)
        server = str(about.get(b"server", b"redis"), errors="replace")
        version = str(about.get(b"version", b"0"), errors="replace")
    except (TypeError, ValueError):
        raise UnsupportedServerError("what answers there is neither Redis nor Valkey") from None
    if about.get(b"mode") == b"cluster":
        raise UnsupportedServerError("this server is a node of a cluster")
    major = version.split(".", 1)[0]
    if server in _MINIMUM and (not major.isdigit() or int(major) < _MINIMUM[server]):
        raise UnsupportedServerError(f"{server} {version} is too old: Redis 7.0 or Valkey 7.2 is needed")


@dataclass(frozen=True, slots=True)
class EmbeddedFolder:
    """A folder for a server of our own; None: the default one."""

    path: Path | None


@dataclass(frozen=True, slots=True)
class MemoryName:
    """A fakeredis in this process; shared by name, unless the name is empty."""

    name: str


@dataclass(frozen=True, slots=True)
class FileFolder:
    """A folder of orcs' own files."""

    path: Path


def parse_url(url: str) -> Address | EmbeddedFolder | MemoryName | FileFolder:
    """Read a store's URL (the table in README).

    Raises:
        ValueError: an unknown scheme or query argument, a malformed part. The message never repeats the URL, since
            it may hold a password.

    """
    parsed = _split(url)
    if parsed is None:  # raised here, since the exceptions that say why quote the URL
        raise ValueError("malformed store URL (special characters in a password are percent-encoded)")
    parts, port = parsed
    query = _query(parts)
    match parts.scheme:
        case "redis" | "rediss":
            database = parts.path.strip("/") or "0"
            if not (database.isascii() and database.isdigit()):
                raise ValueError("the path of a redis:// URL is the number of a database")
            tls = _tls(query) if parts.scheme == "rediss" else None
            if tls is None and query.keys() - {"protocol"}:
                raise ValueError("TLS files go with rediss://")
            return Address(
                host=parts.hostname or "localhost",
                port=6379 if port is None else port,
                tls=tls,
                username=_unquoted(parts.username),
                password=_unquoted(parts.password),
                db=int(database),
                protocol=_protocol(query),
            )
        case "unix":
            if query.keys() - {"protocol"}:
                raise ValueError("TLS files go with rediss://")
            if parts.hostname or not parts.path:
                raise ValueError("unix:// takes an absolute path: unix:///run/redis.sock")
            return Address(
                path=unquote(parts.path),
                username=_unquoted(parts.username),
                password=_unquoted(parts.password),
                protocol=_protocol(query),
            )
        case "embedded" | "file" | "memory":
            if query or parts.fragment:
                raise ValueError(f"{parts.scheme}: takes no query")
            if parts.scheme == "memory":
                return MemoryName(unquote(parts.netloc + parts.path))
            if parts.netloc:
                raise ValueError(f"{parts.scheme}: takes an absolute path: {parts.scheme}:///path/to/dir")
            path = Path(unquote(parts.path)).expanduser() if parts.path else None
            if parts.scheme == "embedded":
                return EmbeddedFolder(path)
            if path is None:
                raise ValueError("file: takes a folder: file:///path/to/dir")
            return FileFolder(path)
        case _:
            raise ValueError("unknown scheme of a store URL: redis, rediss, unix, embedded, memory or file are known")


def _split(url: str) -> tuple[SplitResult, int | None] | None:
    try:
        parts = urlsplit(url)
        if "\0" in unquote(url) or not url.encode():
            return None
        return parts, parts.port
    except (ValueError, AttributeError, TypeError):
        return None


def _query(parts: SplitResult) -> dict[str, str]:
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    query = dict(pairs)
    if len(query) < len(pairs):
        raise ValueError("a query argument of the store URL is given twice")
    if query.keys() - _QUERY:  # not named: after a password with a ? in it, they are its rest
        raise ValueError(f"query arguments of a store URL are {', '.join(sorted(_QUERY))}")
    return query


def _protocol(query: Mapping[str, str]) -> int:
    if query.get("protocol", "3") not in ("2", "3"):
        raise ValueError("protocol is 2 or 3")
    return int(query.get("protocol", "3"))


def _tls(query: Mapping[str, str]) -> ssl.SSLContext:
    if "ssl_keyfile" in query and "ssl_certfile" not in query:
        raise ValueError("ssl_keyfile goes with ssl_certfile")
    try:
        context = ssl.create_default_context(cafile=query.get("ssl_ca_certs"))
        if "ssl_certfile" in query:
            # With a password, even a wrong one, OpenSSL doesn't ask for it on the terminal.
            context.load_cert_chain(query["ssl_certfile"], query.get("ssl_keyfile"), password="")
    except PermissionError as exc:
        raise PermissionDeniedError("a TLS file can't be read") from exc
    except (OSError, ssl.SSLError) as exc:
        raise ValueError(f"a TLS file can't be used: {type(exc).__name__}") from exc
    return context


def _unquoted(text: str | None) -> str | None:
    return None if text is None else unquote(text)
