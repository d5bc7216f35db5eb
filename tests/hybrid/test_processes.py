"""Real processes: `orcs-redis sync --live`, two on a folder, and writers, killed at random moments."""

from __future__ import annotations

from pathlib import Path

from .processes import chaos


def test_nothing_is_lost_by_kill_9(tmp_path: Path) -> None:
    """All turns are once on both machines and in the shared store, whoever was killed when and whatever was cut off."""
    outcome = chaos(tmp_path, 1)
    assert outcome.faults == []
    assert outcome.kills >= 8
    assert sum(map(len, outcome.done.values())) >= 200
