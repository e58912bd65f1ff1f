"""``Sender``: sends packed messages, and says what becomes of them.

Before a message to a channel or group of this event loop, it waits until the broker can deliver
it here: else it would be returned, or lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from channels.exceptions import ChannelFull

from .._amqp.publishing import CONFIRMED, Outcome, Route
from .._reporter import Reporter
from .._settings.settings import Settings
from ..exceptions import BrokerUnavailable
from ..statistics import Counters
from .bindings import Bindings
from .direct_sender import DirectSender
from .probes import Probes
from .publisher import Publisher
from .receivers import Receivers
from .refusals import BLOCKED, DELETION_TIMEOUT, Refusals
from .routes import Routes
from .shared import Shared
from .subscriber import Subscriber

logger = logging.getLogger("channels_rabbitmq.messages")

# Seconds after which the next nack of a group's message is another incident
_NACKS_APART = 60.0
# More nacks than this aren't due to a queue that is being deleted: that takes some milliseconds.
_MOST_WHILE_DELETED = 50
# Seconds that a message needs, at most, from its writing to its confirm
_TIME_TO_CONFIRM = 0.5


class Sender:
    """Sends for one ``LoopLayer``, which receives by ``subscriber``.

    ``probes`` are the messages that it sends to itself. ``has_ended(id)``: whether the process with
    that id has said so.
    """

    def __init__(
        self,
        id_: str,
        settings: Settings,
        own_prefix: str,
        publisher: Publisher,
        subscriber: Subscriber,
        bindings: Bindings,
        counters: Counters,
        reporter: Reporter,
        shared: Shared,
        has_ended: Callable[[str], bool],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._operation_timeout = settings.operation_timeout
        self._groups_exchange = settings.groups_exchange
        self._publisher = publisher
        self._subscriber = subscriber
        self._bindings = bindings
        self._counters = counters
        self._reporter = reporter
        # Loop time: when a group's message was nacked last, and for the first time in this incident
        self._nacked_at = self._nacked_since = -_NACKS_APART
        self._unreported_nacks = 0
        self._routes = Routes(settings.groups_exchange)
        refusals = Refusals(publisher, counters, settings.groups_exchange, self._loop.time)
        self.direct_sender = DirectSender(
            publisher,
            settings.operation_timeout,
            Receivers(self._routes.to_id(id_), self._loop.time, has_ended, shared.allowance),
            refusals,
        )
        self.probes = Probes(id_, own_prefix, settings, publisher, refusals, self._routes)

    async def send(self, channel: str, body: bytes, *, is_local: bool) -> None:
        """Send to one channel: see ``RabbitmqChannelLayer.send``."""
        deadline = self._loop.time() + self._operation_timeout
        after = self._wait_for_own_queue(deadline) if is_local else None
        route = self._routes.to_channel(channel)
        outcome = await self.direct_sender.send(route, body, deadline, after)
        if outcome is CONFIRMED:
            return
        if outcome is Outcome.NACKED:
            raise ChannelFull(
                f"The queue of the process that serves {channel} is full: its consumers don't keep "
                "up (remote_capacity, remote_capacity_bytes)"
            )
        if outcome is Outcome.BLOCKED:
            raise ChannelFull(BLOCKED)
        if outcome is Outcome.RETURNED:
            self._counters.unreachable += 1
            self._reporter.report("unreachable", channel)
        elif outcome is Outcome.UNKNOWN:
            self._reporter.report("outcome_unknown", channel)

    def _wait_for_own_queue(self, deadline: float) -> Callable[[], Awaitable[object]] | None:
        """Return what to wait for before a message to a channel of ours is published, if at all."""
        supervisor = self._subscriber.supervisor
        if supervisor.is_usable:
            return None
        # Leave time for the confirm. Calls behind this one may have the same deadline.
        rest = min(_TIME_TO_CONFIRM, self._operation_timeout / 2)
        return partial(supervisor.wait_ready, deadline - rest)

    async def group_send(self, group: str, body: bytes, *, has_members: bool) -> None:
        """Send to all channels of a group. ``has_members``: some of them are local."""
        deadline = self._loop.time() + self._operation_timeout
        after = None
        if has_members and not (
            self._bindings.is_bound(group) and self._subscriber.supervisor.is_usable
        ):
            # The connection is new, or, after the loop stood still, it may be lost and replaced in
            # a moment.
            after = partial(self._wait_bound, group, deadline)
        route = Route(self._groups_exchange, group, mandatory=False)
        outcome = await self._publisher.publish(body, route, deadline, after)
        if outcome is Outcome.NACKED:
            self._on_group_nacked(group)
        elif outcome is Outcome.BLOCKED:
            self._counters.blocked_groups += 1
            self._reporter.report("blocked", group)
        elif outcome is Outcome.UNKNOWN:
            self._reporter.report("outcome_unknown", group)

    def _on_group_nacked(self, group: str) -> None:
        """Report a nack, unless it may come from a queue that is just being deleted.

        (Nacks of a full queue go on.) RabbitMQ 4.2 and newer nack for some milliseconds when a
        process ends.
        """
        now = self._loop.time()
        if now - self._nacked_at > _NACKS_APART:
            self._nacked_since = now
        self._nacked_at = now
        self._unreported_nacks += 1
        is_going_on = now - self._nacked_since >= DELETION_TIMEOUT
        if is_going_on or self._unreported_nacks > _MOST_WHILE_DELETED:
            self._reporter.report("group_nacked", group, self._unreported_nacks)
            self._unreported_nacks = 0

    async def _wait_bound(self, group: str, deadline: float) -> None:
        """Wait for a group's binding, for half of the call's time at most.

        Other processes have members too.
        """
        try:
            await self._subscriber.wait_bound(group, deadline - self._operation_timeout / 2)
        except BrokerUnavailable as err:
            logger.debug("group_send(%r) without members of this process: %s", group, err)
