"""What the roles of all scenarios have in common. A role is what one process does in a run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from types import ModuleType
from typing import Any

from benchmarks.problems import Tally

# Of CLOCK_MONOTONIC, which all processes of a machine share (on Linux and macOS).
now = time.monotonic

# How many calls a process makes at once where it isn't the number of calls that is measured.
AT_ONCE = 50
# Messages that don't come for so long, in seconds, count as lost.
PATIENCE = 3.0

_WARM_UP_GROUP = "benchmark.warm-up"


class Role:
    """Base of all roles. Each public coroutine of theirs may be called by the coordinator.

    ``layer`` is ``None`` in a process that needs none (``HAS_LAYER``).
    """

    HAS_LAYER = True

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.tally = Tally()
        self._tasks: set[asyncio.Task[None]] = set()

    async def problems(self) -> dict[str, tuple[int, str]]:
        return self.tally.counts

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Runs it beside the rest; an exception that ends it is a result, and counted."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            self.tally.note_exc(exc)

    async def connect(self, channel: str) -> None:
        """Has the layer open its connections; some do it at the first group_add only."""
        await self.layer.group_add(_WARM_UP_GROUP, channel)
        await self.layer.group_discard(_WARM_UP_GROUP, channel)

    async def join(self, groups: Iterable[str], channel: str) -> None:
        """A few at a time, so that no layer is asked for too much."""
        await side_by_side((self.layer.group_add, (group, channel)) for group in groups)


class PlainRole:
    """Base of the roles of a process without an event loop.

    Each of their public methods may be called by the coordinator. ``make_layer`` and
    ``close_layer`` are those of ``adapter``.
    """

    def __init__(self, adapter: ModuleType, url: str, capacity: int | None) -> None:
        self.adapter = adapter
        self.url = url
        self.capacity = capacity
        self.tally = Tally()

    def problems(self) -> dict[str, tuple[int, str]]:
        return self.tally.counts

    def close(self) -> None:
        """Called at the end."""


async def side_by_side(
    calls: Iterable[tuple[Callable[..., Awaitable[object]], tuple[Any, ...]]],
) -> None:
    """Makes calls, ``AT_ONCE`` at any time. The first exception is raised when all have ended."""
    pending = iter(calls)

    async def work() -> None:
        for call, args in pending:
            await call(*args)

    outcomes = await asyncio.gather(*(work() for _ in range(AT_ONCE)), return_exceptions=True)
    for outcome in outcomes:
        if outcome is not None:
            raise outcome


class Progress:
    """Waits for a number to be reached as long as it grows."""

    def __init__(self, value: Callable[[], int]) -> None:
        self._value = value

    async def reach(self, target: int, *, patience: float = PATIENCE) -> bool:
        """False if it stood still for ``patience`` seconds before it got there."""
        last = self._value()
        deadline = now() + patience
        while last < target:
            await asyncio.sleep(0.01)
            value = self._value()
            if value != last:
                last = value
                deadline = now() + patience
            elif now() > deadline:
                return False
        return True
