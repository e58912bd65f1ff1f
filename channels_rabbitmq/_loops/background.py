"""What belongs to the whole process: who serves which event loop; the background loop; fork, exit.

**Who serves.** A running event loop of the user's has a ``LoopLayer`` of its own. A loop that
``async_to_sync`` has made lives for one call only; its calls are forwarded to the *background
loop*, one daemon thread for the process, where each layer has one ``LoopLayer`` for all sync code.
(``async_to_sync`` in a thread of ``sync_to_async`` makes no loop; it uses the one that waits.)

**Fork.** A child inherits memory, but not the threads that worked on it, and it shares sockets,
epoll and self-pipes with its parent: closing an inherited transport takes the parent's socket out
of the common epoll and leaves the parent deaf. So all state is in one object, ``process``. A child
gets a new one; the old one is never used again, nor freed, which would close things. (Not foreseen
is a fork that Python isn't told of, in a coroutine.)

**Exit.** Connections want a farewell. But at ``atexit`` no thread can be started, and no executor
works. What runs still runs, so the loops of other threads are told to close; those that have
stopped and were not closed (daphne's) are run for a moment. Before that, when the interpreter
begins to end, it waits for the threads of ``async_to_sync``, so for calls that may wait for ever:
these are refused then.

**Threads.** What several threads look at is changed under the lock, or by one operation on a dict
or a set. Who holds the lock doesn't wait for other threads' work. The garbage collector may call
``LoopLayers.abandon`` in any thread at any moment: it doesn't take the lock.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures.thread  # now: see the end of this module
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from asgiref.sync import AsyncToSync

from .._broker.host_function import with_imported_host
from .._broker.outage import KnownOutage
from .._hooks import HookFunctions
from .._loop_layer import LoopLayer
from .._settings.settings import Settings
from ..exceptions import BrokerUnavailable
from ..statistics import LoopLayerStatistics
from .closing import end_before_close
from .forwarders import Forwarder, SyncForwarder, SyncReceivers

logger = logging.getLogger("channels_rabbitmq.sync")

# Seconds that all closing may take when the process ends.
_EXIT_TIMEOUT = 3.0
# Seconds after which a loop that has stopped, and that nobody closes, keeps no connections: as long
# as RabbitMQ is patient by default. Told when another loop begins to use the layer.
_LONGEST_STANDSTILL = 60.0
# How many ids of loops that have ended are remembered, for the sake of the error's text.
_REMEMBERED_IDS = 1000
# Whether get_running_loop() is slow. That these versions' loops have a _thread_id won't change.
_TELL_BY_THREAD = sys.version_info < (3, 12)


_Serving = dict[asyncio.AbstractEventLoop, LoopLayer | SyncForwarder]


class LoopLayers:
    """The ``LoopLayer`` of each event loop that uses one layer in this process.

    ``capacity_of`` is the layer's, which it must not keep alive.
    """

    def __init__(self, settings: Settings, capacity_of: Callable[[str], int]) -> None:
        self._settings = settings
        self._capacity_of = capacity_of
        # Who serves each event loop. Those of loops that have ended go when a new one comes.
        self.serving: _Serving = {}
        # For receive(): the newest LoopLayer whose loop is told by the thread in which it runs.
        # Up to Python 3.11 get_running_loop() asks the system for the process's id, a fifth of what
        # it takes to receive a message that waits. (Any: asyncio doesn't declare _thread_id.)
        self.told_by_thread: Any = None
        self.former: _Serving = {}  # in the child of a fork: its parent's, for ever
        self._by_id: dict[str, LoopLayer] = {}
        self._ended_ids: dict[str, bool] = {}  # True: by close()
        self._for_sync_code = _ForSyncCode(self)
        self._hook_functions: HookFunctions | None = None  # as long as nobody uses the layer
        self._known_outage = KnownOutage()
        self._is_abandoned = False
        self.process = process
        self.process.add(self)

    def serve(self) -> LoopLayer | SyncForwarder:
        """Decide who serves the running event loop, which isn't in ``serving``.

        Raises BrokerUnavailable when the process is ending, and InvalidChannelLayerError for a
        dotted path that can't be imported.
        """
        loop = asyncio.get_running_loop()
        if self._hook_functions is None:
            # Not with the lock: a module that is imported may use the layer.
            self._settings = with_imported_host(self._settings)
            self._hook_functions = HookFunctions.load(self._settings)
        with self.process.lock:
            if self.process.is_ending:
                raise BrokerUnavailable("The process is ending")
            self._forget_ended()
            if is_of_async_to_sync(loop) and threads_are_real():
                self.serving[loop] = SyncForwarder(
                    self.process.background().loop,
                    self._for_sync_code.get,
                    self._settings,
                    self.process.sync_receivers,
                    self._known_outage,
                )
            elif self.process.is_background(loop):
                return self._for_sync_code.get()
            else:
                self.serving[loop] = loop_layer = self.make()
                end_before_close(loop_layer, self.process.is_current)
                if _TELL_BY_THREAD and isinstance(loop, asyncio.BaseEventLoop):
                    self.told_by_thread = loop_layer
            return self.serving[loop]

    def make(self) -> LoopLayer:
        """Make a ``LoopLayer`` for the running event loop."""
        assert self._hook_functions is not None, "serve() is called first"
        loop_layer = LoopLayer(
            self._settings, self._capacity_of, self._hook_functions, self._known_outage
        )
        self._by_id[loop_layer.id] = loop_layer
        if self._is_abandoned:  # a moment ago, by a call that is still running
            self._close_soon(loop_layer)
        return loop_layer

    def _forget_ended(self) -> None:
        for loop in [loop for loop in self.serving if loop.is_closed()]:
            del self.serving[loop]
        if self.told_by_thread is not None and self.told_by_thread.loop.is_closed():
            self.told_by_thread = None
        for id_, loop_layer in list(self._by_id.items()):
            if loop_layer.loop.is_closed() or loop_layer.has_ended:
                del self._by_id[id_]
                self._ended_ids[id_] = loop_layer.has_ended
        while len(self._ended_ids) > _REMEMBERED_IDS:
            del self._ended_ids[next(iter(self._ended_ids))]
        if self.process.is_current():  # else the sockets are its parent's
            for loop_layer in self.all():
                if not loop_layer.loop.is_running():
                    loop_layer.shut_down_if_stopped(_LONGEST_STANDSTILL)

    def owner(self, channel: str) -> LoopLayer | Forwarder:
        """Return who serves a channel, on whichever event loop it was made.

        Raises ValueError if that is none of this process, or one that can't serve it, and
        BrokerUnavailable if that was closed.
        """
        id_ = channel.partition("!")[0]
        found = self._by_id.get(id_)
        if found is None and self._ended_ids.get(id_):
            raise BrokerUnavailable("The channel layer is closed")
        if found is None and id_ not in self._ended_ids:
            raise ValueError(
                f"The channel {channel} belongs to another process, or to another layer: only who "
                "made it by new_channel() can receive from it, or add it to groups"
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
        """Those of event loops that can be run still."""
        return [one for one in list(self._by_id.values()) if not one.loop.is_closed()]

    def statistics(self) -> tuple[LoopLayerStatistics, ...]:
        """Tell of each, in the order in which they were made. From any thread."""
        return tuple(
            one.statistics(for_sync_code=self.process.is_background(one.loop)) for one in self.all()
        )

    def abandon(self) -> None:
        """Close everything: nobody has the layer any more. From any thread, at any moment."""
        if self.process is not process or self.process.is_ending:
            return  # before a fork; after the end
        self._is_abandoned = True
        for loop_layer in self.all():
            with contextlib.suppress(RuntimeError):  # closed in this very moment
                loop_layer.loop.call_soon_threadsafe(self._close_soon, loop_layer)

    def _close_soon(self, loop_layer: LoopLayer) -> None:
        task = loop_layer.loop.create_task(loop_layer.close(), name="channels_rabbitmq close")
        self.process.closing.add(task)
        task.add_done_callback(partial(self._accept_closed, loop_layer))

    def _accept_closed(self, loop_layer: LoopLayer, task: asyncio.Task[None]) -> None:
        self.process.closing.discard(task)
        self._by_id.pop(loop_layer.id, None)

    @property
    def is_over(self) -> bool:
        """Whether nobody has the layer any more, and nothing of it is open."""
        return self._is_abandoned and not self.all()


class _ForSyncCode:
    """The one ``LoopLayer`` of a layer for all sync code, made by its first call.

    After a ``close()`` the next call gets another: no call of ``async_to_sync`` shall end what
    those of other threads, and later ones, can do.
    """

    def __init__(self, loop_layers: LoopLayers) -> None:
        self._loop_layers = loop_layers
        self._loop_layer: LoopLayer | None = None

    def get(self) -> LoopLayer:
        """To be called on the background loop."""
        former = self._loop_layer
        if former is None or former.is_closed or former.loop is not asyncio.get_running_loop():
            self._loop_layer = self._loop_layers.make()
        assert self._loop_layer is not None
        return self._loop_layer


def is_of_async_to_sync(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether ``async_to_sync`` has made this loop, for one call."""
    # The same in asgiref 3.6 to 3.13. Should it go, such loops have connections of their own.
    return loop in getattr(AsyncToSync, "loop_thread_executors", ())


