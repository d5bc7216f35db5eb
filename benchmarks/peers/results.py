"""What comes out: every round's numbers, and what is told of them."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import msgspec

NOT_MEASURED = "not measured"


class Result(msgspec.Struct, kw_only=True):
    """The whole result; `samples` by workload and store, one mapping of numbers for each round."""

    date: str
    machine: dict[str, Any]
    full: bool
    rounds: int
    versions: dict[str, dict[str, str]] = {}
    absent: dict[str, str] = {}  # stores that were not measured, and why
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {}

    def stores(self) -> list[str]:
        """Return the stores that were measured, in the order of the catalogue."""
        return list(self.versions)

    def sizes(self, workload: str) -> list[int]:
        """Return the sizes at which a workload was measured."""
        return sorted(int(key.split()[1]) for key in self.samples if key.startswith(f"{workload} "))

    def cell(self, workload: str, store: str, name: str) -> Cell:
        """Return one number over all rounds."""
        rounds = self.samples.get(workload, {}).get(store, [])
        values = [numbers[name] for numbers in rounds if isinstance(numbers.get(name), (int, float))]
        if values:
            return Cell(statistics.median(values), min(values), max(values), "")
        reasons = [str(numbers.get(name) or numbers.get("error") or "") for numbers in rounds]
        if not rounds:
            reasons = [str(numbers.get("error", "")) for numbers in self.samples.get("all", {}).get(store, [])]
        return Cell(None, None, None, next(filter(None, reasons), NOT_MEASURED))


class Cell(NamedTuple):
    """A median with its spread, or the reason why there is none."""

    median: float | None
    least: float | None
    most: float | None
    reason: str
