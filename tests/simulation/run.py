"""Many schedules, one after the other, and a report of them."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .planting import Plant
from .profiles import Profile
from .rules import Violation
from .server import Server
from .world import World

__all__ = ["Found", "Report", "one", "run"]


@dataclass
class Found:
    """A rule that was broken."""

    rule: str
    text: str
    seed: int
    schedules: int = 1  # that broke it


@dataclass
class Report:
    """What came of the schedules of a profile."""

    profile: str
    seed: int
    schedules: int = 0
    seconds: float = 0.0
    digest: str = ""  # of the traces, if there were any
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    violations: dict[str, Found] = field(default_factory=dict)  # the first of each rule

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        violations = [vars(found) for found in self.violations.values()]
        return vars(self) | {"counts": dict(self.counts), "violations": violations}


def one(
    server: Server, profile: Profile, seed: int, plant: Plant | None = None, *, trace: bool = False
) -> tuple[World, Found | None]:
    """Run one schedule; return it, and what it found."""
    with contextlib.nullcontext() if plant is None else plant.planted():
        world = World(server, seed, profile, None if plant is None else plant.edit, trace=trace)
        try:
            world.run()
        except Violation as violation:
            return world, Found(violation.rule, str(violation), seed)
        except Exception:
            return world, Found("crash", traceback.format_exc(limit=-4), seed)
    return world, None


def run(
    server: Server,
    profile: Profile,
    seed: int = 0,
    schedules: int | None = None,
    seconds: float = float("inf"),
    plant: Plant | None = None,
    *,
    trace: bool = False,
    progress: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Run schedules of the seeds from `seed` on, so many or for so long. A planted fault ends it once it is found."""
    report = Report(profile.name, seed)
    began = time.monotonic()
    digest = hashlib.sha256()
    seeds: Iterable[int] = itertools.count(seed) if schedules is None else range(seed, seed + schedules)
    for number in seeds:
        if time.monotonic() - began > seconds:
            break
        world, found = one(server, profile, number, plant, trace=trace)
        report.schedules += 1
        report.counts += world.counts
        report.counts["writes"] += len(world.model.records)
        report.counts["applied"] += len(world.model.ever)
        if trace:
            digest.update("\n".join(world.lines).encode())
        if found is not None:
            known = report.violations.setdefault(found.rule, found)
            known.schedules += known is not found
            if plant is not None:
                break
        report.seconds = time.monotonic() - began
        progress(report)
    report.seconds = time.monotonic() - began
    report.digest = digest.hexdigest() if trace else ""
    return report
