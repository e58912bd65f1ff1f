"""``Answerer``: does what other processes ask, and answers.

Each answer is a task with the rest of the question's time. At most ``MOST_AT_ONCE`` run: beyond
that, and while the broker blocks publishers, requests are dropped and counted. Whoever asks repeats
the request, or says who was silent.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Protocol

from .._codec import MessageCodec
from .._futures import run_until, start_task
from .._identity import to_process
from ..exceptions import BrokerUnavailable
from ..statistics import Counters
from .link import Link
from .requests import ADD, COUNT, DISCARD, MEMBERS, Answer, PackedMember, Request, split

MOST_AT_ONCE = 100


class LocalGroups(Protocol):
    """The groups as far as their members are channels of this event loop."""

    def confirmed(self, group: str) -> list[PackedMember]:
        """Return the members of a group."""

    def count(self, group: str) -> int:
        """Return how many these are."""

    async def add(self, group: str, channel: str, info: bytes | None, deadline: float) -> None:
        """Add a channel, until ``deadline`` (loop time); raises as ``group_add``."""

    def discard(self, group: str, channel: str) -> None:
        """Take a channel out; raises as ``group_discard``."""


class Answerer:
    """Answers for the ``LoopLayer`` ``id_``. No answer takes longer than ``longest`` seconds."""

    def __init__(
        self,
        id_: str,
        groups: LocalGroups,
        link: Link,
        codec: MessageCodec,
        counters: Counters,
        longest: float,
    ) -> None:
        self._id = id_
        self._groups = groups
        self._link = link
        self._codec = codec
        self._counters = counters
        self._longest = longest
        self._loop = asyncio.get_running_loop()
        self._series = itertools.count(1)
        self.tasks: set[asyncio.Task[None]] = set()

    def on_request(self, request: Request) -> None:
        """Begin to answer, or drop the request."""
        if self._link.is_blocked or len(self.tasks) >= MOST_AT_ONCE:
            self._counters.unanswered += 1
            return
        self._counters.answered += 1
        task = start_task(self._answer(request), name="channels_rabbitmq answer")
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _answer(self, request: Request) -> None:
        deadline = self._loop.time() + min(request.timeout, self._longest)
        for answer in await self._make_answers(request, deadline):
            recipient = to_process(request.sender)
            body = self._codec.encode_for_channel(recipient, answer.message())
            try:
                await self._link.publish(recipient, body, deadline)
            except BrokerUnavailable:
                return

    async def _make_answers(self, request: Request, deadline: float) -> list[Answer]:
        number = request.number
        if request.kind == MEMBERS:
            parts = split(self._groups.confirmed(request.group))
            series = next(self._series)
            return [
                Answer(self._id, number, series, part, len(parts), members=members)
                for part, members in enumerate(parts)
            ]
        if request.kind == COUNT:
            return [Answer(self._id, number, count=self._groups.count(request.group))]
        try:
            await self._change(request, deadline)
        except (TypeError, ValueError) as err:
            return [Answer(self._id, number, error=str(err), is_mistake=True)]
        except (BrokerUnavailable, asyncio.TimeoutError) as err:
            return [Answer(self._id, number, error=str(err) or "no time was left")]
        return [Answer(self._id, number)]

    async def _change(self, request: Request, deadline: float) -> None:
        group, channel = request.group, request.channel
        if request.kind == ADD:
            await run_until(deadline, self._groups.add(group, channel, request.info, deadline))
        else:
            assert request.kind == DISCARD, "there is no other kind"
            self._groups.discard(group, channel)

    def close(self) -> None:
        """Answer nothing more."""
        for task in self.tasks:
            task.cancel()
