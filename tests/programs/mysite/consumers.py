"""A chat in three styles of consumer: what one says to a room, all in it hear.

The room is in the path; ``{"say": ...}`` speaks in it.
"""

from __future__ import annotations

import json
from typing import Any

from asgiref.sync import async_to_sync
from channels.generic.websocket import (
    AsyncJsonWebsocketConsumer,
    JsonWebsocketConsumer,
    WebsocketConsumer,
)


class SyncConsumer(WebsocketConsumer):
    """All of it in sync code, each call to the layer by ``async_to_sync``."""

    def connect(self) -> None:
        self.room = self.scope["url_route"]["kwargs"]["room"]
        async_to_sync(self.channel_layer.group_add)(self.room, self.channel_name)
        self.accept()

    def disconnect(self, code: int) -> None:
        async_to_sync(self.channel_layer.group_discard)(self.room, self.channel_name)

    def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        message = {"type": "chat.message", "text": json.loads(text_data or "{}")["say"]}
        async_to_sync(self.channel_layer.group_send)(self.room, message)

    def chat_message(self, event: dict[str, Any]) -> None:
        self.send(json.dumps({"heard": event["text"]}))


class SyncJsonConsumer(JsonWebsocketConsumer):
    """Channels joins and leaves the groups; also sends to its own channel."""

    def websocket_connect(self, message: dict[str, Any]) -> None:
        self.groups = [self.scope["url_route"]["kwargs"]["room"]]
        super().websocket_connect(message)

    def receive_json(self, content: Any, **kwargs: Any) -> None:
        message = {"type": "chat.message", "text": content["say"]}
        async_to_sync(self.channel_layer.group_send)(self.groups[0], message)
        own = {"type": "said", "text": content["say"]}
        async_to_sync(self.channel_layer.send)(self.channel_name, own)

    def chat_message(self, event: dict[str, Any]) -> None:
        self.send_json({"heard": event["text"]})

    def said(self, event: dict[str, Any]) -> None:
        self.send_json({"said": event["text"]})


class AsyncConsumer(AsyncJsonWebsocketConsumer):
    async def websocket_connect(self, message: dict[str, Any]) -> None:
        self.groups = [self.scope["url_route"]["kwargs"]["room"]]
        await super().websocket_connect(message)

    async def receive_json(self, content: Any, **kwargs: Any) -> None:
        message = {"type": "chat.message", "text": content["say"]}
        await self.channel_layer.group_send(self.groups[0], message)

    async def chat_message(self, event: dict[str, Any]) -> None:
        await self.send_json({"heard": event["text"]})
