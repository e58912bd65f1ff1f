"""As many messages as go from one process to another: 50 senders side by side, a channel each.

Each sender awaits its ``send`` before the next one, so 50 messages at most are under way; the
receivers take what comes. A ``send`` that is refused (ChannelFull) is counted and not repeated; its
sender pauses for a millisecond.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from benchmarks import problems
from benchmarks.model import LAYERS, Failed
from benchmarks.role import Progress, Role, now
from benchmarks.scenario import Metric, Scenario

if TYPE_CHECKING:
    from benchmarks.stage import Stage

SENDERS = 50
_WARM_UP = 0.4  # seconds
_PAUSE = 0.001


class Sender(Role):
    def __init__(self, layer: object) -> None:
        super().__init__(layer)
        self._sent = [0] * SENDERS  # accepted by the layer; also the number of the next message
        self._refused = 0

    async def send(self, channels: list[str], size: int, seconds: float) -> dict[str, object]:
        """Goes on for so many seconds. ``sent`` counts from the first call on."""
        self._refused = 0
        start = now()
        data = b"x" * size
        await asyncio.gather(
            *(self._send(n, channel, data, start + seconds) for n, channel in enumerate(channels))
        )
        return {"start": start, "sent": self._sent, "refused": self._refused}

    async def _send(self, sender: int, channel: str, data: bytes, end: float) -> None:
        while now() < end:
            try:
                await self.layer.send(
                    channel,
                    {
                        "type": "benchmark.message",
                        "sender": sender,
                        "n": self._sent[sender],
                        "data": data,
                    },
                )
                self._sent[sender] += 1
            except Exception as exc:
                self.tally.note_exc(exc)
                self._refused += 1
                await asyncio.sleep(_PAUSE)


class Receiver(Role):
    """Checks each message: of its sender the next one, and whole."""

    def __init__(self, layer: object) -> None:
        super().__init__(layer)
        self._size = 0
        self._next = [0] * SENDERS
        self._received = 0
        self._last_at = 0.0

    async def open(self, size: int) -> list[str]:
        self._size = size
        channels = [await self.layer.new_channel() for _ in range(SENDERS)]
        await self.connect(channels[0])
        for channel in channels:
            self.spawn(self._receive(channel))
        return channels

    async def _receive(self, channel: str) -> None:
        receive = self.layer.receive
        while True:
            message = await receive(channel)
            self._check(message["sender"], message["n"], message["data"])

    def _check(self, sender: int, n: int, data: bytes) -> None:
        self._received += 1
        self._last_at = now()
        expected = self._next[sender]
        if n != expected:
            if n < expected:
                self.tally.note(problems.DUPLICATED)
                return
            self.tally.note(problems.LOST, n - expected)
        self._next[sender] = n + 1
        if len(data) != self._size:
            self.tally.note(problems.DAMAGED)

    async def drain(self, sent: list[int]) -> dict[str, float]:
        """Waits for what was sent; ``received`` counts from the first message on."""
        await Progress(lambda: sum(self._next)).reach(sum(sent))
        for sender, (count, expected) in enumerate(zip(sent, self._next, strict=True)):
            if count > expected:
                self.tally.note(problems.LOST, count - expected)
                self._next[sender] = count
        return {"received": self._received, "last_at": self._last_at}


class RawReceiver(Receiver):
    """One queue and a callback: nothing between RabbitMQ and the check."""

    async def open(self, size: int) -> list[str]:
        from benchmarks.layers import raw

        self._size = size

        def accept(body: bytes) -> None:
            message = raw.decode(body)
            self._check(message["sender"], message["n"], message["data"])

        return [await self.layer.consume(accept)] * SENDERS


async def run(stage: Stage, size: int) -> dict[str, float]:
    receiver = await stage.start(
        "throughput.RawReceiver" if stage.is_raw else "throughput.Receiver"
    )
    sender = await stage.start("throughput.Sender")
    channels = await receiver.call("open", size=size)

    async def send(seconds: float) -> tuple[dict[str, float], dict[str, float]]:
        sent = await sender.call("send", channels=channels, size=size, seconds=seconds)
        return sent, await receiver.call("drain", sent=sent["sent"])

    _, before = await send(_WARM_UP)
    async with stage.cpu_times(sender=sender, receiver=receiver) as cpu:
        sent, after = await send(1.5 if stage.quick else 4.0)
    delivered = after["received"] - before["received"]
    if not delivered:
        raise Failed("nothing was delivered")
    return {
        "delivered": delivered / (after["last_at"] - sent["start"]),
        "refused": 100 * sent["refused"] / (delivered + sent["refused"]),
        **cpu.per(delivered),
    }


def _scenario(name: str, size: int, size_text: str) -> Scenario:
    return Scenario(
        name=name,
        title=f"Throughput: messages of {size_text}, 50 senders in one process",
        metrics=(
            Metric("delivered", "delivered/s", more_is_better=True),
            Metric("sender_us", "sender, µs CPU", 1),
            Metric("receiver_us", "receiver, µs CPU", 1),
            Metric("server_us", "server, µs CPU", 1),
            Metric("refused", "refused, %", 1),
        ),
        layers=LAYERS,
        run=partial(run, size=size),
    )


SCENARIOS = (
    _scenario("throughput-100", 100, "100 bytes"),
    _scenario("throughput-10k", 10 * 1024, "10 KiB"),
)
