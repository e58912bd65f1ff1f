"""How old messages are when they are received.

A message may wait on the broker until ``expiry`` ends it there, without a word to anybody. So the
messages that do arrive are the only sign of it: if they are nearly as old as ``expiry``, others
were older and are gone. Each carries the time of its publishing by the clock of the machine that
sent it; where the clocks differ, the ages are wrong by as much.
"""

from __future__ import annotations

from collections.abc import Callable

# Seconds over which a maximum is taken. What is told is that of the last one to two of them.
WINDOW = 30.0


class Ages:
    """The highest age of the last half minute or minute, on one event loop.

    ``report(age, channel)`` is called when an age is the highest of its window and above
    ``warn_above`` seconds.
    """

    def __init__(self, *, warn_above: float, report: Callable[[float, str], None]) -> None:
        self._warn_above = warn_above
        self._report = report
        # What isn't higher needn't be noted: asked for each message, so without a call.
        self.highest = 0.0
        self._previous = 0.0  # of the window before
        self._began_at = 0.0

    def note(self, age: float, channel: str, now: float) -> None:
        """Note an age above ``highest``; ``now`` is by the same clock at each call."""
        self.begin_window(now)
        self.highest = age
        if age > self._warn_above:
            self._report(age, channel)

    def begin_window(self, now: float) -> None:
        """Begin a new window if the present one is over. To be called now and then."""
        if now - self._began_at >= WINDOW:
            self._previous = self.newest(now)
            self.highest, self._began_at = 0.0, now

    def newest(self, now: float) -> float:
        """The highest age in seconds; 0 if nothing was received lately. From any thread."""
        since = now - self._began_at
        if since >= 2 * WINDOW:
            return 0.0
        return self.highest if since >= WINDOW else max(self.highest, self._previous)
