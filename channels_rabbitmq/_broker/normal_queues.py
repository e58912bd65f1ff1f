"""The queues of normal channels: their names and arguments, and their declares and binds.

A *normal channel* is one whose name has no "!". Its messages wait in a queue that all processes
share, and each goes to one receiver. ::

                      "!channel.jobs"
    (groups exchange) ---------------> queue crq.channel.groups:jobs

The key is no group's, since a group's name can't hold "!", and no channel's, since an id can't be
empty. In the queue's name the last ":" ends that of the exchange. (A period wouldn't tell: both
parts may hold some. No channel's name holds a ":".)

The queue is durable, as newer brokers close the connection over a queue that is neither durable nor
exclusive. It expires when nobody has consumed from it or declared it for a day.

**The first declare decides about the arguments.** RabbitMQ refuses a declare with others (406, for
any difference, on 3.10, 4.0 and 4.3), and closes the AMQP channel. The bind is written right behind
the declare, on a ``TopologyChannel``, which goes on after a refusal. So an existing queue is used
as it is, whatever the reason of the refusal was, and that costs no round trip.

**Each connection binds anew** each queue that it uses. A queue survives a restart of the broker,
but its binding and the groups exchange don't.

**Groups** may have normal channels as members. Then the queue is bound under the group's name, too.
The process that has added the channel remembers the group, and binds both whenever it binds the
queue.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from functools import partial

import carehare

from .._amqp.binding import TopologyChannel
from .._amqp.connection import Connection
from .._amqp.methods import Method, Queue
from .._amqp.publishing import Route
from .._futures import fail, wait_all
from .._settings.settings import Settings
from ..exceptions import BrokerUnavailable
from .reasons import describe
from .shared import Shared
from .supervisor import Supervisor
from .topology import queue_arguments

logger = logging.getLogger("channels_rabbitmq.normal_channels")

# Queues that are remembered as bound. At that number all are forgotten, and declared again.
MOST_REMEMBERED = 10_000

# As 3.10, 4.0 and 4.3 say it
_NO_EXCHANGE = re.compile("no exchange")
_NO_QUEUE = re.compile("no queue")
_OTHER_ARGUMENTS = re.compile("inequivalent arg")  # A full virtual host is a 406, too.


def queue_name(exchange: str, channel: str) -> str:
    """Return the name of a channel's queue."""
    return f"crq.channel.{exchange}:{channel}"


class NormalTopology:
    """Names and commands for the queues of one ``LoopLayer``, whose id is ``id_``."""

    def __init__(
        self, id_: str, settings: Settings, capacity_of: Callable[[str], int], shared: Shared
    ) -> None:
        self._id = id_
        self._settings = settings
        self._exchange = settings.groups_exchange
        self._capacity_of = capacity_of
        self._told = shared.told
        # By channel: the groups to which this event loop has added it
        self.groups: dict[str, set[str]] = {}
        # Channels that any event loop of the layer has used, also one that has ended: for flush()
        self.used = shared.normal_channels

    def route(self, channel: str) -> Route:
        """Return the route of a channel's messages."""
        return Route(self._exchange, f"!channel.{channel}", mandatory=True)

    def queue(self, channel: str) -> str:
        """Return the name of a channel's queue."""
        return queue_name(self._exchange, channel)

    def declare(self, channel: str) -> Method:
        """Return the command that declares a channel's queue."""
        if self._settings.allow_flush:
            self.used.add(channel)
        arguments = queue_arguments(self._settings, max(1, self._capacity_of(channel)))
        arguments["x-expires"] = round(self._settings.normal_queue_expiry * 1000)
        return Queue.Declare(queue=self.queue(channel), durable=True, arguments=arguments)

    def bind(self, channel: str) -> Method:
        """Return the command that binds a channel's queue to the key of its messages."""
        route = self.route(channel)
        return Queue.Bind(
            queue=self.queue(channel), exchange=route.exchange, routing_key=route.routing_key
        )

    def bind_groups(self, channel: str) -> list[Method]:
        """Return the commands that bind a channel's queue for all its groups."""
        return [self.bind_group(channel, group) for group in self.groups.get(channel, ())]

    def bind_group(self, channel: str, group: str) -> Method:
        return Queue.Bind(queue=self.queue(channel), exchange=self._exchange, routing_key=group)

    def unbind_group(self, channel: str, group: str) -> Method:
        return Queue.Unbind(queue=self.queue(channel), exchange=self._exchange, routing_key=group)

    def remember_group(self, channel: str, group: str) -> bool:
        """Note that a channel is in a group; return whether that is new."""
        groups = self.groups.setdefault(channel, set())
        is_new = group not in groups
        groups.add(group)
        return is_new

    def forget_group(self, channel: str, group: str) -> None:
        groups = self.groups.get(channel, set())
        groups.discard(group)
        if not groups:
            self.groups.pop(channel, None)

    def purge(self, channel: str) -> Method:
        return Queue.Purge(queue=self.queue(channel))

    def on_used_as_it_is(self, channel: str, exc: BaseException) -> None:
        """Warn once that the declare was refused, but the queue is there."""
        if self._told.is_news(("used as it is", channel)):
            logger.warning(
                "%s: the queue of the normal channel %s is used as it is: %s",
                self._id,
                channel,
                describe(exc),
            )


