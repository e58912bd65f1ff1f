"""Programs of ``tests/programs``, each in a process of its own, and what the broker sees of them.

    async def test_something(programs: Programs) -> None:
        program = await programs.start("loops.py", "two_threads")
        assert await program.result() == {"answer": 42}
        await programs.assert_nothing_left()

They run with ``-X dev -W error``: a warning, a task that was destroyed, a resource that nobody
closed is then a line on stderr, which ``result()`` and ``assert_quiet()`` don't allow. Between them
and the broker stands a proxy, so the broker sees what it always sees, and we see it too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pamqp import commands

from tests.support.amqp_proxy import TO_BROKER, AmqpProxy, Frame
from tests.support.changes import Changes

FOLDER = Path(__file__).parents[1] / "programs"

# Each warning is an error, and asyncio tells what it would forgive otherwise.
STRICT_PYTHON = [sys.executable, "-X", "dev", "-W", "error"]
# From Python 3.12 on, os.fork() warns in a process with threads, as it must: nobody can know what
# their locks protect. (Ours are dealt with, and that is tested.)
_OF_FORKS = ("-W", "ignore:This process:DeprecationWarning")
# In a process that multiprocessing spawned, Python 3.15 warns of the main module, which it has made
# itself, wherever asyncio's debug mode remembers a stack.
OF_SPAWNED_PROCESSES = ("-W", "ignore:Module globals is missing:DeprecationWarning")
FORKING_PYTHON = [*STRICT_PYTHON, *_OF_FORKS, *OF_SPAWNED_PROCESSES]

# The name of the thread in which the layer's own event loop runs, if there is one.
BACKGROUND_THREAD = "channels_rabbitmq"

_NAME = re.compile(r"channels_rabbitmq (\w+) (\S+) \(.*, pid (\d+)\)")
_SLOW = re.compile(r"Executing <.*> took \d+\.\d+ seconds\n")
# What must nowhere be written when something ends, in whatever log it comes.
NOISE = re.compile(
    "Task was destroyed|never retrieved|never awaited|Warning|Traceback|Exception ignored|"
    "Unclosed|unclosed|Event loop is closed|Unhandled|Fatal"
)
# Seconds. The longest takes 5 on a quiet machine, 20 beside fourteen processes on two cores.
_END_TIMEOUT = 45.0
# Seconds for the broker to see what has ended. An exclusive queue goes with its connection: what
# is still there then would be until the broker misses heartbeats.
_GRACE = 3.0


@dataclass(frozen=True)
class Opened:
    """One connection of a layer: which of its roles, of which LoopLayer, in which process."""

    role: str
    id: str
    pid: int


def _parse(name: str) -> Opened:
    found = _NAME.fullmatch(name)
    assert found is not None, f"a connection without a proper name: {name!r}"
    return Opened(found[1], found[2], int(found[3]))


class Program:
    """A process of ours, the leader of a session, and what it has written so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.pid = process.pid
        self.output = {"stdout": "", "stderr": ""}
        self._changes = Changes()
        self._readers = [
            asyncio.create_task(self._read(name, stream))
            for name, stream in (("stdout", process.stdout), ("stderr", process.stderr))
            if stream is not None
        ]

    def __repr__(self) -> str:
        return "\n".join(f"--- {name} of {self.pid}:\n{self.output[name]}" for name in self.output)

    @property
    def stdout(self) -> str:
        return self.output["stdout"]

    @property
    def stderr(self) -> str:
        return without_slowness(self.output["stderr"])

    async def _read(self, name: str, stream: asyncio.StreamReader) -> None:
        while piece := await stream.readline():
            self.output[name] += piece.decode(errors="replace")
            self._changes.notify()

    async def printed(self, pattern: str) -> re.Match[str]:
        """Return where this is found in what it wrote, as soon as it is; fails if it has ended."""

        def find() -> re.Match[str] | None:
            return re.search(pattern, self.stdout) or re.search(pattern, self.stderr)

        def is_over() -> bool:
            return all(reader.done() for reader in self._readers)

        for reader in self._readers:
            reader.add_done_callback(lambda reader: self._changes.notify())
        try:
            await self._changes.until(lambda: find() is not None or is_over(), timeout=_END_TIMEOUT)
        except TimeoutError:
            raise AssertionError(f"{pattern!r} wasn't printed\n{self!r}") from None
        found = find()
        assert found is not None, f"{pattern!r} wasn't printed\n{self!r}"
        return found

    def say(self, line: str) -> None:
        """Type a line, or several."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")

    def end_input(self) -> None:
        """Type Ctrl-D."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    async def ended(self) -> int:
        """Wait until it has ended, with all processes that it started; return its exit status."""
        waiting = asyncio.gather(self.process.wait(), *self._readers)
        try:
            status, *_ = await asyncio.wait_for(waiting, _END_TIMEOUT)
        except asyncio.TimeoutError:
            raise AssertionError(f"{self.pid} doesn't end\n{self!r}") from None
        assert isinstance(status, int)
        return status

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send it a signal and wait until it has ended; return its exit status."""
        self.process.send_signal(number)
        return await self.ended()

    def interrupt(self) -> None:
        """Type Ctrl-C: all processes of its session hear it."""
        os.killpg(self.pid, signal.SIGINT)

    async def result(self) -> Any:
        """Wait for its end, which must be good and quiet; return the JSON that it has printed."""
        status = await self.ended()
        assert (status, self.stderr) == (0, ""), repr(self)
        return json.loads(self.stdout) if self.stdout else None

    def assert_quiet(self, *, allowed: str = "(?!)") -> None:
        """Nothing about tasks, resources, warnings or errors, whatever else it has logged.

        But for lines in which ``allowed`` is found: what isn't about us.
        """
        for line in (self.stdout + self.stderr).splitlines():
            assert re.search(allowed, line) or not NOISE.search(line), repr(self)

    async def kill(self) -> None:
        """End it now, with all processes of its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for reader in self._readers:
            reader.cancel()
        await asyncio.wait(self._readers)
        await self.process.wait()
        transport = self.process._transport  # type: ignore[attr-defined]
        transport.close()  # if a reader was cancelled, its pipe is open


