"""One message to a group of 2,000 channels: 1,000 in each of two processes; a third one sends.

*Burst*: 100 messages are sent side by side and queue up; the next burst comes when all members have
all of the last. Every member does little for each message, so this is the price of a copy.

*Paced*: the next message is sent when all members have the last one, as it is with the isolated
events of a website. So every message wakes 2,000 sleeping tasks. The members' processes tell the
sender by a byte on a socket, which is the same for all layers.

Before the measurement it is checked whether each member gets a message of its own. A receiver
that changes one that others have as well changes theirs, so handing out one object is cheaper, and
a defect.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks import problems
from benchmarks.model import CHANNEL_LAYERS, RAW_CHANNELS, Failed
from benchmarks.role import Role, now, side_by_side
from benchmarks.scenario import Metric, Scenario

if TYPE_CHECKING:
    from benchmarks.stage import Stage

GROUP = "benchmark.fan-out"
PROCESSES = 2
MEMBERS = 1000  # in each process
BURST = 100  # messages
_DATA = b"x" * 100
_PATIENCE = 30.0  # seconds for a round; the slowest layer's burst takes a dozen


class Members(Role):
    """Many channels in the group. A *round* is what all of them are to get before the next one."""

    async def open(self, per_round: int, port: int) -> None:
        self._all = (1 << per_round) - 1
        self._bits = [1 << n for n in range(per_round)]
        self._seen = [0] * MEMBERS  # of this round's messages, a bit each
        self._complete = 0  # members that have all of this round
        self._rounds = 0  # complete ones
        _, self._signal = await asyncio.open_connection("127.0.0.1", port)
        self._channels = [await self.layer.new_channel() for _ in range(MEMBERS)]
        await side_by_side((self.layer.group_add, (GROUP, channel)) for channel in self._channels)

    async def compare_first(self) -> None:
        """Takes everybody's first message, the same one; then all that come are counted."""
        first = await asyncio.wait_for(
            asyncio.gather(*(self.layer.receive(channel) for channel in self._channels)), _PATIENCE
        )
        self.tally.note(problems.SHARED, len(first) - len(set(map(id, first))))
        for member, channel in enumerate(self._channels):
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
        self._rounds += 1
        self._signal.write(b".")

    async def count_lost(self, rounds: int) -> None:
        if self._rounds < rounds:
            lost = sum((self._all & ~seen).bit_count() for seen in self._seen)
            self.tally.note(problems.LOST, lost)


class Sender(Role):
    async def listen(self) -> int:
        """The port at which the members' processes tell of their rounds."""
        self._rounds = 0
        self._signals = 0  # rounds that the members' processes have told of
        self._signalled = asyncio.Event()
        self._server = await asyncio.start_server(self._count, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _count(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while received := await reader.read(1000):
            self._signals += len(received)
            self._signalled.set()

    async def send_first(self) -> None:
        await self.layer.group_send(GROUP, {"type": "benchmark.message", "n": 0, "data": _DATA})

    async def rounds(self, per_round: int, seconds: float) -> dict[str, Any]:
        """Rounds for so many seconds: how long each took to reach everybody.

        ``begun`` counts from the first call on; all of them were complete if ``is_complete``.
        """
        times: list[float] = []
        end = now() + seconds
        while now() < end:
            start = now()
            self._rounds += 1
            wanted = self._rounds * PROCESSES
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
                    return {"times": times, "begun": self._rounds, "is_complete": False}
            times.append(now() - start)
        return {"times": times, "begun": self._rounds, "is_complete": True}


async def run(stage: Stage, per_round: int, seconds: float) -> dict[str, float]:
    sender = await stage.start("fanout.Sender")
    members = [await stage.start("fanout.Members") for _ in range(PROCESSES)]
    port = await sender.call("listen")
    await asyncio.gather(*(each.call("open", per_round=per_round, port=port) for each in members))
    await asyncio.gather(
        sender.call("send_first"), *(each.call("compare_first") for each in members)
    )

    async def rounds(duration: float) -> list[float]:
        outcome = await sender.call("rounds", per_round=per_round, seconds=duration)
        if not outcome["is_complete"]:
            for each in members:
                await each.call("count_lost", rounds=outcome["begun"])
        if not outcome["times"]:
            await stage.fail_on_problems()
            raise Failed("no message reached everybody")
        return list(outcome["times"])

    await rounds(0.001)  # one, to warm up
    async with stage.cpu_times(
        sender=sender, **{f"members_{n}": each for n, each in enumerate(members)}
    ) as cpu:
        times = await rounds(seconds / 2 if stage.quick else seconds)
    deliveries = len(times) * per_round * MEMBERS * PROCESSES
    per_delivery = cpu.per(deliveries)
    return {
        "deliveries": deliveries / sum(times),
        "clients_us": sum(us for role, us in per_delivery.items() if role != "server_us"),
        **({"server_us": per_delivery["server_us"]} if "server_us" in per_delivery else {}),
    }


def _scenario(name: str, title: str, per_round: int, seconds: float) -> Scenario:
    return Scenario(
        name=name,
        title=f"Fan-out: {title} to a group of 2 × 1,000 channels",
        metrics=(
            Metric("deliveries", "deliveries/s", more_is_better=True),
            Metric("clients_us", "clients, µs CPU", 2),
            Metric("server_us", "server, µs CPU", 2),
        ),
        layers=(*CHANNEL_LAYERS, RAW_CHANNELS),
        run=partial(run, per_round=per_round, seconds=seconds),
    )


SCENARIOS = (
    _scenario("fanout-burst", "bursts of 100 messages", BURST, 3.0),
    _scenario("fanout-paced", "one message at a time", 1, 3.0),
)
