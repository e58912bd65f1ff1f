"""Do three bad channels harm the good ones of their process? One process, at default settings.

Six *prompt* channels take each message at once. Beside them are a *slow* one, whose handler takes
20 ms; a *stuck* one, on which nobody ever calls ``receive``; and a *leaked* one, whose consumer has
gone without ``group_discard``. All nine are in a room, which gets 150 messages a second. Besides,
each prompt channel has a group of its own, with 25 messages a second, and the stuck and the leaked
one 50 each: 400 messages a second in all, of 4 KiB. Another process sends them, each at its time.

The same is done without the three before, in fresh processes: what prompt channels wait *more* is
the difference of both runs' p99. A message is lost if the layer took it and a prompt channel in its
group didn't get it. Memory is what the channels' process has grown by when all is over: a layer
without a capacity keeps what the bad ones don't take, for ever or until it expires.

Before each measurement, prompt channels get messages for a moment.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from benchmarks import problems
from benchmarks.figures import percentile
from benchmarks.model import CHANNEL_LAYERS, Failed
from benchmarks.role import Progress, Role, now
from benchmarks.scenario import Metric, Scenario
from benchmarks.sender import GroupSender
from benchmarks.usage import resident_mib

if TYPE_CHECKING:
    from benchmarks.stage import Stage
    from benchmarks.workers import WorkerHandle

_ROOM_RATE = 150.0  # messages a second
_PROMPT_RATE = 25.0
_BAD_RATE = 50.0
_HANDLER = 0.02  # seconds that the slow one takes
_SIZE = 4096
_WARM_UP = 1.0  # seconds

_ROOM = "benchmark.room"
# A channel's own group, by which it is called here
_SLOW, _STUCK, _LEAKED = "benchmark.slow", "benchmark.stuck", "benchmark.leaked"
_PROMPT = tuple(f"benchmark.prompt-{n}" for n in range(6))

Key = tuple[str, str, int]  # a prompt channel, a group, a message's number


class House(Role):
    """All channels."""

    async def open(self, with_bad: bool) -> None:
        self._first = 0
        self._waits: dict[Key, float] = {}
        self._missing: set[Key] = set()
        self._slow = 0
        for member in _PROMPT:
            channel = await self._join(member)
            self.spawn(self._take_at_once(member, channel))
        if with_bad:
            self.spawn(self._take_slowly(await self._join(_SLOW)))
            await self._join(_STUCK)
            await self._leak(await self._join(_LEAKED))

    async def _join(self, group: str) -> str:
        channel: str = await self.layer.new_channel()
        for each in (group, _ROOM):
            await self.layer.group_add(each, channel)
        return channel

    async def _leak(self, channel: str) -> None:
        """It has been received from, as a consumer does, before it is left alone."""
        receiving = asyncio.ensure_future(self.layer.receive(channel))
        await asyncio.sleep(0.1)
        receiving.cancel()
        await asyncio.wait([receiving])

    async def _take_at_once(self, member: str, channel: str) -> None:
        while True:
            message = await self.layer.receive(channel)
            key = (member, message["group"], message["n"])
            self._note(key, now() - message["sent_at"])
            if len(message["data"]) != _SIZE:
                self.tally.note(problems.DAMAGED)

    def _note(self, key: Key, wait: float) -> None:
        if key[2] < self._first:
            return  # of what came before the measurement
        if key in self._waits:
            self.tally.note(problems.DUPLICATED)
            return
        self._waits[key] = wait
        self._missing.discard(key)

    async def _take_slowly(self, channel: str) -> None:
        while True:
            await self.layer.receive(channel)
            self._slow += 1
            await asyncio.sleep(_HANDLER)

    async def begin(self, first: int) -> None:
        """From now on, messages from this number on count."""
        self._first = first
        self._waits.clear()
        self._slow = 0
        self._mib_before = resident_mib()

    async def slow(self) -> int:
        """How many messages the slow one has taken until now."""
        return self._slow

    async def drain(self, sent: dict[str, list[int]]) -> tuple[list[float], int, float]:
        """Waits for what prompt channels are to get of these numbers by group.

        Returns how long each took, how many are lost, and by how many MiB the process has grown.
        """
        expected = {
            (member, group, n)
            for member in _PROMPT
            for group in (_ROOM, member)
            for n in sent[group]
        }
        self._missing = expected - self._waits.keys()
        await Progress(lambda: -len(self._missing)).reach(0)
        self.tally.note(problems.LOST, len(self._missing))
        waits = [wait for key, wait in self._waits.items() if key in expected]
        return waits, len(self._missing), resident_mib() - self._mib_before


class Sender(GroupSender):
    SIZE = _SIZE


def _rates(with_bad: bool) -> dict[str, float]:
    """Messages a second for each group."""
    rates = {_ROOM: _ROOM_RATE, **dict.fromkeys(_PROMPT, _PROMPT_RATE)}
    return {**rates, _STUCK: _BAD_RATE, _LEAKED: _BAD_RATE} if with_bad else rates


async def _send(
    sender: WorkerHandle, rates: dict[str, float], first: int, seconds: float
) -> dict[str, list[int]]:
    """All groups' messages side by side; returns which the layer took, by group."""
    taken = await asyncio.gather(
        *(
            sender.call(
                "send_at_rate",
                groups=[group],
                first=first,
                count=int(rate * seconds),
                per_second=rate,
            )
            for group, rate in rates.items()
        )
    )
    return dict(zip(rates, taken, strict=True))