def threads_are_real() -> bool:
    """Whether threads can have an event loop each: not where gevent or eventlet replaced them.

    There each call of ``async_to_sync`` has a connection of its own, as long as it lasts.
    """
    gevent = sys.modules.get("gevent.monkey")
    eventlet = sys.modules.get("eventlet.patcher")
    return not (
        (gevent is not None and gevent.is_module_patched("threading"))
        or (eventlet is not None and eventlet.is_monkey_patched("thread"))
    )


class BackgroundLoop:
    """An event loop in a daemon thread.

    Raises BrokerUnavailable if no thread can be started, since the process is ending.
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="channels_rabbitmq", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as err:
            self.loop.close()
            raise BrokerUnavailable(f"The process is ending: {err}") from None

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.loop.run_forever()
        finally:
            # As asyncio.run() ends.
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self.loop.run_until_complete(asyncio.wait(tasks))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def stop(self, timeout: float) -> None:
        """End it, within ``timeout`` seconds or not."""
        with contextlib.suppress(RuntimeError):  # closed
            self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout)


class Process:
    """All state of one process."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self.lock = threading.Lock()
        self.sync_receivers = SyncReceivers()
        # Tasks that nobody waits for: asyncio alone would let them be collected.
        self.closing: set[asyncio.Task[None]] = set()
        self.is_ending = False
        self._all: set[LoopLayers] = set()
        self._background: BackgroundLoop | None = None

    @property
    def is_inherited(self) -> bool:
        """Whether this is a fork's child, and Python was not told of the fork."""
        return self._pid != os.getpid()

    def is_current(self) -> bool:
        """Whether this is the process that runs now, and not one that has forked."""
        return self is process and not self.is_inherited

    def add(self, loop_layers: LoopLayers) -> None:
        """Note those of a layer, until it is gone and everything closed."""
        for one in [one for one in list(self._all) if one.is_over]:
            self._all.discard(one)
        self._all.add(loop_layers)

    def background(self) -> BackgroundLoop:
        """Return the background loop; the first call starts it. To be called with the lock."""
        if self._background is None or not self._background.is_alive():
            self._background = BackgroundLoop()
        return self._background

    def is_background(self, loop: asyncio.AbstractEventLoop) -> bool:
        return self._background is not None and self._background.loop is loop

    def let_go(self) -> None:
        """Have a fork's child find nothing here."""
        for loop_layers in self._all:
            # Also for a loop that its parent had made and that the child runs.
            loop_layers.former, loop_layers.serving = loop_layers.serving, {}
            loop_layers.told_by_thread = None

    def end(self) -> None:
        """Close everything, in ``_EXIT_TIMEOUT`` or not at all: see "Exit"."""
        self.is_ending = True
        deadline = time.monotonic() + _EXIT_TIMEOUT
        told = []
        stopped = []
        for loop_layers in list(self._all):
            for loop_layer in loop_layers.all():
                if loop_layer.loop.is_running():
                    told.append(_tell_to_leave(loop_layer))
                else:
                    stopped.append(loop_layer)
        for loop_layer in stopped:
            if time.monotonic() < deadline:
                _have_leave(loop_layer)
        concurrent.futures.wait(told, timeout=max(0.0, deadline - time.monotonic()))
        if self._background is not None:
            self._background.stop(max(0.0, deadline - time.monotonic()))


