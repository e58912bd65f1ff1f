"""``LoopLayer``: the channel layer of one event loop, made of the parts that do the work.

::

    send, group_send --> codec --> Publisher ~~~> RabbitMQ

    RabbitMQ ~~~> Subscriber --> codec --> router --> receive
                      ^                      ^
                   bindings <----------- members <--- group_add, group_discard

Its channels' names begin with its id, by which other processes' messages find it. They are valid
as long as it lives, whatever becomes of its connections.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

import carehare
from channels.exceptions import ChannelFull

from ._amqp.publishing import CONFIRMED, Outcome, Route
from ._broker.bindings import Bindings
from ._broker.connections import Connections
from ._broker.direct_sender import DirectSender
from ._broker.groups_exchange import GroupsExchange
from ._broker.outage import KnownOutage
from ._broker.probes import Probes
from ._broker.publisher import Publisher
from ._broker.receivers import Receivers
from ._broker.refusals import Refusals
from ._broker.routes import Routes
from ._broker.subscriber import Subscriber
from ._broker.user_connection import UserConnection
from ._broker.watchdog import Watchdog
from ._hooks import Hook, HookFunctions
from ._identity import ChannelNames, new_id
from ._inbox.ages import Ages
from ._inbox.culprits import Culprits
from ._inbox.deliveries import Deliveries
from ._inbox.members import Members
from ._inbox.router import HandedOver, Router
from ._inbox.ticker import Ticker
from ._reporter import Reporter
from ._settings.settings import Settings
from .exceptions import BrokerUnavailable
from .statistics import Counters, GroupStatistics, LoopLayerStatistics

logger = logging.getLogger("channels_rabbitmq.messages")

# Seconds that a message needs, at most, from its writing to its confirm
_TIME_TO_CONFIRM = 0.5


class LoopLayer:
    """Everything of a layer that belongs to the running event loop, on which it must be made.

    Nothing connects before it is needed: sending opens the Publisher's connection, ``new_channel``,
    ``receive`` and ``group_add`` the Subscriber's. No call but ``receive`` waits longer than
    ``operation_timeout`` for the broker, nor for one that has been away for that long (``outage``
    has the rule). Cancelling a call harms no other.
    """

    def __init__(
        self,
        settings: Settings,
        capacity_of: Callable[[str], int],
        hook_functions: HookFunctions,
        known_outage: KnownOutage,
    ) -> None:
        self._settings = settings
        self.loop = asyncio.get_running_loop()
        self.id = new_id()
        self._names = ChannelNames(self.id)
        self.counters = Counters()
        self._members = Members()
        self._reporter = Reporter(logger, self.id, Culprits(self._members).describe)
        self._make_inbox(capacity_of)
        self._make_connections(hook_functions, known_outage)
        self._is_closed = False
        self.has_ended = False  # by close(), and nothing of it is left

    def _make_inbox(self, capacity_of: Callable[[str], int]) -> None:
        settings = self._settings
        self._ages = Ages(
            warn_above=math.inf if settings.expiry is None else settings.expiry / 2,
            report=lambda age, channel: self._reporter.report_level("late", channel, round(age)),
        )
        self._router = Router(
            members=self._members,
            local_capacity=settings.local_capacity,
            local_expiry=settings.local_expiry,
            capacity_of=capacity_of,
            counters=self.counters,
            ages=self._ages,
            report=self._reporter.report,
            clock=self.loop.time,
            create_future=self.loop.create_future,
            call_soon=self.loop.call_soon,
        )
        self.known_channels = self._router.known_channels
        self._ticker = Ticker(self._router, settings.local_capacity, self._reporter.report_level)
        self._deliveries = Deliveries(
            self._router,
            self._ticker,
            settings.codec,
            self._names,
            self.counters,
            expiry=settings.expiry,
            report=self._reporter.report,
        )

    def _make_connections(self, hook_functions: HookFunctions, known_outage: KnownOutage) -> None:
        settings, id_ = self._settings, self.id
        self._bindings = Bindings(clock=self.loop.time)
        self._hooks = (
            Hook("on_disconnect", hook_functions.on_disconnect, id_),
            Hook("on_reconnect", hook_functions.on_reconnect, id_),
        )
        groups_exchange = GroupsExchange(settings.groups_exchange)
        self._subscriber = Subscriber(
            id_,
            settings,
            self._bindings,
            groups_exchange,
            known_outage=known_outage,
            on_delivery=self._deliveries.on_delivery,
            on_consumer_lost=self._router.connection_lost,
            on_disconnect=self._hooks[0].call,
            on_reconnect=self._hooks[1].call,
        )
        # Somebody may cancel all tasks and let the loop go on: no receive() shall wait in vain.
        self._subscriber.supervisor.on_closed = self._router.close
        self._publisher = Publisher(
            settings,
            self.counters,
            groups_exchange,
            id_=id_,
            known_outage=known_outage,
            on_no_exchange=self._on_no_exchange,
        )
        self._user_connection = UserConnection(settings, id_, known_outage)
        self._connections = Connections(
            [part.supervisor for part in (self._subscriber, self._publisher, self._user_connection)]
        )
        self._make_senders()

    def _make_senders(self) -> None:
        settings = self._settings
        self._routes = Routes(settings.groups_exchange)
        refusals = Refusals(
            self._publisher, self.counters, settings.groups_exchange, self.loop.time
        )
        receivers = Receivers(self._routes.to_id(self.id), self.loop.time)
        self._direct_sender = DirectSender(
            self._publisher, settings.operation_timeout, receivers, refusals
        )
        probes = Probes(
            self.id, self._names.prefix, settings, self._publisher, refusals, self._routes
        )
        self._watchdog = Watchdog(
            self._subscriber.supervisor,
            settings.watchdog_interval,
            send=probes.send,
            ping=probes.ping,
            request_answer=self._subscriber.request_answer,
            delivered=lambda: self.counters.delivered,
            is_full=lambda: self._router.unacked >= settings.local_capacity,
        )

    def __repr__(self) -> str:
        return f"<LoopLayer {self.id}: {self._router!r} {self._bindings!r}>"

    def _deadline(self) -> float:
        return self.loop.time() + self._settings.operation_timeout

    def _start_subscriber(self) -> None:
        if not self._is_closed:
            self._subscriber.supervisor.start()
            self._watchdog.start()

    def _on_no_exchange(self) -> None:
        self._subscriber.supervisor.reconnect("the groups exchange was deleted")

    # Sending

    async def send(self, channel: str, body: bytes) -> None:
        """Send to one channel, of this or any other process."""
        deadline = self._deadline()
        after = None
        if self._names.is_local(channel):
            # The message could only come back as long as our own queue isn't there.
            self._start_subscriber()
            after = self._wait_for_own_queue(deadline)
        route = self._routes.to_channel(channel)
        outcome = await self._direct_sender.send(route, body, deadline, after)
        if outcome is CONFIRMED:
            return
        if outcome is Outcome.NACKED:
            raise ChannelFull(
                f"The queue of the process that serves {channel} is full: its consumers don't keep "
                "up (remote_capacity, remote_capacity_bytes)"
            )
        if outcome is Outcome.BLOCKED:
            raise ChannelFull(
                "RabbitMQ takes no messages: it is low on memory or disk space, or too slow"
            )
        if outcome is Outcome.RETURNED:
            self.counters.unreachable += 1
            self._reporter.report("unreachable", channel)
        elif outcome is Outcome.UNKNOWN:
            self._reporter.report("outcome_unknown", channel)

    def _wait_for_own_queue(self, deadline: float) -> Callable[[], Awaitable[object]] | None:
        """Return what to wait for before a message to a channel of ours is published, if at all."""
        supervisor = self._subscriber.supervisor
        if supervisor.is_usable:
            return None
        # The rest is for the calls behind it, whose time may be over as soon.
        rest = min(_TIME_TO_CONFIRM, self._settings.operation_timeout / 2)
        return partial(supervisor.wait_ready, deadline - rest)

    async def group_send(self, group: str, body: bytes) -> None:
        """Send to all channels of a group, in all processes."""
        deadline = self._deadline()
        after = None
        if self._members.has_members(group) and not (
            self._bindings.is_bound(group) and self._subscriber.supervisor.is_usable
        ):
            # After a reconnect; or the loop stood still, and there may be one in a moment.
            after = partial(self._wait_bound, group, deadline)
        route = Route(self._settings.groups_exchange, group, mandatory=False)
        outcome = await self._publisher.publish(body, route, deadline, after)
        if outcome is Outcome.NACKED:
            self._reporter.report("group_nacked", group)
        elif outcome is Outcome.BLOCKED:
            self.counters.blocked_groups += 1
            self._reporter.report("blocked", group)
        elif outcome is Outcome.UNKNOWN:
            self._reporter.report("outcome_unknown", group)

    async def _wait_bound(self, group: str, deadline: float) -> None:
        """Wait for the binding of a group; not for ever, since others have members in it too."""
        try:
            deadline -= self._settings.operation_timeout / 2
            await self._subscriber.wait_bound(group, deadline)
        except BrokerUnavailable as err:
            logger.debug("group_send(%r) without members of this process: %s", group, err)

    # Groups

    async def group_add(self, group: str, channel: str) -> None:
        """Make a channel of this event loop a member; returns when the broker has confirmed."""
        self._names.require_local(channel)
        self._start_subscriber()
        membership = self._members.join(group, channel)
        is_bound = False
        try:
            await self._subscriber.bind(group, self._deadline())
            is_bound = True
        finally:
            if self._members.settle(membership, is_bound):
                self._subscriber.unbind(group)

    async def group_discard(self, group: str, channel: str) -> None:
        """Stop delivering a group to a channel of this event loop."""
        self._names.require_local(channel)
        if self._members.leave(group, channel):
            self._subscriber.unbind(group)

    # Receiving

    async def new_channel(self, prefix: str) -> str:
        """Return a name that was never used before."""
        self._start_subscriber()
        return self._names.new(prefix)

    def is_local(self, channel: str) -> bool:
        """Whether a channel was made here."""
        return self._names.is_local(channel)

    def receive(self, channel: str) -> Coroutine[Any, Any, dict[str, Any]]:
        """Return the next message of a channel of this event loop, or change nothing."""
        if channel not in self.known_channels:
            self._prepare_to_receive(channel)
        return self._router.receive(channel)

    def hand_over(self, channel: str) -> Coroutine[Any, Any, HandedOver]:
        """As ``receive``, for a receiver on another event loop: see ``Router.hand_over``."""
        self._prepare_to_receive(channel)
        return self._router.hand_over(channel)

    def _prepare_to_receive(self, channel: str) -> None:
        self._names.require_local(channel)
        self._start_subscriber()

    def accept(self, handed_over: HandedOver) -> None:
        """The receiver has the message."""
        self._router.accept(handed_over)

    def requeue(self, handed_over: HandedOver) -> None:
        """The receiver won't have the message."""
        self._router.requeue(handed_over)
        self._ticker.start()

    # For operators

    def statistics(self, *, for_sync_code: bool) -> LoopLayerStatistics:
        """Tell what has happened and how it is. From any thread; see ``statistics``."""
        router, bindings = self._router, self._bindings
        return LoopLayerStatistics(
            id=self.id,
            for_sync_code=for_sync_code,
            publisher=self._publisher.supervisor.statistics(),
            subscriber=self._subscriber.supervisor.statistics(),
            carehare_connection=self._user_connection.supervisor.statistics(),
            counters=replace(self.counters),
            is_blocked=self._publisher.is_blocked,
            unconfirmed=self._publisher.unconfirmed,
            highest_age=self._ages.newest(self.loop.time()),
            buffered=router.waiting_messages,
            in_handoff=router.messages_in_handoff,
            channels=router.channels,
            receivers=router.receivers,
            stalled_channels=router.stalled_channels,
            unacked=router.unacked,
            local_capacity=self._settings.local_capacity,
            early_acked_bytes=router.early_acked_bytes,
            groups=GroupStatistics(
                wanted=bindings.required, bound=bindings.bound, lingering=bindings.lingering
            ),
        )

    # The user's connection, and the end

    async def user_connection(self) -> carehare.Connection:
        """Return an open connection for the user's own purposes."""
        return await self._user_connection.wait_ready(self._deadline())

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._is_closed

    @property
    def is_open(self) -> bool:
        """Whether anything of it runs on its event loop, or is to be closed."""
        return self._connections.are_open

    async def connect(self, fail_fast: bool) -> None:
        """Connect what sends and what receives: see ``RabbitmqChannelLayer.connect``."""
        self._start_subscriber()
        supervisors = [self._subscriber.supervisor, self._publisher.supervisor]
        for supervisor in supervisors:
            supervisor.start()
        deadline = self._deadline()
        for supervisor in supervisors:
            if fail_fast:
                await supervisor.wait_tried(deadline)
            else:
                await supervisor.wait_ready(deadline, patient=True)

    def shut_down_if_stopped(self, seconds: float) -> None:
        """End the connections of an event loop that hasn't run for so long. From any thread."""
        self._connections.shut_down_if_stopped(seconds)

    async def close(self) -> None:
        """End everything: see ``RabbitmqChannelLayer.close``."""
        self._router.close()
        await self._end()
        self.has_ended = True

    async def close_at_exit(self, *, cancel_calls: bool) -> None:
        """As ``close``, at the end of the process or of the loop, when no caller is to be told.

        An exception would only be printed. Calls on an event loop that goes on running wait until
        the process ends around them. With ``cancel_calls``, those on a loop that won't run again
        are cancelled.
        """
        self._subscriber.supervisor.on_closed = lambda: None
        if cancel_calls:
            self._router.cancel_receivers()
            self._connections.cancel_calls(cancels=True)
            self._direct_sender.cancel_calls()
            self._router.close()
        await self._end()
        self._connections.cancel_calls(cancels=False)  # Later callers are told.

    async def _end(self) -> None:
        self._is_closed = True
        self._ticker.stop()
        # All are stopped before anything is awaited: so a cancelled close() still ends all.
        self._subscriber.close()
        self._publisher.supervisor.close()
        self._user_connection.supervisor.close()
        self._watchdog.stop()
        for hook in self._hooks:
            hook.stop()
        await self._watchdog.wait_stopped()
        for supervisor in self._connections.supervisors:
            await supervisor.wait_closed()
        for hook in self._hooks:
            await hook.wait_stopped()
        await asyncio.sleep(0)  # lets the calls that end now say so
        self._reporter.close()
