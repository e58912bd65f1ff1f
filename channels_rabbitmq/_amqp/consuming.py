"""``ConsumerChannel``: declares a queue, consumes from it, and acks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import carehare

from . import frames
from .acks import AckBatch
from .channel import CallChannel, ChannelHost
from .content import Content
from .errors import unexpected_frame
from .methods import Basic, Method


class ConsumerChannel(CallChannel):
    """Declares a queue and consumes from it; acks are written together, once a turn of the loop.

    ``on_delivery(body, delivery_tag, published, consumer)`` is called for each message.
    ``published`` is when it was published, in milliseconds since 1970, 0 if it doesn't say.
    ``consumer`` is this object, to ack it by.

    ``on_end(exc)`` is called at most once: when the broker cancels the consumer (ChannelClosed: the
    queue was deleted, or its node is gone) or closes the AMQP channel (ChannelClosedByServer). It
    isn't called if the broker closes the AMQP channel over a call, whose future has the error, nor
    when the connection is closed.
    """

    def __init__(
        self,
        host: ChannelHost,
        amqp_channel_id: int,
        *,
        on_delivery: Callable[[bytes, int, int, ConsumerChannel], None],
        on_end: Callable[[Exception], None],
    ) -> None:
        super().__init__(host, amqp_channel_id)
        self._on_delivery = on_delivery
        self._on_end = on_end
        # Of a delivery that comes frame by frame
        self._content = Content()
        self._tag = 0
        self._is_ours = True  # for our consumer tag
        self._max_payload = frames.max_payload(host.frame_max)
        self._acks = AckBatch()
        self._is_closed = False

    def consume(self, queue: str, prefetch_count: int | None = None) -> asyncio.Future[None]:
        """Start deliveries, at most ``prefetch_count`` of them unacked (None: as set before)."""
        if prefetch_count is not None:
            self.call(Basic.Qos(prefetch_count=prefetch_count))
        return self.call(Basic.Consume(queue=queue, consumer_tag=frames.CONSUMER_TAG))

    def send_nowait(self, method: Method) -> None:
        """Write a method without waiting for an answer; does nothing once the connection closes."""
        if not self._is_closed and self._host.is_open:
            self._write(frames.encode(method, self._amqp_channel_id))

    def detach(self) -> None:
        """Call no callback and write no ack from now on: the connection is given up."""
        self._on_delivery = lambda body, tag, published, consumer: None
        self._is_closed = True

    def ack(self, delivery_tag: int) -> None:
        """Ack one message; does nothing once the AMQP channel is closed."""
        if self._acks.add(delivery_tag):
            self._host.transport.write_at_flush(self._encode_acks)

    def _encode_acks(self) -> bytes:
        acks = self._acks.drain()
        if self._is_closed or not self._host.is_open:
            return b""
        return b"".join(
            frames.encode_ack(self._amqp_channel_id, tag, multiple) for tag, multiple in acks
        )

    def on_bytes(self, frame_type: int, data: bytes, start: int, end: int) -> int:
        if frame_type == frames.METHOD:
            if self._content.is_due:
                raise unexpected_frame("a method instead of a message's body")
            # Almost always the read holds whole deliveries. Frame by frame they cost twice as much.
            at = self._on_deliveries(data, start - 7)
            if at:
                return at
            if frames.read_index(data, start, end) != frames.DELIVER:
                return super().on_bytes(frame_type, data, start, end)
            self._tag = frames.read_delivery_tag(data, start, end)
            self._is_ours = frames.is_for_our_consumer(data, start)
            self._content.begin()
        elif self._content.add(frame_type, data, start, end):
            self._on_content()
        return end + 1

    def _on_deliveries(self, data: bytes, at: int) -> int:
        """Handle all deliveries that are whole; return where they end, 0 if there is none."""
        end = 0
        while found := frames.find_delivery(data, at, self._amqp_channel_id, self._max_payload):
            tag, published, body_start, body_end = found
            self._acks.expect(tag)
            self._on_delivery(data[body_start:body_end], tag, published, self)
            at = end = body_end + 1
        if end:
            # For the acks of the receivers that wake now. Not after a delivery that came in pieces:
            # whole ones may follow in this read, and their acks would miss this flush.
            self._host.transport.flush_soon()
        return end

    def _on_content(self) -> None:
        body, header = self._content.take_body(), self._content.header
        if self._is_ours:
            self._acks.expect(self._tag)
            published = frames.read_published(header, 0, len(header))
            self._on_delivery(body, self._tag, published, self)

    def on_frame(self, frame: Any) -> None:
        if isinstance(frame, Basic.Cancel):
            if frame.consumer_tag == frames.CONSUMER_TAG:  # and not another one
                self._report_end(
                    carehare.ChannelClosed("RabbitMQ cancelled the consumer: its queue is gone")
                )
        else:
            super().on_frame(frame)

    def _report_end(self, exc: Exception) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._on_end(exc)

    def _close(self, culprit_exc: Exception, others_exc: Exception) -> None:
        if isinstance(culprit_exc, carehare.ChannelClosedByServer) and not self._calls:
            self._report_end(culprit_exc)
        self._is_closed = True
        super()._close(culprit_exc, others_exc)
