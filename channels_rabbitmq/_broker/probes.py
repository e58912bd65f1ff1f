"""``Probes``: the messages that the watchdog sends."""

from __future__ import annotations

import asyncio
import itertools

from .._amqp.publishing import Outcome, Route
from .._codec import MessageCodec
from .._settings.settings import Settings
from .publisher import Publisher
from .refusals import Refusals
from .routes import Routes
from .topology import groups_probe_key


class Probes:
    """Sends messages to the ``LoopLayer``'s own queue, and one that no queue takes.

    ``channel``: the channel that they are addressed to. No ``receive()`` reads it.
    """

    def __init__(
        self,
        id_: str,
        channel: str,
        settings: Settings,
        publisher: Publisher,
        refusals: Refusals,
        routes: Routes,
    ) -> None:
        self._operation_timeout = settings.operation_timeout
        self._publisher = publisher
        self._refusals = refusals
        # The two paths to the queue, in turn: that of channels and that of groups.
        self._routes = itertools.cycle(
            (
                routes.to_id(id_),
                Route(settings.groups_exchange, groups_probe_key(id_), mandatory=True),
            )
        )
        # The project's max_message_size may be too small.
        self._body = MessageCodec(
            max_message_size=1024, symmetric_encryption_keys=settings.symmetric_encryption_keys
        ).encode_for_channel(channel, {})

    async def send(self) -> Outcome:
        """Send a message that should arrive."""
        outcome = await self._publish(self._body, next(self._routes))
        self._refusals.count(outcome, is_full=True)
        return outcome

    async def ping(self) -> Outcome:
        """Send a message that no queue takes, so that the broker only confirms it."""
        return await self._publish(b"", self._publisher.ping_route)

    async def _publish(self, body: bytes, route: Route) -> Outcome:
        deadline = asyncio.get_running_loop().time() + self._operation_timeout
        return await self._publisher.publish(body, route, deadline)
