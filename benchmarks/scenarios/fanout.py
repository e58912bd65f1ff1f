"""One message to a group of 2,000 channels: 1,000 in each of two processes; a third one sends.

*Burst*: 100 messages are sent side by side and queue up; the next burst comes when all members have
all of the last. Every member does little for each message, so this is the price of a copy.

*Paced*: the next message is sent when all members have the last one, as it is with the isolated
events of a website. So every message wakes 2,000 sleeping tasks. The members' processes tell the
sender by a byte on a socket, which is the same for all layers.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from functools import partial
from typing import TYPE_CHECKING, Any

import problems
from model import CHANNEL_LAYERS, Failed, Metric, Scenario
from role import Role, now, side_by_side

if TYPE_CHECKING:
    from stage import Stage

GROUP = "benchmark.fan-out"
PROCESSES = 2
MEMBERS = 1000  # in each process
BURST = 100  # messages
_DATA = b"x" * 100
_PATIENCE = 30.0  # seconds for a round; the slowest layer's burst takes a dozen


class Members(Role):
    """Many channels in the group. A *round* is what all of them are to get before the next one."""

    async def open(self, per_round: int, socket: str) -> None:
        self._all = (1 << per_round) - 1
        self._bits = [1 << n for n in range(per_round)]
        self._seen = [0] * MEMBERS  # of this round's messages, a bit each
        self._complete = 0  # members that have all of this round
        _, self._signal = await asyncio.open_unix_connection(socket)
        channels = [await self.layer.new_channel() for _ in range(MEMBERS)]
        await side_by_side((self.layer.group_add, (GROUP, channel)) for channel in channels)
        for member, channel in enumerate(channels):
            self.spawn(self._receive(member, channel))

    async def _receive(self, member: int, channel: str) -> None:
        receive, seen, bits, complete = self.layer.receive, self._seen, self._bits, self._all
        while True:
            message = await receive(channel)
            bit = bits[message["n"]]
            if seen[member] & bit:
                self.tally.note(problems.DUPLICATED)
            if len(message["data"]) != len(_DATA):
                self.tally.note(problems.DAMAGED)
            seen[member] |= bit
            if seen[member] == complete:
                self._complete += 1
                if self._complete == MEMBERS:
                    self._end_round()

    def _end_round(self) -> None:
        self._seen[:] = [0] * MEMBERS
        self._complete = 0
        self._signal.write(b".")

    async def count_lost(self) -> None:
        if self._complete:
            lost = sum((self._all & ~seen).bit_count() for seen in self._seen)
            self.tally.note(problems.LOST, lost)


class Sender(Role):
    async def listen(self) -> str:
        """The address of the socket on which the members' processes tell of their rounds."""
        self._signals = 0  # rounds that the members' processes have told of
        self._signalled = asyncio.Event()
        self._folder = tempfile.TemporaryDirectory(prefix="channels-rabbitmq-")
        path = os.path.join(self._folder.name, "signals")
        self._server = await asyncio.start_unix_server(self._count, path)
        return path

    async def _count(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while received := await reader.read(1000):
            self._signals += len(received)
            self._signalled.set()

    async def rounds(self, per_round: int, seconds: float) -> dict[str, Any]:
        """Rounds for so many seconds: how many, and how long each took to reach everybody."""
        times: list[float] = []
        end = now() + seconds
        while now() < end:
            start = now()
            wanted = self._signals + PROCESSES
            for outcome in await asyncio.gather(
                *(
                    self.layer.group_send(
                        GROUP, {"type": "benchmark.message", "n": n, "data": _DATA}
                    )
                    for n in range(per_round)
                ),
                return_exceptions=True,
            ):
                if outcome is not None:
                    self.tally.note_exc(outcome)
            while self._signals < wanted:
                self._signalled.clear()
                try:
                    await asyncio.wait_for(self._signalled.wait(), _PATIENCE)
                except asyncio.TimeoutError:
                    return {"times": times, "is_complete": False}
            times.append(now() - start)
        return {"times": times, "is_complete": True}


async def run(stage: Stage, per_round: int, seconds: float) -> dict[str, float]:
    sender = await stage.start("fanout.Sender")
    members = [await stage.start("fanout.Members") for _ in range(PROCESSES)]
    socket = await sender.call("listen")
    await asyncio.gather(
        *(each.call("open", per_round=per_round, socket=socket) for each in members)
    )
    await sender.call("rounds", per_round=per_round, seconds=0.001)  # one, to warm up
    async with stage.cpu_times(
        sender=sender, **{f"members_{n}": each for n, each in enumerate(members)}
    ) as cpu:
        outcome = await sender.call(
            "rounds", per_round=per_round, seconds=seconds / 2 if stage.quick else seconds
        )
    if not outcome["is_complete"]:
        for each in members:
            await each.call("count_lost")
        await stage.fail_on_problems()
    if not outcome["times"]:
        raise Failed("not one message reached everybody")
    deliveries = len(outcome["times"]) * per_round * MEMBERS * PROCESSES
    per_delivery = cpu.per(deliveries)
    return {
        "deliveries": deliveries / sum(outcome["times"]),
        "clients_us": sum(us for role, us in per_delivery.items() if role != "server_us"),
        **({"server_us": per_delivery["server_us"]} if "server_us" in per_delivery else {}),
    }


def _scenario(name: str, title: str, per_round: int, seconds: float) -> Scenario:
    return Scenario(
        name=name,
        title=f"Fan-out: {title} to a group of 2 x 1,000 channels",
        metrics=(
            Metric("deliveries", "deliveries/s", more_is_better=True),
            Metric("clients_us", "clients, µs CPU", 2),
            Metric("server_us", "server, µs CPU", 2),
        ),
        layers=CHANNEL_LAYERS,
        run=partial(run, per_round=per_round, seconds=seconds),
    )


SCENARIOS = (
    _scenario("fanout-burst", "bursts of 100 messages", BURST, 3.0),
    _scenario("fanout-paced", "one message at a time", 1, 3.0),
)
