"""What a scenario works with: processes to start, the server, and what both use of the CPU."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from benchmarks import problems, usage
from benchmarks.model import RAW, RAW_SHORT, Failed
from benchmarks.problems import Problems, add_problems
from benchmarks.workers import WorkerHandle

# The capacity of all layers, wherever it can be set: what is measured is speed, not limits. (Not
# in scenarios at default settings.)
CAPACITY = 20_000

# A server is at rest when it uses less of one core than this share for so many seconds.
_REST_SHARE = 0.08
_REST_SECONDS = 0.25
_LONGEST_WAIT = 20.0
# Of the processes whose CPU time counts as the server's
_PROGRAMS = ("beam.smp", "redis-server", "valkey-server")


class Server:
    """The RabbitMQ or the Redis that a layer uses. ``clear`` empties it; it may block."""

    def __init__(
        self,
        url: str,
        host: str,
        port: int,
        description: str,
        clear: Callable[[], object] = lambda: None,
    ) -> None:
        self._clear = clear
        self.url = url
        self.host = host
        self.port = port
        self.description = description
        is_local = host in ("127.0.0.1", "localhost", "::1")
        self._pid = usage.find_listener(port, _PROGRAMS) if is_local else None

    def cpu_seconds(self) -> float | None:
        """``None`` where it can't be seen: a server elsewhere or in a container."""
        return usage.cpu_seconds(self._pid) if self._pid is not None else None

    async def clear(self) -> None:
        """Takes away what an earlier run has left for ever.

        channels_redis' core keeps a group's members for a day: each run would send to the dead ones
        of all runs before.
        """
        await asyncio.to_thread(self._clear)

    async def rest(self) -> None:
        """Waits until the server has done what earlier runs left to it (bindings to delete)."""
        deadline = asyncio.get_running_loop().time() + _LONGEST_WAIT
        before = self.cpu_seconds()
        if before is None:
            await asyncio.sleep(2)
            return
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_REST_SECONDS)
            used = self.cpu_seconds() or 0.0
            if used - before < _REST_SHARE * _REST_SECONDS:
                return
            before = used


class CpuTimes:
    """Seconds used within a ``Stage.cpu_times`` block, by role and for the "server"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def per(self, count: float) -> dict[str, float]:
        """Microseconds for each of ``count`` things, by "<role>_us"."""
        return {f"{role}_us": used / count * 1e6 for role, used in self.seconds.items() if count}


class Stage:
    """One run of a scenario on one layer."""

    def __init__(
        self,
        layer: str,
        server: Server,
        pythons: Mapping[str, Path],
        *,
        quick: bool,
        capacity: int | None = CAPACITY,
    ) -> None:
        self.layer = layer
        self.server = server
        self.has_rabbitmq = (
            importlib.import_module(f"benchmarks.layers.{layer}").SERVER == "rabbitmq"
        )
        self.quick = quick
        self.capacity = capacity  # ``None``: the layer's own defaults
        self._pythons = pythons
        self._workers: list[WorkerHandle] = []
        self._problems: Problems = {}  # of processes that have ended

    @property
    def is_raw(self) -> bool:
        return self.layer in (RAW, RAW_SHORT)

    async def start(
        self, role: str, *, url: str | None = None, layer: str | None = None
    ) -> WorkerHandle:
        """A fresh process that plays ``role`` ("module.Class" in scenarios/)."""
        layer = layer or self.layer
        worker = await WorkerHandle.start(
            self._pythons[layer], layer, role, url or self.server.url, self.capacity
        )
        self._workers.append(worker)
        await worker.ready()
        return worker

    @contextlib.asynccontextmanager
    async def cpu_times(self, **workers: WorkerHandle) -> AsyncIterator[CpuTimes]:
        """CPU time used within the block: ``async with stage.cpu_times(sender=worker) as cpu``."""
        cpu = CpuTimes()
        before = await self._cpu_seconds(workers)
        yield cpu
        after = await self._cpu_seconds(workers)
        cpu.seconds = {role: after[role] - before[role] for role in before}

    async def _cpu_seconds(self, workers: Mapping[str, WorkerHandle]) -> dict[str, float]:
        seconds = {role: await worker.call("cpu_seconds") for role, worker in workers.items()}
        server = self.server.cpu_seconds()
        if server is not None:
            seconds["server"] = server
        return seconds

    async def end(self, worker: WorkerHandle) -> None:
        """For a process that must not go on until the run's end."""
        add_problems(self._problems, await _problems_of(worker))
        self._workers.remove(worker)
        try:
            if not await worker.stop():
                add_problems(self._problems, {problems.NOT_CLOSED: (1, "")})
        finally:
            await worker.kill()

    async def problems(self) -> Problems:
        """What all processes have counted until now."""
        total = dict(self._problems)
        for worker in self._workers:
            add_problems(total, await _problems_of(worker))
        return total

    async def fail_on_problems(self) -> None:
        """For scenarios whose figures mean nothing unless all went well."""
        counted = await self.problems()
        if counted:
            raise Failed(
                "; ".join(
                    f"{times:,} × {kind}" + f" ({text})" * bool(text)
                    for kind, (times, text) in counted.items()
                )
            )

    async def close(self) -> Problems:
        """Has all processes close their layers; counts those that couldn't."""
        closed = await asyncio.gather(*(worker.stop() for worker in self._workers))
        return {problems.NOT_CLOSED: (closed.count(False), "")} if False in closed else {}

    async def kill(self) -> None:
        for worker in self._workers:
            await worker.kill()


async def _problems_of(worker: WorkerHandle) -> Problems:
    counted = await worker.call("problems")
    return {kind: (times, text) for kind, (times, text) in counted.items()}
