"""Who is harmed by whose backlog: the router behind a simulated broker, in virtual time.

The rule of relief (see ``router.py``) was chosen by these figures.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from channels_rabbitmq._codec import Envelope
from channels_rabbitmq._inbox.ages import Ages
from channels_rabbitmq._inbox.members import Members
from channels_rabbitmq._inbox.router import Router
from channels_rabbitmq.statistics import Counters
from tests.support import virtual_time
from tests.support.virtual_time import in_virtual_time

logger = logging.getLogger(__name__)  # of figures: pytest -o log_cli=1 --log-cli-level=INFO

_LATENCY = 0.0005  # seconds between the broker and the process, one way
_READ = 50  # deliveries that come together


class _Envelope:
    """What the router uses of an envelope."""

    def __init__(self, message: dict[str, Any], channel: str | None, group: str | None) -> None:
        self._message = message
        self.channel = channel
        self.group = group
        self.size = 100
        self.flat = None

    def message(self) -> dict[str, Any]:
        return self._message

    def compact(self) -> None:
        """It is small."""


@dataclass
class Reader:
    """What one channel's consumer got."""

    numbers: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)  # seconds, from sending to receiving

    def p99(self) -> float:
        return sorted(self.waits)[int(len(self.waits) * 0.99)] if self.waits else 0.0


class Site:
    """One process: a router, its consumers, and the broker's queue, which refuses when full."""

    def __init__(
        self, *, local_capacity: int = 100, remote_capacity: int = 10_000, capacity: int = 10_000
    ) -> None:
        self.loop = cast(virtual_time.VirtualLoop, asyncio.get_running_loop())
        self._local_capacity = local_capacity
        self._remote_capacity = remote_capacity
        self._queue: deque[_Envelope] = deque()
        self._outstanding = 0
        self._is_pump_due = False
        self._numbers = 0
        self._members = Members()
        self.counters = Counters()
        self.dropped: dict[str, int] = {}
        self.refused = 0
        self.readers: dict[str, Reader] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.router = Router(
            members=self._members,
            local_capacity=local_capacity,
            local_expiry=60.0,
            capacity_of=lambda channel: capacity,
            counters=self.counters,
            ages=Ages(warn_above=30.0, report=lambda age, channel: None),
            report=self._on_drop,
            clock=self.loop.time,
            create_future=self.loop.create_future,
            call_soon=self.loop.call_soon,
        )
        self._ticker = asyncio.create_task(self._tick())

    # The broker

    def send(self, channel: str | None = None, *, group: str | None = None) -> None:
        if len(self._queue) >= self._remote_capacity:
            self.refused += 1
            return
        self._numbers += 1
        message = {"n": self._numbers, "at": self.loop.time()}
        self._queue.append(_Envelope(message, channel, group))
        self._pump_soon()

    def ack(self, delivery_tag: int) -> None:
        self._outstanding -= 1
        self._pump_soon()

    def _pump_soon(self) -> None:
        if not self._is_pump_due:
            self._is_pump_due = True
            self.loop.call_later(_LATENCY, self._pump)

    def _pump(self) -> None:
        """Read what the broker has sent, as far as the prefetch count lets it."""
        self._is_pump_due = False
        for _ in range(min(_READ, len(self._queue), self._local_capacity - self._outstanding)):
            envelope = self._queue.popleft()
            self._outstanding += 1
            self.router.deliver(cast(Envelope, envelope), 0, self)
        if self._queue and self._outstanding < self._local_capacity:
            self._pump_soon()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.25)
            self.router.tick()

    # The consumers

    def join(self, group: str, *channels: str) -> None:
        for channel in channels:
            self._members.finish_add(self._members.add(group, channel), True)

    def consume(self, channel: str, handle: Callable[[], Awaitable[None]]) -> Reader:
        reader = self.readers[channel] = Reader()
        self._tasks.append(asyncio.create_task(self._consume(channel, handle)))
        return reader

    async def _consume(self, channel: str, handle: Callable[[], Awaitable[None]]) -> None:
        reader = self.readers[channel]
        while True:
            message = await self.router.receive(channel)
            reader.numbers.append(message["n"])
            reader.waits.append(self.loop.time() - message["at"])
            # As Channels: a new receive() is called some turns of the loop after the last.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await handle()

    def _on_drop(self, reason: str, channel: str) -> None:
        assert reason == "overflowed"
        self.dropped[channel] = self.dropped.get(channel, 0) + 1

    async def every(self, interval: float, count: int, send: Callable[[], None]) -> None:
        """Call ``send`` so often, at this interval; what is overdue at once."""
        begun_at = self.loop.time()
        for n in range(count):
            send()
            if (due_at := begun_at + (n + 1) * interval) > self.loop.time():
                await asyncio.sleep(due_at - self.loop.time())

    async def drain(self) -> None:
        """Let time pass, more than it takes until everything has arrived."""
        await asyncio.sleep(5)

    async def end(self) -> None:
        for task in [self._ticker, *self._tasks]:
            task.cancel()
        await asyncio.wait([self._ticker, *self._tasks])


async def at_once() -> None:
    """A prompt consumer's handler."""


def sleeper(seconds: float) -> Callable[[], Awaitable[None]]:
    async def handle() -> None:
        await asyncio.sleep(seconds)

    return handle


