"""``LoopLayers``: the service of each event loop that uses one layer.

A running event loop of the user's has a ``LoopLayer`` of its own. The loops that ``async_to_sync``
makes share one, on the *background loop*, to which their calls are forwarded (``background``).

The garbage collector may call ``close_when_collected`` in any thread at any moment: it doesn't take
the process's lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from functools import partial
from threading import get_ident

from .._broker.host_function import with_imported_host
from .._broker.shared import Shared
from .._hooks import HookFunctions
from .._identity import id_of, is_id
from .._loop_layer import LoopLayer
from .._settings.settings import Settings
from ..exceptions import BrokerUnavailable
from ..statistics import LoopLayerStatistics
from .background import is_of_async_to_sync, threads_are_real
from .closing import close_before_loop
from .forwarders import ClosedService, Forwarder, SyncForwarder
from .process import Process
from .service import ChannelService, Service

# Seconds after which a loop that has stopped, and was not closed, loses its connections: as long as
# RabbitMQ is patient by default. Checked when another loop begins to use the layer.
LONGEST_STANDSTILL = 60.0
# Up to Python 3.11 get_running_loop() asks the system for the process's id each time, which takes a
# quarter of a member's copy in a burst. asyncio's own loops know the thread in which they run.
_ASKING_IS_SLOW = sys.version_info < (3, 12)
# How many ids of loops that have ended are remembered, for the sake of the error's text.
REMEMBERED_IDS = 1000


class LoopLayers:
    """The ``LoopLayer`` of each event loop that uses one layer in this process.

    ``capacity_of`` is the layer's, which it must not keep alive.
    """

    def __init__(
        self, process: Process, settings: Settings, capacity_of: Callable[[str], int]
    ) -> None:
        self.process = process
        self._given_settings = self._settings = settings
        self._capacity_of = capacity_of
        # The service of each event loop. Those of closed loops are dropped when a new loop comes.
        self.by_loop: dict[asyncio.AbstractEventLoop, Service] = {}
        # The latest LoopLayer, for ``find``; None where that isn't worth it
        self._latest: LoopLayer | None = None
        # In the child of a fork: the parent's services, kept for ever.
        self._inherited: dict[asyncio.AbstractEventLoop, Service] = {}
        self._by_id: dict[str, LoopLayer] = {}
        self._ended_ids: dict[str, bool] = {}  # True: by close(), not by the end of the loop
        self._background_layer = _BackgroundLayer(self._make)
        self._hook_functions: HookFunctions | None = None  # until the first call
        self._shared = Shared()
        self._is_collected = False
        process.add(self)

    def find(self) -> Service | None:
        """Return the service of the running event loop, if it has one."""
        latest = self._latest
        # Only until Python 3.12 is the oldest: see _ASKING_IS_SLOW. The loop's type doesn't tell of
        # the attribute, which asyncio's own loops have.
        if latest is not None and latest.loop._thread_id == get_ident():  # type: ignore[attr-defined]  # as said
            return latest
        return self.by_loop.get(asyncio.get_running_loop())

    def get_or_create(self) -> Service:
        """Return the service of the running event loop.

        Raises BrokerUnavailable when the process is ending, and InvalidChannelLayerError for a
        dotted path that can't be imported.
        """
        loop = asyncio.get_running_loop()
        self.prepare()
        with self.process.lock:
            if self.process.is_ending:
                raise BrokerUnavailable("The process is ending")
            self._forget_ended()
            if self.process.is_background(loop):
                return self._background_layer.get()
            if loop not in self.by_loop:
                self.by_loop[loop] = self._create(loop)
            return self.by_loop[loop]

    def prepare(self) -> None:
        """Import what the settings name; raises as ``get_or_create``. Later calls do nothing."""
        if self._hook_functions is None:
            # Not with the lock: a module that is imported may use the layer.
            settings = with_imported_host(self._given_settings)
            _ = settings.codec  # imports the serializer
            hook_functions = HookFunctions.load(settings)
            self._settings = self.process.prepare(settings, self._shared)
            self._hook_functions = hook_functions

    def _create(self, loop: asyncio.AbstractEventLoop) -> Service:
        if is_of_async_to_sync(loop) and threads_are_real():
            return SyncForwarder(
                self.process.background().loop,
                self._background_layer.get,
                self._settings,
                self.process.sync_receivers,
                self._shared,
            )
        loop_layer = self._make()
        close_before_loop(loop_layer, self.process.is_current)
        if _ASKING_IS_SLOW and isinstance(loop, asyncio.BaseEventLoop):
            self._latest = loop_layer
        return loop_layer

    def _make(self) -> LoopLayer:
        """Make a ``LoopLayer`` for the running event loop."""
        assert self._hook_functions is not None, "get_or_create() is called first"
        loop_layer = LoopLayer(
            self._settings,
            self._capacity_of,
            self._hook_functions,
            self._shared,
            for_sync_code=self.process.is_background(asyncio.get_running_loop()),
        )
        self._by_id[loop_layer.id] = loop_layer
        if self._is_collected:  # a moment ago, while a call is still running
            self._close_soon(loop_layer)
        return loop_layer

    def _forget_ended(self) -> None:
        for loop in [loop for loop in self.by_loop if loop.is_closed()]:
            del self.by_loop[loop]
        if self._latest is not None and self._latest.loop.is_closed():
            self._latest = None
        for id_, loop_layer in list(self._by_id.items()):
            if loop_layer.loop.is_closed() or loop_layer.is_closed:
                del self._by_id[id_]
                self._ended_ids[id_] = loop_layer.is_closed
        while len(self._ended_ids) > REMEMBERED_IDS:
            del self._ended_ids[next(iter(self._ended_ids))]
        if self.process.is_current():  # else the sockets are its parent's
            for loop_layer in self.all():
                if not loop_layer.loop.is_running():
                    loop_layer.shut_down_if_stopped(LONGEST_STANDSTILL)

    def owner_or(self, service: Service, channel: str) -> ChannelService:
        """As ``owner``, for changes of groups: ``service`` does them for other processes.

        Raises ValueError also for a channel of a process that can't be asked.
        """
        id_ = id_of(channel)
        if id_ in self._by_id or id_ in self._ended_ids:
            return self.owner(channel)
        if not is_id(id_) or channel == f"{id_}!":
            raise ValueError(
                f"The channel {channel} wasn't made by new_channel() of a process with "
                "channels_rabbitmq 5, so it can't be added to groups from here"
            )
        return service

    def owner(self, channel: str) -> ChannelService:
        """Return the service of a channel, whichever event loop of this process has made it.

        Raises ValueError if no event loop of this process has made it, or one that can't serve it.
        """
        id_ = id_of(channel)
        found = self._by_id.get(id_)
        if found is None and self._ended_ids.get(id_):
            return ClosedService()
        if found is None and id_ not in self._ended_ids:
            raise ValueError(
                f"The channel {channel} belongs to another process, or to another layer: only the "
                "one that made it by new_channel() can receive from it"
            )
        if found is None or found.loop.is_closed():
            raise ValueError(
                f"The channel {channel} belongs to an event loop of this process that has ended"
            )
        loop = asyncio.get_running_loop()
        if found.loop is loop:
            return found
        if not found.loop.is_running():
            raise ValueError(
                f"The channel {channel} belongs to an event loop of this process that isn't running"
            )
        receivers = self.process.sync_receivers if is_of_async_to_sync(loop) else None
        return Forwarder(found.loop, lambda: found, self._settings, receivers)

    def all(self) -> list[LoopLayer]:
        """Return those whose event loops can still be run."""
        return [one for one in list(self._by_id.values()) if not one.loop.is_closed()]

    def statistics(self) -> tuple[LoopLayerStatistics, ...]:
        """Return those of each, in the order in which they were made. From any thread."""
        if not self.process.is_current():
            return ()  # They are those of the process that has forked.
        return tuple(one.statistics() for one in self.all())

    def start_over(self) -> None:
        """Close what is open; the next call begins as the first one did."""
        with self.process.lock:
            self.by_loop = {}
            self._latest = None
            self._hook_functions = None
            self._background_layer = _BackgroundLayer(self._make)
        self._close_all_soon()

    def close_when_collected(self) -> None:
        """Close everything: the layer was collected. From any thread, at any moment."""
        if not self.process.is_current() or self.process.is_ending:
            return
        self._is_collected = True
        self._close_all_soon()

    def _close_all_soon(self) -> None:
        for loop_layer in self.all():
            with contextlib.suppress(RuntimeError):  # closed in this very moment
                loop_layer.loop.call_soon_threadsafe(self._close_soon, loop_layer)

    def _close_soon(self, loop_layer: LoopLayer) -> None:
        task = loop_layer.loop.create_task(loop_layer.close(), name="channels_rabbitmq close")
        self.process.closing.add(task)
        task.add_done_callback(partial(self._on_closed, loop_layer))

    def _on_closed(self, loop_layer: LoopLayer, task: asyncio.Task[None]) -> None:
        self.process.closing.discard(task)
        self._by_id.pop(loop_layer.id, None)

    @property
    def is_finished(self) -> bool:
        """Whether the layer was collected, and nothing of it is open."""
        return self._is_collected and not self.all()

    def detach(self) -> None:
        """In a fork's child: serve nothing with what the parent has made."""
        # Also for a loop that its parent had made and that the child runs.
        self._inherited, self.by_loop = self.by_loop, {}
        self._latest = None
        self._shared = Shared()  # The child's outages and log are its own.


class _BackgroundLayer:
    """The one ``LoopLayer`` of a layer for all sync code, made by its first call.

    After a ``close()`` the next call gets a new one: a call of ``async_to_sync`` must not stop
    those of other threads, nor later ones.
    """

    def __init__(self, make: Callable[[], LoopLayer]) -> None:
        self._make = make
        self._loop_layer: LoopLayer | None = None

    def get(self) -> LoopLayer:
        """Return it. To be called on the background loop."""
        found = self._loop_layer
        if found is None or found.is_closing or found.loop is not asyncio.get_running_loop():
            found = self._loop_layer = self._make()
        return found
