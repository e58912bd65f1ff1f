"""``Sharing``: calls that ask the same about the same group share a question to all.

A thousand calls at once would be a thousand messages to each process, and as many answers, of which
most come too late. But a call may only share a question that is sent after the call: each member
that has joined the group before the call must be in the result. So a call joins a question that
waits to be sent, or begins a new one.

A new question is sent in the next turn of the event loop. If the one before is under way, it is
sent when that is over, but at most ``LONGEST_PAUSE`` later: the one before may take all its time,
because a process is silent.

Each call has its own time limit, and takes the answers that have come by then. The question has the
latest of these limits. It is given up when no call waits for it any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from .._futures import Waiters, look_at, start_task, wait_all
from ..exceptions import BrokerUnavailable
from .link import Link
from .questions import Question, Questions
from .requests import Action

LONGEST_PAUSE = 0.05  # seconds

_Ask = Callable[[Question, float], Coroutine[Any, Any, None]]


class _Shared:
    """A question, and the calls that wait for it."""

    def __init__(self, question: Question, deadline: float) -> None:
        self.question = question
        self.deadline = deadline  # the latest of its calls'
        self.calls = 0
        self.is_begun = False
        self.ended = Waiters()
        self.task: asyncio.Task[None]


class Sharing:
    """``ask(question, deadline)`` asks all processes, until ``deadline`` (loop time)."""

    def __init__(self, questions: Questions, link: Link, ask: _Ask) -> None:
        self._questions = questions
        self._link = link
        self._ask = ask
        self._loop = asyncio.get_running_loop()
        self._latest: dict[Action, _Shared] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    async def ask(self, action: Action, deadline: float) -> Question:
        """Return a question that is sent after this call, with the answers by ``deadline``.

        Raises BrokerUnavailable if it couldn't be sent by then.
        """
        await self._link.wait_subscriber_ready(deadline)
        shared = self._join(action, deadline)
        try:
            while not shared.task.done() and await shared.ended.wait(deadline):
                pass
        finally:
            self._leave(shared)
        if shared.task.done() and not shared.task.cancelled():
            shared.task.result()
        elif not shared.question.was_sent:
            # These raise with the reason.
            await self._link.wait_subscriber_ready(deadline)
            await self._link.wait_publisher_ready(deadline)
            raise BrokerUnavailable("The question could not be sent in time")
        return shared.question

    def _join(self, action: Action, deadline: float) -> _Shared:
        latest = self._latest.get(action)
        if latest is None or latest.is_begun:
            shared = self._begin(action, latest, deadline)
        else:
            shared = latest
            shared.deadline = max(shared.deadline, deadline)
        shared.calls += 1
        return shared

    def _begin(self, action: Action, before: _Shared | None, deadline: float) -> _Shared:
        shared = self._latest[action] = _Shared(self._questions.open(action), deadline)
        shared.task = start_task(self._run(shared, before), name="channels_rabbitmq question")
        self.tasks.add(shared.task)
        shared.task.add_done_callback(lambda _: self._on_ended(shared))
        return shared

    async def _run(self, shared: _Shared, before: _Shared | None) -> None:
        if before is not None:
            now = self._loop.time()
            pause = min(LONGEST_PAUSE, (shared.deadline - now) / 2)
            await wait_all([before.task], now + pause)
        shared.is_begun = True
        await self._ask(shared.question, shared.deadline)

    def _on_ended(self, shared: _Shared) -> None:
        self.tasks.discard(shared.task)
        look_at(shared.task)
        action = shared.question.action
        if self._latest.get(action) is shared:
            del self._latest[action]
        self._questions.close(shared.question)
        shared.ended.wake()

    def _leave(self, shared: _Shared) -> None:
        shared.calls -= 1
        if not shared.calls and not shared.task.done():
            shared.is_begun = True  # No call may join it any more.
            self._questions.close(shared.question)
            shared.task.cancel()

    def close(self) -> None:
        """End all questions; their calls get the answers so far."""
        for task in self.tasks:
            task.cancel()
