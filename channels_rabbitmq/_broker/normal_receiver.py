"""Receiving from normal channels: each message goes to one receiver, of all processes.

**A consumer exists only while a call waits.** RabbitMQ sends it one message at a time (a prefetch
count of 1). When a receiver gets that, the consumer is cancelled unless other calls wait, and the
message is acked. Both are written to the socket *before* ``receive()`` returns. All of that was
measured, with two workers and 400 jobs:

- If a worker prefetches, its messages wait behind the one that it works on, while others are free.
- If the ack is written at the end of the turn, and the handler kills its process, the next process
  gets the same message, and dies of it, too: five times of five.
- As it is, a message is handled once or, if its worker dies, not to its end; at 2,900 messages a
  second on RabbitMQ 3.10, and 4,900 on 4.0.

**Cancelling.** A message that has come is *reserved* for one waiter. Until ``accept`` it isn't
acked. If the waiter is cancelled, the next one gets it, or RabbitMQ gets it back. Between
``accept`` and the return of ``receive()`` there is no ``await``.

A consumer is cancelled only when RabbitMQ has confirmed it. Otherwise 3.10 forgets it before its
queue has answered, and that answer makes it close the connection (541).

**A refusal** concerns its channel only: RabbitMQ has no room for its queue, or the user may not
read it. Its receivers go on waiting, and the consumer is tried again after a pause (``pauses``).
RabbitMQ closes the AMQP channel over a refused consumer, and an ack that was written meanwhile is
lost. So a message that another consumer there has handed out comes a second time: 1 of 200 did in a
test. Therefore a channel's first consumer on a connection, and the next one after a refusal, is
tried on an AMQP channel of its own (if there aren't too many). Later ones share an AMQP channel.

**Another serializer or key.** While a project changes these, only another worker may be able to
read a message. The message goes back to the head of the queue, and this worker receives nothing
from the channel for a while. So a receiver elsewhere gets it.

**A connection of its own** does all this, opened by the first ``receive()``. When it is lost,
RabbitMQ gives unacked messages to other receivers. So a message that is reserved then is forgotten,
and its receiver goes on waiting.
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
from .normal_queues import MOST_REMEMBERED, NormalQueues, NormalTopology
from .pauses import Pauses
from .reasons import describe
from .shared import Shared
from .supervisor import Supervisor

logger = logging.getLogger("channels_rabbitmq.normal_channels")

# Seconds for which a channel is left to others, when its next message isn't readable here
OTHERS_TURN = 5.0
# AMQP channels for consumers that RabbitMQ may refuse
_MOST_TRIALS = 20


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


class _Consumer:
    """A channel's consumer, if it has one now, and the receivers that wait for it, in order."""

    __slots__ = ("amqp_channel", "answer", "channel", "tag", "waiters")

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self.waiters: dict[Waiter, None] = {}
        self.tag = ""  # while there is a consumer, or will be
        self.amqp_channel: OnDemandChannel | None = None  # the consumer's
        # To the bind or the consume, until it has come
        self.answer: asyncio.Future[None] | None = None

    def forget(self) -> None:
        self.tag = ""
        self.amqp_channel = None
        self.answer = None

    def cancel(self) -> None:
        if self.amqp_channel is not None:
            self.amqp_channel.cancel(self.tag)
        self.forget()

    @property
    def is_refused(self) -> bool:
        """Whether RabbitMQ has refused its consumer a moment ago."""
        answer = self.answer if self.tag else None
        return (
            answer is not None
            and answer.done()
            and isinstance(answer.exception(), carehare.ChannelClosedByServer)
        )


