"""``Subscriber``: this event loop's queue, its bindings, and the deliveries from it.

Each connection has a queue and exchanges of its own: ``topology`` says which, and why. All
are declared in one pipeline, the former connection's ways cut, and the new queue consumed; then the
channels of this id are reachable, and messages to them come. The groups are bound right afterwards,
those first which somebody waits for.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from functools import partial

import carehare
import pamqp.commands

from .._amqp.binding import TopologyChannel
from .._amqp.connection import Connection
from .._amqp.consuming import ConsumerChannel
from .._futures import Waiters
from .._settings.settings import Settings
from ..exceptions import BrokerUnavailable
from .bindings import Bindings, Command
from .declarer import Declarer
from .groups_exchange import GroupsExchange
from .outage import KnownOutage
from .supervisor import State, Supervisor, describe
from .topology import Declarations

logger = logging.getLogger("channels_rabbitmq.subscriber")

_NOT_FOUND = 404  # AMQP 0-9-1, section 1.2


class Subscriber:
    """Receives for one ``LoopLayer``, whose id is ``id_``.

    ``on_delivery(body, tag, published, consumer)`` is called for each message, in order (see
    ``ConsumerChannel``); ``consumer.ack(tag)`` may be called at any time, and does nothing once the
    connection that delivered it is gone.
    ``on_lost()`` is called when nothing more comes from the connection that delivered until now.
    ``on_disconnect(reason)`` and ``on_reconnect(reason)`` take turns: see ``_hooks``; both get the
    reason of the loss.
    """

    name = "subscriber"

    def __init__(
        self,
        id_: str,
        settings: Settings,
        bindings: Bindings,
        groups_exchange: GroupsExchange,
        *,
        connection_name: str,
        known_outage: KnownOutage,
        on_delivery: Callable[[bytes, int, int, ConsumerChannel], None],
        on_lost: Callable[[], None],
        on_disconnect: Callable[[str], None],
        on_reconnect: Callable[[str], None],
    ) -> None:
        self._bindings = bindings
        self._on_delivery = on_delivery
        self._on_lost = on_lost
        self._on_disconnect = on_disconnect
        self._on_reconnect = on_reconnect
        self._was_ready = False
        self._loss: str | None = None  # the reason told, until all groups are bound again
        self._loop = asyncio.get_running_loop()
        self.supervisor = Supervisor(
            self,
            settings,
            id_=id_,
            connection_name=connection_name,
            known_outage=known_outage,
        )
        self.supervisor.on_over = self._wake_all
        self.queue = ""  # the present connection's, while there is one
        self._declarations: Declarations | None = None  # of the present connection, or the last
        self._declarer = Declarer(id_, settings, groups_exchange, owner=self.supervisor.name)
        self._consumer: ConsumerChannel | None = None
        self._topology: TopologyChannel | None = None
        self._timer: asyncio.TimerHandle | None = None  # for the next linger
        self._waiters: dict[str, Waiters] = {}  # by group: who waits for its bind
        self._refusals: dict[str, str] = {}  # by group: why its bind was refused

    # Role

    async def set_up(self, connection: Connection) -> None:
        topology = connection.open_topology()
        open_consumer = partial(self._open_consumer, connection)
        self._declarations = await self._declarer.declare(
            open_consumer, topology, connection.server_version
        )
        self._topology = topology
        self.queue = self._declarations.queue
        self._declarer.hold_groups(topology)

    def _open_consumer(self, connection: Connection) -> ConsumerChannel:
        self._consumer = connection.open_consumer(
            on_delivery=self._on_delivery, on_end=self._on_end
        )
        return self._consumer

    def ready(self) -> None:
        self._was_ready = True
        self._pump()
        self._check_rebound()

    def lost(self, reason: str) -> None:
        self._cancel_timer()
        if self._was_ready and self._loss is None and self.supervisor.state is not State.CLOSED:
            self._loss = reason
            self._on_disconnect(reason)
        if self._consumer is not None:
            if self.supervisor.state is State.CLOSED:
                self._declarer.end_leases(self._consumer)
            # It may go on for a second; what came then would count on the next connection.
            self._consumer.mute()
            self._consumer = None
            self._on_lost()
        if self._topology is None:
            return
        self._topology = None
        self.queue = ""
        self._bindings.connection_lost()
        self._refusals.clear()

    def _check_rebound(self) -> None:
        """Do what is due once every group is bound again that was."""
        if (
            self._bindings.awaiting_rebind
            or self._topology is None
            or self.supervisor.connection is None
        ):
            return
        self._declarer.release_groups(self._topology)
        if self._loss is not None:
            reason, self._loss = self._loss, None
            self._on_reconnect(reason)

    def _on_end(self, exc: Exception) -> None:
        self.supervisor.give_up_connection(str(exc))

    def ask(self) -> None:
        """Have the broker answer something, so that one which doesn't is noticed.

        For a connection without heartbeats, which is as silent when it is dead.
        """
        if self._topology is not None:
            self._topology.call(pamqp.commands.Basic.Qos())

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
        self._pump()
        self._check_rebound()

    async def wait_bound(self, group: str, deadline: float) -> None:
        """As ``bind``, but returns at once if the group isn't required, or no more."""
        await self.supervisor.read_first()  # It may be bound for a connection that has ended.
        while self._bindings.is_required(group) and not self._bindings.is_bound(group):
            self._require_open()
            self._refusals.pop(group, None)
            self._bindings.prioritize(group)
            self._pump()
            is_answered = await self._wait_answer(group, deadline)
            self._require_open()
            if group in self._refusals:
                raise BrokerUnavailable(
                    f"RabbitMQ refused to bind the group {group!r}: {self._refusals[group]}"
                )
            if not is_answered and self.supervisor.is_over(deadline):
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

    def _pump(self) -> None:
        """Write the binds and unbinds that are due."""
        if self._topology is None or self.supervisor.connection is None:
            return
        declarations = self._declarations
        assert declarations is not None, "it is connected"
        for command in self._bindings.next_commands():
            make = declarations.bind_group if command.bind else declarations.unbind_group
            answer = self._topology.call(make(command.group))
            answer.add_done_callback(partial(self._on_answer, command))
        deadline = self._bindings.next_deadline()
        if self._timer is None and deadline is not None:
            # In a context of its own: the caller's would live as long as groups come and go.
            self._timer = self._loop.call_at(
                deadline, self._on_timer, context=contextvars.Context()
            )

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
        self._pump()
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
        if exc.reply_code == _NOT_FOUND:
            self.supervisor.give_up_connection("the queue or the groups exchange is gone")

    def _on_timer(self) -> None:
        self._timer = None
        self._pump()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def stop(self) -> None:
        """Close the connection, in a moment; the broker deletes queue, bindings and exchange."""
        self._cancel_timer()
        self.supervisor.stop()
        self._wake_all()

    def _wake_all(self) -> None:
        """Have those who wait for a bind look anew at what they wait for."""
        for waiters in list(self._waiters.values()):
            waiters.wake()
