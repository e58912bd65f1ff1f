"""Futures and waiting: nobody's cancellation harms anybody else.

Whoever answers a future asks first whether it was cancelled: ``resolve``, ``fail``. (carehare
doesn't, and the ``InvalidStateError`` ends its connection. ``asyncio.shield`` around each future
would do too, at 9 us a call.)

Waiting with a time limit is ``Waiters.wait`` and ``run_until``. Not ``asyncio.wait_for``: up to
Python 3.11 it swallows a cancellation that comes together with the result, and then the task that
``asyncio.run`` cancels at the end goes on for ever.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def resolve(future: asyncio.Future[T], result: T) -> None:
    """Set the result, unless the one who waits is gone."""
    if not future.done():
        future.set_result(result)


def fail(future: asyncio.Future[T], exc: BaseException) -> None:
    """Set the exception, unless the one who waits is gone; asyncio won't mind if nobody looks."""
    if not future.done():
        future.set_exception(exc)
        future.exception()


def look_at(future: asyncio.Future[Any]) -> None:
    """Have asyncio not complain of an exception that nobody sees: a callback for one that ends."""
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


class Waiters:
    """Callers that wait for one event, each on a future of its own, woken in order."""

    __slots__ = ("_futures",)

    def __init__(self) -> None:
        self._futures: dict[asyncio.Future[bool], None] = {}

    def __len__(self) -> int:
        return len(self._futures)

    async def wait(self, deadline: float) -> bool:
        """Wait until ``wake`` is called (True) or until ``deadline``, in loop time (False)."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()
        timer = loop.call_at(deadline, resolve, future, False)
        self._futures[future] = None
        try:
            return await future
        finally:
            timer.cancel()
            self._futures.pop(future, None)

    def wake(self) -> None:
        """Let everybody who waits now go on."""
        futures, self._futures = self._futures, {}
        for future in futures:
            resolve(future, True)

    def cancel(self) -> None:
        """Cancel everybody who waits now."""
        for future in self._futures:
            future.cancel()


async def run_until(deadline: float, coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine until ``deadline``, in loop time; then cancel it and raise TimeoutError.

    However this ends, the coroutine has ended too (it must not hold up its own cancellation).
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(coroutine)
    is_destroyed = False
    try:
        await asyncio.wait([task], timeout=max(0.0, deadline - loop.time()))
    except GeneratorExit:  # The event loop was closed: nothing more can be awaited.
        is_destroyed = True
        raise
    finally:
        task.add_done_callback(look_at)
        if not task.done() and not is_destroyed:
            task.cancel()
            await asyncio.wait([task])
    if task.cancelled():
        raise TimeoutError
    return task.result()
