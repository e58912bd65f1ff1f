"""``Shared``: what the ``LoopLayers`` of one layer know together, in a process.

An event loop may live for one call: ``asyncio.run(layer.group_send(...))``. What each of them found
out, waited for and told the log by itself would be as many times the work, the waiting and the
lines. Everything here may be called on any thread.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from .outage import KnownOutage
from .receivers import Allowance


class Told:
    """What the log has been told."""

    def __init__(self) -> None:
        self._until: dict[tuple[str, ...], float] = {}

    def is_news(self, what: tuple[str, ...], interval: float = math.inf) -> bool:
        """Return whether the log wasn't told this for ``interval`` seconds, and note that it is."""
        now = time.monotonic()
        for old, until in list(self._until.items()):
            if now >= until:
                self._until.pop(old, None)
        if what in self._until:
            return False
        self._until[what] = now + interval
        return True

    def is_over(self, what: tuple[str, ...]) -> bool:
        """Return whether the log was told this, and note that it isn't so any more."""
        return self._until.pop(what, None) is not None


@dataclass(frozen=True)
class Shared:
    """The parts."""

    outage: KnownOutage = field(default_factory=KnownOutage)
    told: Told = field(default_factory=Told)
    allowance: Allowance = field(default_factory=Allowance)
    normal_channels: set[str] = field(default_factory=set)
    """Those that were used, for ``flush()``; empty without ``allow_flush``."""