class NormalReceiver:
    """Receives from normal channels, for the ``LoopLayer`` whose id is ``id_``.

    All methods must be called on its event loop.
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
        # A program may cancel all tasks and let the loop go on: no call shall wait in vain.
        self.supervisor.on_closed = self.close
        self._queues = NormalQueues(topology, self.supervisor, self._on_no_exchange)
        self._amqp_channel: OnDemandChannel | None = None  # while there is a connection
        self._consumers: dict[str, _Consumer] = {}  # by channel, while a call waits
        # Channels whose last consumer RabbitMQ has accepted, and AMQP channels for all others
        self._accepted: set[str] = set()
        self._trials: list[OnDemandChannel] = []
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
        for consumer in list(self._consumers.values()):
            self._update(consumer)

    def on_lost(self, reason: str) -> None:
        self._forget_consumers()

    def _forget_consumers(self) -> None:
        if self._amqp_channel is not None:
            self._amqp_channel.detach()
            self._amqp_channel = None
        for trial in self._trials:
            trial.detach()
        self._trials.clear()
        self._accepted.clear()
        for consumer in list(self._consumers.values()):
            consumer.forget()
            self._update(consumer)

    def _on_no_exchange(self) -> None:
        self.supervisor.reconnect("the groups exchange was deleted")

    def _on_end(self, exc: Exception, by: OnDemandChannel) -> None:
        """RabbitMQ has closed an AMQP channel, mostly over a consumer."""
        connection = self.supervisor.connection
        consumers = [one for one in self._consumers.values() if one.amqp_channel is by]
        culprit = next((one.channel for one in consumers if one.is_refused), None)
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
        for consumer in consumers:
            consumer.forget()
            self._update(consumer)

    def _pause(self, channel: str, exc: BaseException) -> None:
        """Try again later to receive from a channel that RabbitMQ refuses."""
        self._accepted.discard(channel)
        if self._pauses.begin(channel):
            logger.warning(
                "%s: RabbitMQ refuses to let the normal channel %s be received from: %s",
                self._id,
                channel,
                describe(exc),
            )

    def _on_pause_over(self, channel: str) -> None:
        consumer = self._consumers.get(channel)
        if consumer is not None:
            self._update(consumer)

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
        consumer = self._consumers.get(channel)
        if consumer is None:
            consumer = self._consumers[channel] = _Consumer(channel)
        loop = asyncio.get_running_loop()
        waiter: Waiter = loop.create_future()
        consumer.waiters[waiter] = None
        self.receivers += 1
        self.supervisor.start()
        self._update(consumer)
        try:
            delivery = await waiter
            await self.supervisor.read_first()
        except BaseException:
            if not loop.is_closed():
                self._discard(consumer, waiter)
                if waiter.done() and not waiter.cancelled() and (delivery := waiter.result()):
                    self.requeue(delivery)
            raise
        self._discard(consumer, waiter)
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
        """The receiver doesn't take the message: the next one gets it, here or elsewhere."""
        self._offer(delivery)

    def _offer(self, delivery: Delivery) -> None:
        """Reserve a message for the receiver that has waited longest, or give it back."""
        if delivery.amqp_channel.is_closed:
            return  # RabbitMQ has given it to another one.
        consumer = self._consumers.get(delivery.channel)
        for waiter in consumer.waiters if consumer is not None else ():
            if not waiter.done():
                waiter.set_result(delivery)
                return
        delivery.amqp_channel.requeue(delivery.tag)

    def _discard(self, consumer: _Consumer, waiter: Waiter) -> None:
        """A call doesn't wait any more."""
        self.receivers -= 1
        del consumer.waiters[waiter]
        self._update(consumer)

    def _update(self, consumer: _Consumer) -> None:
        """Consume while calls wait, and not when none does."""
        if consumer.waiters:
            self._consume(consumer)
        elif consumer.answer is None:  # Once the answer has come, this is called again.
            if self._consumers.get(consumer.channel) is consumer:
                del self._consumers[consumer.channel]
            consumer.cancel()

    def _consume(self, consumer: _Consumer) -> None:
        """Consume, or first bind the queue, unless that has begun or can't be done now."""
        connection = self.supervisor.connection
        if connection is None or not connection.is_open or self._amqp_channel is None:
            return
        if consumer.tag or consumer.answer is not None or self._pauses.holds(consumer.channel):
            return
        if self._queues.bound(consumer.channel) is None:
            consumer.answer = self._queues.start_bind(connection, consumer.channel)
        else:
            by = self._amqp_channel_for(consumer.channel, connection)
            consumer.tag = f"{next(self._numbers)}.{consumer.channel}"
            consumer.amqp_channel = by
            consumer.answer = by.consume(self._topology.queue(consumer.channel), consumer.tag)
        consumer.answer.add_done_callback(partial(self._on_answer, consumer))

    def _amqp_channel_for(self, channel: str, connection: Connection) -> OnDemandChannel:
        """Return where to consume: if it wasn't accepted before, where a refusal harms no other."""
        assert self._amqp_channel is not None, "the caller has asked"
        if channel in self._accepted:
            return self._amqp_channel
        self._trials = [trial for trial in self._trials if not trial.is_closed]
        for trial in self._trials:
            if trial.is_idle:
                return trial
        if len(self._trials) >= _MOST_TRIALS:
            return self._amqp_channel
        try:
            trial = self._open(connection)
        except carehare.ChannelClosed:  # no number for another AMQP channel
            return self._amqp_channel
        self._trials.append(trial)
        return trial

    def _on_answer(self, consumer: _Consumer, answer: asyncio.Future[None]) -> None:
        """RabbitMQ has bound the queue, or has begun to deliver from it, or has refused."""
        if consumer.answer is not answer:
            return  # The connection is gone, or the consumer.
        consumer.answer = None
        exc = answer.exception()
        if exc is not None:
            is_bind = not consumer.tag  # If it is the consumer, _on_end() knows what to do.
            consumer.forget()
            is_refusal = isinstance(exc, carehare.ChannelClosedByServer)
            if is_bind and is_refusal and self.supervisor.connection is not None:
                self._pause(consumer.channel, exc)
        elif consumer.tag:
            if len(self._accepted) >= MOST_REMEMBERED:
                self._accepted.clear()
            self._accepted.add(consumer.channel)
            self._pauses.end_series(consumer.channel)
        self._update(consumer)

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
            consumer = self._consumers.get(channel)
            if consumer is not None and consumer.tag == consumer_tag:
                consumer.cancel()  # first, or the message would come again
            by.requeue(tag)
        except MalformedBody as err:
            self._counters.malformed += 1
            self._reporter.report("malformed", str(err))
            by.ack(tag)
        else:
            self._offer(Delivery(channel, envelope, tag, by))

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
        consumer = self._consumers.get(channel)
        if consumer is not None and consumer.tag == consumer_tag:
            consumer.forget()
            self._queues.forget(channel, self._queues.bound(channel))
            self._update(consumer)

    # The end

    def cancel_receivers(self) -> None:
        """Cancel every call, before ``close``: its event loop will never run again."""
        self._closed_exc = asyncio.CancelledError
        self._pauses.close()
        for consumer in self._consumers.values():
            for waiter in consumer.waiters:
                waiter.cancel()

    def close(self) -> None:
        """End every pending and later call with ``StopConsumer``."""
        self._closed_exc = self._closed_exc or StopConsumer
        self._pauses.close()
        consumers, self._consumers = self._consumers, {}
        for consumer in consumers.values():
            for waiter in consumer.waiters:
                if not waiter.done():
                    waiter.set_result(None)


def _channel_of(consumer_tag: str) -> str:
    return consumer_tag.partition(".")[2]
