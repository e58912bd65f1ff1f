"""``Deliveries``: what the broker delivers, on its way to the router."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import time

from .._codec import MalformedBody, MessageCodec
from .._identity import LONGEST_NAME, ChannelNames
from ..statistics import Counters
from .mailbox import Acker
from .router import Router
from .ticker import Ticker


class Deliveries:
    """Decodes deliveries, and drops those that are not for the channels of this event loop.

    ``expiry``: seconds after which the broker drops a message. ``report(reason, name)`` is called
    for each one dropped here.
    """

    def __init__(
        self,
        router: Router,
        ticker: Ticker,
        codec: MessageCodec,
        names: ChannelNames,
        counters: Counters,
        *,
        expiry: float | None,
        report: Callable[[str, str], None],
    ) -> None:
        self._router = router
        self._ticker = ticker
        self._codec = codec
        self._names = names
        self._counters = counters
        self._report = report
        # RabbitMQ drops what is older than expiry; a second for the way.
        self._oldest = math.inf if expiry is None else expiry + 1.0

    def on_delivery(self, body: bytes, tag: int, published: int, acker: Acker) -> None:
        """Put a delivery into the router, or ack it. ``published``: milliseconds since 1970, or 0.

        ``tag`` is what ``acker`` acks it by.
        """
        self._counters.delivered += 1
        try:
            envelope = self._codec.decode(body)
        except MalformedBody as err:
            self._counters.malformed += 1
            self._report("malformed", str(err))
            acker.ack(tag)
            return
        channel = envelope.channel
        if channel is not None and not (
            channel in self._router.known_channels or self._names.is_valid(channel)
        ):
            self._on_misrouted(channel)
            acker.ack(tag)
            return
        # An age that can't be comes from a clock that differs from ours.
        age = time() - published / 1000 if published else 0.0
        self._router.deliver(envelope, tag, acker, age if 0 < age < self._oldest else 0.0)
        self._ticker.start()

    def _on_misrouted(self, channel: str) -> None:
        if channel != self._names.prefix:  # else it is the watchdog's probe
            self._counters.misrouted += 1
            self._report("misrouted", channel[:LONGEST_NAME])
