"""The benchmarks, without a clock: figures print, the peers' workers work, and the report is that of the result."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import figures
from benchmarks.figures.bench import FIGURES, Bench
from benchmarks.peers import plots, tables
from benchmarks.peers.__main__ import one_round
from benchmarks.peers.catalogue import STORES
from benchmarks.peers.results import NOT_MEASURED, RESULTS, read
from benchmarks.servers import open_server

DOCS = Path(__file__).parents[1] / "docs"
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
    result = read()
    assert tables.markdown(result) == (RESULTS / "tables.md").read_text()
    for name in STORES:
        assert result.cell("fleet", name, "lost") != NOT_MEASURED


def test_the_plots_of_the_pages() -> None:
    """The plots that pages name are drawn from the committed numbers, in both shades."""
    named = {name for page in DOCS.rglob("*.md") for name in re.findall(r"<!-- plot: (.*) -->", page.read_text())}
    drawn = dict(plots.draw(read()))
    assert named
    assert {f"{name}-{shade}.svg" for name in named for shade in plots.INK} <= drawn.keys()
    assert all("<svg" in svg for svg in drawn.values())


@pytest.mark.parametrize("number", [3, 7, 11, 14, 31])
async def test_a_figure(number: int) -> None:
    """Figures of each theme print: what is compared is the same work, so nothing fails."""
    with open_server("redis") as server:
        found = await figures(number, Bench(server, True, print))
    assert found
    assert {figure.number for figure in found} == {number}


def test_the_figures_are_numbered() -> None:
    """Their numbers have no gap, and each says what it compares."""
    assert sorted(FIGURES) == list(range(1, len(FIGURES) + 1))
    assert all(measure.__doc__ for measure in FIGURES.values())
