"""Lists a namespace in a process of its own, so that the peak of its memory can be told: URL, namespace."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
import tracemalloc
from pathlib import Path

from orcs_redis import open_store


def peak_bytes() -> int:
    """Return the most memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss begins with that of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


async def main(url: str, namespace: str) -> None:
    async with open_store(url, namespace=namespace, deadline=60.0) as store:
        await store.list(limit=50)
        before = peak_bytes()
        begin = time.perf_counter()
        metas = await store.list()
        seconds = time.perf_counter() - begin
        peak = peak_bytes()
        del metas
        tracemalloc.start()
        again = await store.list()
        kept, traced = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        count = len(again)
    unit = 1 << 20
    print(
        json.dumps(
            {
                "sessions": count,
                "seconds": seconds,
                "peak_mb": (peak - before) / unit,
                "kept_mb": kept / unit,
                "traced_peak_mb": traced / unit,
            }
        )
    )


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
