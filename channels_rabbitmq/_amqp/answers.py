"""``AnswerWatch``: has the broker stopped answering on one AMQP channel?

A process of the broker may hang while its others go on: heartbeats come, the connection looks well,
and each call on that AMQP channel lasts until its time is over, for ever. Time alone doesn't show
it: a broker that froze for 14 s answers everything afterwards, and reconnecting in that time cost
554 of 2,148 messages. So the AMQP channel counts as hanging if there was no answer at all since a
moment at which one was due, and the broker was heard (``Heartbeat.is_overdue``) all the same.
"""

from __future__ import annotations

from .heartbeat import Heartbeat, Mark


class AnswerWatch:
    """``look`` is called now and then; ``is_answered`` is set with each answer, which costs little.

    So the wait begins with the first look that finds an answer due, not when it was asked for.
    """

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self.is_answered = False  # since the last look
        self._mark: Mark | None = None

    def look(self, *, is_due: bool) -> bool:
        """Return whether the AMQP channel hangs. ``is_due``: an answer to something is due."""
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
