"""CPU time of this project's own code for a message, without a broker and without a socket.

    .venv/bin/python benchmarks/paths.py

Bytes as a broker sends them are fed to the protocol of a layer's connections, whose transports
throw away what is written. So figures are steady enough (some percent) to judge a change by, which
rates with a broker on the same two cores are not. Each is the best of several batches.

- *send*: 50 senders await their confirms, which come 50 at a time;
- *receive*: 50 channels, a message for each at a time;
- *paced*: a group of 1,000 members, one message at a time: all are waiting;
- *burst*: the same group, 100 messages at a time.
"""

from __future__ import annotations

import asyncio
import struct
import time
from typing import Any

import msgpack

from channels_rabbitmq._amqp import frames
from channels_rabbitmq._amqp.channel_ids import ChannelIds
from channels_rabbitmq._amqp.consuming import ConsumerChannel
from channels_rabbitmq._amqp.heartbeat import Heartbeat
from channels_rabbitmq._amqp.protocol import Protocol
from channels_rabbitmq._amqp.publishing import PublisherChannel
from channels_rabbitmq.core import RabbitmqChannelLayer

_BATCHES = 5
_ROUNDS = 200  # in a batch
_CHANNELS = 50
_MEMBERS = 1000
_BURST = 100
_DATA = b"x" * 100


class _NoTransport:
    """What the protocol uses of a transport; what is written goes nowhere."""

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def get_extra_info(self, name: str) -> None:
        return None

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        pass


def _frame(frame_type: int, amqp_channel_id: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", frame_type, amqp_channel_id, len(payload)) + payload + b"\xce"


class Paths:
    """A layer whose connections are open, as far as it can tell."""

    def __init__(self) -> None:
        self._layer = RabbitmqChannelLayer(local_capacity=20_000)
        self._loop_layer: Any = self._layer._loop_layer()
        self._loop_layer._start_subscriber = lambda: None
        self._received = 0
        self._tag = 0

    def _protocol(self) -> Any:
        protocol: Any = Protocol(
            self._layer._settings.urls[0], connection_name="", on_blocked=lambda reason: None
        )
        protocol.connection_made(_NoTransport())
        protocol._channel_ids = ChannelIds(0)
        protocol.frame_max = 131072
        protocol.is_greeted = True
        protocol._heartbeat = Heartbeat(
            60, write=protocol.write, on_dead=lambda: None, on_tick=lambda: None
        )
        return protocol

    def _consumer(self) -> tuple[Any, Any]:
        protocol = self._protocol()
        consumer = protocol.add_channel(
            lambda amqp_channel_id: ConsumerChannel(
                protocol,
                amqp_channel_id,
                on_delivery=self._loop_layer._inbox.on_delivery,
                on_end=print,
            )
        )
        return protocol, consumer

    def _delivery(self, consumer: Any, body: bytes) -> bytes:
        self._tag += 1
        number = consumer._amqp_channel_id
        method = struct.pack(">IB8sQB", frames.DELIVER, 8, b"channels", self._tag, 0)
        key = b"\x15crq.aaaaaaaaaaaaaaaa!"
        # In an hour, or each message of a batch would be older than the one before.
        published = int(1000 * time.time()) + 3_600_000
        headers = struct.pack(">I17sq", 25, b"\x0ftimestamp_in_msl", published)
        header = struct.pack(">HHQH", 60, 0, len(body), 1 << 13) + headers
        return (
            _frame(frames.METHOD, number, method + b"\x06groups" + key)
            + _frame(frames.HEADER, number, header)
            + _frame(frames.BODY, number, body)
        )

    async def _receive(self, channel: str) -> None:
        while True:
            await self._layer.receive(channel)
            self._received += 1

    async def send(self) -> float:
        protocol = self._protocol()
        publisher = protocol.add_channel(
            lambda amqp_channel_id: PublisherChannel(protocol, amqp_channel_id, on_end=print)
        )
        self._loop_layer.publisher._amqp_channel = publisher
        publisher._calls.clear()

        async def send(n: int) -> None:
            channel = f"crq.bbbbbbbbbbbbbbbb!specific.{n}"
            message = {"type": "benchmark.message", "sender": n, "n": 0, "data": _DATA}
            while True:
                await self._layer.send(channel, message)

        tasks = [asyncio.create_task(send(n)) for n in range(_CHANNELS)]
        best = float("inf")
        for _ in range(_BATCHES):
            start = time.process_time()
            for _ in range(_ROUNDS):
                await asyncio.sleep(0)
                confirm = struct.pack(">IQB", frames.ACK, publisher._sequence_number, 1)
                protocol.data_received(_frame(frames.METHOD, publisher._amqp_channel_id, confirm))
                await asyncio.sleep(0)
            best = min(best, (time.process_time() - start) / _ROUNDS / _CHANNELS)
        await _cancel(tasks)
        return best

    async def receive(self) -> float:
        channels = [await self._layer.new_channel() for _ in range(_CHANNELS)]
        bodies = [
            msgpack.packb(
                {
                    "type": "benchmark.message",
                    "sender": 1,
                    "n": 0,
                    "data": _DATA,
                    "__asgi_channel__": channel,
                }
            )
            for channel in channels
        ]
        return await self._deliver(channels, bodies, _ROUNDS, _CHANNELS)

    async def fan_out(self, burst: int) -> float:
        group = f"benchmark.{burst}"
        channels = [await self._layer.new_channel() for _ in range(_MEMBERS)]
        for channel in channels:
            self._loop_layer.members.add(group, channel)
        body = msgpack.packb(
            {"type": "benchmark.message", "n": 0, "data": _DATA, "__asgi_group__": group}
        )
        rounds = max(1, _ROUNDS // burst // 4)
        return await self._deliver(channels, [body] * burst, rounds, _MEMBERS * burst)

    async def _deliver(
        self, channels: list[str], bodies: list[bytes], rounds: int, received_per_round: int
    ) -> float:
        protocol, consumer = self._consumer()
        tasks = [asyncio.create_task(self._receive(channel)) for channel in channels]
        await asyncio.sleep(0)
        best = float("inf")
        for _ in range(_BATCHES):
            chunks = [
                b"".join(self._delivery(consumer, body) for body in bodies) for _ in range(rounds)
            ]
            start = time.process_time()
            for chunk in chunks:
                wanted = self._received + received_per_round
                protocol.data_received(chunk)
                while self._received < wanted:  # noqa: ASYNC110 - the turns it takes are measured
                    await asyncio.sleep(0)
            best = min(best, (time.process_time() - start) / rounds / received_per_round)
        await _cancel(tasks)
        return best


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def measure() -> dict[str, float]:
    """Microseconds of CPU for a message, or for each member's copy of one."""
    paths = Paths()
    seconds = {
        "send": await paths.send(),
        "receive": await paths.receive(),
        "paced": await paths.fan_out(1),
        "burst": await paths.fan_out(_BURST),
    }
    return {path: 1e6 * each for path, each in seconds.items()}


if __name__ == "__main__":
    for path, microseconds in asyncio.run(measure()).items():
        print(f"{path:8} {microseconds:5.2f} µs")
