"""One store in its own environment: `python -m benchmarks.peers.worker JSON`, where JSON is a `Job`; prints JSON.

Only the standard library and the store itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from . import workloads
from .interface import Store

WORKERS = 4


class Job(TypedDict, total=False):
    """What to do: `plan` names the workloads with their arguments; a further process has `fleet` or `listen`."""

    module: str
    path: str  # of the server's socket
    url: str
    folder: str
    plan: dict[str, list[dict[str, Any]]]
    fleet: dict[str, Any]
    listen: bool


def info(path: str) -> Callable[[str], dict[str, str]]:
    """Return a way to ask the server for a section of INFO."""

    def ask(section: str) -> dict[str, str]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            connection.sendall(f"INFO {section}\r\n".encode())
            data = b""
            while b"\r\n\r\n" not in data and not data.endswith(b"\r\n\r\n"):
                received = connection.recv(65536)
                data += received
                length = int(data[1 : data.index(b"\r\n")])
                if len(data) >= length + data.index(b"\r\n") + 4:
                    break
        return dict(line.split(":", 1) for line in data.decode().splitlines() if ":" in line)

    return ask


def used(folder: str) -> int:
    """Return the bytes of the files in a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


async def run(job: Job, adapter: Store, import_s: float) -> dict[str, Any]:
    """Do what the job says."""
    begin = time.perf_counter()
    await adapter.open(job["url"], job["folder"])
    open_s = time.perf_counter() - begin
    try:
        if job.get("listen"):
            await adapter.watch(lambda: print(time.perf_counter(), flush=True))  # one clock for all processes
        if "fleet" in job:
            begin = time.perf_counter()
            await adapter.load(f"fleet-{job['fleet']['worker']}-0")
            first_load_s = time.perf_counter() - begin
            print("ready", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            numbers = await workloads.fleet(adapter, **job["fleet"])
            return numbers | {"import_s": import_s, "open_s": open_s, "first_load_s": first_load_s}
        server = workloads.Server(None if adapter.serverless else info(job["path"]))
        results: dict[str, Any] = {}
        for name, calls in job["plan"].items():
            for arguments in calls:
                key = name + (f" {arguments['size']}" if "size" in arguments else "")
                print(key, file=sys.stderr, flush=True)
                try:
                    results[key] = await workload(job, adapter, server, name, arguments)
                except Exception as exc:
                    results[key] = {"error": f"{type(exc).__name__}: {str(exc)[:200]}"}
        return results
    finally:
        await adapter.close()


async def workload(
    job: Job, adapter: Store, server: workloads.Server, name: str, arguments: dict[str, Any]
) -> workloads.Numbers:
    """Do one workload."""
    if name == "memory":
        return await workloads.memory(adapter, server, used=lambda: used(job["folder"]), **arguments)
    if name == "notify":
        return await workloads.notify(adapter, listen=lambda: listener(job), **arguments)
    if name != "fleet":
        call = getattr(workloads, name)
        numbers: workloads.Numbers = await call(adapter, server, **arguments)
        return numbers
    await workloads.prepare_fleet(adapter, WORKERS)
    processes = [start(job | {"fleet": {"worker": n, "workers": WORKERS, **arguments}}) for n in range(WORKERS)]
    try:
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError("a process of the fleet failed to start")
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        outcomes = await asyncio.to_thread(lambda: [json.loads(process.communicate()[0]) for process in processes])
    finally:
        for process in processes:
            process.kill()
    return await workloads.judge(adapter, outcomes)


def listener(job: Job) -> tuple[Callable[[], None], Callable[[float], float | None]]:
    """Start a process that watches: see `workloads.notify`."""
    process = start(job | {"listen": True})
    arrivals: queue.Queue[float] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            arrivals.put(float(line))

    threading.Thread(target=read, daemon=True).start()

    def arrival(seconds: float) -> float | None:
        with contextlib.suppress(queue.Empty):
            return arrivals.get(timeout=seconds)
        return None

    return process.kill, arrival


def start(job: Job) -> subprocess.Popen[str]:
    """Start a process of the fleet."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else "benchmarks.peers.worker", json.dumps(job)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for name in ("OPENAI_AGENTS_DISABLE_TRACING", "AGNO_TELEMETRY", "OTEL_SDK_DISABLED"):
        os.environ[name] = "false" if name == "AGNO_TELEMETRY" else "true"
    job: Job = json.loads(sys.argv[1])
    begin = time.perf_counter()
    adapter: Store = importlib.import_module(f"benchmarks.peers.stores.{job['module']}").Adapter()
    print(json.dumps(asyncio.run(run(job, adapter, time.perf_counter() - begin))))


if __name__ == "__main__":
    main()
