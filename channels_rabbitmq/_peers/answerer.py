"""``Answerer``: does what other processes ask for, and answers.

A request for the members or the count of a group is a *question*. It is answered at once. If the
answer can't be written yet, or has several parts, the question waits in a queue of at most
``MOST_QUESTIONS``, and at most ``MOST_WORKERS`` tasks answer it. A question whose time is over by
then isn't answered.

A request to add, discard or flush is a *change*. Each change is a task with the rest of the
request's time, and at most ``MOST_AT_ONCE`` run. A change is done once. The asker repeats a request
until it is answered, and by then a later call may have changed the same. So the answers to changes
are remembered for a while, and given again.

Requests beyond these limits, and those that come while the broker blocks publishers, are dropped
and counted. The asker repeats them, or names this process as silent.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any, Protocol

from channels.exceptions import MessageTooLarge

from .._codec import MessageCodec
from .._futures import start_task
from .._identity import to_process
from ..exceptions import BrokerUnavailable
from ..statistics import Counters
from .link import Link
from .requests import ADD, COUNT, DISCARD, FLUSH, MEMBERS, Answer, PackedMember, Request, split

MOST_AT_ONCE = 100  # changes
MOST_QUESTIONS = 10_000
MOST_WORKERS = 20
# How many changes are remembered, and for how many seconds: longer than they are repeated.
_MOST_CHANGES = 10_000
_REMEMBERED = 60.0


class LocalGroups(Protocol):
    """The groups as far as their members are channels of this event loop."""

    def confirmed(self, group: str) -> list[PackedMember]:
        """Return the members of a group."""

    def count(self, group: str) -> int:
        """Return how many these are."""

    def add(
        self, group: str, channel: str, info: bytes | None, deadline: float
    ) -> Coroutine[Any, Any, None]:
        """Begin at once to add a channel; the coroutine goes on, until ``deadline`` (loop time).

        Both raise as ``group_add``.
        """

    def discard(self, group: str, channel: str) -> None:
        """Take a channel out; raises as ``group_discard``."""

    def flush_here(self, deadline: float) -> Coroutine[Any, Any, None]:
        """Empty the groups, and all else that this event loop holds, until ``deadline``.

        Raises ValueError at once if that isn't allowed.
        """


class Answerer:
    """Answers for the ``LoopLayer`` ``id_``. No answer takes longer than ``longest`` seconds.

    ``part_size``: bytes, about, of one part of a list of members.
    """

    def __init__(
        self,
        id_: str,
        groups: LocalGroups,
        link: Link,
        codec: MessageCodec,
        counters: Counters,
        longest: float,
        part_size: int,
    ) -> None:
        self._id = id_
        self._groups = groups
        self._link = link
        self._codec = codec
        self._counters = counters
        self._longest = longest
        self._part_size = part_size
        self._loop = asyncio.get_running_loop()
        self._series = itertools.count(1)
        self._remembered = max(_REMEMBERED, 2 * longest)
        # By sender and number of the request, the oldest first: until when it is remembered, and
        # the answer, or none while the change is under way
        self._changes: OrderedDict[tuple[str, int], tuple[float, list[Answer]]] = OrderedDict()
        # By sender and number: the questions that wait, the oldest first, each with its deadline
        self._questions: OrderedDict[tuple[str, int], tuple[Request, float]] = OrderedDict()
        self._workers: set[asyncio.Task[None]] = set()
        self._changing: set[asyncio.Task[None]] = set()

    def on_request(self, request: Request) -> None:
        """Begin to answer, or drop the request."""
        is_question = request.kind in (MEMBERS, COUNT)
        is_full = (
            len(self._questions) >= MOST_QUESTIONS
            if is_question
            else len(self._changing) >= MOST_AT_ONCE
        )
        if self._link.is_blocked or is_full:
            self._counters.unanswered += 1
            return
        deadline = self._loop.time() + min(request.timeout, self._longest)
        if is_question:
            self._on_question(request, deadline)
        else:
            self._on_change(request, deadline)

    def _on_question(self, request: Request, deadline: float) -> None:
        if not self._questions and self._answer_nowait(request, deadline):
            return
        # A repeat of one that waits changes nothing.
        self._questions.setdefault((request.sender, request.number), (request, deadline))
        if len(self._workers) < MOST_WORKERS:
            self._start(self._work(), self._workers)

    def _answer_nowait(self, request: Request, deadline: float) -> bool:
        """Answer a question if that can be written now, in one part; return whether.

        Without a task, an answer takes 10 % less of the process.
        """
        answers = self._look_up(request)
        if len(answers) > 1:
            return False  # The parts of a long list are published one after the other.
        body = self._encode(request, answers[0])
        if body is None:
            return True
        if not self._link.publish_nowait(to_process(request.sender), body, deadline):
            return False
        self._counters.answered += 1
        return True

    async def _work(self) -> None:
        """Answer questions until none waits."""
        while self._questions:
            _, (request, deadline) = self._questions.popitem(last=False)
            if self._link.is_blocked or self._loop.time() >= deadline:
                self._counters.unanswered += 1
                continue
            self._counters.answered += 1
            await self._publish(request, self._look_up(request), deadline)

    def _look_up(self, request: Request) -> list[Answer]:
        if request.kind == COUNT:
            return [Answer(self._id, request.number, count=self._groups.count(request.group))]
        return self._list_members(request)

    def _on_change(self, request: Request, deadline: float) -> None:
        self._counters.answered += 1
        # At once and not in the task, so that a discard doesn't overtake the add before it.
        done = self._do(request, deadline)
        task = self._start(self._answer(request, done, deadline), self._changing)
        if not isinstance(done, list):
            # A task that is cancelled before it has begun never awaits it.
            task.add_done_callback(lambda _: done.close())

    def _start(
        self, coroutine: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]
    ) -> asyncio.Task[None]:
        task = start_task(coroutine, name="channels_rabbitmq answer")
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """Those that are running."""
        return self._workers | self._changing

    def _do(self, request: Request, deadline: float) -> list[Answer] | Coroutine[Any, Any, None]:
        """Do what can be done at once; return the answer, or a coroutine that does the rest."""
        key = (request.sender, request.number)
        if key in self._changes:
            return self._changes[key][1]  # Else the answer comes when it is done.
        done = self._change(request, deadline)
        self._remember(key, done if isinstance(done, list) else [])
        return done

    def _change(
        self, request: Request, deadline: float
    ) -> list[Answer] | Coroutine[Any, Any, None]:
        group, channel = request.group, request.channel
        try:
            if request.kind == FLUSH:
                return self._groups.flush_here(deadline)
            if request.kind == ADD:
                return self._groups.add(group, channel, request.info, deadline)
            assert request.kind == DISCARD, "there is no other kind"
            self._groups.discard(group, channel)
        except ValueError as err:
            return [Answer(self._id, request.number, error=str(err), is_mistake=True)]
        return [Answer(self._id, request.number)]

    def _remember(self, key: tuple[str, int], answers: list[Answer]) -> None:
        now = self._loop.time()
        self._changes[key] = (now + self._remembered, answers)
        while len(self._changes) > _MOST_CHANGES or next(iter(self._changes.values()))[0] <= now:
            self._changes.popitem(last=False)

    def _list_members(self, request: Request) -> list[Answer]:
        parts = split(self._groups.confirmed(request.group), self._part_size)
        series = next(self._series)
        return [
            Answer(self._id, request.number, series, part, len(parts), members=members)
            for part, members in enumerate(parts)
        ]

    async def _answer(
        self,
        request: Request,
        done: list[Answer] | Coroutine[Any, Any, None],
        deadline: float,
    ) -> None:
        answers = done if isinstance(done, list) else [await self._finish(request, done)]
        await self._publish(request, answers, deadline)

    def _encode(self, request: Request, answer: Answer) -> bytes | None:
        try:
            return self._codec.encode_for_channel(to_process(request.sender), answer.message())
        except MessageTooLarge:
            self._counters.unanswered += 1
            return None

    async def _publish(self, request: Request, answers: list[Answer], deadline: float) -> None:
        for answer in answers:
            body = self._encode(request, answer)
            if body is None:
                return
            try:
                await self._link.publish(to_process(request.sender), body, deadline)
            except BrokerUnavailable:
                return

    async def _finish(self, request: Request, changing: Coroutine[Any, Any, None]) -> Answer:
        try:
            await changing
        except BrokerUnavailable as err:
            answer = Answer(self._id, request.number, error=str(err))
        else:
            answer = Answer(self._id, request.number)
        self._remember((request.sender, request.number), [answer])
        return answer

    def close(self) -> None:
        """Answer nothing more."""
        for task in self.tasks:
            task.cancel()
