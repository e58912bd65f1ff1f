"""An attempt to connect to one URL, beside those to the other nodes of a cluster (see ``Race``).

A node that hangs, or a machine that is gone, costs the others' clients a moment instead of its
whole ``connect_timeout``. The order of the URLs is by chance each time: that spreads the load over
the cluster, and to prefer the node that worked last would mean the one that was just lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from .._amqp.connection import Connection
from .._amqp.racing import PATIENCE_ONCE_ANSWERED
from .._amqp.url import BrokerUrl


class UrlAttempt:
    """Has ``connection`` open once ``run`` returns; what comes then has until ``deadline``, too."""

    def __init__(
        self,
        url: BrokerUrl,
        connection: Connection,
        timeout: float,
        *,
        on_failure: Callable[[UrlAttempt, Exception], None],
    ) -> None:
        self.url = url
        self.connection = connection
        self.timeout = timeout
        self.deadline = 0.0  # loop time, once it runs
        self._on_failure = on_failure

    @property
    def has_answered(self) -> bool:
        return self.connection.has_answered

    async def run(self) -> None:
        self.deadline = asyncio.get_running_loop().time() + self.timeout
        try:
            await self.connection.connect(self.deadline)
        except Exception as err:
            self._on_failure(self, err)
            raise

    def undo(self) -> None:
        self.connection.abort()


def deadline_of(attempts: Sequence[UrlAttempt]) -> float:
    """Return when a race of these is over in any case (loop time); each has its own deadline."""
    longest = max(attempt.timeout for attempt in attempts)
    return (
        asyncio.get_running_loop().time() + longest + PATIENCE_ONCE_ANSWERED * len(attempts) + 1.0
    )
