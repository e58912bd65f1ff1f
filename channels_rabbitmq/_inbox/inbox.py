"""``Inbox``: the messages that have arrived for the channels of one event loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from time import time

from .._codec import MalformedBody
from .._identity import LONGEST_NAME, ChannelNames
from .._reporter import Reporter
from .._settings.settings import Settings
from ..statistics import Counters
from ..status import WorstChannel
from .ages import Ages
from .culprits import Culprits
from .hand_overs import HandedOver
from .mailbox import Acker
from .members import Members
from .router import BEHIND, Router
from .ticker import Ticker


class Inbox:
    """Decodes deliveries and puts them into the router of one event loop.

    Drops deliveries that are not for the channels of this event loop.
    """

    def __init__(
        self,
        settings: Settings,
        names: ChannelNames,
        members: Members,
        counters: Counters,
        reporter: Reporter,
        culprits: Culprits,
        capacity_of: Callable[[str], int],
    ) -> None:
        loop = asyncio.get_running_loop()
        expiry = math.inf if settings.expiry is None else settings.expiry
        self._codec = settings.codec
        self._names = names
        self._counters = counters
        self._reporter = reporter
        self._culprits = culprits
        self.ages = Ages(
            warn_above=expiry / 2,
            report=lambda age, channel: reporter.report_level("late", channel, round(age)),
        )
        self.router = Router(
            members=members,
            local_capacity=settings.local_capacity,
            local_expiry=settings.local_expiry,
            capacity_of=capacity_of,
            counters=counters,
            ages=self.ages,
            report=reporter.report,
            clock=loop.time,
            create_future=loop.create_future,
            call_soon=loop.call_soon,
        )
        self._ticker = Ticker(self.router, settings.local_capacity, reporter.report_level)
        # RabbitMQ drops older messages. One second is for the way from the broker.
        self._oldest = expiry + 1.0

    def on_delivery(self, body: bytes, tag: int, published: int, acker: Acker) -> None:
        """Put a delivery into the router; ack one that isn't for this event loop.

        ``published`` is in milliseconds since 1970; 0 if unknown. ``acker`` acks the delivery by
        its ``tag``.
        """
        self._counters.delivered += 1
        try:
            envelope = self._codec.decode(body)
        except MalformedBody as err:
            self._counters.malformed += 1
            self._reporter.report("malformed", str(err))
            acker.ack(tag)
            return
        channel = envelope.channel
        if channel is not None and not (
            channel in self.router.known_channels or self._names.is_valid(channel)
        ):
            self._on_misrouted(channel)
            acker.ack(tag)
            return
        # An impossible age means that the sender's clock differs from ours.
        age = time() - published / 1000 if published else 0.0
        self.router.deliver(envelope, tag, acker, age if 0 < age < self._oldest else 0.0)
        self._ticker.start()

    def _on_misrouted(self, channel: str) -> None:
        if channel != self._names.prefix:  # else it is the watchdog's probe
            self._counters.misrouted += 1
            self._reporter.report("misrouted", channel[:LONGEST_NAME])

    def worst_channel(self) -> tuple[float, WorstChannel | None]:
        """Return for how many seconds the oldest message has waited here, and its channel."""
        oldest = self.router.oldest()
        if oldest is None:
            return 0.0, None
        channel, messages, waited = oldest
        # A look through all groups and tasks, so only if something is wrong.
        said = self._culprits.describe([channel])[channel] if waited > BEHIND else ""
        return waited, WorstChannel(channel, messages, said)

    def requeue(self, handed_over: HandedOver) -> None:
        """Put a message back that a receiver on another event loop didn't accept."""
        self.router.hand_overs.requeue(handed_over)
        self._ticker.start()

    def close(self) -> None:
        """Stop the timer."""
        self._ticker.stop()
