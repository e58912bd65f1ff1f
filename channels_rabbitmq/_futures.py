"""Futures, and waiting with a time limit, so that cancelling one task harms no other.

Code that sets a future's result asks first whether the future is done: ``resolve``, ``fail``. Its
waiter may have been cancelled. (carehare doesn't ask, and the ``InvalidStateError`` ends its
connection. ``asyncio.shield`` around each future would do too, at 9 us a call.)

**Cancellation.** The future of a cancelled waiter is done, so wakers pass over it. But a waiter may
also be cancelled in the same turn of the loop in which it was woken. Then its future has a result,
and it raises ``CancelledError`` all the same. So a waiter that was given something hands it on, in
``FairLock.acquire``. ``Waiters.wake`` gives all waiters the same news, so nothing is lost with one.

**Time limits** are ``wait_until`` and ``run_until``, and not ``asyncio.wait_for``. Up to Python
3.11 that swallows a cancellation that arrives together with the result: then the task that
``asyncio.run`` cancels at the end goes on for ever.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from collections.abc import Callable, Collection, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def resolve(future: asyncio.Future[T], result: T) -> None:
    """Set the result, unless the future is done."""
    if not future.done():
        future.set_result(result)


def fail(future: asyncio.Future[T], exc: BaseException) -> None:
    """Set the exception, unless the future is done. asyncio won't log it if nobody looks at it."""
    if not future.done():
        future.set_exception(exc)
        future.exception()


def look_at(future: asyncio.Future[Any]) -> None:
    """Keep asyncio from logging an exception that is never looked at: a done callback."""
    if not future.cancelled():
        future.exception()


def call_at(at: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
    """Have the running loop call ``callback`` at that moment (loop time), in an empty context.

    The caller's context would live as long as timers follow one another.
    """
    loop = asyncio.get_running_loop()
    return loop.call_at(at, callback, context=contextvars.Context())


def start_task(coroutine: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
    """Start a task of the running loop, in an empty context.

    The context of the first caller would live as long as the task.
    """
    create_task = asyncio.get_running_loop().create_task
    return contextvars.Context().run(create_task, coroutine, name=name)


async def wait_until(future: asyncio.Future[bool], deadline: float) -> bool:
    """Return the result of a future; it becomes False at ``deadline`` (loop time)."""
    timer = asyncio.get_running_loop().call_at(deadline, resolve, future, False)
    try:
        return await future
    finally:
        timer.cancel()


async def wait_all(futures: Collection[asyncio.Future[Any]], deadline: float) -> bool:
    """Return whether all are done by ``deadline`` (loop time). Cancelling it cancels none."""
    if not futures:
        return True
    timeout = max(0.0, deadline - asyncio.get_running_loop().time())
    _, pending = await asyncio.wait(futures, timeout=timeout)
    return not pending


class Waiters:
    """Calls that wait for one event, woken in the order in which they came."""

    __slots__ = ("_futures",)

    def __init__(self) -> None:
        self._futures: dict[asyncio.Future[bool], None] = {}

    def __len__(self) -> int:
        return len(self._futures)

    async def wait(self, deadline: float) -> bool:
        """Wait until ``wake`` is called (True) or until ``deadline``, in loop time (False)."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._futures[future] = None
        try:
            return await wait_until(future, deadline)
        finally:
            self._futures.pop(future, None)

    def wake(self) -> None:
        """Let all calls that wait now go on."""
        futures, self._futures = self._futures, {}
        for future in futures:
            resolve(future, True)

    def cancel(self) -> None:
        """Cancel all calls that wait now."""
        for future in self._futures:
            future.cancel()


class FairLock:
    """A lock for one call at a time, the one with the earliest deadline first.

    If all calls have the same time limit, that is the order in which they were made, also if they
    reach ``acquire`` in another one.
    """

    __slots__ = ("_is_locked", "_numbers", "_queue", "is_aborted", "users")

    def __init__(self) -> None:
        self.users = 0  # for its owner, to count calls that have it or wait for it
        self.is_aborted = False
        self._is_locked = False
        # A heap of (deadline, number, future)
        self._queue: list[tuple[float, int, asyncio.Future[bool]]] = []
        self._numbers = itertools.count()

    async def acquire(self, deadline: float) -> bool:
        """Wait for the lock; False if it isn't there by ``deadline`` (loop time)."""
        if self.is_aborted or not self._is_locked:
            self._is_locked = True
            return True
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, (deadline, next(self._numbers), future))
        try:
            return await wait_until(future, deadline)
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.result():
                self.release()
            raise

    def release(self) -> None:
        """Let the next call have the lock."""
        while self._queue:
            _, _, future = heapq.heappop(self._queue)
            if not future.done():
                future.set_result(True)
                return
        self._is_locked = False

    def abort(self) -> None:
        """Let all calls that wait, and all later ones, go on at once."""
        self.is_aborted = True
        for _, _, future in self._queue:
            resolve(future, True)
        self._queue.clear()

    def cancel(self) -> None:
        """Cancel all calls that wait now."""
        for _, _, future in self._queue:
            future.cancel()


async def run_until(deadline: float, coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine until ``deadline`` (loop time); then cancel it and raise TimeoutError.

    However this ends, the coroutine has ended too. So it mustn't delay its own cancellation.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(coroutine)
    await ends_in_time(task, max(0.0, deadline - loop.time()))
    if task.cancelled():
        raise TimeoutError
    return task.result()


async def ends_in_time(
    task: asyncio.Task[Any], timeout: float, *, cancel_timeout: float | None = None
) -> bool:
    """Return whether a task ends within ``timeout`` seconds; if it doesn't, cancel it.

    Also if this is cancelled itself, it waits until the task has ended, but not longer than
    ``cancel_timeout`` seconds.
    """
    is_destroyed = False
    try:
        done, _ = await asyncio.wait([task], timeout=timeout)
    except GeneratorExit:  # The event loop was closed: nothing more can be awaited.
        is_destroyed = True
        raise
    finally:
        task.add_done_callback(look_at)
        if not task.done() and not is_destroyed:
            task.cancel()
            await asyncio.wait([task], timeout=cancel_timeout)
    return bool(done)
