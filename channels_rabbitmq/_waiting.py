"""Waiting with a time limit, such that nobody's cancellation harms anybody else.

Not ``asyncio.wait_for``: up to Python 3.11 it swallows a cancellation that comes together with the
result, and then the task that ``asyncio.run`` cancels at the end goes on for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from ._amqp.futures import look_at

T = TypeVar("T")


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
        timer = loop.call_at(deadline, _wake, future, False)
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
            _wake(future, True)

    def cancel(self) -> None:
        """Cancel everybody who waits now."""
        for future in self._futures:
            future.cancel()


def _wake(future: asyncio.Future[bool], result: bool) -> None:
    if not future.done():
        future.set_result(result)


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
