"""The stores, blocking: the same names as in `orcs_redis` without `async` and `await`.

from orcs_redis.sync import open_store
"""

from . import names
from .made.base import SessionStore
from .made.leasing import Lease
from .made.local import LocalFileStore
from .made.store import RedisSessionStore, open_store
from .names import *  # noqa: F403  # they are listed there, once

__all__ = [*names.__all__, "Lease", "LocalFileStore", "RedisSessionStore", "SessionStore", "open_store"]
