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
from .exceptions import BrokerUnavailable

logger = logging.getLogger(__name__)

# Seconds between two looks whether anything arrives, and seconds a probe may take to arrive. So a
# deaf queue is noticed within 26 s.
INTERVAL = 8.0
ANSWER_TIMEOUT = 10.0
_LOOKS = 20  # for its answer, in that time


class Probe:
    """Watches one Subscriber's connection.

    ``send()`` publishes the message that should arrive; ``delivered()`` counts what has arrived;
    ``is_full()`` says that the broker may not deliver now, because all of ``local_capacity`` is in
    use.
    """

    def __init__(
        self,
        subscriber: Supervisor,
        *,
        send: Callable[[], Awaitable[Outcome]],
        delivered: Callable[[], int],
        is_full: Callable[[], bool],
    ) -> None:
        self._subscriber = subscriber
        self._send = send
        self._delivered = delivered
        self._is_full = is_full

    async def run(self) -> None:
        """Watch for ever; cancel it to end."""
        while True:
            before = self._delivered()
            await asyncio.sleep(INTERVAL)
            if self._delivered() != before:
                continue
            try:
                await self._probe()
            except Exception:
                logger.exception("%s: unexpected error", "probe")

    async def _probe(self) -> None:
        connection = self._subscriber.connection
        if connection is None or self._is_full():
            return
        before = self._delivered()
        try:
            outcome = await self._send()
        except BrokerUnavailable:
            return
        if outcome in (Outcome.UNKNOWN, Outcome.BLOCKED):
            return
        # A refusal (queue full) counts like a confirm: something must arrive from a full queue.
        if outcome is not Outcome.RETURNED and (
            await self._hears_more_than(before) or self._is_full()
        ):
            return
        if self._subscriber.connection is connection:
            self._subscriber.give_up_connection(
                "a binding of the queue is gone"
                if outcome is Outcome.RETURNED
                else f"nothing arrives from the queue, not even a probe within {ANSWER_TIMEOUT:g} s"
            )

    async def _hears_more_than(self, before: int) -> bool:
        """Wait until more has arrived; False if that isn't so in time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ANSWER_TIMEOUT
        # Looking now and then costs less than a word with each delivery.
        while self._delivered() == before:
            if loop.time() >= deadline:
                return False
            await asyncio.sleep(ANSWER_TIMEOUT / _LOOKS)
        return True
