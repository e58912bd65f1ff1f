"""How old messages are when they are received.

The broker drops a message that has waited for ``expiry``, and reports that to no process. So the
messages that do arrive are the only sign of it: if they are nearly as old as ``expiry``, older ones
were dropped. Each message carries the time of its publishing, by the clock of the machine that sent
it. If the clocks of two machines differ, the ages are wrong by that difference.
"""

from __future__ import annotations

from collections.abc import Callable

# Seconds over which a maximum is taken. The reported age is that of the last one to two windows.
WINDOW = 30.0


class Ages:
    """The highest age of the last half minute or minute, on one event loop.

    ``report(age, channel)`` is called when an age is the highest of its window and above
    ``warn_above`` seconds.
    """

    def __init__(self, *, warn_above: float, report: Callable[[float, str], None]) -> None:
        self._warn_above = warn_above
        self._report = report
        # The router calls note() for higher ages only, to save the call for each message.
        self.highest = 0.0
        self._previous = 0.0  # of the window before
        self._began_at = 0.0

    def note(self, age: float, channel: str, now: float) -> None:
        """Note an age in seconds; ``now`` is by the same clock at each call."""
        self.begin_window(now)
        if age > self.highest:
            self.highest = age
            if age > self._warn_above:
                self._report(age, channel)

    def begin_window(self, now: float) -> None:
        """Begin a new window if the present one is over. The caller calls this now and then."""
        if now - self._began_at >= WINDOW:
            self._previous = self.newest(now)
            self.highest, self._began_at = 0.0, now

    def newest(self, now: float) -> float:
        """Return the highest age in seconds; 0 if no message came lately. Any thread may call."""
        since = now - self._began_at
        if since >= 2 * WINDOW:
            return 0.0
        return self.highest if since >= WINDOW else max(self.highest, self._previous)
