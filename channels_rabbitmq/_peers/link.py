"""``Link``: what this wing needs of the connections to the broker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .._amqp.publishing import Outcome


class Link(Protocol):
    """The way to other processes' queues of requests. What it publishes isn't a message."""

    @property
    def is_blocked(self) -> bool:
        """Whether the broker takes nothing now."""

    def call_when_blocked(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called each time the broker begins to block publishers."""

    async def wait_usable(self) -> None:
        """Wait, without a limit in time, until something can be published."""

    async def publish(self, recipient: str, body: bytes, deadline: float) -> Outcome:
        """Publish to all (``TO_ALL``) or to one (``to_process(id)``), until ``deadline``.

        Only what is for one process can be RETURNED. Raises BrokerUnavailable if there is no
        connection in time: then nothing was written.
        """

    def set_farewell(self, body: bytes) -> None:
        """Have this published to all when this process ends in order."""

    async def wait_sending(self, deadline: float) -> None:
        """Wait for the connection that publishes.

        Raises BrokerUnavailable, with the reason, if it isn't there by ``deadline`` (loop time).
        """

    async def wait_receiving(self, deadline: float) -> None:
        """Wait until this event loop's own queues are there.

        Raises BrokerUnavailable if that isn't so by ``deadline`` (loop time).
        """
