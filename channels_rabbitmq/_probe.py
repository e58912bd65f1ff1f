"""Notice a queue that has gone deaf.

A queue can vanish, a consumer can be forgotten, a binding be deleted without a word to us: after a
failover in a cluster (rabbitmq-server#11000, #12597, #12949), or by an operator. Nothing arrives
then, and nothing looks wrong. So after a silence the layer sends itself a message, the way that
others' messages come, and reconnects if it doesn't arrive.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from ._amqp.amqp_channels import Outcome
from ._supervisor import Supervisor
from ._waiting import Waiters
from .exceptions import BrokerUnavailable

logger = logging.getLogger(__name__)

# Seconds of silence before a probe, and seconds it may take to arrive: noticed within 25 s.
INTERVAL = 15.0
ANSWER_TIMEOUT = 10.0


class Probe:
    """Watches one Subscriber's connection.

    ``send()`` publishes the message that should arrive; ``is_full()`` says that the broker may not
    deliver now, because all of ``local_capacity`` is in use.
    """

    def __init__(
        self,
        subscriber: Supervisor,
        *,
        send: Callable[[], Awaitable[Outcome]],
        is_full: Callable[[], bool],
    ) -> None:
        self._subscriber = subscriber
        self._send = send
        self._is_full = is_full
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._waiters = Waiters()

    def heard(self) -> None:
        """Note a delivery."""
        self._heard_at = self._loop.time()
        if self._waiters:
            self._waiters.wake()

    async def run(self) -> None:
        """Watch for ever; cancel it to end."""
        while True:
            await asyncio.sleep(self._heard_at + INTERVAL - self._loop.time())
            if self._loop.time() < self._heard_at + INTERVAL:
                continue
            try:
                await self._probe()
            except Exception:
                logger.exception("%s: unexpected error", "probe")
            self._heard_at = self._loop.time()

    async def _probe(self) -> None:
        connection = self._subscriber.connection
        if connection is None or self._is_full():
            return
        heard_at = self._heard_at
        try:
            outcome = await self._send()
        except BrokerUnavailable:
            return
        if outcome in (Outcome.UNKNOWN, Outcome.BLOCKED):
            return
        # A refusal (queue full) counts like a confirm: something must arrive from a full queue.
        if outcome is not Outcome.RETURNED and (
            self._heard_at != heard_at
            or await self._waiters.wait(self._loop.time() + ANSWER_TIMEOUT)
            or self._is_full()
        ):
            return
        if self._subscriber.connection is connection:
            self._subscriber.give_up_connection(
                "a binding of the queue is gone"
                if outcome is Outcome.RETURNED
                else f"nothing arrives from the queue, not even a probe within {ANSWER_TIMEOUT:g} s"
            )
