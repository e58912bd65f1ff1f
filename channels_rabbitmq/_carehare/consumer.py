"""``AckingConsumer``: what ``acking_consumer()`` gives to users."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import carehare

from .._amqp import frames
from .._amqp.channel import CHANNEL_CLOSE, CHANNEL_OPEN, BytesChannel, ChannelHost, closed_by_server
from .._amqp.content import Content
from .._amqp.errors import unexpected_frame
from .._amqp.methods import Basic, Channel, Method
from .._futures import fail, resolve

_CONSUMER_TAG = "carehare"


class AckingConsumer(BytesChannel):
    """A consumer as carehare documents it: ``async for`` acks each message when it is done with.

    ``closed`` is the users', who may cancel it. A cancelled ``next_delivery()`` loses nothing:
    the message goes to the next call. (carehare 1.0 waits in a task that outlives its caller and
    takes the next message with it. It doesn't hear that RabbitMQ cancelled the consumer, and it
    acks on an AMQP channel that RabbitMQ has closed, which ends the connection.)
    """

    def __init__(
        self,
        host: ChannelHost,
        amqp_channel_id: int,
        queue_name: str,
        *,
        prefetch_size: int,
        prefetch_count: int,
    ) -> None:
        self._host = host
        self._amqp_channel_id = amqp_channel_id
        loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = loop.create_future()
        self._closed: asyncio.Future[None] = loop.create_future()  # the same, but ours
        self._content = Content()
        self._tag = 0  # of the message whose content is due
        self._deliveries: deque[tuple[bytes, int]] = deque()
        self._waiters: dict[asyncio.Future[None], None] = {}  # in order
        self._write(
            CHANNEL_OPEN,
            Basic.Qos(prefetch_size=prefetch_size, prefetch_count=prefetch_count),
            Basic.Consume(queue=queue_name, consumer_tag=_CONSUMER_TAG, nowait=True),
        )

    def _write(self, *methods: Method) -> None:
        self._host.write(frames.encode_all(methods, self._amqp_channel_id))

    async def next_delivery(self) -> tuple[bytes, int]:
        """Return (body, delivery tag) of the next message, or leave it for the next call.

        Raises what carehare documents once the consumer is closed.
        """
        while not self._deliveries:
            if self._closed.done():
                self._closed.result()
                raise carehare.ChannelClosed("The consumer is closed")
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters[waiter] = None
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled() and self._deliveries:
                    self._wake_one()
                raise
            finally:
                del self._waiters[waiter]
        return self._deliveries.popleft()

    def _wake_one(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
                return

    def ack(self, delivery_tag: int) -> None:
        """Ack one message; does nothing once the consumer is closed."""
        if not self.is_closing and not self._closed.done():
            self._write(Basic.Ack(delivery_tag=delivery_tag))

    def close(self) -> None:
        """Begin to close the consumer; ``closed`` is done when RabbitMQ has answered."""
        if not self.is_closing and not self._closed.done():
            self._write(CHANNEL_CLOSE)
            self.is_closing = True

    async def __aenter__(self) -> AckingConsumer:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()
        # Not `await self._closed`: cancelling that would cancel the future.
        await asyncio.wait([self._closed])
        self._closed.result()

    def __aiter__(self) -> _Iterator:
        return _Iterator(self)

    # What RabbitMQ says

    def on_bytes(self, frame_type: int, data: bytes, start: int, end: int) -> int:
        if frame_type in (frames.HEADER, frames.BODY):
            if self._content.add(frame_type, data, start, end):
                self._deliveries.append((self._content.take_body(), self._tag))
                self._wake_one()
            return end + 1
        if frame_type == frames.METHOD and frames.read_index(data, start, end) == frames.DELIVER:
            self._content.begin()
            self._tag = frames.read_delivery_tag(data, start, end)
            return end + 1
        return 0

    def on_frame(self, frame: Any) -> None:
        if isinstance(frame, Basic.Cancel):
            self.close()  # of no use any more
            self._set_closed(carehare.ChannelClosed("RabbitMQ cancelled the consumer"))
        elif self._content.is_due or not isinstance(frame, (Channel.OpenOk, Basic.QosOk)):
            raise unexpected_frame(f"unexpected {type(frame).__name__}")

    def on_closed_by_server(self, frame: Channel.Close) -> None:
        self._set_closed(closed_by_server(frame))

    def on_closed(self) -> None:
        self._set_closed(None)

    def on_connection_closed(self, exc: carehare.ConnectionClosed) -> None:
        self._set_closed(exc)

    def _set_closed(self, exc: Exception | None) -> None:
        for future in (self._closed, self.closed):
            if exc is None:
                resolve(future, None)
            else:
                fail(future, exc)
        for waiter in self._waiters:
            resolve(waiter, None)


class _Iterator:
    """Acks each message when the next one is asked for."""

    def __init__(self, consumer: AckingConsumer) -> None:
        self._consumer = consumer
        self._yielded_delivery_tag: int | None = None

    def __aiter__(self) -> _Iterator:
        return self

    async def __anext__(self) -> bytes:
        if self._yielded_delivery_tag is not None:
            self._consumer.ack(self._yielded_delivery_tag)
            self._yielded_delivery_tag = None
        try:
            body, self._yielded_delivery_tag = await self._consumer.next_delivery()
        except carehare.ChannelClosed:
            raise StopAsyncIteration from None
        return body
