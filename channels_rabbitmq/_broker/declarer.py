"""``Declarer``: has RabbitMQ declare what each connection of a ``Subscriber`` needs.

``topology`` says what that is. All of it is written at once, and answered in one round trip. If
RabbitMQ refuses a command, it closes the AMQP channel and ignores the rest. Then the declarer tries
again on the same connection, without what can be spared:

- The groups exchange, if somebody else has declared it (``groups_exchange``).
- The lease. The user may lack a permission for it, or a limit of queues or exchanges may leave no
  room for it. Or the limit leaves no room for the queue itself while the former connection still
  has a lease: with ``max-queues`` at two for a process, it was deaf for 23 seconds after a forced
  close. So if anything else exceeds a limit, the former connections' leases are deleted, too.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterable

import carehare

from .._amqp.binding import TopologyChannel
from .._amqp.consuming import ConsumerChannel
from .._amqp.methods import Basic, Method
from .._settings.settings import Settings
from .groups_exchange import GroupsExchange
from .reasons import describe
from .shared import Told
from .topology import Topology

logger = logging.getLogger("channels_rabbitmq.subscriber")

# "queue limit in vhost 'v' (2) is reached", "exchange limit of 10 is reached", and so on
_LIMIT = re.compile(r"\blimit\b")

_Calls = list[tuple[Method, asyncio.Future[None]]]
_Refused = tuple[Method, carehare.ChannelClosedByServer]


class Declarer:
    """Declares for one connection after the other of the ``LoopLayer`` whose id is ``id_``.

    ``owner``: what it is called in logs.
    """

    def __init__(
        self,
        id_: str,
        settings: Settings,
        groups_exchange: GroupsExchange,
        told: Told,
        *,
        owner: str,
    ) -> None:
        self._id = id_
        self._settings = settings
        self._groups_exchange = groups_exchange
        self._owner = owner
        self._number = 0  # of the connection
        # The present connection's and, before it, those whose exchanges may still exist
        self._latest: list[Topology] = []
        # The one in use before all of those, if any: its lease may still last.
        self._before: list[Topology] = []
        self._kept: list[Topology] = []  # whose groups are still bound
        self._told = told

    async def declare(
        self,
        open_consumer: Callable[[], ConsumerChannel],
        topology_channel: TopologyChannel,
        server_version: tuple[int, ...],
    ) -> Topology:
        """Declare and consume, and unbind what leads to the former connections' queues.

        The last AMQP channel that ``open_consumer`` has opened works then. Raises
        ChannelClosedByServer if RabbitMQ refuses what is needed.
        """
        self._number += 1
        topology = Topology(self._id, self._number, self._settings, server_version)
        # The first was in use. Of the attempts since then, which failed, the latest are enough.
        former = self._latest[:1] + self._latest[1:][-5:]
        self._latest = [*former, topology]
        while True:
            consumer = open_consumer()
            refused = await _first_refused(self._call_all(consumer, topology, former))
            if refused is None:
                break
            if not self._groups_exchange.on_refusal(*refused):
                await self._spare_lease(topology_channel, topology, *refused)
        # Two leases are enough: reconnects in quick succession mustn't pile them up.
        for each in (*self._before, *former[1:]):
            _end_lease(each, consumer)
        self._before, self._latest = former[:1], [topology]
        return topology

    def _call_all(
        self, consumer: ConsumerChannel, topology: Topology, former: list[Topology]
    ) -> _Calls:
        commands = [
            self._groups_exchange.declare(),
            *topology.declare_commands(),
            *(command for each in former for command in each.unbind_commands()),
            topology.bind_direct(),
            Basic.Qos(prefetch_count=self._settings.local_capacity),
            # Before messages arrive: a refusal means another try, and they would arrive twice.
            *topology.consume_lease(),
        ]
        calls = [(command, consumer.call(command)) for command in commands]
        queue = topology.queue
        return [*calls, (Basic.Consume(queue=queue), consumer.consume(queue))]

    async def _spare_lease(
        self,
        topology_channel: TopologyChannel,
        topology: Topology,
        command: Method,
        exc: carehare.ChannelClosedByServer,
    ) -> None:
        """Have the next try do without a lease, since ``command`` was refused; or raise ``exc``."""
        await _call(topology_channel, topology.delete_commands())
        if not topology.has_lease:
            raise exc
        if not topology.is_for_lease(command):
            former = (*self._before, *self._latest[:-1])
            deletes = [delete for each in former for delete in each.delete_lease()]
            if not deletes or not _LIMIT.search(str(exc)):
                raise exc
            await _call(topology_channel, deletes)
        topology.has_lease = False
        if self._told.is_news(("no lease",)):
            logger.warning(
                "%s: goes without a lease on its groups' bindings: %s", self._owner, describe(exc)
            )

    def keep_groups(self, topology_channel: TopologyChannel) -> None:
        """Keep the lost connection's groups bound until ``release_groups``.

        A refusal only costs what the lease would have saved.
        """
        self._kept = self._before
        for each in self._kept:
            for command in self._latest[-1].keep_groups(each):
                topology_channel.call(command)

    def release_groups(self, topology_channel: TopologyChannel) -> None:
        """Release the lost connection's groups, since all are bound again.

        A second call does nothing.
        """
        for each in self._kept:
            for command in self._latest[-1].release_groups(each):
                topology_channel.call(command)
        self._kept = []

    def end_leases(self, consumer: ConsumerChannel) -> None:
        """Leave nothing behind at an orderly end. No error if a lease is over."""
        for each in (*self._before, *self._latest):
            _end_lease(each, consumer)


async def _first_refused(calls: _Calls) -> _Refused | None:
    """Wait until all are answered or one is refused; RabbitMQ doesn't answer those behind it."""
    for command, answer in calls:
        try:
            await answer
        except carehare.ChannelClosedByServer as err:
            return command, err
    return None


async def _call(channel: TopologyChannel, commands: Iterable[Method]) -> None:
    """Call them and wait for the answers, whatever those are."""
    await asyncio.wait([channel.call(command) for command in commands])


def _end_lease(topology: Topology, consumer: ConsumerChannel) -> None:
    """Delete a lease without waiting for an answer."""
    for command in topology.delete_lease(nowait=True):
        consumer.send_nowait(command)
