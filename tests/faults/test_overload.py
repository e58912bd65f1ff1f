"""Far more messages than the consumers can take: senders are told, and memory stays bounded."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from channels.exceptions import ChannelFull

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.programs.overload_senders import count_lines, memory_in_use
from tests.support.layers import statistics_of
from tests.support.lengths import Length
from tests.support.log_lines import log_lines
from tools.private_broker import PrivateBroker

pytestmark = pytest.mark.slow

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

_OVERLOAD = Length(full=60.0, brief=7.0)  # seconds

_CHANNELS = 10
_HANDLING = 0.1  # seconds that a consumer takes for a message: 100 a second in all
_RATE = 2000  # messages a second that are offered, one half to channels and the other to groups
_BODY = 10_000  # bytes: kept, the messages of the shortest overload would need 100 MiB
_MOST_GROWTH = 24 * 1024 * 1024  # bytes
_REMOTE_CAPACITY = 100  # at the default it would take minutes until senders are told
_REPORT_INTERVAL = 5.0  # seconds between two log lines about the same

_ROOT = Path(__file__).parents[2]

logger = logging.getLogger(__name__)  # of figures: pytest -o log_cli=1 --log-cli-level=INFO


class Senders:
    """A process with a sender for each channel; see ``overload_senders.py``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, **options: Any) -> Senders:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.programs.overload_senders", json.dumps(options)),
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        senders = cls(process)
        assert await senders._read() == "ready"
        return senders

    async def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(await self._process.stdout.readline())

    async def _say(self, line: bytes) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        return await self._read()

    async def begin(self, rate: float) -> None:
        """Offer so many messages a second from now on."""
        assert await self._say(b"%f\n" % rate) == "begun"

    async def stop(self) -> dict[str, Any]:
        """Return what happened since they began."""
        books: dict[str, Any] = await self._say(b"0\n")
        return books

    async def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if await asyncio.wait_for(self._process.wait(), 20):
            raise AssertionError("the senders' process failed")


class Consumers:
    """One for each channel, which handles a message after the other."""

    def __init__(self, layer: RabbitmqChannelLayer, channels: list[str]) -> None:
        self.handling = _HANDLING
        self.received: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        self._tasks = [asyncio.create_task(self._consume(layer, channel)) for channel in channels]

    async def _consume(self, layer: RabbitmqChannelLayer, channel: str) -> None:
        while True:
            message = await layer.receive(channel)
            self.received[channel][message["by"]].append(message["number"])
            if self.handling:
                await asyncio.sleep(self.handling)

    def total(self) -> int:
        return sum(len(numbers) for by in self.received.values() for numbers in by.values())

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


@pytest.fixture
async def site(
    open_layer: OpenLayer, private_broker: PrivateBroker, groups_exchange: str
) -> AsyncIterator[tuple[RabbitmqChannelLayer, list[str], Senders, Consumers]]:
    layer = await open_layer(host=private_broker.url, remote_capacity=_REMOTE_CAPACITY)
    channels = [await layer.new_channel() for _ in range(_CHANNELS)]
    for number, channel in enumerate(channels):
        await layer.group_add(f"g{number}", channel)
    senders = await Senders.start(
        host=private_broker.url, exchange=groups_exchange, channels=channels, body=_BODY
    )
    consumers = Consumers(layer, channels)
    yield layer, channels, senders, consumers
    await consumers.end()
    await senders.end()


