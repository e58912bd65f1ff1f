"""``Pauses``: normal channels from which this event loop receives nothing for a while."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from functools import partial

from .._futures import call_at
from .back_off import doubling_delays
from .reasons import REMINDER_INTERVAL

# Channels that are remembered. At that number, those that don't pause now are forgotten.
_MOST_CHANNELS = 1000


class _Pause:
    """The pauses of one channel, which follow one another."""

    __slots__ = ("delays", "quiet_until", "timer")

    def __init__(self) -> None:
        self.delays: Iterator[float] = doubling_delays()
        self.quiet_until = -math.inf  # loop time
        self.timer: asyncio.TimerHandle | None = None  # while it lasts


class Pauses:
    """The pauses of one event loop. ``on_end(channel)`` is called when one is over."""

    def __init__(self, on_end: Callable[[str], None]) -> None:
        self._on_end = on_end
        self._pauses: dict[str, _Pause] = {}  # by channel

    def holds(self, channel: str) -> bool:
        """Whether a channel pauses now."""
        pause = self._pauses.get(channel)
        return pause is not None and pause.timer is not None

    def begin(self, channel: str, seconds: float | None = None) -> bool:
        """Begin a pause, unless there is one, and return whether a warning about it is due.

        Without ``seconds``, each pause is longer than the one before, until ``end_series``.
        """
        if len(self._pauses) >= _MOST_CHANNELS:
            self._pauses = {name: one for name, one in self._pauses.items() if one.timer}
        pause = self._pauses.setdefault(channel, _Pause())
        now = asyncio.get_running_loop().time()
        if pause.timer is None:
            delay = next(pause.delays) if seconds is None else seconds
            pause.timer = call_at(now + delay, partial(self._end, channel))
        if now < pause.quiet_until:
            return False
        pause.quiet_until = now + REMINDER_INTERVAL
        return True

    def end_series(self, channel: str) -> None:
        """Note that the channel can be received from: the next pause is short again."""
        if channel in self._pauses:
            self._pauses[channel].delays = doubling_delays()

    def _end(self, channel: str) -> None:
        self._pauses[channel].timer = None
        self._on_end(channel)

    def close(self) -> None:
        """Stop the timers."""
        for pause in self._pauses.values():
            if pause.timer is not None:
                pause.timer.cancel()
        self._pauses.clear()
