"""An event loop in a thread of its own, as a second server in the process would have it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

_TIMEOUT = 10.0  # seconds


class LoopThread:
    """``with LoopThread() as other: await other.run(coroutine)``; its end is ``asyncio.run``'s."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> LoopThread:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def _run(self) -> None:
        try:
            self.loop.run_until_complete(self._stop.wait())
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self.loop.run_until_complete(asyncio.wait(tasks))
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
        finally:
            self.loop.close()

    def end(self) -> None:
        """End the loop; blocks until it is closed. May be called twice."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        """Start it there; what it returns can be awaited here."""
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))

    def submit_from_thread(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it there; blocks until it has returned."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(_TIMEOUT)

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wait_for(self.submit(coroutine), _TIMEOUT)

    def block_until(self, condition: Callable[[], bool]) -> None:
        """Hold up the caller's own loop until this one has come to where the condition holds."""

        async def ask() -> bool:
            return condition()

        deadline = time.monotonic() + _TIMEOUT
        while not asyncio.run_coroutine_threadsafe(ask(), self.loop).result(_TIMEOUT):
            assert time.monotonic() < deadline, "no such change"
            time.sleep(0.001)
