"""A group's member, what it receives, and the next connection of its layer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.layers import subscriber_of

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]


GROUP = "chat.room-1"


async def receive(layer: RabbitmqChannelLayer, channel: str) -> dict[str, Any]:
    """Receive, with a limit so that a lost message fails here and not at the test's limit."""
    return await asyncio.wait_for(layer.receive(channel), 10)


async def open_member(open_layer: OpenLayer, **config: Any) -> tuple[RabbitmqChannelLayer, str]:
    layer = await open_layer(**config)
    channel = await layer.new_channel()
    await layer.group_add(GROUP, channel)
    return layer, channel


async def reconnect(layer: RabbitmqChannelLayer) -> None:
    """Have a layer go on with its next connection for receiving."""
    loop = asyncio.get_running_loop()
    supervisor = subscriber_of(layer).supervisor
    former = await supervisor.wait_ready(loop.time() + 10)
    supervisor.reconnect("a test wants it so")
    await asyncio.wait([former.closed])
    assert await supervisor.wait_ready(loop.time() + 10) is not former


async def must_work(layer: RabbitmqChannelLayer, other: RabbitmqChannelLayer | None = None) -> None:
    """``layer`` gets what it, or ``other``, sends to its channel and group."""
    other = other or layer
    channel = await layer.new_channel()
    await layer.group_add("chat", channel)
    await other.send(channel, {"type": "direct"})
    await other.group_send("chat", {"type": "group"})
    assert (await receive(layer, channel))["type"] == "direct"
    assert (await receive(layer, channel))["type"] == "group"
