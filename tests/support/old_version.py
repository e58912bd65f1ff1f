"""Old versions: an environment with channels_rabbitmq 4, a process in it, folders for others."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

OLD_VERSION = "4.0.1"
# The newest with which it was tried; it is not maintained, and relies on much of theirs.
_REQUIREMENTS = [f"channels_rabbitmq=={OLD_VERSION}", "carehare==1.0.2", "channels<4.4"]
_PROGRAM = Path(__file__).parents[1] / "programs" / "channels_rabbitmq_4.py"
_LONGEST_LINE = 2**24


def make_environment(config: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with channels_rabbitmq 4, kept in pytest's cache.

    Raises ``RuntimeError``, with pip's words, if PyPI can't be reached.
    """

    def make(new: Path) -> None:
        _run(sys.executable, "-m", "venv", str(new))
        _run(str(new / "bin" / "python"), "-m", "pip", "install", "--quiet", *_REQUIREMENTS)

    environment = _cached(config, tmp_path_factory, f"channels_rabbitmq-{OLD_VERSION}", make)
    return environment / "bin" / "python"


def install(
    config: pytest.Config,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    requirements: list[str],
) -> Path:
    """Return a folder with these, to go before ours in PYTHONPATH; also kept, under ``name``."""

    def make(new: Path) -> None:
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(new))
        _run(*pip, *requirements)

    return _cached(config, tmp_path_factory, name, make)


def _cached(
    config: pytest.Config,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    make: Callable[[Path], None],
) -> Path:
    """Return a folder of pytest's cache; ``make`` fills it the first time."""
    pytest_cache = getattr(config, "cache", None)
    cache = pytest_cache.mkdir("old-version") if pytest_cache else tmp_path_factory.getbasetemp()
    version = "{}.{}".format(*sys.version_info)
    folder: Path = cache / f"{name}-python-{version}"
    if not folder.exists():
        # Under another name until it is complete; another test run may be doing the same.
        new = Path(tempfile.mkdtemp(prefix="new-", dir=cache))
        try:
            make(new)
            with contextlib.suppress(OSError):  # the other one was faster
                new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return folder


def _run(*command: str) -> None:
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")


def _environment() -> dict[str, str]:
    """Ours, without what would lead to this package, or have the programs ask for anything."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


class OldProcess:
    """A process whose channel layer is that of channels_rabbitmq 4; an async context manager."""

    def __init__(self, python: Path, **config: Any) -> None:
        self._python = python
        self._config = config
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._last_id = 0

    async def __aenter__(self) -> OldProcess:
        self._process = await asyncio.create_subprocess_exec(
            self._python,
            _PROGRAM,
            repr(self._config),
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            limit=_LONGEST_LINE,
        )
        version = self._answers[0] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read())
        assert await asyncio.wait_for(version, 20) == OLD_VERSION
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Have it close its layer and end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 10)
        except asyncio.TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._reader

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            answer = ast.literal_eval(line.decode())
            future = self._answers.pop(answer["id"])
            if future.cancelled():
                continue
            if "error" in answer:
                future.set_exception(RuntimeError(answer["error"]))
            else:
                future.set_result(answer["result"])
        for future in self._answers.values():
            future.cancel()

    def call(self, method: str, *args: Any) -> asyncio.Future[Any]:
        """Call a method of its layer; a ``RuntimeError`` holds type and text of what it raises."""
        self._last_id += 1
        call = {"id": self._last_id, "method": method, "args": args}
        answer = self._answers[self._last_id] = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        self._process.stdin.write(f"{call!r}\n".encode())
        return answer

    async def receive(self, channel: str) -> Any:
        """Receive, with a limit so that a lost message fails here and not at the test's limit."""
        return await asyncio.wait_for(self.call("receive", channel), 10)
