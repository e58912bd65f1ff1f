"""``Reporter``: log lines about events that may happen a thousand times a second."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from ._futures import call_at

# Seconds between two lines about the same reason, and before the first line. The delay before the
# first line makes one line of an incident with many events.
INTERVAL = 5.0
FIRST_INTERVAL = 0.1
# How many names a line shows.
_SHOWN = 5
_LONGEST_NAME = 100

SENTENCES = {
    "back-pressure": "all of local_capacity is in use by %d messages: receivers are too slow",
    "behind": "%d messages waiting in memory for receivers that are stuck or too slow",
    "blocked": "%d group messages dropped: RabbitMQ blocks publishers",
    "expired": "%d messages dropped: no receive() took them within local_expiry",
    "group_nacked": (
        "%d group messages refused by at least one queue: its process doesn't keep up, or is gone"
    ),
    "malformed": "%d messages dropped: not in this layer's format",
    "malformed_request": "%d requests of other processes dropped: not in this layer's format",
    "late": "messages were up to %d s old when they were received, more than half of expiry",
    "misrouted": "%d messages dropped: for channels of another process",
    "overflowed": "%d messages dropped: channels that are behind hold more than is kept for them",
    "outcome_unknown": "%d messages written but not confirmed: they may or may not arrive",
    "silent": "%d answers missing: processes that are connected didn't give them in time",
    "unreachable": "%d messages dropped: the process of their channel is gone",
}


_PLURAL = re.compile("(message|request|answer)s")

# Reasons whose names are channels of this event loop. ``describe`` can say more about these.
_OF_OWN_CHANNELS = frozenset({"back-pressure", "behind", "expired", "late", "overflowed"})


class Reporter:
    """Logs a warning soon after an event, and one line every few seconds about more of its kind.

    A reporter serves one event loop. ``owner``, that loop's id, begins each line.
    ``describe(channels)`` returns a text about each channel, which may be empty.
    """

    def __init__(
        self,
        logger: logging.Logger,
        owner: str,
        describe: Callable[[Iterable[str]], Mapping[str, str]] = lambda channels: {},
    ) -> None:
        self._logger = logger
        self._owner = owner
        self._describe = describe
        self._counts: dict[str, Counter[str]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def report(self, reason: str, name: str, times: int = 1) -> None:
        """Count one or several events about the channel or group ``name``."""
        self._counts_for(reason)[name] += times

    def report_now(self, reason: str, name: str, times: int = 1) -> None:
        """Log one or several events at once. Needs no event loop."""
        self._log(reason, Counter({name: times}))

    def report_level(self, reason: str, name: str, level: int) -> None:
        """Note a level of ``name``. The log line shows the highest level."""
        counts = self._counts_for(reason)
        counts[name] = max(counts[name], level)

    def _counts_for(self, reason: str) -> Counter[str]:
        if reason not in self._timers:
            self._schedule(reason, FIRST_INTERVAL)
        return self._counts.setdefault(reason, Counter())

    def _schedule(self, reason: str, delay: float) -> None:
        at = asyncio.get_running_loop().time() + delay
        self._timers[reason] = call_at(at, partial(self._flush, reason))

    def _flush(self, reason: str) -> None:
        self._timers.pop(reason, None)
        counts = self._counts.pop(reason, None)
        if counts is None:
            return  # There were no more events.
        self._log(reason, counts)
        self._schedule(reason, INTERVAL)

    def _log(self, reason: str, counts: Counter[str]) -> None:
        shown = counts.most_common(_SHOWN)
        said = self._describe([name for name, _ in shown]) if reason in _OF_OWN_CHANNELS else {}
        worst = ", ".join(
            f"{_plain(name)} ({n}{f'; {said[name]}' if said.get(name) else ''})"
            for name, n in shown
        )
        more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
        total = max(counts.values()) if reason == "late" else sum(counts.values())
        text = SENTENCES[reason] % total
        if total == 1 and reason != "late":
            text = _PLURAL.sub(r"\1", text, count=1)
        self._logger.warning("%s: %s: %s%s", self._owner, text, worst, more)

    def close(self) -> None:
        """Log the events that aren't logged yet, and stop the timers."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for reason, counts in self._counts.items():
            self._log(reason, counts)
        self._counts.clear()


def _plain(name: str) -> str:
    """Return a name that fits a log line: shortened, and escaped if it has strange characters."""
    shown = name[:_LONGEST_NAME]
    return shown if shown.isascii() and shown.isprintable() else ascii(shown)
