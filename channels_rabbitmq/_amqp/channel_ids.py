"""Which numbers of AMQP channels are free."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import carehare

# AMQP 0-9-1 writes the number of an AMQP channel in two bytes.
_MOST = 65535


class ChannelIds:
    """Hands out AMQP channel numbers, later if none is free now. A ``channel_max`` of 0: no limit.

    carehare 1.0 raises StopIteration (in a coroutine a RuntimeError) when none is free, never uses
    the last one, and takes a ``channel_max`` of 0 for "none".
    """

    def __init__(self, channel_max: int) -> None:
        self._unused = iter(range(1, (channel_max or _MOST) + 1))
        self._released: list[int] = []
        self._waiting: deque[Callable[[int | None], None]] = deque()

    def acquire(self) -> int:
        """Return a free number; raises ``carehare.ChannelClosed`` if there is none."""
        number = self._next()
        if number is None:
            raise carehare.ChannelClosed("All AMQP channels of the connection are in use")
        return number

    def acquire_later(self, use: Callable[[int | None], None]) -> None:
        """Call ``use(number)`` once a number is free, perhaps at once, in the order of the calls.

        ``use(None)`` says that the connection was closed before.
        """
        number = self._next()
        if number is None:
            self._waiting.append(use)
        else:
            use(number)

    def _next(self) -> int | None:
        return self._released.pop() if self._released else next(self._unused, None)

    def release(self, number: int) -> None:
        """Note that the AMQP channel with this number is closed on both sides."""
        if self._waiting:
            self._waiting.popleft()(number)
        else:
            self._released.append(number)

    def close(self) -> None:
        """Tell the callers that wait that the connection is closed."""
        waiting, self._waiting = self._waiting, deque()
        for use in waiting:
            use(None)