def _tell_to_leave(loop_layer: LoopLayer) -> concurrent.futures.Future[None]:
    """Have a loop of another thread close what it has."""
    done: concurrent.futures.Future[None] = concurrent.futures.Future()

    async def leave() -> None:
        try:
            await loop_layer.leave(cancel_calls=False)
        finally:
            done.set_result(None)

    def start() -> None:
        process.closing.add(loop_layer.loop.create_task(leave()))

    try:
        loop_layer.loop.call_soon_threadsafe(start)
    except RuntimeError:  # closed in this very moment
        done.set_result(None)
    return done


def _have_leave(loop_layer: LoopLayer) -> None:
    """Run a loop that has stopped, so that it can close what it has."""
    leaving = loop_layer.leave(cancel_calls=True)
    try:
        loop_layer.loop.run_until_complete(leaving)
    except Exception as err:
        leaving.close()
        logger.debug("not closed at the end of the process: %s", err)


process = Process()

# States of parents, for ever: what was freed would close sockets, and say so. (The end of the
# interpreter, which empties this list, does neither: tried with Python 3.10 to 3.15.)
_inherited: list[Process] = []


def forget() -> None:
    """Begin anew, in the child of a fork: see "Fork" above."""
    global process
    _inherited.append(process)
    process.let_go()
    process = Process()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=forget)
atexit.register(lambda: process.end())
# Called before those of modules imported earlier, of which concurrent.futures' waits for threads.
# It isn't public; without it, a receive() of sync code that waits holds up the end of the process.
_register: Callable[..., Any] | None = getattr(threading, "_register_atexit", None)
if _register is not None:
    _register(lambda: process.sync_receivers.refuse())
