"""Thousands of schedules break no rule, a seed repeats its schedule, and every planted fault is caught."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from .planting import Plant
from .plants import PLANTS
from .profiles import PROFILES, Profile
from .run import one, run
from .server import Server

SCHEDULES = 200  # of each profile


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_no_rule_is_broken(profile: Profile, server: Server) -> None:
    """Whatever the network, the processes and the server do, every rule holds."""
    report = run(server, profile, schedules=SCHEDULES)
    assert report.violations == {}, f"repeat it with --profile {profile.name} --trace --seed ..."
    assert report.schedules == SCHEDULES
    assert report.counts["applied"] > 3 * SCHEDULES


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_seed_repeats_its_schedule(profile: Profile, server: Server) -> None:
    """The same seed gives the same schedule, step by step, whatever ran before it; another one does not."""
    first, again, other = (one(server, profile, seed, trace=True)[0].lines for seed in (7, 7, 8))
    assert len(first) > 10
    assert first == again
    assert first != other


def test_another_process_repeats_it() -> None:
    """Two processes, which hash differently, run the same schedules."""
    command = [sys.executable, "-m", "tests.simulation", "--seed", "7", "--schedules", "10", "--trace", "--json"]
    runs = [
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": hashes}, capture_output=True, check=True)
        for hashes in ("1", "2")
    ]
    first, second = ([report["digest"] for report in json.loads(run.stdout)] for run in runs)
    assert len(set(first)) == len(PROFILES)
    assert first == second


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_planted_fault_is_caught(plant: Plant, server: Server) -> None:
    """Without the rule that the fault breaks, some schedule breaks a rule that callers rely upon."""
    report = run(server, PROFILES[plant.profile], schedules=plant.schedules, plant=plant)
    assert report.violations, f"nothing was found, though this does not hold: {plant.breaks}"
    assert not any("Traceback" in found.text for found in report.violations.values())
