"""``NewestMaximum``: the highest value of the last half minute or minute."""

from __future__ import annotations

# Seconds over which a maximum is taken. The reported value is that of the last one to two windows.
WINDOW = 30.0


class NewestMaximum:
    """Keeps the highest value of this window and of the one before. No value is below 0."""

    def __init__(self) -> None:
        self.highest = 0.0
        self._previous = 0.0  # of the window before
        self._began_at = 0.0

    def begin_window(self, now: float) -> None:
        """Begin a new window if the present one is over. The caller calls this now and then.

        ``now``: seconds, by the same clock at each call.
        """
        if now - self._began_at >= WINDOW:
            self._previous = self.newest(now)
            self.highest, self._began_at = 0.0, now

    def newest(self, now: float) -> float:
        """Return the highest value; 0 if none came lately. Any thread may call."""
        since = now - self._began_at
        if since >= 2 * WINDOW:
            return 0.0
        return self.highest if since >= WINDOW else max(self.highest, self._previous)
