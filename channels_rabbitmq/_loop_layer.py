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
import contextvars
import itertools
import logging
import math
import os
import re
import secrets
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from time import time
from typing import Any

import carehare
from channels.exceptions import ChannelFull

from ._amqp.connection import Connection
from ._amqp.consuming import ConsumerChannel
from ._amqp.publishing import CONFIRMED, Outcome, Route
from ._broker.bindings import Bindings
from ._broker.direct_sender import DirectSender
from ._broker.groups_exchange import GroupsExchange
from ._broker.outage import KnownOutage
from ._broker.publisher import Publisher
from ._broker.receivers import Receivers
from ._broker.refusals import Refusals
from ._broker.subscriber import Subscriber
from ._broker.supervisor import Supervisor
from ._broker.topology import direct_routing_key, groups_probe_key
from ._broker.watchdog import Watchdog
from ._carehare.connection import CarehareConnection
from ._codec import MalformedBody, MessageCodec
from ._hooks import Hook, HookFunctions
from ._inbox.ages import Ages
from ._inbox.culprits import Culprits
from ._inbox.members import Members
from ._inbox.router import TICK_INTERVAL, HandedOver, Router
from ._reporter import Reporter
from ._settings.settings import Settings
from .exceptions import BrokerUnavailable
from .statistics import Counters, GroupStatistics, LoopLayerStatistics

logger = logging.getLogger("channels_rabbitmq.messages")

_ID_PREFIX = "crq."
_VERSION_4_ID = re.compile("channels_[A-Za-z]{12}")  # of channels_rabbitmq 4.x
_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_ID_LENGTH = 16
_RANDOM_LENGTH = 12
_LONGEST_NAME = 99
_LONGEST_HOST = 255  # characters that are shown
# Seconds by which a tick is late if something has held up the event loop.
_STANDSTILL = 0.5
_MOST_ROUTES = 1000  # that are remembered
# Seconds that a message needs, at most, from its writing to its confirm
_TIME_TO_CONFIRM = 0.5


def new_id() -> str:
    """Return an id that nobody had before."""
    return _ID_PREFIX + _random_text(_ID_LENGTH)


def connection_name(role: str, id_: str) -> str:
    """Return what operators see in RabbitMQ's list of connections."""
    # A host's name need not be UTF-8; Python has lone surrogates for its bytes then.
    host = socket.gethostname()[:_LONGEST_HOST].encode(errors="backslashreplace").decode()
    return f"channels_rabbitmq {role} {id_} ({host}, pid {os.getpid()})"


def _random_text(length: int) -> str:
    # Not from `random`, which users seed: two processes would get the same names.
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


