"""The project's own virtual environment, ``.venv``: made when missing, renewed when out of date."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tools import root_rights

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv"
PYTHON = FOLDER / "bin" / "python"

# What each purpose needs. The package itself is installed in editable mode: what is edited counts
# at once.
_REQUIREMENTS = {
    "demo": ["-e", ".", "-r", "example/requirements.txt"],
    "tests": ["-e", ".[tests]", "-r", "example/requirements.txt", "tox>=4.11"],
}
# The files from which the requirements come.
_SOURCES = ["setup.py", "pyproject.toml", "example/requirements.txt", "tools/environment.py"]


class EnvironmentFailed(RuntimeError):
    """The environment could not be made; the text says why."""


def prepare(purpose: str) -> Path:
    """The Python of an environment fit for ``purpose``: "demo" or "tests".

    Makes or completes the environment first where that is due. Raises ``EnvironmentFailed``.
    """
    stamp = FOLDER / "prepared.json"
    wanted = _digest()
    with _only_one_at_a_time():
        prepared = json.loads(stamp.read_text()) if stamp.exists() else {}
        if prepared.get("for") != wanted or not PYTHON.exists():
            prepared = {"for": wanted, "purposes": []}
            _make()
        if purpose not in prepared["purposes"]:
            print(f"Installing what is needed into {FOLDER.name}...", flush=True)
            _pip_install(*_REQUIREMENTS[purpose])
            # The tests need all that the demo needs.
            prepared["purposes"] = ["demo"] if purpose == "demo" else ["demo", "tests"]
            stamp.write_text(json.dumps(prepared))
    return PYTHON


def _digest() -> str:
    """Changes with everything that makes an environment out of date."""
    digest = hashlib.sha256()
    for part in (sys.base_prefix, sys.version, str(ROOT)):
        digest.update(part.encode() + b"\0")
    for name in _SOURCES:
        digest.update((ROOT / name).read_bytes() + b"\0")
    return digest.hexdigest()


def _make() -> None:
    print(f"Making a virtual environment in {FOLDER}...", flush=True)
    problem = _try_to_make()
    if problem and root_rights.may_install():
        # Debian keeps a part of Python's venv in a package of its own.
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        if root_rights.install(f"python{version}-venv"):
            problem = _try_to_make()
    if problem:
        raise EnvironmentFailed(f"{sys.executable} can't make a virtual environment:\n{problem}")


def _try_to_make() -> str | None:
    """Returns what went wrong, if anything."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "venv", str(FOLDER)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.stdout if done.returncode else None


def _pip_install(*args: str) -> None:
    command = [str(PYTHON), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    # Where this runs from within another environment, that one's settings don't count here.
    environment = {key: v for key, v in os.environ.items() if key not in ("PYTHONPATH", "PIP_USER")}
    done = subprocess.run([*command, *args], cwd=ROOT, stdin=subprocess.DEVNULL, env=environment)
    if done.returncode:
        raise EnvironmentFailed("pip failed; what it said is above.")


@contextlib.contextmanager
def _only_one_at_a_time() -> Iterator[None]:
    descriptor = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
