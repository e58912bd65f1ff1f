"""Numbered messages from a sender to a receiver, and books about what became of each.

    async with Traffic(sender, receiver, channels=100, rate=200) as traffic:
        await traffic.flows()
        ...  # break something
        await traffic.flows()
        await traffic.finish()
    assert traffic.books.twice() == []

Each channel has a task that receives from it for ever, and one sender, which awaits each call: so
on a channel the numbers must go up. ``RollCall`` does the same for groups.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

from channels.exceptions import ChannelFull

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.changes import Changes
from tests.support.layers import inside

# Seconds that a test waits in vain for a delivery before it fails: far more than any should take.
PATIENCE = 50.0


@dataclass
class Sent:
    """One call of ``send()``. Times are those of ``time.monotonic()``."""

    number: int
    begun_at: float
    ended_at: float = 0.0  # while it hasn't
    error: Exception | None = None

    @property
    def duration(self) -> float:
        return self.ended_at - self.begun_at


class Books:
    """What was sent, and what was received."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []  # by number
        self.received: Counter[int] = Counter()
        self.received_at: dict[int, float] = {}  # the first time
        self.out_of_order: list[tuple[str, int, int]] = []  # channel, a number, a lower one
        self._last: dict[str, int] = {}  # by channel
        self.changes = Changes()

    def begin(self) -> Sent:
        sent = Sent(len(self.sent), time.monotonic())
        self.sent.append(sent)
        return sent

    def end(self, sent: Sent, error: Exception | None = None) -> None:
        sent.error = error
        sent.ended_at = time.monotonic()
        self.changes.notify()

    def receive(self, channel: str, number: int) -> None:
        last = self._last.get(channel, -1)
        if number <= last:
            self.out_of_order.append((channel, last, number))
        self._last[channel] = max(last, number)
        self.received[number] += 1
        self.received_at.setdefault(number, time.monotonic())
        self.changes.notify()

    def normal(self, since: float = 0.0, until: float = float("inf")) -> list[Sent]:
        """Calls that returned normally, of those that began in that time."""
        return [
            sent
            for sent in self.sent
            if sent.ended_at and sent.error is None and since <= sent.begun_at <= until
        ]

    def raised(self, kind: type[Exception]) -> list[Sent]:
        return [sent for sent in self.sent if isinstance(sent.error, kind)]

    def lost(self, since: float = 0.0, until: float = float("inf")) -> list[Sent]:
        """Those that returned normally and didn't arrive."""
        return [sent for sent in self.normal(since, until) if not self.received[sent.number]]

    def share_arrived(self, since: float = 0.0, until: float = float("inf")) -> float:
        """Of those that returned normally."""
        return 1 - len(self.lost(since, until)) / max(1, len(self.normal(since, until)))

    def twice(self) -> list[int]:
        """Numbers that arrived more than once."""
        return [number for number, times in self.received.items() if times > 1]

    def raised_and_arrived(self) -> list[Sent]:
        """Those that raised an error although they arrived."""
        return [sent for sent in self.sent if sent.error is not None and self.received[sent.number]]

    def summary(self) -> str:
        errors = Counter(type(sent.error).__name__ for sent in self.sent if sent.error is not None)
        return (
            f"{len(self.sent)} sent, {len(self.normal())} returned, raised {dict(errors)}, "
            f"{len(self.received)} arrived, {len(self.lost())} lost, {len(self.twice())} twice, "
            f"{len(self.raised_and_arrived())} raised and arrived"
        )


class Traffic:
    """Direct messages, ``rate`` a second in all, to so many channels of ``receiver``.

    ``senders`` tasks share the channels. A call that waits holds up its own task only, so in an
    outage at most that many calls wait.
    """

    def __init__(
        self,
        sender: RabbitmqChannelLayer,
        receiver: RabbitmqChannelLayer,
        *,
        channels: int,
        rate: float,
        senders: int = 100,
    ) -> None:
        self.books = Books()
        self.channels: list[str] = []
        self._sender = sender
        self._receiver = receiver
        self._count = channels
        self._interval = min(senders, channels) / rate  # between two messages of one task
        self._sending: list[asyncio.Task[None]] = []
        self.receiving: list[asyncio.Task[None]] = []
        self._is_stopping = asyncio.Event()
        self._ended: set[str] = set()  # channels that have had their last message
        self._senders = min(senders, channels)

    async def __aenter__(self) -> Traffic:
        self.channels = [await self._receiver.new_channel() for _ in range(self._count)]
        self.receiving = [asyncio.create_task(self._receive(channel)) for channel in self.channels]
        self._sending = [
            asyncio.create_task(self._send(n, self.channels[n :: self._senders]))
            for n in range(self._senders)
        ]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        tasks = self._sending + self.receiving
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        if exc is None:
            # Nobody's receive() may have ended, whatever happened.
            for end in ends:
                if isinstance(end, Exception):
                    raise end

    async def flows(self) -> float:
        """Wait until a message arrives that was sent from now on; return that moment."""
        now = time.monotonic()
        seen = len(self.books.received_at)

        def arrived() -> bool:
            # The newest are the last; a few others may have come since.
            newest = list(self.books.received_at)[seen:]
            return any(self.books.sent[number].begun_at >= now for number in newest)

        await self.books.changes.until(arrived, timeout=PATIENCE)
        return time.monotonic()

    async def finish(self) -> None:
        """Stop sending, and wait until all that is still to come must have come.

        Channels keep the order, so each gets a last message, again and again until it arrives.
        """
        self._is_stopping.set()
        await asyncio.wait_for(asyncio.gather(*self._sending), PATIENCE)
        self._sending = []
        await asyncio.wait_for(self._end_channels(), PATIENCE)

    async def _end_channels(self) -> None:
        while missing := [name for name in self.channels if name not in self._ended]:
            for channel in missing:
                with contextlib.suppress(ChannelFull, BrokerUnavailable):
                    await self._sender.send(channel, {"type": "test.end"})
            with contextlib.suppress(TimeoutError):
                await self.books.changes.until(
                    lambda: len(self._ended) == len(self.channels), timeout=1
                )

    async def _send(self, n: int, channels: list[str]) -> None:
        await asyncio.sleep(n / self._senders * self._interval)  # not all at the same moment
        while True:
            for channel in channels:
                sent = self.books.begin()
                try:
                    await self._sender.send(channel, {"type": "test.message", "n": sent.number})
                except (ChannelFull, BrokerUnavailable) as err:
                    self.books.end(sent, err)
                else:
                    self.books.end(sent)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(
                        self._is_stopping.wait(), sent.begun_at + self._interval - time.monotonic()
                    )
                if self._is_stopping.is_set():
                    return

    async def _receive(self, channel: str) -> None:
        while True:
            message = await self._receiver.receive(channel)
            if message["type"] == "test.end":
                self._ended.add(channel)
                self.books.changes.notify()
            else:
                self.books.receive(channel, message["n"])


