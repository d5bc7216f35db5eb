"""From what a URL means to a link, asyncio and blocking. redis-py and the embedded server are imported when needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from .address import Address, EmbeddedFolder, MemoryName, ServerTarget
from .base import AsyncLink, BlockingLink
from .connection import Link
from .network import in_thread
from .sockets import SocketLink

if TYPE_CHECKING:
    from .embedded import Attachment

__all__ = ["ConnectionSpec", "open_blocking_link", "open_link"]


class ConnectionSpec(NamedTuple):
    """What is to be reached, and what the way there needs of a store's options."""

    target: ServerTarget | None  # None: the client
    client: Any
    deadline: float
    heartbeat: float
    max_connections: int
    on_connect: Callable[[], object]


async def open_link(spec: ConnectionSpec) -> tuple[AsyncLink, Attachment | None]:
    """Return a link for asyncio, and the hold on the embedded server that it leads to, if it does."""
    target, client, deadline, _, _, on_connect = spec
    match target:
        case Address() as address:
            return Link(address, deadline, on_connect=on_connect), None
        case EmbeddedFolder(path):
            from .embedded import Attachment, attach

            attachment = await in_thread(attach, path, deadline, discard=Attachment.release)
            where = Address(path=str(attachment.socket))
            return Link(where, deadline, attachment.ensure, on_connect=on_connect), attachment
        case MemoryName(name):
            from .clients import AsyncClientLink, memory_client

            fake = memory_client(name, "FakeAsyncRedis")
            return AsyncClientLink(fake, deadline, owned=True, on_connect=on_connect), None
        case None:
            from .clients import AsyncClientLink

            return AsyncClientLink(client, deadline, on_connect=on_connect), None


def open_blocking_link(spec: ConnectionSpec) -> tuple[BlockingLink, Attachment | None]:
    """Return a blocking link: see `open_link`."""
    target, client, deadline, _, max_connections, on_connect = spec
    match target:
        case Address() as address:
            return SocketLink(address, deadline, max_connections=max_connections, on_connect=on_connect), None
        case EmbeddedFolder(path):
            from .embedded import attach

            attachment = attach(path, deadline)
            where = Address(path=str(attachment.socket))
            link = SocketLink(
                where, deadline, attachment.ensure, max_connections=max_connections, on_connect=on_connect
            )
            return link, attachment
        case MemoryName(name):
            from .clients import BlockingClientLink, memory_client

            fake = memory_client(name, "FakeRedis")
            return BlockingClientLink(
                fake, deadline, max_connections=max_connections, owned=True, on_connect=on_connect
            ), None
        case None:
            from .clients import BlockingClientLink

            return BlockingClientLink(client, deadline, max_connections=max_connections, on_connect=on_connect), None
