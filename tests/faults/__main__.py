"""Run the fault tier by hand: python -m tests.faults --seconds 600 --seed 1 --json."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

from .chaos import FAULTS
from .plants import PLANTS
from .run import Report, check_folder, run


def progress(seconds: float, ended: threading.Event) -> None:
    """Show on stderr how far it is."""
    begin = time.monotonic()
    while not ended.wait(1 if sys.stderr.isatty() else 30):
        passed = min(time.monotonic() - begin, seconds)
        print(f"{passed:.0f} of {seconds:.0f} s", end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr)


def show(report: Report, *, as_json: bool) -> None:
    print(json.dumps(asdict(report)) if as_json else report, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, help="default: a random one")
    parser.add_argument("--runs", type=int, default=1, help="so many seeds, one after the other")
    parser.add_argument("--faults", help=f"only these, separated by commas, of {', '.join(FAULTS)}")
    plant = f"a mistake of the workers' stores, which must be found: {', '.join(PLANTS)}; repeatable"
    parser.add_argument("--plant", action="append", choices=PLANTS, default=[], metavar="NAME", help=plant)
    parser.add_argument("--naive-watchers", action="store_true", help="watchers on pub/sub alone; must be caught")
    parser.add_argument("--folder", type=Path, help="where the histories go; default: a temporary folder")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="only check what a run has left")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.check:
        report = check_folder(options.check)
        show(report, as_json=options.json)
        return 1 if report.violations else 0
    seed = random.randrange(2**32) if options.seed is None else options.seed
    base = options.folder or Path(tempfile.mkdtemp(prefix="orcs-redis-chaos-"))
    failed = False
    for number in range(seed, seed + options.runs):
        print(f"seed {number}", file=sys.stderr)
        ended = threading.Event()
        thread = threading.Thread(target=progress, args=(options.seconds, ended), daemon=True)
        thread.start()
        try:
            only = options.faults.split(",") if options.faults else None
            report = run(
                options.seconds,
                number,
                base / f"seed-{number}",
                plants=options.plant,
                naive_watchers=options.naive_watchers,
                only=only,
            )
        finally:
            ended.set()
            thread.join()
        show(report, as_json=options.json)
        failed |= bool(report.violations)
        if not report.violations and options.folder is None:
            shutil.rmtree(report.folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
