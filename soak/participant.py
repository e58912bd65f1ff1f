"""One process of a soak: it sends, receives, joins and leaves, and notes all of it.

    python -m soak.participant NAME URL JOURNAL SEED

Standard input brings orders, a JSON object in each line, and standard output takes the answers:

- ``{"people": {NAME: [CHANNEL, ...]}}``: the residents of all; from now on there is traffic;
- ``{"settle": N}``: answered by ``{"settled": N}`` when messages from everybody arrive here and all
  groups are bound; it goes on telling the others so until ``{"settled": N}`` comes;
- ``{"stop": true}``: all that was sent is received, everybody leaves, and the process ends.

Besides it says ``{"counts": ...}`` once a second and ``{"problem": TEXT}`` when something happens
that must not. What the journal holds is in ``proof.py``.

In it there are *residents*, channels that stay and are in the same groups all the time, and
*visitors*, which come, join, have somebody call them, leave and go, as websockets do. A thread
sends and receives from sync code.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from typing import Any

from asgiref.sync import async_to_sync
from channels.exceptions import ChannelFull

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from soak.proof import OK

GROUPS = [f"g{n}" for n in range(40)]
_EVERYBODY = "everybody"  # a group

_RESIDENTS = 3
_GROUPS_OF_A_RESIDENT = 4
_VISITORS = 5
_SENDERS = 4
# Seconds, on average, between two calls of one sender, and of the thread.
_PAUSE = 0.025
_SYNC_PAUSE = 0.1
# Seconds until a marker that hasn't come is sent again: its connection may have been lost.
_MARKER_TIMEOUT = 3.0

_REFUSALS = (ChannelFull, BrokerUnavailable)


class Journal:
    """The file of notes; from any thread."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "w", encoding="ascii")  # noqa: SIM115 - close() does
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def note(self, kind: str, *words: object) -> None:
        line = " ".join([kind, *map(str, words)]) + "\n"
        with self._lock:
            self.counts[kind] += 1
            self._file.write(line)

    def close(self) -> None:
        self._file.close()


class Problems(logging.Handler):
    """Says what is logged as an error, and what an event loop would only log."""

    def emit(self, record: logging.LogRecord) -> None:
        say(problem=f"logged: {self.format(record)}")


def say(**words: Any) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


class Ear:
    """A channel, and who receives from it all the time."""

    def __init__(self, participant: Participant, channel: str) -> None:
        self.channel = channel
        self._participant = participant
        self._markers: dict[str, asyncio.Event] = {}
        self._task = asyncio.create_task(self._listen())
        participant.journal.note("join", channel, channel, time.monotonic())

    async def join(self, group: str) -> bool:
        participant = self._participant
        try:
            await participant.layer.group_add(group, self.channel)
        except BrokerUnavailable:
            participant.journal.note("join", self.channel, group, "inf")
            return False
        participant.journal.note("join", self.channel, group, time.monotonic())
        return True

    async def leave(self, group: str) -> None:
        begun = await self._flush(group)
        await self._participant.layer.group_discard(group, self.channel)
        self._participant.journal.note("leave", self.channel, group, begun)

    async def go(self) -> None:
        begun = await self._flush(self.channel)
        self._participant.journal.note("leave", self.channel, self.channel, begun)
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _flush(self, target: str) -> float:
        """Have everything arrive that was confirmed before the moment that is returned."""
        layer = self._participant.layer
        for number in itertools.count():
            token = f"{self.channel} {number}"
            event = self._markers[token] = asyncio.Event()
            begun = time.monotonic()
            try:
                if "!" in target:
                    await layer.send(target, {"type": "soak", "marker": token})
                else:
                    await layer.group_send(target, {"type": "soak", "marker": token})
                await within(event.wait(), _MARKER_TIMEOUT)
            except _REFUSALS:
                await asyncio.sleep(0.2)
            del self._markers[token]
            if event.is_set():
                return begun
        raise AssertionError("never without an end")

    async def _listen(self) -> None:
        participant = self._participant
        while True:
            # Some are cancelled, as at the end of a websocket: they must lose nothing.
            limit = participant.chance.uniform(0, 0.05) if participant.chance.random() < 0.2 else 60
            done, message = await within(participant.layer.receive(self.channel), limit)
            if not done:
                continue
            if "number" in message:
                participant.journal.note(
                    "receive", self.channel, message["sender"], message["target"], message["number"]
                )
            elif message.get("marker") in self._markers:
                self._markers[message["marker"]].set()
            elif "ping" in message:
                participant.accept_ping(message)
            elif "call" in message:
                participant.start(participant.call(message["call"], message["count"]))


