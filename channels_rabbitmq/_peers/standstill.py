"""``Standstill``: notices that the event loop stood still, for so long that requests were lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .._futures import call_at


class Standstill:
    """Calls ``on_stood_still(since)``, in loop time, after more than ``longest`` seconds.

    A timer looks at the time twice in ``longest`` seconds. Code that relies on having heard all
    calls ``check`` before: after a standstill it may run before the timer does.
    """

    def __init__(self, longest: float, on_stood_still: Callable[[float], None]) -> None:
        self._longest = longest
        self._on_stood_still = on_stood_still
        self._loop = asyncio.get_running_loop()
        self._seen = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look at the time from now on."""
        if self._timer is None:
            self._seen = self._loop.time()
            self._look()

    def _look(self) -> None:
        self._timer = call_at(self._loop.time() + self._longest / 2, self._look)
        self.check()

    def check(self) -> None:
        """Look now, if it has been started."""
        before, self._seen = self._seen, self._loop.time()
        if self._timer is not None and self._seen - before > self._longest:
            self._on_stood_still(before)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
