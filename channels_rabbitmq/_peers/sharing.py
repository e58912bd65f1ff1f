"""``Sharing``: calls that ask the same about the same group share a question to all.

A thousand calls at once would be a thousand messages to each process, and as many answers, of which
most come too late. But who calls may only have a question that is sent after the call: whoever has
joined the group before it must be in the result. So a call joins a question that waits to be sent,
or begins one. That is sent in the next turn of the event loop; or, if the one before is under way,
when that is over, but at most ``LONGEST_PAUSE`` after the call that began it: the one before may
take all its time, because a process is silent.

Each call has its own time limit and takes what has come by then; the question has the latest one.
A question that no call waits for any more is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from .._futures import Waiters, look_at, start_task, wait_all
from ..exceptions import BrokerUnavailable
from .link import Link
from .questions import Question, Questions

LONGEST_PAUSE = 0.05  # seconds

_Ask = Callable[[Question, str, str, float], Coroutine[Any, Any, None]]
_Key = tuple[str, str]


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
    """``ask(question, kind, group, deadline)`` asks all, until ``deadline`` (loop time)."""

    def __init__(self, questions: Questions, link: Link, ask: _Ask) -> None:
        self._questions = questions
        self._link = link
        self._ask = ask
        self._loop = asyncio.get_running_loop()
        self._latest: dict[_Key, _Shared] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    async def ask(self, kind: str, group: str, deadline: float) -> Question:
        """Return a question that was sent after this call, with what has come by ``deadline``.

        Raises BrokerUnavailable if it couldn't be sent by then.
        """
        await self._link.wait_receiving(deadline)
        shared = self._join((kind, group), deadline)
        try:
            while not shared.task.done() and await shared.ended.wait(deadline):
                pass
        finally:
            self._leave(shared)
        if shared.task.done() and not shared.task.cancelled():
            shared.task.result()
        elif not shared.question.was_sent:
            await self._link.wait_receiving(deadline)  # They raise with the reason.
            await self._link.wait_sending(deadline)
            raise BrokerUnavailable("The question could not be sent in time")
        return shared.question

    def _join(self, key: _Key, deadline: float) -> _Shared:
        latest = self._latest.get(key)
        if latest is None or latest.is_begun:
            shared = self._begin(key, latest, deadline)
        else:
            shared = latest
            shared.deadline = max(shared.deadline, deadline)
        shared.calls += 1
        return shared

    def _begin(self, key: _Key, before: _Shared | None, deadline: float) -> _Shared:
        shared = self._latest[key] = _Shared(self._questions.open(), deadline)
        shared.task = start_task(self._run(key, shared, before), name="channels_rabbitmq question")
        self.tasks.add(shared.task)
        shared.task.add_done_callback(lambda task: self._on_ended(key, shared))
        return shared

    async def _run(self, key: _Key, shared: _Shared, before: _Shared | None) -> None:
        if before is not None:
            now = self._loop.time()
            pause = min(LONGEST_PAUSE, (shared.deadline - now) / 2)
            await wait_all([before.task], now + pause)
        shared.is_begun = True
        await self._ask(shared.question, *key, shared.deadline)

    def _on_ended(self, key: _Key, shared: _Shared) -> None:
        self.tasks.discard(shared.task)
        look_at(shared.task)
        if self._latest.get(key) is shared:
            del self._latest[key]
        self._questions.close(shared.question)
        shared.ended.wake()

    def _leave(self, shared: _Shared) -> None:
        shared.calls -= 1
        if not shared.calls and not shared.task.done():
            shared.is_begun = True  # Nobody may join it any more.
            self._questions.close(shared.question)
            shared.task.cancel()

    def close(self) -> None:
        """End all questions; their calls get what they have."""
        for task in self.tasks:
            task.cancel()
