"""``NormalChannels``: the channels whose names have no "!", for one event loop."""

from __future__ import annotations

from collections.abc import Callable

from .._reporter import Reporter
from .._settings.settings import Settings
from ..statistics import Counters
from .groups_exchange import GroupsExchange
from .normal_queues import NormalTopology
from .normal_receiver import NormalReceiver
from .normal_sender import NormalSender
from .publisher import Publisher
from .shared import Shared


class NormalChannels:
    """Sends to normal channels by a ``Publisher``, and receives on a connection of its own.

    ``capacity_of(channel)`` is how many messages a channel's queue may hold.
    """

    def __init__(
        self,
        id_: str,
        settings: Settings,
        publisher: Publisher,
        groups_exchange: GroupsExchange,
        *,
        capacity_of: Callable[[str], int],
        shared: Shared,
        counters: Counters,
        reporter: Reporter,
    ) -> None:
        topology = NormalTopology(id_, settings, capacity_of, shared)
        sender = NormalSender(topology, publisher, settings.operation_timeout, counters, reporter)
        self.send = sender.send
        self.queues = sender.queues  # on the connection that sends
        self.receiver = NormalReceiver(
            id_,
            settings,
            topology,
            groups_exchange,
            shared=shared,
            counters=counters,
            reporter=reporter,
        )
