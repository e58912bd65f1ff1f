"""Calls after the layer's own end: from an ``atexit`` handler that was there before it."""

from __future__ import annotations

import asyncio
import atexit


def at_exit() -> None:
    async def call() -> list[str]:
        errors = []
        for late in (
            layer.group_send("room", {"type": "too.late"}),
            layer.send(channel, {"type": "too.late"}),
            layer.group_add("room", channel),
        ):
            try:
                await late
            except BrokerUnavailable as err:
                errors.append(str(err))
        return errors

    tell(asyncio.run(call()))


atexit.register(at_exit)  # what is registered first runs last

from asgiref.sync import async_to_sync  # noqa: E402 (after the handler: see above)
from channels.layers import get_channel_layer  # noqa: E402 (as above)
from named import tell  # noqa: E402 (as above)

from channels_rabbitmq.exceptions import BrokerUnavailable  # noqa: E402 (as above)

layer = get_channel_layer()
channel = async_to_sync(layer.new_channel)()
async_to_sync(layer.group_send)("room", {"type": "in.time"})
