"""What comes out: every round's numbers, and one cell of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from ..harness import Spread, spread

RESULTS = Path(__file__).parents[1] / "results"
"""The run that was committed last."""
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

    def cell(self, workload: str, store: str, name: str) -> Spread | str:
        """Return one number over all rounds, or the reason why there is none."""
        rounds = self.samples.get(workload, {}).get(store, [])
        values = [numbers[name] for numbers in rounds if isinstance(numbers.get(name), (int, float))]
        if values:
            return spread(values)
        rounds = rounds or self.samples.get("all", {}).get(store, [])
        reasons = [str(numbers.get(name) or numbers.get("error") or "") for numbers in rounds]
        return next(filter(None, reasons), NOT_MEASURED)

    def median(self, workload: str, store: str, name: str) -> float | None:
        """Return one number over all rounds, if there is one."""
        cell = self.cell(workload, store, name)
        return None if isinstance(cell, str) else cell.median


def read(folder: Path = RESULTS) -> Result:
    """Return the result in a folder."""
    return msgspec.json.decode((folder / "result.json").read_bytes(), type=Result)
