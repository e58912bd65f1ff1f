"""``RequestLink``: publishes the requests of a ``LoopLayer``, which are for other processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from .._amqp.publishing import Outcome, Route
from .._identity import TO_ALL
from ..statistics import Counters
from .publisher import Publisher

# Seconds. An event ends each wait earlier.
_LONGEST_WAIT = 3600.0


class RequestLink:
    """Publishes by ``publisher`` to the exchange with the name ``groups_exchange``.

    ``wait_subscriber_ready(deadline)`` waits for this event loop's own queues.
    """

    def __init__(
        self,
        publisher: Publisher,
        groups_exchange: str,
        counters: Counters,
        wait_subscriber_ready: Callable[[float], Awaitable[object]],
    ) -> None:
        self._publisher = publisher
        self._groups_exchange = groups_exchange
        self._counters = counters
        self._wait_subscriber_ready = wait_subscriber_ready

    @property
    def is_blocked(self) -> bool:
        """Whether the broker takes nothing now."""
        return self._publisher.is_blocked

    def _route(self, recipient: str) -> Route:
        return Route(self._groups_exchange, recipient, mandatory=recipient != TO_ALL)

    async def wait_unblocked(self) -> None:
        """Wait, without a time limit, until the publisher is connected and not blocked."""
        publisher = self._publisher
        publisher.supervisor.start()
        while publisher.supervisor.connection is None or publisher.is_blocked:
            await publisher.changed.wait(asyncio.get_running_loop().time() + _LONGEST_WAIT)

    async def publish(self, recipient: str, body: bytes, deadline: float) -> Outcome:
        """Publish to all, or to one: see ``_peers.link``."""
        route = self._route(recipient)
        outcome = await self._publisher.publish_request(body, route, deadline)
        if outcome is not Outcome.BLOCKED:
            self._counters.requests += 1
        return outcome

    def publish_nowait(self, recipient: str, body: bytes, deadline: float) -> bool:
        """Publish if it can be written now: see ``_peers.link``."""
        was_written = self._publisher.publish_request_nowait(body, self._route(recipient), deadline)
        self._counters.requests += was_written
        return was_written

    async def wait_publisher_ready(self, deadline: float) -> None:
        """Wait for the connection that publishes."""
        await self._publisher.supervisor.wait_ready(deadline)

    async def wait_subscriber_ready(self, deadline: float) -> None:
        """Wait until this event loop's own queues are there."""
        await self._wait_subscriber_ready(deadline)

    def call_when_blocked(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called each time the broker begins to block publishers."""
        self._publisher.on_blocked = callback

    def set_bye(self, body: bytes) -> None:
        """Have ``body`` published to all at the orderly end of this process."""
        self._publisher.bye = (body, self._route(TO_ALL))
