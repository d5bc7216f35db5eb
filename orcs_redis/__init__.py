"""The shared session store for fleets of AI agents, over plain Redis or Valkey.

The blocking twin of everything here is in `orcs_redis.sync`.
"""

from . import names
from .names import *  # noqa: F403  # they are listed there, once
from .stores.base import SessionStore
from .stores.files import LocalFileStore
from .stores.leasing import Lease
from .stores.redis import RedisSessionStore, open_store

__all__ = [*names.__all__, "Lease", "LocalFileStore", "RedisSessionStore", "SessionStore", "open_store"]
