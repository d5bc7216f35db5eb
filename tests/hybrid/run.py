"""Many runs, one after the other, and a report of them."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from orcs_redis.transport import clients

from .machine import instrumented
from .model import Violation
from .plants import Plant
from .world import World

__all__ = ["Found", "Report", "one", "run"]

_MEMORY = Path("/dev/shm")  # a disk would be synced at each write


@dataclass
class Found:
    """A rule that was broken."""

    rule: str
    text: str
    seed: int


@dataclass
class Report:
    """What came of the runs."""

    runs: int = 0
    acts: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[Found] = field(default_factory=list)

    def __str__(self) -> str:
        rules = Counter(found.rule for found in self.violations)
        broken = ", ".join(f"{rule} {count}" for rule, count in sorted(rules.items())) or "none"
        done = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        return f"{self.runs} runs, {self.acts} acts, {self.seconds:.0f} s; {done}; violations: {broken}"


def one(
    seed: int, acts: int, machines: int, plant: Plant | None = None, *, trace: bool = False
) -> tuple[list[str], Counter[str], Found | None]:
    """Do one run; return its trace, what was counted, and what was found."""
    folder = Path(tempfile.mkdtemp(prefix="hybrid-", dir=_MEMORY if _MEMORY.is_dir() else None))
    known = {*clients._memories}
    found = None
    lines: list[str] = []
    counts: Counter[str] = Counter()
    try:
        with contextlib.nullcontext() if plant is None else plant.patch(), instrumented():
            world = World(folder, seed, machines, trace=trace)
            lines, counts = world.lines, world.counts
            try:
                world.run(acts)
            except Violation as violation:
                found = Found(violation.rule, str(violation), seed)
            except Exception:
                found = Found("crash", traceback.format_exc(limit=-6), seed)
            finally:
                world.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for name in {*clients._memories} - known:
            del clients._memories[name]
    return lines, counts, found


def run(
    seed: int,
    runs: int,
    acts: int,
    machines: int = 3,
    plant: Plant | None = None,
    *,
    progress: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Do runs of the seeds from `seed` on. A planted fault ends it once it is found."""
    report = Report()
    began = time.monotonic()
    for number in range(seed, seed + runs):
        _, counts, found = one(number, acts, machines, plant)
        report.runs += 1
        report.acts += acts
        report.counts += counts
        report.seconds = time.monotonic() - began
        if found is not None:
            report.violations.append(found)
            if plant is not None:
                break
        progress(report)
    return report


def digest(lines: list[str]) -> str:
    """Return a digest of a trace."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
