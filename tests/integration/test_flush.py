"""``flush()``: empties what all processes hold, if ``allow_flush`` allows it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.brokers import Broker
from tests.support.changes import until
from tests.support.layers import close_for_sync_code, has_members, statistics_of
from tests.support.loop_thread import LoopThread
from tests.support.members import receive
from tests.support.normal_channels import delete_queue, queue_of, until_ready

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

OLD = {"type": "old"}
NEW = {"type": "new"}


@pytest.fixture
def open_one(open_layer: OpenLayer) -> OpenLayer:
    async def open_one(**config: Any) -> RabbitmqChannelLayer:
        return await open_layer(**{"allow_flush": True, **config})

    return open_one


async def open_member(open_one: OpenLayer, **config: Any) -> tuple[RabbitmqChannelLayer, str]:
    layer = await open_one(**config)
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    return layer, channel


async def must_be_empty(layer: RabbitmqChannelLayer, channel: str) -> None:
    """It is in no group, and the next message is a new one."""
    assert not has_members(layer, "g")
    await layer.group_send("g", OLD)
    await layer.send(channel, NEW)
    assert await receive(layer, channel) == NEW
    statistics = statistics_of(layer)
    counters = statistics.counters
    assert (statistics.buffered, statistics.unacked) == (0, 0)
    assert counters.enqueued == counters.consumed + counters.flushed


async def test_without_the_option(open_layer: OpenLayer) -> None:
    layer = await open_layer()
    assert layer.extensions == ["groups"]
    with pytest.raises(NotImplementedError, match="set the option allow_flush to True in all"):
        await layer.flush()
    assert (await open_layer(allow_flush=True)).extensions == ["groups", "flush"]
    assert RabbitmqChannelLayer.extensions == ["groups"]


async def test_what_waits_in_memory_and_on_the_broker(open_one: OpenLayer) -> None:
    layer, channel = await open_member(open_one, local_capacity=3)
    for _ in range(10):
        await layer.send(channel, OLD)
        await layer.group_send("g", OLD)
    await layer.flush()
    await must_be_empty(layer, channel)
    assert statistics_of(layer).counters.flushed == 3


async def test_stalled_channels(open_one: OpenLayer) -> None:
    layer, channel = await open_member(open_one, local_capacity=2)
    waiting = asyncio.create_task(layer.receive(await layer.new_channel()))
    for _ in range(10):
        await layer.group_send("g", OLD)
    await until(lambda: statistics_of(layer).counters.enqueued == 10)
    await layer.flush()
    await must_be_empty(layer, channel)
    assert not waiting.done()
    waiting.cancel()
    await asyncio.wait([waiting])


async def test_receivers_go_on_waiting(open_one: OpenLayer) -> None:
    layer, channel = await open_member(open_one)
    waiting = asyncio.create_task(layer.receive(channel))
    await until(lambda: statistics_of(layer).receivers == 1)
    await layer.flush()
    assert not waiting.done()
    await layer.send(channel, NEW)
    assert await waiting == NEW


async def test_groups_can_be_joined_again(open_one: OpenLayer) -> None:
    layer, channel = await open_member(open_one)
    await layer.flush()
    await layer.group_add("g", channel)
    await layer.group_send("g", NEW)
    assert await receive(layer, channel) == NEW


async def test_normal_channels(open_one: OpenLayer, broker: Broker, groups_exchange: str) -> None:
    layer = await open_one(normal_channels=True)
    jobs = f"jobs-{secrets.token_hex(4)}"
    for _ in range(3):
        await layer.send(jobs, OLD)
    await layer.flush()
    await until_ready(broker.url, queue_of(groups_exchange, jobs), 0)
    await layer.send(jobs, NEW)
    assert await receive(layer, jobs) == NEW
    await delete_queue(broker.url, queue_of(groups_exchange, jobs))
    await layer.flush()


async def test_all_processes(open_one: OpenLayer, broker: Broker, groups_exchange: str) -> None:
    """Whichever process asks: nobody has anything left."""
    layers = [await open_member(open_one, normal_channels=True) for _ in range(3)]
    jobs = [f"jobs-{secrets.token_hex(4)}" for _ in layers]
    for (layer, channel), job in zip(layers, jobs, strict=True):
        for _ in range(3):
            await layer.group_send("g", OLD)
            await layer.send(channel, OLD)
        await layer.send(job, OLD)
    await layers[0][0].flush()
    for (layer, channel), job in zip(layers, jobs, strict=True):
        await must_be_empty(layer, channel)
        await until_ready(broker.url, queue_of(groups_exchange, job), 0)
        await delete_queue(broker.url, queue_of(groups_exchange, job))


async def test_a_process_that_only_sends_may_ask(open_one: OpenLayer) -> None:
    layer, channel = await open_member(open_one)
    await layer.send(channel, OLD)
    await (await open_one()).flush()
    await must_be_empty(layer, channel)


async def test_other_loops_and_sync_code(open_one: OpenLayer) -> None:
    layer, channel = await open_member(open_one)
    with LoopThread() as thread:
        there = await thread.run(layer.new_channel())
        await thread.run(layer.send(there, OLD))
        await layer.send(channel, OLD)
        await asyncio.to_thread(lambda: async_to_sync(layer.flush)())
        await layer.send(there, NEW)
        assert await receive(layer, there) == NEW
        await layer.send(channel, NEW)
        assert await receive(layer, channel) == NEW
        await thread.run(layer.close())
    await close_for_sync_code(layer)


async def test_normal_channels_of_event_loops_that_have_ended(open_one: OpenLayer) -> None:
    layer = await open_one(normal_channels=True)
    with LoopThread() as thread:
        await thread.run(layer.send("jobs", OLD))
    await layer.flush()
    await layer.send("jobs", NEW)
    assert await receive(layer, "jobs") == NEW
