"""The benchmark against peers, without a clock: its workers work, and the report is that of its result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.peers import tables
from benchmarks.peers.__main__ import one_round
from benchmarks.peers.catalogue import STORES
from benchmarks.peers.results import NOT_MEASURED, Result

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
PLAN: dict[str, list[dict[str, Any]]] = {
    "append": [{"size": 5, "repeats": 3, "seconds": 9}],
    "load": [{"size": 30, "repeats": 3, "seconds": 9}],
    "newest": [{"size": 60, "repeats": 2, "seconds": 9}],
    "fleet": [{"seconds": 0.2}],
    "notify": [{"repeats": 3}],
    "memory": [{"sessions": 3}],
}


@pytest.mark.parametrize("name", ["orcs_redis", "orcs_redis, blocking", "JSON blob", "orcs files", "bare redis-py"])
def test_a_round(name: str) -> None:
    """Every workload ends in numbers, or in the reason why there are none; ours loses and doubles nothing."""
    found = one_round(name, Path(sys.executable), PLAN)
    assert set(found) == {"append 5", "load 30", "newest 60", "fleet", "notify", "memory"}
    assert [numbers["error"] for numbers in found.values() if "error" in numbers] == []
    assert found["append 5"]["p50_us"] > 0
    assert found["memory"]["against_json"] > 0
    if name.startswith("orcs_redis"):
        assert found["newest 60"]["answer"] == "right"
        assert (found["fleet"]["lost"], found["fleet"]["doubled"], found["fleet"]["failed"]) == (0, 0, 0)
        assert found["notify"]["p50_us"] > 0


def test_the_report_is_of_the_result() -> None:
    """The committed tables are made from the committed numbers, which cover every store and workload."""
    result = msgspec.json.decode((RESULTS / "result.json").read_bytes(), type=Result)
    assert tables.markdown(result) == (RESULTS / "tables.md").read_text()
    for name in STORES:
        assert result.cell("fleet", name, "lost").reason != NOT_MEASURED
