"""`python -m benchmarks.contention`: many processes update one session.

16 processes call `update` 200 times each on one counter. Printed: the end value (3,200 or it is wrong), the time, and
how much longer the slowest process took than the mean.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from orcs_redis import SessionAsset, open_store

from .servers import open_server


async def work(url: str, namespace: str, rounds: int) -> None:
    def increment(asset: SessionAsset) -> None:
        asset.metadata["n"] = asset.metadata.get("n", 0) + 1

    async with open_store(url, namespace=namespace, deadline=30) as store:
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        begin = time.perf_counter()
        for _ in range(rounds):
            await store.update("s", increment)
        print(time.perf_counter() - begin, flush=True)


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


async def contention(url: str, namespace: str, workers: int, rounds: int) -> dict[str, Any]:
    async with open_store(url, namespace=namespace) as store:
        await store.save(SessionAsset(id="s"))
        command = [sys.executable, "-m", "benchmarks.contention", "--worker", url, namespace, str(rounds)]
        processes = [_start(command) for _ in range(workers)]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        begin = time.perf_counter()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        times = [float(process.communicate()[0]) for process in processes]
        total = time.perf_counter() - begin
        found = (await store.load("s")).metadata["n"]
    return {
        "workers": workers,
        "updates_each": rounds,
        "counted": found,
        "seconds": round(total, 2),
        "slowest_against_mean": round(max(times) / statistics.mean(times), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contention", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        url, namespace, rounds = arguments.worker
        asyncio.run(work(url, namespace, int(rounds)))
        return
    with open_server("redis") as server:
        result = {
            "server": server.version,
            "contention": asyncio.run(contention(server.url, server.namespace(), arguments.workers, arguments.rounds)),
        }
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        if isinstance(value, dict):
            for inner, figure in value.items():
                print(f"{name:18} {inner:32} {figure}")
        else:
            print(f"{name:18} {value}")


if __name__ == "__main__":
    main()
