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
from typing import TYPE_CHECKING, Any

import problems
from figures import percentile
from model import CHANNEL_LAYERS, Failed, Metric, Scenario
from role import Progress, Role, now
from sender import GroupSender
from usage import resident_mib

if TYPE_CHECKING:
    from stage import Stage

_ROOM_RATE = 150.0  # messages a second
_PROMPT_RATE = 25.0
_BAD_RATE = 50.0
_HANDLER = 0.02  # seconds that the slow one takes
_SIZE = 4096
_WARM_UP = 1.0  # seconds

# Names of channels and groups; each run's groups are its own
_ROOM, _SLOW, _STUCK, _LEAKED = "room", "slow", "stuck", "leaked"
_PROMPT = tuple(f"prompt-{n}" for n in range(6))

Key = tuple[str, str, int]  # a prompt channel, a group, a message's number


class House(Role):
    """All channels."""

    async def open(self, prefix: str, with_bad: bool) -> None:
        self._prefix = prefix
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
            await self.layer.group_add(self._prefix + each, channel)
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
            group = message["group"].removeprefix(self._prefix)
            self._note((member, group, message["n"]), now() - message["sent_at"])
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

    async def stop(self) -> None:
        """Nobody receives any longer."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def drain(self, sent: dict[str, list[int]]) -> dict[str, Any]:
        """Waits for what prompt channels are to get of these numbers by group."""
        expected = {
            (member, group, n)
            for member in _PROMPT
            for group in (_ROOM, member)
            for n in sent[group]
        }
        self._missing = expected - self._waits.keys()
        await Progress(lambda: -len(self._missing)).reach(0)
        self.tally.note(problems.LOST, len(self._missing))
        return {
            "waits": [wait for key, wait in self._waits.items() if key in expected],
            "lost": 100 * len(self._missing) / len(expected) if expected else 0.0,
            "mib": resident_mib() - self._mib_before,
        }


class Sender(GroupSender):
    SIZE = _SIZE


def _rates(with_bad: bool) -> dict[str, float]:
    """Messages a second for each group."""
    rates = {_ROOM: _ROOM_RATE, **dict.fromkeys(_PROMPT, _PROMPT_RATE)}
    return {**rates, _STUCK: _BAD_RATE, _LEAKED: _BAD_RATE} if with_bad else rates


async def _measure(stage: Stage, *, with_bad: bool, seconds: float) -> dict[str, Any]:
    house = await stage.start("neighbours.House")
    sender = await stage.start("neighbours.Sender")
    prefix = "benchmark.beside." if with_bad else "benchmark.alone."
    await house.call("open", prefix=prefix, with_bad=with_bad)
    await sender.call("open")

    async def send(rates: dict[str, float], first: int, duration: float) -> dict[str, list[int]]:
        taken = await asyncio.gather(
            *(
                sender.call(
                    "send_at_rate",
                    groups=[prefix + group],
                    first=first,
                    count=int(rate * duration),
                    per_second=rate,
                )
                for group, rate in rates.items()
            )
        )
        return dict(zip(rates, taken, strict=True))

    await send(dict.fromkeys(_PROMPT, _PROMPT_RATE), 0, _WARM_UP)
    first = int(_PROMPT_RATE * _WARM_UP)
    await house.call("begin", first=first)
    sent = await send(_rates(with_bad), first, seconds)
    slow = await house.call("slow")
    outcome: dict[str, Any] = await house.call("drain", sent=sent)
    await house.call("stop")
    if not outcome["waits"]:
        await stage.fail_on_problems()
        raise Failed("no message arrived")
    return {
        **outcome,
        "slow": slow / seconds,
        "p50_ms": percentile(outcome["waits"], 50) * 1000,
        "p99_ms": percentile(outcome["waits"], 99) * 1000,
    }


async def run(stage: Stage) -> dict[str, float]:
    seconds = 4.0 if stage.quick else 10.0
    alone = await _measure(stage, with_bad=False, seconds=seconds)
    beside = await _measure(stage, with_bad=True, seconds=seconds)
    return {
        "lost": beside["lost"],
        "p50_ms": beside["p50_ms"],
        "p99_ms": beside["p99_ms"],
        "alone_p99_ms": alone["p99_ms"],
        "more_ms": beside["p99_ms"] - alone["p99_ms"],
        "slow": beside["slow"],
        "mib": beside["mib"],
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
