"""Receivers that are cancelled at random moments."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from channels_rabbitmq.core import RabbitmqChannelLayer


async def receive_cancelling(
    layer: RabbitmqChannelLayer, channel: str, count: int, *, turns: int
) -> list[int]:
    """The numbers ``n`` of so many messages, of as many ``receive()`` calls as it takes.

    Every other call, by chance, is cancelled after less than so many turns of the event loop: a
    message has arrived by then, or not, or is on its way.
    """
    chance = random.Random(1)
    received: list[int] = []
    while len(received) < count:
        receiving = asyncio.create_task(layer.receive(channel))
        for _ in range(chance.randrange(turns)):
            await asyncio.sleep(0)
        if chance.random() < 0.5:
            receiving.cancel()
        await asyncio.wait([receiving], timeout=10)
        if not receiving.cancelled():
            received.append(receiving.result()["n"])
    return received