async def test_overload_is_told_to_senders_and_bounded_everywhere(
    site: tuple[RabbitmqChannelLayer, list[str], Senders, Consumers],
    private_broker: PrivateBroker,
) -> None:
    layer, channels, senders, consumers = site
    loop = asyncio.get_running_loop()

    # Full speed, and all code has run once
    consumers.handling = 0.0
    await senders.begin(_RATE / 10)
    await asyncio.sleep(1)
    books = [await senders.stop()]
    assert books[0]["full"] == books[0]["group_nacked"] == 0
    books.append(await full_speed(senders, consumers))
    speed_before = books[-1]["speed"]

    consumers.handling = _HANDLING
    before = highest = memory_in_use()
    senders_before = books[0]["memory"]
    queued = broker_memory = 0
    with log_lines() as lines:
        await senders.begin(_RATE)
        received_before, begun = consumers.total(), loop.time()
        while loop.time() < begun + _OVERLOAD.value:
            await asyncio.sleep(0.5)
            highest = max(highest, memory_in_use())
            rows = await asyncio.to_thread(
                private_broker.list_queues, "messages_ready", "messages_unacknowledged", "memory"
            )
            queued = max(queued, *(row["messages_ready"] for row in rows))
            broker_memory = max(broker_memory, *(row["memory"] for row in rows))
        handled = consumers.total() - received_before
        overload = await senders.stop()
        books.append(overload)
        lasted = loop.time() - begun
        warnings = count_lines(lines.rest())
    consumers.handling = 0.0
    ended = loop.time()

    # As soon as it's over everything is as before: nothing is refused, nothing has to wait.
    while statistics_of(layer).unacked:
        await asyncio.sleep(0.01)
        assert loop.time() < ended + 2.0
    recovered = loop.time() - ended
    books.append(await full_speed(senders, consumers))
    speed_after = books[-1]["speed"]
    await senders.begin(_RATE / 10)
    await asyncio.sleep(1)
    books.append(await senders.stop())
    assert books[-1]["full"] == books[-1]["group_nacked"] == 0
    assert books[-1]["sent"]

    kinds = ("sent", "group_sent", "full", "group_nacked")
    offered = sum(overload[kind] for kind in kinds)
    logger.info(
        "%.0f s: %d offered, %d handled, %d times ChannelFull, %d group messages refused",
        lasted, offered, handled, overload["full"], overload["group_nacked"],
    )  # fmt: skip
    logger.info(
        "receiver: %.1f MiB before, %.1f highest; senders: %.1f before, %.1f highest, %.1f after;"
        " broker's queue: %d messages, %.1f MiB; drained within %.2f s, full speed %d/s before,"
        " %d/s then; warnings: %s, senders' %s",
        before / 2**20, highest / 2**20,
        senders_before / 2**20, overload["highest_memory"] / 2**20, books[-1]["memory"] / 2**20,
        queued, broker_memory / 2**20, recovered, speed_before, speed_after,
        warnings, overload["warnings"],
    )  # fmt: skip

    # It was an overload, and the senders were told.
    assert offered > 3 * handled
    assert overload["full"] > handled
    assert overload["group_nacked"] > 0

    # The books: what wasn't refused has arrived, in order; nothing was dropped, here or there.
    await until_received(consumers, sum(book["sent"] + book["group_sent"] for book in books))
    for channel in channels:
        for numbers in consumers.received[channel].values():
            assert numbers == sorted(set(numbers))
    counters = statistics_of(layer).counters
    assert (counters.expired, counters.overflowed, counters.no_members, counters.malformed) == (
        0,
    ) * 4
    assert (
        sum(book["outcome_unknown"] + book["unreachable"] + book["blocked"] for book in books) == 0
    )

    # Memory: the receiver's, the senders', the broker's
    assert highest - before < _MOST_GROWTH
    assert overload["highest_memory"] - senders_before < _MOST_GROWTH
    # (A confirm may come before the queue has counted the message.)
    assert queued <= 2 * _REMOTE_CAPACITY
    assert broker_memory < 2 * _REMOTE_CAPACITY * _BODY + 2**20

    # One line about each kind in a few seconds
    most = lasted / _REPORT_INTERVAL + 2
    assert set(warnings) <= {
        "all of local_capacity is in use by N messages",
        "N messages waiting in memory for receivers that are stuck or too slow",
    }
    assert "all of local_capacity is in use by N messages" in warnings
    assert list(overload["warnings"]) == ["N group messages refused by at least one queue"]
    for counts in (warnings, overload["warnings"]):
        assert 1 <= max(counts.values()) <= most


async def full_speed(senders: Senders, consumers: Consumers) -> dict[str, Any]:
    """Send as much as is possible; return the books, with the messages that arrive in a second."""
    begun, before = asyncio.get_running_loop().time(), consumers.total()
    await senders.begin(1e6)
    await asyncio.sleep(1)
    lasted = asyncio.get_running_loop().time() - begun
    speed = (consumers.total() - before) / lasted
    return {**await senders.stop(), "speed": speed}


async def until_received(consumers: Consumers, count: int) -> None:
    deadline = asyncio.get_running_loop().time() + 20
    while consumers.total() < count and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 - a receiver tells nobody
        await asyncio.sleep(0.02)
    assert consumers.total() == count


async def test_a_sender_that_does_not_wait_is_held_up_by_nobody(open_layer: OpenLayer) -> None:
    """All calls at once, ten times what has room: each has its answer, and the books are right."""
    receiver = await open_layer(local_capacity=10, remote_capacity=100)
    sender = await open_layer()
    channel = await receiver.new_channel()
    await sender.send(channel, {"n": -1})
    results = await asyncio.gather(
        *(sender.send(channel, {"n": n}) for n in range(1100)), return_exceptions=True
    )
    sent = [-1, *(n for n, result in enumerate(results) if result is None)]
    assert all(result is None or isinstance(result, ChannelFull) for result in results)
    assert 110 <= len(sent) < 1101
    received = [(await asyncio.wait_for(receiver.receive(channel), 10))["n"] for _ in sent]
    assert received == sent
