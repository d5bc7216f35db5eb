"""Run the simulation by hand: python -m tests.simulation --seconds 600."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path

from .plants import PLANTS
from .profiles import PROFILES
from .run import Report, one, run
from .server import Server


def show_progress(report: Report) -> None:
    """Show on stderr how far it is, about once a second."""
    global _shown
    now = time.monotonic()
    if now - _shown < (1 if sys.stderr.isatty() else 30):
        return
    _shown = now
    end = "\r" if sys.stderr.isatty() else "\n"
    print(
        f"{report.profile}: {report.schedules} schedules, {report.seconds:.0f} s ", end=end, file=sys.stderr, flush=True
    )


_shown = time.monotonic()


def table(reports: list[Report]) -> str:
    """Return a table of what came of each profile."""
    lines = [
        f"{'profile':10} {'schedules':>9} {'per s':>6} {'writes':>9} {'applied':>9} {'sent':>9} {'unknown':>8}"
        "  violations"
    ]
    for report in reports:
        counts = report.counts
        speed = report.schedules / max(report.seconds, 1e-9)
        broken = ", ".join(f"{found.rule} {found.schedules}" for found in report.violations.values()) or "none"
        lines.append(
            f"{report.profile:10} {report.schedules:9} {speed:6.0f} {counts['writes']:9} {counts['applied']:9} "
            f"{counts['transmissions']:9} {counts['OutcomeUnknownError']:8}  {broken}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="the first one; default: a random one")
    parser.add_argument("--schedules", type=int, help="of each profile; default: until the time is over")
    parser.add_argument("--seconds", type=float, help="for all profiles; default: 60, or no limit with --schedules")
    parser.add_argument("--profile", choices=[*PROFILES, "all"], default="all")
    parser.add_argument("--plant", choices=[*PLANTS, "all"], help="plant a fault; the exit status is 0 if it is caught")
    parser.add_argument("--server", help="path or name of a server's binary; default: that of embedded: URLs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trace", action="store_true", help="show each step; with --json only a digest of them")
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    profiles = list(PROFILES.values()) if options.profile == "all" else [PROFILES[options.profile]]
    binary = Path(shutil.which(options.server) or options.server) if options.server else None
    server = Server(binary)
    try:
        if options.plant:
            return plants(server, options, seed)
        if options.trace and not options.json:
            for profile in profiles:
                for number in range(seed, seed + (options.schedules or 1)):
                    world, found = one(server, profile, number, trace=True)
                    print(
                        "\n".join(
                            [f"{profile.name}, seed {number}", *world.lines, found.text if found else "no violation"]
                        )
                    )
            return 0
        print(f"seed {seed}", file=sys.stderr)
        whole = options.seconds or (float("inf") if options.schedules else 60.0)
        share = whole / len(profiles)
        reports = [
            run(server, profile, seed, options.schedules, share, trace=options.trace, progress=show_progress)
            for profile in profiles
        ]
    finally:
        server.close()
    if options.json:
        print(json.dumps([report.as_json() for report in reports]))
    else:
        print(table(reports))
        for report in reports:
            for found in report.violations.values():
                print(f"{report.profile}, seed {found.seed}, in {found.schedules} schedules: {found.text}")
    return int(any(report.violations for report in reports))


def plants(server: Server, options: argparse.Namespace, seed: int) -> int:
    """Plant one fault, or each; return whether one was missed."""
    missed = 0
    for plant in PLANTS.values() if options.plant == "all" else [PLANTS[options.plant]]:
        profile = PROFILES[plant.profile if options.profile == "all" else options.profile]
        report = run(server, profile, seed, options.schedules or plant.schedules, plant=plant)
        found = next(iter(report.violations.values()), None)
        missed += found is None
        text = f"{found.text:.120}" if found else "NOT CAUGHT"
        print(
            f"{plant.name:28} {profile.name:9} {report.schedules:5} schedules {report.seconds:6.2f} s  {text}",
            flush=True,
        )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
