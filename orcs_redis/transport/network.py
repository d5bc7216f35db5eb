"""How a server is reached: a name's addresses, a connected socket, and what is said of a failure."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ..errors import StorageError, UnavailableError
from ..interrupts import raise_interruption
from ..protocol.attempts import AttemptError, AttemptTimeout, ConnectionLost
from .address import Address

__all__ = ["in_thread", "open_socket", "reason_of", "unreachable"]

T = TypeVar("T")

_STAGGER = 0.1  # seconds until a name's next address is tried beside those before it


def open_socket(address: Address, expires: float) -> socket.socket:
    """Return a connected socket, before `expires` in seconds of `time.monotonic`.

    All addresses of a name are tried side by side: the next one begins after a short while, or when one has failed.

    Raises:
        OSError: there is no such name, or nothing that can be connected to in time.

    """
    if address.path is not None:
        connected = _socket(socket.AF_UNIX)
        try:
            connected.settimeout(max(0.001, expires - time.monotonic()))
            connected.connect(address.path)
        except BaseException:
            connected.close()
            raise
        return connected
    addresses = _resolve(address.host, address.port, expires)
    attempts: list[socket.socket] = []
    try:
        connected = _first_connected(addresses, expires, attempts)
        attempts.remove(connected)
    finally:
        for attempt in attempts:
            attempt.close()
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


def _socket(family: int) -> socket.socket:
    """Return a new socket, never with the descriptor of a closed standard stream: what is printed would be sent."""
    made = socket.socket(family, socket.SOCK_STREAM)
    if made.fileno() > 2:
        return made
    with made:
        return socket.socket(family, socket.SOCK_STREAM, fileno=fcntl.fcntl(made.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))


def _first_connected(addresses: list[tuple[int, Any]], expires: float, attempts: list[socket.socket]) -> socket.socket:
    failure: OSError = TimeoutError("timed out")
    due = 0.0  # when the next address is tried
    with selectors.DefaultSelector() as selector:
        while addresses or selector.get_map():
            now = time.monotonic()
            if now >= expires:
                raise TimeoutError("timed out")
            if addresses and (now >= due or not selector.get_map()):
                family, target = addresses.pop(0)
                due = now + _STAGGER
                try:
                    attempts.append(_socket(family))
                    attempts[-1].setblocking(False)
                    attempts[-1].connect(target)
                except BlockingIOError as error:
                    raise_interruption(error)
                    selector.register(attempts[-1], selectors.EVENT_WRITE)
                except OSError as error:  # this family is not to be had here, say
                    raise_interruption(error)
                    failure, due = error, now
                    continue
                else:
                    return attempts[-1]
            for key, _ in selector.select((min(expires, due) if addresses else expires) - time.monotonic()):
                attempt: Any = key.fileobj
                code = attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code == 0:
                    return attempt  # type: ignore[no-any-return]  # what was registered
                selector.unregister(attempt)
                failure, due = OSError(code, os.strerror(code)), 0.0
    raise failure


def _resolve(host: str, port: int, expires: float) -> list[tuple[int, Any]]:
    """Return a name's addresses, the families in turn, beginning with the one that the system prefers."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:  # a name: looking it up can't be interrupted
        lookup = _started(socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM)
        found = lookup.result(max(0.001, expires - time.monotonic()))
    by_family: dict[int, list[tuple[int, Any]]] = {}
    for family, _, _, _, target in found:
        by_family.setdefault(family, []).append((family, target))
    rounds = itertools.zip_longest(*by_family.values())
    return [candidate for each in rounds for candidate in each if candidate is not None]


async def in_thread(function: Callable[..., T], *arguments: Any, discard: Callable[[T], object]) -> T:
    """Call a function in a dedicated thread, since the loop's own may all be busy.

    A caller that is cancelled does not wait for it; `discard` then gets the result.
    """
    future = _started(function, *arguments)
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        future.add_done_callback(lambda done: done.exception() or discard(done.result()))
        raise


def _started(function: Callable[..., T], *arguments: Any) -> Future[T]:
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = function(*arguments)
        except BaseException as error:  # raised where the result is waited for
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="orcs-redis", daemon=True).start()
    return future


def reason_of(error: BaseException) -> str:
    """Return why something failed: the first reason that is known among an error and those that led to it."""
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"certificate refused: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError) and cause.reason:
            return f"TLS: {cause.reason.replace('_', ' ').lower()}"
        if isinstance(cause, OSError) and cause.errno is not None:
            return str(cause.strerror) if isinstance(cause, socket.gaierror) else os.strerror(cause.errno)
        if isinstance(cause, TimeoutError):
            return "timed out"
        if _is_too_long(cause):
            return str(cause)
    return type(error).__name__


def unreachable(where: object, error: Exception) -> ConnectionLost | UnavailableError:
    """Return what it means that no connection could be opened: a certificate or path that is wrong remains so."""
    reason = str(error) if isinstance(error, (AttemptError, StorageError)) else reason_of(error)
    text = f"no connection to {where}: {reason}"
    if any(isinstance(cause, ssl.SSLCertVerificationError) or _is_too_long(cause) for cause in _causes(error)):
        return UnavailableError(text)
    return (AttemptTimeout if isinstance(error, (TimeoutError, AttemptTimeout)) else ConnectionLost)(text, sent=False)


def _is_too_long(error: BaseException) -> bool:
    """Whether it is of a unix socket's path, which has no error number."""
    return type(error) is OSError and "path too long" in str(error)


def _causes(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes
