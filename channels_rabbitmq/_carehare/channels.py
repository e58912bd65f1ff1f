"""The AMQP channels behind a user's calls: one for each call, and one for each exchange.

Each answers its caller's future also if other callers were cancelled. (carehare 1.0 sets futures
without asking whether they were cancelled, which ends the connection.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import carehare

from .._amqp import frames
from .._amqp.channel import CHANNEL_CLOSE, CHANNEL_OPEN, BytesChannel, ChannelHost, closed_by_server
from .._amqp.errors import unexpected_frame
from .._amqp.methods import Basic, Channel, Confirm, Method
from .._amqp.publishing import numbers_up_to
from .._futures import fail, resolve
from .consumer import AckingConsumer


class UserChannels:
    """Makes the AMQP channels of one connection, and knows those of exchanges."""

    def __init__(self, host: ChannelHost) -> None:
        self._host = host
        self._exchanges: dict[str, ExchangeChannel] = {}

    def rpc(self, method: Method, answer: type | None = None) -> asyncio.Future[None]:
        """Call a method once an AMQP channel is free; ``answer`` is what RabbitMQ may say to it.

        The future fails with ``ChannelClosedByServer`` if RabbitMQ refuses the method, and with
        ``ConnectionClosed`` once the connection is closed. A method that can't be written raises
        at once.
        """
        frames.encode(method, 0)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            self._host.add_channel_later(
                lambda number: RpcChannel(self._host, number, method, answer, done),
                on_closed=lambda: fail(
                    done, carehare.ConnectionClosed("The connection was closed")
                ),
            )
        except carehare.ConnectionClosed as err:
            fail(done, err)
        return done

    def publish(
        self, message: bytes, *, exchange_name: str, routing_key: str
    ) -> asyncio.Future[None]:
        """Publish a message; the future ends with RabbitMQ's confirm."""
        if not self._host.is_open:
            raise carehare.ConnectionClosed("The connection is closed")
        exchange = self._exchanges.get(exchange_name)
        if exchange is None:
            exchange = self._host.add_channel(
                lambda number: ExchangeChannel(
                    self._host, number, exchange_name, on_closed=self._exchanges.pop
                )
            )
            self._exchanges[exchange_name] = exchange
        return exchange.publish(message, routing_key)

    def acking_consumer(
        self, queue_name: str, *, prefetch_size: int, prefetch_count: int
    ) -> AckingConsumer:
        """Return a consumer on an AMQP channel of its own."""
        return self._host.add_channel(
            lambda number: AckingConsumer(
                self._host,
                number,
                queue_name,
                prefetch_size=prefetch_size,
                prefetch_count=prefetch_count,
            )
        )


class RpcChannel(BytesChannel):
    """Opens an AMQP channel, calls one method on it, and closes it, all in one write."""

    is_closing = True

    def __init__(
        self,
        host: ChannelHost,
        amqp_channel_id: int,
        method: Method,
        answer: type | None,
        done: asyncio.Future[None],
    ) -> None:
        self._answers = (Channel.OpenOk, answer)
        self._done = done
        host.write(frames.encode_all([CHANNEL_OPEN, method, CHANNEL_CLOSE], amqp_channel_id))

    def on_frame(self, frame: Any) -> None:
        if type(frame) not in self._answers:
            raise unexpected_frame(f"unexpected {type(frame).__name__}")

    def on_closed_by_server(self, frame: Channel.Close) -> None:
        fail(self._done, closed_by_server(frame))

    def on_closed(self) -> None:
        resolve(self._done, None)

    def on_connection_closed(self, exc: carehare.ConnectionClosed) -> None:
        fail(self._done, exc)


class ExchangeChannel(BytesChannel):
    """Publishes to one exchange, with confirms, until RabbitMQ closes the AMQP channel.

    carehare cuts bodies at frame_max, which leaves no room for the 8 bytes around them.
    """

    def __init__(
        self,
        host: ChannelHost,
        amqp_channel_id: int,
        exchange_name: str,
        *,
        on_closed: Callable[[str], object],
    ) -> None:
        self._host = host
        self._amqp_channel_id = amqp_channel_id
        self._exchange_name = exchange_name
        self._on_closed = on_closed
        self._max_payload = frames.max_payload(host.frame_max)
        self._sequence_number = 0
        self._unconfirmed: dict[int, asyncio.Future[None]] = {}  # by sequence number, in order
        host.write(frames.encode_all([CHANNEL_OPEN, Confirm.Select(nowait=True)], amqp_channel_id))

    def publish(self, message: bytes, routing_key: str) -> asyncio.Future[None]:
        method = Basic.Publish(exchange=self._exchange_name, routing_key=routing_key)
        # All or none: half a message would end the connection.
        self._host.write(
            frames.encode(method, self._amqp_channel_id)
            + frames.encode_content(self._amqp_channel_id, message, self._max_payload)
        )
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sequence_number += 1
        self._unconfirmed[self._sequence_number] = done
        return done

    def on_bytes(self, frame_type: int, data: bytes, start: int, end: int) -> int:
        index = frames.read_index(data, start, end) if frame_type == frames.METHOD else None
        if index not in (frames.ACK, frames.NACK):
            return 0
        number, multiple = frames.read_confirm(data, start, end)
        for each in numbers_up_to(number, self._unconfirmed) if multiple else [number]:
            done = self._unconfirmed.pop(each, None)
            if done is not None and index == frames.ACK:
                resolve(done, None)
            elif done is not None:
                fail(done, carehare.ServerSentNack())
        return end + 1

    def on_frame(self, frame: Any) -> None:
        if not isinstance(frame, Channel.OpenOk):
            raise unexpected_frame(f"unexpected {type(frame).__name__}")

    def on_closed_by_server(self, frame: Channel.Close) -> None:
        self._on_closed(self._exchange_name)
        self._fail_all(closed_by_server(frame))

    def on_connection_closed(self, exc: carehare.ConnectionClosed) -> None:
        self._fail_all(exc)

    def _fail_all(self, exc: Exception) -> None:
        unconfirmed, self._unconfirmed = self._unconfirmed, {}
        for done in unconfirmed.values():
            fail(done, exc)