class NormalQueues:
    """Declares and binds the queues, on each connection of a ``Supervisor`` anew.

    ``on_no_exchange()`` is called when the groups exchange turns out to be deleted.
    """

    def __init__(
        self,
        topology: NormalTopology,
        supervisor: Supervisor,
        on_no_exchange: Callable[[], None],
    ) -> None:
        self._topology = topology
        self._supervisor = supervisor
        self._on_no_exchange = on_no_exchange
        self._connection: Connection | None = None  # that has the next two
        self._amqp_channel: TopologyChannel | None = None
        # By channel: the answer to the bind, until it is forgotten or refused
        self._binds: dict[str, asyncio.Future[None]] = {}

    def bound(self, channel: str) -> asyncio.Future[None] | None:
        """Return the token of the present connection's binding; None if there is none."""
        bind = self._binds.get(channel)
        if bind is None or self._supervisor.connection is not self._connection:
            return None
        return bind if bind.done() and bind.exception() is None else None

    def forget(self, channel: str, bind: asyncio.Future[None] | None) -> None:
        """Forget the binding ``bind``, since its queue is gone. A later binding stays."""
        if bind is not None and self._binds.get(channel) is bind:
            del self._binds[channel]

    async def bind(self, channel: str, deadline: float) -> None:
        """Have the queue declared and bound, once for all callers.

        Raises BrokerUnavailable if RabbitMQ doesn't confirm by ``deadline`` (loop time), or
        refuses.
        """
        while True:
            connection = await self._supervisor.wait_ready(deadline)
            try:
                bind = self.start_bind(connection, channel)
            except carehare.ChannelClosed as err:  # no number for another AMQP channel
                raise BrokerUnavailable(f"The normal channel {channel}: {err}") from None
            what = f"declare the queue of the normal channel {channel}"
            if await _is_confirmed(bind, deadline, what):
                return
            # The connection is lost. Its supervisor may not know that yet.
            await asyncio.sleep(0)

    def start_bind(self, connection: Connection, channel: str) -> asyncio.Future[None]:
        """Bind, unless that has begun on this connection; return a future that ends with it.

        If RabbitMQ refused both declare and bind, the future has the declare's error.
        """
        amqp_channel = self.use(connection)
        bind = self._binds.get(channel)
        if bind is None:
            if len(self._binds) >= MOST_REMEMBERED:
                self._binds.clear()
            bind = self._binds[channel] = asyncio.get_running_loop().create_future()
            declared = amqp_channel.call(self._topology.declare(channel))
            answer = amqp_channel.call(self._topology.bind(channel))
            for command in self._topology.bind_groups(channel):
                amqp_channel.call(command)
            answer.add_done_callback(partial(self._on_answer, channel, declared, bind))
        return bind

    async def add_to_group(self, channel: str, group: str, deadline: float) -> None:
        """Have the queue get a group's messages. Raises as ``bind``; then nothing has changed."""
        is_new = self._topology.remember_group(channel, group)
        is_bound = False
        try:
            await self._bind_group(channel, group, deadline)
            is_bound = True
        finally:
            if is_new and not is_bound:
                self._topology.forget_group(channel, group)
                self._unbind_group(channel, group)

    async def _bind_group(self, channel: str, group: str, deadline: float) -> None:
        while True:
            await self.bind(channel, deadline)
            bind = self.bound(channel)
            if bind is None:
                continue  # The connection was lost in this moment.
            assert self._amqp_channel is not None, "else it isn't bound"
            answer = self._amqp_channel.call(self._topology.bind_group(channel, group))
            await wait_all([answer], deadline)
            if _found_no_queue(answer):  # It was deleted since. Declare it again.
                self.forget(channel, bind)
            elif await _is_confirmed(answer, deadline, f"bind the group {group!r}"):
                return

    async def discard_from_group(self, channel: str, group: str, deadline: float) -> None:
        """Have the queue get no more of a group's messages. No error if it got none.

        Raises BrokerUnavailable if RabbitMQ doesn't answer by ``deadline`` (loop time).
        """
        self._topology.forget_group(channel, group)
        await self._supervisor.wait_ready(deadline)
        if not await wait_all(self._unbind_group(channel, group), deadline):
            raise BrokerUnavailable(f"The group {group!r} was not unbound in time")

    def _unbind_group(self, channel: str, group: str) -> list[asyncio.Future[None]]:
        """Unbind, if there is a connection; return the answer."""
        connection = self._supervisor.connection
        if connection is None or not connection.is_open:
            return []
        return [self.use(connection).call(self._topology.unbind_group(channel, group))]

    def use(self, connection: Connection) -> TopologyChannel:
        """Return the AMQP channel on a connection; on a new one, nothing is bound yet."""
        if self._amqp_channel is None or connection is not self._connection:
            self._amqp_channel = connection.open_topology()
            self._connection = connection
            self._binds = {}
        return self._amqp_channel

    async def purge_all(self, deadline: float) -> None:
        """Take all channels that were used here out of their groups, and delete their messages.

        Raises BrokerUnavailable if it doesn't answer by ``deadline`` (loop time).
        """
        topology = self._topology
        if not topology.used:
            return
        connection = await self._supervisor.wait_ready(deadline)
        amqp_channel = self.use(connection)
        groups, topology.groups = topology.groups, {}
        commands = [topology.unbind_group(one, group) for one in groups for group in groups[one]]
        commands += [topology.purge(one) for one in list(topology.used)]  # Others may add some.
        # An error means that there is no such queue.
        if not await wait_all([amqp_channel.call(one) for one in commands], deadline):
            raise BrokerUnavailable("RabbitMQ did not empty the queues of normal channels in time")

    def _on_answer(
        self,
        channel: str,
        declared: asyncio.Future[None],
        bind: asyncio.Future[None],
        answer: asyncio.Future[None],
    ) -> None:
        refusal, exc = declared.exception(), answer.exception()
        if exc is None:
            if refusal is not None:
                self._topology.on_used_as_it_is(channel, refusal)
            bind.set_result(None)
            return
        self.forget(channel, bind)
        fail(bind, _more_telling(refusal, exc))
        if isinstance(exc, carehare.ChannelClosedByServer) and _NO_EXCHANGE.search(str(exc)):
            self._on_no_exchange()


def _found_no_queue(answer: asyncio.Future[None]) -> bool:
    exc = answer.exception() if answer.done() else None
    return isinstance(exc, carehare.ChannelClosedByServer) and bool(_NO_QUEUE.search(str(exc)))


async def _is_confirmed(answer: asyncio.Future[None], deadline: float, what: str) -> bool:
    """Return whether RabbitMQ has done ``what``; False if the connection is lost.

    Raises BrokerUnavailable if it has refused, or hasn't answered by ``deadline`` (loop time).
    """
    if not await wait_all([answer], deadline):
        raise BrokerUnavailable(f"RabbitMQ did not {what} in time")
    exc = answer.exception()
    if isinstance(exc, carehare.ChannelClosedByServer):
        raise BrokerUnavailable(f"RabbitMQ refused to {what}: {describe(exc)}")
    return exc is None


def _more_telling(refusal: BaseException | None, exc: BaseException) -> BaseException:
    """Return the error of the declare, if that is why the bind failed, too."""
    refused = carehare.ChannelClosedByServer
    if isinstance(exc, refused) and isinstance(refusal, refused):
        return exc if _OTHER_ARGUMENTS.search(str(refusal)) else refusal
    return exc
