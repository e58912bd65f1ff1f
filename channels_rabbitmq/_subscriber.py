"""``Subscriber``: this event loop's queue, its bindings, and the deliveries from it.

Each connection has a queue and a private exchange of its own. An exclusive queue stays locked until
the broker has noticed that its connection is dead (almost three heartbeats after a half-open one),
so the next connection doesn't ask for it; a declare during its deletion can even end in ``541
INTERNAL_ERROR``, which closes the connection. ::

    groups exchange --- "<id>!" ---> private exchange <id>.<n> (fanout) ---> queue <id> or <id>.<n>
                    --- group  ------------------------------------------->

Messages for channels come through the private exchange. Were the queue bound for them directly,
the dead queue of a former connection would go on taking them until it is full, and then its
``reject-publish`` would have messages nacked which the new queue took. Unbinding it needs the
locked queue; unbinding the former exchange doesn't. So: declare, unbind the former exchange, bind,
consume, all in one pipeline; the channels of this id are reachable again within 0.1 s. The former
exchange goes by itself, with its queue. (Deleting it while the broker does just that, after a clean
disconnect, made RabbitMQ nack some messages and log crashes: measured on 3.10 and 4.0.)

Groups are bound to the queue itself, afterwards. The broker is still deleting the former queue's
bindings then, and new ones starve that work (measured with 5,000 groups, on a machine on which the
broker makes 2,500 bindings a second: 6 s instead of 3 s, and confirms held up for 4.6 s). So the
groups wait for half as long as binding them takes, except those which somebody waits for. But not
after a connection that fell silent, if the very next attempt succeeds: the broker hasn't noticed
yet and deletes nothing, so the sooner all are bound, the better: in each of eight pairs of runs
(5,000 and 20,000 groups, heartbeats of 4 and 10 s, on 3.10 and 4.0) 0.4 to 2.7 s sooner. What is
still being bound when the broker does begin to delete the former ones takes 20 to 70 s with 20,000
groups, waited or not: a broker too slow to bind all within a heartbeat and a half.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import carehare
import pamqp.commands

from ._amqp.amqp_channels import ConsumerChannel, TopologyChannel
from ._amqp.connection import Connection
from ._bindings import Bindings, Command
from ._settings import Settings
from ._supervisor import State, Supervisor, describe
from ._waiting import Waiters
from .exceptions import BrokerUnavailable

logger = logging.getLogger(__name__)

# After a reconnect, how long groups wait before they are bound: seconds for each group that was
# bound, as long as no number of bindings was made at once that shows how fast the broker is.
REBIND_DELAY_PER_GROUP = 0.0001
# The same in parts of what binding takes; and the most in all, in seconds.
_REBIND_SHARE = 0.5
LONGEST_REBIND_DELAY = 2.0
# Bindings made at once that are enough to tell.
_ENOUGH_TO_MEASURE = 200

_NOT_FOUND = 404  # AMQP 0-9-1, section 1.2


def direct_routing_key(id_: str) -> str:
    """Return the key, in the groups exchange, of messages for the channels of a ``LoopLayer``.

    No group has it: a group's name can't hold "!".
    """
    return f"{id_}!"


class Subscriber:
    """Receives for one ``LoopLayer``, whose id is ``id_``.

    ``on_delivery(body, tag, consumer)`` is called for each message, in order; ``consumer.ack(tag)``
    may be called at any time, and does nothing once the connection that delivered it is gone.
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
        *,
        connection_name: str,
        on_delivery: Callable[[bytes, int, ConsumerChannel], None],
        on_lost: Callable[[], None],
        on_disconnect: Callable[[str], None],
        on_reconnect: Callable[[str], None],
    ) -> None:
        self._id = id_
        self._settings = settings
        self._bindings = bindings
        self._on_delivery = on_delivery
        self._on_lost = on_lost
        self._on_disconnect = on_disconnect
        self._on_reconnect = on_reconnect
        self._was_ready = False
        self._loss: str | None = None  # the reason told, until all groups are bound again
        self._loop = asyncio.get_running_loop()
        self.supervisor = Supervisor(self, settings, connection_name=connection_name)
        self.queue = ""  # the present connection's, while there is one
        self._number = 0  # of the connection: each has a queue and an exchange of its own
        self._former_exchanges: list[str] = []  # that may exist still
        self._connection: Connection | None = None  # the present one, or the last
        self._consumer: ConsumerChannel | None = None
        self._topology: TopologyChannel | None = None
        # Whether groups nobody waits for are held back until the timer below goes off.
        self._is_holding_back = False
        self._timer: asyncio.TimerHandle | None = None  # for holding back, or the next linger
        self._bound_before = 0  # groups bound on the former connection
        self._unnoticed = 0  # the same if that fell silent, and the broker hasn't noticed yet
        self._rebind_delay = REBIND_DELAY_PER_GROUP
        # Since when the broker has had enough commands at once, and how many it has answered since.
        self._is_measuring = False
        self._measured_from = 0.0
        self._answered = 0
        self._waiters: dict[str, Waiters] = {}  # by group: who waits for its bind
        self._refusals: dict[str, str] = {}  # by group: why its bind was refused

    # Role

    async def set_up(self, connection: Connection) -> None:
        self._connection = connection
        self._number += 1
        exchange = f"{self._id}.{self._number}"
        queue = self._id if self._number == 1 else exchange
        groups_exchange = self._settings.groups_exchange
        consumer = connection.open_consumer(on_delivery=self._on_delivery, on_end=self._accept_end)
        commands = pamqp.commands
        calls = [
            commands.Exchange.Declare(exchange=groups_exchange, exchange_type="direct"),
            commands.Queue.Declare(queue=queue, exclusive=True, arguments=self._queue_arguments()),
            commands.Exchange.Declare(exchange=exchange, exchange_type="fanout", auto_delete=True),
            commands.Queue.Bind(queue=queue, exchange=exchange),
            *(
                commands.Exchange.Unbind(
                    destination=former,
                    source=groups_exchange,
                    routing_key=direct_routing_key(self._id),
                )
                for former in self._former_exchanges  # no error if one is gone
            ),
            commands.Exchange.Bind(
                destination=exchange,
                source=groups_exchange,
                routing_key=direct_routing_key(self._id),
            ),
        ]
        # The first is the one that was in use; of attempts that failed the latest are enough.
        self._consumer = consumer
        self._former_exchanges.append(exchange)
        del self._former_exchanges[1:-5]
        answers = [consumer.call(call) for call in calls]
        answers.append(consumer.consume(queue, self._settings.local_capacity))
        # The first that failed is the one the broker refused.
        for answer in answers:
            await answer
        self._former_exchanges = [exchange]
        self._topology = connection.open_topology()
        self.queue = queue

    def _queue_arguments(self) -> dict[str, Any]:
        # No others: newer brokers refuse some, and with Khepri binding arguments break routing.
        arguments: dict[str, Any] = {"x-queue-type": "classic"}
        if self._settings.remote_capacity is not None:
            arguments["x-max-length"] = self._settings.remote_capacity
            arguments["x-overflow"] = "reject-publish"
        if self._settings.expiry is not None:
            arguments["x-message-ttl"] = round(self._settings.expiry * 1000)
        return arguments

    def ready(self) -> None:
        self._was_ready = True
        delay = min(self._bound_before * self._rebind_delay, LONGEST_REBIND_DELAY)
        self._bound_before = self._unnoticed = 0
        self._is_holding_back = delay > 0
        if self._is_holding_back:
            self._timer = self._loop.call_later(delay, self._stop_holding_back)
        self._pump()
        self._tell_reconnected()

    def lost(self, reason: str) -> None:
        self._cancel_timer()
        if self._was_ready and self._loss is None and self.supervisor.state is not State.CLOSED:
            self._loss = reason
            self._on_disconnect(reason)
        if self._consumer is not None:
            # It may go on for a second; what came then would count on the next connection.
            self._consumer.mute()
            self._consumer = None
            self._on_lost()
        if self._topology is None:
            # An attempt has failed: the broker itself was away, and notices when it is back.
            self._bound_before = max(self._bound_before, self._unnoticed)
            return
        self._topology = None
        self._is_measuring = False
        self.queue = ""
        if self._has_fallen_silent():
            self._unnoticed = self._bindings.bound
        else:
            self._bound_before = max(self._bound_before, self._bindings.bound)
        self._bindings.connection_lost()
        self._refusals.clear()

    def _tell_reconnected(self) -> None:
        """Tell of it, if it is due: every group is bound again that was."""
        if (
            self._loss is not None
            and not self._bindings.missing
            and self._topology is not None
            and self.supervisor.connection is not None
        ):
            reason, self._loss = self._loss, None
            self._on_reconnect(reason)

    def _has_fallen_silent(self) -> bool:
        ended = self._connection.ended if self._connection is not None else None
        return (
            ended is not None
            and ended.done()
            and isinstance(ended.result(), carehare.ConnectionClosedByHeartbeatMonitor)
        )

    def _accept_end(self, exc: Exception) -> None:
        self.supervisor.give_up_connection(str(exc))

    # Bindings

    def want(self, group: str) -> None:
        """Have a group bound; ``wait_bound`` tells when it is."""
        self._bindings.want(group)
        self._pump()

    def release(self, group: str) -> None:
        """Have a group unbound, soon."""
        self._bindings.release(group)
        self._refusals.pop(group, None)
        if group in self._waiters:
            self._waiters[group].wake()
        self._pump()
        self._tell_reconnected()

    async def wait_bound(self, group: str, deadline: float) -> None:
        """Wait until a group is bound and confirmed, before all that nobody waits for.

        Returns at once if nobody wants it, or no more. Raises BrokerUnavailable if the broker
        doesn't confirm by ``deadline`` (loop time), or refuses.
        """
        while self._bindings.is_wanted(group) and not self._bindings.is_bound(group):
            self._require_open()
            self._refusals.pop(group, None)
            self._bindings.hurry(group)
            self._pump()
            waiters = self._waiters.setdefault(group, Waiters())
            try:
                is_answered = await waiters.wait(deadline)
            finally:
                if not waiters and self._waiters.get(group) is waiters:
                    del self._waiters[group]
            self._require_open()
            if group in self._refusals:
                raise BrokerUnavailable(
                    f"RabbitMQ refused to bind the group {group!r}: {self._refusals[group]}"
                )
            if not is_answered:
                reason = self.supervisor.last_reason or "still connecting"
                if self.supervisor.connection is not None:
                    reason = "RabbitMQ did not confirm the binding"
                raise BrokerUnavailable(f"The group {group!r} was not bound in time: {reason}")

    def _require_open(self) -> None:
        if self.supervisor.state is State.CLOSED:
            raise BrokerUnavailable("The channel layer is closed")

    def _pump(self) -> None:
        """Write the binds and unbinds that are due."""
        if self._topology is None or self.supervisor.connection is None:
            return
        for command in self._bindings.take(only_hurried=self._is_holding_back):
            method = pamqp.commands.Queue.Bind if command.bind else pamqp.commands.Queue.Unbind
            answer = self._topology.call(
                method(
                    queue=self.queue,
                    exchange=self._settings.groups_exchange,
                    routing_key=command.group,
                )
            )
            answer.add_done_callback(partial(self._accept_answer, command))
        if not self._is_measuring and self._bindings.outstanding >= _ENOUGH_TO_MEASURE:
            self._is_measuring = True
            self._measured_from = self._loop.time()
            self._answered = 0
        deadline = self._bindings.next_deadline()
        if self._timer is None and deadline is not None:
            # In a context of its own: the caller's would live as long as groups come and go.
            self._timer = self._loop.call_at(
                deadline, self._accept_timer, context=contextvars.Context()
            )

    def _accept_answer(self, command: Command, answer: asyncio.Future[None]) -> None:
        exc = answer.exception()
        if exc is not None and not isinstance(exc, carehare.ChannelClosedByServer):
            return  # The connection is gone.
        self._bindings.settle(command, exc is None)
        self._answered += 1
        if self._is_measuring and self._answered == _ENOUGH_TO_MEASURE:
            self._is_measuring = False
            per_group = (self._loop.time() - self._measured_from) / self._answered
            self._rebind_delay = per_group * _REBIND_SHARE
        if exc is not None:
            self._accept_refusal(command, exc)
        waiters = self._waiters.get(command.group)
        if waiters is not None:
            waiters.wake()
        self._pump()
        self._tell_reconnected()

    def _accept_refusal(self, command: Command, exc: carehare.ChannelClosedByServer) -> None:
        if command.bind:
            self._refusals[command.group] = describe(exc)
        logger.error(
            "subscriber: RabbitMQ refused to %s the group %r: %s",
            "bind" if command.bind else "unbind",
            command.group,
            describe(exc),
        )
        if exc.reply_code == _NOT_FOUND:
            self.supervisor.give_up_connection("the queue or the groups exchange is gone")

    def _accept_timer(self) -> None:
        self._timer = None
        self._pump()

    def _stop_holding_back(self) -> None:
        self._is_holding_back = False
        self._accept_timer()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def stop(self) -> None:
        """Close the connection, in a moment; the broker deletes queue, bindings and exchange."""
        self._cancel_timer()
        self.supervisor.stop()
        for waiters in list(self._waiters.values()):
            waiters.wake()
