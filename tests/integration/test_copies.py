"""Copies of layers: what they may do on a broker."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from channels_rabbitmq.core import RabbitmqChannelLayer

Copy = Callable[[RabbitmqChannelLayer], RabbitmqChannelLayer]


def pickled(layer: RabbitmqChannelLayer) -> RabbitmqChannelLayer:
    result: RabbitmqChannelLayer = pickle.loads(pickle.dumps(layer))
    return result


COPIES = [copy.copy, copy.deepcopy, pickled]


OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]


async def receive(layer: RabbitmqChannelLayer, channel: str) -> dict[str, Any]:
    return await asyncio.wait_for(layer.receive(channel), 10)


@pytest.mark.parametrize("make_copy", COPIES)
async def test_a_copy_has_connections_of_its_own(open_layer: OpenLayer, make_copy: Copy) -> None:
    layer = await open_layer()
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    copied = make_copy(layer)
    assert copied.statistics() == ()
    other = await copied.new_channel()
    await copied.group_add("g", other)
    assert other.partition("!")[0] != channel.partition("!")[0]
    with pytest.raises(ValueError, match="belongs to"):
        await copied.receive(channel)
    await copied.group_send("g", {"type": "to.both"})
    for each, its in ((layer, channel), (copied, other)):
        assert await receive(each, its) == {"type": "to.both"}
    await copied.close()
    await layer.send(channel, {"type": "still.open"})
    assert await receive(layer, channel) == {"type": "still.open"}


def say_hello(layer: RabbitmqChannelLayer, channel: str) -> None:
    """What the process does that is spawned."""

    async def main() -> None:
        await layer.send(channel, {"type": "hello"})
        await layer.close()

    asyncio.run(main())


@pytest.mark.slow
async def test_a_spawned_process_gets_one(open_layer: OpenLayer) -> None:
    layer = await open_layer()
    channel = await layer.new_channel()
    receiving = asyncio.create_task(layer.receive(channel))
    process = multiprocessing.get_context("spawn").Process(target=say_hello, args=(layer, channel))
    process.start()
    try:
        assert await asyncio.wait_for(receiving, 30) == {"type": "hello"}
    finally:
        await asyncio.to_thread(process.join)
    assert process.exitcode == 0
    process.close()
