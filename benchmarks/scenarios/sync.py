"""Group sends of a plain script: one process, no event loop, one call after the other.

The same happens where a management command, a Celery task or a WSGI view calls
``async_to_sync(layer.group_send)(...)``: ``async_to_sync`` makes a thread and an event loop for
each call. The layer is made once, as Django does it, except one that can only be made on a running
loop and belongs to it: of that one each call makes, uses and closes a layer, as its users have to.

The raw client shows the least that a call takes by a connection which outlives it: over to the
thread whose event loop has the connection, RabbitMQ's confirm, and back to the caller's loop.

A second process has a channel in the group and checks that all messages come, in order.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from types import ModuleType
from typing import TYPE_CHECKING, Any

from benchmarks import problems
from benchmarks.figures import percentile
from benchmarks.model import CHANNEL_LAYERS, RAW, Failed
from benchmarks.role import PlainRole, Progress, Role, now
from benchmarks.scenario import Metric, Scenario

if TYPE_CHECKING:
    from benchmarks.stage import Stage

GROUP = "benchmark.sync"
_WARM_UP = 3  # calls
_DATA = b"x" * 100


class Caller(PlainRole):
    """``_group_send`` is what it calls."""

    _group_send: Callable[[str, dict[str, Any]], object]

    def send(self, first: int, count: int | None, seconds: float) -> list[float]:
        """So many calls, or as many as fit in so many seconds; how long each took, in seconds.

        The messages are numbered from ``first`` on. A call that raises is a problem, and not one of
        these.
        """
        times: list[float] = []
        start = now()
        end = start + seconds
        while start < end and len(times) != count:
            message = {
                "type": "benchmark.message",
                "sender": 0,
                "n": first + len(times),
                "data": _DATA,
            }
            try:
                self._group_send(GROUP, message)
                times.append(now() - start)
            except Exception as exc:
                self.tally.note_exc(exc)
            start = now()
        return times


class Script(Caller):
    def __init__(self, adapter: ModuleType, url: str, capacity: int | None) -> None:
        super().__init__(adapter, url, capacity)
        from asgiref.sync import async_to_sync

        if adapter.NEEDS_LOOP:
            self._layer = None
            self._group_send = async_to_sync(self._make_and_send)
        else:
            self._layer = adapter.make_layer(url, capacity)
            self._group_send = async_to_sync(self._layer.group_send)

    async def _make_and_send(self, group: str, message: dict[str, Any]) -> None:
        layer = self.adapter.make_layer(self.url, self.capacity)
        try:
            await layer.group_send(group, message)
        finally:
            await self.adapter.close_layer(layer)

    def close(self) -> None:
        from asgiref.sync import async_to_sync

        if self._layer is not None:
            async_to_sync(self.adapter.close_layer)(self._layer)


class RawScript(Caller):
    def __init__(self, adapter: ModuleType, url: str, capacity: int | None) -> None:
        super().__init__(adapter, url, capacity)
        from asgiref.sync import async_to_sync

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._layer = self._run(adapter.make_layer(url, capacity))
        self._group_send = async_to_sync(self._hop_and_send)

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _hop_and_send(self, group: str, message: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def send() -> None:
            self._layer.group_send(group, message).add_done_callback(
                lambda confirmed: loop.call_soon_threadsafe(settle, confirmed.exception())
            )

        def settle(exc: BaseException | None) -> None:
            if exc is None:
                done.set_result(None)
            else:
                done.set_exception(exc)

        self._loop.call_soon_threadsafe(send)
        await done

    def close(self) -> None:
        try:
            self._run(self.adapter.close_layer(self._layer))
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class Receiver(Role):
    async def open(self) -> None:
        self._next = 0
        channel = await self.layer.new_channel()
        await self.layer.group_add(GROUP, channel)
        self.spawn(self._receive(channel))

    async def _receive(self, channel: str) -> None:
        while True:
            message = await self.layer.receive(channel)
            n = message["n"]
            if n < self._next:
                self.tally.note(problems.DUPLICATED)
                continue
            self.tally.note(problems.LOST, n - self._next)
            self._next = n + 1
            if message["data"] != _DATA:
                self.tally.note(problems.DAMAGED)

    async def drain(self, count: int) -> None:
        """Waits for so many messages in all."""
        await Progress(lambda: self._next).reach(count)
        self.tally.note(problems.LOST, count - self._next)


async def run(stage: Stage) -> dict[str, float]:
    receiver = await stage.start("sync.Receiver")
    await receiver.call("open")
    script = await stage.start("sync.RawScript" if stage.is_raw else "sync.Script")
    warm_up = await script.call("send", first=0, count=_WARM_UP, seconds=10)
    seconds = 1.5 if stage.quick else 4.0
    async with stage.cpu_times(script=script) as cpu:
        times = await script.call("send", first=len(warm_up), count=None, seconds=seconds)
    if not times:
        await stage.fail_on_problems()
        raise Failed("no call was made")
    await receiver.call("drain", count=len(warm_up) + len(times))
    return {
        # The last one may go on for longer; the time of calls that raised counts.
        "calls": len(times) / max(seconds, sum(times)),
        "p50_ms": percentile(times, 50) * 1000,
        "p99_ms": percentile(times, 99) * 1000,
        **cpu.per(len(times)),
    }


SCENARIOS = (
    Scenario(
        name="sync",
        title="Group sends of a script, by async_to_sync",
        metrics=(
            Metric("calls", "calls/s", more_is_better=True),
            Metric("p50_ms", "p50, ms", 2),
            Metric("p99_ms", "p99, ms", 2),
            Metric("script_us", "script, µs CPU"),
            Metric("server_us", "server, µs CPU"),
        ),
        layers=(*CHANNEL_LAYERS, RAW),
        run=run,
    ),
)
