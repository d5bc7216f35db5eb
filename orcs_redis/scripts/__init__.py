"""The Lua scripts, as package data: each file is headed by its keys, arguments and reply."""

from __future__ import annotations

import hashlib
import pkgutil
from typing import cast

__all__ = ["CHANGES", "CREATE", "LABEL", "LEASE", "PAGE", "PROBE", "WRITE", "Script"]


class Script:
    """A script's text and the SHA-1 by which a server knows it."""

    def __init__(self, name: str) -> None:
        # importlib.resources would take a tenth of the time to import the package.
        self.source = cast(bytes, pkgutil.get_data(__name__, f"{name}.lua"))
        self.sha = hashlib.sha1(self.source, usedforsecurity=False).hexdigest().encode()


CHANGES = Script("changes")
CREATE = Script("create")
LABEL = Script("label")
LEASE = Script("lease")
PAGE = Script("page")
PROBE = Script("probe")
WRITE = Script("write")
