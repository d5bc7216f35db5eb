"""What a URL means: a server's address, an embedded server's folder, a name in this process, or a folder of files."""

from __future__ import annotations

import contextlib
import inspect
import ipaddress
import os
import re
import ssl
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeAlias
from urllib.parse import unquote_to_bytes

from ..errors import PermissionDeniedError
from ..interrupts import raise_interruption
from ..protocol.attempts import ConnectionLost, check_server, translate
from ..protocol.commands import Command, Reply, as_error

__all__ = [
    "Address",
    "Credentials",
    "EmbeddedFolder",
    "FileFolder",
    "MemoryName",
    "ServerTarget",
    "Target",
    "parse_url",
    "resolve",
]

Credentials: TypeAlias = Callable[[], tuple[str | None, str]]
"""Gives the user name (None: the default user) and the password."""

_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
# By scheme, which arguments its query may have. A new scheme has its target here; opening.py, stores/options.py and
# docs/reference/options.md name it.
_QUERY_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "redis": (),
    "rediss": _TLS_FILES,
    "valkey": (),
    "valkeys": _TLS_FILES,
    "unix": ("db",),
    "embedded": (),
    "memory": (),
    "file": (),
}
_ENCODING_HINT = " (special characters in a password are percent-encoded)"
_NOT_IN_A_HOST = re.compile(r"[^\w.-]")
_BROKEN_ESCAPE = re.compile("%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, slots=True)
class Address:
    """Where one server listens, and what a connection's handshake needs. The password stays out of its repr."""

    kind: ClassVar[str] = "server"

    host: str = "localhost"
    port: int = 6379
    path: str | None = None  # of a unix socket, instead of host and port
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    db: int = 0
    credentials: Credentials | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"

    def handshake(self) -> list[Command]:
        """Return the commands that begin a connection: HELLO is allowed to every user, SELECT is not.

        Raises:
            ConnectionLost: `credentials` raised an OSError.
            PermissionDeniedError: it raised another error, or gave something else.

        """
        username, password = self.username, self.password
        if self.credentials is not None:
            username, password = _call_credentials(self.credentials)
        hello: list[str] = ["HELLO", "3"]
        if password is not None or username is not None:
            hello += ["AUTH", username or "default", password or ""]
        hello += ["SETNAME", "orcs-redis"]
        return [tuple(hello), ("SELECT", str(self.db))] if self.db else [tuple(hello)]

    @staticmethod
    def check(replies: list[Reply]) -> None:
        """Judge the replies to `handshake`.

        Raises:
            UnsupportedServerError: older than Redis 7.0 or Valkey 7.2, or a cluster's node.
            PermissionDeniedError: wrong user or password.
            AttemptError: not now.

        """
        for reply in replies:
            text = as_error(reply)
            if text is None:
                continue
            raise translate(text, opening=True)
        check_server(replies[0])


def _call_credentials(credentials: Credentials) -> tuple[str | None, str]:
    try:
        given: object = credentials()
    except OSError as exc:  # a service that is asked for them, say: it may be there at the next attempt
        raise_interruption(exc)
        raise ConnectionLost(f"credentials raised {type(exc).__name__}", sent=False) from exc
    except Exception as exc:
        raise_interruption(exc)
        raise PermissionDeniedError(f"credentials raised {type(exc).__name__}") from exc
    match given:
        case (str() | None as username, str() as password):
            return username, password
    if inspect.iscoroutine(given):
        given.close()
    raise PermissionDeniedError("credentials must return a user name (or None) and a password")


@dataclass(frozen=True, slots=True)
class EmbeddedFolder:
    """The folder of an embedded server; None: the default one."""

    kind: ClassVar[str] = "embedded"

    path: Path | None


@dataclass(frozen=True, slots=True)
class MemoryName:
    """A fakeredis in this process; shared by name, unless the name is empty."""

    kind: ClassVar[str] = "memory"

    name: str


@dataclass(frozen=True, slots=True)
class FileFolder:
    """A folder of orcs' own files."""

    kind: ClassVar[str] = "files"

    path: Path


ServerTarget: TypeAlias = Address | EmbeddedFolder | MemoryName
Target: TypeAlias = ServerTarget | FileFolder


class _Parts(NamedTuple):
    """A URL's parts."""

    scheme: str
    authority: str | None  # what follows `//`, encoded still; None without it
    path: str
    query: Mapping[str, str]


def resolve(url: str | None) -> Target:
    """Read a URL; without one, that of $ORCS_REDIS_URL, else an embedded server in the default folder."""
    return parse_url(url if url is not None else os.environ.get("ORCS_REDIS_URL") or "embedded:")


def parse_url(url: str) -> Target:
    """Read a store's URL (the table in docs/reference/options.md).

    Raises:
        TypeError: it is no str.
        ValueError: an unknown scheme or query argument, a malformed part, or a password with characters that are to be
            percent-encoded. The message never repeats the URL.
        PermissionDeniedError: a TLS file can't be read.

    """
    if not isinstance(url, str):
        raise TypeError("the URL of a store is a str")
    parts = _split(url)
    match parts.scheme:
        case "unix":
            return _unix(parts)
        case "memory":
            return MemoryName(_decoded(parts.authority or "") + parts.path)
        case "embedded" if not parts.authority and not parts.path:
            return EmbeddedFolder(None)
        case "embedded" | "file":
            if parts.authority or not parts.path.startswith("/"):
                raise ValueError(f"{parts.scheme}: takes an absolute path: {parts.scheme}:///path/to/dir")
            return (EmbeddedFolder if parts.scheme == "embedded" else FileFolder)(Path(parts.path))
        case _:
            return _network(parts)


def _split(url: str) -> _Parts:
    scheme, _, rest = url.partition(":")
    scheme = scheme.lower()
    if scheme not in _QUERY_ARGUMENTS:
        raise ValueError(f"unknown scheme of a store URL: {', '.join(_QUERY_ARGUMENTS)} are known")
    if "#" in rest or any(unicodedata.category(char) in ("Cc", "Cs") for char in rest):
        raise ValueError(f"a store URL has no fragment, control characters or surrogates{_ENCODING_HINT}")
    rest, has_query, query = rest.partition("?")
    authority: str | None = None
    if rest.startswith("//"):
        authority, slash, rest = rest[2:].partition("/")
        rest = slash + rest
    if authority and "@" in authority and "@" in rest:  # which of them ends the password?
        raise ValueError(f"an @ in the path of a store URL is written %40{_ENCODING_HINT}")
    path = _decoded(rest)
    if "\0" in path:
        raise ValueError("a path has no NUL")
    return _Parts(scheme, authority, path, _query(scheme, query) if has_query else {})


def _query(scheme: str, text: str) -> dict[str, str]:
    known = _QUERY_ARGUMENTS[scheme]
    query: dict[str, str] = {}
    for argument in text.split("&"):
        name, _, value = argument.partition("=")
        # Not named: after a password with a ? in it, they are its rest.
        if name not in known or name in query or "@" in value:
            takes = f"these arguments, each once: {', '.join(known)}" if known else "no query arguments"
            raise ValueError(f"a {scheme}: URL takes {takes}{_ENCODING_HINT}")
        query[name] = _decoded(value)
    return query


def _network(parts: _Parts) -> Address:
    username, password, place = _authority(parts)
    if place.startswith("["):
        host, bracket, port = place[1:].partition("]")
        valid = bracket and port[:1] in ("", ":") and _is_ipv6(host)
        port = port[1:]
    else:
        host, _, port = place.partition(":")
        valid = not _NOT_IN_A_HOST.search(host)
    if not valid or not _is_number(port or "0", 65535):
        raise ValueError(f"malformed host or port in a store URL{_ENCODING_HINT}")
    if username is not None and not host:
        raise ValueError("user name and password go with a host")
    return Address(
        host=host.lower() or "localhost",
        port=int(port or 6379),
        tls=_tls(parts.query) if parts.scheme in ("rediss", "valkeys") else None,
        username=username,
        password=password,
        db=_database(parts.path.removeprefix("/") or "0"),
    )


def _unix(parts: _Parts) -> Address:
    username, password, host = _authority(parts)
    if host or not parts.path.strip("/"):
        raise ValueError(f"unix: takes an absolute path: unix:///run/redis.sock{_ENCODING_HINT}")
    return Address(path=parts.path, username=username, password=password, db=_database(parts.query.get("db", "0")))


def _authority(parts: _Parts) -> tuple[str | None, str | None, str]:
    """Return user name and password, decoded, and what follows them."""
    if parts.authority is None:
        raise ValueError(f"a {parts.scheme}: URL begins with {parts.scheme}://")
    user, at, place = parts.authority.rpartition("@")
    if not at:
        return None, None, place
    name, colon, password = user.partition(":")
    return _decoded(name), _decoded(password) if colon else None, place


def _decoded(text: str) -> str:
    """Decode what is percent-encoded; what can't be meant so is refused."""
    if not _BROKEN_ESCAPE.search(text):
        with contextlib.suppress(UnicodeDecodeError):
            return unquote_to_bytes(text).decode()
    raise ValueError(f"malformed percent-encoding in a store URL: a % itself is written %25{_ENCODING_HINT}")


def _database(text: str) -> int:
    if not _is_number(text, 2**31):
        raise ValueError(f"the database of a store URL is a number: redis://host/0, unix:///path?db=0{_ENCODING_HINT}")
    return int(text)


def _is_number(text: str, most: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 12 and int(text) <= most


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


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
