"""Heartbeats (AMQP 0-9-1, section 4.2.7): sent to the broker, and expected from it.

**Silence.** The broker counts as dead after an interval and a half without a byte. But the loop
itself may have been held up, by a blocking call in a handler or a suspended laptop. Then the bytes
that came meanwhile aren't read yet, so after a late tick the broker has until the next one.

**Beats.** A broker that is heard and still doesn't answer has lost something. One that isn't heard
may be frozen, and answers everything when it goes on. So the time for an answer is counted in
*beats*: reads from the socket, each almost half an interval or more after the one before, which is
how often RabbitMQ sends a heartbeat (measured on 3.10 and 4.0: every 2.00 s with an interval of 4;
the first after other traffic takes up to an interval). Other traffic counts like a heartbeat,
because RabbitMQ sends none while it sends something else. At an interval of 20 s an AMQP channel
that hung was left after 34.6 s.
Without heartbeats a broker that is frozen looks like one that is not: then the time counts.

**Standstill.** A loop that didn't run for a while doesn't know what has become of its connection.
By ``fresh_until`` a sender sees, for one look at the clock, that the socket must be read before it
writes. It is a time of the wall clock, which goes on while a machine sleeps; a clock that is set
costs one needless read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

from .frames import FRAME_END, HEARTBEAT

_FRAME = bytes([HEARTBEAT, 0, 0, 0, 0, 0, 0, FRAME_END])

# Seconds: the interval by which ticks and standstill are measured if there are no heartbeats.
_INTERVAL_WITHOUT_HEARTBEATS = 20.0
# Intervals between two beats: half a one, and a little less for a heartbeat that comes early.
_BEAT = 0.4
# How many beats an answer may take. And seconds, without heartbeats: as long as a silence may last
# with those of the default interval.
_PATIENCE = 2
_PATIENCE_WITHOUT_HEARTBEATS = 30.0

# It goes on while the machine is suspended, as loop.time() doesn't. (On macOS the second does.)
_CLOCK = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))


def _time_awake_or_asleep() -> float:
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


class Mark(NamedTuple):
    """A moment from which an answer is waited for."""

    beats: int
    at: float  # loop time


class Heartbeat:
    """Sends a heartbeat twice an interval, and calls ``on_dead`` after a silence.

    ``on_tick`` is called four times an interval, also if that is 0 (then every 5 s).
    """

    def __init__(
        self,
        interval: float,
        *,
        write: Callable[[bytes], None],
        on_dead: Callable[[], None],
        on_tick: Callable[[], None],
        clock: Callable[[], float] = _time_awake_or_asleep,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.has_heartbeats = interval > 0
        self._interval = interval or _INTERVAL_WITHOUT_HEARTBEATS
        self._tick_length = self._interval / 4
        self._write = write
        self._on_dead = on_dead
        self._on_tick = on_tick
        self._clock = clock
        self._heard_at = self._loop.time()
        self._was_heard = True  # since the last tick
        self._beats = 0
        self._next_beat_at = self._heard_at
        self._asleep = self._time_asleep()
        self._ticks = 0
        self.fresh_until = 0.0  # time.time() from which the socket is to be read before a write
        self.refresh()
        self._timer: asyncio.TimerHandle | None = self._schedule()

    def _schedule(self) -> asyncio.TimerHandle:
        self._tick_deadline = self._loop.time() + self._tick_length
        return self._loop.call_at(self._tick_deadline, self._tick)

    def _time_asleep(self) -> float:
        """Return seconds, from any moment on, that loop.time() has missed."""
        return self._clock() - self._loop.time()

    def received(self) -> None:
        """Note that the broker sent something."""
        now = self._heard_at = self._loop.time()
        self._was_heard = True
        if now >= self._next_beat_at:
            self._beats += 1
            self._next_beat_at = now + self._interval * _BEAT

    def mark(self) -> Mark:
        """Begin to wait for an answer."""
        return Mark(self._beats, self._loop.time())

    def is_overdue(self, mark: Mark) -> bool:
        """Whether an answer that is waited for since ``mark`` will not come any more."""
        if self.has_heartbeats:
            return self._beats - mark.beats >= _PATIENCE
        return self._loop.time() - mark.at >= _PATIENCE_WITHOUT_HEARTBEATS

    def refresh(self) -> None:
        """Note that the loop runs, so that all that came has been read."""
        self.fresh_until = time.time() + self._interval

    @property
    def late_by(self) -> float:
        """Seconds for which the next tick has been due. From any thread."""
        return self._loop.time() - self._tick_deadline

    def is_silent_for(self, intervals: float) -> bool:
        """Whether the broker hasn't been heard for so long; never without heartbeats."""
        silence = self._loop.time() - self._heard_at + self._time_asleep() - self._asleep
        return self.has_heartbeats and silence > intervals * self._interval

    def _tick(self) -> None:
        late = self._is_late()
        if not late:  # else what came meanwhile isn't read yet
            if self._was_heard or not self.has_heartbeats:
                self.refresh()
            elif self.is_silent_for(1.5):
                self._timer = None
                self._on_dead()
                return
        self._was_heard = False
        self._ticks += 1
        if self.has_heartbeats and (self._ticks % 2 or late):
            self._write(_FRAME)
        self._timer = self._schedule()
        self._on_tick()

    def _is_late(self) -> bool:
        """Whether the loop, or the whole machine, stood still before this tick."""
        before, self._asleep = self._asleep, self._time_asleep()
        slept = max(0.0, self._asleep - before)
        if not self._was_heard:  # else that may have been after it woke up
            self._heard_at -= slept
        return self._loop.time() - self._tick_deadline + slept > self._tick_length

    def cancel(self) -> None:
        """Stop; ``on_dead`` and ``on_tick`` are not called any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
