"""``Topology``: what one connection of a ``Subscriber`` declares on the broker.

Each connection has queues and exchanges of its own. An exclusive queue stays locked until RabbitMQ
has noticed that its connection is dead, which takes almost three heartbeats after a half-open
connection. So the next connection doesn't ask for that queue. (A declare during its deletion can
even end in ``541 INTERNAL_ERROR``, which closes the connection.) For the id ``crq.x`` and its
connection number 2::

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

          |  "!all", "crq.x!requests"
          +--------------------> queue crq.x.2.requests (exclusive)

**Messages for channels** come through an exchange of their own. If the queue were bound for them
directly, the dead queue of the former connection would go on taking them until it is full. Then
its ``reject-publish`` would have RabbitMQ nack messages that the new queue took. A locked queue
can't be unbound, but the former exchange can. So the channels of this id are reachable again within
0.1 s. RabbitMQ deletes the former exchange when its lease ends.
(When this package deleted it while RabbitMQ deleted its queue, after a clean disconnect, RabbitMQ
nacked some messages and logged crashes: measured on 3.10 and 4.0.) The next connection also unbinds
what leads to the former queue for groups.

**Groups** are bound to another exchange, because of what the end of a queue costs. RabbitMQ deletes
a queue together with its bindings, and only then stops routing to it. Meanwhile it confirms what it
routes there, and drops it. With 5,000 groups bound to the queue itself, 11 to 14 % of 500 confirmed
messages a second were lost when its connection was closed by force every 2.4 seconds, and confirms
were held up by 0.3 to 0.45 s. (Measured on 3.10 and 4.0. A plain auto-delete exchange, or one that
goes with a second exclusive queue, is deleted in the same moment.) Now the queue has two bindings
whatever the number of groups, and only messages under way are lost: 0.05 to 0.09 %. All groups
share one path to the queue, so one message of the watchdog, by a key of its own, tests it for all.
(The exchange in between, ``.members``, lets the next connection unbind that path.)

**The lease** deletes the groups' bindings later. The groups' exchange is deleted with the lease's
exchange, which is deleted with the lease's queue, which expires ``LEASE`` seconds after its
consumer has gone. No message but a question (see below) is routed to that queue. It can't be
exclusive, or it would be deleted at once, so it has to be durable: newer brokers may refuse queues
that are neither. If it is deleted early, only this protection is lost.

How long it takes to bind the groups anew depends on how many there are. So the next connection
binds the former connection's groups' exchange to its own lease's exchange until all are bound. As
long as that binding exists, RabbitMQ deletes neither the exchange nor its bindings.

The lease is optional. If RabbitMQ refuses it (a limit of queues or exchanges, a permission), the
groups' bindings are deleted with the queue, which costs some messages when a connection is lost.

**Alternate exchanges**, which an operator's policy may give to exchanges, get what an exchange
routes to no queue. The lease's exchange routes no other message, and the one for channels routes
none once its queue is deleted. So both name themselves as their alternate exchange: RabbitMQ
doesn't route by an exchange twice. (Otherwise, with a policy for all exchanges, a catch-all queue
got messages it mustn't, and once it was full, each message was nacked.) As long as a lease lasts,
messages for the channels of its process count as routed, to no queue. So they are returned also if
the groups exchange has an alternate exchange (but for the moment between the unbinding by the next
connection and its own binding).

**Importing definitions** that were exported while a process was connected declares all of this but
the exclusive queue. An auto-delete exchange is deleted with the last binding of which it is the
source. So each of ours has a binding that ends with the lease: those for channels and for members
are bound to the lease's exchange only for this reason. (The former by a key that no message has,
hence its type, direct. When it was a fanout exchange, routing to nowhere took RabbitMQ 3.10 5 us of
40 for each message, and a tenth of the throughput.)

**Requests** of other processes (``_peers``) have a queue of their own, so that a full queue of
messages neither delays nor refuses an answer. (In the queue of messages one stuck process cost each
question 1,000 ms; with a queue of its own 1 to 2 ms.) It is bound directly: it drops the oldest
instead of refusing, so the dead queue of a former connection has nobody's request nacked. What
nobody takes within ``REQUEST_EXPIRY`` isn't waited for any more.

**Whether a process is there** is asked by a message for the queue of its lease, when its other
queue refuses messages (``refusals``). Both are on one node, and the lease's queue is never full,
since its consumer drops what it gets. (Policies or settings may place queues on nodes; newer
brokers are told to place this one beside the other. Older ones don't need the answer.) The next
connection unbinds this path, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._amqp.methods import Basic, Exchange, Method, Queue
from .._identity import TO_ALL, to_process
from .._settings.settings import Settings

# Seconds for which the bindings of a lost connection's groups stay without a next connection. To
# delete them before the groups are bound anew delays those binds (with 5,000 groups by half a
# second, with 20,000 by one or two), though no confirm.
LEASE = 20.0

# Of the queue of requests: seconds, requests, bytes; and how many are sent to it before an ack.
REQUEST_EXPIRY = 5.0
MOST_REQUESTS = 1000
MOST_REQUEST_BYTES = 32 * 1024 * 1024
REQUESTS_PREFETCH = 100

_KEY_OF_NO_MESSAGE = "lease"


def direct_routing_key(id_: str) -> str:
    """Return the key, in the groups exchange, of messages for the channels of a ``LoopLayer``.

    It is no group's key: a group's name can't hold "!".
    """
    return f"{id_}!"


def groups_probe_key(id_: str) -> str:
    """Return the key, in the groups exchange, of the watchdog's messages by the path of groups."""
    return f"{id_}!groups"


