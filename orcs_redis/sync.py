"""The stores, blocking: the same names as in `orcs_redis` without `async` and `await`.

from orcs_redis.sync import open_store
"""

from . import names
from .names import *  # noqa: F403  # they are listed there, once
from .stores.blocking.base import SessionStore
from .stores.blocking.files import LocalFileStore
from .stores.blocking.hybrid import HybridSessionStore
from .stores.blocking.leasing import Lease
from .stores.blocking.opening import open_store
from .stores.blocking.redis import RedisSessionStore

__all__ = [
    *names.__all__,
    "HybridSessionStore",
    "Lease",
    "LocalFileStore",
    "RedisSessionStore",
    "SessionStore",
    "open_store",
]
