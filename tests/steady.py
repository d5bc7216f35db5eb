"""The suite again and again on a busy machine, until a run fails: python -m tests.steady --times 5 --load 2.

Further arguments go to pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time

BUSY = "while True: sum(range(100_000))"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.steady", description=__doc__)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--load", type=int, default=2, help="so many processes that do nothing but keep a core busy")
    options, others = parser.parse_known_args()
    with contextlib.ExitStack() as stack:
        for _ in range(options.load):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            stack.callback(process.kill)
        for number in range(1, options.times + 1):
            begin = time.monotonic()
            code = subprocess.run([sys.executable, "-m", "pytest", "-q", *others]).returncode
            print(f"run {number} of {options.times}: exit code {code}, {time.monotonic() - begin:.0f} s", flush=True)
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
