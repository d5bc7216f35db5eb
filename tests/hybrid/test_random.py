"""Short random runs break no rule, a seed repeats its run, and every planted fault is caught."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .plants import PLANTS, Plant
from .run import one, run

ACTS = 80


@pytest.mark.parametrize("seed", [1000, 2000, 3000, 4000])
def test_no_rule_is_broken(seed: int) -> None:
    """Whatever machines, peers and other programs do, and whatever fails, nothing is lost and all comes together."""
    report = run(seed, 25, ACTS)
    assert report.violations == [], f"repeat it with python -m tests.hybrid --acts {ACTS} --trace --seed ..."
    assert report.runs == 25


@pytest.mark.parametrize("machines", [1, 2, 5])
def test_any_number_of_machines(machines: int) -> None:
    """It is so for one machine, for two, and for many."""
    assert run(5000, 10, ACTS, machines).violations == []


def test_seed_repeats_its_run() -> None:
    """The same seed gives the same run, step by step; another one does not."""
    first, again, other = (one(seed, ACTS, 3, trace=True)[0] for seed in (7, 7, 8))
    assert len(first) > 100
    assert first == again
    assert first != other


def test_another_process_repeats_it() -> None:
    """Two processes, which hash differently, do the same runs."""
    command = [sys.executable, "-m", "tests.hybrid", "--seed", "7", "--runs", "5", "--digest"]
    first, second = (
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": hashes}, capture_output=True, check=True).stdout
        for hashes in ("1", "2")
    )
    assert len(first.split()) == 5
    assert first == second


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_planted_fault_is_caught(plant: Plant) -> None:
    """Without the rule that the fault breaks, some run breaks one that users rely upon."""
    report = run(1, plant.runs, ACTS, plant=plant)
    assert report.violations, f"nothing was found, though this does not hold: {plant.breaks}"
    assert report.violations[0].rule != "crash", report.violations[0].text
