"""What happens in a schedule, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["PROFILES", "Profile"]

Weights: TypeAlias = dict[str, int]

_TURNS = {"start": 18, "send": 22, "arrive": 18, "reply": 16, "watch": 14, "tick": 6, "halt": 6}
_FAULTS = {
    "lose_sending": 2, "lose_reply": 4, "cut": 1, "give_up": 5, "revive": 2, "unreachable": 2, "refuse": 2, "cancel": 2,
    "renew": 2, "break_watch": 2, "lose_message": 1, "leave": 1, "take_away": 1, "spoil": 1, "pause": 2, "stall": 2,
}  # fmt: skip
_ALL = {
    "append": 5, "append_if": 1, "append_create": 1, "once": 2, "shift": 1, "pop": 2, "truncate": 1, "replace": 1,
    "touch": 1, "commit": 4, "records": 1, "fork": 2, "save_new": 1, "save": 1, "save_known": 4, "save_if": 1,
    "save_big": 1, "overwrite": 1, "edit": 2, "refresh": 2, "update": 2, "delete": 1, "delete_if": 1, "load": 2,
    "lease": 2, "release": 1, "changes": 1, "read_records": 1, "list": 1,
}  # fmt: skip
_RESTORES = {
    "watch": 6, "give_up": 8, "revive": 4, "snapshot": 3, "restore": 3, "catch_up": 4, "pause": 1,
}  # fmt: skip
_APPENDS = {"append": 6, "append_if": 1, "append_create": 1, "once": 1, "update": 1, "load": 1}
_SAVES = {
    "save_known": 6, "shift": 3, "save_if": 2, "save_new": 1, "save": 1, "save_big": 1, "overwrite": 1, "edit": 2,
    "refresh": 3, "update": 2, "load": 4, "append": 2, "commit": 2, "pop": 1, "delete": 1,
}  # fmt: skip
_COMMITS = {
    "commit": 8, "records": 4, "append": 2, "pop": 3, "once": 4, "truncate": 1, "replace": 2, "touch": 1, "fork": 2,
    "load": 1, "delete": 1, "read_records": 2, "list": 3,
}  # fmt: skip
_EXACTLY = {"load": 3, "save_if": 5, "save_known": 2, "append": 3, "commit": 1}
_SHIFTS = {"save_known": 4, "shift": 6, "load": 1}
_FORKS = {"fork": 6, "records": 4, "commit": 2, "append": 1, "pop": 1, "save_known": 1, "delete": 3}
_DELETIONS = {
    "delete": 3, "delete_if": 1, "save_new": 2, "save": 1, "save_known": 3, "refresh": 3, "append": 1, "commit": 2,
    "fork": 2, "load": 3, "changes": 1,
}  # fmt: skip
_CUTS = {"append": 4, "truncate": 4, "pop": 2, "commit": 2, "cut": 4}
_LEASES = {
    "lease": 5, "release": 2, "append": 3, "save": 1, "update": 1, "save_known": 1, "commit": 1, "pop": 1, "once": 1,
}  # fmt: skip
_LATE_CLAIMS = {"append": 4, "lease": 2, "save": 1}
_MOODS = (_ALL, _APPENDS, _SAVES, _COMMITS, _FORKS, _DELETIONS)


@dataclass(frozen=True)
class Profile:
    """Weights of what may happen; `moods` are those of what writers begin, of which a schedule has one."""

    name: str
    actions: Weights
    moods: tuple[Weights, ...] = _MOODS
    calm: bool = False
    evicts_windows: bool = False  # few windows are kept, so that they are evicted


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("calm", _TURNS, calm=True),
        Profile("faults", _TURNS | _FAULTS, (*_MOODS, _SHIFTS, _SHIFTS, _SHIFTS)),
        Profile(
            "watches",
            _TURNS | {"watch": 40, "break_watch": 3, "lose_message": 4, "lose_reply": 1},
            (_ALL, _DELETIONS),
        ),
        Profile(
            "windows",
            _TURNS | _FAULTS | {"watch": 2, "burst": 8, "renew": 1, "pause": 1, "lose_reply": 6},
            (_APPENDS, _APPENDS, _SAVES, _ALL),
            evicts_windows=True,
        ),
        Profile(
            "forgetting",
            {"start": 14, "send": 22, "arrive": 18, "reply": 10, "lose_reply": 8, "burst": 8, "tick": 2},
            (_APPENDS,),
            evicts_windows=True,
        ),
        Profile(
            "restores",
            _TURNS | _FAULTS | _RESTORES,
            (_APPENDS, _SAVES, _ALL, _EXACTLY),
        ),
        Profile(
            "abandoned",
            {"start": 24, "send": 26, "arrive": 9, "reply": 12, "tick": 2, "lose_sending": 2, "lose_reply": 2}
            | {"give_up": 8, "revive": 5, "cancel": 8, "renew": 3},
            (_APPENDS, _LATE_CLAIMS, _CUTS),
        ),
        Profile("clones", _TURNS | _FAULTS | {"clone": 3, "burst": 1}),
        Profile("leases", _TURNS | _FAULTS | {"start": 24, "tick": 10, "spoil": 3}, (_LEASES,)),
        Profile(
            "everything",
            _TURNS | _FAULTS | {"burst": 3, "snapshot": 2, "restore": 2, "catch_up": 2, "clone": 1},
            (*_MOODS, _LEASES),
            evicts_windows=True,
        ),
    )
}
