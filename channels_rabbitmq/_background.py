"""What belongs to the whole process: who serves which event loop; the background loop; fork, exit.

**Who serves.** A running event loop of the user's has a ``LoopLayer`` of its own. A loop that
``async_to_sync`` has made lives for one call only; its calls are forwarded to the *background
loop*, one daemon thread for the process, where each layer has one ``LoopLayer`` for all sync code.
(``async_to_sync`` in a thread of ``sync_to_async`` makes no loop; it uses the one that waits.)

**Fork.** A child inherits memory, but not the threads that worked on it, and it shares sockets,
epoll and self-pipes with its parent: closing an inherited transport takes the parent's socket out
of the common epoll and leaves the parent deaf. So all state is in one object. A child gets a new
one; the old one is never touched again, nor freed, which would close things.

**Exit.** Connections want a farewell. But at ``atexit`` no thread can be started, and no executor
works. What runs still runs, so the loops of other threads are told to close; those that have
stopped and were not closed (daphne's) are run for a moment. Before that, when the interpreter
begins to end, it waits for the threads of ``async_to_sync``, so for calls that may wait for ever:
these are refused then.

**Threads.** What several threads look at is changed under the lock, or by one operation on a dict
or a set. While the lock is held nothing waits, and nothing of the user's is called. The garbage
collector may call ``LoopLayers.abandon`` in any thread at any moment: it doesn't take the lock.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures.thread  # now: see the end of this module
import contextlib
import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from asgiref.sync import AsyncToSync

from ._forwarding import Forwarder, SyncForwarder, SyncReceivers
from ._loop_layer import LoopLayer
from ._settings import Settings
from .exceptions import BrokerUnavailable

logger = logging.getLogger(__name__)

# Seconds that all closing may take when the process ends.
_EXIT_TIMEOUT = 3.0
# How many ids of loops that have ended are remembered, for the sake of the error's text.
_REMEMBERED_IDS = 1000


class LoopLayers:
    """The ``LoopLayer`` of each event loop that uses one layer in this process."""

    def __init__(self, settings: Settings, capacity_of: Callable[[str], int]) -> None:
        self._settings = settings
        self._capacity_of = capacity_of
        self.process = _process
        self.process.all_loop_layers.add(self)
        # Who serves each event loop; those of loops that have ended go when a new one comes.
        self.serving: dict[asyncio.AbstractEventLoop, LoopLayer | SyncForwarder] = {}
        self._by_id: dict[str, LoopLayer] = {}
        self._ended_ids: dict[str, None] = {}
        self._for_sync_code = _ForSyncCode(self)
        self._is_abandoned = False

    def serve(self) -> LoopLayer | SyncForwarder:
        """Decide who serves the running event loop, which ``serving`` hasn't got."""
        loop = asyncio.get_running_loop()
        with self.process.lock:
            if self.process.is_ending:
                raise BrokerUnavailable("The process is ending")
            self._forget_ended()
            found = self.serving[loop] = self._choose(loop)
        return found

    def _choose(self, loop: asyncio.AbstractEventLoop) -> LoopLayer | SyncForwarder:
        if self._for_sync_code.loop_layer is not None and self._for_sync_code.loop_layer.is_closed:
            self._for_sync_code = _ForSyncCode(self)
        if is_of_async_to_sync(loop):
            return SyncForwarder(
                self.process.background().loop,
                self._for_sync_code.get,
                self._settings,
                self.process.sync_receivers,
            )
        if loop is self.process.background_loop():
            return self._for_sync_code.get()
        return self.make()

    def make(self) -> LoopLayer:
        """Make a ``LoopLayer`` for the running event loop."""
        loop_layer = LoopLayer(self._settings, self._capacity_of)
        self._by_id[loop_layer.id] = loop_layer
        return loop_layer

    def _forget_ended(self) -> None:
        for loop in [loop for loop in self.serving if loop.is_closed()]:
            del self.serving[loop]
        for id_, loop_layer in list(self._by_id.items()):
            if loop_layer.loop.is_closed():
                del self._by_id[id_]
                self._ended_ids[id_] = None
        while len(self._ended_ids) > _REMEMBERED_IDS:
            del self._ended_ids[next(iter(self._ended_ids))]

    def owner(self, channel: str) -> LoopLayer | Forwarder:
        """Return who serves a channel, whichever event loop has made it.

        Raises ValueError if that is no event loop of this process, or has ended.
        """
        id_ = channel.partition("!")[0]
        loop_layer = self._by_id.get(id_)
        if loop_layer is None and id_ not in self._ended_ids:
            raise ValueError(
                f"The channel {channel} belongs to another process, or to another layer: only who "
                "made it by new_channel() can receive from it, or add it to groups"
            )
        if loop_layer is None or loop_layer.loop.is_closed():
            raise ValueError(
                f"The channel {channel} belongs to an event loop of this process that has ended"
            )
        if loop_layer.loop is asyncio.get_running_loop():
            return loop_layer
        if not loop_layer.loop.is_running():
            raise ValueError(
                f"The channel {channel} belongs to an event loop of this process that isn't running"
            )
        found = loop_layer
        loop = asyncio.get_running_loop()
        sync_receivers = self.process.sync_receivers if is_of_async_to_sync(loop) else None
        return Forwarder(found.loop, lambda: found, self._settings, sync_receivers)

    def all(self) -> list[LoopLayer]:
        return list(self._by_id.values())

    def abandon(self) -> None:
        """Nobody has the layer any more: close everything. From any thread, at any moment."""
        if self.process is not _process:
            return  # That was before a fork.
        for loop_layer in self.all():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop_layer.loop.call_soon_threadsafe(_close_soon, loop_layer)
        self.process.all_loop_layers.discard(self)


