"""``Declarer``: has RabbitMQ declare what each connection of a ``Subscriber`` needs.

``topology`` says what that is. All of it is written at once, and answered in one round trip.
What RabbitMQ refuses (it closes the AMQP channel, and ignores the rest) is left out in another try,
on the same connection, if it can be spared:

- The groups exchange, if somebody else has declared it (``groups_exchange``).
- The lease. There may be no permission for it, or no room within a limit of queues or exchanges.
  Or such a limit has no room for the queue itself as long as the former connection has a lease:
  with ``max-queues`` at two for a process, it was deaf for 23 seconds after a forced close. So if a
  limit is exceeded by anything else, the former connections' leases are given up, too.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterable

import carehare
import pamqp.base
import pamqp.commands

from .._amqp.binding import TopologyChannel
from .._amqp.consuming import ConsumerChannel
from .._settings.settings import Settings
from .groups_exchange import GroupsExchange
from .supervisor import describe
from .topology import Declarations

logger = logging.getLogger("channels_rabbitmq.subscriber")

# "queue limit in vhost 'v' (2) is reached", "exchange limit of 10 is reached", and so on
_LIMIT = re.compile(r"\blimit\b")

_Calls = list[tuple[pamqp.base.Frame, asyncio.Future[None]]]
_Refused = tuple[pamqp.base.Frame, carehare.ChannelClosedByServer]


class Declarer:
    """Declares for one connection after the other of the ``LoopLayer`` whose id is ``id_``.

    ``owner``: what it is called in logs.
    """

    def __init__(
        self, id_: str, settings: Settings, groups_exchange: GroupsExchange, *, owner: str
    ) -> None:
        self._id = id_
        self._settings = settings
        self._groups_exchange = groups_exchange
        self._owner = owner
        self._number = 0  # of the connection
        self._former: list[Declarations] = []  # whose exchanges may exist still
        # The one in use before all of those, if any: its lease may not be over yet.
        self._before: list[Declarations] = []
        self._held: list[Declarations] = []  # whose groups' exchange the present one holds
        self._is_told = False  # that there is no lease

    async def declare(
        self,
        open_consumer: Callable[[], ConsumerChannel],
        topology: TopologyChannel,
        server_version: tuple[int, ...],
    ) -> Declarations:
        """Declare and consume, and cut the former connections' ways.

        The last AMQP channel that it has opened works. Raises ChannelClosedByServer if RabbitMQ
        refuses what is needed.
        """
        self._number += 1
        declarations = Declarations(self._id, self._number, self._settings, server_version)
        # The first is the one that was in use; of attempts that failed the latest are enough.
        former = self._former[:1] + self._former[1:][-5:]
        self._former = [*former, declarations]
        while True:
            consumer = open_consumer()
            refused = await _first_refused(self._call_all(consumer, declarations, former))
            if refused is None:
                break
            if not self._groups_exchange.accept_refusal(*refused):
                await self._spare_lease(topology, declarations, *refused)
        # Two are enough: whoever comes and goes again and again shall not pile them up.
        for each in (*self._before, *former[1:]):
            _end_lease(each, consumer)
        self._before, self._former = former[:1], [declarations]
        return declarations

    def _call_all(
        self, consumer: ConsumerChannel, declarations: Declarations, former: list[Declarations]
    ) -> _Calls:
        methods = [
            self._groups_exchange.declare(),
            *declarations.methods(),
            *(method for each in former for method in each.cut()),
            declarations.bind_channels(),
            pamqp.commands.Basic.Qos(prefetch_count=self._settings.local_capacity),
            # Before messages come: what is refused is tried again, and they would come twice.
            *declarations.hold_lease(),
        ]
        calls = [(method, consumer.call(method)) for method in methods]
        queue = declarations.queue
        return [*calls, (pamqp.commands.Basic.Consume(queue=queue), consumer.consume(queue))]

    async def _spare_lease(
        self,
        topology: TopologyChannel,
        declarations: Declarations,
        method: pamqp.base.Frame,
        exc: carehare.ChannelClosedByServer,
    ) -> None:
        """Have the next try do without a lease, since ``method`` was refused; or raise ``exc``."""
        await _call(topology, declarations.undo())
        if not declarations.has_lease:
            raise exc
        if not declarations.is_for_lease(method):
            leases = [
                m for each in (*self._before, *self._former[:-1]) for m in each.delete_lease()
            ]
            if not leases or not _LIMIT.search(str(exc)):
                raise exc
            await _call(topology, leases)
        declarations.has_lease = False
        if not self._is_told:
            self._is_told = True
            logger.warning(
                "%s: goes without a lease on its groups' bindings: %s", self._owner, describe(exc)
            )

    def hold_groups(self, topology: TopologyChannel) -> None:
        """Keep the lost connection's groups bound until ``release_groups``.

        A refusal costs what the lease would have saved, and no more.
        """
        self._held = self._before
        for each in self._held:
            for method in self._former[-1].hold_groups(each):
                topology.call(method)

    def release_groups(self, topology: TopologyChannel) -> None:
        """All groups are bound anew: let the lost connection's go. Does nothing a second time."""
        for each in self._held:
            for method in self._former[-1].release_groups(each):
                topology.call(method)
        self._held = []

    def end_leases(self, consumer: ConsumerChannel) -> None:
        """Leave nothing behind at an orderly end. No error if one is over."""
        for declarations in (*self._before, *self._former):
            _end_lease(declarations, consumer)


async def _first_refused(calls: _Calls) -> _Refused | None:
    """Wait for all answers; those behind the first that was refused have none."""
    for method, answer in calls:
        try:
            await answer
        except carehare.ChannelClosedByServer as err:
            return method, err
    return None


async def _call(topology: TopologyChannel, methods: Iterable[pamqp.base.Frame]) -> None:
    """Call them and wait for the answers, whatever those are."""
    await asyncio.wait([topology.call(method) for method in methods])


def _end_lease(declarations: Declarations, consumer: ConsumerChannel) -> None:
    """Without waiting for an answer."""
    for method in declarations.delete_lease(nowait=True):
        consumer.tell(method)
