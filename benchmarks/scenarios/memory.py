"""What idle websockets and groups take of a process's memory: growth of its resident set.

*Channels*: 10,000 tasks, each waiting in ``receive`` for a channel of its own (the tasks are
counted: 4.5 to 5 MiB of the growth are asyncio's, with every layer). *Groups*: one channel joins
10,000 groups. Afterwards a sample of the channels or groups gets a message, and all must arrive.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from benchmarks import problems
from benchmarks.model import CHANNEL_LAYERS
from benchmarks.role import Progress, Role
from benchmarks.scenario import Metric, Scenario
from benchmarks.usage import resident_mib

if TYPE_CHECKING:
    from benchmarks.stage import Stage

COUNT = 10_000
_FIRST = 200  # made before the measurement, so that what is there only once isn't counted
_SAMPLE = 97  # each 97th is checked
_SETTLE = 0.5  # seconds


class Idler(Role):
    def __init__(self, layer: object) -> None:
        super().__init__(layer)
        self._heard: list[int] = []

    async def add_channels(self) -> float:
        channels: list[str] = []

        async def add(count: int) -> None:
            for _ in range(count):
                channel = await self.layer.new_channel()
                channels.append(channel)
                self.spawn(self._receive(len(channels) - 1, channel))
            await asyncio.sleep(_SETTLE)

        await self.connect(await self.layer.new_channel())
        await add(_FIRST)
        before = resident_mib()
        await add(COUNT)
        growth = resident_mib() - before
        sample = range(0, len(channels), _SAMPLE)
        for n in sample:
            await self.layer.send(channels[n], {"type": "benchmark.message", "n": n})
        await self._check(list(sample))
        return growth

    async def add_groups(self) -> float:
        channel = await self.layer.new_channel()
        groups = [f"memory.{n}" for n in range(_FIRST + COUNT)]
        await self.join(groups[:_FIRST], channel)
        before = resident_mib()
        await self.join(groups[_FIRST:], channel)
        await asyncio.sleep(_SETTLE)
        growth = resident_mib() - before
        sample = range(0, len(groups), _SAMPLE)
        self.spawn(self._receive_all(channel))
        for n in sample:
            await self.layer.group_send(groups[n], {"type": "benchmark.message", "n": n})
        await self._check(list(sample))
        return growth

    async def _receive(self, n: int, channel: str) -> None:
        message = await self.layer.receive(channel)
        if message["n"] != n:
            self.tally.note(problems.DAMAGED)
        self._heard.append(n)

    async def _receive_all(self, channel: str) -> None:
        while True:
            self._heard.append((await self.layer.receive(channel))["n"])

    async def _check(self, sample: list[int]) -> None:
        await Progress(lambda: len(self._heard)).reach(len(sample))
        self.tally.note(problems.LOST, len(set(sample) - set(self._heard)))
        self.tally.note(problems.DUPLICATED, len(self._heard) - len(set(self._heard)))


async def run(stage: Stage, method: str) -> dict[str, float]:
    idler = await stage.start("memory.Idler")
    return {"mib": await idler.call(method)}


def _scenario(name: str, title: str, method: str) -> Scenario:
    return Scenario(
        name=name,
        title=f"Memory: {title}",
        metrics=(Metric("mib", "growth, MiB", 1, more_is_better=False),),
        layers=CHANNEL_LAYERS,
        run=partial(run, method=method),
    )


SCENARIOS = (
    _scenario("memory-channels", "10,000 channels waiting in receive()", "add_channels"),
    _scenario("memory-groups", "10,000 groups", "add_groups"),
)
