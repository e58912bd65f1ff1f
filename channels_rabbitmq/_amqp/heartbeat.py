"""Send heartbeats to the broker and expect its own (AMQP 0-9-1, section 4.2.7).

**Silence.** The broker counts as dead after an interval and a half without a byte. But a blocking
call in a handler, or a suspended laptop, may have held up the event loop. Then the bytes that came
meanwhile aren't read yet. So after a late tick the broker has time until the next tick.

**Beats.** If the broker sends bytes and still doesn't answer, no answer will come. If it sends
nothing, it may be frozen, and answers everything when it goes on. So the time for an answer is
counted in *beats*. A beat is a read from the socket, almost half an interval or more after the
beat before it. That is how often RabbitMQ sends a heartbeat: measured on 3.10 and 4.0, every 2.00 s
with an interval of 4 s; the first one after other traffic takes up to an interval. Other traffic
counts like a heartbeat, because RabbitMQ sends none while it sends something else. At an interval
of 20 s the layer left an AMQP channel that hung after 34.6 s.
Without heartbeats a frozen broker looks like any other, so the time counts instead.

**Standstill.** A loop that stood still doesn't know whether its connection is still open. A
Connection.Close of RabbitMQ's may lie in the socket, and what is written then is lost without an
error. (A handler that blocked for one second was enough, if RabbitMQ closed the connection in it.)
A loop that stood still can't be told from one that had nothing to do. So a sender compares the
clock with ``fresh_until``, and if that has passed it asks the system whether the socket must be
read first. ``fresh_until`` is a time of the wall clock, which goes on while a machine sleeps. If
the clock is set, that costs one needless look.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

from .frames import FRAME_END, HEARTBEAT

_FRAME = bytes([HEARTBEAT, 0, 0, 0, 0, 0, 0, FRAME_END])

# The interval in seconds by which ticks and standstill are measured without heartbeats.
INTERVAL_WITHOUT_HEARTBEATS = 20.0
# The least time between two beats, in intervals: a little less than half a one, since a heartbeat
# may come early.
_BEAT = 0.4
# How many beats an answer may take, and how many seconds without heartbeats. The seconds are as
# many as a silence may last with the default interval.
_MOST_BEATS = 2
ANSWER_TIMEOUT_WITHOUT_HEARTBEATS = 30.0

# Seconds after the last read of the socket, or look at it, until a sender looks again. A look takes
# 1.4 microseconds of the 50 (CPU) and 100 (until the confirm) of a send that is awaited alone. To
# look at each send would cost a busy sender more: confirms lie in its socket, and it would wait
# each time until they are read.
FRESHNESS = 0.1

# A clock that goes on while the machine is suspended, unlike loop.time(). On macOS the second one
# goes on.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))


def _time_awake_or_asleep() -> float:
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


class Mark(NamedTuple):
    """The moment at which the wait for an answer began."""

    beats: int
    at: float  # loop time


class Heartbeat:
    """Sends a heartbeat twice an interval, and calls ``on_dead`` after a silence.

    ``on_tick`` is called four times an interval; without heartbeats (interval 0), every 5 s.
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
        self._interval = interval or INTERVAL_WITHOUT_HEARTBEATS
        self._tick_length = self._interval / 4
        self._write = write
        self._on_dead = on_dead
        self._on_tick = on_tick
        self._clock = clock
        self._heard_at = self._loop.time()
        self._was_heard = True  # whether bytes came since the last tick
        self._beats = 0
        self._next_beat_at = self._heard_at
        self._asleep = self._time_asleep()
        self._ticks = 0
        self.fresh_until = 0.0  # time.time() after which the socket must be read before a write
        self.refresh()
        self._timer: asyncio.TimerHandle | None = self._schedule()

    def _schedule(self) -> asyncio.TimerHandle:
        self._tick_deadline = self._loop.time() + self._tick_length
        return self._loop.call_at(self._tick_deadline, self._tick)

    def _time_asleep(self) -> float:
        """Return the seconds that loop.time() has missed, plus a constant."""
        return self._clock() - self._loop.time()

    def received(self) -> None:
        """Note that the broker sent something."""
        now = self._heard_at = self._loop.time()
        self._was_heard = True
        self.refresh()
        if now >= self._next_beat_at:
            self._beats += 1
            self._next_beat_at = now + self._interval * _BEAT

    def mark(self) -> Mark:
        """Return the mark for a wait that begins now."""
        return Mark(self._beats, self._loop.time())

    def is_overdue(self, mark: Mark) -> bool:
        """Whether the answer has taken too long since ``mark``, so that none will come."""
        if self.has_heartbeats:
            return self._beats - mark.beats >= _MOST_BEATS
        return self._loop.time() - mark.at >= ANSWER_TIMEOUT_WITHOUT_HEARTBEATS

    def refresh(self) -> None:
        """Note that all bytes that came have been read."""
        self.fresh_until = time.time() + FRESHNESS

    @property
    def late_by(self) -> float:
        """Seconds since the next tick was due; negative before. Any thread may read it."""
        return self._loop.time() - self._tick_deadline

    def is_silent_for(self, intervals: float) -> bool:
        """Whether no byte came for so many intervals. Without heartbeats it is False."""
        silence = self._loop.time() - self._heard_at + self._time_asleep() - self._asleep
        return self.has_heartbeats and silence > intervals * self._interval

    def _tick(self) -> None:
        late = self._is_late()
        # If it is late, bytes that came meanwhile aren't read yet.
        if not late and not self._was_heard and self.is_silent_for(1.5):
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
        if not self._was_heard:  # Bytes may have come after the machine woke up.
            self._heard_at -= slept
        return self._loop.time() - self._tick_deadline + slept > self._tick_length

    def stop(self) -> None:
        """Stop. ``on_dead`` and ``on_tick`` are not called after this."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
