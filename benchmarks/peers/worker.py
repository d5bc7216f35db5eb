"""One store in its own environment: the functions of its processes. Only the standard library and the store itself."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import Any, TypedDict

from .. import processes
from ..harness import Counters
from . import workloads
from .interface import Store


class Job(TypedDict):
    """A store, where it works, and the workloads with their arguments."""

    module: str
    path: str  # of the server's socket
    url: str
    folder: str
    plan: dict[str, list[dict[str, Any]]]


def plan(text: str) -> dict[str, Any]:
    """Run the workloads of a job; return their numbers."""
    return asyncio.run(_plan(json.loads(text), text, _adapter(text)))


def fleet(text: str, worker: str, seconds: str) -> dict[str, Any]:
    """Be one of the fleet's processes; return what it was told, and how long it took to start."""
    begin = time.perf_counter()
    adapter = _adapter(text)
    imported = time.perf_counter() - begin
    return asyncio.run(_fleet(json.loads(text), adapter, int(worker), float(seconds))) | {"import_ms": imported * 1e3}


def listen(text: str) -> None:
    """Print when each change arrives; without end. One clock for all processes."""
    asyncio.run(_listen(json.loads(text), _adapter(text)))


def _adapter(text: str) -> Store:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ |= {"OPENAI_AGENTS_DISABLE_TRACING": "true", "AGNO_TELEMETRY": "false", "OTEL_SDK_DISABLED": "true"}
    adapter: Store = importlib.import_module(f"benchmarks.peers.stores.{json.loads(text)['module']}").Adapter()
    return adapter


async def _plan(job: Job, text: str, adapter: Store) -> dict[str, Any]:
    server = Counters() if adapter.serverless else Counters(lambda section: _info(job["path"], section))
    place = workloads.Place(server, Path(job["folder"]), f"{__name__}:{{}}".format, text)
    results: dict[str, Any] = {}
    await adapter.open(job["url"], job["folder"])
    try:
        for name, calls in job["plan"].items():
            for arguments in calls:
                key = name + (f" {arguments['size']}" if "size" in arguments else "")
                print(key, file=sys.stderr, flush=True)
                try:
                    results[key] = await getattr(workloads, name)(adapter, place, **arguments)
                except Exception as exc:
                    results[key] = {"error": f"{type(exc).__name__}: {str(exc)[:200]}"}
    finally:
        await adapter.close()
    return results


async def _fleet(job: Job, adapter: Store, worker: int, seconds: float) -> dict[str, Any]:
    begin = time.perf_counter()
    await adapter.open(job["url"], job["folder"])
    opened = time.perf_counter()
    try:
        await adapter.load(f"fleet-{worker}-0")
        starts = {"open_ms": (opened - begin) * 1e3, "first_load_ms": (time.perf_counter() - opened) * 1e3}
        processes.ready()
        await processes.go()
        return starts | await workloads.fleet_worker(adapter, worker, seconds)
    finally:
        await adapter.close()


async def _listen(job: Job, adapter: Store) -> None:
    await adapter.open(job["url"], job["folder"])
    await adapter.watch(lambda: print(time.perf_counter(), flush=True))


def _info(path: str, section: str) -> dict[str, str]:
    """Ask the server for a section of INFO."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(f"INFO {section}\r\nQUIT\r\n".encode())
        data = b"".join(iter(lambda: connection.recv(65536), b""))
    return dict(line.split(":", 1) for line in data.decode().splitlines() if ":" in line)