class Outages(logging.Handler):
    """When connections of layers were lost, and when they were there again: from what they log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._losses: list[tuple[str, float]] = []  # role, moment
        self._returns: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        logger = logging.getLogger("channels_rabbitmq")
        before = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(before)

    def emit(self, record: logging.LogRecord) -> None:
        role, _, text = record.getMessage().partition(": ")
        if text.startswith("lost the connection"):
            self._losses.append((role, time.monotonic()))
        elif text.startswith("connected"):
            self._returns.append((role, time.monotonic()))

    def spans(self) -> list[tuple[float, float]]:
        """For each loss its moment, and that of the next connection of the same role."""
        return [
            (
                gone,
                min(
                    (back for other, back in self._returns if other == role and back > gone),
                    default=float("inf"),
                ),
            )
            for role, gone in self._losses
        ]


class RollCall:
    """Members of the receiver's in many groups, which are called one after the other.

    Group ``gN`` has one member; some channels share all groups.
    """

    def __init__(
        self,
        sender: RabbitmqChannelLayer,
        receiver: RabbitmqChannelLayer,
        *,
        groups: int,
        channels: int = 10,
    ) -> None:
        self.groups = [f"g{n}" for n in range(groups)]
        self.receiving: list[asyncio.Task[None]] = []
        self._sender = sender
        self._receiver = receiver
        self._count = channels
        self._heard: Counter[tuple[str, int]] = Counter()  # by group and number of the call
        self._number = 0
        self._changes = Changes()

    async def __aenter__(self) -> RollCall:
        channels = [await self._receiver.new_channel() for _ in range(self._count)]
        self.receiving = [asyncio.create_task(self._receive(channel)) for channel in channels]
        await asyncio.gather(
            *(
                self._receiver.group_add(group, channels[n % self._count])
                for n, group in enumerate(self.groups)
            )
        )
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in self.receiving:
            task.cancel()
        ends = await asyncio.gather(*self.receiving, return_exceptions=True)
        if exc is None:
            for end in ends:
                if isinstance(end, Exception):
                    raise end

    async def all_bound(self) -> float:
        """Wait until the receiver's connection has bound every group; return that moment."""
        bindings = inside(self._receiver).bindings
        deadline = time.monotonic() + PATIENCE
        while bindings.bound < len(self.groups) and time.monotonic() < deadline:  # noqa: ASYNC110 - nobody says so, and calling all groups all the time would disturb what is measured
            await asyncio.sleep(0.02)
        assert bindings.bound >= len(self.groups), "not all groups are bound"
        return time.monotonic()

    async def call(self) -> None:
        """Send to every group; each must be heard, once."""
        self._number += 1
        number = self._number
        wanted = {(group, number) for group in self.groups}
        for some in _batches(self.groups, 50):  # so few that no queue is full
            await asyncio.gather(
                *(
                    self._sender.group_send(group, {"type": "test.call", "call": [group, number]})
                    for group in some
                )
            )
            await self._changes.until(
                lambda some=some: all((group, number) in self._heard for group in some),
                timeout=PATIENCE,
            )
        assert wanted <= self._heard.keys()
        assert self.twice() == []

    def twice(self) -> list[tuple[str, int]]:
        """Groups that heard a call more than once."""
        return [call for call, times in self._heard.items() if times > 1]

    async def _receive(self, channel: str) -> None:
        while True:
            message = await self._receiver.receive(channel)
            group, number = message["call"]
            self._heard[group, number] += 1
            self._changes.notify()


def _batches(items: list[str], size: int) -> Iterable[list[str]]:
    for n in range(0, len(items), size):
        yield items[n : n + size]
