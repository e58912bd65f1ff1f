"""Round trips between two processes, one message in flight.

A sends to B's channel, B answers to A's, and A sends the next one when it has the answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import problems
from benchmarks.figures import percentile
from benchmarks.model import LAYERS
from benchmarks.role import Role, now
from benchmarks.scenario import Metric, Scenario

if TYPE_CHECKING:
    from benchmarks.stage import Stage

_DATA = "x" * 100
_WARM_UP = 0.3  # seconds


class Player(Role):
    """Either side: one channel."""

    async def open(self, is_raw: bool) -> str:
        self._channel: str = await self.layer.new_channel()
        if not is_raw:
            await self.connect(self._channel)
        return self._channel

    async def answer(self, other: str) -> None:
        """From now on, whatever comes goes back."""
        self.spawn(self._answer_all(other))

    async def _answer_all(self, other: str) -> None:
        while True:
            await self.layer.send(other, await self.layer.receive(self._channel))

    async def ask(self, other: str, seconds: float) -> list[float]:
        """The round trips made in so many seconds, in seconds each."""
        data = _DATA.encode()
        times = []
        end = now() + seconds
        start = now()
        while start < end:
            n = len(times)
            await self.layer.send(
                other, {"type": "benchmark.message", "sender": 0, "n": n, "data": data}
            )
            message = await self.layer.receive(self._channel)
            if message["n"] != n or message["data"] != data:
                self.tally.note(problems.DAMAGED)
            after = now()
            times.append(after - start)
            start = after
        return times


async def run(stage: Stage) -> dict[str, float]:
    asker = await stage.start("latency.Player")
    answerer = await stage.start("latency.Player")
    asker_channel = await asker.call("open", is_raw=stage.is_raw)
    other = await answerer.call("open", is_raw=stage.is_raw)
    await answerer.call("answer", other=asker_channel)
    await asker.call("ask", other=other, seconds=_WARM_UP)
    async with stage.cpu_times(asker=asker, answerer=answerer) as cpu:
        times = await asker.call("ask", other=other, seconds=1.5 if stage.quick else 4.0)
    return {
        "round_trips": len(times) / sum(times),
        "p50_ms": percentile(times, 50) * 1000,
        "p99_ms": percentile(times, 99) * 1000,
        **cpu.per(len(times)),
    }


SCENARIOS = (
    Scenario(
        name="latency",
        title="Latency: one message in flight between two processes",
        metrics=(
            Metric("round_trips", "round trips/s", more_is_better=True),
            Metric("p50_ms", "p50, ms", 2),
            Metric("p99_ms", "p99, ms", 2),
            Metric("asker_us", "asker, µs CPU"),
            Metric("answerer_us", "answerer, µs CPU"),
            Metric("server_us", "server, µs CPU"),
        ),
        layers=LAYERS,
        run=run,
    ),
)
