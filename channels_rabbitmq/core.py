"""``RabbitmqChannelLayer``: what a Django project names in ``CHANNEL_LAYERS``."""

from __future__ import annotations

import contextlib
import ssl
import weakref
from collections.abc import Awaitable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

import carehare
from channels.exceptions import ChannelFull, InvalidChannelLayerError, MessageTooLarge
from channels.layers import BaseChannelLayer

from ._codec import pack_info
from ._loops.process import Process, current
from ._loops.registry import LoopLayers
from ._loops.service import ChannelService, Service, Services
from ._names import require_channel_name, require_group_name
from ._settings.readers import HookFunction, HostFunction
from ._settings.settings import DEFAULT_HOST, OPTIONS, Settings
from .exceptions import BrokerUnavailable
from .presence import GroupMembers
from .statistics import LoopLayerStatistics
from .status import Status


class RabbitmqChannelLayer(BaseChannelLayer):
    """A channel layer on RabbitMQ. The manual explains its options.

    May be made and used anywhere: at import time, in any thread, on any event loop, after a fork.
    Nothing connects until a call needs it. Each event loop that uses the layer has its own
    connections, until it ends. Calls by ``async_to_sync`` from sync code share the connections of a
    background thread, until the process ends. A layer that is garbage-collected closes by itself.
    Once the process has begun to end, calls raise ``BrokerUnavailable``.

    All coroutines may be cancelled at any time. None but ``receive`` waits longer than
    ``operation_timeout`` (seconds). When there has been no connection for that long, none waits.

    Raises ``InvalidChannelLayerError``, which tells of all options that don't exist or have a bad
    value. So does the first call on an event loop if ``host``, ``serializer``, ``on_disconnect``
    or ``on_reconnect`` is a dotted path that can't be imported.

    A message is a ``dict`` with ``str`` keys all the way down, and values of ``bytes``, ``str``,
    ``int`` (signed, 64 bits), ``float``, ``list``, ``tuple`` (arrives as a ``list``), ``dict``,
    ``bool`` and ``None``. A ``bytearray`` or ``memoryview`` arrives as ``bytes``, a proxy (Django's
    lazy objects and texts) as what it stands for. Anything else is a ``TypeError`` for the sender.
    With another ``serializer`` than msgpack, a message is a ``dict`` that this can write.
    A name that the specification doesn't allow is a ``TypeError`` too.
    """

    extensions = ["groups"]  # noqa: RUF012 - the specification asks for a list

    # The specification wants both as attributes of the layer.
    ChannelFull = ChannelFull
    MessageTooLarge = MessageTooLarge

    def __init__(
        self,
        /,
        *,
        host: str | Sequence[str] | HostFunction = DEFAULT_HOST,
        ssl_context: ssl.SSLContext | None = None,
        expiry: float | None = 60,
        local_expiry: float | None = None,
        remote_capacity: int | None = 10_000,
        remote_capacity_bytes: int | None = 32 * 1024 * 1024,
        local_capacity: int = 100,
        capacity: int = 10_000,
        channel_capacity: Mapping[Any, int] | None = None,
        groups_exchange: str = "groups",
        normal_channels: bool = False,
        allow_flush: bool = False,
        connect_timeout: float = 10,
        operation_timeout: float = 10,
        watchdog_interval: float = 30,
        max_message_size: int = 16 * 1024 * 1024,
        symmetric_encryption_keys: Sequence[str | bytes] | None = None,
        serializer: str | type[Any] = "msgpack",
        on_disconnect: HookFunction | str | None = None,
        on_reconnect: HookFunction | str | None = None,
        **unknown: object,
    ) -> None:
        given = locals()
        _refuse_serializers(type(self))
        config = {
            option: given[option]
            for option, (default, _) in OPTIONS.items()
            if not _is_same(given[option], default)
        }
        try:
            self._settings = Settings.from_config(config | unknown)
        except ValueError as err:
            raise InvalidChannelLayerError(f"{type(self).__name__}: {err}") from None
        super().__init__(  # type: ignore[no-untyped-call]  # Channels has few types
            expiry=self._settings.expiry,
            capacity=self._settings.capacity,
            channel_capacity=self._settings.channel_capacity,
        )
        # As the base class's get_capacity() wants it.
        self.channel_capacity = self.compile_capacities(  # type: ignore[no-untyped-call]  # as above
            self.channel_capacity
        )
        if self._settings.allow_flush and "flush" not in self.extensions:
            self.extensions = [*self.extensions, "flush"]
        self._loop_layers = self._make_loop_layers(current())

    def _make_loop_layers(self, process: Process) -> Services:
        # Nothing here refers to the layer, so it can be collected, and closes then.
        loop_layers = LoopLayers(process, self._settings, partial(capacity_of, weakref.ref(self)))
        weakref.finalize(self, loop_layers.close_when_collected).atexit = False
        return loop_layers

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: the settings, and nothing of what is open."""
        return {name: value for name, value in self.__dict__.items() if name != "_loop_layers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._loop_layers = self._make_loop_layers(current())

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._settings.host}>"

    def _loop_layer(self) -> Service:
        """Return the service of the running event loop."""
        return self._loop_layers.find() or self._start_service()

    def _start_service(self) -> Service:
        process = current()
        with process.lock:
            if self._loop_layers.process is not process:  # since a fork
                self._loop_layers = self._make_loop_layers(process)
        return self._loop_layers.get_or_create()

    def _owner(self, channel: str) -> ChannelService:
        """Return the service of a channel, whichever event loop of this process has made it."""
        require_channel_name(channel)
        service = self._loop_layer()
        return service if service.is_local(channel) else self._loop_layers.owner(channel)

    def _group_service(self, channel: str) -> ChannelService:
        """Return the service that adds a channel of any process to a group, or discards it."""
        service = self._loop_layer()
        return (
            service if service.is_local(channel) else self._loop_layers.owner_or(service, channel)
        )

    def _is_normal(self, channel: str) -> bool:
        """Return whether a channel is a normal one; raise if it may not be."""
        require_channel_name(channel)
        if "!" in channel:
            return False
        self._require_normal_channels(channel)
        return True

    def _require_normal_channels(self, channel: str) -> None:
        if not self._settings.normal_channels:
            raise NotImplementedError(
                f"{channel!r} is a normal channel (it holds no '!'). To try the connection, run "
                "`python -m channels_rabbitmq check`. For jobs, as with runworker, set the option "
                "normal_channels to True: each is then a queue that all processes share. For jobs "
                "that matter use Celery, or a queue of your own on `await "
                "layer.carehare_connection`; for messages to a websocket, the name that "
                "new_channel() returned"
            )

    async def send(self, channel: str, message: dict[str, Any]) -> None:
        """Send a message to one channel: at most once, in the order of one sender's calls.

        A channel whose name has no "!" needs the option ``normal_channels``, or this raises
        ``NotImplementedError``.

        Returns when the broker has confirmed that it has the message. Also returns, with a
        warning in the log, when the outcome is unknown (the connection was lost meanwhile) and when
        the process of the channel is gone.

        Raises ``ChannelFull`` if the queue of the channel's process is full or the broker takes no
        messages now, ``MessageTooLarge``, and ``BrokerUnavailable`` if there is no connection
        within ``operation_timeout``, or hasn't been for longer, or the broker has refused it before
        it was ever there. Cancelling it may or may not take the message back.
        """
        require_channel_name(channel)
        is_normal = "!" not in channel
        if is_normal:
            self._require_normal_channels(channel)
        # Here and not where it is published, perhaps in another thread: a lazy text gets the
        # language that is active in the caller's thread.
        body = self._settings.codec.encode_for_channel(channel, message)
        service = self._loop_layer()
        await (service.send_normal if is_normal else service.send)(channel, body)

    async def receive(self, channel: str) -> dict[str, Any]:
        """Wait for the next message of a channel which ``new_channel`` made in this process.

        If that was on another event loop, that loop serves the call, and has to run. The message is
        the receiver's own copy. A channel's messages come in the order in which they arrived. If
        several calls wait for one channel, each gets a different message. Cancelling loses nothing:
        either a message is returned, or it is still there.

        With the option ``normal_channels`` it may be a channel without "!" in its name, too. Each
        of its messages goes to one call, in whichever process, and is acked before that returns.

        Raises ``StopConsumer`` once the layer is closed or the channel's event loop ends, and
        ``ValueError`` for a channel of another process, or of an event loop that had ended. A lost
        connection is no error: the call waits for the next one.
        """
        own = self._loop_layers.find() or self._start_service()
        try:
            # Without this look, a member's copy in a burst takes 1.4 times as long.
            message = own.receive_nowait(channel)
        except TypeError:  # The channel can't be hashed.
            require_channel_name(channel)
            raise
        if message is not None:
            return message
        # A known channel's name needn't be checked again.
        if channel in own.known_channels:
            return await own.receive(channel)
        if self._is_normal(channel):
            return await own.receive_normal(channel)
        return await self._owner(channel).receive(channel)

    async def new_channel(self, prefix: str = "specific.") -> str:
        """Return the name of a new channel, that belongs to this event loop.

        Made by ``async_to_sync``, it belongs to all sync code of this process. Doesn't wait for the
        broker. Nothing needs to be undone when the channel isn't used any more.
        """
        require_channel_name(prefix)
        if "!" in prefix:
            raise TypeError(f"The prefix {prefix!r} holds a '!'")
        return await self._loop_layer().new_channel(prefix)

    async def group_add(self, group: str, channel: str, info: dict[str, Any] | None = None) -> None:
        """Add a channel of any process to a group; no error if it is a member.

        When it returns, each ``group_send`` that any process calls from then on reaches it.
        ``info`` is what ``group_members`` tells of it: a ``dict`` as a message, of at most 4 KiB
        when it is encoded. It takes the place of an earlier one, also if it is None.

        For a channel of another process, that process does it, and this one waits for its answer.
        A normal channel gets the group's messages into its queue, and has no ``info``.

        Raises ``BrokerUnavailable`` if the broker doesn't confirm within ``operation_timeout``, or
        as ``send`` does, or if the other process doesn't answer in that time. Raises ``ValueError``
        if the process or the event loop of the channel is gone, or never was one of this layer's;
        ``TypeError`` and ``MessageTooLarge`` for a wrong ``info``. If it raises or is cancelled, a
        channel of this process is what it was before: a member or not. A channel of another process
        may have become a member all the same.
        """
        require_group_name(group)
        is_normal = self._is_normal(channel)
        own = self._loop_layer()
        packed = None if info is None else pack_info(info)
        if not is_normal:
            await self._group_service(channel).group_add(group, channel, packed)
        elif packed is not None:
            raise NotImplementedError(
                f"{channel!r} is a normal channel, which group_members() doesn't list: leave out "
                "info"
            )
        else:
            await own.group_add_normal(group, channel)

    async def group_discard(self, group: str, channel: str) -> None:
        """Take a channel of any process out of a group; no error if it isn't in it.

        When it returns, nothing more is put into the channel for this group. Doesn't wait for the
        broker if the channel is of this process. Raises ``ValueError`` as ``group_add`` does; for a
        normal channel, or one of another process, also ``BrokerUnavailable`` as that does.
        """
        require_group_name(group)
        if self._is_normal(channel):
            await self._loop_layer().group_discard_normal(group, channel)
        else:
            await self._group_service(channel).group_discard(group, channel)

    async def group_members(self, group: str, timeout: float = 1.0) -> GroupMembers:
        """Ask all processes who is in a group.

        The result has each channel once whose ``group_add`` had returned, anywhere, before this was
        called, unless it has left; that is so if it ``is_complete``, which says what can't be known
        (see ``GroupMembers``). It names the processes that didn't answer within ``timeout``
        (seconds; at most ``operation_timeout``). Most often it takes some milliseconds, but up to
        half a second more when this event loop has just connected. Calls at the same time for one
        group share a question.

        Raises ``BrokerUnavailable`` if there is no connection in that time, so that nobody could be
        asked. Any thread and any event loop may call it, also sync code by ``async_to_sync``.
        """
        require_group_name(group)
        return await self._loop_layer().group_members(group, _require_timeout(timeout))

    async def group_count(self, group: str, timeout: float = 1.0) -> int:
        """Ask all processes how many channels are in a group; otherwise as ``group_members``.

        The number is too low if a process doesn't answer in time; ``group_members`` can tell.
        Raises ``BrokerUnavailable``, too, if no process at all has answered in time although others
        are there, or if it isn't known yet which are there: there is no number then.
        """
        require_group_name(group)
        return await self._loop_layer().group_count(group, _require_timeout(timeout))

    async def group_send(self, group: str, message: dict[str, Any]) -> None:
        """Send a message to all channels of a group, at most once each.

        Returns when the broker has confirmed. Never raises ``ChannelFull``: a process whose queue
        is full doesn't get the message, and none does while the broker takes no messages. The log
        warns. Raises ``MessageTooLarge``, and ``BrokerUnavailable`` as ``send`` does.
        """
        require_group_name(group)
        body = self._settings.codec.encode_for_group(group, message)
        await self._loop_layer().group_send(group, body)

    async def flush(self) -> None:
        """Empty everything that all processes hold: channels, groups, normal channels. For tests.

        Afterwards no channel is in a group, and what was sent before arrives nowhere. Channels stay
        valid, and calls of ``receive`` go on waiting. Raises ``BrokerUnavailable`` if a process
        doesn't answer within ``operation_timeout``, and ``NotImplementedError`` without the option
        ``allow_flush``.
        """
        if not self._settings.allow_flush:
            raise NotImplementedError(
                "flush() would empty what all processes hold, so it is off. For tests, set the "
                "option allow_flush to True in all processes"
            )
        await self._loop_layer().flush()

    async def connect(self, *, fail_fast: bool = False) -> None:
        """Connect now, and not when the first call needs it. No error if it is connected.

        Returns when messages can be sent and received. Raises ``BrokerUnavailable`` if that takes
        longer than ``operation_timeout``, or if there has been no connection for longer. With
        ``fail_fast`` it raises as soon as every URL was tried once in vain. Either way the layer
        goes on trying. A refusal doesn't end the wait: the broker may be starting, too.
        """
        await self._loop_layer().connect(fail_fast)

    def statistics(self) -> tuple[LoopLayerStatistics, ...]:
        """Return counters and states, of each event loop of this process that uses the layer.

        They are in the order of their first calls, and empty before the first call. Those of an
        event loop on which the layer was closed stay until that loop is closed or another one
        begins to use the layer. May be called in any thread, on any event loop or without one, at
        any time; it connects nothing, waits for nothing and costs little. The numbers of an event
        loop that runs in another thread may be a moment apart. ``channels_rabbitmq.statistics``
        explains each of them.
        """
        return self._loop_layers.statistics()

    async def status(self, timeout: float = 1.0) -> Status:
        """Ask all processes how they are: their ``statistics()``, and their worst channel.

        ``timeout``: seconds, at most ``operation_timeout``. The result names those that didn't
        answer in that time; it takes up to half a second more to ask the others what they know of
        these. Otherwise as ``group_members``. An answer has about 1 kB.
        """
        return await self._loop_layer().status(_require_timeout(timeout))

    @property
    def carehare_connection(self) -> Awaitable[carehare.Connection]:
        """An open connection for queues of your own: ``await layer.carehare_connection``.

        The layer doesn't use it, so nothing you do on it disturbs the layer. It is opened at the
        first use on an event loop, and stays the same until it is lost; then the next use opens a
        new one. Don't close it: it is closed together with the event loop's other connections, or
        by ``async_to_sync`` at the end of the call. Raises ``BrokerUnavailable`` as ``send`` does.
        """
        return _UserConnection(self)

    current_connection = carehare_connection

    async def close(self) -> None:
        """Close this event loop's connections, and with them its queue, groups and messages.

        Pending and later ``receive`` calls raise ``StopConsumer``, other calls
        ``BrokerUnavailable``. Other event loops go on. By ``async_to_sync`` it closes the
        connections that all sync code shares; the next call of sync code opens new ones. Takes
        about a second at most, raises nothing, and may be called any number of times. If it is
        cancelled, everything is closed all the same, a moment later.
        """
        # There is nothing to close if the process is ending, or a dotted path can't be imported.
        with contextlib.suppress(BrokerUnavailable, InvalidChannelLayerError):
            await self._loop_layer().close()

    async def close_pools(self) -> None:
        """Do what ``close`` does: the name that it has in ``channels_redis``."""
        await self.close()


class _UserConnection:
    """The value of ``carehare_connection``: may be awaited any number of times, or never."""

    __slots__ = ("_layer",)

    def __init__(self, layer: RabbitmqChannelLayer) -> None:
        self._layer = layer

    def __await__(self) -> Generator[Any, None, carehare.Connection]:
        return self._layer._loop_layer().user_connection().__await__()


def capacity_of(layer: weakref.ref[RabbitmqChannelLayer], channel: str) -> int:
    """Return a layer's capacity for a channel, without keeping the layer alive."""
    found = layer()
    if found is None:
        return 0  # The layer was collected: there are no receivers, and everything closes soon.
    capacity: int = found.get_capacity(channel)  # type: ignore[no-untyped-call]  # as above
    return capacity


def _refuse_serializers(cls: type[RabbitmqChannelLayer]) -> None:
    for name in ("serialize", "deserialize"):
        if hasattr(cls, name):
            raise InvalidChannelLayerError(
                f"{cls.__name__} has a method {name}(), as one overrides it in channels_redis. "
                "Here nothing calls it. Put serialize() and deserialize() into a class of their "
                "own, and give that or its dotted path as the option serializer; or, if the method "
                "is for something else, rename it"
            )


def _is_same(value: object, default: object) -> bool:
    """Whether an option was left out, as far as can be seen. Equal numbers may be two objects."""
    return value is default or (type(value) is type(default) and value == default)


def _require_timeout(timeout: float) -> float:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds, not {timeout!r}")
    if not timeout > 0:
        raise ValueError(f"timeout must be above 0, not {timeout!r}")
    return timeout
