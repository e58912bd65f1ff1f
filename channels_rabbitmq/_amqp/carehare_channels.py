"""carehare's own AMQP channels, repaired: what users of ``carehare_connection`` get.

They behave as carehare documents. Each override names the fault it mends; all share one: carehare
sets futures without asking whether somebody cancelled them, which ends the connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import carehare
import pamqp.base
import pamqp.commands
import pamqp.exceptions
import pamqp.header
from carehare._channel_id_store import ChannelIdStore
from carehare._consume_channel import ConsumeChannel, ConsumeChannelIterator
from carehare._exchange_channel import ExchangeChannel
from carehare._frame_writer import FrameWriter
from carehare._rpc_channel import RpcChannel

from .._futures import fail, resolve
from . import frames
from .channel import closed_by_server


class QuietFrameWriter(FrameWriter):
    """Without carehare's debug log, which holds message bodies."""

    def send_frame(self, frame: Any) -> None:
        if not self._closing:
            self._transport.write(frames.encode(frame, self._channel_id))

    def send_frames(self, frames_to_send: list[Any]) -> None:
        # All or none: half a message would end the connection.
        data = b"".join(frames.encode(frame, self._channel_id) for frame in frames_to_send)
        if not self._closing:
            self._transport.write(data)


class ChannelIds(ChannelIdStore):
    """Hands out AMQP channel numbers, later if there are none left now.

    carehare's raises StopIteration (in a coroutine a RuntimeError) when there are none, never uses
    the last one, and takes a ``channel_max`` of 0, which means "no limit", for "none".
    """

    def __init__(self, channel_max: int) -> None:
        super().__init__((channel_max or 65535) + 1)
        self._waiting: deque[Callable[[int | None], None]] = deque()

    def acquire(self) -> int:
        try:
            return super().acquire()
        except StopIteration:
            raise carehare.ChannelClosed("All AMQP channels of the connection are in use") from None

    def acquire_later(self, use: Callable[[int | None], None]) -> None:
        """Call ``use(amqp_channel_id)`` once there is one, perhaps at once; first come first.

        ``use(None)`` tells that there won't be one any more.
        """
        try:
            amqp_channel_id = super().acquire()
        except StopIteration:
            self._waiting.append(use)
        else:
            use(amqp_channel_id)

    def release(self, channel_id: int) -> None:
        if self._waiting:
            self._waiting.popleft()(channel_id)
        else:
            super().release(channel_id)

    def close(self) -> None:
        """The connection has ended: tell those who wait."""
        waiting, self._waiting = self._waiting, deque()
        for use in waiting:
            use(None)


class Rpc(RpcChannel):
    """One method on an AMQP channel of its own; may start later than it was made."""

    def __init__(self, method: pamqp.base.Frame, ignored_frame_types: frozenset[type]) -> None:
        # Not super().__init__(), which starts at once.
        self._method = method
        self._ignored_frame_types = ignored_frame_types
        self.done = asyncio.get_running_loop().create_future()

    def start(self, frame_writer: FrameWriter) -> None:
        """Open the AMQP channel, call the method, and close it, all in one write."""
        frame_writer.send_frames(
            [
                pamqp.commands.Channel.Open(),
                self._method,
                pamqp.commands.Channel.Close(reply_code=0, reply_text="", class_id=0, method_id=0),
            ]
        )

    def accept_channel_closed_by_server(self, frame: pamqp.commands.Channel.Close) -> None:
        fail(self.done, closed_by_server(frame))

    def accept_channel_closed_by_us(self) -> None:
        resolve(self.done, None)

    def accept_connection_closed(self, exc: carehare.ConnectionClosed) -> None:
        fail(self.done, exc)


class ConfirmingExchange(ExchangeChannel):
    """``Connection.publish()``: cancelled callers, unknown tags and small frames do no harm."""

    def __init__(self, exchange_name: str, *, frame_writer: FrameWriter, frame_max: int) -> None:
        # carehare cuts bodies at frame_max, which leaves no room for the 8 bytes around them.
        super().__init__(
            exchange_name, frame_writer=frame_writer, frame_max=frames.max_payload(frame_max)
        )

    def accept_frame(self, frame: Any) -> None:
        if isinstance(frame, pamqp.commands.Basic.Ack):
            for done in self._pop(frame.delivery_tag or 0, frame.multiple):
                resolve(done, None)
        elif isinstance(frame, pamqp.commands.Basic.Nack):
            for done in self._pop(frame.delivery_tag or 0, frame.multiple):
                fail(done, carehare.ServerSentNack())
        elif not isinstance(frame, pamqp.commands.Channel.OpenOk):
            raise pamqp.exceptions.AMQPUnexpectedFrame(f"Unexpected {type(frame).__name__}")

    def _pop(self, tag: int, multiple: bool) -> list[asyncio.Future[None]]:
        tags = self._find_delivery_tags(tag, multiple)
        found = (self._delivering.pop(tag, None) for tag in tags)
        return [done for done in found if done is not None]

    def accept_channel_closed_by_server(self, frame: pamqp.commands.Channel.Close) -> None:
        self._fail_all(closed_by_server(frame))

    def accept_connection_closed(self, exc: carehare.ConnectionClosed) -> None:
        self._fail_all(exc)

    def _fail_all(self, exc: Exception) -> None:
        for done in self._delivering.values():
            fail(done, exc)
        self._delivering.clear()


