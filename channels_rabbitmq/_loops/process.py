"""``Process``: all state that belongs to one process, and what a fork and the exit do to it.

**Fork.** A child inherits memory, but not the threads that worked on it, and it shares sockets,
epoll and self-pipes with its parent: closing an inherited transport takes the parent's socket out
of the common epoll and leaves the parent deaf. So all state is in one ``Process``. A child gets a
new one; the old one is never used again, nor freed, which would close things. (A fork that Python
isn't told of is noticed, but not if it happens in a coroutine.)

**Exit.** Connections should be closed in an orderly way. But at ``atexit`` no thread can be
started, and no executor works. Running event loops still run, so those of other threads are told
to close. Loops that have stopped and were not closed (daphne's) are run for a moment. Before
``atexit``, Python joins the worker threads of ``async_to_sync``. A ``receive()`` that waits there
would block it for ever, so such calls are ended first and refused from then on.

**Threads.** State that several threads look at is changed under the lock, or by one operation on a
dict or a set. The holder of the lock doesn't wait for other threads' work.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures.thread  # now: see the end of this module
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from .._broker.shared import Shared
from .._loop_layer import LoopLayer
from .._settings.settings import Settings
from .background import BackgroundLoop
from .calls import SyncReceivers

logger = logging.getLogger("channels_rabbitmq.sync")

# Seconds that all closing may take when the process ends.
_EXIT_TIMEOUT = 3.0


class Registry(Protocol):
    """What a process needs of the ``LoopLayers`` of one layer."""

    def all(self) -> list[LoopLayer]:
        """Return those whose event loops can still be run."""

    def detach(self) -> None:
        """In a fork's child: serve nothing with what the parent has made."""

    def start_over(self) -> None:
        """Close what is open; the next call begins as the first one did."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing is open and nothing will be opened."""


# Gets the settings of a layer, and what its event loops share. Returns the settings to use.
Prepare = Callable[[Settings, Shared], Settings]


def _change_nothing(settings: Settings, shared: Shared) -> Settings:
    return settings


class Process:
    """All state of one process.

    ``prepare`` is called once for each layer, by its first call, which gets its exceptions. It is
    for ``testing``.
    """

    def __init__(self, prepare: Prepare = _change_nothing) -> None:
        self.prepare = prepare
        self._pid = os.getpid()
        self.lock = threading.Lock()
        self.sync_receivers = SyncReceivers()
        # Tasks that nothing else refers to: asyncio alone would let them be collected.
        self.closing: set[asyncio.Task[None]] = set()
        self.is_ending = False
        self._registries: set[Registry] = set()
        self._background: BackgroundLoop | None = None

    @property
    def is_inherited(self) -> bool:
        """Whether this is a fork's child, and Python was not told of the fork."""
        return self._pid != os.getpid()

    def is_current(self) -> bool:
        """Whether this is the process that runs now, and not its parent."""
        return self is _current and not self.is_inherited

    def add(self, registry: Registry) -> None:
        """Note the ``LoopLayers`` of a layer, until they are finished."""
        for one in [one for one in list(self._registries) if one.is_finished]:
            self._registries.discard(one)
        self._registries.add(registry)

    def background(self) -> BackgroundLoop:
        """Return the background loop; the first call starts it. To be called with the lock."""
        if self._background is None or not self._background.is_alive():
            self._background = BackgroundLoop()
        return self._background

    def is_background(self, loop: asyncio.AbstractEventLoop) -> bool:
        return self._background is not None and self._background.loop is loop

    def detach(self) -> None:
        """In a fork's child: use nothing of the parent's."""
        for registry in self._registries:
            registry.detach()

    def registries(self) -> list[Registry]:
        """Return the ``LoopLayers`` of each layer."""
        return list(self._registries)

    def close_at_exit(self) -> None:
        """Close everything, within ``_EXIT_TIMEOUT`` or not at all: see "Exit"."""
        self.is_ending = True
        deadline = time.monotonic() + _EXIT_TIMEOUT
        self.close_all(deadline)
        if self._background is not None:
            self._background.close(max(0.0, deadline - time.monotonic()))

    def close_all(self, deadline: float) -> None:
        """Close what all event loops have, by ``deadline`` (``time.monotonic()``) or not at all."""
        scheduled = []
        stopped = []
        for registry in list(self._registries):
            for loop_layer in registry.all():
                if loop_layer.loop.is_running():
                    scheduled.append(self._schedule_close(loop_layer))
                else:
                    stopped.append(loop_layer)
        for loop_layer in stopped:
            if time.monotonic() < deadline:
                _run_close(loop_layer)
        concurrent.futures.wait(scheduled, timeout=max(0.0, deadline - time.monotonic()))

    def _schedule_close(self, loop_layer: LoopLayer) -> concurrent.futures.Future[None]:
        """Have a running loop of another thread close what it has."""
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        async def close() -> None:
            try:
                await loop_layer.close_at_exit(cancel_calls=False)
            finally:
                done.set_result(None)

        def start() -> None:
            self.closing.add(loop_layer.loop.create_task(close()))

        try:
            loop_layer.loop.call_soon_threadsafe(start)
        except RuntimeError:  # closed in this very moment
            done.set_result(None)
        return done


def _run_close(loop_layer: LoopLayer) -> None:
    """Run a loop that has stopped, so that it can close what it has."""
    closing = loop_layer.close_at_exit(cancel_calls=True)
    try:
        loop_layer.loop.run_until_complete(closing)
    except Exception as err:
        closing.close()
        logger.debug("not closed at the end of the process: %s", err)


_current = Process()

# The states of parents, for ever: freeing one would close sockets, and say so. (The end of the
# interpreter, which empties this list, does neither: tried with Python 3.10 to 3.15.)
_inherited: list[Process] = []


def current() -> Process:
    """Return the state of the process that runs."""
    if _current.is_inherited:
        reset_after_fork()
    return _current


def reset_after_fork() -> None:
    """Begin anew, in the child of a fork: see "Fork" above."""
    global _current
    _inherited.append(_current)
    _current.detach()
    _current = Process(_current.prepare)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=reset_after_fork)
atexit.register(lambda: _current.close_at_exit())
# Called before those of modules imported earlier, of which concurrent.futures' waits for threads.
# It isn't public; without it, a receive() of sync code that waits holds up the end of the process.
_register: Callable[..., Any] | None = getattr(threading, "_register_atexit", None)
if _register is not None:
    _register(lambda: _current.sync_receivers.refuse())
