"""``AnswerWatch``: notice that the broker has stopped answering on one AMQP channel.

A process of the broker may hang while its other processes go on. Then heartbeats come, the
connection looks well, and every call on that AMQP channel runs into its time limit. Time alone
doesn't show that: a broker that froze for 14 s answers everything afterwards, and reconnecting in
that time cost 554 of 2,148 messages. So an AMQP channel counts as hanging if an answer is due and
doesn't come although the broker sends other bytes (``Heartbeat.is_overdue``).
"""

from __future__ import annotations

from .heartbeat import Heartbeat, Mark


class AnswerWatch:
    """Finds out whether one AMQP channel hangs.

    The caller calls ``look`` now and then, and sets ``is_answered`` at each answer, which costs
    little. The wait begins with the first ``look`` that finds an answer due, and not with the
    request.
    """

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self.is_answered = False  # whether an answer came since the last look
        self._mark: Mark | None = None

    def look(self, *, is_due: bool) -> bool:
        """Return whether the AMQP channel hangs. ``is_due``: whether the broker owes an answer."""
        is_answered, self.is_answered = self.is_answered, False
        if is_answered or not is_due:
            self._mark = None
        elif self._mark is None:
            self._mark = self._heartbeat.mark()
        else:
            return self._heartbeat.is_overdue(self._mark)
        return False

    @property
    def is_waiting(self) -> bool:
        """Whether the last look found an answer due."""
        return self._mark is not None
