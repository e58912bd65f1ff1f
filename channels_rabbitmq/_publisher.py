"""``Publisher``: a connection that publishes with confirms, and nothing else.

Nothing else, so that acks, binds and deliveries, on the Subscriber's connection, go on when the
broker stops reading from publishers (a memory or disk alarm, flow control).

The broker tells a connection that it blocks publishers only after that connection has published,
1 to 2 ms later. So the set-up ends with a probe that no queue takes: either its confirm comes, and
the way is free, or ``connection.blocked``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import carehare
import pamqp.commands

from ._amqp.amqp_channels import CONFIRMED, Outcome, PublisherChannel, Route
from ._amqp.connection import Connection
from ._settings import Settings
from ._statistics import Counters
from ._supervisor import Supervisor
from .exceptions import BrokerUnavailable

logger = logging.getLogger(__name__)

# No group's name and no channel's id holds or begins with "!", so nothing is bound to this key.
_PROBE_KEY = "!probe"

_NOT_FOUND = 404  # AMQP 0-9-1, section 1.2


class Publisher:
    """Publishes on one connection, in the order of the calls.

    ``on_no_exchange()`` is called when the groups exchange turns out to be gone: somebody deleted
    it, and with it everybody's bindings. (The reconnect declares it again.)
    """

    name = "publisher"

    def __init__(
        self,
        settings: Settings,
        counters: Counters,
        *,
        connection_name: str,
        on_no_exchange: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._counters = counters
        self._on_no_exchange = on_no_exchange
        self._amqp_channel: PublisherChannel | None = None  # while connected
        # For channels_rabbitmq 4.x, whose queues are on the default exchange: an AMQP channel of
        # its own, because one send without the permission for that exchange ends it.
        self._default_exchange_channel: PublisherChannel | None = None
        self._refusal_logged = False  # once for a connection
        self._connection: Connection | None = None
        self._is_blocked = False
        self._blocked_at_set_up: asyncio.Future[None] | None = None
        self._end_exc: Exception | None = None  # why the AMQP channel has ended
        self.supervisor = Supervisor(self, settings, connection_name=connection_name)
        self._was_connected = False
        self.reconnected_at = float("-inf")  # loop time

    # Role

    async def set_up(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        self._is_blocked = False
        self._end_exc = None
        self._refusal_logged = False
        blocked = self._blocked_at_set_up = loop.create_future()
        connection.on_blocked = self._accept_blocked
        amqp_channel = connection.open_publisher(on_end=self._accept_end)
        await amqp_channel.call(
            pamqp.commands.Exchange.Declare(
                exchange=self._settings.groups_exchange, exchange_type="direct"
            )
        )
        probe = amqp_channel.publish(
            b"",
            Route(self._settings.groups_exchange, _PROBE_KEY, mandatory=False),
            loop.time() + self._settings.operation_timeout,
        )
        await asyncio.wait([probe, blocked], return_when=asyncio.FIRST_COMPLETED)
        if amqp_channel.is_ended or (probe.done() and probe.result() is not Outcome.CONFIRMED):
            raise self._end_exc or carehare.ConnectionClosed("RabbitMQ took no message in time")
        self._amqp_channel = amqp_channel
        self._connection = connection

    def ready(self) -> None:
        if self._was_connected:
            self.reconnected_at = asyncio.get_running_loop().time()
        self._was_connected = True

    def lost(self, reason: str) -> None:
        self._amqp_channel = self._default_exchange_channel = self._connection = None

    def _accept_blocked(self, reason: str | None) -> None:
        self._is_blocked = reason is not None
        if self._is_blocked:
            logger.warning("publisher: RabbitMQ blocks publishers: %s", reason)
            if self._blocked_at_set_up is not None and not self._blocked_at_set_up.done():
                self._blocked_at_set_up.set_result(None)
        else:
            logger.info("publisher: RabbitMQ takes messages again")

    def _accept_end(self, exc: Exception) -> None:
        self._end_exc = exc
        if self._amqp_channel is None:
            return  # still in set_up(), which raises it
        self._amqp_channel = None
        self.supervisor.give_up_connection(str(exc))
        if isinstance(exc, carehare.ChannelClosedByServer) and exc.reply_code == _NOT_FOUND:
            self._on_no_exchange()

    @property
    def is_blocked(self) -> bool:
        """Whether the broker takes no messages, as ``publish`` says at once. From any thread."""
        return self._is_blocked and self._amqp_channel is not None

    @property
    def unconfirmed(self) -> int:
        """How many messages are written and have no answer. From any thread."""
        amqp_channels = (self._amqp_channel, self._default_exchange_channel)
        return sum(one.unconfirmed for one in amqp_channels if one is not None)

    # Publishing

    async def publish(self, body: bytes, route: Route, deadline: float) -> Outcome:
        """Publish one message and return what became of it.

        Waits for a connection, for the broker to read what others wrote, and for the confirm until
        ``deadline`` (loop time). Raises BrokerUnavailable if there was no connection by then:
        nothing was written. Cancelling it while it waits for the confirm takes nothing back.
        """
        counters = self._counters
        amqp_channel = self._amqp_channel
        if amqp_channel is None or self._is_blocked or not amqp_channel.takes_now():
            amqp_channel = await self._wait_until_taken(len(body), deadline)
            if amqp_channel is None:
                counters.blocked += 1
                return Outcome.BLOCKED
        if not route.exchange:
            try:
                amqp_channel = self._for_default_exchange()
            except (carehare.ChannelClosed, carehare.ConnectionClosed) as err:
                raise BrokerUnavailable(str(err)) from err
        counters.published += 1
        try:
            outcome = await amqp_channel.publish(body, route, deadline)
        except BaseException:
            counters.cancelled += 1
            raise
        if outcome is CONFIRMED:
            counters.confirmed += 1
        elif outcome is Outcome.UNKNOWN:
            counters.unknown += 1
        elif outcome is Outcome.RETURNED:
            counters.returned += 1
        elif route.mandatory:  # refused, like the rest
            counters.refused += 1
        else:
            counters.refused_by_a_queue += 1
        return outcome

    async def _wait_until_taken(self, size: int, deadline: float) -> PublisherChannel | None:
        """Wait until a body of ``size`` bytes may be published; None if that is blocked."""
        has_waited = False  # for the broker to read: it is this message's turn
        while True:
            amqp_channel = self._amqp_channel
            if amqp_channel is None or amqp_channel.is_ended:
                await self.supervisor.wait_ready(deadline)
            elif self._is_blocked:
                return None
            elif has_waited or amqp_channel.takes_now():
                return amqp_channel
            elif await amqp_channel.wait_writable(size, deadline):
                has_waited = True
            else:
                return None

    def _for_default_exchange(self) -> PublisherChannel:
        amqp_channel = self._default_exchange_channel
        if amqp_channel is None or amqp_channel.is_ended:
            assert self._connection is not None, "there is one when there is its AMQP channel"
            amqp_channel = self._connection.open_publisher(on_end=self._accept_refusal)
            self._default_exchange_channel = amqp_channel
        return amqp_channel

    def _accept_refusal(self, exc: Exception) -> None:
        if not self._refusal_logged:
            self._refusal_logged = True
            logger.warning("publisher: RabbitMQ refused a message for version 4.x: %s", exc)
