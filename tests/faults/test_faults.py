"""Whatever fails: workers and watchers under faults, and the same with a mistake that has to be found.

$ORCS_REDIS_CHAOS_SECONDS shortens the runs, $ORCS_REDIS_CHAOS_SEED repeats one.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from .run import run

SECONDS = float(os.environ.get("ORCS_REDIS_CHAOS_SECONDS", "15"))
SEED = os.environ.get("ORCS_REDIS_CHAOS_SEED")


def new_seed() -> int:
    return int(SEED) if SEED else random.SystemRandom().randrange(2**32)


@pytest.mark.parametrize("run_number", [1, 2])
@pytest.mark.timeout(SECONDS + 120)
def test_exactly_once(run_number: int, tmp_path: Path) -> None:
    """Under faults every acknowledged write is there once, where its revision says, and no read is older than that.

    A popped turn is popped once, a part holds the last write to it, a save is refused only where two have changed one
    part, a refreshed asset is what is stored, and nothing that was deleted comes back.

    Watchers miss no session's last state and are told nothing twice, and a lease has one holder. No error says what
    isn't so, and in the end all workers write again.
    """
    seed = new_seed() + run_number - 1
    print(f"ORCS_REDIS_CHAOS_SEED={seed}")
    report = run(SECONDS, seed, tmp_path / "run")
    print(report)
    assert report.violations == []
    assert report.outcomes["ok"] > 5 * SECONDS  # also on a machine that has other work
    assert sum(report.faults.values()) > SECONDS / 4
    assert report.told > 5 * SECONDS
    assert report.resumed > SECONDS / 8
    assert report.grants > SECONDS / 8
    assert {"commit", "merge", "refresh", "replace", "amend", "fork", "records", "labelled"} <= report.kinds.keys()


@pytest.mark.timeout(240)
def test_naive_writer_is_caught(tmp_path: Path) -> None:
    """Workers that make up a new operation id for each attempt are found to double and to lie about conflicts."""
    found: set[str] = set()
    for attempt in range(6):  # what the faults meet is a matter of luck
        seed = new_seed() + attempt
        print(f"ORCS_REDIS_CHAOS_SEED={seed}")
        only = ["swallow", "mid-reply", "cut", "client-kill", "sigstop"]
        report = run(max(10, SECONDS / 2), seed, tmp_path / f"run-{attempt}", plants=["naive"], only=only)
        print(report)
        found |= report.rules.keys()
        if {"doubled", "gaps"} <= found:
            break
    assert {"doubled", "gaps"} <= found


@pytest.mark.timeout(240)
def test_mistakes_are_caught(tmp_path: Path) -> None:
    """A store is found that lies about denials, stays with a demoted server, or swallows what a handler raises."""
    found: set[str] = set()
    for attempt in range(6):
        seed = new_seed() + attempt
        print(f"ORCS_REDIS_CHAOS_SEED={seed}")
        plants, only = ["lying", "faithful", "swallowing"], ["failover", "rights", "signals"]
        report = run(8, seed, tmp_path / f"run-{attempt}", plants=plants, only=only)
        print(report)
        found |= report.rules.keys()
        if {"refused", "hasty", "swallowed"} <= found:
            break
    assert {"refused", "hasty", "swallowed"} <= found


@pytest.mark.parametrize(
    ("plant", "rule"),
    [
        ("greedy", "answer"),
        ("hasty", "answer"),
        ("late", "part"),
        ("whole", "lost turn"),
        ("forgiving", "answer"),
        ("vague", "conflict parts"),
        ("dull", "refreshed"),
        ("forgetful", "extra turn"),
    ],
)
@pytest.mark.timeout(240)
def test_mistakes_with_parts_are_caught(plant: str, rule: str, tmp_path: Path) -> None:
    """A store is found that pops, saves, refreshes or puts without asking what others have done meanwhile."""
    found: set[str] = set()
    for attempt in range(6):
        seed = new_seed() + attempt
        print(f"ORCS_REDIS_CHAOS_SEED={seed}")
        report = run(2, seed, tmp_path / f"run-{attempt}", plants=[plant], only=["cut"])
        print(report)
        found |= report.rules.keys()
        if rule in found:
            break
    assert rule in found


@pytest.mark.timeout(240)
def test_naive_watcher_is_caught(tmp_path: Path) -> None:
    """Watchers that know nothing but what pub/sub tells are found to miss what happened while they were cut off."""
    found: set[str] = set()
    of_some = False
    for attempt in range(6):
        seed = new_seed() + attempt
        print(f"ORCS_REDIS_CHAOS_SEED={seed}")
        only = ["cut", "client-kill", "pubsub-kill", "kill-9", "deaf"]
        report = run(max(8, SECONDS / 2), seed, tmp_path / f"run-{attempt}", naive_watchers=True, only=only)
        print(report)
        found |= report.rules.keys()
        assert {rule for rule in found if not rule.startswith("watch")} == set()
        assert report.told > 5 * SECONDS  # it is naive, and not deaf
        of_some |= any("watch-4" in violation for violation in report.violations)
        if "watch missed" in found and of_some:
            break
    assert "watch missed" in found
    assert of_some, "the one that listens to some sessions' own channels"
