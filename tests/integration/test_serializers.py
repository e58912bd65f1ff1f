"""The option ``serializer`` between layers, through a real broker."""

from __future__ import annotations

import asyncio
import datetime
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.layers import statistics_of
from tests.support.log_lines import log_lines
from tests.support.members import receive

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

MESSAGE = {
    "type": "x",
    "at": datetime.date(2026, 1, 2),
    "id": uuid.UUID(int=1),
    "by": {7: ["é"]},
    "raw": True,
}
ARRIVED = {
    "type": "x",
    "at": "2026-01-02",
    "id": "00000000-0000-0000-0000-000000000001",
    "by": {"7": ["é"]},
    "raw": True,
}


@pytest.mark.parametrize("keys", [None, ["key"]], ids=["plain", "encrypted"])
async def test_json_between_processes(open_layer: OpenLayer, keys: Any) -> None:
    options = {"serializer": "json", "symmetric_encryption_keys": keys}
    layer, other = await open_layer(**options), await open_layer(**options)
    channels = [await layer.new_channel() for _ in range(3)]
    for channel in channels:
        await layer.group_add("g", channel)
    await other.group_send("g", MESSAGE)
    await other.send(channels[0], MESSAGE)
    for channel in [*channels, channels[0]]:
        assert await receive(layer, channel) == ARRIVED


async def test_messages_that_wait_long_stay_what_they_are(open_layer: OpenLayer) -> None:
    """Those of a channel that is behind are kept as bytes."""
    layer = await open_layer(serializer="json", local_capacity=4)
    stuck, prompt = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("g", stuck)
    waiting = asyncio.create_task(layer.receive(prompt))
    for _ in range(8):
        await layer.group_send("g", MESSAGE)
        await layer.send(stuck, MESSAGE)
    await layer.send(prompt, {"type": "done"})
    assert await waiting == {"type": "done"}
    for _ in range(16):
        assert await receive(layer, stuck) == ARRIVED


@pytest.mark.parametrize(
    ("here", "there"), [("json", "msgpack"), ("msgpack", "json")], ids=["json", "msgpack"]
)
async def test_processes_with_different_settings_say_so(
    open_layer: OpenLayer, here: str, there: str
) -> None:
    layer, other = await open_layer(serializer=here), await open_layer(serializer=there)
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    with log_lines() as lines:
        await other.group_send("g", {"type": "hush"})
        await other.send(channel, {"type": "hush"})
        line = await lines.next("not in this layer's format")
    assert line.endswith(f": by the serializer {there}, while it is {here} here (2)")
    assert statistics_of(layer).counters.malformed == 2
    await layer.send(channel, {"type": "own"})
    assert await receive(layer, channel) == {"type": "own"}


async def test_close_pools_closes(open_layer: OpenLayer) -> None:
    layer = await open_layer()
    await layer.connect()
    await layer.close_pools()
    assert statistics_of(layer).subscriber.state == "closed"
