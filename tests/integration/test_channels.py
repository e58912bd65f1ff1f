"""Channels uses the layer as a project does: settings, consumers, ``get_channel_layer()``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import django
import pytest
from channels.consumer import AsyncConsumer
from channels.generic.websocket import AsyncJsonWebsocketConsumer
from channels.layers import channel_layers, get_channel_layer
from channels.testing import WebsocketCommunicator
from channels.worker import Worker
from django.conf import settings
from django.test import override_settings

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.brokers import Broker
from tests.support.layers import has_members, inside

if not settings.configured:
    settings.configure()
    django.setup()


class Chat(AsyncJsonWebsocketConsumer):
    """Joins the group that the path names; tells it what its client says."""

    async def websocket_connect(self, message: dict[str, Any]) -> None:
        # As ``groups = [...]`` in a class: Channels joins them, and leaves them at the end.
        self.groups = [self.scope["path"].strip("/")]
        await super().websocket_connect(message)

    async def receive_json(self, content: Any, **kwargs: Any) -> None:
        await self.channel_layer.group_send(
            self.groups[0], {"type": "chat.message", "text": content["text"]}
        )

    async def chat_message(self, event: dict[str, Any]) -> None:
        await self.send_json({"text": event["text"]})


@pytest.fixture
async def layer(broker: Broker, groups_exchange: str) -> AsyncIterator[RabbitmqChannelLayer]:
    config = {
        "default": {
            "BACKEND": "channels_rabbitmq.core.RabbitmqChannelLayer",
            "CONFIG": {"host": broker.url, "groups_exchange": groups_exchange},
        }
    }
    with override_settings(CHANNEL_LAYERS=config):
        layer = get_channel_layer()
        assert isinstance(layer, RabbitmqChannelLayer)
        yield layer
        await layer.close()
        channel_layers.backends.clear()


async def test_consumers_reach_each_other(layer: RabbitmqChannelLayer) -> None:
    clients = [WebsocketCommunicator(Chat.as_asgi(), "/room") for _ in range(3)]
    for client in clients:
        assert await client.connect() == (True, None)
    await clients[0].send_json_to({"text": "hello"})
    for client in clients:
        assert await client.receive_json_from() == {"text": "hello"}
    await clients[0].disconnect()
    await clients[1].send_json_to({"text": "bye"})
    for client in clients[1:]:
        assert await client.receive_json_from() == {"text": "bye"}
        await client.disconnect()
    assert not has_members(layer, "room")
    assert inside(layer).router.idle


async def test_closing_the_layer_ends_consumers_quietly(layer: RabbitmqChannelLayer) -> None:
    client = WebsocketCommunicator(Chat.as_asgi(), "/room")
    await client.connect()
    await layer.close()
    await client.wait()


async def test_any_consumer_has_a_channel(layer: RabbitmqChannelLayer) -> None:
    class Echo(AsyncConsumer):
        async def websocket_connect(self, message: dict[str, Any]) -> None:
            await self.send({"type": "websocket.accept"})
            await self.channel_layer.send(self.channel_name, {"type": "to.myself"})

        async def to_myself(self, event: dict[str, Any]) -> None:
            await self.send({"type": "websocket.send", "text": "heard"})

    client = WebsocketCommunicator(Echo.as_asgi(), "/")
    await client.connect()
    assert await client.receive_from() == "heard"
    client.stop()
    await client.wait()


async def test_a_worker_ends_at_once_and_is_told_what_to_use_instead(
    layer: RabbitmqChannelLayer,
) -> None:
    """As ``manage.py runworker thumbnails`` runs it."""
    worker = Worker(AsyncConsumer.as_asgi(), ["thumbnails"], layer)
    with pytest.raises(NotImplementedError, match=r"'thumbnails' is a normal channel .* Celery"):
        await asyncio.wait_for(worker.handle(), 10)
