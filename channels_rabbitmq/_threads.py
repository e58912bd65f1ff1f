"""Run calls that block in daemon threads of our own.

The event loop's default executor won't do, for two reasons. It belongs to the application: a few
calls that hang would fill it and hold up the application's ``asyncio.to_thread``. And first
``asyncio.run`` and then the interpreter wait for its threads: with a name server that didn't
answer, a process ended 25 to 45 seconds late. Daemon threads hold up neither.

A call that hangs is not made again: later callers wait for the call that runs. So it costs one
thread, however often it is tried.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from ._futures import look_at

T = TypeVar("T")


class _Future(concurrent.futures.Future[T]):
    """A future that may end after the event loop that waits for it was closed."""

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[T]], object]) -> None:
        def call(future: concurrent.futures.Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # that loop is closed
                fn(future)

        super().add_done_callback(call)


class DaemonThreads(concurrent.futures.Executor):
    """Runs each call in a daemon thread of its own; ``kind`` is in the thread's name."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def submit(
        self, fn: Callable[..., T], /, *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future[T]:
        """Run a call. Raises RuntimeError if no thread can be started."""
        future = _Future[T]()
        _start(self._kind, lambda: _run(future, lambda: fn(*args, **kwargs)))
        return future


def _start(kind: str, target: Callable[[], None]) -> None:
    threading.Thread(target=target, name=f"channels_rabbitmq {kind}", daemon=True).start()


def _run(future: concurrent.futures.Future[T], function: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as err:
        future.set_exception(err)
    else:
        future.set_result(result)


# The running calls of all event loops, by process, kind and key. The process is in the key because
# a fork's child inherits this dict but not the threads. There is no lock, since a fork could leave
# it taken for ever.
_running: dict[tuple[Hashable, ...], concurrent.futures.Future[Any]] = {}


async def call_once(kind: str, key: Hashable, function: Callable[[], T]) -> T:
    """Return ``function()``, called in a daemon thread; share the call if it already runs.

    Calls with the same ``kind`` and ``key`` are the same. If the caller is cancelled, the call in
    the thread goes on. Raises the function's exceptions, and OSError if no thread can be started.
    """
    own: concurrent.futures.Future[T] = _Future()
    whole_key = (os.getpid(), kind, key)
    future = _running.setdefault(whole_key, own)
    if future is own:

        def call() -> T:
            try:
                return function()
            finally:
                del _running[whole_key]

        try:
            _start(kind, lambda: _run(own, call))
        except RuntimeError as err:
            if threading.main_thread().is_alive():
                del _running[whole_key]
                own.set_exception(OSError(f"no thread can be started: {err}"))
            else:
                # Once the main thread has ended, no thread can be started. Other threads may go on
                # for long. For them a call that blocks is better than none.
                _run(own, call)
    result = asyncio.wrap_future(future)
    result.add_done_callback(look_at)
    # Don't await the future itself: a caller that is cancelled would cancel it for the others.
    return await asyncio.shield(result)
