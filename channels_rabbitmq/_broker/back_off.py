"""``BackOff``: when a supervisor tries again to connect."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

from .._futures import Waiters
from .outage import SHORTEST_DELAY_FOR_CALLS

# Seconds: the first delay after a loss, and the longest. The longest one is short: messages should
# pass within three seconds of the broker's return, and an attempt at a closed port costs nothing.
# Once it is back, the jitter spreads all processes over a second. 200 of them with 400 connections
# all had theirs after 1.6 s, on two cores (with 10 s: 7.7 s); no attempt failed because there were
# so many.
FIRST_DELAY = 0.1
LONGEST_DELAY = 2.0
# The longest one while the broker answers each attempt with a refusal. Each attempt costs the
# broker a login or more, and the reason rarely goes away by itself.
LONGEST_DELAY_IF_REFUSED = 10.0


def doubling_delays() -> Iterator[float]:
    """Yield delays in seconds, with jitter so that the processes don't all try at once."""
    delay = FIRST_DELAY
    while True:
        yield _with_jitter(delay)
        delay = min(delay * 2, LONGEST_DELAY_IF_REFUSED)


def _with_jitter(delay: float) -> float:
    return delay * random.uniform(0.5, 1.0)


class BackOff:
    """The delays between the rounds of attempts of one supervisor."""

    def __init__(self) -> None:
        self._delays = doubling_delays()
        self._delay = 0.0  # the present one, or the last
        self._pause = Waiters()  # the supervisor's task
        self._has_call_failed = False  # since the last attempt
        self._attempted_at = float("-inf")  # loop time

    def on_attempt(self) -> None:
        """A round of attempts begins."""
        self._attempted_at = asyncio.get_running_loop().time()

    def next_delay(self, *, connected_for: float, is_refused: bool) -> float:
        """Return the seconds that ``wait`` will take.

        ``connected_for``: seconds from the last round's begin to the loss of the connection that it
        made; 0 if it made none. ``is_refused``: the broker has refused all attempts.
        """
        # A connection that lasts less than the last delay doesn't reset it: one that is set up and
        # refused again and again would be tried ten times a second.
        if connected_for > self._delay:
            self._delays = doubling_delays()
        self._delay = next(self._delays)
        if not is_refused:
            self._delay = min(self._delay, _with_jitter(LONGEST_DELAY))
        return self._delay

    async def wait(self) -> None:
        """Wait until the next round of attempts is due."""
        until = asyncio.get_running_loop().time() + self._delay
        if not self._has_call_failed:
            await self._pause.wait(until)
        if self._has_call_failed:
            await self._pause.wait(min(until, self._attempted_at + SHORTEST_DELAY_FOR_CALLS))
            self._has_call_failed = False

    def retry_now(self) -> None:
        """End the present wait, if there is one."""
        self._pause.wake()

    def retry_soon(self) -> None:
        """Shorten the present wait, or the next one: a call has failed."""
        if not self._has_call_failed:
            self._has_call_failed = True
            self._pause.wake()
