"""The Pythons of this machine that the project supports: on PATH, and those of pyenv."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_OLDEST = (3, 10)
# Prints "3.12" for a finished release with the ordinary memory model.
_ASK = """\
import sys, sysconfig
info = sys.version_info
if info.releaselevel == "final" and not sysconfig.get_config_var("Py_GIL_DISABLED"):
    print(f"{info.major}.{info.minor}")
"""


def find_pythons() -> dict[str, Path]:
    """One for each version, in order: {"310": .../python3.10, "311": ...}."""
    found: dict[tuple[int, ...], Path] = {}
    for path in _candidates():
        version = _version(path)
        if version >= _OLDEST:
            found.setdefault(version, path)
    return {f"{major}{minor}": path for (major, minor), path in sorted(found.items())}


def _candidates() -> Iterator[Path]:
    yield Path(getattr(sys, "_base_executable", sys.executable))
    for minor in range(_OLDEST[1], 30):
        on_path = shutil.which(f"python3.{minor}")
        if on_path:
            yield Path(on_path)
    yield from sorted(Path.home().glob(".pyenv/versions/3.*/bin/python3"))


def _version(path: Path) -> tuple[int, ...]:
    """Such as (3, 12); empty if it is none for us, or doesn't even start."""
    # Stand-ins of version managers are on PATH also where there is nothing behind them.
    try:
        done = subprocess.run(
            [path, "-c", _ASK], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.fullmatch(r"(\d+)\.(\d+)\n", done.stdout)
    return tuple(int(part) for part in match.groups()) if match else ()