def worker(seconds: float) -> Callable[[], Awaitable[None]]:
    async def handle() -> None:
        cast(virtual_time.VirtualLoop, asyncio.get_running_loop()).work(seconds)

    return handle


async def neighbours(*, with_bad_ones: bool) -> tuple[Site, float]:
    """Six prompt channels in a room, and perhaps a slow, a stuck and a leaked one beside them."""
    site = Site(capacity=100)
    prompt = [f"prompt{n}" for n in range(6)]
    site.join("room", *prompt)
    for channel in prompt:
        site.consume(channel, worker(0.0005))
    if with_bad_ones:
        site.join("room", "slow", "stuck", "leaked")
        site.consume("slow", sleeper(0.02))
        site.consume("stuck", sleeper(1e6))
    await site.every(1 / 150, 1500, lambda: site.send(group="room"))
    await site.drain()
    for channel in prompt:
        assert len(site.readers[channel].numbers) == 1500
    await site.end()
    return site, max(site.readers[channel].p99() for channel in prompt)


@in_virtual_time
async def test_prompt_channels_lose_nothing_and_wait_no_longer_beside_bad_ones() -> None:
    _, p99_alone = await neighbours(with_bad_ones=False)
    site, p99 = await neighbours(with_bad_ones=True)
    logger.info("p99 %.4f s alone, %.4f s beside bad ones", p99_alone, p99)
    assert p99 <= p99_alone + 0.001
    # Those that are behind lose their oldest beyond their capacity, and nobody is refused.
    assert set(site.dropped) == {"slow", "stuck", "leaked"}
    assert site.refused == 0
    slow = site.readers["slow"].numbers
    assert slow == sorted(set(slow))
    assert len(slow) + site.dropped["slow"] == 1500


@in_virtual_time
async def test_bad_channels_among_a_thousand_cost_the_others_nothing() -> None:
    site = Site()
    channels = [f"c{n}" for n in range(1000)]
    bad, good = channels[:50], channels[50:]
    for number, channel in enumerate(bad):
        if number % 3:  # else nobody reads it
            site.consume(channel, sleeper(1e6 if number % 3 == 1 else 1.0))
    for channel in good:
        site.consume(channel, worker(0.0001))
    chance = random.Random(1)
    sent: dict[str, int] = dict.fromkeys(channels, 0)

    def send() -> None:
        channel = chance.choice(channels)
        sent[channel] += 1
        site.send(channel)

    await site.every(1 / 2000, 20_000, send)
    await site.drain()
    assert all(len(site.readers[channel].numbers) == sent[channel] for channel in good)
    assert max(max(site.readers[channel].waits) for channel in good) < 0.002
    assert site.dropped == {}
    assert site.refused == 0
    await site.end()


@in_virtual_time
async def test_a_burst_to_all_channels_relieves_none() -> None:
    site = Site(capacity=1)
    channels = [f"c{n}" for n in range(1000)]
    for channel in channels:
        site.consume(channel, at_once)
    for _ in range(3):
        for channel in channels:
            site.send(channel)
        await site.drain()
    assert all(len(site.readers[channel].numbers) == 3 for channel in channels)
    assert site.router.stalled_channels == 0
    assert site.dropped == {}
    await site.end()


@pytest.mark.parametrize("work", [0.0, 0.0005, 0.002])
def test_a_burst_to_one_channel_loses_nothing_while_others_wait(work: float) -> None:
    async def test() -> None:
        site = Site()
        busy = site.consume("busy", worker(work))
        others = [site.consume(f"other{n}", at_once) for n in range(10)]
        await asyncio.sleep(0.1)
        for _ in range(5000):
            site.send("busy")
        await site.every(0.005, 200, lambda: site.send(f"other{site.counters.consumed % 10}"))
        await asyncio.sleep(10)
        assert len(busy.numbers) == 5000
        assert site.dropped == {}
        # The burst itself takes 100 reads of the process, for each of which it works.
        assert max(max(other.waits, default=0) for other in others) < 0.06 + 110 * work
        await site.end()

    virtual_time.run(test())


@pytest.mark.parametrize("kind", [sleeper, worker])
@pytest.mark.parametrize("channels", [4, 400])
def test_overload_of_all_drops_nothing_and_is_told_to_senders(
    kind: Callable[[float], Callable[[], Awaitable[None]]], channels: int
) -> None:
    """Ten times what the consumers can take, by waiting or by computing."""

    async def test() -> None:
        site = Site(remote_capacity=200)
        names = [f"c{n}" for n in range(channels)]
        speed = 1000  # messages a second, of all of them
        for name in names:
            site.consume(name, kind(channels / speed if kind is sleeper else 1 / speed))
        chance = random.Random(1)
        await site.every(0.1 / speed, 20_000, lambda: site.send(chance.choice(names)))
        assert site.dropped == {}
        assert site.refused > 10_000
        assert site.counters.consumed > 0.8 * 2 * speed
        await site.end()

    virtual_time.run(test())


@in_virtual_time
async def test_one_channel_alone_has_both_capacities_and_then_refuses() -> None:
    site = Site(local_capacity=10, remote_capacity=30, capacity=5)
    reader = site.consume("a", sleeper(1.0))
    await site.every(0.01, 60, lambda: site.send("a"))
    # One is being handled.
    assert (site.refused, site.dropped) == (60 - 10 - 30 - 1, {})
    await asyncio.sleep(60)
    assert reader.numbers == list(range(1, 42))
    await site.end()
