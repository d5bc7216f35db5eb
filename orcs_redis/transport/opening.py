"""From what a URL means to a link, asyncio and blocking. redis-py and the embedded server are imported when needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from .address import Address, EmbeddedFolder, FileFolder, MemoryName, Target
from .base import AsyncLink, BlockingLink
from .connection import Link
from .network import in_thread
from .sockets import SocketLink

if TYPE_CHECKING:
    from .embedded import Attachment

__all__ = ["Connecting", "open_blocking_link", "open_link"]


class Connecting(NamedTuple):
    """What is to be reached, and what the way there needs of a store's options."""

    target: Target | None  # None: the client
    client: Any
    deadline: float
    heartbeat: float
    max_connections: int
    on_connect: Callable[[], object]


async def open_link(connecting: Connecting) -> tuple[AsyncLink, Attachment | None]:
    """Return a link for asyncio, and the hold on the embedded server that it leads to, if it does."""
    target, client, deadline, _, _, on_connect = connecting
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
        case FileFolder():
            raise ValueError("file: is a LocalFileStore's: use open_store")
        case None:
            from .clients import AsyncClientLink

            return AsyncClientLink(client, deadline, on_connect=on_connect), None


def open_blocking_link(connecting: Connecting) -> tuple[BlockingLink, Attachment | None]:
    """Return a blocking link: see `open_link`."""
    target, client, deadline, _, most, on_connect = connecting
    match target:
        case Address() as address:
            return SocketLink(address, deadline, max_connections=most, on_connect=on_connect), None
        case EmbeddedFolder(path):
            from .embedded import attach

            attachment = attach(path, deadline)
            where = Address(path=str(attachment.socket))
            link = SocketLink(where, deadline, attachment.ensure, max_connections=most, on_connect=on_connect)
            return link, attachment
        case MemoryName(name):
            from .clients import BlockingClientLink, memory_client

            fake = memory_client(name, "FakeRedis")
            return BlockingClientLink(fake, deadline, max_connections=most, owned=True, on_connect=on_connect), None
        case FileFolder():
            raise ValueError("file: is a LocalFileStore's: use open_store")
        case None:
            from .clients import BlockingClientLink

            return BlockingClientLink(client, deadline, max_connections=most, on_connect=on_connect), None
