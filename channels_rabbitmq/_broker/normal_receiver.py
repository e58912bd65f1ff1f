"""Receiving from normal channels: each message goes to one receiver, of all processes.

**A consumer exists only while somebody waits.** RabbitMQ sends it one message at a time (a prefetch
count of 1). When a receiver gets that, the consumer is cancelled unless others wait, the message is
acked, and both are written to the socket *before* ``receive()`` returns. All of that was measured,
with two workers and 400 jobs:

- If a worker prefetches, its messages wait behind the one that it works on, while others are free.
- If the ack is written at the end of the turn, and the handler kills its process, the next process
  gets the same message, and dies of it, too: five times of five.
- So a message is handled once or, if its worker dies, not to its end. There were 2,900 messages a
  second on RabbitMQ 3.10, and 4,900 on 4.0.

**Cancelling.** A message that has come is *reserved* for one waiter. Until ``accept`` it isn't
acked. If the waiter is cancelled, the next one gets it, or RabbitMQ gets it back. Between
``accept`` and the return of ``receive()`` there is no ``await``.

A consumer is cancelled only when RabbitMQ has confirmed it. Otherwise 3.10 forgets it before its
queue has answered, and that answer makes it close the connection (541).

**A refusal** concerns its channel only: RabbitMQ has no room for its queue, or the user may not
read it. Those who wait for it go on waiting, and it is tried again after a pause (``pauses``).
RabbitMQ closes the AMQP channel over a refused consumer, and an ack that was written meanwhile is
lost. So the message that another consumer has handed out comes a second time: 1 of 200 did in a
test. Therefore what was refused once is tried on an AMQP channel of its own until RabbitMQ accepts.

**Another serializer or key.** While a project changes these, a message may be readable for another
worker only. It goes back to the queue, whose head it then is. So this worker receives nothing from
the channel for a while, and a receiver elsewhere gets the message.

**A connection of its own** does all this, opened by the first ``receive()``. When it is lost,
RabbitMQ gives what wasn't acked to another receiver: so a message that is reserved then is
forgotten, and its receiver goes on waiting.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from functools import partial
from typing import Any

import carehare
from channels.exceptions import StopConsumer

from .._amqp.connection import Connection
from .._amqp.errors import is_not_found
from .._amqp.on_demand import OnDemandChannel
from .._codec import Envelope, MalformedBody, OtherSettings
from .._reporter import Reporter
from .._settings.settings import Settings
from ..statistics import Counters
from .groups_exchange import GroupsExchange
from .normal_queues import NormalQueues, NormalTopology
from .pauses import Pauses
from .reasons import describe
from .shared import Shared
from .supervisor import Supervisor

logger = logging.getLogger("channels_rabbitmq.normal_channels")

# Seconds for which a channel is left to others, when its next message isn't readable here
OTHERS_TURN = 5.0


class Delivery:
    """A message that is reserved for one receiver."""

    __slots__ = ("_envelope", "amqp_channel", "channel", "tag")

    def __init__(self, channel: str, envelope: Envelope, tag: int, by: OnDemandChannel) -> None:
        self.channel = channel
        self._envelope = envelope
        self.tag = tag
        self.amqp_channel = by

    def message(self) -> dict[str, Any]:
        return self._envelope.message()


Waiter = asyncio.Future[Delivery | None]


class _Line:
    """Those who wait for messages of one channel, in order, and the consumer for them."""

    __slots__ = ("amqp_channel", "answer", "channel", "consumer_tag", "waiters")

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self.waiters: dict[Waiter, None] = {}
        self.consumer_tag = ""  # while there is a consumer, or will be
        self.amqp_channel: OnDemandChannel | None = None  # as above
        # To the bind or the consume, while it is due
        self.answer: asyncio.Future[None] | None = None

    def forget_consumer(self) -> None:
        self.consumer_tag = ""
        self.amqp_channel = None
        self.answer = None

    def cancel_consumer(self) -> None:
        if self.amqp_channel is not None:
            self.amqp_channel.cancel(self.consumer_tag)
        self.forget_consumer()

    @property
    def is_refused(self) -> bool:
        """Whether RabbitMQ has refused its consumer a moment ago."""
        answer = self.answer if self.consumer_tag else None
        return (
            answer is not None
            and answer.done()
            and isinstance(answer.exception(), carehare.ChannelClosedByServer)
        )


class NormalReceiver:
    """Receives from normal channels, for the ``LoopLayer`` whose id is ``id_``.

    The methods are to be called on its event loop.
    """

    name = "normal_channels"

    def __init__(
        self,
        id_: str,
        settings: Settings,
        topology: NormalTopology,
        groups_exchange: GroupsExchange,
        *,
        shared: Shared,
        counters: Counters,
        reporter: Reporter,
    ) -> None:
        self._id = id_
        self._codec = settings.codec
        self._topology = topology
        self._groups_exchange = groups_exchange
        self._counters = counters
        self._reporter = reporter
        self.supervisor = Supervisor(self, settings, id_=id_, shared=shared)
        # A program may cancel all tasks and let the loop go on: nobody shall wait in vain.
        self.supervisor.on_closed = self.close
        self._queues = NormalQueues(topology, self.supervisor, self._on_no_exchange)
        self._amqp_channel: OnDemandChannel | None = None  # while there is a connection
        self._lines: dict[str, _Line] = {}  # by channel, while somebody waits
        # AMQP channels for what RabbitMQ has refused since it was last accepted
        self._others: list[OnDemandChannel] = []
        self._refused: set[str] = set()
        self._pauses = Pauses(self._on_pause_over)
        self._numbers = itertools.count(1)  # of consumers
        self.receivers = 0  # calls that wait
        self._closed_exc: type[BaseException] | None = None

    # ConnectionHandler

    async def set_up(self, connection: Connection) -> None:
        amqp_channel = self._queues.use(connection)  # It goes on after a refusal.
        await self._groups_exchange.declare_on(lambda: amqp_channel)
        self._amqp_channel = self._open(connection)

    def _open(self, connection: Connection) -> OnDemandChannel:
        return connection.open_on_demand(
            on_delivery=self._on_delivery, on_cancelled=self._on_cancelled, on_end=self._on_end
        )

    def on_ready(self) -> None:
        for line in list(self._lines.values()):
            self._consume(line)

    def on_lost(self, reason: str) -> None:
        self._forget_consumers()

    def _forget_consumers(self) -> None:
        if self._amqp_channel is not None:
            self._amqp_channel.detach()
            self._amqp_channel = None
        for other in self._others:
            other.detach()
        self._others.clear()
        for line in list(self._lines.values()):
            line.forget_consumer()
            self._stop_if_idle(line)

    def _on_no_exchange(self) -> None:
        self.supervisor.reconnect("the groups exchange was deleted")

    def _on_end(self, exc: Exception, by: OnDemandChannel) -> None:
        """RabbitMQ has closed an AMQP channel, mostly over a consumer."""
        connection = self.supervisor.connection
        lines = [line for line in self._lines.values() if line.amqp_channel is by]
        culprit = next((line.channel for line in lines if line.is_refused), None)
        if connection is None or culprit is None:
            self.supervisor.reconnect(str(exc))
            return
        if is_not_found(exc):
            # It was deleted since it was declared here, or its node is down.
            self._queues.forget(culprit, self._queues.bound(culprit))
        self._pause(culprit, exc)
        try:
            if by is self._amqp_channel:
                self._amqp_channel = self._open(connection)
        except carehare.ConnectionClosed:
            return  # The supervisor hears of it, too.
        for line in lines:
            line.forget_consumer()
            self._consume(line)
            self._stop_if_idle(line)

    def _pause(self, channel: str, exc: BaseException) -> None:
        """Try again later to receive from a channel that RabbitMQ refuses."""
        self._refused.add(channel)
        if self._pauses.begin(channel):
            logger.warning(
                "%s: RabbitMQ refuses to let the normal channel %s be received from: %s",
                self._id,
                channel,
                describe(exc),
            )

    def _on_pause_over(self, channel: str) -> None:
        line = self._lines.get(channel)
        if line is not None:
            self._consume(line)

    # Receiving

    async def receive(self, channel: str) -> dict[str, Any]:
        """Wait for the next message of a normal channel: see ``RabbitmqChannelLayer.receive``."""
        while True:
            delivery = await self.hand_over(channel)
            if self.accept(delivery):
                return delivery.message()

    async def hand_over(self, channel: str) -> Delivery:
        """Wait for a message, and reserve it. End that by ``accept`` or ``requeue``."""
        if self._closed_exc is not None:
            raise self._closed_exc
        line = self._lines.get(channel)
        if line is None:
            line = self._lines[channel] = _Line(channel)
        loop = asyncio.get_running_loop()
        waiter: Waiter = loop.create_future()
        line.waiters[waiter] = None
        self.receivers += 1
        self.supervisor.start()
        self._consume(line)
        try:
            delivery = await waiter
            await self.supervisor.read_first()
        except BaseException:
            if not loop.is_closed():
                self._discard(line, waiter)
                if waiter.done() and not waiter.cancelled() and (delivery := waiter.result()):
                    self.requeue(delivery)
            raise
        self._discard(line, waiter)
        if delivery is None:
            raise self._closed_exc or StopConsumer
        return delivery

    def accept(self, delivery: Delivery) -> bool:
        """The receiver takes the message; False if another one will get it.

        If it returns True, RabbitMQ's ack has left.
        """
        by = delivery.amqp_channel
        if by.is_closed:
            return False  # The connection was lost meanwhile.
        by.ack(delivery.tag)
        self._counters.normal_consumed += 1
        return True

    def requeue(self, delivery: Delivery) -> None:
        """The receiver doesn't take it: give it to the next one, here or elsewhere."""
        by = delivery.amqp_channel
        if not by.is_closed and not self._give(delivery):
            by.requeue(delivery.tag)

    def _give(self, delivery: Delivery) -> bool:
        """Reserve a message for who has waited longest here, if anybody does."""
        line = self._lines.get(delivery.channel)
        for waiter in line.waiters if line is not None else ():
            if not waiter.done():
                waiter.set_result(delivery)
                return True
        return False

    def _discard(self, line: _Line, waiter: Waiter) -> None:
        """Somebody doesn't wait any more."""
        self.receivers -= 1
        del line.waiters[waiter]
        self._stop_if_idle(line)

    def _stop_if_idle(self, line: _Line) -> None:
        """Have no consumer if nobody waits."""
        if line.waiters or line.answer is not None:  # else that asks again when it has come
            return
        if self._lines.get(line.channel) is line:
            del self._lines[line.channel]
        line.cancel_consumer()

    def _consume(self, line: _Line) -> None:
        """Have a consumer for those who wait, now or when its queue is bound."""
        connection = self.supervisor.connection
        if connection is None or not connection.is_open or self._amqp_channel is None:
            return
        if line.consumer_tag or line.answer is not None or self._pauses.holds(line.channel):
            return
        if self._queues.bound(line.channel) is None:
            line.answer = self._queues.start_bind(connection, line.channel)
        else:
            by = self._amqp_channel_for(line.channel, connection)
            line.consumer_tag = f"{next(self._numbers)}.{line.channel}"
            line.amqp_channel = by
            line.answer = by.consume(self._topology.queue(line.channel), line.consumer_tag)
        line.answer.add_done_callback(partial(self._on_answer, line))

    def _amqp_channel_for(self, channel: str, connection: Connection) -> OnDemandChannel:
        """Return where to consume: where a refusal harms no other, if there was one."""
        assert self._amqp_channel is not None, "the caller has asked"
        if channel not in self._refused:
            return self._amqp_channel
        self._others = [other for other in self._others if not other.is_closed]
        for other in self._others:
            if other.is_idle:
                return other
        try:
            self._others.append(self._open(connection))
        except carehare.ChannelClosed:  # no number for another AMQP channel
            return self._amqp_channel
        return self._others[-1]

    def _on_answer(self, line: _Line, answer: asyncio.Future[None]) -> None:
        """RabbitMQ has bound the queue, or has begun to deliver from it, or has refused."""
        if line.answer is not answer:
            return  # The connection is gone, and all else that was true.
        line.answer = None
        exc = answer.exception()
        if exc is not None:
            is_bind = not line.consumer_tag  # If it is the consumer, _on_end() knows what to do.
            line.forget_consumer()
            is_refusal = isinstance(exc, carehare.ChannelClosedByServer)
            if is_bind and is_refusal and self.supervisor.connection is not None:
                self._pause(line.channel, exc)
        else:
            if line.consumer_tag:
                self._refused.discard(line.channel)
                self._pauses.end_series(line.channel)
            if line.waiters:
                self._consume(line)
        self._stop_if_idle(line)

    # From RabbitMQ

    def _on_delivery(self, consumer_tag: str, body: bytes, tag: int, by: OnDemandChannel) -> None:
        channel = _channel_of(consumer_tag)
        try:
            envelope = self._codec.decode(body)
            # Another process may have bound it for any group.
            if envelope.group is None and envelope.channel != channel:
                raise MalformedBody("for another recipient, in the queue of a normal channel")
        except OtherSettings as err:
            self._leave_to_others(channel, err)
            line = self._lines.get(channel)
            if line is not None and line.consumer_tag == consumer_tag:
                line.cancel_consumer()  # first, or the message would come again
            by.requeue(tag)
        except MalformedBody as err:
            self._counters.malformed += 1
            self._reporter.report("malformed", str(err))
            by.ack(tag)
        else:
            self.requeue(Delivery(channel, envelope, tag, by))

    def _leave_to_others(self, channel: str, exc: OtherSettings) -> None:
        """Receive nothing from a channel for a while."""
        if self._pauses.begin(channel, OTHERS_TURN):
            logger.warning(
                "%s: messages of the normal channel %s are left to other processes: %s",
                self._id,
                channel,
                exc,
            )

    def _on_cancelled(self, consumer_tag: str) -> None:
        """The queue was deleted, or its node is gone."""
        channel = _channel_of(consumer_tag)
        line = self._lines.get(channel)
        if line is not None and line.consumer_tag == consumer_tag:
            line.forget_consumer()
            self._queues.forget(channel, self._queues.bound(channel))
            if line.waiters:
                self._consume(line)
            self._stop_if_idle(line)

    # The end

    def cancel_receivers(self) -> None:
        """Cancel every call, before ``close``: its event loop will never run again."""
        self._closed_exc = asyncio.CancelledError
        self._pauses.close()
        for line in self._lines.values():
            for waiter in line.waiters:
                waiter.cancel()

    def close(self) -> None:
        """End every pending and later call with ``StopConsumer``."""
        self._closed_exc = self._closed_exc or StopConsumer
        self._pauses.close()
        lines, self._lines = self._lines, {}
        for line in lines.values():
            for waiter in line.waiters:
                if not waiter.done():
                    waiter.set_result(None)


def _channel_of(consumer_tag: str) -> str:
    return consumer_tag.partition(".")[2]
