"""The Python of each layer: ours from the project's environment, the peers' from their own."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from tools import environment

CACHE = environment.ROOT / ".benchmark_cache"  # git ignores it; delete it to get newer releases

_PRINT_VERSIONS = """\
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""


class PeerFailed(RuntimeError):
    """A layer's environment could not be made; the text says why."""


def adapter(layer: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.layers.{layer}")


def prepare(layer: str, own_python: Path | None = None) -> Path:
    """The Python that has what a layer needs; its environment is made first if it isn't there.

    ``own_python`` is used instead of the project's own environment. Raises ``PeerFailed``, or
    ``environment.EnvironmentFailed`` for the project's own.
    """
    module = adapter(layer)
    if module.REQUIREMENTS is None:
        return own_python or environment.prepare("demo")
    wanted = json.dumps([sys.version, module.REQUIREMENTS])
    digest = hashlib.sha256(wanted.encode()).hexdigest()[:12]
    folder = CACHE / f"{layer}-{digest}"
    if not folder.exists():
        print(f"Installing {' '.join(module.REQUIREMENTS)}...", flush=True)
        CACHE.mkdir(exist_ok=True)
        # Under another name until it is complete.
        new = Path(tempfile.mkdtemp(prefix="new-", dir=CACHE))
        try:
            _run(sys.executable, "-m", "venv", str(new))
            pip = [str(new / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
            _run(*pip, "install", "--quiet", *module.REQUIREMENTS)
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return folder / "bin" / "python"


def versions(layer: str, python: Path) -> dict[str, str]:
    """The releases in a layer's environment, by package."""
    found: dict[str, str] = json.loads(
        _run(str(python), "-c", _PRINT_VERSIONS, *adapter(layer).PACKAGES)
    )
    return found


def _run(*command: str) -> str:
    # Where this runs from within another environment, that one's settings don't count here.
    variables = {key: v for key, v in os.environ.items() if key not in ("PYTHONPATH", "PIP_USER")}
    done = subprocess.run(
        command,
        cwd=CACHE if CACHE.exists() else None,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise PeerFailed(f"{' '.join(command[:4])}...:\n{done.stdout}{done.stderr}".strip())
    return done.stdout
