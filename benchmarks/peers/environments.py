"""An environment for each store, made once: the peers' dependencies exclude each other."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from ..processes import ROOT
from .catalogue import Entry


class SetUpError(Exception):
    """A store could not be installed."""


def python_of(entry: Entry, folder: Path) -> Path:
    """Return the interpreter of the environment that has the entry's requirements.

    Raises:
        SetUpError: pip failed, with its last line.

    """
    name = hashlib.sha256(repr((sys.version_info[:2], entry.requirements)).encode()).hexdigest()[:12]
    home = folder / name
    python, stamp = home / "bin/python", home / ".ready"
    if stamp.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    wanted = [f"--editable={ROOT}" if requirement == "." else requirement for requirement in entry.requirements]
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SetUpError((done.stderr.strip().splitlines() or ["pip failed"])[-1][:200])
    stamp.touch()
    return python


def server_of(entry: Entry, python: Path) -> list[str]:
    """Return the command of the server that the entry brings; nothing if it needs none of its own."""
    packages = python.parents[1] / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    files = [str(next(packages.glob(pattern))) for pattern in entry.server]
    return files[:1] + [word for module in files[1:] for word in ("--loadmodule", module)]


def versions(entry: Entry, python: Path) -> dict[str, str]:
    """Return the versions of what the entry requires, and of the client under it."""
    wanted = [requirement.partition("==")[0].partition("[")[0] for requirement in entry.requirements]
    listing = subprocess.run([str(python), "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True)
    installed = dict(line.split("==", 1) for line in listing.stdout.splitlines() if "==" in line)
    return {package: installed[package] for package in (*wanted, "redis", "hiredis") if package in installed}
