"""``OnDemandChannel``: consumers that come and go with the calls that wait for a message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from . import frames
from .channel import CallChannel, ChannelHost
from .content import Content
from .errors import unexpected_frame
from .methods import Basic


class OnDemandChannel(CallChannel):
    """Consumes from any number of queues, one message at a time from each.

    Each consumer needs a tag of its own. ``on_delivery(consumer_tag, body, delivery_tag, by)`` is
    called for each message, also for one that was under way when its consumer was cancelled. ``by``
    is this object. ``on_cancelled(consumer_tag)`` is called when the broker cancels a consumer: its
    queue was deleted, or its node is gone. ``on_end(exc, by)`` is called when the broker closes the
    AMQP channel (ChannelClosedByServer), not when the connection is closed.
    """

    def __init__(
        self,
        host: ChannelHost,
        amqp_channel_id: int,
        *,
        on_delivery: Callable[[str, bytes, int, OnDemandChannel], None],
        on_cancelled: Callable[[str], None],
        on_end: Callable[[Exception, OnDemandChannel], None],
    ) -> None:
        super().__init__(host, amqp_channel_id)
        self._on_delivery = on_delivery
        self._on_cancelled = on_cancelled
        self._on_end = on_end
        # The delivery whose content is arriving
        self._content = Content()
        self._consumer_tag = ""
        self._delivery_tag = 0
        self._is_closed = False
        self._uses = 0  # consumers, and messages that aren't acked
        self.call(Basic.Qos(prefetch_count=1))  # for each consumer

    @property
    def is_closed(self) -> bool:
        """Whether what was delivered can't be acked any more."""
        return self._is_closed or not self._host.is_open

    @property
    def is_idle(self) -> bool:
        """Whether there is neither a consumer nor a message that isn't acked."""
        return not self._uses

    def consume(self, queue: str, consumer_tag: str) -> asyncio.Future[None]:
        """Start deliveries from a queue."""
        self._uses += 1
        return self.call(Basic.Consume(queue=queue, consumer_tag=consumer_tag))

    def cancel(self, consumer_tag: str) -> None:
        """End deliveries; one may be under way. Does nothing once the AMQP channel is closed."""
        if not self.is_closed:
            self._uses -= 1
            self.call(Basic.Cancel(consumer_tag=consumer_tag))

    def ack(self, delivery_tag: int) -> None:
        """Ack a message. When this returns, the system has the bytes (see the transport)."""
        self._uses -= 1
        self._write(frames.encode_ack(self._amqp_channel_id, delivery_tag, False))
        self._host.transport.flush()

    def requeue(self, delivery_tag: int) -> None:
        """Give a message back. The broker does that itself once the AMQP channel is closed."""
        if not self.is_closed:
            self._uses -= 1
            nack = Basic.Nack(delivery_tag=delivery_tag, requeue=True)
            self._write(frames.encode(nack, self._amqp_channel_id))

    def detach(self) -> None:
        """Call no callback from now on, since the connection is given up."""
        self._is_closed = True

    def on_bytes(self, frame_type: int, data: bytes, start: int, end: int) -> int:
        if frame_type != frames.METHOD:
            if self._content.add(frame_type, data, start, end) and not self._is_closed:
                body = self._content.take_body()
                self._uses += 1
                self._on_delivery(self._consumer_tag, body, self._delivery_tag, self)
            return end + 1
        if self._content.is_due:
            raise unexpected_frame("a method instead of a message's body")
        if frames.read_index(data, start, end) != frames.DELIVER:
            return super().on_bytes(frame_type, data, start, end)
        self._consumer_tag = frames.read_consumer_tag(data, start, end)
        self._delivery_tag = frames.read_delivery_tag(data, start, end)
        self._content.begin()
        return end + 1

    def on_frame(self, frame: Any) -> None:
        if not isinstance(frame, Basic.Cancel):
            super().on_frame(frame)
        elif not self._is_closed:
            self._uses -= 1
            self._on_cancelled(frame.consumer_tag or "")

    def _close(self, culprit_exc: Exception, others_exc: Exception) -> None:
        was_closed, self._is_closed = self._is_closed, True
        super()._close(culprit_exc, others_exc)
        if culprit_exc is not others_exc and not was_closed:  # not the connection's end
            self._on_end(culprit_exc, self)
