"""``Connections``: all connections that one ``LoopLayer`` keeps open."""

from __future__ import annotations

from collections.abc import Sequence

from .supervisor import Supervisor


class Connections:
    """Acts on all connections of one ``LoopLayer`` at once.

    As soon as one has reached the broker, the others try again at once, and save the rest of their
    back-off.
    """

    def __init__(self, supervisors: Sequence[Supervisor]) -> None:
        self.supervisors = supervisors
        for supervisor in supervisors:
            supervisor.on_ready = self._retry_all_now

    def _retry_all_now(self) -> None:
        for supervisor in self.supervisors:
            supervisor.retry_now()

    @property
    def are_open(self) -> bool:
        """Whether anything runs for one of them."""
        return any(supervisor.is_running for supervisor in self.supervisors)

    def shut_down_if_stopped(self, seconds: float) -> None:
        """End the connections of an event loop that hasn't run for so long. From any thread.

        This touches nothing of the loop. If the loop runs again, it notices that they are lost.
        """
        for supervisor in self.supervisors:
            connection = supervisor.connection
            if connection is not None and connection.stood_still >= seconds:
                connection.shut_down()

    def cancel_calls(self, *, cancels: bool) -> None:
        """Set what calls that wait get at the end.

        ``CancelledError``, or, with False, BrokerUnavailable.
        """
        for supervisor in self.supervisors:
            supervisor.cancels_calls = cancels
