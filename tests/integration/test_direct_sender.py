"""Messages to channels, on a broker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.log_lines import log_lines

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]


async def test_eight_dead_names_before_a_live_one(open_layer: OpenLayer) -> None:
    """A table of channel names, as Channels' documentation has it, after a night."""
    sender, receiver = await open_layer(), await open_layer()
    alive = await receiver.new_channel()
    await asyncio.gather(sender.connect(), receiver.connect())
    begun_at = time.monotonic()
    with log_lines() as lines:
        for letter in "abcdefgh":
            await sender.send(f"crq.{letter * 16}!specific.x", {"n": 0})
        await sender.send(alive, {"n": 1})
        assert await receiver.receive(alive) == {"n": 1}
        # 0.64 seconds on a quiet machine. With two seconds of tries for each name it was 14.5.
        assert time.monotonic() - begun_at < 5.0
        await lines.next("WARNING .* dropped: the process of their channel is gone")
    (statistics,) = sender.statistics()
    assert statistics.counters.unreachable == 8
