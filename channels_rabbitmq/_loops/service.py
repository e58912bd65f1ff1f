"""The interface of the objects that serve a layer's calls.

``core`` checks the names and packs the message. Everything else is done by the ``Service`` of the
event loop that runs: a ``LoopLayer``, or on a loop of ``async_to_sync`` a ``SyncForwarder``. What
is done to a channel is done by the ``ChannelService`` of the event loop that made it: the same
``LoopLayer``, or a ``Forwarder``. A ``Service`` also adds and discards channels of other processes.
"""

from __future__ import annotations

from collections.abc import Container, Coroutine
from typing import Any, Protocol

import carehare

from ..presence import GroupMembers
from ..statistics import LoopLayerStatistics
from ..status import Status


class ChannelService(Protocol):
    """Serves the channels of one ``LoopLayer``."""

    def receive(self, channel: str) -> Coroutine[Any, Any, dict[str, Any]]: ...

    async def group_add(self, group: str, channel: str, info: bytes | None) -> None: ...

    async def group_discard(self, group: str, channel: str) -> None: ...


class Service(ChannelService, Protocol):
    """Serves the calls of one event loop."""

    known_channels: Container[str]
    """Channels that it serves and in which something waits: so their names are valid."""

    def receive_nowait(self, channel: str) -> dict[str, Any] | None:
        """Return a message of a channel that is known, if one is there."""

    def is_local(self, channel: str) -> bool:
        """Whether it serves the channel."""

    async def new_channel(self, prefix: str) -> str: ...

    async def send(self, channel: str, body: bytes) -> None: ...

    async def send_normal(self, channel: str, body: bytes) -> None: ...

    def receive_normal(self, channel: str) -> Coroutine[Any, Any, dict[str, Any]]: ...

    async def group_add_normal(self, group: str, channel: str) -> None: ...

    async def group_discard_normal(self, group: str, channel: str) -> None: ...

    async def group_send(self, group: str, body: bytes) -> None: ...

    async def group_members(self, group: str, timeout: float) -> GroupMembers: ...

    async def group_count(self, group: str, timeout: float) -> int: ...

    async def status(self, timeout: float) -> Status: ...

    async def flush(self) -> None: ...

    async def connect(self, fail_fast: bool) -> None: ...

    async def user_connection(self) -> carehare.Connection: ...

    async def close(self) -> None: ...


class Services(Protocol):
    """The services of one layer: ``LoopLayers``."""

    @property
    def process(self) -> object:
        """The process whose services these are: a fork's child needs others."""

    def find(self) -> Service | None:
        """Return the service of the running event loop, if it has one."""

    def prepare(self) -> None:
        """Do what the first call does before it gets a service."""

    def get_or_create(self) -> Service:
        """Return the service of the running event loop."""

    def owner(self, channel: str) -> ChannelService:
        """Return the service of a channel of this process; raise ValueError if there is none."""

    def owner_or(self, service: Service, channel: str) -> ChannelService:
        """Return the service that changes the groups of a channel, which may be ``service``."""

    def statistics(self) -> tuple[LoopLayerStatistics, ...]:
        """Return those of each event loop, from any thread."""
