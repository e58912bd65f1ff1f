"""An event loop whose time passes only when nothing is left to do at the present moment.

So a minute of sleeps takes a moment, and what happens when doesn't depend on the machine. Nothing
may wait for the outside world.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    """Instead of waiting until the next timer is due, moves the time on to it."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.now = 0.0
        self._limit = limit

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everybody waits, and nothing is going to happen")
        self.now += max(0.0, timeout)
        if self.now > self._limit:
            raise RuntimeError(f"it takes longer than {self._limit:g} s")
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time()`` is in seconds since it was made; it ends with an error after ``limit``."""

    def __init__(self, limit: float) -> None:
        self._virtual = _Selector(limit)
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now

    def work(self, seconds: float) -> None:
        """Keep the loop busy, as a consumer does that computes."""
        self._virtual.now += seconds


def run(coroutine: Coroutine[Any, Any, T], *, limit: float = 600.0) -> T:
    """Run a coroutine in virtual time; fails if that exceeds ``limit`` seconds."""
    with (
        asyncio.Runner(loop_factory=lambda: VirtualLoop(limit))
        if hasattr(asyncio, "Runner")
        else _Runner(limit) as runner
    ):
        return runner.run(coroutine)


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Have an async test run in virtual time."""

    @functools.wraps(test)
    def run_it(*args: Any, **kwargs: Any) -> None:
        run(test(*args, **kwargs))

    return run_it


class _Runner:
    """``asyncio.Runner``, as far as it is needed, for Python 3.10."""

    def __init__(self, limit: float) -> None:
        self._loop = VirtualLoop(limit)

    def __enter__(self) -> _Runner:
        return self

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(coroutine)

    def __exit__(self, *exc: object) -> None:
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.wait(tasks))
        self._loop.close()
