"""``LoopLayer``: the channel layer of one event loop, made of the parts that do the work.

::

    send, group_send --> Sender --> Publisher ~~~> RabbitMQ

    RabbitMQ ~~~> Subscriber --> Inbox --> Router --> receive
                 |    ^                      ^
                 |  Bindings <---------- Members <--- group_add, group_discard
                 v                           ^
               Peers ------------------------+ <----- group_members, group_count

The left half is ``_broker``, the right half ``_inbox``, and ``Peers`` is ``_peers``. None knows
another: this module joins them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import carehare

from ._broker.bindings import Bindings
from ._broker.connections import Connections
from ._broker.groups_exchange import GroupsExchange
from ._broker.normal_channels import NormalChannels
from ._broker.publisher import Publisher
from ._broker.request_link import RequestLink
from ._broker.sender import Sender
from ._broker.shared import Shared
from ._broker.subscriber import Subscriber
from ._broker.topology import REQUEST_EXPIRY
from ._broker.user_connection import UserConnection
from ._broker.watchdog import Watchdog
from ._hooks import HookFunctions, Hooks
from ._identity import ChannelNames, new_id, own_place
from ._inbox.culprits import Culprits
from ._inbox.hand_overs import HandedOver
from ._inbox.inbox import Inbox
from ._inbox.members import Members, Membership
from ._loop_lag import LoopLag
from ._peers.peers import Peers
from ._reporter import Reporter
from ._settings.settings import Settings
from .presence import GroupMembers
from .statistics import Counters, LoopLayerStatistics
from .status import ProcessStatus, Status

logger = logging.getLogger("channels_rabbitmq.messages")


class LoopLayer:
    """Everything of a layer that belongs to the running event loop, on which it must be made.

    Nothing connects before it is needed: sending opens the Publisher's connection; ``new_channel``,
    ``receive`` and ``group_add`` open the Subscriber's. No call but ``receive`` waits longer than
    ``operation_timeout`` for the broker. When the broker has been away for that long, no call waits
    (``outage`` has the rule). Cancelling a call harms no other.
    """

    def __init__(
        self,
        settings: Settings,
        capacity_of: Callable[[str], int],
        hook_functions: HookFunctions,
        shared: Shared,
        *,
        for_sync_code: bool,
    ) -> None:
        self._settings = settings
        self._for_sync_code = for_sync_code
        self.loop = asyncio.get_running_loop()
        self.id = new_id()
        self.place = own_place()
        self._since = time.time()
        self._lag = LoopLag(self.id)
        self._names = ChannelNames(self.id)
        self.counters = Counters()
        self.members = Members()
        culprits = Culprits(self.members)
        self._reporter = Reporter(logger, self.id, culprits.describe)
        self._inbox = Inbox(
            *(settings, self._names, self.members, self.counters, self._reporter, culprits),
            capacity_of,
        )
        self.router = self._inbox.router
        self.known_channels = self.router.known_channels
        self.bindings = Bindings(clock=self.loop.time)
        self._hooks = Hooks(hook_functions, self.id)
        self._make_connections(shared, capacity_of)
        self._sender = Sender(
            self.id,
            settings,
            self._names.prefix,
            self.publisher,
            self.subscriber,
            self.bindings,
            self.counters,
            self._reporter,
            shared,
            self.peers.processes.has_said_bye,
        )
        self._watchdog = Watchdog(
            self.subscriber,
            self._sender.probes,
            settings.watchdog_interval,
            delivered=lambda: self.counters.delivered,
            is_full=lambda: self.router.unacked >= settings.local_capacity,
        )
        self.is_closing = False  # or closed
        self.is_closed = False  # by close(), and nothing of it is left
        self._lag.start()

    def _make_connections(self, shared: Shared, capacity_of: Callable[[str], int]) -> None:
        settings = self._settings
        groups_exchange = GroupsExchange(settings.groups_exchange)
        self.publisher = Publisher(
            settings,
            self.counters,
            groups_exchange,
            id_=self.id,
            shared=shared,
            on_no_exchange=self._on_no_exchange,
        )
        link = RequestLink(
            self.publisher, settings.groups_exchange, self.counters, self._wait_subscriber_ready
        )
        self.peers = Peers(
            *(self.id, settings, self, link, self.counters, self._reporter),
            *(REQUEST_EXPIRY, self.place),
        )
        self.subscriber = Subscriber(
            self.id,
            settings,
            self.bindings,
            groups_exchange,
            shared=shared,
            requests=self.peers,
            on_delivery=self._inbox.on_delivery,
            on_consumer_lost=self.router.connection_lost,
            on_disconnect=self._hooks.on_disconnect.call,
            on_reconnect=self._hooks.on_reconnect.call,
        )
        # A program may cancel all tasks and let the loop go on: no receive() shall wait in vain.
        self.subscriber.supervisor.on_closed = self.router.close
        self._user_connection = UserConnection(settings, self.id, shared)
        self.normal_channels = NormalChannels(
            self.id,
            settings,
            self.publisher,
            groups_exchange,
            capacity_of=capacity_of,
            shared=shared,
            counters=self.counters,
            reporter=self._reporter,
        )
        receiver = self.normal_channels.receiver
        parts = (self.subscriber, self.publisher, self._user_connection, receiver)
        self.connections = Connections([part.supervisor for part in parts])

    def __repr__(self) -> str:
        return f"<LoopLayer {self.id}: {self.router!r} {self.bindings!r}>"

    def _deadline(self, timeout: float = math.inf) -> float:
        return self.loop.time() + min(timeout, self._settings.operation_timeout)

    async def _wait_subscriber_ready(self, deadline: float) -> None:
        self._start_subscriber()
        await self.subscriber.supervisor.wait_ready(deadline)

    def _start_subscriber(self) -> None:
        if not self.is_closing:
            self.subscriber.supervisor.start()
            self._watchdog.start()

    def _on_no_exchange(self) -> None:
        self.subscriber.supervisor.reconnect("the groups exchange was deleted")

    # Sending. (``send``, ``group_send`` and ``receive`` return the coroutine of the part that does
    # the work: one coroutine less for each message.)

    def send(self, channel: str, body: bytes) -> Coroutine[Any, Any, None]:
        """Send to one channel, of this or any other process."""
        is_local = self._names.is_local(channel)
        if is_local:
            # The broker returns the message as long as our own queue isn't there.
            self._start_subscriber()
        return self._sender.send(channel, body, is_local=is_local)

    def group_send(self, group: str, body: bytes) -> Coroutine[Any, Any, None]:
        """Send to all channels of a group, in all processes."""
        has_members = self.members.has_members(group)
        return self._sender.group_send(group, body, has_members=has_members)

    def send_normal(self, channel: str, body: bytes) -> Coroutine[Any, Any, None]:
        """Send to a channel whose receivers are in any process."""
        self._start_for_flush()
        return self.normal_channels.send(channel, body)

    def _start_for_flush(self) -> None:
        """Let other processes know of this one, which must take part in a ``flush``."""
        if self._settings.allow_flush:
            self._start_subscriber()

    # Groups

    async def group_add(self, group: str, channel: str, info: bytes | None) -> None:
        """Make a channel of any process a member; returns when the broker has confirmed."""
        if self._names.is_local(channel):
            await self.add(group, channel, info, self._deadline())
        else:
            await self.peers.add(group, channel, info, self._deadline())

    def add(
        self, group: str, channel: str, info: bytes | None, deadline: float
    ) -> Coroutine[Any, Any, None]:
        """Make a channel of this event loop a member, at once; the coroutine has it confirmed."""
        self._names.require_local(channel)
        self._start_subscriber()
        return self._confirm(self.members.add(group, channel), info, deadline)

    async def _confirm(self, membership: Membership, info: bytes | None, deadline: float) -> None:
        group = membership.group
        is_bound = False
        try:
            await self.subscriber.bind(group, deadline)
            while await self.peers.greeter.wait_greeted(deadline):
                # There may be another connection meanwhile.
                await self.subscriber.wait_bound(group, deadline)
            is_bound = True
        finally:
            if self.members.finish_add(membership, is_bound, info):
                self.subscriber.unbind(group)

    async def group_discard(self, group: str, channel: str) -> None:
        """Stop delivering a group to a channel of any process."""
        if self._names.is_local(channel):
            self.discard(group, channel)
        else:
            await self.peers.discard(group, channel, self._deadline())

    def discard(self, group: str, channel: str) -> None:
        """Stop delivering a group to a channel of this event loop."""
        self._names.require_local(channel)
        if self.members.discard(group, channel):
            self.subscriber.unbind(group)

    def confirmed(self, group: str) -> list[tuple[str, bytes | None]]:
        """Return the members of a group on this event loop, each with its packed info."""
        return self.members.confirmed(group)

    def count(self, group: str) -> int:
        """Return how many these are."""
        return self.members.count(group)

    async def group_members(self, group: str, timeout: float) -> GroupMembers:
        """Return the members of a group in all processes."""
        return await self.peers.group_members(group, self._deadline(timeout))

    async def group_count(self, group: str, timeout: float) -> int:
        """Return how many members a group has in all processes."""
        return await self.peers.group_count(group, self._deadline(timeout))

    async def group_add_normal(self, group: str, channel: str) -> None:
        """Make a normal channel a member: its queue gets the group's messages, too."""
        await self.normal_channels.queues.add_to_group(channel, group, self._deadline())

    async def group_discard_normal(self, group: str, channel: str) -> None:
        """End what ``group_add_normal`` began, in any process."""
        await self.normal_channels.queues.discard_from_group(channel, group, self._deadline())

    # Receiving

    async def new_channel(self, prefix: str) -> str:
        """Return a name that was never used before."""
        self._start_subscriber()
        return self._names.new(prefix)

    def is_local(self, channel: str) -> bool:
        """Whether a channel was made here."""
        return self._names.is_local(channel)

    def receive_nowait(self, channel: str) -> dict[str, Any] | None:
        """Return the next message of a channel of this event loop; None if there is none now."""
        return self.router.receive_nowait(channel)

    def receive(self, channel: str) -> Coroutine[Any, Any, dict[str, Any]]:
        """Return the next message of a channel of this event loop, or change nothing."""
        if channel not in self.known_channels:
            self._prepare_to_receive(channel)
        return self.router.receive(channel)

    def receive_normal(self, channel: str) -> Coroutine[Any, Any, dict[str, Any]]:
        """Return the next message of a normal channel, or change nothing."""
        self._start_for_flush()
        return self.normal_channels.receiver.receive(channel)

    def hand_over(self, channel: str) -> Coroutine[Any, Any, HandedOver]:
        """As ``receive``, for a receiver on another event loop: see ``HandOvers``."""
        self._prepare_to_receive(channel)
        return self.router.hand_overs.hand_over(channel)

    def _prepare_to_receive(self, channel: str) -> None:
        self._names.require_local(channel)
        self._start_subscriber()

    def accept(self, handed_over: HandedOver) -> bool:
        """The receiver has the message."""
        self.router.hand_overs.accept(handed_over)
        return True

    def requeue(self, handed_over: HandedOver) -> None:
        """The receiver won't have the message."""
        self._inbox.requeue(handed_over)

    async def flush(self) -> None:
        """Empty everything: see ``RabbitmqChannelLayer.flush``."""
        deadline = self._deadline()
        await self.peers.flush(deadline)
        await self.flush_here(deadline)

    def flush_here(self, deadline: float) -> Coroutine[Any, Any, None]:
        """Empty what this event loop has: its channels, groups, and the queues that it used.

        Raises ValueError at once if the option doesn't allow it, and BrokerUnavailable if RabbitMQ
        doesn't do its part by ``deadline`` (loop time).
        """
        if not self._settings.allow_flush:
            raise ValueError("its option allow_flush isn't True")
        return self._flush_here(deadline)

    async def _flush_here(self, deadline: float) -> None:
        for group in self.members.clear():
            self.subscriber.unbind(group)
        await self.subscriber.purge(deadline)
        self.router.flush()
        await self.normal_channels.queues.purge_all(deadline)

    # For operators

    def statistics(self) -> LoopLayerStatistics:
        """Tell what has happened and how it is. From any thread; see ``statistics``."""
        router = self.router
        return LoopLayerStatistics(
            id=self.id,
            **self.place._asdict(),
            since=self._since,
            for_sync_code=self._for_sync_code,
            publisher=self.publisher.supervisor.statistics(),
            subscriber=self.subscriber.supervisor.statistics(),
            carehare_connection=self._user_connection.supervisor.statistics(),
            normal_channels=self.normal_channels.receiver.supervisor.statistics(),
            counters=replace(self.counters),
            is_blocked=self.publisher.is_blocked,
            unconfirmed=self.publisher.unconfirmed,
            highest_age=self._inbox.ages.newest(self.loop.time()),
            loop_lag=self._lag.newest(),
            loop_late=self._lag.overdue(),
            buffered=router.buffered,
            in_hand_over=len(router.hand_overs),
            channels=router.channels,
            receivers=router.receivers + self.normal_channels.receiver.receivers,
            stalled_channels=router.stalled_channels,
            unacked=router.unacked,
            local_capacity=self._settings.local_capacity,
            early_acked_bytes=router.early_acked_bytes,
            groups=self.bindings.statistics(),
            processes=self.peers.processes.statistics(),
        )

    async def status(self, timeout: float) -> Status:
        """Return how all processes are."""
        return await self.peers.status(self._deadline(timeout))

    def own_status(self) -> ProcessStatus:
        """Tell how this event loop is. On its own thread only."""
        return ProcessStatus(self.statistics(), *self._inbox.worst_channel())

    # The user's connection, and the end

    async def user_connection(self) -> carehare.Connection:
        """Return an open connection for the user's own purposes."""
        return await self._user_connection.wait_ready(self._deadline())

    @property
    def is_open(self) -> bool:
        """Whether anything of it runs on its event loop, or is to be closed."""
        return self.connections.are_open

    async def connect(self, fail_fast: bool) -> None:
        """Connect what sends and what receives: see ``RabbitmqChannelLayer.connect``."""
        self._start_subscriber()
        supervisors = [self.subscriber.supervisor, self.publisher.supervisor]
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
        self.connections.shut_down_if_stopped(seconds)

    async def close(self) -> None:
        """End everything: see ``RabbitmqChannelLayer.close``."""
        self.router.close()
        self.normal_channels.receiver.close()
        await self._end()
        self.is_closed = True

    async def close_at_exit(self, *, cancel_calls: bool) -> None:
        """Like ``close``, for the end of the process or of the loop.

        Calls that wait get no exception, which would only be printed. On a running loop they are
        left waiting. With ``cancel_calls``, for a loop that won't run again, they are cancelled.
        """
        receiver = self.normal_channels.receiver
        self.subscriber.supervisor.on_closed = receiver.supervisor.on_closed = lambda: None
        if cancel_calls:
            self.router.cancel_receivers()
            receiver.cancel_receivers()
            self.connections.cancel_calls(cancels=True)
            self._sender.direct_sender.cancel_calls()
            self.router.close()
        await self._end()
        self.connections.cancel_calls(cancels=False)  # Later callers are told.

    async def _end(self) -> None:
        self.is_closing = True
        self._lag.stop()
        self._inbox.close()
        # All are closing before anything is awaited: so a cancelled close() still ends all.
        self.subscriber.close()
        self.publisher.supervisor.close()
        self._user_connection.supervisor.close()
        self.normal_channels.receiver.supervisor.close()
        self._watchdog.close()
        self._hooks.close()
        self.peers.close()
        await self.peers.wait_closed()
        await self._watchdog.wait_closed()
        for supervisor in self.connections.supervisors:
            await supervisor.wait_closed()
        await self._hooks.wait_closed()
        await asyncio.sleep(0)  # lets the calls that end now say so
        self._reporter.close()
