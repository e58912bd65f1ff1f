"""A bare AMQP client: what RabbitMQ and one Python process each way can do.

It asks of RabbitMQ what this project's layer asks of it for a message, and nothing more: to route a
mandatory message with a number through a direct exchange and the receiver's own into a bounded
queue, to confirm it, to deliver it, and to take the ack.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

from .raw_amqp import RawConnection

TITLE = "raw AMQP client"
REQUIREMENTS = None  # Python's standard library is enough.
PACKAGES = ()
SERVER = "rabbitmq"
NEEDS_LOOP = True  # It connects when it is made.

EXCHANGE = "benchmark-raw"

_head = struct.Struct(">QQ")  # the sender and its message's number


class RawLayer:
    """Of a channel layer only what the scenarios for it use: one channel, and the groups it is in.

    A message is {"sender": int, "n": int, "data": bytes}; on the wire these three in a row. With
    ``exchange`` "" it goes straight to its queue, and is not mandatory.
    """

    def __init__(self, connection: RawConnection, capacity: int, exchange: str) -> None:
        self.connection = connection
        self._capacity = capacity
        self._exchange = exchange
        self._is_mandatory = bool(exchange)
        self._starts: dict[str, bytes] = {}
        self._bodies: deque[bytes] = deque()
        self._waiter: asyncio.Future[None] | None = None

    async def new_channel(self) -> str:
        return await self.consume(self._accept)

    async def consume(self, on_body: Callable[[bytes], None]) -> str:
        """A new channel whose messages go to a callback."""
        name = f"raw.{secrets.token_hex(8)}"
        connection = self.connection
        await connection.declare_queue(
            name,
            {
                "x-queue-type": "classic",
                "x-max-length": self._capacity,
                "x-overflow": "reject-publish",
                "x-message-ttl": 60_000,
            },
        )
        if self._exchange:
            await connection.declare_exchange(self._exchange, "direct")
            await connection.declare_exchange(name, "fanout", auto_delete=True)
            await connection.bind(name, name, "")
            await connection.bind_exchange(name, self._exchange, name)
        await connection.consume(name, self._capacity, on_body)
        return name

    async def send(self, channel: str, message: dict[str, Any]) -> None:
        await self.publish(channel, _encode(message))

    def publish(self, channel: str, body: bytes) -> asyncio.Future[None]:
        """The future ends with the confirm."""
        start = self._starts.get(channel)
        if start is None:
            start = self._starts[channel] = self.connection.publish_start(
                self._exchange, channel, is_mandatory=self._is_mandatory
            )
        return self.connection.publish(start, body, is_numbered=self._is_mandatory)

    async def group_add(self, group: str, channel: str) -> None:
        await self.connection.bind(channel, self._exchange, group)

    def group_send(self, group: str, message: dict[str, Any]) -> asyncio.Future[None]:
        """The future ends with the confirm."""
        return self.group_publish(group, _encode(message))

    def group_publish(self, group: str, body: bytes) -> asyncio.Future[None]:
        """The future ends with the confirm."""
        start = self._starts.get(group)
        if start is None:
            start = self._starts[group] = self.connection.publish_start(
                self._exchange, group, is_mandatory=False
            )
        return self.connection.publish(start, body, is_numbered=False)

    async def receive(self, channel: str) -> dict[str, Any]:
        """For one caller at a time."""
        while not self._bodies:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return decode(self._bodies.popleft())

    def _accept(self, body: bytes) -> None:
        self._bodies.append(body)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _encode(message: dict[str, Any]) -> bytes:
    data: bytes = message["data"]
    return _head.pack(message["sender"], message["n"]) + data


def decode(body: bytes) -> dict[str, Any]:
    sender, n = _head.unpack_from(body)
    return {"sender": sender, "n": n, "data": body[_head.size :]}


async def make_layer(url: str, capacity: int, exchange: str = EXCHANGE) -> RawLayer:
    connection = await RawConnection.connect(url)
    await connection.confirm_select()
    return RawLayer(connection, capacity, exchange)


async def close_layer(layer: RawLayer) -> None:
    layer.connection.close()
