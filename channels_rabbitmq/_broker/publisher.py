"""``Publisher``: a connection that publishes with confirms, and nothing else.

So acks, binds and deliveries, which are on the Subscriber's connection, go on when RabbitMQ stops
reading from publishers (a memory or disk alarm, flow control).

RabbitMQ tells a connection that it blocks publishers only after that connection has published, 1 to
2 ms later. So the set-up ends with a *ping*, a message that no queue takes: RabbitMQ either answers
it, and takes messages, or sends ``connection.blocked``. This ping is mandatory. If it isn't
returned, something took it, and then messages to processes that are gone won't be returned either.
Either a policy has given the groups exchange an alternate exchange, or it isn't a direct exchange.
(RabbitMQ doesn't tell its type to users who may not declare it.)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

import carehare

from .._amqp.connection import Connection
from .._amqp.errors import NOT_FOUND, is_not_found
from .._amqp.publishing import CONFIRMED, Outcome, PublisherChannel, Route
from .._futures import Waiters, resolve
from .._settings.settings import Settings
from ..exceptions import BrokerUnavailable
from ..statistics import Counters
from .groups_exchange import GroupsExchange
from .outbox import Confirm, Outbox, WaitingMessage
from .shared import Shared
from .supervisor import State, Supervisor
from .version_4 import DefaultExchange

logger = logging.getLogger("channels_rabbitmq.publisher")

# No group's name and no channel's id holds or begins with "!", so nothing is bound to this key.
_PING_KEY = "!ping"

_BLOCKED = ("blocked",)  # what the log was told


class Publisher:
    """Publishes on one connection, in the order of the calls, also if they have to wait.

    ``on_no_exchange()`` is called when the groups exchange turns out to be deleted, and with it the
    bindings of all processes. (The reconnect declares it again.)
    """

    name = "publisher"

    def __init__(
        self,
        settings: Settings,
        counters: Counters,
        groups_exchange: GroupsExchange,
        *,
        id_: str,
        shared: Shared,
        on_no_exchange: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._counters = counters
        self._groups_exchange = groups_exchange
        self._on_no_exchange = on_no_exchange
        # Of a message that no queue takes: any answer shows that RabbitMQ takes messages. (A nack
        # is one, too: it comes from an alternate exchange's queue.)
        self.ping_route = Route(settings.groups_exchange, _PING_KEY, mandatory=False)
        self._amqp_channel: PublisherChannel | None = None  # while connected
        self._default_exchange: DefaultExchange | None = None  # while connected; until 6.0
        self._told = shared.told
        self._is_blocked = False
        self.blocked_reason = ""  # RabbitMQ's words, the last time that it blocked publishers
        self._blocked_at_set_up: asyncio.Future[None] | None = None
        # The AMQP channel that set_up() has made, until on_ready(); and why it has ended
        self._new_amqp_channel: PublisherChannel | None = None
        self._end_exc: Exception | None = None
        self._outbox = Outbox(self._write_waiting, asyncio.get_running_loop().time)
        self.supervisor = Supervisor(self, settings, id_=id_, shared=shared)
        self._was_connected = False
        self.reconnected_at = float("-inf")  # loop time
        self.changed = Waiters()  # woken when it can publish again, or no more
        self.on_blocked: Callable[[], None] = lambda: None  # It is blocked now.
        # Published at an orderly end: a body and its route
        self.bye: tuple[bytes, Route] | None = None

    # ConnectionHandler

    async def set_up(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        self._is_blocked = False
        blocked = self._blocked_at_set_up = loop.create_future()
        connection.on_blocked = self._on_blocked
        amqp_channel = await self._groups_exchange.declare_on(partial(self._open, connection))
        ping = amqp_channel.publish(
            b"",
            self.ping_route._replace(mandatory=True),
            loop.time() + self._settings.operation_timeout,
        )
        ping.add_done_callback(self._on_set_up_ping)
        await asyncio.wait([ping, blocked], return_when=asyncio.FIRST_COMPLETED)
        if amqp_channel.is_closed or (ping.done() and ping.result() is Outcome.UNKNOWN):
            raise self._end_exc or carehare.ConnectionClosed("RabbitMQ took no message in time")
        if not self._is_blocked:
            self._tell_unblocked()  # Perhaps an alarm was on when the last connection ended.
        self._new_amqp_channel = amqp_channel
        self._default_exchange = DefaultExchange(
            connection, self.ping_route, self._told, owner=self.supervisor.name
        )

    def _open(self, connection: Connection) -> PublisherChannel:
        self._end_exc = None
        return connection.open_publisher(on_end=self._on_end, ping_route=self.ping_route)

    def _on_set_up_ping(self, ping: asyncio.Future[Outcome]) -> None:
        """Warn once, if a message that no queue should take isn't returned."""
        is_taken = ping.result() is CONFIRMED or ping.result() is Outcome.NACKED
        if is_taken and self._told.is_news(("no returns",)):
            logger.warning(
                "%s: what send() sends to processes that are gone isn't noticed: the exchange %r "
                "has an alternate exchange, or isn't a direct one",
                self.supervisor.name,
                self._groups_exchange.name,
            )

    def on_ready(self) -> None:
        self._amqp_channel, self._new_amqp_channel = self._new_amqp_channel, None
        if self._was_connected:
            self.reconnected_at = asyncio.get_running_loop().time()
        self._was_connected = True
        if self._end_exc is not None:  # since set_up()
            self._reconnect(self._end_exc)
        elif self._is_blocked:
            self._begin_blocked()
        else:
            self._on_writable()

    def on_lost(self, reason: str) -> None:
        if self.supervisor.state is State.CLOSED:
            self._publish_bye()
        self._amqp_channel = self._new_amqp_channel = self._default_exchange = None
        self._outbox.look_again()
        self.changed.wake()

    def _publish_bye(self) -> None:
        amqp_channel = self._amqp_channel
        if self.bye is None or amqp_channel is None or self._is_blocked:
            return
        if amqp_channel.can_publish():
            # Nobody waits for its confirm. The connection is closed behind it.
            amqp_channel.publish(*self.bye, asyncio.get_running_loop().time())

    def _on_blocked(self, reason: str | None) -> None:
        self._is_blocked = reason is not None
        if reason is not None:
            self.blocked_reason = reason
            if self._told.is_news(_BLOCKED):
                logger.warning("%s: RabbitMQ blocks publishers: %s", self.supervisor.name, reason)
            if self._blocked_at_set_up is not None:
                resolve(self._blocked_at_set_up, None)
            if self._amqp_channel is not None:
                self._begin_blocked()
        else:
            self._tell_unblocked()
            self.changed.wake()

    def _begin_blocked(self) -> None:
        self._outbox.discard_all()
        self.changed.wake()
        self.on_blocked()

    def _tell_unblocked(self) -> None:
        if self._told.is_over(_BLOCKED):
            logger.warning("%s: RabbitMQ takes messages again", self.supervisor.name)

    def _on_end(self, exc: Exception) -> None:
        self._end_exc = exc
        if self._amqp_channel is not None:  # Else set_up() raises this error.
            self._reconnect(exc)

    def _reconnect(self, exc: Exception) -> None:
        self._amqp_channel = None
        self.supervisor.reconnect(str(exc))
        if is_not_found(exc):
            self._on_no_exchange()

    def exchange_is_gone(self) -> None:
        """Reconnect, since another AMQP channel found the groups exchange deleted."""
        self._reconnect(carehare.ChannelClosedByServer(NOT_FOUND, "the groups exchange is gone"))

    @property
    def is_blocked(self) -> bool:
        """Whether the broker takes no messages; then ``publish`` returns at once. Any thread."""
        return self._is_blocked and self._amqp_channel is not None

    @property
    def unconfirmed(self) -> int:
        """How many messages are written and have no answer. From any thread."""
        parts = (self._amqp_channel, self._default_exchange)
        return sum(part.unconfirmed for part in parts if part is not None)

    # Publishing

    async def publish(
        self,
        body: bytes,
        route: Route,
        deadline: float,
        after: Callable[[], Awaitable[object]] | None = None,
    ) -> Outcome:
        """Publish one message and return what became of it.

        Waits for a connection, for room in the socket's buffer, for earlier messages that wait, for
        ``after()`` if there is one, and for the confirm until ``deadline`` (loop time). Raises
        BrokerUnavailable if the time was over before it could be written, and what ``after()``
        raises: then nothing was written. Cancelling it while it waits for the confirm takes nothing
        back.
        """
        counters = self._counters
        amqp_channel = self._amqp_channel
        if (
            amqp_channel is None
            or after is not None
            or self._outbox.messages
            or self._is_blocked
            or not amqp_channel.can_publish()
        ):
            confirm = await self._publish_in_turn(body, route, deadline, after)
            if confirm is None:
                counters.blocked += 1
                return Outcome.BLOCKED
        else:
            confirm = self._write(amqp_channel, body, route, deadline)
        try:
            outcome = await confirm
        except BaseException:
            counters.cancelled += 1
            raise
        if outcome is CONFIRMED:
            counters.confirmed += 1
            return outcome
        if outcome is Outcome.UNKNOWN:
            counters.outcome_unknown += 1
        elif outcome is Outcome.RETURNED:
            counters.returned += 1
        elif not route.mandatory:
            counters.group_nacked += 1
        # Any other nack is counted by the caller, which finds out what it means.
        if self.supervisor.cancels_calls:
            raise asyncio.CancelledError
        return outcome

    async def _publish_in_turn(
        self,
        body: bytes,
        route: Route,
        deadline: float,
        after: Callable[[], Awaitable[object]] | None,
    ) -> Confirm | None:
        """Write a message when all earlier ones are written; None if publishers are blocked."""
        if self.is_blocked:
            return None
        message = WaitingMessage(body, route, deadline)
        self._outbox.add(message)
        try:
            if after is not None:
                self.supervisor.start()  # for both at the same time
                await after()
            message.is_ready = True
            self._outbox.drain()
            await self._wait_done(message)
        except BaseException as err:
            if message.confirm is None:
                raise
            # It was written at the very moment at which its time was over or it was cancelled.
            if not isinstance(err, BrokerUnavailable):
                self._counters.cancelled += 1
                raise
        finally:
            self._outbox.discard(message)
        if message.error is not None:
            raise message.error
        return message.confirm

    async def _wait_done(self, message: WaitingMessage) -> None:
        while not message.is_done:
            if self._amqp_channel is None or self._amqp_channel.is_closed:
                await self.supervisor.wait_ready(message.deadline)
            elif not await message.turn.wait(message.deadline) and not message.is_done:
                if self._amqp_channel is None or self._amqp_channel.can_publish():
                    raise BrokerUnavailable("Messages that came before were not sent in time")
                message.finish()  # too slow: as good as blocked

    async def publish_request(self, body: bytes, route: Route, deadline: float) -> Outcome:
        """Publish a request: as ``publish``, but not in the order of messages, and not counted."""
        while True:
            amqp_channel = self._amqp_channel
            if self.is_blocked:
                return Outcome.BLOCKED
            if amqp_channel is None or amqp_channel.is_closed:
                await self.supervisor.wait_ready(deadline)
            elif amqp_channel.can_publish():
                return await amqp_channel.publish(body, route, deadline)
            else:
                amqp_channel.call_when_writable(self._on_writable)
                if not await self.changed.wait(deadline):
                    return Outcome.BLOCKED  # too slow

    def publish_request_nowait(self, body: bytes, route: Route, deadline: float) -> bool:
        """As ``publish_request``, if it can be written now; return whether."""
        amqp_channel = self._amqp_channel
        if amqp_channel is None or self.is_blocked or not amqp_channel.can_publish():
            return False
        amqp_channel.publish(body, route, deadline)
        return True

    def _on_writable(self) -> None:
        self._outbox.drain()
        self.changed.wake()

    def _write_waiting(self, message: WaitingMessage) -> Confirm | None:
        amqp_channel = self._amqp_channel
        if amqp_channel is None:
            return None
        if not amqp_channel.can_publish():
            amqp_channel.call_when_writable(self._on_writable)
            return None
        return self._write(amqp_channel, message.body, message.route, message.deadline)

    def _write(
        self, amqp_channel: PublisherChannel, body: bytes, route: Route, deadline: float
    ) -> Confirm:
        if route.exchange:
            confirm = amqp_channel.publish(body, route, deadline)
        else:  # until 6.0
            assert self._default_exchange is not None, "it is connected"
            confirm = self._default_exchange.publish(body, route, deadline)
        self._counters.published += 1
        return confirm
