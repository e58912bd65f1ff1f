"""The bare AMQP client with the least that makes it a channel layer: the ceiling for one.

Messages are msgpack with their recipient; a process has one queue for any number of channels; a
``receive()`` waits for its own channel's, and each member of a group gets a copy. It has no checks,
no limits but the queue's, no expiry, no reconnect, no other thread's calls, no encryption; and it
acks what nobody has received yet. As this project's layer it publishes on a connection of its own,
since a broker that is low on memory reads nothing from those that publish, no acks either.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from . import raw
from .raw import NEEDS_LOOP, SERVER, RawLayer

TITLE = "raw, with channels"
REQUIREMENTS = None  # as the project's own environment, whose msgpack it uses
PACKAGES = ("msgpack",)

_CHANNEL = "__asgi_channel__"
_GROUP = "__asgi_group__"


class _Box:
    """One channel's messages, and who waits for the next one."""

    __slots__ = ("messages", "waiter")

    def __init__(self) -> None:
        self.messages: deque[dict[str, Any]] = deque()
        self.waiter: asyncio.Future[None] | None = None

    def put(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        waiter = self.waiter
        if waiter is not None:
            self.waiter = None
            if not waiter.done():
                waiter.set_result(None)


class ChannelsLayer:
    def __init__(self, receiver: RawLayer, publisher: RawLayer) -> None:
        import msgpack

        self._receiver = receiver
        self._publisher = publisher
        self._pack = msgpack.packb
        self._unpack = msgpack.unpackb
        self._loop = asyncio.get_running_loop()
        self._queue = ""
        self._boxes: dict[str, _Box] = {}
        self._members: dict[str, dict[str, _Box]] = {}  # by group and channel

    def close(self) -> None:
        self._receiver.connection.close()
        self._publisher.connection.close()

    async def new_channel(self) -> str:
        if not self._queue:
            self._queue = await self._receiver.consume(self._accept)
        channel = f"{self._queue}!{len(self._boxes)}"
        self._boxes[channel] = _Box()
        return channel

    async def send(self, channel: str, message: dict[str, Any]) -> None:
        queue = channel.partition("!")[0]
        await self._publisher.publish(queue, self._pack({**message, _CHANNEL: channel}))

    async def receive(self, channel: str) -> dict[str, Any]:
        box = self._boxes[channel]
        while not box.messages:
            box.waiter = self._loop.create_future()
            await box.waiter
        return box.messages.popleft()

    async def group_add(self, group: str, channel: str) -> None:
        members = self._members.setdefault(group, {})
        members[channel] = self._boxes[channel]
        if len(members) == 1:
            await self._receiver.group_add(group, self._queue)

    async def group_discard(self, group: str, channel: str) -> None:
        """The binding stays."""
        del self._members[group][channel]

    async def group_send(self, group: str, message: dict[str, Any]) -> None:
        await self._publisher.group_publish(group, self._pack({**message, _GROUP: group}))

    def _accept(self, body: bytes) -> None:
        message = self._unpack(body)
        channel = message.pop(_CHANNEL, None)
        if channel is not None:
            self._boxes[channel].put(message)
            return
        for box in self._members[message.pop(_GROUP)].values():
            box.put(message.copy())


async def make_layer(url: str, capacity: int) -> ChannelsLayer:
    receiver = await raw.make_layer(url, capacity)
    return ChannelsLayer(receiver, await raw.make_layer(url, capacity))


async def close_layer(layer: ChannelsLayer) -> None:
    layer.close()


__all__ = [
    "NEEDS_LOOP",
    "PACKAGES",
    "REQUIREMENTS",
    "SERVER",
    "TITLE",
    "close_layer",
    "make_layer",
]
