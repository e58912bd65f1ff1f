"""The services of ``InMemoryChannelLayer``, in place of those that talk to RabbitMQ.

``core`` checks names and packs messages for both. See ``_loops.service`` for the interface.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any, NoReturn

from channels.exceptions import ChannelFull

from .._broker.host_function import with_imported_host
from .._codec import MalformedBody, unpack_info
from .._hooks import HookFunctions
from .._identity import own_place
from .._loops.background import is_of_async_to_sync
from .._loops.service import ChannelService, Service
from .._settings.settings import Settings
from ..exceptions import BrokerUnavailable
from ..presence import GroupMembers, Member
from ..statistics import (
    ConnectionStatistics,
    GroupStatistics,
    LoopLayerStatistics,
    ProcessStatistics,
)
from ..status import ProcessStatus, Status
from ._memory_broker import MemoryBroker, Owner, seconds


class MemoryServices:
    """The services of one layer: one for each event loop, and one for all sync code."""

    def __init__(
        self,
        process: object,
        broker: MemoryBroker,
        settings: Settings,
        capacity_of: Callable[[str], int],
    ) -> None:
        self.process = process
        self._broker = broker
        self._settings = settings
        self._capacity_of = capacity_of
        self._is_loaded = False

    def find(self) -> None:
        """Return None: to look for a service costs nothing that tests would notice."""

    def prepare(self) -> None:
        """Raise InvalidChannelLayerError for a dotted path that can't be imported."""
        if not self._is_loaded:
            _ = with_imported_host(self._settings).codec
            HookFunctions.load(self._settings)
            self._is_loaded = True

    def get_or_create(self) -> Service:
        """Return the service of the running event loop; raises as ``prepare``."""
        self.prepare()
        loop = asyncio.get_running_loop()
        if is_of_async_to_sync(loop):
            return self._service(self._broker.owner_of_sync_code())
        return self._service(self._broker.owner_of_loop(loop))

    def _service(self, owner: Owner) -> MemoryService:
        return MemoryService(self._broker, owner, self._settings, self._capacity_of)

    def owner(self, channel: str) -> ChannelService:
        """Return the service of a channel, whichever event loop has made it; else ValueError."""
        owner = self._broker.owner_of(channel)
        if owner is None:
            raise ValueError(
                f"The channel {channel} belongs to another process, to another layer, or to an "
                "event loop that has ended: only the one that made it by new_channel() can receive "
                "from it"
            )
        loop = owner.loop
        if loop is not None and not loop.is_running() and not owner.is_closed:
            raise ValueError(
                f"The channel {channel} belongs to an event loop of this process that isn't running"
            )
        return self._service(owner)

    def owner_or(self, service: Service, channel: str) -> ChannelService:
        """As ``owner``: there is no other process."""
        return self.owner(channel)

    def statistics(self) -> tuple[LoopLayerStatistics, ...]:
        """Return those of each event loop, in the order of their first calls."""
        return tuple(self._service(owner).statistics() for owner in self._broker.owners())


