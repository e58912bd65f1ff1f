"""``Declarations``: what one connection of a ``Subscriber`` declares on the broker.

Each connection has all of it for itself. An exclusive queue stays locked until the broker has
noticed that its connection is dead (almost three heartbeats after a half-open one), so the next
connection doesn't ask for it; a declare during its deletion can even end in ``541 INTERNAL_ERROR``,
which closes the connection. With ``crq.x.2`` for ``<id>.<number>``::

                       "crq.x!"             "crq.x!"
    (groups exchange) ----------> (crq.x.2) ----------> queue crq.x.2 (exclusive)
          |                           |  "lease"             ^
          |    "crq.x!alive"          v                      |
          |--------------------> (crq.x.2.lease) --> queue crq.x.2.lease
          |                           ^  ^                   |
          |                           |  +---------- (crq.x.2.members)
          |     each group,           |                      ^
          +--------------------> (crq.x.2.groups) -----------+
               "crq.x!groups"

**Messages for channels** come through an exchange of their own. Were the queue bound for them
directly, the dead queue of a former connection would go on taking them until it is full, and then
its ``reject-publish`` would have messages nacked which the new queue took. Unbinding it needs the
locked queue; unbinding the former exchange doesn't. So the channels of this id are reachable again
within 0.1 s. The former exchange goes by itself, with its lease. (Deleting it while the broker
deletes its queue, after a clean disconnect, made RabbitMQ nack some messages and log crashes:
measured on 3.10 and 4.0.) The next connection cuts its way for groups, too.

**Groups** are bound to another one, because of what a queue's end costs. RabbitMQ deletes a queue
together with its bindings, and only then cuts the way to it. Meanwhile it confirms what it routes
there, and drops it: with 5,000 groups bound to the queue itself, 11 to 14 % of 500 confirmed
messages a second were lost when its connection was closed by force every 2.4 seconds, and
confirms were held up by 0.3 to 0.45 s. (3.10 and 4.0; an auto-delete exchange without more, or one
that goes with a second exclusive queue, is deleted in the same moment.) Now the queue has two
bindings whatever the number of groups, and what is lost is what was under way: 0.05 to 0.09 %. All
groups come by one way then, and so does one message of the probe, by a key of its own. (The
exchange in between, ``.members``, is there for the next connection: to cut that way.)

**The lease** deletes the groups' bindings later: the groups' exchange goes with the lease's
exchange, which goes with the lease's queue, which goes ``LEASE`` seconds after its consumer.
No message is ever routed to that queue. It isn't exclusive, or it would go at once, so it has to be
durable: newer brokers may refuse queues that are neither. Should it be deleted before its time,
nothing is lost but what it is for.

How long it takes to bind the groups anew depends on how many there are. So the next connection
binds the former one's groups' exchange to its own lease's exchange until all are bound: then that
exchange, with its bindings, stays however long it takes.

It is a luxury: if RabbitMQ refuses it (a limit of queues or exchanges, a permission), the groups'
bindings go with the queue, which costs some messages when a connection is lost.

**Alternate exchanges** that an operator's policy gives to exchanges get what an exchange has routed
nowhere. The lease's exchange routes no message, that for channels none once its queue has gone. So
they name one themselves, and that is themselves: RabbitMQ doesn't route by an exchange twice.
(Else, with a policy for all exchanges, a catch-all got what it mustn't, and once it was full, each
message was nacked.) As long as a lease lasts, what is sent to the channels of its process has been
routed, to nobody, and is returned also if everybody's exchange has an alternate one (but for the
moment between a cut and the next binding).

**Whoever imports definitions** that were exported while a process was connected gets all of this
but the exclusive queue. Exchanges go with the last binding of which they are the source, so each of
ours has one that ends with the lease: those for channels and members are bound to the lease's
exchange for this reason only. (For channels by a key that no message has, hence its type, direct:
when it was a fanout exchange, the way to nowhere took RabbitMQ 3.10 5 us of 40 for each message,
and a tenth of the throughput.)

**Whether the process is there** is asked by a message for the queue of its lease, when its other
queue refuses messages (``refusals``): both are on one node, and the lease's is never full. (Where
a policy or setting places queues, newer brokers are told to place it there. The others don't need
the answer.) Nobody looks at the question. The next connection cuts its way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pamqp.base
import pamqp.commands

from .._settings.settings import Settings

# Seconds for which the bindings of a lost connection's groups stay without a next connection. To
# delete them before those are bound anew holds up binds (with 5,000 groups by half a second, with
# 20,000 by one or two), though no confirm.
LEASE = 20.0


_KEY_OF_NO_MESSAGE = "lease"


def direct_routing_key(id_: str) -> str:
    """Return the key, in the groups exchange, of messages for the channels of a ``LoopLayer``.

    No group has it: a group's name can't hold "!".
    """
    return f"{id_}!"


def groups_probe_key(id_: str) -> str:
    """Return the key, in the groups exchange, of what comes to it by the way of its groups."""
    return f"{id_}!groups"


def alive_key(id_: str) -> str:
    """Return the key, in the groups exchange, by which a process is asked whether it is there."""
    return f"{id_}!alive"


class Declarations:
    """Names and methods for the connection ``number`` of the ``LoopLayer`` whose id is ``id_``."""

    def __init__(
        self, id_: str, number: int, settings: Settings, server_version: tuple[int, ...] = ()
    ) -> None:
        self._settings = settings
        self._server_version = server_version
        self._direct_key = direct_routing_key(id_)
        self._probe_key = groups_probe_key(id_)
        self._alive_key = alive_key(id_)
        name = f"{id_}.{number}"
        self.queue = id_ if number == 1 else name
        self.direct_exchange = name
        self.own_groups_exchange = f"{name}.groups"  # which is bound to everybody's
        self._members_exchange = f"{name}.members"
        self.lease_queue = self._lease_exchange = f"{name}.lease"
        self.has_lease = True  # Set it to False to do without.

    def methods(self) -> list[pamqp.base.Frame]:
        """All but what makes its channels reachable; to be called in this order.

        The queue first: if the broker refuses it, there is no exchange yet. (One that was never
        bound stays for good, hence ``undo``. A connection cut in the very moment between its
        declaration and its binding leaves one.) The lease last: what limits leave is for the rest.
        """
        commands = pamqp.commands
        queue, direct = self.queue, self.direct_exchange
        groups, members = self.own_groups_exchange, self._members_exchange
        return [
            commands.Queue.Declare(queue=queue, exclusive=True, arguments=self._queue_arguments()),
            _private(direct, "direct", its_own_alternate=True),
            commands.Queue.Bind(queue=queue, exchange=direct, routing_key=self._direct_key),
            _private(members, "fanout"),
            commands.Queue.Bind(queue=queue, exchange=members),
            _private(groups, "fanout"),
            commands.Exchange.Bind(destination=members, source=groups),
            *(self._lease_methods() if self.has_lease else []),
            self.bind_group(self._probe_key),
            *self._ways_to_lease(commands.Exchange.Bind),
        ]

    def _lease_methods(self) -> list[pamqp.base.Frame]:
        commands = pamqp.commands
        lease = self._lease_exchange
        sources = (self.own_groups_exchange, self._members_exchange, self.direct_exchange)
        return [
            commands.Queue.Declare(
                queue=self.lease_queue,
                durable=True,
                arguments=self._lease_arguments(),
            ),
            _private(lease, "direct", its_own_alternate=True),
            commands.Queue.Bind(
                queue=self.lease_queue, exchange=lease, routing_key=self._alive_key
            ),
            *(
                commands.Exchange.Bind(
                    destination=lease, source=source, routing_key=_KEY_OF_NO_MESSAGE
                )
                for source in sources
            ),
        ]

    def is_for_lease(self, method: pamqp.base.Frame) -> bool:
        """Whether a method is for the lease only, so all else works without it."""
        names = (getattr(method, name, "") for name in ("queue", "exchange", "destination"))
        return self.lease_queue in names

    def undo(self) -> list[pamqp.base.Frame]:
        """Delete what ``methods`` has made as far as it came, if the broker refused the rest."""
        commands = pamqp.commands
        names = (
            *(self.direct_exchange, self._members_exchange),
            *(self._lease_exchange, self.own_groups_exchange),
        )
        return [
            commands.Queue.Delete(queue=self.lease_queue),
            *(commands.Exchange.Delete(exchange=name) for name in names),
        ]

    def _queue_arguments(self) -> dict[str, Any]:
        # No others: newer brokers refuse some, and with Khepri binding arguments break routing.
        # x-overflow also without a limit of ours: a policy may set one, and RabbitMQ would drop
        # the oldest messages then, which were confirmed, without a word to anybody.
        arguments: dict[str, Any] = {"x-queue-type": "classic", "x-overflow": "reject-publish"}
        if self._settings.remote_capacity is not None:
            arguments["x-max-length"] = self._settings.remote_capacity
        if self._settings.remote_capacity_bytes is not None:
            arguments["x-max-length-bytes"] = self._settings.remote_capacity_bytes
        if self._settings.expiry is not None:
            arguments["x-message-ttl"] = round(self._settings.expiry * 1000)
        return arguments

    def _lease_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "x-queue-type": "classic",
            "x-expires": round(LEASE * 1000),
        }
        if self._server_version >= (4,):  # Older ones refuse it.
            arguments["x-queue-leader-locator"] = "client-local"
        return arguments

    def bind_channels(self) -> pamqp.base.Frame:
        """From now on messages for the channels of this id come."""
        return self._way(pamqp.commands.Exchange.Bind, self.direct_exchange, self._direct_key)

    def cut(self) -> list[pamqp.base.Frame]:
        """Nothing comes to its queue any more; by another connection, no error if it is gone."""
        unbind = pamqp.commands.Exchange.Unbind
        return [
            self._way(unbind, self.direct_exchange, self._direct_key),
            unbind(destination=self._members_exchange, source=self.own_groups_exchange),
            *self._ways_to_lease(unbind),
        ]

    def _ways_to_lease(self, method: Callable[..., pamqp.base.Frame]) -> list[pamqp.base.Frame]:
        if not self.has_lease:
            return []
        return [self._way(method, self._lease_exchange, self._alive_key)]

    def bind_group(self, group: str) -> pamqp.base.Frame:
        return self._way(pamqp.commands.Exchange.Bind, self.own_groups_exchange, group)

    def unbind_group(self, group: str) -> pamqp.base.Frame:
        return self._way(pamqp.commands.Exchange.Unbind, self.own_groups_exchange, group)

    def _way(
        self, method: Callable[..., pamqp.base.Frame], destination: str, key: str
    ) -> pamqp.base.Frame:
        """Bind or unbind one of our exchanges, to or from everybody's."""
        source = self._settings.groups_exchange
        return method(destination=destination, source=source, routing_key=key)

    def hold_lease(self) -> list[pamqp.base.Frame]:
        """Consume the queue of the lease, so that it doesn't expire.

        Whoever deletes it all the same (a cluster's node that ends, if it is there) ends nothing
        else. Nobody looks at what comes, so it isn't acked. RabbitMQ answers a consume when it
        likes, so nothing but another one may be called after it.
        """
        if not self.has_lease:
            return []
        return [pamqp.commands.Basic.Consume(queue=self.lease_queue, no_ack=True)]

    def hold_groups(self, former: Declarations) -> list[pamqp.base.Frame]:
        """Have the groups of a former connection stay bound as long as our own lease lasts.

        Its exchange is declared first: to bind one that has gone would be an error.
        """
        if not (self.has_lease and former.has_lease):
            return []
        return [
            _private(former.own_groups_exchange, "fanout"),
            self._hold(pamqp.commands.Exchange.Bind, former),
        ]

    def release_groups(self, former: Declarations) -> list[pamqp.base.Frame]:
        """End what ``hold_groups`` began."""
        if not (self.has_lease and former.has_lease):
            return []
        return [self._hold(pamqp.commands.Exchange.Unbind, former)]

    def _hold(
        self, method: Callable[..., pamqp.base.Frame], former: Declarations
    ) -> pamqp.base.Frame:
        return method(destination=self._lease_exchange, source=former.own_groups_exchange)

    def delete_lease(self, *, nowait: bool = False) -> list[pamqp.base.Frame]:
        """Leave nothing behind; by any connection, no error if it is over.

        Not tried if there is none: to delete what one may not configure ends an AMQP channel.
        """
        if not self.has_lease:
            return []
        return [pamqp.commands.Queue.Delete(queue=self.lease_queue, nowait=nowait)]


def _private(
    exchange: str, exchange_type: str, *, its_own_alternate: bool = False
) -> pamqp.base.Frame:
    return pamqp.commands.Exchange.Declare(
        exchange=exchange,
        exchange_type=exchange_type,
        auto_delete=True,
        # Keeps a policy's alternate exchange away.
        arguments={"alternate-exchange": exchange} if its_own_alternate else None,
    )
