"""``Ticker``: calls the router now and then while it holds messages, and reports slow channels."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .router import TICK_INTERVAL, Router

# A tick that is late by more seconds shows that the event loop was held up.
_STANDSTILL = 0.5


class Ticker:
    """The timer of one router, on the running event loop.

    ``report_level(reason, channel, messages)`` is called at each tick for channels that are behind.
    While all of ``local_capacity`` is in use, it is called for the fullest channels, too.
    """

    def __init__(
        self, router: Router, local_capacity: int, report_level: Callable[[str, str, int], None]
    ) -> None:
        self._router = router
        self._local_capacity = local_capacity
        self._report_level = report_level
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Tick as long as the router holds messages. Call this when it may have got one."""
        if self._timer is None and self._router.holds_messages:
            self._schedule()

    def stop(self) -> None:
        """Stop ticking, until the next ``start``."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _schedule(self) -> None:
        self._timer = self._loop.call_later(TICK_INTERVAL, self._tick)

    def _tick(self) -> None:
        assert self._timer is not None
        late_by = self._loop.time() - self._timer.when()
        self._schedule()  # first, in case that tick() should fail
        self._router.tick()
        if not self._router.holds_messages:
            self.stop()
        # After the loop has stood still, every channel is behind: that says nothing.
        if late_by < _STANDSTILL:
            self._report_backlogs()

    def _report_backlogs(self) -> None:
        for channel, messages in self._router.channels_behind():
            self._report_level("behind", channel, messages)
        if self._router.unacked >= self._local_capacity:
            for channel, messages in self._router.fullest_channels():
                self._report_level("back-pressure", channel, messages)
