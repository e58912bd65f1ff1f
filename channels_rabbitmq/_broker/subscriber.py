"""``Subscriber``: this event loop's queue, its bindings, and the deliveries from it.

Each connection has queues and exchanges of its own: ``topology`` says which, and why. They are all
declared in one pipeline, which also unbinds what leads to the former connection's queue, and
consumes the new queue. Then messages to the channels of this id arrive. The groups are bound right
afterwards, those first for whose bind a caller waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol

import carehare

from .._amqp.binding import TopologyChannel
from .._amqp.connection import Connection
from .._amqp.consuming import ConsumerChannel
from .._amqp.errors import is_not_found
from .._amqp.methods import Basic, Queue
from .._futures import Waiters, call_at, wait_all
from .._settings.settings import Settings
from ..exceptions import BrokerUnavailable
from .bindings import Bindings, Command
from .declarer import Declarer
from .groups_exchange import GroupsExchange
from .reasons import describe
from .shared import Shared
from .supervisor import State, Supervisor
from .topology import REQUESTS_PREFETCH, Topology

logger = logging.getLogger("channels_rabbitmq.subscriber")


class Requests(Protocol):
    """Handles the requests of other processes."""

    def on_request(self, body: bytes, tag: int, published: int, consumer: ConsumerChannel) -> None:
        """A request has arrived; ``consumer`` is to ack it by its ``tag``."""

    def on_ready(self) -> None:
        """Requests arrive from now on, and all that is declared is there."""

    def on_lost(self) -> None:
        """None arrive any more, until ``on_ready``."""


class Subscriber:
    """Receives for one ``LoopLayer``, whose id is ``id_``.

    ``on_delivery(body, tag, published, consumer)`` is called for each message, in order (see
    ``ConsumerChannel``). ``consumer.ack(tag)`` may be called at any time; it does nothing once the
    connection that delivered the message is gone.
    ``on_consumer_lost()`` is called when a connection delivers nothing more, since it is lost.
    ``on_disconnect(reason)`` and ``on_reconnect(reason)`` are called in turn: see ``_hooks``. Both
    get the reason of the loss.
    ``requests`` gets what other processes ask.
    """

    name = "subscriber"

    def __init__(
        self,
        id_: str,
        settings: Settings,
        bindings: Bindings,
        groups_exchange: GroupsExchange,
        *,
        shared: Shared,
        requests: Requests,
        on_delivery: Callable[[bytes, int, int, ConsumerChannel], None],
        on_consumer_lost: Callable[[], None],
        on_disconnect: Callable[[str], None],
        on_reconnect: Callable[[str], None],
    ) -> None:
        self._bindings = bindings
        self._requests = requests
        self._on_delivery = on_delivery
        self._on_consumer_lost = on_consumer_lost
        self._on_disconnect = on_disconnect
        self._on_reconnect = on_reconnect
        self._was_ready = False
        # Why the connection was lost, from on_disconnect() until on_reconnect()
        self._loss: str | None = None
        self.supervisor = Supervisor(self, settings, id_=id_, shared=shared)
        self.supervisor.on_limit_passed = self._wake_all
        self.queue = ""  # the present connection's, while there is one
        self._topology: Topology | None = None  # of the present connection, or the last
        self._declarer = Declarer(
            id_, settings, groups_exchange, shared.told, owner=self.supervisor.name
        )
        self._consumer: ConsumerChannel | None = None
        self._requests_consumer: ConsumerChannel | None = None
        self._topology_channel: TopologyChannel | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._waiters: dict[str, Waiters] = {}  # by group: calls that wait for its bind
        self._refusals: dict[str, str] = {}  # by group: why its bind was refused

    # ConnectionHandler

    async def set_up(self, connection: Connection) -> None:
        channel = connection.open_topology()
        self._topology = await self._declarer.declare(
            partial(self._open_consumer, connection), channel, connection.server_version
        )
        await self._consume_requests(connection, self._topology.requests_queue)
        self._topology_channel = channel
        self.queue = self._topology.queue
        self._declarer.keep_groups(channel)

    def _open_consumer(self, connection: Connection) -> ConsumerChannel:
        self._consumer = connection.open_consumer(
            on_delivery=self._on_delivery, on_end=self._on_end
        )
        return self._consumer

    async def _consume_requests(self, connection: Connection, queue: str) -> None:
        """Consume beside the messages: what is unacked there holds up no request."""
        self._requests_consumer = connection.open_consumer(
            on_delivery=self._requests.on_request, on_end=self._on_end
        )
        await self._requests_consumer.consume(queue, REQUESTS_PREFETCH)

    def on_ready(self) -> None:
        self._was_ready = True
        self._requests.on_ready()
        self._write_commands()
        self._check_rebound()

    def on_lost(self, reason: str) -> None:
        is_closed = self.supervisor.state is State.CLOSED
        self._cancel_timer()
        if self._was_ready and self._loss is None and not is_closed:
            self._loss = reason
            self._on_disconnect(reason)
        if self._consumer is not None:
            if is_closed:
                self._declarer.end_leases(self._consumer)
            # The connection may go on for a second; its deliveries would count on the next one.
            self._consumer.detach()
            self._consumer = None
            self._on_consumer_lost()
        if self._requests_consumer is not None:
            self._requests_consumer.detach()
            self._requests_consumer = None
            self._requests.on_lost()
        if self._topology_channel is not None:
            self._topology_channel = None
            self.queue = ""
            self._bindings.connection_lost()
            self._refusals.clear()

    def _check_rebound(self) -> None:
        """If all groups that had members are bound again, let the former bindings go.

        Then call ``on_reconnect``.
        """
        if self._bindings.awaiting_rebind or self.supervisor.connection is None:
            return
        assert self._topology_channel is not None, "it is set up"
        self._declarer.release_groups(self._topology_channel)
        if self._loss is not None:
            reason, self._loss = self._loss, None
            self._on_reconnect(reason)

    def _on_end(self, exc: Exception) -> None:
        self.supervisor.reconnect(str(exc))

    def request_answer(self) -> None:
        """Call a method, so that a broker that doesn't answer is noticed.

        For a connection without heartbeats, which is silent also when it is alive.
        """
        if self._topology_channel is not None:
            self._topology_channel.call(Basic.Qos())

    async def purge(self, deadline: float) -> None:
        """Have RabbitMQ delete what waits in this connection's queue.

        What it has delivered before arrives before this returns. Raises BrokerUnavailable if it
        doesn't answer by ``deadline`` (loop time).
        """
        consumer = self._consumer
        if consumer is None or self.supervisor.connection is None:
            return  # Then there is no queue, or a new one in a moment.
        if not await wait_all([consumer.call(Queue.Purge(queue=self.queue))], deadline):
            raise BrokerUnavailable("RabbitMQ did not empty the queue in time")

    # Groups

    async def bind(self, group: str, deadline: float) -> None:
        """Bind a group, before those that no caller waits for, and wait until that is confirmed.

        Raises BrokerUnavailable if RabbitMQ doesn't confirm by ``deadline`` (loop time), or
        refuses. The group stays required all the same, until ``unbind``.
        """
        self._bindings.require(group)
        await self.wait_bound(group, deadline)

    def unbind(self, group: str) -> None:
        """Unbind a group in a moment, unless it is bound again before."""
        self._bindings.unrequire(group)
        self._refusals.pop(group, None)
        if group in self._waiters:
            self._waiters[group].wake()
        self._write_commands()
        self._check_rebound()

    async def wait_bound(self, group: str, deadline: float) -> None:
        """As ``bind``, but returns at once if the group isn't required, or no more."""
        await self.supervisor.read_first()  # It may be bound for a connection that has ended.
        while self._bindings.is_required(group) and not self._bindings.is_bound(group):
            self._require_open()
            self._refusals.pop(group, None)
            self._bindings.prioritize(group)
            self._write_commands()
            is_answered = await self._wait_answer(group, deadline)
            self._require_open()
            if group in self._refusals:
                raise BrokerUnavailable(
                    f"RabbitMQ refused to bind the group {group!r}: {self._refusals[group]}"
                )
            if not is_answered and self.supervisor.is_past_limit(deadline):
                if self.supervisor.connection is None:
                    raise self.supervisor.unavailable()
                raise BrokerUnavailable(
                    f"The group {group!r} was not bound in time: RabbitMQ did not confirm it"
                )

    async def _wait_answer(self, group: str, deadline: float) -> bool:
        waiters = self._waiters.setdefault(group, Waiters())
        try:
            return await waiters.wait(self.supervisor.limit(deadline))
        finally:
            if not waiters and self._waiters.get(group) is waiters:
                del self._waiters[group]

    def _require_open(self) -> None:
        if self.supervisor.state is State.CLOSED:
            raise self.supervisor.closed_error()

    def _write_commands(self) -> None:
        """Write the binds and unbinds that are due."""
        if self.supervisor.connection is None:
            return
        channel, topology = self._topology_channel, self._topology
        assert channel is not None, "it is set up"
        assert topology is not None, "it is set up"
        for command in self._bindings.next_commands():
            make = topology.bind_group if command.bind else topology.unbind_group
            answer = channel.call(make(command.group))
            answer.add_done_callback(partial(self._on_answer, command))
        deadline = self._bindings.next_deadline()
        if self._linger_timer is None and deadline is not None:
            self._linger_timer = call_at(deadline, self._on_linger_over)

    def _on_answer(self, command: Command, answer: asyncio.Future[None]) -> None:
        exc = answer.exception()
        if exc is not None and not isinstance(exc, carehare.ChannelClosedByServer):
            return  # The connection is gone.
        self._bindings.on_answer(command, exc is None)
        if exc is not None:
            self._on_refusal(command, exc)
        waiters = self._waiters.get(command.group)
        if waiters is not None:
            waiters.wake()
        self._write_commands()
        self._check_rebound()

    def _on_refusal(self, command: Command, exc: carehare.ChannelClosedByServer) -> None:
        if command.bind:
            self._refusals[command.group] = describe(exc)
        logger.error(
            "%s: RabbitMQ refused to %s the group %r: %s",
            self.supervisor.name,
            "bind" if command.bind else "unbind",
            command.group,
            describe(exc),
        )
        if is_not_found(exc):
            self.supervisor.reconnect("the queue or the groups exchange is gone")

    def _on_linger_over(self) -> None:
        self._linger_timer = None
        self._write_commands()

    def _cancel_timer(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None

    def close(self) -> None:
        """Close the connection, in a moment; RabbitMQ deletes queue, bindings and exchanges."""
        self._cancel_timer()
        self.supervisor.close()
        self._wake_all()

    def _wake_all(self) -> None:
        """Have all calls that wait for a bind look at its state again."""
        for waiters in list(self._waiters.values()):
            waiters.wake()