class _ForSyncCode:
    """The one ``LoopLayer`` of a layer for all sync code, made by its first call."""

    def __init__(self, loop_layers: LoopLayers) -> None:
        self._loop_layers = loop_layers
        self.loop_layer: LoopLayer | None = None

    def get(self) -> LoopLayer:
        """To be called on the background loop."""
        if self.loop_layer is None:
            self.loop_layer = self._loop_layers.make()
        return self.loop_layer


# Tasks that close what nobody has any more: asyncio alone would let them be collected.
_closing: set[asyncio.Task[None]] = set()


def _close_soon(loop_layer: LoopLayer) -> None:
    task = loop_layer.loop.create_task(loop_layer.close(), name="channels_rabbitmq close")
    _closing.add(task)
    task.add_done_callback(_closing.discard)


def is_of_async_to_sync(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether ``async_to_sync`` has made this loop for one call."""
    # asgiref has had this dict since 3.5; should it go, such loops have connections of their own.
    return loop in getattr(AsyncToSync, "loop_thread_executors", ())


class BackgroundLoop:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="channels_rabbitmq", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as err:  # the interpreter is ending
            self.loop.close()
            raise BrokerUnavailable(f"The process is ending: {err}") from None

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self.loop.run_until_complete(asyncio.wait(tasks))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def stop(self, timeout: float) -> None:
        with contextlib.suppress(RuntimeError):  # closed
            self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout)


class Process:
    """All state of one process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.all_loop_layers: set[LoopLayers] = set()
        self.sync_receivers = SyncReceivers()
        self.is_ending = False
        self._background: BackgroundLoop | None = None

    def background(self) -> BackgroundLoop:
        """Return the background loop; starts it at the first need. To be called with the lock."""
        if self._background is None or not self._background.is_alive():
            self._background = BackgroundLoop()
        return self._background

    def background_loop(self) -> asyncio.AbstractEventLoop | None:
        return None if self._background is None else self._background.loop

    def end(self) -> None:
        """Close everything: see "Exit"."""
        self.is_ending = True
        deadline = time.monotonic() + _EXIT_TIMEOUT
        loop_layers = [one for layers in list(self.all_loop_layers) for one in layers.all()]
        running = [one for one in loop_layers if one.loop.is_running()]
        told = [
            asyncio.run_coroutine_threadsafe(one.leave(cancel_receivers=False), one.loop)
            for one in running
        ]
        for one in loop_layers:
            if one not in running and not one.loop.is_closed() and time.monotonic() < deadline:
                _run_for_a_moment(one)
        concurrent.futures.wait(told, timeout=max(0.0, deadline - time.monotonic()))
        if self._background is not None:
            self._background.stop(max(0.0, deadline - time.monotonic()))


def _run_for_a_moment(loop_layer: LoopLayer) -> None:
    try:
        loop_layer.loop.run_until_complete(loop_layer.leave(cancel_receivers=True))
    except Exception as err:
        logger.debug("not closed at the end of the process: %s", err)


# The one place.
_process = Process()


def current_process() -> Process:
    return _process


def _forget() -> None:
    """In the child of a fork: see there."""
    global _process
    # Not even the interpreter's end may free it, so what counts references has to be told.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_process))
    _process = Process()


def _end() -> None:
    _process.end()


def _refuse_sync_receivers() -> None:
    _process.sync_receivers.refuse()


os.register_at_fork(after_in_child=_forget)
atexit.register(_end)
# These callbacks are called in reverse order, and that of concurrent.futures waits for the threads
# of async_to_sync. It isn't public; without it a call that waits holds up the end of the process.
_register: Callable[..., Any] | None = getattr(threading, "_register_atexit", None)
if _register is not None:
    _register(_refuse_sync_receivers)
