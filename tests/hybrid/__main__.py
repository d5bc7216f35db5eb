"""Run the random test by hand: python -m tests.hybrid --runs 2000 --acts 80 --machines 3 --seed 1.

One run step by step: python -m tests.hybrid --seed 7 --acts 40 --trace.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from .plants import PLANTS
from .run import Report, digest, one, run

_shown = time.monotonic()


def show_progress(report: Report) -> None:
    """Show on stderr how far it is, about once a second."""
    global _shown
    now = time.monotonic()
    if now - _shown < (1 if sys.stderr.isatty() else 30):
        return
    _shown = now
    end = "\r" if sys.stderr.isatty() else "\n"
    print(f"{report.runs} runs, {report.seconds:.0f} s, {len(report.violations)} violations ", end=end, file=sys.stderr)
    sys.stderr.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hybrid", description=__doc__)
    parser.add_argument("--seed", type=int, help="the first one; default: a random one")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--acts", type=int, default=80)
    parser.add_argument("--machines", type=int, default=3)
    parser.add_argument("--plant", choices=[*PLANTS, "all"], help="plant a fault; the exit status is 0 if it is caught")
    parser.add_argument("--trace", action="store_true", help="show one run step by step")
    parser.add_argument("--digest", action="store_true", help="print a digest of each run's trace")
    parser.add_argument("--processes", action="store_true", help="real processes that are killed, in place of all this")
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    if options.processes:
        from .processes import run as run_processes

        return run_processes(seed, options.runs)
    if options.plant:
        return plants(options, seed)
    if options.trace or options.digest:
        plant = None
        for number in range(seed, seed + (options.runs if options.digest else 1)):
            lines, _, found = one(number, options.acts, options.machines, plant, trace=True)
            print(digest(lines) if options.digest else "\n".join(lines))
            if not options.digest:
                print(found.text if found else "no violation")
        return 0
    print(f"seed {seed}", file=sys.stderr)
    report = run(seed, options.runs, options.acts, options.machines, progress=show_progress)
    for found in report.violations:
        print(f"seed {found.seed}: {found.text}")
    print(report)
    return int(bool(report.violations))


def plants(options: argparse.Namespace, seed: int) -> int:
    """Plant one fault, or each; return whether one was missed."""
    missed = 0
    for plant in PLANTS.values() if options.plant == "all" else [PLANTS[options.plant]]:
        report = run(seed, plant.runs, options.acts, options.machines, plant)
        found = next(iter(report.violations), None)
        missed += found is None
        text = f"seed {found.seed} {found.text:.140}" if found else "NOT CAUGHT"
        print(f"{plant.name:28} {report.runs:4} runs {report.seconds:6.1f} s  {text}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
