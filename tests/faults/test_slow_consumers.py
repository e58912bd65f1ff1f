"""Consumers that are stuck or slow among many others, on a real broker."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from channels.exceptions import ChannelFull

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.consumers import StuckConsumer
from tests.support.layers import statistics_of
from tests.support.lengths import Length
from tests.support.log_lines import log_lines

pytestmark = pytest.mark.slow

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

_TRAFFIC = Length(full=20.0, brief=2.5)  # seconds
_SLOW = Length(full=60.0, brief=5.0)  # seconds for which a slow consumer is sent to

_CHANNELS = 1000
_STUCK = 50
_SENDERS = 20

logger = logging.getLogger(__name__)  # of figures: pytest -o log_cli=1 --log-cli-level=INFO


class Crowd:
    """A thousand channels in one process, sent to by another layer, as fast as is possible."""

    def __init__(self, sender: RabbitmqChannelLayer, receiver: RabbitmqChannelLayer) -> None:
        self.sender = sender
        self.receiver = receiver
        self.chance = random.Random(7)
        self.sent: dict[str, list[int]] = {}
        self.received: dict[str, list[int]] = {}
        self.longest_wait = 0.0  # seconds, of a message that arrived, from the call on
        self.refused = 0
        self.count = 0  # received in this stretch
        self._numbers = itertools.count(1)
        self._readers: dict[str, asyncio.Task[None]] = {}

    async def prepare(self) -> None:
        self.channels = [await self.receiver.new_channel() for _ in range(_CHANNELS)]
        self.healthy, self.stuck = self.channels[_STUCK:], self.channels[:_STUCK]
        for channel in self.channels:
            self.sent[channel], self.received[channel] = [], []
            self.start_reading(channel)
        await asyncio.gather(self.sender.connect(), self.receiver.connect())

    def start_reading(self, channel: str) -> None:
        self._readers[channel] = asyncio.create_task(self._read(channel))

    async def stop_reading(self, channel: str) -> None:
        reader = self._readers.pop(channel)
        reader.cancel()
        await asyncio.wait([reader])

    async def _read(self, channel: str) -> None:
        while True:
            message = await self.receiver.receive(channel)
            self.received[channel].append(message["number"])
            if channel not in self.stuck:
                self.count += 1
                wait = asyncio.get_running_loop().time() - message["sent_at"]
                self.longest_wait = max(self.longest_wait, wait)

    async def run(self, duration: float) -> float:
        """Return how many messages a second the healthy channels received."""
        loop = asyncio.get_running_loop()
        self.count, begun = 0, loop.time()
        await asyncio.gather(*(self._send(begun + duration) for _ in range(_SENDERS)))
        return self.count / (loop.time() - begun)

    async def _send(self, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        # Each sender has channels of its own, so that there is one order.
        own = self.channels[next(self._numbers) % _SENDERS :: _SENDERS]
        while loop.time() < deadline:
            channel, number = self.chance.choice(own), next(self._numbers)
            sent_at = loop.time()
            try:
                await self.sender.send(channel, {"number": number, "sent_at": sent_at})
            except ChannelFull:
                self.refused += 1
                await asyncio.sleep(0.001)
            else:
                self.sent[channel].append(number)

    async def until_received(self, channels: list[str]) -> None:
        deadline = asyncio.get_running_loop().time() + 20
        while any(len(self.received[c]) < len(self.sent[c]) for c in channels):
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.02)

    async def end(self) -> None:
        for channel in list(self._readers):
            await self.stop_reading(channel)


async def test_stuck_channels_hold_up_nobody_else(open_layer: OpenLayer) -> None:
    sender, receiver = await open_layer(), await open_layer(capacity=10)
    crowd = Crowd(sender, receiver)
    await crowd.prepare()
    await crowd.run(1.0)  # warms up

    without = await crowd.run(_TRAFFIC.value)
    wait_without, crowd.longest_wait = crowd.longest_wait, 0.0
    assert statistics_of(receiver).counters.overflowed == 0
    for channel in crowd.stuck:
        await crowd.stop_reading(channel)
    with log_lines() as lines:
        beginning = await crowd.run(2.0)  # in which they are found
        wait_beginning, crowd.longest_wait = crowd.longest_wait, 0.0
        with_stuck = await crowd.run(_TRAFFIC.value)
        dropped, behind = [], []
        for line in lines.rest():
            dropped += [line] if "hold more than is kept for them" in line else []
            behind += [line] if "waiting in memory for receivers" in line else []
    await crowd.until_received(crowd.healthy)
    logger.info(
        "%d/s without stuck channels, %d/s with them (%.0f %%), %d/s in the first 2 s; "
        "longest wait %.2f s without, %.2f s in the first 2 s, %.2f s later; refused %d",
        without, with_stuck, 100 * with_stuck / without, beginning,
        wait_without, wait_beginning, crowd.longest_wait, crowd.refused,
    )  # fmt: skip

    # The others got all, in order, and soon: a generous limit, where it would be local_expiry.
    for channel in crowd.healthy:
        assert crowd.received[channel] == crowd.sent[channel]
    assert max(wait_beginning, crowd.longest_wait) < 5.0
    statistics = statistics_of(receiver)
    counters = statistics.counters
    assert 0 < statistics.stalled_channels <= _STUCK
    # Only the stuck ones lose, and that is told.
    assert counters.expired == 0
    lost = sum(len(crowd.sent[channel]) - len(crowd.received[channel]) for channel in crowd.stuck)
    assert counters.overflowed + statistics.buffered == lost
    assert bool(dropped) == bool(counters.overflowed)
    # (Of what is dropped all the time, nothing waits for long.)
    assert any(channel in line for channel in crowd.stuck for line in (*behind, *dropped))
    for channel in crowd.healthy:
        assert not any(channel in line for line in dropped)

    # What a stuck channel has kept is the last of what was sent to it, in order.
    capacity = receiver.capacity
    before = {channel: len(crowd.received[channel]) for channel in crowd.stuck}
    while statistics_of(receiver).unacked > 0:
        # What has come since the last relief
        for channel in crowd.stuck:
            if channel not in crowd._readers:
                crowd.start_reading(channel)
        await asyncio.sleep(0.01)
    for channel in crowd.stuck:
        if channel not in crowd._readers:
            crowd.start_reading(channel)
    while statistics_of(receiver).buffered:  # noqa: ASYNC110 - a receiver tells nobody
        await asyncio.sleep(0.01)
    for channel in crowd.stuck:
        kept = crowd.received[channel][before[channel] :]
        sent = crowd.sent[channel][before[channel] :]
        assert kept == sent[-len(kept) :] if kept else not sent
        assert len(kept) >= min(len(sent), capacity)
    await crowd.end()


async def test_a_stuck_channel_that_resumes_gets_its_last_messages_in_order(
    open_layer: OpenLayer,
) -> None:
    receiver = await open_layer(capacity=20, local_capacity=10, remote_capacity=100)
    sender = await open_layer()
    stuck, other = await receiver.new_channel(), await receiver.new_channel()
    waiting = asyncio.create_task(receiver.receive(other))
    with log_lines() as lines:
        for number in range(90):
            await sender.send(stuck, {"number": number})
        line = await lines.next("hold more than is kept for them")
        # The other one, which waited behind all of these, is served; so all have come.
        await sender.send(other, {"other": True})
        assert await asyncio.wait_for(waiting, 10) == {"other": True}
        assert stuck in line
        assert other not in line
    counters = statistics_of(receiver).counters
    assert counters.delivered == 91
    kept = 90 - counters.overflowed
    assert 20 <= kept <= 30  # its capacity, and at most local_capacity that counts
    received = [
        (await asyncio.wait_for(receiver.receive(stuck), 10))["number"] for _ in range(kept)
    ]
    assert received == list(range(90 - kept, 90))
    # It is as all others again.
    await sender.send(stuck, {"number": 90})
    assert await asyncio.wait_for(receiver.receive(stuck), 10) == {"number": 90}
    assert statistics_of(receiver).stalled_channels == 0
    counters = statistics_of(receiver).counters
    assert (counters.overflowed, counters.expired) == (90 - kept, 0)


async def test_neighbours_of_bad_channels_lose_nothing_and_the_culprits_are_named(
    open_layer: OpenLayer,
) -> None:
    """At default settings: a slow one, one that is stuck and one that was left, in one room."""
    sender, receiver = await open_layer(), await open_layer()
    prompt = [await receiver.new_channel() for _ in range(6)]
    received: dict[str, list[int]] = {channel: [] for channel in prompt}
    stuck = StuckConsumer(receiver, await receiver.new_channel())
    slow, left = await receiver.new_channel(), await receiver.new_channel()
    for channel in (*prompt, stuck.channel_name, slow, left):
        await receiver.group_add("room", channel)

    async def consume(channel: str) -> None:
        while True:
            received[channel].append((await receiver.receive(channel))["n"])

    async def be_slow() -> None:
        while True:
            await receiver.receive(slow)
            await asyncio.sleep(0.05)

    tasks = [asyncio.create_task(consume(channel)) for channel in prompt]
    tasks += [asyncio.create_task(be_slow()), asyncio.create_task(stuck())]
    with log_lines() as lines:
        for n in range(1200):
            await sender.group_send("room", {"n": n})
        line = ""
        while slow not in line:  # In the first one it may be too early for that.
            line = await lines.next("waiting in memory for receivers that are stuck or too slow")
    for channel in prompt:
        while len(received[channel]) < 1200:  # noqa: ASYNC110 - a receiver tells nobody
            await asyncio.sleep(0.01)
        assert received[channel] == list(range(1200))
        assert channel not in line
    assert f"{stuck.channel_name} (" in line
    assert "; StuckConsumer, in room)" in line
    assert f"{slow} (" in line
    assert f"{left} (" in line
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_a_loop_that_stands_still_is_not_taken_for_slow_receivers(
    open_layer: OpenLayer,
) -> None:
    sender, receiver = await open_layer(), await open_layer()
    channel, idle = await receiver.new_channel(), await receiver.new_channel()
    waiting = asyncio.create_task(receiver.receive(idle))
    await receiver.connect()
    with log_lines() as lines:
        for n in range(300):
            await sender.send(channel, {"n": n})
        while receiver.statistics()[0].stalled_channels == 0:  # noqa: ASYNC110 - nothing tells it
            await asyncio.sleep(0.01)
        time.sleep(2.0)  # noqa: ASYNC251 - as a handler that computes
        assert [(await receiver.receive(channel))["n"] for _ in range(300)] == list(range(300))
        await asyncio.sleep(0.5)  # A line comes within 0.1 s.
        assert not [line for line in lines.rest() if "waiting in memory" in line]
    waiting.cancel()
    await asyncio.wait([waiting])


async def test_a_slow_channel_loses_nothing_of_which_its_senders_do_not_hear(
    open_layer: OpenLayer,
) -> None:
    """Two seconds for a message, ten a second, and nobody else: the backlog stays on the broker."""
    is_full_length = _SLOW.value > _SLOW.brief
    room = 100 if is_full_length else 10
    config: dict[str, Any] = {"local_capacity": room, "remote_capacity": room}
    # Messages shan't expire: that is another reason, with a line of its own.
    receiver = await open_layer(**config, expiry=600, local_expiry=600)
    sender = await open_layer()
    slow = await receiver.new_channel()
    received: list[int] = []
    handling = 2.0

    async def consume() -> None:
        while True:
            received.append((await receiver.receive(slow))["number"])
            await asyncio.sleep(handling)

    consumer = asyncio.create_task(consume())
    sent: list[int] = []
    refused = 0
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for number in itertools.count():
        if loop.time() > begun + _SLOW.value:
            break
        try:
            await sender.send(slow, {"number": number})
        except ChannelFull:
            refused += 1
        else:
            sent.append(number)
        await asyncio.sleep(max(0.0, begun + (number + 1) / 10 - loop.time()))
    handled = len(received)
    handling = 0.0
    while len(received) < len(sent):
        assert loop.time() < begun + _SLOW.value + 30, "lost"
        await asyncio.sleep(0.01)
    counters = statistics_of(receiver).counters
    logger.info("sent %d, refused %d, handled meanwhile %d", len(sent), refused, handled)
    assert received == sent
    assert refused > 0
    assert handled < len(sent)
    assert (counters.overflowed, counters.expired) == (0, 0)
    consumer.cancel()
    await asyncio.wait([consumer])