class Programs:
    """Starts programs, whose layers reach the broker through a proxy that keeps the books."""

    def __init__(self, proxy: AmqpProxy, broker_url: str, groups_exchange: str) -> None:
        self.proxy = proxy
        self.broker_url = broker_url
        self.groups_exchange = groups_exchange
        self.opened: list[Opened] = []  # connections of layers, in the order of their log-ins
        self.peak: Counter[str] = Counter()  # by role: the most that were open at a time
        self.closed: list[Opened] = []  # those that it has closed in AMQP's words
        self._queues: set[str] = set()  # that layers have declared
        self._all: list[Program] = []
        proxy.rule(TO_BROKER, commands.Connection.StartOk, self._see_start)
        proxy.rule(TO_BROKER, commands.Connection.Close, self._see_close)
        proxy.rule(TO_BROKER, commands.Queue.Declare, self._see_declare)

    def _see_start(self, frame: Frame) -> Frame:
        opened = _parse(frame.link.name)
        self.opened.append(opened)
        now = sum(_parse(link.name).role == opened.role for link in self.proxy.links if link.name)
        self.peak[opened.role] = max(self.peak[opened.role], now)
        return frame

    def _see_close(self, frame: Frame) -> Frame:
        self.closed.append(_parse(frame.link.name))
        return frame

    def _see_declare(self, frame: Frame) -> Frame:
        if name := frame.decode().queue:
            self._queues.add(name)
        return frame

    def roles(self, pid: int | None = None) -> dict[str, int]:
        """How many connections were ever opened for each role, by all or by one process."""
        return dict(Counter(one.role for one in self.opened if pid in (None, one.pid)))

    def open_roles(self, pid: int) -> dict[str, int]:
        """How many a process has now."""
        now = [_parse(link.name) for link in self.proxy.links if link.name]
        return dict(Counter(one.role for one in now if one.pid == pid))

    async def start(
        self, *command: str, python: list[str] = STRICT_PYTHON, **variables: str
    ) -> Program:
        """Run Python with these arguments in ``tests/programs``."""
        process = await asyncio.create_subprocess_exec(
            *python,
            *command,
            cwd=FOLDER,
            env=environment(self.proxy.url, self.groups_exchange, **variables),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        program = Program(process)
        self._all.append(program)
        return program

    async def run(self, *command: str, **variables: str) -> Any:
        """Run a program to its end, see ``Program.result``; then nothing may be left of it."""
        result = await (await self.start(*command, **variables)).result()
        await self.assert_nothing_left()
        return result

    async def assert_nothing_left(
        self, *, closed: bool = True, but_for: Program | None = None
    ) -> None:
        """No connection and no queue, but for the leases of what wasn't closed.

        With ``closed``, each connection was closed properly, ``but_for`` those of one program.
        """
        with contextlib.suppress(TimeoutError):
            await self.proxy.until(lambda: not self.proxy.links, timeout=_GRACE)
        assert [link.name for link in self.proxy.links] == []
        lost = set(self.opened) - set(self.closed)
        if closed:
            abrupt = None if but_for is None else but_for.pid
            assert not {one for one in lost if one.pid != abrupt}, "lost, not closed"
        ids = {one.id for one in lost}
        queues = {
            name
            for name in self._queues
            if not (name.endswith(".lease") and name.rsplit(".", 2)[0] in ids)
        }
        if queues:
            await assert_no_queues(self.broker_url, queues)

    async def kill_all(self) -> None:
        """End all that still run; pytest shows what they wrote if the test has failed."""
        for program in self._all:
            await program.kill()
            sys.stdout.write(f"{program!r}\n")


def without_slowness(stderr: str) -> str:
    """What a program wrote, but for slow callbacks.

    asyncio's debug mode tells of them; on a busy machine each may be one.
    """
    return _SLOW.sub("", stderr)


def environment(url: str, groups_exchange: str, **variables: str) -> dict[str, str]:
    """The environment variables of a program: its settings read the first two."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHONW")}
    path = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))
    return {
        **inherited,
        "DJANGO_SETTINGS_MODULE": "mysite.settings",
        "LAYER_HOST": url,
        "LAYER_EXCHANGE": groups_exchange,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        **variables,
    }


async def assert_no_queues(url: str, names: set[str]) -> None:
    """None of these is on the broker, or is so in a moment."""
    deadline = time.monotonic() + _GRACE
    # The broker tells nobody when a queue has gone.
    while names := await asyncio.to_thread(_existing, url, names):
        assert time.monotonic() < deadline, f"queues still there: {names}"
        await asyncio.sleep(0.05)


def _existing(url: str, names: set[str]) -> set[str]:
    """Those of the queues that are there."""
    found = set()
    # Here: tests without a broker use this module, and have no pika.
    import pika  # type: ignore[import-untyped]  # has no annotations
    import pika.exceptions  # type: ignore[import-untyped]  # as above

    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        for name in names:
            amqp_channel = connection.channel()
            try:
                amqp_channel.queue_declare(name, passive=True)
            except pika.exceptions.ChannelClosedByBroker as err:
                if err.reply_code != 404:  # not found; for an exclusive one it is 405, locked
                    found.add(name)
            else:
                found.add(name)
    return found
