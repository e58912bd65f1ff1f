"""Sending to processes with channels_rabbitmq 4.x. Until 6.0."""

from __future__ import annotations

import asyncio
import logging

import carehare

from .._amqp.connection import Connection
from .._amqp.publishing import Outcome, PublisherChannel, Route
from ..exceptions import BrokerUnavailable
from .shared import Told

logger = logging.getLogger("channels_rabbitmq.publisher")


class DefaultExchange:
    """Publishes by one connection to the queues of such processes, on the default exchange.

    It has an AMQP channel of its own, because a send without the permission for that exchange ends
    the channel. ``owner``: what the publisher is called in logs.
    """

    def __init__(
        self, connection: Connection, ping_route: Route, told: Told, *, owner: str
    ) -> None:
        self._connection = connection
        self._ping_route = ping_route
        self._owner = owner
        self._amqp_channel: PublisherChannel | None = None
        self._told = told

    @property
    def unconfirmed(self) -> int:
        """How many messages are written and have no answer. From any thread."""
        return 0 if self._amqp_channel is None else self._amqp_channel.unconfirmed

    def publish(self, body: bytes, route: Route, deadline: float) -> asyncio.Future[Outcome]:
        """As ``PublisherChannel.publish``. Raises BrokerUnavailable if the connection has ended."""
        if self._amqp_channel is None or self._amqp_channel.is_closed:
            try:
                self._amqp_channel = self._connection.open_publisher(
                    on_end=self._on_end, ping_route=self._ping_route
                )
            except (carehare.ChannelClosed, carehare.ConnectionClosed) as err:
                raise BrokerUnavailable(str(err)) from err
        return self._amqp_channel.publish(body, route, deadline)

    def _on_end(self, exc: Exception) -> None:
        if self._told.is_news(("refused for 4.x",)):
            logger.warning("%s: RabbitMQ refused a message for version 4.x: %s", self._owner, exc)
