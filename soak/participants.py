"""The coordinator's end of a participant (``participant.py``)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import IO, Any

from tools.environment import ROOT

_LONGEST_LINE = 1024 * 1024  # bytes


class ParticipantDied(Exception):
    """A process has ended by itself; the text has what it wrote last."""


class Participant:
    """One process; ``start`` and in the end ``kill`` it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.journal = folder / f"{name}.journal"
        self.log = folder / f"{name}.log"
        self.residents: list[str] = []
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.settled = 0
        self.is_calm = False
        self._process: asyncio.subprocess.Process | None = None
        self._log_file: IO[bytes] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self, python: Path, url: str, seed: int) -> None:
        self._log_file = self.log.open("wb")
        self._process = await asyncio.create_subprocess_exec(
            *(str(python), "-m", "soak.participant"),
            *(self.name, url, str(self.journal), str(seed)),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            env=_environment(),
            start_new_session=True,  # Ctrl-C is the coordinator's to handle
            limit=_LONGEST_LINE,
        )
        self._reader = asyncio.create_task(self._read())

    def order(self, **words: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words).encode() + b"\n")

    async def until(self, condition: Any, timeout: float) -> None:
        """Wait until what it has said fulfils the condition. Raises TimeoutError."""
        deadline = asyncio.get_running_loop().time() + timeout
        while not condition(self):
            self.check_alive()
            self._news.clear()
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                raise TimeoutError(self.name)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), left)

    def check_alive(self) -> None:
        assert self._reader is not None
        if self._reader.done():
            raise ParticipantDied(f"{self.name} ended by itself:\n{self.log_tail()}")

    async def ended(self, timeout: float) -> int | None:
        """Wait for its end; return its exit status, None if it hangs."""
        assert self._process is not None
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._process.wait(), timeout)
        return self._process.returncode

    async def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
        if self._reader is not None:
            await asyncio.wait([self._reader])
        if self._log_file is not None:
            self._log_file.close()

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            said = json.loads(line)
            self.residents = said.get("ready", self.residents)
            self.settled = said.get("settled", self.settled)
            self.is_calm = said.get("calm", self.is_calm)
            if "counts" in said:
                self.counts = Counter(said["counts"])
            if "problem" in said:
                self.problems.append(f"{self.name}: {said['problem']}")
            self._news.set()
        self._news.set()

    def log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-12:])


def _environment() -> dict[str, str]:
    """Ours, in which what is never awaited or closed is an error in the log."""
    return {**os.environ, "PYTHONWARNINGS": "default"}
