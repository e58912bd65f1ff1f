"""A storm of joins: all websockets of a process come back at once, as after a restart.

Every channel joins a group of its own, all calls are made at the same moment. The time is that
until the last ``group_add`` has returned; then every group gets a message, and all must arrive. A
layer for which any of this fails has no time.

The raw client binds a queue to as many keys at once: the time that RabbitMQ needs for that.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from benchmarks import problems
from benchmarks.model import CHANNEL_LAYERS, RAW
from benchmarks.role import Progress, Role, now, side_by_side
from benchmarks.scenario import Metric, Scenario

if TYPE_CHECKING:
    from benchmarks.stage import Stage


def _group(n: int) -> str:
    return f"storm.{n}"


class Crowd(Role):
    async def join_all(self, count: int) -> float:
        self._channels = [await self.layer.new_channel() for _ in range(count)]
        await self.connect(self._channels[0])
        start = now()
        for outcome in await asyncio.gather(
            *(self.layer.group_add(_group(n), each) for n, each in enumerate(self._channels)),
            return_exceptions=True,
        ):
            if outcome is not None:
                self.tally.note_exc(outcome)
        return now() - start

    async def hear(self) -> None:
        self._heard = 0
        for n, channel in enumerate(self._channels):
            self.spawn(self._hear(n, channel))

    async def _hear(self, n: int, channel: str) -> None:
        message = await self.layer.receive(channel)
        if message["n"] != n:
            self.tally.note(problems.DAMAGED)
        self._heard += 1

    async def check(self) -> None:
        count = len(self._channels)
        await Progress(lambda: self._heard).reach(count)
        self.tally.note(problems.LOST, count - self._heard)


class RawCrowd(Role):
    async def join_all(self, count: int) -> float:
        from benchmarks.layers import raw

        queue = await self.layer.new_channel()
        start = now()
        await asyncio.gather(
            *(self.layer.connection.bind(queue, raw.EXCHANGE, _group(n)) for n in range(count))
        )
        return now() - start


class Caller(Role):
    async def call_all(self, count: int) -> None:
        await side_by_side(
            (self.layer.group_send, (_group(n), {"type": "benchmark.message", "n": n}))
            for n in range(count)
        )


async def run(stage: Stage, count: int) -> dict[str, float]:
    crowd = await stage.start("storm.RawCrowd" if stage.is_raw else "storm.Crowd")
    caller = await stage.start("storm.Caller")
    async with stage.cpu_times(client=crowd) as cpu:
        seconds = await crowd.call("join_all", count=count)
    await stage.fail_on_problems()
    if not stage.is_raw:
        await crowd.call("hear")
        await caller.call("call_all", count=count)
        await crowd.call("check")
        await stage.fail_on_problems()
    return {"seconds": seconds, **cpu.per(count)}


def _scenario(count: int) -> Scenario:
    return Scenario(
        name=f"storm-{count}",
        title=f"Storm: {count:,} channels join a group each at the same moment",
        metrics=(
            Metric("seconds", "all joined, s", 2, more_is_better=False),
            Metric("client_us", "client, µs CPU per join"),
            Metric("server_us", "server, µs CPU per join"),
        ),
        layers=(*CHANNEL_LAYERS, RAW),
        run=partial(run, count=count),
    )


SCENARIOS = (_scenario(2000), _scenario(10_000))