class MemoryService:
    """The ``Service`` of an owner of channels."""

    known_channels: Container[str] = ()

    def __init__(
        self,
        broker: MemoryBroker,
        owner: Owner,
        settings: Settings,
        capacity_of: Callable[[str], int],
    ) -> None:
        self._broker = broker
        self._owner = owner
        self._settings = settings
        self._capacity_of = capacity_of
        self._counters = owner.counters

    def _require_open(self) -> None:
        if self._owner.is_closed:
            raise BrokerUnavailable("The channel layer is closed")

    def is_local(self, channel: str) -> bool:
        return self._owner.names.is_local(channel)

    def receive_nowait(self, channel: str) -> None:
        """Return None: ``receive`` looks first, too."""

    async def new_channel(self, prefix: str) -> str:
        return self._owner.names.new(prefix)

    # Messages

    async def send(self, channel: str, body: bytes) -> None:
        self._require_open()
        self._counters.published += 1
        owner = self._broker.owner_of(channel)
        if owner is None or owner.is_closed or not owner.names.is_valid(channel):
            self._counters.returned += 1
            self._counters.unreachable += 1
            self._owner.reporter.report_now("unreachable", channel)
        else:
            self._put(channel, owner, body, self._settings.local_expiry)

    async def send_normal(self, channel: str, body: bytes) -> None:
        self._require_open()
        self._counters.published += 1
        self._put(channel, None, body, seconds(self._settings.expiry))

    def _put(self, channel: str, owner: Owner | None, body: bytes, expiry: float) -> None:
        if self._try_to_put(channel, owner, body, expiry):
            self._counters.confirmed += 1
            return
        self._counters.nacked += 1
        raise ChannelFull(f"The channel {channel} is full: its consumer doesn't keep up (capacity)")

    def _try_to_put(self, channel: str, owner: Owner | None, body: bytes, expiry: float) -> bool:
        """Return False if the channel is full. A message that can't be read is dropped."""
        try:
            envelope = self._settings.codec.decode(body)
        except MalformedBody as err:
            self._counters.malformed += 1
            self._owner.reporter.report_now("malformed", str(err))
            return True
        capacity = self._capacity_of(channel)
        return self._broker.put(channel, owner, envelope, expiry=expiry, capacity=capacity)

    async def group_send(self, group: str, body: bytes) -> None:
        self._require_open()
        self._counters.published += 1
        are_full = False
        for channel in self._broker.channels_in(group):
            is_normal = "!" not in channel
            owner = None if is_normal else self._broker.owner_of(channel)
            expiry = seconds(self._settings.expiry) if is_normal else self._settings.local_expiry
            # Each member decodes its own copy.
            are_full |= not self._try_to_put(channel, owner, body, expiry)
        if are_full:
            self._counters.group_nacked += 1
            self._owner.reporter.report_now("group_nacked", group)
        else:
            self._counters.confirmed += 1

    async def receive(self, channel: str) -> dict[str, Any]:
        self._owner.names.require_local(channel)
        return await self._broker.receive(channel, self._owner, self._owner)

    async def receive_normal(self, channel: str) -> dict[str, Any]:
        return await self._broker.receive(channel, None, self._owner)

    async def flush(self) -> None:
        self._require_open()
        self._broker.flush()

    # Groups

    async def group_add(self, group: str, channel: str, info: bytes | None) -> None:
        self._require_open()
        self._owner.names.require_local(channel)
        self._broker.join(group, channel, info)

    async def group_discard(self, group: str, channel: str) -> None:
        self._owner.names.require_local(channel)
        self._broker.leave(group, channel)

    async def group_add_normal(self, group: str, channel: str) -> None:
        self._require_open()
        self._broker.join(group, channel, None)

    async def group_discard_normal(self, group: str, channel: str) -> None:
        self._require_open()
        self._broker.leave(group, channel)

    async def group_members(self, group: str, timeout: float) -> GroupMembers:
        self._require_open()
        self._counters.questions += 1
        members = (
            Member(channel, None if info is None else unpack_info(info))
            for channel, info in self._broker.members(group)
        )
        return GroupMembers(tuple(members), is_complete=True, silent=(), absent=())

    async def group_count(self, group: str, timeout: float) -> int:
        self._require_open()
        self._counters.questions += 1
        return len(self._broker.members(group))

    async def status(self, timeout: float) -> Status:
        self._require_open()
        owners = [one for one in self._broker.owners() if not one.is_closed]
        processes = (ProcessStatus(self._of(one).statistics(), 0.0, None) for one in owners)
        return Status(tuple(processes), silent=(), absent=(), is_complete=True)

    def _of(self, owner: Owner) -> MemoryService:
        return MemoryService(self._broker, owner, self._settings, self._capacity_of)

    # Connections, and the end

    async def connect(self, fail_fast: bool) -> None:
        self._require_open()

    async def user_connection(self) -> NoReturn:
        raise BrokerUnavailable(
            "InMemoryChannelLayer has no RabbitMQ, so there is no carehare_connection: test what "
            "needs one with RabbitmqChannelLayer"
        )

    async def close(self) -> None:
        self._broker.close(self._owner)

    def statistics(self) -> LoopLayerStatistics:
        """Return what can be said of it; what only RabbitMQ has is 0."""
        state = "closed" if self._owner.is_closed else "connected"
        connected = ConnectionStatistics(
            state, self._owner.since, url="", reconnects=0, last_reason=""
        )
        idle = ConnectionStatistics("idle", self._owner.since, url="", reconnects=0, last_reason="")
        place = own_place()
        channels, buffered, receivers, groups = self._broker.held(self._owner)
        return LoopLayerStatistics(
            id=self._owner.id,
            pid=place.pid,
            host=place.host,
            since=self._owner.since,
            for_sync_code=self._owner.loop is None,
            publisher=connected,
            subscriber=connected,
            carehare_connection=idle,
            normal_channels=idle,
            counters=replace(self._counters),
            is_blocked=False,
            unconfirmed=0,
            highest_age=0.0,
            loop_lag=0.0,
            loop_late=0.0,
            buffered=buffered,
            in_hand_over=0,
            channels=channels,
            receivers=receivers,
            stalled_channels=0,
            unacked=0,
            local_capacity=self._settings.local_capacity,
            early_acked_bytes=0,
            groups=GroupStatistics(required=groups, bound=groups, lingering=0),
            processes=ProcessStatistics(known=0, absent=0),
        )
