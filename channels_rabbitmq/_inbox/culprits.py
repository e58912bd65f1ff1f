"""Say more of a channel than its name: its groups, and the consumer whose channel it is.

For log lines that come once in some seconds. Nothing is kept for them; they look through what is
there: the table of groups, and the tasks of the event loop. In Channels a consumer's task is in
``__call__`` of the consumer, an object with the attribute ``channel_name``. A channel for which
there is no such task has been left: its consumer has ended, and nobody took the channel out of its
groups or stopped sending to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from .members import Members

# How many groups of a channel are named.
_SHOWN_GROUPS = 2
# Coroutines within each other that are looked at in a task: middlewares are around a consumer.
_DEEPEST = 50


class Culprits:
    """Describes channels of the running event loop."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._loop = asyncio.get_running_loop()

    def describe(self, channels: Iterable[str]) -> Mapping[str, str]:
        """Return a text about each of ``channels``, empty if there is nothing to say.

        It looks at every group and every task of the event loop once.
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
                # Only such frames: up to Python 3.12 f_locals makes a copy that stays.
                if frame.f_code.co_name == "__call__":
                    consumer = frame.f_locals.get("self")
                    name = getattr(consumer, "channel_name", None)
                    if isinstance(name, str):
                        yield name, type(consumer).__qualname__
                coroutine = coroutine.cr_await
