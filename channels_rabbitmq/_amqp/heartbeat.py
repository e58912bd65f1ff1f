"""Heartbeats (AMQP 0-9-1, section 4.2.7): show that we live, notice that the broker doesn't."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .frames import FRAME_END, HEARTBEAT

_FRAME = bytes([HEARTBEAT, 0, 0, 0, 0, 0, 0, FRAME_END])


class Heartbeat:
    """Sends a heartbeat twice an interval, and calls ``on_dead`` after a silence.

    One class instead of carehare's two, which take an interval of 0 ("no heartbeats") for "dead
    at once". The broker counts as dead after an interval and a half without a byte. The loop
    itself may have been held up (a blocking call in a handler, a suspended laptop): the bytes that
    came meanwhile aren't read yet, so a tick that comes late only gives another chance.
    """

    def __init__(
        self, interval: float, *, write: Callable[[bytes], None], on_dead: Callable[[], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._tick_length = interval / 4
        self._write = write
        self._on_dead = on_dead
        self._received = True
        self._silent_ticks = 0
        self._ticks = 0
        self._timer = self._schedule() if interval > 0 else None

    def _schedule(self) -> asyncio.TimerHandle:
        self._tick_deadline = self._loop.time() + self._tick_length
        return self._loop.call_at(self._tick_deadline, self._tick)

    def received(self) -> None:
        """Note that the broker sent something."""
        self._received = True

    def _tick(self) -> None:
        late = self._loop.time() - self._tick_deadline > self._tick_length
        if self._received:
            self._silent_ticks = 0
        elif not late:
            self._silent_ticks += 1
        self._received = False
        if self._silent_ticks >= 6:
            self._timer = None
            self._on_dead()
            return
        self._ticks += 1
        if self._ticks % 2 or late:
            self._write(_FRAME)
        self._timer = self._schedule()

    def cancel(self) -> None:
        """Stop; ``on_dead`` is not called any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
