"""The command line: `python -m benchmarks.peers`."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..report import environment
from ..servers import open_server
from . import plots, tables
from .catalogue import STORES
from .environments import ROOT, SetUpError, python_of, server_of, versions
from .interface import turn
from .results import Result

SHORT: dict[str, list[dict[str, Any]]] = {
    "append": [{"size": size, "repeats": 100, "seconds": 8} for size in (10, 100, 1000, 10_000)],
    "load": [{"size": size, "repeats": 50, "seconds": 4} for size in (50, 1000)],
    "newest": [{"size": size, "repeats": 20, "seconds": 4} for size in (1000, 10_000)],
    "tasks": [{"seconds": 0.6}],
    "fleet": [{"seconds": 1.0}],
    "notify": [{"repeats": 100}],
    "memory": [{"sessions": 200}],
}
FULL: dict[str, list[dict[str, Any]]] = {
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
    parser.add_argument("--out", type=Path, help="write result.json, tables and plots there")
    parser.add_argument("--report-only", action="store_true", help="tables and plots of --out's result.json, made anew")
    parser.add_argument("--environments", type=Path, default=ROOT / ".bench", help="where the stores are installed")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    console = Console(stderr=True, highlight=False)
    if options.report_only:
        result = msgspec.json.decode((options.out / "result.json").read_bytes(), type=Result)
    else:
        result = measure(options, console)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "result.json").write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
        (options.out / "tables.md").write_text(tables.markdown(result))
        plots.draw(result, options.out)
        console.print(f"written to {options.out}")
    if options.json:
        sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
    else:
        tables.show(result, Console(width=None if sys.stdout.isatty() else 200))


def measure(options: argparse.Namespace, console: Console) -> Result:
    """Let the stores take turns, each round with a fresh server and process."""
    plan = FULL if options.full else SHORT
    plan = {name: calls for name, calls in plan.items() if not options.workload or name in options.workload}
    rounds = options.rounds or (5 if options.full else 3)
    result = Result(full=options.full, rounds=rounds, **environment())
    with open_server("redis") as server:
        result.machine["server"] = server.version
    pythons: dict[str, Path] = {}
    for name in options.store or STORES:
        entry = STORES[name]
        console.print(f"[dim]environment of {name}[/]")
        try:
            pythons[name] = python_of(entry, options.environments)
        except SetUpError as error:
            result.absent[name] = f"it could not be installed: {error}"
            continue
        installed = versions(pythons[name])
        wanted = [requirement.partition("==")[0].partition("[")[0] for requirement in entry.requirements]
        result.versions[name] = {
            package: installed[package] for package in (*wanted, "redis", "hiredis") if package in installed
        }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=rounds * len(pythons))
        for number in range(rounds):
            names = list(pythons)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                progress.update(task, description=f"round {number + 1}: {name}")
                for workload, numbers in one_round(name, pythons[name], plan).items():
                    result.samples.setdefault(workload, {}).setdefault(name, []).append(numbers)
                progress.advance(task)
            if "tasks" in plan:
                result.samples["tasks"].setdefault(LIMIT, []).append(redis_benchmark())
    if LIMIT in result.samples.get("tasks", {}):
        result.versions[LIMIT] = {}
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


def one_round(name: str, python: Path, plan: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Run a store's workloads in a process of its environment."""
    own = server_of(STORES[name], python)
    with open_server("redis", own) as server, tempfile.TemporaryDirectory(prefix="orcs-peers-") as folder:
        path = server.plain.removeprefix("unix://")
        job = {"module": STORES[name].module, "path": path, "url": server.plain, "folder": folder, "plan": plan}
        command = [str(python), "-m", "benchmarks.peers.worker", json.dumps(job)]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            return {"all": {"error": f"more than {TIME_LIMIT} s"}}
    if done.returncode:
        return {"all": {"error": (done.stderr.strip().splitlines() or ["it ended"])[-1][:200]}}
    answer: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    main()
