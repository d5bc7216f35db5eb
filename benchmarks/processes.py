"""Processes of their own: `python -m benchmarks.processes MODULE:FUNCTION ARGUMENT...` prints the JSON of its answer.

Only the standard library: the peers' workers run in their stores' environments.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]


class ProcessError(Exception):
    """It failed, with its last line."""


class Process:
    """A function of a module that runs in a process of its own; the arguments arrive as texts."""

    def __init__(self, function: str, *arguments: object, python: str | Path = sys.executable) -> None:
        command = [str(python), "-m", "benchmarks.processes", function, *map(str, arguments)]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in __exit__
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._process.communicate()
        self._errors.close()

    @property
    def output(self) -> IO[str]:
        """What it prints."""
        assert self._process.stdout is not None
        return self._process.stdout

    def ready(self) -> None:
        """Wait until it is `ready`."""
        if self.output.readline() != "ready\n":
            self._process.wait(10)
            raise self._error()

    def go(self) -> None:
        """Let it go on."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """End it, whatever it does."""
        self._process.kill()

    def answer(self, seconds: float = 120) -> Any:
        """Wait for its end, and return what the function returned."""
        try:
            output, _ = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise ProcessError(f"more than {seconds} s") from None
        if self._process.returncode:
            raise self._error()
        return json.loads(output.splitlines()[-1])

    def _error(self) -> ProcessError:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return ProcessError((lines or ["it ended"])[-1][:200])


def race(function: str, *arguments: Sequence[object]) -> list[Any]:
    """Run a process for each row of arguments; all go on from `ready` together. Return their answers."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(Process(function, *each)) for each in arguments]
        for process in processes:
            process.ready()
        for process in processes:
            process.go()
        return [process.answer() for process in processes]


def ready() -> None:
    """Say so to the process that started this one."""
    print("ready", flush=True)


async def go() -> None:
    """Wait until that one says so."""
    await asyncio.to_thread(sys.stdin.readline)


def main() -> None:
    module, _, function = sys.argv[1].partition(":")
    answer = getattr(importlib.import_module(module), function)(*sys.argv[2:])
    print(json.dumps(asyncio.run(answer) if inspect.iscoroutine(answer) else answer))


if __name__ == "__main__":
    main()
