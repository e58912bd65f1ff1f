"""What ``status()`` tells of this process and of others, on a real broker."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable

import pytest
from asgiref.sync import async_to_sync

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.consumers import StuckConsumer
from tests.support.layers import close_for_sync_code, statistics_of, statistics_of_id

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]
MESSAGE = {"type": "stuck"}


async def test_it_says_what_the_other_processes_statistics_say(open_layer: OpenLayer) -> None:
    asking, asked = await open_layer(), await open_layer()
    await asking.connect()
    await asked.connect()
    channel = await asked.new_channel()
    await asked.send(channel, MESSAGE)
    status = await asking.status()
    assert status.is_complete
    assert (status.silent, status.absent) == ((), ())
    first, second = status.processes
    assert first.statistics.id == statistics_of(asking).id
    assert second.statistics.id == statistics_of(asked).id
    assert first.worst_channel is None
    assert first.oldest == 0.0
    assert second.worst_channel is not None
    assert second.worst_channel.name == channel
    assert (second.worst_channel.messages, second.statistics.buffered) == (1, 1)
    assert 0 < second.oldest < 30
    assert second.statistics.pid == os.getpid()
    assert second.statistics.host == socket.gethostname()
    assert second.statistics.counters.confirmed == statistics_of(asked).counters.confirmed == 1


async def test_a_stuck_consumer_is_named_with_its_class_and_groups(open_layer: OpenLayer) -> None:
    layer = await open_layer()
    stuck = StuckConsumer(layer, await layer.new_channel())
    await layer.group_add("room", stuck.channel_name)
    task = asyncio.create_task(stuck())
    for _ in range(3):
        await layer.group_send("room", MESSAGE)
    await asyncio.sleep(1.1)  # so that it isn't just busy
    (process,) = (await layer.status()).processes
    assert process.worst_channel is not None
    assert process.worst_channel.name == stuck.channel_name
    assert process.worst_channel.messages == 2
    assert process.worst_channel.description == "StuckConsumer, in room"
    assert process.oldest > 1.0
    task.cancel()
    await asyncio.wait([task])


async def test_from_sync_code(open_layer: OpenLayer) -> None:
    layer = await open_layer()
    own = (await layer.new_channel()).partition("!")[0]
    status = await asyncio.to_thread(lambda: async_to_sync(layer.status)())
    assert {(one.statistics.id, one.statistics.for_sync_code) for one in status.processes} == {
        (one.id, one.id != own) for one in layer.statistics()
    }
    assert statistics_of_id(layer, own).processes.known == 1
    await close_for_sync_code(layer)


async def test_without_a_broker_and_with_a_wrong_timeout() -> None:
    # Nobody listens at port 1.
    layer = RabbitmqChannelLayer(host="amqp://127.0.0.1:1/", operation_timeout=0.1)
    with pytest.raises(ValueError, match="above 0"):
        await layer.status(0)
    with pytest.raises(BrokerUnavailable):
        await layer.status()
    await layer.close()