def alive_key(id_: str) -> str:
    """Return the key, in the groups exchange, by which a process is asked whether it is there."""
    return f"{id_}!alive"


def queue_arguments(settings: Settings, capacity: int | None) -> dict[str, Any]:
    """Return the arguments of a queue for at most ``capacity`` messages; None: no limit."""
    # No others: newer brokers refuse some, and with Khepri binding arguments break routing.
    # x-overflow also without a limit of ours: a policy may set one, and then RabbitMQ would
    # silently drop the oldest messages, which were confirmed.
    arguments: dict[str, Any] = {"x-queue-type": "classic", "x-overflow": "reject-publish"}
    if capacity is not None:
        arguments["x-max-length"] = capacity
    if settings.remote_capacity_bytes is not None:
        arguments["x-max-length-bytes"] = settings.remote_capacity_bytes
    if settings.expiry is not None:
        arguments["x-message-ttl"] = round(settings.expiry * 1000)
    return arguments


class Topology:
    """Names and commands for the connection ``number`` of the ``LoopLayer`` whose id is ``id_``."""

    def __init__(
        self, id_: str, number: int, settings: Settings, server_version: tuple[int, ...] = ()
    ) -> None:
        self._settings = settings
        self._server_version = server_version
        self._direct_key = direct_routing_key(id_)
        self._probe_key = groups_probe_key(id_)
        self._alive_key = alive_key(id_)
        self._request_keys = (TO_ALL, to_process(id_))
        name = f"{id_}.{number}"
        self.queue = id_ if number == 1 else name
        self.requests_queue = f"{name}.requests"
        self.direct_exchange = name
        self.own_groups_exchange = f"{name}.groups"  # which is bound to everybody's
        self._members_exchange = f"{name}.members"
        self.lease_queue = self._lease_exchange = f"{name}.lease"
        self.has_lease = True  # Set it to False to do without.

    def declare_commands(self) -> list[Method]:
        """Declare everything but the binding that makes its channels reachable, in this order.

        The queue is first: if RabbitMQ refuses it, no exchange exists yet. (RabbitMQ never deletes
        an auto-delete exchange that was never bound, hence ``delete_commands``. A connection lost
        between such a declaration and its binding leaves one behind.) The lease is last: the room
        that limits leave is for the rest.
        """
        queue, direct = self.queue, self.direct_exchange
        groups, members = self.own_groups_exchange, self._members_exchange
        arguments = queue_arguments(self._settings, self._settings.remote_capacity)
        return [
            Queue.Declare(queue=queue, exclusive=True, arguments=arguments),
            _private(direct, "direct", its_own_alternate=True),
            Queue.Bind(queue=queue, exchange=direct, routing_key=self._direct_key),
            _private(members, "fanout"),
            Queue.Bind(queue=queue, exchange=members),
            _private(groups, "fanout"),
            Exchange.Bind(destination=members, source=groups),
            *self._requests_commands(),
            *self._if_lease(*self._lease_commands()),
            self.bind_group(self._probe_key),
            *self._if_lease(self._bind_or_unbind_lease(Exchange.Bind)),
        ]

    def _requests_commands(self) -> list[Method]:
        queue, source = self.requests_queue, self._settings.groups_exchange
        arguments: dict[str, Any] = {
            "x-queue-type": "classic",
            "x-message-ttl": round(REQUEST_EXPIRY * 1000),
            "x-max-length": MOST_REQUESTS,
            "x-max-length-bytes": MOST_REQUEST_BYTES,
            "x-overflow": "drop-head",
        }
        return [
            Queue.Declare(queue=queue, exclusive=True, arguments=arguments),
            *(
                Queue.Bind(queue=queue, exchange=source, routing_key=key)
                for key in self._request_keys
            ),
        ]

    def _lease_commands(self) -> list[Method]:
        queue, lease = self.lease_queue, self._lease_exchange
        sources = (self.own_groups_exchange, self._members_exchange, self.direct_exchange)
        return [
            Queue.Declare(queue=queue, durable=True, arguments=self._lease_arguments()),
            _private(lease, "direct", its_own_alternate=True),
            Queue.Bind(queue=queue, exchange=lease, routing_key=self._alive_key),
            *(
                Exchange.Bind(destination=lease, source=source, routing_key=_KEY_OF_NO_MESSAGE)
                for source in sources
            ),
        ]

    def is_for_lease(self, command: Method) -> bool:
        """Whether a command is for the lease only, so that all else works without it."""
        names = (getattr(command, name, "") for name in ("queue", "exchange", "destination"))
        return self.lease_queue in names

    def delete_commands(self) -> list[Method]:
        """Delete what RabbitMQ has declared before it refused one of ``declare_commands``."""
        names = (
            *(self.direct_exchange, self._members_exchange),
            *(self._lease_exchange, self.own_groups_exchange),
        )
        return [
            Queue.Delete(queue=self.lease_queue),
            *(Exchange.Delete(exchange=name) for name in names),
        ]

    def _lease_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"x-queue-type": "classic", "x-expires": round(LEASE * 1000)}
        if self._server_version >= (4,):  # Older ones refuse it.
            arguments["x-queue-leader-locator"] = "client-local"
        return arguments

    def bind_direct(self) -> Method:
        """Make the channels of this id reachable."""
        return self._bind_or_unbind(Exchange.Bind, self.direct_exchange, self._direct_key)

    def unbind_commands(self) -> list[Method]:
        """Have nothing more routed to this queue; any connection may, no error if it is gone."""
        unbind = Exchange.Unbind
        return [
            self._bind_or_unbind(unbind, self.direct_exchange, self._direct_key),
            unbind(destination=self._members_exchange, source=self.own_groups_exchange),
            *self._if_lease(self._bind_or_unbind_lease(unbind)),
        ]

    def _bind_or_unbind_lease(self, command: Callable[..., Method]) -> Method:
        return self._bind_or_unbind(command, self._lease_exchange, self._alive_key)

    def bind_group(self, group: str) -> Method:
        return self._bind_or_unbind(Exchange.Bind, self.own_groups_exchange, group)

    def unbind_group(self, group: str) -> Method:
        return self._bind_or_unbind(Exchange.Unbind, self.own_groups_exchange, group)

    def _bind_or_unbind(self, command: Callable[..., Method], destination: str, key: str) -> Method:
        """Bind one of our exchanges to the groups exchange, or unbind it."""
        source = self._settings.groups_exchange
        return command(destination=destination, source=source, routing_key=key)

    def consume_lease(self) -> list[Method]:
        """Consume the queue of the lease, so that it doesn't expire.

        If RabbitMQ cancels this consumer, because the queue was deleted or its node stopped, the
        connection goes on. Nothing looks at what arrives, so it isn't acked. RabbitMQ may answer a
        consume late, so only another consume may be called after it.
        """
        return self._if_lease(Basic.Consume(queue=self.lease_queue, no_ack=True))

    def keep_groups(self, former: Topology) -> list[Method]:
        """Keep a former connection's groups bound as long as our own lease lasts.

        Its exchange is declared first: to bind one that is gone would be an error.
        """
        return self._if_lease(
            _private(former.own_groups_exchange, "fanout"),
            self._keep(Exchange.Bind, former),
            former=former,
        )

    def release_groups(self, former: Topology) -> list[Method]:
        """End what ``keep_groups`` began."""
        return self._if_lease(self._keep(Exchange.Unbind, former), former=former)

    def _keep(self, command: Callable[..., Method], former: Topology) -> Method:
        return command(destination=self._lease_exchange, source=former.own_groups_exchange)

    def _if_lease(self, *commands: Method, former: Topology | None = None) -> list[Method]:
        """Return the commands, or none if there is no lease, or ``former`` has none."""
        has_lease = self.has_lease and (former is None or former.has_lease)
        return list(commands) if has_lease else []

    def delete_lease(self, *, nowait: bool = False) -> list[Method]:
        """Leave nothing behind; any connection may, no error if the lease is over.

        Without a lease there is no command: to delete what the user may not configure would close
        the AMQP channel.
        """
        return self._if_lease(Queue.Delete(queue=self.lease_queue, nowait=nowait))


def _private(exchange: str, exchange_type: str, *, its_own_alternate: bool = False) -> Method:
    return Exchange.Declare(
        exchange=exchange,
        exchange_type=exchange_type,
        auto_delete=True,
        # Keeps a policy's alternate exchange away.
        arguments={"alternate-exchange": exchange} if its_own_alternate else None,
    )
