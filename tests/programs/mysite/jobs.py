"""Consumers for ``runworker``, as the documentation of Channels has them."""

from __future__ import annotations

from typing import Any

from asgiref.sync import async_to_sync
from channels.consumer import AsyncConsumer, SyncConsumer
from channels.routing import ChannelNameRouter, ProtocolTypeRouter


class Thumbnails(SyncConsumer):
    def generate(self, message: dict[str, Any]) -> None:
        done = {"type": "done", "id": message["id"]}
        async_to_sync(self.channel_layer.send)(message["reply_to"], done)


class Reports(AsyncConsumer):
    async def report(self, message: dict[str, Any]) -> None:
        done = {"type": "done", "id": -message["id"]}
        await self.channel_layer.send(message["reply_to"], done)


application = ProtocolTypeRouter(
    {
        "channel": ChannelNameRouter(
            {"thumbnails-generate": Thumbnails.as_asgi(), "reports": Reports.as_asgi()}
        )
    }
)
