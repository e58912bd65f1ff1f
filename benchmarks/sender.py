"""Numbered messages to groups: one after the other, all at once, or each at its time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from benchmarks.role import Role, now


class GroupSender(Role):
    """Message ``n`` goes to ``groups[n % len(groups)]`` and says when it was sent.

    All methods return the numbers of the messages that the layer took. A call that raises is a
    problem, and its message is not among them.
    """

    SIZE = 0  # bytes that a message carries besides

    async def open(self) -> None:
        await self.connect(await self.layer.new_channel())

    async def send_in_turn(self, groups: list[str], first: int, count: int) -> list[int]:
        """Each when the one before has been sent."""
        return [n for n in range(first, first + count) if await self._send(n, groups)]

    async def send_at_once(self, groups: list[str], first: int, count: int) -> list[int]:
        numbers = range(first, first + count)
        return await _taken(numbers, [self._send(n, groups) for n in numbers])

    async def send_at_rate(
        self, groups: list[str], first: int, count: int, per_second: float
    ) -> list[int]:
        """Each at its time, whether or not the ones before have been sent.

        So a layer that is slow isn't given less to do.
        """
        numbers = range(first, first + count)
        tasks = []
        start = now()
        for n in numbers:
            await asyncio.sleep(start + (n - first) / per_second - now())
            tasks.append(asyncio.ensure_future(self._send(n, groups)))
        return await _taken(numbers, tasks)

    async def _send(self, n: int, groups: list[str]) -> bool:
        group = groups[n % len(groups)]
        message = {
            "type": "benchmark.message",
            "group": group,
            "n": n,
            "sent_at": now(),
            "data": b"x" * self.SIZE,
        }
        try:
            await self.layer.group_send(group, message)
        except Exception as exc:
            self.tally.note_exc(exc)
            return False
        return True


async def _taken(
    numbers: Sequence[int],
    sends: Sequence[Coroutine[Any, Any, bool] | asyncio.Future[bool]],
) -> list[int]:
    outcomes = await asyncio.gather(*sends)
    return [n for n, is_taken in zip(numbers, outcomes, strict=True) if is_taken]
