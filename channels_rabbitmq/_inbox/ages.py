"""How old messages are when they are received.

The broker drops a message that has waited for ``expiry``, and reports that to no process. So the
messages that do arrive are the only sign of it: if they are nearly as old as ``expiry``, older ones
were dropped. Each message carries the time of its publishing, by the clock of the machine that sent
it. If the clocks of two machines differ, the ages are wrong by that difference.
"""

from __future__ import annotations

from collections.abc import Callable

from .._windows import NewestMaximum


class Ages(NewestMaximum):
    """The highest age in seconds of the last half minute or minute, on one event loop.

    ``report(age, channel)`` is called when an age is the highest of its window and above
    ``warn_above`` seconds. The router calls ``note()`` for ages above ``highest`` only, to save the
    call for each message.
    """

    def __init__(self, *, warn_above: float, report: Callable[[float, str], None]) -> None:
        super().__init__()
        self._warn_above = warn_above
        self._report = report

    def note(self, age: float, channel: str, now: float) -> None:
        """Note an age in seconds; ``now`` is by the same clock at each call."""
        self.begin_window(now)
        if age > self.highest:
            self.highest = age
            if age > self._warn_above:
                self._report(age, channel)
