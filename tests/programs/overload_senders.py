"""A process of ``test_overload.py``: one sender for each channel, and for its group.

    python -m tests.programs.overload_senders OPTIONS

Standard input says how many messages a second to offer, in all, a number in each line; 0 stops them
and has the books written to standard output.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from channels.exceptions import ChannelFull

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.layers import statistics_of
from tests.support.log_lines import log_lines


def memory_in_use() -> int:
    """This process's, in bytes."""
    pid = str(os.getpid())
    listing = subprocess.run(["ps", "-o", "rss=", "-p", pid], capture_output=True, check=True)
    return int(listing.stdout) * 1024


def count_lines(lines: list[str]) -> dict[str, int]:
    """How many warnings there were of each kind."""
    return dict(
        Counter(
            re.sub(r"\d+", "N", line.split(": ")[1]) for line in lines if line.startswith("WARNING")
        )
    )


class Senders:
    """Each offers a message after the other, and leaves out those for which it has no time."""

    def __init__(self, layer: RabbitmqChannelLayer, channels: list[str], body: bytes) -> None:
        self._layer = layer
        self._channels = channels
        self._body = body
        self._numbers: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._before: dict[str, int] = {}
        self._highest_memory = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._calls: set[asyncio.Task[None]] = set()

    def begin(self, rate: float) -> None:
        self._counts.clear()
        self._before = dataclasses.asdict(statistics_of(self._layer).counters)
        self._highest_memory = memory_in_use()
        interval = 2 * len(self._channels) / rate
        for number, channel in enumerate(self._channels):
            self._tasks.append(asyncio.create_task(self._send(channel, interval)))
            self._tasks.append(asyncio.create_task(self._group_send(f"g{number}", interval)))
        self._tasks.append(asyncio.create_task(self._watch()))

    async def stop(self) -> dict[str, Any]:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        while self._calls:
            await asyncio.wait(self._calls)
        for task in self._tasks:
            if not task.cancelled():
                task.result()
        self._tasks.clear()
        counters = dataclasses.asdict(statistics_of(self._layer).counters)
        since = {kind: counters[kind] - before for kind, before in self._before.items()}
        # A group has one member: what its queue refused reached nobody.
        self._counts["group_sent"] -= since["group_nacked"]
        return {
            "full": 0,
            "sent": 0,
            **self._counts,
            **{kind: since[kind] for kind in ("outcome_unknown", "unreachable", "blocked")},
            "group_nacked": since["group_nacked"],
            "memory": memory_in_use(),
            "highest_memory": self._highest_memory,
        }

    async def _undivided(self, call: Coroutine[Any, Any, None]) -> None:
        """Make a call that stop() doesn't cut in the middle: what is sent is to be in the books."""
        task = asyncio.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        await asyncio.shield(task)

    async def _send(self, channel: str, interval: float) -> None:
        while True:
            await self._undivided(self._send_one(channel))
            await asyncio.sleep(interval)

    async def _send_one(self, channel: str) -> None:
        self._numbers[channel] += 1
        message = {"by": "send", "number": self._numbers[channel], "body": self._body}
        try:
            await self._layer.send(channel, message)
        except ChannelFull:
            self._counts["full"] += 1
        else:
            self._counts["sent"] += 1

    async def _group_send(self, group: str, interval: float) -> None:
        while True:
            await self._undivided(self._group_send_one(group))
            await asyncio.sleep(interval)

    async def _group_send_one(self, group: str) -> None:
        self._numbers[group] += 1
        message = {"by": "group", "number": self._numbers[group], "body": self._body}
        await self._layer.group_send(group, message)
        self._counts["group_sent"] += 1

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.2)
            self._highest_memory = max(self._highest_memory, memory_in_use())


async def main() -> None:
    options = json.loads(sys.argv[1])
    layer = RabbitmqChannelLayer(host=options["host"], groups_exchange=options["exchange"])
    senders = Senders(layer, options["channels"], b"x" * options["body"])
    await layer.connect()
    say("ready")
    with log_lines() as lines:
        while line := await asyncio.to_thread(sys.stdin.readline):
            if float(line):
                lines.rest()
                senders.begin(float(line))
                say("begun")
            else:
                books = await senders.stop()
                say({**books, "warnings": count_lines(lines.rest())})
    await layer.close()


def say(what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
