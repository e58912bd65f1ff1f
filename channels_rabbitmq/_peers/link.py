"""``Link``: what this wing needs of the connections to the broker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .._amqp.publishing import Outcome


class Link(Protocol):
    """The way to other processes' queues of requests. It publishes no messages of channels."""

    @property
    def is_blocked(self) -> bool:
        """Whether the broker takes nothing now."""

    def call_when_blocked(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called each time the broker begins to block publishers."""

    async def wait_unblocked(self) -> None:
        """Wait, without a time limit, until the publisher is connected and not blocked."""

    async def publish(self, recipient: str, body: bytes, deadline: float) -> Outcome:
        """Publish to all (``TO_ALL``) or to one (``to_process(id)``), until ``deadline``.

        Only a request to one process can be RETURNED. Raises BrokerUnavailable if there is no
        connection in time: then nothing was written.
        """

    def publish_nowait(self, recipient: str, body: bytes, deadline: float) -> bool:
        """Publish if it can be written now; return whether. The outcome is told to nobody."""

    def set_bye(self, body: bytes) -> None:
        """Have ``body`` published to all at the orderly end of this process."""

    async def wait_publisher_ready(self, deadline: float) -> None:
        """Wait for the connection that publishes.

        Raises BrokerUnavailable, with the reason, if there is none by ``deadline`` (loop time).
        """

    async def wait_subscriber_ready(self, deadline: float) -> None:
        """Wait until this event loop's own queues are there.

        Raises BrokerUnavailable, with the reason, if they aren't by ``deadline`` (loop time).
        """