class Sender:
    """Calls one after the other, numbered by target."""

    def __init__(self, participant: Participant, name: str) -> None:
        self._participant = participant
        self._name = name
        self._numbers: Counter[str] = Counter()

    def message(self, target: str) -> dict[str, Any]:
        self._numbers[target] += 1
        chance = self._participant.chance
        size = 150_000 if chance.random() < 0.002 else chance.randrange(300)
        return {
            "type": "soak",
            "sender": self._name,
            "target": target,
            "number": self._numbers[target],
            "padding": b"x" * size,
        }

    async def send(self, target: str) -> None:
        layer = self._participant.layer
        message = self.message(target)
        outcome = OK
        begun = time.monotonic()
        try:
            if "!" in target:
                await layer.send(target, message)
            else:
                await layer.group_send(target, message)
        except _REFUSALS as exc:
            outcome = type(exc).__name__
        ended = time.monotonic()
        self._participant.journal.note(
            "send", self._name, target, message["number"], begun, ended, outcome
        )
        if outcome != OK:
            await asyncio.sleep(0.05)


class Participant:
    """All that one process does."""

    def __init__(self, name: str, url: str, journal: Journal, seed: int) -> None:
        self.name = name
        self.journal = journal
        self.chance = random.Random(seed)
        self.layer = RabbitmqChannelLayer(
            host=url, remote_capacity=10_000, local_capacity=200, expiry=60
        )
        self.is_stopping = asyncio.Event()
        self._residents: list[tuple[Ear, list[str]]] = []
        self._people: dict[str, list[str]] = {}
        self._heard: dict[int, set[tuple[str, str]]] = defaultdict(set)
        self._settled = 0
        self._work: set[asyncio.Task[None]] = set()
        self._callers = itertools.count(1)
        self._sync = SyncCode(self)

    async def run(self) -> None:
        await self._move_in()
        say(ready=[ear.channel for ear, _ in self._residents])
        async for order in orders():
            if "people" in order:
                self._people = order["people"]
                self._start_traffic()
            elif "settle" in order:
                self.start(self._settle(order["settle"]))
            elif "settled" in order:
                self._settled = order["settled"]
            else:
                break
        await self._end()

    # Traffic

    async def _move_in(self) -> None:
        for number in range(_RESIDENTS):
            ear = Ear(self, await self.layer.new_channel())
            groups = self.chance.sample(GROUPS, _GROUPS_OF_A_RESIDENT)
            if not number:
                groups.append(_EVERYBODY)
            for group in groups:
                if not await ear.join(group):
                    raise RuntimeError("no connection at the start")
            self._residents.append((ear, groups))

    def _start_traffic(self) -> None:
        for number in range(_SENDERS):
            self.start(self._send_on_and_on(Sender(self, f"{self.name}.{number}")))
        for _ in range(_VISITORS):
            self.start(self._visit_again_and_again())
        self.start(self._tell_counts())
        self._sync.start()

    def start(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._work.add(task)
        task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if task.exception() is not None:
            say(problem=f"raised: {task.exception()!r}")

    async def _send_on_and_on(self, sender: Sender) -> None:
        while not self.is_stopping.is_set():
            is_group = self.chance.random() < 0.5
            await sender.send(self.chance.choice(GROUPS) if is_group else self._someone())
            await asyncio.sleep(self.chance.expovariate(1 / _PAUSE))

    def _someone(self) -> str:
        return self.chance.choice(self.chance.choice(list(self._people.values())))

    async def _visit_again_and_again(self) -> None:
        while not self.is_stopping.is_set():
            ear = Ear(self, await self.layer.new_channel())
            groups = []
            for group in self.chance.sample(GROUPS, self.chance.randrange(4)):
                if await ear.join(group):
                    groups.append(group)
            with contextlib.suppress(*_REFUSALS):
                call = {"type": "soak", "call": ear.channel, "count": self.chance.randrange(1, 20)}
                await self.layer.send(self._someone(), call)
            await within(self.is_stopping.wait(), self.chance.uniform(0.2, 6.0))
            for group in groups:
                await ear.leave(group)
            await ear.go()

    async def call(self, channel: str, count: int) -> None:
        """Send to a visitor as often as it asked for, which may have gone meanwhile."""
        sender = Sender(self, f"{self.name}.caller{next(self._callers)}")
        for _ in range(count):
            if self.is_stopping.is_set():
                break
            await sender.send(channel)

    async def _tell_counts(self) -> None:
        while not self.is_stopping.is_set():
            counts = self.journal.counts
            say(counts={"sent": counts["send"], "received": counts["receive"]})
            await within(self.is_stopping.wait(), 1.0)

    # After a fault

    async def _settle(self, number: int) -> None:
        begun = time.monotonic()
        is_told = False
        while self._settled < number and not self.is_stopping.is_set():
            ping = {"type": "soak", "ping": number, "from": self.name}
            calls = [self.layer.group_send(_EVERYBODY, {**ping, "way": "group"})]
            for channels in self._people.values():
                calls.append(self.layer.send(channels[0], {**ping, "way": "direct"}))
            for result in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(result, Exception) and not isinstance(result, _REFUSALS):
                    say(problem=f"raised: {result!r}")
            if not is_told and self._is_settled(number, begun):
                is_told = True
                say(settled=number)
            await asyncio.sleep(0.1)
        self._heard.pop(number, None)

    def _is_settled(self, number: int, begun: float) -> bool:
        everybody = {(name, way) for name in self._people for way in ("group", "direct")}
        (own,) = [one for one in self.layer.statistics() if not one.for_sync_code]
        return (
            self._heard[number] >= everybody
            and own.groups.bound - own.groups.lingering >= own.groups.required
            and self._sync.last_begun >= begun
        )

    def accept_ping(self, message: dict[str, Any]) -> None:
        if message["ping"] > self._settled:
            self._heard[message["ping"]].add((message["from"], message["way"]))

    # The end

    async def _end(self) -> None:
        self.is_stopping.set()
        await self._sync.wait_ended()
        while self._work:
            await asyncio.wait(self._work)
        say(calm=True)
        # Only when everybody's calls have ended is what comes now the last.
        async for _ in orders():
            break
        for ear, groups in self._residents:
            for group in groups:
                await ear.leave(group)
            await ear.go()
        await self.layer.close()
        await asyncio.to_thread(self._sync.close)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            say(problem=f"left behind: {task!r}")
        self.journal.close()


class SyncCode:
    """A thread without an event loop: round trips by ``async_to_sync``, and group sends."""

    def __init__(self, participant: Participant) -> None:
        self._participant = participant
        self._sender = Sender(participant, f"{participant.name}.sync")
        self._chance = random.Random(participant.chance.random())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self.last_begun = 0.0  # the last round trip that succeeded

    def start(self) -> None:
        self._thread.start()

    async def wait_ended(self) -> None:
        if self._thread.is_alive():
            await self._ended.wait()

    def close(self) -> None:
        async_to_sync(self._participant.layer.close)()

    def _run(self) -> None:
        try:
            self._go_round_and_round()
        except BaseException as exc:
            say(problem=f"raised in sync code: {exc!r}")
            raise
        finally:
            self._loop.call_soon_threadsafe(self._ended.set)

    def _go_round_and_round(self) -> None:
        participant = self._participant
        channel = async_to_sync(participant.layer.new_channel)()
        participant.journal.note("join", channel, channel, time.monotonic())
        while not participant.is_stopping.is_set():
            begun = time.monotonic()
            if self._go_round(channel):
                self.last_begun = begun
            async_to_sync(self._sender.send)(self._chance.choice(GROUPS))
            time.sleep(self._chance.expovariate(1 / _SYNC_PAUSE))
        # Nobody else sends to this channel. What was confirmed before the last one has arrived.
        while True:
            begun = time.monotonic()
            if self._go_round(channel):
                break
        participant.journal.note("leave", channel, channel, begun)

    def _go_round(self, channel: str) -> bool:
        participant = self._participant
        async_to_sync(self._sender.send)(channel)
        number = self._sender._numbers[channel]
        deadline = time.monotonic() + _MARKER_TIMEOUT
        while (left := deadline - time.monotonic()) > 0:
            done, message = async_to_sync(self._receive)(channel, left)
            if done:
                participant.journal.note(
                    "receive", channel, message["sender"], message["target"], message["number"]
                )
                if message["number"] == number:
                    return True
        return False

    async def _receive(self, channel: str, limit: float) -> tuple[bool, Any]:
        return await within(self._participant.layer.receive(channel), limit)


async def within(coroutine: Any, limit: float) -> tuple[bool, Any]:
    """Whether it returned within ``limit`` seconds, and what. Not ``wait_for``, which up to Python
    3.11 swallows a cancellation that comes together with the result.
    """
    task = asyncio.ensure_future(coroutine)
    try:
        await asyncio.wait([task], timeout=limit)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
    return (False, None) if task.cancelled() else (True, task.result())


_reader: asyncio.StreamReader | None = None


async def orders() -> AsyncIterator[dict[str, Any]]:
    """The lines of standard input."""
    global _reader
    if _reader is None:
        _reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(_reader)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    while line := await _reader.readline():
        yield json.loads(line)
    raise EOFError("the coordinator has ended")


async def main() -> None:
    name, url, path, seed = sys.argv[1:]
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    problems = Problems(logging.ERROR)
    problems.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logging.getLogger().addHandler(problems)
    await Participant(name, url, Journal(path), int(seed)).run()


if __name__ == "__main__":
    asyncio.run(main())