class AckingConsumer(ConsumeChannel):
    """``Connection.acking_consumer()``: a cancelled ``next_delivery()`` loses nothing.

    carehare waits for its queue in a task that outlives a cancelled caller and takes the next
    message with it. It also doesn't hear that the broker cancelled the consumer, and it acks on an
    AMQP channel that the broker has closed, which ends the connection. ``closed`` is the users',
    who may cancel it.
    """

    def __init__(self, frame_writer: FrameWriter, **options: Any) -> None:
        super().__init__(frame_writer, **options)
        self._deliveries: deque[tuple[bytes, int]] = deque()
        self._waiters: dict[asyncio.Future[None], None] = {}  # in order
        # As `closed`, which users may cancel.
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def _enqueue_delivery_if_complete(self) -> None:
        # Called by carehare with each header and body frame.
        delivery = self._delivery
        assert delivery is not None
        assert delivery.header is not None
        received = sum(len(frame.value) for frame in delivery.body)
        if received >= delivery.header.body_size:
            body = b"".join(frame.value for frame in delivery.body)
            self._delivery = None
            self._deliveries.append((body, delivery.deliver.delivery_tag or 0))
            self._wake_one()

    def _wake_one(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
                return

    async def next_delivery(self) -> tuple[bytes, int]:
        """Return (body, delivery tag) of the next message, or leave it for the next call.

        Raises what carehare documents once the consumer has ended.
        """
        while not self._deliveries:
            if self._ended.done():
                self._ended.result()
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

    def ack(self, delivery_tag: int) -> None:
        if not self._ended.done():
            super().ack(delivery_tag)

    def close(self) -> None:
        if not self._ended.done():
            self._frame_writer.send_close()

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()
        # Not `await self._ended`: cancelling that would cancel the future.
        await asyncio.wait([self._ended])
        self._ended.result()

    def _end(self, exc: Exception | None) -> None:
        for future in (self._ended, self.closed):
            if exc is None:
                resolve(future, None)
            else:
                fail(future, exc)
        for waiter in self._waiters:
            resolve(waiter, None)

    def accept_frame(self, frame: Any) -> None:
        if isinstance(frame, pamqp.commands.Basic.Cancel):
            self.close()  # of no use any more
            self._end(carehare.ChannelClosed("RabbitMQ cancelled the consumer"))
        elif isinstance(
            frame, (pamqp.header.ContentHeader, pamqp.body.ContentBody)
        ) and not self._is_expected(frame):
            raise pamqp.exceptions.AMQPUnexpectedFrame("A header or body out of place")
        else:
            super().accept_frame(frame)

    def _is_expected(self, frame: Any) -> bool:
        is_header_due = self._delivery is not None and self._delivery.header is None
        return self._delivery is not None and is_header_due == isinstance(
            frame, pamqp.header.ContentHeader
        )

    def accept_channel_closed_by_server(self, frame: pamqp.commands.Channel.Close) -> None:
        self._end(closed_by_server(frame))

    def accept_channel_closed_by_us(self) -> None:
        self._end(None)

    def accept_connection_closed(self, exc: carehare.ConnectionClosed) -> None:
        self._end(exc)

    def __aiter__(self) -> ConsumeChannelIterator:
        return _Iterator(self)


class _Iterator(ConsumeChannelIterator):
    """Acks each message when the next one is asked for."""

    def __init__(self, consumer: AckingConsumer) -> None:
        self._consumer = consumer
        self._yielded_delivery_tag: int | None = None

    async def __anext__(self) -> bytes:
        if self._yielded_delivery_tag is not None:
            self._consumer.ack(self._yielded_delivery_tag)
            self._yielded_delivery_tag = None
        try:
            body, self._yielded_delivery_tag = await self._consumer.next_delivery()
        except carehare.ChannelClosed:
            raise StopAsyncIteration from None
        return body
