"""Open questions: their numbers, and the answers so far.

No I/O: ``asker`` writes the requests.
"""

from __future__ import annotations

import itertools

from .._futures import Waiters
from .requests import Action, Answer


class Question:
    """One question to all processes, or one request to a single process."""

    def __init__(self, number: int, action: Action) -> None:
        self.number = number
        self.action = action
        self.changed = Waiters()  # woken when something has happened that may end the wait
        # Whether our own copy has come back: then all earlier greetings have arrived, too.
        self.has_echo = False
        self.was_sent = False
        # The processes that have to answer, once they are known
        self.required: list[str] | None = None
        self.answers: dict[str, list[Answer]] = {}  # by process: all parts
        self.returned: set[str] = set()  # processes that had no queue when they were asked
        # By process and series: the parts of answers, by their numbers
        self._parts: dict[tuple[str, int], dict[int, Answer]] = {}
        # Processes of which a part has come since the last repeat
        self._answering: set[str] = set()

    def on_answer(self, answer: Answer) -> None:
        """Note an answer, or a part of one; a repeated one changes nothing."""
        if answer.sender in self.answers:
            return
        parts = self._parts.setdefault((answer.sender, answer.series), {})
        parts[answer.part] = answer
        self._answering.add(answer.sender)
        if len(parts) == answer.parts:
            self.answers[answer.sender] = [parts[number] for number in sorted(parts)]
            self.returned.discard(answer.sender)
            self.changed.wake()

    def unanswered(self, ids: list[str]) -> list[str]:
        """Return those of the processes that have neither answered nor been found absent."""
        return [id_ for id_ in ids if id_ not in self.answers and id_ not in self.returned]

    def to_repeat(self, ids: list[str]) -> list[str]:
        """Return those of the processes of which nothing has come since the last call."""
        answering, self._answering = self._answering, set()
        return [id_ for id_ in ids if id_ not in answering]


class Questions:
    """The open questions of one ``LoopLayer``, by number."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, Question] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, action: Action) -> Question:
        """Return a new question; end it by ``close``."""
        question = Question(next(self._numbers), action)
        self._open[question.number] = question
        return question

    def close(self, question: Question) -> None:
        """Take no more answers."""
        self._open.pop(question.number, None)

    def on_answer(self, answer: Answer) -> None:
        """Note an answer; one that comes too late changes nothing."""
        question = self._open.get(answer.number)
        if question is not None:
            question.on_answer(answer)

    def on_echo(self, number: int) -> None:
        """Our own question to all has come back."""
        question = self._open.get(number)
        if question is not None:
            question.has_echo = True
            question.changed.wake()

    def on_own_connection_lost(self) -> None:
        """Answers and greetings may be lost: all must be asked again."""
        for question in self._open.values():
            question.has_echo = False
            question.required = None
            question.changed.wake()

    def wake_all(self) -> None:
        """Have the calls look again whether they must wait."""
        for question in list(self._open.values()):
            question.changed.wake()
