"""Consumers, as Channels runs them."""

from __future__ import annotations

import asyncio

from channels_rabbitmq.core import RabbitmqChannelLayer


class StuckConsumer:
    """As a consumer of Channels in a handler that doesn't return."""

    def __init__(self, layer: RabbitmqChannelLayer, channel_name: str) -> None:
        self.layer = layer
        self.channel_name = channel_name

    async def __call__(self) -> None:
        await self.layer.receive(self.channel_name)
        await asyncio.Event().wait()
