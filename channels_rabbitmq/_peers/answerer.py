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
from dataclasses import replace
from typing import Any, Protocol

from channels.exceptions import MessageTooLarge

from .._codec import MessageCodec
from .._futures import start_task
from .._identity import to_process
from ..exceptions import BrokerUnavailable
from ..statistics import Counters
from ..status import ProcessStatus
from . import statuses
from .link import Link
from .processes import Processes
from .requests import (
    ADD,
    COUNT,
    DISCARD,
    FLUSH,
    HEARD,
    MEMBERS,
    STATUS,
    Answer,
    PackedMember,
    Request,
    split,
)

MOST_AT_ONCE = 100  # changes
MOST_QUESTIONS = 10_000
MOST_WORKERS = 20
# How many changes are remembered, and for how many seconds: longer than they are repeated.
_MOST_CHANGES = 10_000
_REMEMBERED = 60.0


class Local(Protocol):
    """What others ask for or change: the groups with members on this event loop, and its state."""

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

    def own_status(self) -> ProcessStatus:
        """Return how this event loop is now."""


class Answerer:
    """Answers for the ``LoopLayer`` ``id_``. No answer takes longer than ``longest`` seconds.

    ``part_size``: bytes, about, of one part of a list of members.
    """

    def __init__(
        self,
        id_: str,
        local: Local,
        processes: Processes,
        link: Link,
        codec: MessageCodec,
        counters: Counters,
        longest: float,
        part_size: int,
    ) -> None:
        self._id = id_
        self._local = local
        self._processes = processes
        self._link = link
        self._codec = codec
        self._counters = counters
        self._longest = longest
        self._part_size = part_size
        self._loop = asyncio.get_running_loop()
        self._series = itertools.count(1)
        self._remembered = max(_REMEMBERED, 2 * longest)
        # By sender and number of the request, the oldest first: until when it is remembered, and
        # the answer, or None while the change is under way
        self._changes: OrderedDict[tuple[str, int], tuple[float, Answer | None]] = OrderedDict()
        # By sender and number: the questions that wait, the oldest first, each with its deadline
        self._questions: OrderedDict[tuple[str, int], tuple[Request, float]] = OrderedDict()
        self._workers: set[asyncio.Task[None]] = set()
        self._changing: set[asyncio.Task[None]] = set()

    def on_request(self, request: Request) -> None:
        """Begin to answer, or drop the request."""
        is_question = request.kind in (MEMBERS, COUNT, STATUS, HEARD)
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
        number = request.number
        if request.kind == COUNT:
            return [Answer(self._id, number, count=self._local.count(request.group))]
        if request.kind == STATUS:
            status = statuses.pack(self._local.own_status())
            return [Answer(self._id, number, status=status, heard=self._processes.lost())]
        if request.kind == HEARD:
            heard = {id_: self._processes.heard(id_) for id_ in request.ids}
            return [Answer(self._id, number, heard=heard)]
        parts = split(self._local.confirmed(request.group), self._part_size)
        series = next(self._series)
        return [
            Answer(self._id, number, series, part, len(parts), members=members)
            for part, members in enumerate(parts)
        ]

    def _on_change(self, request: Request, deadline: float) -> None:
        self._counters.answered += 1
        key = (request.sender, request.number)
        if key in self._changes:
            _, answer = self._changes[key]
            if answer is not None:  # Else it comes when the change is done.
                self._start(self._publish(request, [answer], deadline), self._changing)
            return
        answer = Answer(self._id, request.number)
        rest = None
        try:
            # At once and not in the task, so that a discard doesn't overtake the add before it.
            rest = self._begin_change(request, deadline)
        except ValueError as err:
            answer = replace(answer, error=str(err), is_mistake=True)
        self._remember(key, answer if rest is None else None)
        task = self._start(self._end_change(request, answer, rest, deadline), self._changing)
        if rest is not None:
            # A task that is cancelled before it has begun never awaits it.
            task.add_done_callback(lambda _: rest.close())

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

    def _begin_change(self, request: Request, deadline: float) -> Coroutine[Any, Any, None] | None:
        """Do what can be done at once; return a coroutine that does the rest, if there is one."""
        group, channel = request.group, request.channel
        if request.kind == FLUSH:
            return self._local.flush_here(deadline)
        if request.kind == ADD:
            return self._local.add(group, channel, request.info, deadline)
        assert request.kind == DISCARD, "there is no other kind"
        self._local.discard(group, channel)
        return None

    async def _end_change(
        self,
        request: Request,
        answer: Answer,
        rest: Coroutine[Any, Any, None] | None,
        deadline: float,
    ) -> None:
        if rest is not None:
            try:
                await rest
            except BrokerUnavailable as err:
                answer = replace(answer, error=str(err))
            self._remember((request.sender, request.number), answer)
        await self._publish(request, [answer], deadline)

    def _remember(self, key: tuple[str, int], answer: Answer | None) -> None:
        now = self._loop.time()
        self._changes[key] = (now + self._remembered, answer)
        while len(self._changes) > _MOST_CHANGES or next(iter(self._changes.values()))[0] <= now:
            self._changes.popitem(last=False)

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

    def close(self) -> None:
        """Answer nothing more."""
        for task in self.tasks:
            task.cancel()
