"""Opening a store of any kind, for asyncio."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, overload

from ..model.asset import SessionAsset
from ..transport.address import FileFolder
from .disk import AnyPath
from .files import LocalFileStore
from .hybrid.store import HybridSessionStore
from .options import HybridArguments, OptionArguments, check_arguments
from .redis import RedisSessionStore

if TYPE_CHECKING:
    import redis.asyncio

__all__ = ["open_store"]

A = TypeVar("A", bound=SessionAsset)


@overload
def open_store(
    url: str | None = None, *, client: redis.asyncio.Redis | None = None, **options: Unpack[OptionArguments]
) -> AbstractAsyncContextManager[RedisSessionStore[SessionAsset]]: ...


@overload
def open_store(
    url: str | None = None,
    *,
    client: redis.asyncio.Redis | None = None,
    asset_type: type[A],
    **options: Unpack[OptionArguments],
) -> AbstractAsyncContextManager[RedisSessionStore[A]]: ...


@overload
def open_store(
    url: str | None = None, *, local: AnyPath, **options: Unpack[HybridArguments]
) -> AbstractAsyncContextManager[HybridSessionStore[SessionAsset]]: ...


@overload
def open_store(
    url: str | None = None, *, local: AnyPath, asset_type: type[A], **options: Unpack[HybridArguments]
) -> AbstractAsyncContextManager[HybridSessionStore[A]]: ...


@overload
def open_store(url: os.PathLike[str]) -> AbstractAsyncContextManager[LocalFileStore[SessionAsset]]: ...


@overload
def open_store(url: os.PathLike[str], *, asset_type: type[A]) -> AbstractAsyncContextManager[LocalFileStore[A]]: ...


@contextlib.asynccontextmanager
async def open_store(
    url: str | os.PathLike[str] | None = None,
    *,
    client: redis.asyncio.Redis | None = None,
    local: AnyPath | None = None,
    **options: Any,
) -> AsyncIterator[Any]:  # the overloads say what
    """Open a store for an `async with` block.

    Args:
        url: redis://, rediss://, valkey://, valkeys://, unix://, embedded:, memory:// or file:// (the docs' page of
            options has the table); without it and without a client, that of $ORCS_REDIS_URL, else `embedded:`. A
            folder's path, such as a `pathlib.Path`, and a file:// URL give a LocalFileStore, which has the methods of
            SessionStore only and takes no option but asset_type. Type checkers know that of a path, not of a URL.
        client: a redis-py asyncio client to use instead; it is never closed and never reconfigured.
        local: a folder of orcs' files: gives a HybridSessionStore, which works there and synchronises with the URL's
            store. Its further options are live, merge, prefer, keep_days, scan and on_sync. An unreachable server is no
            error then; what its constructor raises is.
        options: namespace ("orcs"); partitions (1 when the first write creates the namespace, else read from its
            descriptor); asset_type (SessionAsset); deadline for all that a call does (5.0 s); heartbeat for watches
            (5.0 s); max_asset_bytes (128 MiB) and max_turn_bytes (16 MiB), encoded; max_fields (1000) at an asset's top
            level; max_connections of a blocking store (64); credentials, a function that returns user name and
            password, and is called in this thread at each connecting.

    Raises:
        UnavailableError, PermissionDeniedError: no server within the deadline, or it denies access.
        UnsupportedServerError: older than Redis 7.0 or Valkey 7.2, or a cluster's node.
        LayoutError: the namespace is of another layout, or has another number of partitions.
        ValueError, TypeError: a URL, client or option that can't be, or that means nothing for this kind of store.

    """
    if local is not None:
        if client is not None or isinstance(url, os.PathLike):
            raise ValueError("with local= a store takes a URL")
        async with HybridSessionStore(local, url, **options) as hybrid:
            yield hybrid
        return
    checked, target = check_arguments("open_store", url, client, options)
    if isinstance(target, FileFolder):
        async with LocalFileStore(target.path, asset_type=checked.asset_type) as files:
            yield files
        return
    async with await RedisSessionStore._open(checked, target, client) as store:
        yield store