async def _measure(stage: Stage, *, with_bad: bool) -> dict[str, float]:
    """In processes that end with it."""
    seconds = 4.0 if stage.quick else 10.0
    house = await stage.start("neighbours.House")
    sender = await stage.start("neighbours.Sender")
    await house.call("open", with_bad=with_bad)
    await sender.call("open")

    await _send(sender, dict.fromkeys(_PROMPT, _PROMPT_RATE), 0, _WARM_UP)
    first = int(_PROMPT_RATE * _WARM_UP)
    await house.call("begin", first=first)
    sent = await _send(sender, _rates(with_bad), first, seconds)
    slow = await house.call("slow")
    waits, lost, mib = await house.call("drain", sent=sent)
    await stage.end(sender)
    await stage.end(house)
    if not waits:
        await stage.fail_on_problems()
        raise Failed("no message arrived")
    return {
        "lost": 100 * lost / (lost + len(waits)),
        "p50_ms": percentile(waits, 50) * 1000,
        "p99_ms": percentile(waits, 99) * 1000,
        "slow": slow / seconds,
        "mib": mib,
    }


async def run(stage: Stage) -> dict[str, float]:
    alone = await _measure(stage, with_bad=False)
    await stage.server.clear()
    await stage.server.rest()
    beside = await _measure(stage, with_bad=True)
    return {
        **beside,
        "alone_p99_ms": alone["p99_ms"],
        "more_ms": beside["p99_ms"] - alone["p99_ms"],
        "alone_mib": alone["mib"],
    }


SCENARIOS = (
    Scenario(
        name="neighbours",
        title="Neighbours at default settings: six prompt channels beside three bad ones",
        metrics=(
            Metric("lost", "prompt: lost, %", 1, more_is_better=False),
            Metric("p50_ms", "p50, ms", 1),
            Metric("p99_ms", "p99, ms", 1),
            Metric("alone_p99_ms", "alone, p99, ms", 1),
            Metric("more_ms", "more, ms", 1),
            Metric("slow", "slow one, /s", 1),
            Metric("mib", "growth, MiB", 1),
            Metric("alone_mib", "alone, MiB", 1),
        ),
        layers=CHANNEL_LAYERS,
        run=run,
        time_limit=120.0,
        at_defaults=True,
    ),
)