class UserConnection:
    """The connection behind ``carehare_connection``: for the user's own queues, nothing set up."""

    name = "carehare_connection"

    def __init__(self, settings: Settings, id_: str, known_outage: KnownOutage) -> None:
        self.supervisor = Supervisor(
            self,
            settings,
            id_=id_,
            connection_name=connection_name(self.name, id_),
            known_outage=known_outage,
        )

    async def wait_ready(self, deadline: float) -> carehare.Connection:
        """Return it once it is open: see ``Supervisor.wait_ready``."""
        await self.supervisor.wait_ready(deadline)
        return self._for_user

    async def set_up(self, connection: Connection) -> None:
        self._for_user = CarehareConnection(connection)

    def on_ready(self) -> None:
        pass

    def on_lost(self, reason: str) -> None:
        pass


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
        self._operation_timeout = settings.operation_timeout
        self.loop = asyncio.get_running_loop()
        self.id = new_id()
        self._prefix = self.id + "!"  # of the names of its channels
        self.counters = Counters()
        self._codec = settings.codec
        self._members = Members()
        self._reporter = Reporter(logger, self.id, Culprits(self._members).describe)
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
        # Without calls between: this is the path of each message.
        self.receive_nowait = self._router.receive_nowait
        self.has_channel = self._router.has_channel
        self.add_waiter = self._router.add_waiter
        self.open_and_add_waiter = self._router.open_and_add_waiter
        self.add_waiter_again = self._router.add_waiter_again
        self.pop_reserved = self._router.pop_reserved
        self.discard_waiter = self._router.discard_waiter
        # RabbitMQ drops what is older than expiry; a second for the way.
        self._oldest = math.inf if settings.expiry is None else settings.expiry + 1.0
        self._tick_timer: asyncio.TimerHandle | None = None
        self._bindings = Bindings(clock=self.loop.time)
        self._on_disconnect = Hook("on_disconnect", hook_functions.on_disconnect, self.id)
        self._on_reconnect = Hook("on_reconnect", hook_functions.on_reconnect, self.id)
        groups_exchange = GroupsExchange(settings.groups_exchange)
        self._subscriber = Subscriber(
            self.id,
            settings,
            self._bindings,
            groups_exchange,
            connection_name=connection_name(Subscriber.name, self.id),
            known_outage=known_outage,
            on_delivery=self._accept_delivery,
            on_consumer_lost=self._router.connection_lost,
            on_disconnect=self._on_disconnect.call,
            on_reconnect=self._on_reconnect.call,
        )
        self._publisher = Publisher(
            settings,
            self.counters,
            groups_exchange,
            id_=self.id,
            connection_name=connection_name(Publisher.name, self.id),
            known_outage=known_outage,
            on_no_exchange=self._accept_no_exchange,
        )
        self._refusals = Refusals(
            self._publisher, self.counters, settings.groups_exchange, self.loop.time
        )
        self._direct_sender = DirectSender(
            self._publisher,
            settings.operation_timeout,
            Receivers(self._own_exchange_route(self.id), self.loop.time),
            self._refusals,
        )
        self._routes: dict[str, Route] = {}  # by id
        self._user_connection = UserConnection(settings, self.id, known_outage)
        # One that has reached the broker saves the others the rest of their back-off.
        self._supervisors = [
            self._subscriber.supervisor,
            self._publisher.supervisor,
            self._user_connection.supervisor,
        ]
        for supervisor in self._supervisors:
            supervisor.on_ready = self._hurry
        # Somebody may cancel all tasks and let the loop go on: nobody shall wait in vain then.
        self._subscriber.supervisor.on_end = self._router.close
        # By turns: the ways to our queue, of messages for channels and for groups
        self._probe_routes = itertools.cycle(
            Route(settings.groups_exchange, key, mandatory=True)
            for key in (direct_routing_key(self.id), groups_probe_key(self.id))
        )
        self._probe = Watchdog(
            self._subscriber.supervisor,
            settings.watchdog_interval,
            send=self._send_probe,
            ping=self._send_ping,
            request_answer=self._subscriber.request_answer,
            delivered=lambda: self.counters.delivered,
            is_full=lambda: self._router.unacked >= settings.local_capacity,
        )
        # Whatever max_message_size is.
        self._probe_body = MessageCodec(
            max_message_size=1024, symmetric_encryption_keys=settings.symmetric_encryption_keys
        ).encode_for_channel(self._prefix, {})
        self._probe_task: asyncio.Task[None] | None = None
        self._is_closed = False
        self.has_ended = False  # by close(), and nothing of it is left

    def __repr__(self) -> str:
        return f"<LoopLayer {self.id}: {self._router!r} {self._bindings!r}>"

    def _hurry(self) -> None:
        for supervisor in self._supervisors:
            supervisor.retry_now()

    def _deadline(self) -> float:
        return self.loop.time() + self._operation_timeout

    # Sending

    async def send(self, channel: str, body: bytes) -> None:
        """Send to one channel, of this or any other process."""
        deadline = self.loop.time() + self._operation_timeout
        after = None
        if channel.startswith(self._prefix):
            # The message could only come back as long as our own queue isn't there.
            self._start_subscriber()
            after = self._wait_for_own_queue(deadline)
        outcome = await self._direct_sender.send(self._route(channel), body, deadline, after)
        if outcome is CONFIRMED:
            return
        if outcome is Outcome.REFUSED:
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
        # The rest is for those behind it, whose time may be over as soon.
        rest = min(_TIME_TO_CONFIRM, self._operation_timeout / 2)
        return partial(supervisor.wait_ready, deadline - rest)

    def _route(self, channel: str) -> Route:
        id_ = channel.partition("!")[0]
        route = self._routes.get(id_)
        if route is None:
            if _VERSION_4_ID.fullmatch(id_):
                # Its queue has the name of its id, on the default exchange.
                route = Route("", id_, mandatory=True)
            else:
                route = self._own_exchange_route(id_)
            if len(self._routes) >= _MOST_ROUTES:
                self._routes.clear()  # of processes that are gone, most of them
            self._routes[id_] = route
        return route

    def _own_exchange_route(self, id_: str) -> Route:
        return Route(self._settings.groups_exchange, direct_routing_key(id_), mandatory=True)

    async def group_send(self, group: str, body: bytes) -> None:
        """Send to all channels of a group, in all processes."""
        deadline = self._deadline()
        after = None
        if self._members.has_members(group) and not (
            self._bindings.is_bound(group) and self._subscriber.supervisor.is_usable
        ):
            # After a reconnect; or the loop stood still, and there may be one in a moment.
            after = partial(self._wait_bound, group, deadline)
        outcome = await self._publisher.publish(
            body, Route(self._settings.groups_exchange, group, mandatory=False), deadline, after
        )
        if outcome is Outcome.REFUSED:
            self._reporter.report("group_nacked", group)
        elif outcome is Outcome.BLOCKED:
            self.counters.blocked_groups += 1
            self._reporter.report("blocked", group)
        elif outcome is Outcome.UNKNOWN:
            self._reporter.report("outcome_unknown", group)

    async def _wait_bound(self, group: str, deadline: float) -> None:
        """Wait for the binding of a group; not for ever, since others have members in it too."""
        try:
            await self._subscriber.wait_bound(group, deadline - self._operation_timeout / 2)
        except BrokerUnavailable as err:
            logger.debug("group_send(%r) without members of this process: %s", group, err)

    # Groups

    async def group_add(self, group: str, channel: str) -> None:
        """Make a channel of this event loop a member; returns when the broker has confirmed."""
        self._require_own(channel)
        self._start_subscriber()
        membership = self._members.join(group, channel)
        is_bound = False
        try:
            await self._subscriber.bind(group, self._deadline())
            is_bound = True
        finally:
            if self._members.settle(membership, is_bound):
                self._subscriber.unbind(group)

    def group_discard(self, group: str, channel: str) -> None:
        """Stop delivering a group to a channel of this event loop."""
        self._require_own(channel)
        if self._members.leave(group, channel):
            self._subscriber.unbind(group)

    # Receiving

    def new_channel(self, prefix: str) -> str:
        """Return a name that nobody had before."""
        self._start_subscriber()
        room = _LONGEST_NAME - len(self._prefix) - _RANDOM_LENGTH
        return f"{self._prefix}{prefix[:room]}{_random_text(_RANDOM_LENGTH)}"

    def prepare_to_receive(self, channel: str) -> None:
        """Make sure that messages can come; raise ValueError for a channel of others."""
        self._require_own(channel)
        self._start_subscriber()

    async def receive(self, channel: str) -> dict[str, Any]:
        """Return the next message of a channel of this event loop, or change nothing."""
        self.prepare_to_receive(channel)
        return await self._router.receive(channel)

    def owns(self, channel: str) -> bool:
        """Whether a channel was made here."""
        return channel.startswith(self._prefix)

    async def hand_over(self, channel: str) -> HandedOver:
        """As ``receive``, for a receiver on another event loop: see ``Router.hand_over``."""
        self.prepare_to_receive(channel)
        return await self._router.hand_over(channel)

    def accept(self, handed_over: HandedOver) -> None:
        """The receiver has the message."""
        self._router.accept(handed_over)

    def requeue(self, handed_over: HandedOver) -> None:
        """The receiver won't have the message."""
        self._router.requeue(handed_over)
        self._start_ticking()

    def _require_own(self, channel: str) -> None:
        if channel == self._prefix:  # The probe's.
            raise ValueError(f"The channel {channel} wasn't made by new_channel()")
        if not channel.startswith(self._prefix):
            raise ValueError(
                f"The channel {channel} belongs to another process or event loop: only the one "
                "that made it by new_channel() can receive from it, or add it to groups"
            )

    def _start_subscriber(self) -> None:
        if self._probe_task is None and not self._is_closed:
            self._subscriber.supervisor.start()
            if self._settings.watchdog_interval:
                # In a context of its own: the first caller's would live as long as the task.
                self._probe_task = contextvars.Context().run(
                    self.loop.create_task, self._probe.run(), name="channels_rabbitmq probe"
                )

    def _accept_delivery(
        self, body: bytes, tag: int, published: int, consumer: ConsumerChannel
    ) -> None:
        self.counters.delivered += 1
        try:
            envelope = self._codec.decode(body)
        except MalformedBody as err:
            self.counters.malformed += 1
            self._reporter.report("malformed", str(err))
            consumer.ack(tag)
            return
        channel = envelope.channel
        if channel is not None and not (
            self.has_channel(channel)
            or (
                channel.startswith(self._prefix)
                and len(self._prefix) < len(channel) <= _LONGEST_NAME
            )
        ):
            if channel != self._prefix:  # else it is our own probe
                self.counters.misrouted += 1
                self._reporter.report("misrouted", channel[:_LONGEST_NAME])
            consumer.ack(tag)
            return
        # One that can't be comes from a clock that differs from ours.
        age = time() - published / 1000 if published else 0.0
        self._router.deliver(envelope, tag, consumer, age if 0 < age < self._oldest else 0.0)
        self._start_ticking()

    def _start_ticking(self) -> None:
        if self._tick_timer is None:
            self._schedule_tick(self._router.next_tick_at())

    def _schedule_tick(self, at: float | None) -> None:
        self._tick_timer = None if at is None else self.loop.call_at(at, self._tick)

    def _tick(self) -> None:
        assert self._tick_timer is not None
        late_by = self.loop.time() - self._tick_timer.when()
        self._schedule_tick(self.loop.time() + TICK_INTERVAL)  # also if tick() should fail
        at = self._router.tick()
        self._tick_timer.cancel()
        self._schedule_tick(at)
        if late_by < _STANDSTILL:
            self._report_backlogs()

    def _report_backlogs(self) -> None:
        """Tell who is behind. (Not after a standstill of the loop: then everybody is.)"""
        for channel, messages in self._router.channels_behind():
            self._reporter.report_level("behind", channel, messages)
        if self._router.unacked >= self._settings.local_capacity:
            for channel, messages in self._router.fullest_channels():
                self._reporter.report_level("back-pressure", channel, messages)

    async def _send_probe(self) -> Outcome:
        route = next(self._probe_routes)
        outcome = await self._publisher.publish(self._probe_body, route, self._deadline())
        self._refusals.count(outcome, is_full=True)
        return outcome

    async def _send_ping(self) -> Outcome:
        return await self._publisher.publish(b"", self._publisher.ping_route, self._deadline())

    def _accept_no_exchange(self) -> None:
        self._subscriber.supervisor.give_up_connection("the groups exchange was deleted")

    # For operators

    def statistics(self, *, for_sync_code: bool) -> LoopLayerStatistics:
        """Tell what has happened and how it is. From any thread; see ``statistics``."""
        router = self._router
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
                wanted=self._bindings.required,
                bound=self._bindings.bound,
                lingering=self._bindings.lingering,
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

    async def close(self) -> None:
        """End everything: see ``RabbitmqChannelLayer.close``."""
        self._router.close()
        await self._end()
        self.has_ended = True

    def shut_down_if_stopped(self, seconds: float) -> None:
        """End the connections of an event loop that hasn't run for so long. From any thread.

        Nothing of the loop is touched. Should it run again, its connections are found to be lost.
        """
        for supervisor in self._supervisors:
            connection = supervisor.connection
            if connection is not None and connection.stood_still >= seconds:
                connection.shut_down()

    @property
    def is_open(self) -> bool:
        """Whether anything of it runs on its event loop, or is to be closed."""
        return not all(supervisor.has_stopped for supervisor in self._supervisors)

    async def leave(self, *, cancel_calls: bool) -> None:
        """As ``close``, at the end of the process or of the loop, when nobody is to be told.

        An exception would only be printed. Calls on an event loop that goes on running wait until
        the process ends around them; those on one that won't run again are cancelled.
        """
        self._subscriber.supervisor.on_end = lambda: None
        if cancel_calls:
            self._cancel_calls()
            self._router.close()
        await self._end()
        for supervisor in self._supervisors:
            supervisor.cancels_calls = False  # Who calls later is told.

    def _cancel_calls(self) -> None:
        self._router.cancel_receivers()
        for supervisor in self._supervisors:
            supervisor.cancels_calls = True
        self._direct_sender.cancel_calls()

    async def _end(self) -> None:
        self._is_closed = True
        if self._tick_timer is not None:
            self._tick_timer.cancel()
            self._tick_timer = None
        # All are told before anything is waited for: so a cancelled close() still ends all.
        self._subscriber.stop()
        self._publisher.supervisor.stop()
        self._user_connection.supervisor.stop()
        hooks = (self._on_disconnect, self._on_reconnect)
        for hook in hooks:
            hook.stop()
        if self._probe_task is not None:
            self._probe_task.cancel()
            await asyncio.wait([self._probe_task])
        for supervisor in self._supervisors:
            await supervisor.wait_stopped()
        for hook in hooks:
            await hook.wait_stopped()
        await asyncio.sleep(0)  # lets the calls that end now say so
        self._reporter.close()
