"""``Watchdog``: notices a queue that has gone deaf.

A queue can vanish, a consumer be forgotten, or a binding be deleted, and RabbitMQ doesn't tell the
client: after a failover in a cluster (rabbitmq-server#11000, #12597, #12949), or by an operator.
Nothing arrives then, and nothing looks wrong. So after a silence the layer sends a message to
itself, the *probe*, by the path of other processes' messages. It reconnects if that doesn't arrive.

**Never on time alone.** A broker that is frozen for a while delivers everything when it goes on,
and a layer that reconnected meanwhile would lose what was in its queue. So the probe may take as
long as ``Connection.is_overdue`` says, which goes by what is heard from the broker. If it is
unknown whether the broker took the probe, the reason may be the connection that sends (which the
layer replaces by itself), or the queue. A second probe decides, but only if that connection works.

**What it costs.** Two paths lead to the queue, one for channels and one for groups. They take
turns: one message each time, because hosted brokers count messages.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from .._amqp.connection import Connection
from .._amqp.publishing import Outcome
from .._futures import start_task
from ..exceptions import BrokerUnavailable
from .probes import Probes
from .subscriber import Subscriber

logger = logging.getLogger("channels_rabbitmq.watchdog")

# Seconds between two looks whether the probe has arrived
LOOK_INTERVAL = 0.25


class Watchdog:
    """Watches one Subscriber's connection, by messages that ``probes`` sends.

    ``interval``: seconds between two looks whether anything arrives. ``delivered()`` counts what
    has arrived; ``is_full()`` says that the broker may not deliver now, because all of
    ``local_capacity`` is in use.
    """

    def __init__(
        self,
        subscriber: Subscriber,
        probes: Probes,
        interval: float,
        *,
        delivered: Callable[[], int],
        is_full: Callable[[], bool],
    ) -> None:
        self._subscriber = subscriber
        self._supervisor = subscriber.supervisor
        self._probes = probes
        self._interval = interval
        self._delivered = delivered
        self._is_full = is_full
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Watch from now on, unless ``interval`` is 0. Another call changes nothing."""
        if self._task is None and self._interval:
            self._task = start_task(self.run(), name="channels_rabbitmq watchdog")

    def close(self) -> None:
        """Stop watching, in a moment."""
        if self._task is not None:
            self._task.cancel()

    async def wait_closed(self) -> None:
        """Wait until the task has ended after ``close``."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def run(self) -> None:
        """Watch for ever; cancel it to end."""
        while True:
            before = self._delivered()
            await asyncio.sleep(self._interval)
            if self._delivered() != before:
                continue
            try:
                await self._probe()
            except Exception:
                logger.exception("%s: unexpected error", f"watchdog of {self._supervisor.name}")

    async def _probe(self) -> None:
        connection = self._supervisor.connection
        if connection is None or self._is_full():
            return
        before = self._delivered()
        if not connection.has_heartbeats:
            self._subscriber.request_answer()
        try:
            outcome = await self._publish()
        except BrokerUnavailable:
            return
        if outcome is Outcome.RETURNED:
            self._reconnect(connection, "a binding of the queue is gone")
        # A nack (queue full) counts like a confirm: something must arrive from a full queue.
        elif outcome is not Outcome.BLOCKED and not await self._arrives(connection, before):
            self._reconnect(connection, "nothing arrives from the queue, not even a probe")

    async def _publish(self) -> Outcome:
        """Send the probe; return BLOCKED also if the publisher doesn't work."""
        outcome = await self._probes.send()
        if outcome is Outcome.UNKNOWN:
            if await self._probes.ping() in (Outcome.UNKNOWN, Outcome.BLOCKED):
                return Outcome.BLOCKED
            outcome = await self._probes.send()
        return outcome

    async def _arrives(self, connection: Connection, before: int) -> bool:
        """Wait until more has arrived than ``before``; False if it is overdue."""
        mark = connection.mark()
        # Looking now and then costs less than a call for each delivery.
        while (
            self._delivered() == before
            and self._supervisor.connection is connection
            and not self._is_full()
        ):
            if connection.is_overdue(mark):
                return False
            await asyncio.sleep(LOOK_INTERVAL)
        return True

    def _reconnect(self, connection: Connection, reason: str) -> None:
        if self._supervisor.connection is connection:
            self._supervisor.reconnect(reason)
