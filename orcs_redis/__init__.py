"""The shared session store for fleets of AI agents, over plain Redis or Valkey.

The blocking twin of everything here is in `orcs_redis.sync`.
"""

from . import names
from .names import *  # noqa: F403  # they are listed there, once
from .stores.base import SessionStore
from .stores.files import LocalFileStore
from .stores.hybrid.store import HybridSessionStore
from .stores.leasing import Lease
from .stores.opening import open_store
from .stores.redis import RedisSessionStore

__all__ = [
    *names.__all__,
    "HybridSessionStore",
    "Lease",
    "LocalFileStore",
    "RedisSessionStore",
    "SessionStore",
    "open_store",
]
