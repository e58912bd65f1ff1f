"""A website of Django Channels: a group for each user, and a room where everybody is.

Only for processes that have Django Channels and uvicorn.
"""

from __future__ import annotations

import time
from typing import Any

import django.conf
import uvicorn
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.layers import channel_layers
from channels.routing import ProtocolTypeRouter, URLRouter
from django.urls import path

from benchmarks.website_groups import ROOM, user_group

_WORK = 0.0005  # seconds of CPU time that a message takes the consumer


class Consumer(AsyncWebsocketConsumer):
    """A user's websocket. It passes on what comes to the user's group and to the room's."""

    async def connect(self) -> None:
        self._user_group = user_group(self.scope["url_route"]["kwargs"]["user"])
        await self.channel_layer.group_add(self._user_group, self.channel_name)
        await self.channel_layer.group_add(ROOM, self.channel_name)
        await self.accept()

    async def disconnect(self, code: int) -> None:
        await self.channel_layer.group_discard(self._user_group, self.channel_name)
        await self.channel_layer.group_discard(ROOM, self.channel_name)

    async def benchmark_message(self, message: dict[str, Any]) -> None:
        _work()
        await self.send(text_data=f"{message['n']} {message['sent_at']}")


def _work() -> None:
    """By the clock of this thread: on a busy machine it takes no less work, but more time."""
    end = time.thread_time() + _WORK
    while time.thread_time() < end:
        pass


def make_server(layer: Any) -> uvicorn.Server:
    """One uvicorn process of the site, as Django's settings and ``asgi.py`` make it."""
    django.conf.settings.configure(ALLOWED_HOSTS=["*"])
    django.setup()
    channel_layers.set("default", layer)
    application = ProtocolTypeRouter(
        {"websocket": URLRouter([path("user/<int:user>/", Consumer.as_asgi())])}
    )
    # The same in each layer's environment, whatever else is installed there.
    config = uvicorn.Config(
        application, http="h11", ws="websockets", lifespan="off", log_level="warning"
    )
    return uvicorn.Server(config)
