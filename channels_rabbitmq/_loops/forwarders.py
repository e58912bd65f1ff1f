"""Services that forward their calls to a ``LoopLayer`` on another event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Coroutine
from typing import Any, NoReturn, TypeVar

import carehare
from channels.exceptions import StopConsumer

from .._broker.normal_receiver import NormalReceiver
from .._broker.shared import Shared
from .._broker.user_connection import UserConnection
from .._identity import new_id
from .._loop_layer import LoopLayer
from .._settings.settings import Settings
from ..exceptions import BrokerUnavailable
from ..presence import GroupMembers
from ..status import Status
from .calls import Call, NormalReceiveCall, ReceiveCall, SyncReceivers

T = TypeVar("T")

# Seconds that a call may take beyond its own limit, since the owner's loop may be busy.
GRACE = 5.0


class Forwarder:
    """A ``ChannelService`` for the channels that another event loop, ``owner``, has made.

    ``get_loop_layer()`` is called on that loop. Each method raises what the method of the
    ``LoopLayer`` does. On an event loop of ``async_to_sync``, ``sync_receivers`` notes the calls
    of ``receive``.
    """

    def __init__(
        self,
        owner: asyncio.AbstractEventLoop,
        get_loop_layer: Callable[[], LoopLayer],
        settings: Settings,
        sync_receivers: SyncReceivers | None,
    ) -> None:
        self._owner = owner
        self._get_loop_layer = get_loop_layer
        self._settings = settings
        self._sync_receivers = sync_receivers

    async def _call(
        self, make: Callable[[LoopLayer], Coroutine[Any, Any, T]], *, cancellable: bool = True
    ) -> T:
        call = Call(self._owner, lambda: make(self._get_loop_layer()), cancellable=cancellable)
        result: T = await call.run(self._settings.operation_timeout + GRACE)
        return result

    async def receive(self, channel: str) -> dict[str, Any]:
        return await self._run_receiver(ReceiveCall(self._owner, self._get_loop_layer, channel))

    async def _run_receiver(self, call: ReceiveCall) -> dict[str, Any]:
        if self._sync_receivers is not None:
            self._sync_receivers.add(call)
        try:
            message: dict[str, Any] = await call.run(None)
        finally:
            if self._sync_receivers is not None:
                self._sync_receivers.discard(call)
        return message

    async def group_add(self, group: str, channel: str, info: bytes | None) -> None:
        await self._call(lambda loop_layer: loop_layer.group_add(group, channel, info))

    async def group_discard(self, group: str, channel: str) -> None:
        await self._call(lambda loop_layer: loop_layer.group_discard(group, channel))


class SyncForwarder(Forwarder):
    """The ``Service`` of an event loop that ``async_to_sync`` has made for one call.

    It serves no channel itself, and ``user_connection`` is the loop's own.
    """

    known_channels: Container[str] = ()

    def receive_nowait(self, channel: str) -> None:
        """Return None: the background loop has all messages."""

    def __init__(
        self,
        owner: asyncio.AbstractEventLoop,
        get_loop_layer: Callable[[], LoopLayer],
        settings: Settings,
        sync_receivers: SyncReceivers,
        shared: Shared,
    ) -> None:
        super().__init__(owner, get_loop_layer, settings, sync_receivers)
        self._shared = shared
        self._user_connection: UserConnection | None = None
        self._is_closed = False

    async def _call(
        self, make: Callable[[LoopLayer], Coroutine[Any, Any, T]], *, cancellable: bool = True
    ) -> T:
        self._require_open()
        return await super()._call(make, cancellable=cancellable)

    def _require_open(self) -> None:
        if self._is_closed:
            raise BrokerUnavailable("The channel layer is closed")

    def is_local(self, channel: str) -> bool:
        return False

    async def new_channel(self, prefix: str) -> str:
        return await self._call(lambda loop_layer: loop_layer.new_channel(prefix))

    async def send(self, channel: str, body: bytes) -> None:
        await self._call(lambda loop_layer: loop_layer.send(channel, body))

    async def send_normal(self, channel: str, body: bytes) -> None:
        await self._call(lambda loop_layer: loop_layer.send_normal(channel, body))

    def _get_normal_receiver(self) -> NormalReceiver:
        return self._get_loop_layer().normal_channels.receiver

    async def receive_normal(self, channel: str) -> dict[str, Any]:
        if self._is_closed:
            raise StopConsumer
        while True:
            call = NormalReceiveCall(self._owner, self._get_normal_receiver, channel)
            message = await self._run_receiver(call)
            if call.is_accepted:
                return message

    async def group_add_normal(self, group: str, channel: str) -> None:
        await self._call(lambda loop_layer: loop_layer.group_add_normal(group, channel))

    async def group_discard_normal(self, group: str, channel: str) -> None:
        await self._call(lambda loop_layer: loop_layer.group_discard_normal(group, channel))

    async def group_send(self, group: str, body: bytes) -> None:
        await self._call(lambda loop_layer: loop_layer.group_send(group, body))

    async def group_members(self, group: str, timeout: float) -> GroupMembers:
        return await self._call(lambda loop_layer: loop_layer.group_members(group, timeout))

    async def group_count(self, group: str, timeout: float) -> int:
        return await self._call(lambda loop_layer: loop_layer.group_count(group, timeout))

    async def status(self, timeout: float) -> Status:
        return await self._call(lambda loop_layer: loop_layer.status(timeout))

    async def flush(self) -> None:
        await self._call(lambda loop_layer: loop_layer.flush())

    async def connect(self, fail_fast: bool) -> None:
        await self._call(lambda loop_layer: loop_layer.connect(fail_fast))

    async def user_connection(self) -> carehare.Connection:
        """Return an open connection of this loop's; the loop's end closes it."""
        self._require_open()
        if self._user_connection is None:
            self._user_connection = UserConnection(self._settings, new_id(), self._shared)
        deadline = asyncio.get_running_loop().time() + self._settings.operation_timeout
        return await self._user_connection.wait_ready(deadline)

    async def close(self) -> None:
        """Close what serves all loops of sync code, and this one's own connection.

        Later loops, and those of other threads, start anew. This one can't.
        """
        if self._is_closed:
            return
        if self._user_connection is not None:
            self._user_connection.supervisor.close()
        closing = super()._call(lambda loop_layer: loop_layer.close(), cancellable=False)
        self._is_closed = True
        await closing
        if self._user_connection is not None:
            await self._user_connection.supervisor.wait_closed()


class ClosedService:
    """The ``ChannelService`` for the channels of a ``LoopLayer`` that was closed and forgotten."""

    async def receive(self, channel: str) -> NoReturn:
        raise StopConsumer

    async def group_add(self, group: str, channel: str, info: bytes | None) -> NoReturn:
        raise BrokerUnavailable("The channel layer is closed")

    async def group_discard(self, group: str, channel: str) -> NoReturn:
        raise BrokerUnavailable("The channel layer is closed")
