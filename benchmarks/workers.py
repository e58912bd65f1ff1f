"""The coordinator's end of a worker process (``worker.py``)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import IO, Any

from benchmarks.peers import CACHE

_START_TIMEOUT = 20.0  # seconds
_STOP_TIMEOUT = 6.0
_LOG_LINES = 8
_LARGEST_ANSWER = 16 * 1024 * 1024  # bytes


class CallFailed(Exception):
    """A call of a worker raised; ``kind`` and ``text`` are those of its exception."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}" if text else kind)
        self.kind = kind
        self.text = text


class WorkerDied(Exception):
    """A worker process has ended by itself, or didn't start; the text has what it wrote last."""


class WorkerHandle:
    """One process. ``call`` its role's coroutines; ``stop`` or ``kill`` it in the end."""

    def __init__(self, process: asyncio.subprocess.Process, log: IO[bytes]) -> None:
        self._process = process
        self._log = log
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._ready = self._answers[0] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(
        cls, python: Path, layer: str, role: str, url: str, capacity: int | None
    ) -> WorkerHandle:
        log = tempfile.TemporaryFile()  # noqa: SIM115 - stop() closes it
        process = await asyncio.create_subprocess_exec(
            *(str(python), "-m", "benchmarks.worker", layer, role, url),
            "default" if capacity is None else str(capacity),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=_import_folder(),
            env=_environment(),
            start_new_session=True,  # Ctrl-C is the coordinator's to handle
            limit=_LARGEST_ANSWER,
        )
        return cls(process, log)

    async def ready(self) -> None:
        """Returns when it can be called. Raises ``WorkerDied``."""
        await asyncio.wait([self._ready], timeout=_START_TIMEOUT)
        if not self._ready.done():
            raise WorkerDied(f"a process didn't start in time:\n{self.log_tail()}")
        self._ready.result()

    async def call(self, method: str, **args: Any) -> Any:
        """Raises ``CallFailed`` or ``WorkerDied``."""
        call = {"id": next(self._ids), "method": method, "args": args}
        answer = self._answers[call["id"]] = asyncio.get_running_loop().create_future()
        if self._reader.done():
            raise WorkerDied(f"a process ended by itself:\n{self.log_tail()}")
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(call).encode() + b"\n")
        return await answer

    async def stop(self) -> bool:
        """Lets its layer say goodbye; False if it couldn't, or not in time. ``kill`` comes next."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT)
        return self._process.returncode == 0

    async def kill(self) -> None:
        """Makes sure that it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        await asyncio.wait([self._reader])
        self._log.close()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            answer = json.loads(line)
            future = self._answers.pop(answer["id"])
            if future.done():
                continue  # the caller was cancelled
            if "error" in answer:
                future.set_exception(CallFailed(*answer["error"]))
            else:
                future.set_result(answer["result"])
        for future in self._answers.values():
            if not future.done():
                future.set_exception(WorkerDied(f"a process ended by itself:\n{self.log_tail()}"))
                future.exception()  # asyncio shall not complain if nobody waits for it
        self._answers.clear()

    def log_tail(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])


def _import_folder() -> Path:
    """A folder with nothing but the packages that a worker needs, to be started in.

    In the repository itself a peer would import this channels_rabbitmq instead of its own.
    """
    folder = CACHE / "imports"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("benchmarks", "tools"):
        with contextlib.suppress(FileExistsError):
            (folder / name).symlink_to(Path("..", "..", name))
    return folder


def _environment() -> dict[str, str]:
    """Ours, without what would lead Python to other packages than its environment's.

    And without proxies: all that processes speak to is here.
    """
    return {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("PYTHON") and not key.lower().endswith("_proxy")
    }
