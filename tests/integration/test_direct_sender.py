"""Messages to channels, on a broker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from pamqp import commands

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.amqp_proxy import TO_BROKER, AmqpProxy
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


async def test_dead_names_on_event_loops_of_their_own_cost_no_more(
    broker: Any, groups_exchange: str
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        layer = RabbitmqChannelLayer(host=proxy.url, groups_exchange=groups_exchange)

        def send_to_each() -> None:
            for letter in "abcdefgh":
                asyncio.run(layer.send(f"crq.{letter * 16}!specific.x", {"n": 0}))

        await asyncio.to_thread(send_to_each)
        # Of each connection a probe and one try, and a dozen tries for all together. There were 64
        # messages when each loop had an allowance of its own.
        assert 16 <= proxy.count(TO_BROKER, commands.Basic.Publish) < 45
