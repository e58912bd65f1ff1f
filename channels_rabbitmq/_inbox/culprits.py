"""Describe a channel by more than its name: by its groups and its consumer.

This is for log lines that come once in some seconds. So no record is kept for them: each
description looks through the table of groups and the tasks of the event loop. In Channels a
consumer's task is in ``__call__`` of the consumer, an object with the attribute ``channel_name``.
If a channel has no such task, its consumer has ended, but the channel is still in its groups or
messages are still sent to it.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from .members import Members

# How many groups of a channel are named.
_SHOWN_GROUPS = 2
# How many nested coroutines of a task are looked at: middlewares are around a consumer.
_DEEPEST = 50


class Culprits:
    """Describes channels of the running event loop."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._loop = asyncio.get_running_loop()

    def describe(self, channels: Iterable[str]) -> Mapping[str, str]:
        """Return a text about each of ``channels``, empty if nothing is known about it.

        One call looks at every group and at every task of the event loop.
        """
        names = set(channels)
        consumers = {name: consumer for name, consumer in self._consumers() if name in names}
        return {
            name: ", ".join(filter(None, (consumers.get(name, ""), self._groups(name))))
            for name in names
        }

    def _groups(self, channel: str) -> str:
        groups = self._members.groups_of(channel)
        if not groups:
            return ""
        more = f" and {len(groups) - _SHOWN_GROUPS} more" if len(groups) > _SHOWN_GROUPS else ""
        return f"in {', '.join(groups[:_SHOWN_GROUPS])}{more}"

    def _consumers(self) -> Iterable[tuple[str, str]]:
        for task in asyncio.all_tasks(self._loop):
            coroutine: Any = task.get_coro()
            for _ in range(_DEEPEST):
                frame = getattr(coroutine, "cr_frame", None)
                if frame is None:
                    break
                # Read f_locals of such frames only: up to Python 3.12 that makes a copy that stays.
                if frame.f_code.co_name == "__call__":
                    consumer = frame.f_locals.get("self")
                    # Without running code of the project's, such as a property's.
                    name = inspect.getattr_static(consumer, "channel_name", None)
                    if isinstance(name, str):
                        yield name, type(consumer).__qualname__
                coroutine = coroutine.cr_await
