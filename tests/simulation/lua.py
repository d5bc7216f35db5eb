"""The scripts as a simulation runs them: their text is the package's, but for the clock and the limits."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from typing import NamedTuple

from orcs_redis import scripts
from orcs_redis.scripts import Script

NAMES = ("WRITE", "LEASE", "CHANGES", "CREATE", "PROBE", "LABEL", "PAGE")
NOW = "sim:now"  # the key of the virtual time, in ms

# The clock is virtual; it lies so far ahead that the server itself expires nothing.
_CLOCK = """
local redis = (function(redis)
  local function now() return tonumber(redis.call('GET', 'sim:now')) end
  local function virtual(run)
    return function(name, ...)
      if name == 'TIME' then
        local ms = now()
        return {string.format('%.0f', math.floor(ms / 1000)), string.format('%.0f', ms % 1000 * 1000)}
      elseif name == 'PEXPIRE' then
        local key, ttl = ...
        return run('PEXPIREAT', key, string.format('%.0f', now() + tonumber(ttl)))
      elseif name == 'PTTL' then
        local at = run('PEXPIRETIME', (...))
        return at < 0 and at or at - now()
      end
      return run(name, ...)
    end
  end
  return setmetatable({call = virtual(redis.call), pcall = virtual(redis.pcall)}, {__index = redis})
end)(redis)
"""


class Limits(NamedTuple):
    """What a partition keeps."""

    max_windows: int = 1000
    max_dedup_bytes: int = 1 << 20
    max_tombstones: int = 1000


class Edit(NamedTuple):
    """A planted fault in a script: a text, which must be there, and what is put in its place."""

    script: str
    old: str
    new: str


@functools.cache
def instrumented(limits: Limits, edit: Edit | None = None) -> Mapping[str, Script]:
    """Return the scripts, by their names in orcs_redis.scripts."""
    return {name: _instrumented(name, limits, edit if edit and edit.script == name else None) for name in NAMES}


def _instrumented(name: str, limits: Limits, edit: Edit | None) -> Script:
    original: Script = getattr(scripts, name)
    text = original.source.decode()
    for limit, value in limits._asdict().items():
        text, found = re.subn(rf"^( *local {limit.upper()} = )\d+", rf"\g<1>{value}", text, flags=re.MULTILINE)
        assert found or name != "WRITE", f"write.lua has no limit {limit.upper()}"
    if edit is not None:
        assert edit.old in text, f"{name.lower()}.lua has no {edit.old!r} any more: adapt the planted fault"
        text = text.replace(edit.old, edit.new)
    if name in ("WRITE", "LEASE"):
        text = _CLOCK + text
    script = object.__new__(Script)
    script.source = text.encode()
    script.sha = hashlib.sha1(script.source, usedforsecurity=False).hexdigest().encode()
    return script
