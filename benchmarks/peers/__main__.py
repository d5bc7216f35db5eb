"""The command line: `python -m benchmarks.peers`."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, TypeAlias

from ..harness import in_turns
from ..processes import ROOT, Process, ProcessError
from ..report import Say, encode, environment, progress, show
from ..servers import open_server
from . import plots, tables
from .catalogue import STORES
from .environments import SetUpError, python_of, server_of, versions
from .interface import turn
from .results import Result, read
from .worker import Job

Plan: TypeAlias = dict[str, list[dict[str, Any]]]

SHORT: Plan = {
    "append": [{"size": size, "repeats": 100, "seconds": 8} for size in (10, 100, 1000, 10_000)],
    "load": [{"size": size, "repeats": 50, "seconds": 4} for size in (50, 1000)],
    "newest": [{"size": size, "repeats": 20, "seconds": 4} for size in (1000, 10_000)],
    "tasks": [{"seconds": 0.6}],
    "fleet": [{"seconds": 1.0}],
    "notify": [{"repeats": 100}],
    "memory": [{"sessions": 200}],
}
FULL: Plan = {
    "append": [{"size": size, "repeats": 300, "seconds": 30} for size in (10, 100, 1000, 10_000)],
    "load": [{"size": size, "repeats": 200, "seconds": 10} for size in (50, 1000)],
    "newest": [{"size": size, "repeats": 20, "seconds": 15} for size in (1000, 10_000, 100_000)],
    "tasks": [{"seconds": 2.0}],
    "fleet": [{"seconds": 4.0}],
    "notify": [{"repeats": 1000}],
    "memory": [{"sessions": 1000}],
}
LIMIT = "redis-benchmark"
TIME_LIMIT = 900  # seconds for one store in one round


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--full", action="store_true", help="longer lists, more repeats and rounds")
    parser.add_argument("--rounds", type=int, help="in which the stores take turns (3; 5 with --full)")
    parser.add_argument("--store", action="append", choices=list(STORES), help="only this; may be given twice")
    parser.add_argument("--workload", action="append", choices=list(SHORT), help="only this; may be given twice")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    parser.add_argument("--out", type=Path, help="write result.json, tables.md and plots/ there")
    parser.add_argument("--report-only", action="store_true", help="tables and plots of --out's result.json, made anew")
    parser.add_argument("--environments", type=Path, default=ROOT / ".bench", help="where the stores are installed")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    result = read(options.out) if options.report_only else measure(options, progress())
    if options.out is not None:
        folder = options.out / "plots"
        folder.mkdir(parents=True, exist_ok=True)
        (options.out / "result.json").write_bytes(encode(result))
        (options.out / "tables.md").write_text(tables.markdown(result))
        for name, svg in plots.draw(result):
            (folder / name).write_text(svg)
    show(result, tables.heading(result), tables.sheets(result), json=options.json)


def measure(options: argparse.Namespace, say: Say) -> Result:
    """Let the stores take turns, each round with a fresh server and process."""
    plan = FULL if options.full else SHORT
    plan = {name: calls for name, calls in plan.items() if not options.workload or name in options.workload}
    rounds = options.rounds or (5 if options.full else 3)
    result = Result(full=options.full, rounds=rounds, **environment())
    with open_server("redis") as server:
        result.machine["server"] = server.version
    pythons: dict[str, Path] = {}
    for name in options.store or STORES:
        say(f"environment of {name}")
        try:
            pythons[name] = python_of(STORES[name], options.environments)
        except SetUpError as error:
            result.absent[name] = f"it could not be installed: {error}"
            continue
        result.versions[name] = versions(STORES[name], pythons[name])
    total = rounds * len(pythons)
    for count, name in enumerate(in_turns(pythons, rounds), 1):
        say(f"{count} of {total}: {name}")
        for workload, numbers in one_round(name, pythons[name], plan).items():
            result.samples.setdefault(workload, {}).setdefault(name, []).append(numbers)
    if "tasks" in plan:
        result.versions[LIMIT] = {}
        result.samples.setdefault("tasks", {})[LIMIT] = [redis_benchmark() for _ in range(rounds)]
    return result


def redis_benchmark() -> dict[str, Any]:
    """Return what the server's own tool makes of the same commands, over 50 connections."""
    tool = shutil.which("redis-benchmark")
    if tool is None:
        return {"error": "no redis-benchmark on the PATH"}
    value = json.dumps(turn(1))
    rates = {}
    with open_server("redis") as server:
        server.client.rpush("turns", *[value] * 50)
        for name, command in (("append", ["RPUSH", "other", value]), ("load", ["LRANGE", "turns", "0", "-1"])):
            own = ["-s", server.plain.removeprefix("unix://"), "-c", "50", "-n", "50000", "--csv"]
            done = subprocess.run([tool, *own, *command], capture_output=True, text=True, check=True)
            rates[f"{name}_per_s"] = float(done.stdout.splitlines()[-1].rsplit('","', 7)[1])
    return rates


def one_round(name: str, python: Path, plan: Plan) -> dict[str, dict[str, Any]]:
    """Run a store's workloads in a process of its environment."""
    own = server_of(STORES[name], python)
    with open_server("redis", own) as server, tempfile.TemporaryDirectory(prefix="orcs-peers-") as folder:
        path = server.plain.removeprefix("unix://")
        job = Job(module=STORES[name].module, path=path, url=server.plain, folder=folder, plan=plan)
        with Process("benchmarks.peers.worker:plan", json.dumps(job), python=python) as process:
            try:
                answer: dict[str, dict[str, Any]] = process.answer(TIME_LIMIT)
            except ProcessError as error:
                return {"all": {"error": str(error)}}
    return answer


if __name__ == "__main__":
    main()
