"""Messages of 1 MiB from one process to another, one after the other."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from benchmarks import problems
from benchmarks.figures import percentile
from benchmarks.model import CHANNEL_LAYERS, Failed
from benchmarks.role import Progress, Role, now
from benchmarks.scenario import Metric, Scenario

if TYPE_CHECKING:
    from benchmarks.stage import Stage

SIZE = 1024 * 1024
_WARM_UP = 2  # messages
_PAUSE = 0.02  # seconds between two messages


class Receiver(Role):
    async def open(self) -> str:
        self._arrivals: dict[int, float] = {}
        channel: str = await self.layer.new_channel()
        await self.connect(channel)
        self.spawn(self._receive(channel))
        return channel

    async def _receive(self, channel: str) -> None:
        while True:
            message = await self.layer.receive(channel)
            if len(message["data"]) != SIZE:
                self.tally.note(problems.DAMAGED)
            elif message["n"] in self._arrivals:
                self.tally.note(problems.DUPLICATED)
            self._arrivals[message["n"]] = now()

    async def arrivals(self, count: int) -> list[tuple[int, float]]:
        await Progress(lambda: len(self._arrivals)).reach(count)
        self.tally.note(problems.LOST, count - len(self._arrivals))
        return list(self._arrivals.items())


class Sender(Role):
    async def send(self, channel: str, count: int) -> list[tuple[float, float]]:
        """When each ``send`` began and when it returned."""
        data = b"x" * SIZE
        times = []
        for n in range(count):
            start = now()
            try:
                await self.layer.send(channel, {"type": "benchmark.message", "n": n, "data": data})
            except Exception as exc:
                self.tally.note_exc(exc)
            times.append((start, now()))
            await asyncio.sleep(_PAUSE)
        return times


async def run(stage: Stage) -> dict[str, float]:
    receiver = await stage.start("large.Receiver")
    sender = await stage.start("large.Sender")
    channel = await receiver.call("open")
    count = _WARM_UP + (20 if stage.quick else 50)
    times = await sender.call("send", channel=channel, count=count)
    arrivals = dict(await receiver.call("arrivals", count=count))
    took = [at - times[n][0] for n, at in arrivals.items() if n >= _WARM_UP]
    if not took:
        raise Failed("nothing was delivered")
    return {
        "arrived_ms": percentile(took, 50) * 1000,
        "send_ms": percentile([end - start for start, end in times[_WARM_UP:]], 50) * 1000,
        "worst_ms": max(took) * 1000,
    }


SCENARIOS = (
    Scenario(
        name="large",
        title="Messages of 1 MiB, one in flight",
        metrics=(
            Metric("arrived_ms", "arrived, p50 ms", 1, more_is_better=False),
            Metric("worst_ms", "arrived, slowest ms", 1),
            Metric("send_ms", "send, p50 ms", 1),
        ),
        layers=CHANNEL_LAYERS,
        run=run,
    ),
)
