"""A process with 5,000 groups loses its connections: how long until all is as before?

Three processes: the *receiver*, whose connections go through a proxy and are taken away there; a
*sender*, whose connections stay; an *observer*, a raw AMQP client, which publishes to a queue of
its own every 20 ms and notes how long the broker takes to confirm: the others' reconnects shall not
hold up the rest of the site.

*Clean*: the client gets the broker's ``connection.close`` (320 CONNECTION_FORCED, as an operator's
command has it sent), and both sides' sockets are closed. *Half-open*: the proxy swallows all
that is sent on the connections, in both directions, but leaves them open; new ones work. Both sides
have to notice by the heartbeat, which the proxy sets to 4 seconds for every layer.

- The sender sends a message to the receiver's channel every 20 ms. *Direct sends* are back with the
  arrival of the first that was sent after the loss.
- It sends one to each of 52 groups of the 5,000 every 0.1 s; when all of these were heard, one to
  each group, and again to those not heard. *Last group* is the moment at which the last message was
  sent that was the first to reach its group. (To ask all groups all the time would
  keep the broker from its work.)

Both times count from the *connection's return*, the first TCP connection of the receiver after the
loss. The yardstick, *idle bind*: what binding 5,000 groups to a queue takes the raw client, in
batches of 250, through the same broker in the same run, before anything is lost.
"""

from __future__ import annotations

import asyncio
import secrets
from functools import partial
from typing import TYPE_CHECKING, Any

from model import OLD, OURS, RAW, REDIS_PUBSUB, Failed, Metric, Scenario
from proxy import Proxy
from role import Progress, Role, now, side_by_side

if TYPE_CHECKING:
    from stage import Stage
    from workers import WorkerHandle

GROUPS = 5000
_BATCH = 250
_SAMPLE = sorted({*range(0, GROUPS, 100), 1, GROUPS - 1})
_DIRECT_EVERY = 0.02  # seconds
_SAMPLE_EVERY = 0.1
_OBSERVE_EVERY = 0.02
_IMPATIENCE = 0.5  # seconds without a message after which the missing groups are asked again


def _group(n: int) -> str:
    return f"reconnect.{n}"


class Receiver(Role):
    async def open(self) -> dict[str, Any]:
        """One channel for direct messages, one that joins all groups."""
        self._direct: list[tuple[float, float]] = []  # sent at, arrived at
        self._groups: dict[int, float] = {}  # when the first message that was heard had been sent
        self._since = 0.0  # sent before that, a message doesn't count
        direct = await self.layer.new_channel()
        channel = await self.layer.new_channel()
        await self.connect(direct)
        start = now()
        await self.join(map(_group, range(GROUPS)), channel)
        seconds = now() - start
        self.spawn(self._receive_direct(direct))
        self.spawn(self._receive_groups(channel))
        return {"channel": direct, "join_seconds": seconds}

    async def _receive_direct(self, channel: str) -> None:
        while True:
            sent_at = (await self.layer.receive(channel))["at"]
            if sent_at > self._since:
                self._direct.append((sent_at, now()))

    async def _receive_groups(self, channel: str) -> None:
        while True:
            message = await self.layer.receive(channel)
            if message["at"] > self._since:
                self._groups.setdefault(message["n"], message["at"])

    async def forget(self, since: float) -> None:
        """What was sent before that moment doesn't count from now on."""
        self._since = since
        self._direct = [each for each in self._direct if each[0] > since]
        self._groups.clear()

    async def first_direct(self) -> float:
        """When the first direct message that counts has arrived; waits for it."""
        while not self._direct:  # noqa: ASYNC110 - a benchmark, and 10 ms is fine enough
            await asyncio.sleep(0.01)
        return self._direct[0][1]

    async def sample_heard(self) -> float:
        """Waits until each group of the sample was heard; when the last of them was sent."""
        while not all(n in self._groups for n in _SAMPLE):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
        return max(self._groups[n] for n in _SAMPLE)

    async def missing(self) -> list[int]:
        """The groups not heard yet, once nothing has come for a moment."""
        await Progress(lambda: len(self._groups)).reach(GROUPS, patience=_IMPATIENCE)
        return [n for n in range(GROUPS) if n not in self._groups]

    async def last_group(self) -> float:
        return max(self._groups.values())


class Sender(Role):
    async def start(self, channel: str) -> None:
        self.spawn(self._send_forever(channel))
        self._sampling = asyncio.create_task(self._ask_sample_forever())

    async def _send_forever(self, channel: str) -> None:
        while True:
            # Not awaited: it may be held up, and the next one must not be.
            self.spawn(self.layer.send(channel, {"type": "benchmark.message", "at": now()}))
            await asyncio.sleep(_DIRECT_EVERY)

    async def _ask_sample_forever(self) -> None:
        while True:
            await self.ask(_SAMPLE)
            await asyncio.sleep(_SAMPLE_EVERY)

    async def stop_sampling(self) -> None:
        self._sampling.cancel()
        await asyncio.wait([self._sampling])

    async def ask(self, groups: list[int]) -> None:
        await side_by_side((self._ask, (n,)) for n in groups)

    async def _ask(self, n: int) -> None:
        try:
            await self.layer.group_send(
                _group(n), {"type": "benchmark.message", "n": n, "at": now()}
            )
        except Exception as exc:
            self.tally.note_exc(exc)


class Observer(Role):
    """Of the raw client."""

    async def bind(self, exchange: str) -> float:
        """Seconds that binding all groups to a new queue takes."""
        connection = self.layer.connection
        queue = f"benchmark.{secrets.token_hex(8)}"
        await connection.declare_exchange(exchange)
        await connection.declare_queue(queue, {"x-queue-type": "classic"})
        start = now()
        for first in range(0, GROUPS, _BATCH):
            await asyncio.gather(
                *(connection.bind(queue, exchange, _group(first + n)) for n in range(_BATCH))
            )
        seconds = now() - start
        # Its bindings would get a copy of all messages.
        await connection.delete_queue(queue)
        return seconds

    async def start(self) -> None:
        self._confirms: list[tuple[float, float]] = []  # sent at, seconds
        self._channel = await self.layer.consume(lambda body: None)
        self.spawn(self._publish_forever())

    async def _publish_forever(self) -> None:
        while True:
            self.spawn(self._publish())
            await asyncio.sleep(_OBSERVE_EVERY)

    async def _publish(self) -> None:
        start = now()
        await self.layer.send(self._channel, {"sender": 0, "n": 0, "data": b"x" * 100})
        self._confirms.append((start, now() - start))

    async def longest_confirm(self, since: float) -> float:
        return max(seconds for sent_at, seconds in self._confirms if sent_at > since)


async def run(stage: Stage, half_open: bool, patience: float) -> dict[str, float]:
    metrics: dict[str, float] = {}
    async with Proxy(stage.server.host, stage.server.port) as proxy:
        observer = None
        if stage.has_rabbitmq:
            observer = await stage.start("reconnect.Observer", layer=RAW)
            metrics["idle_bind_s"] = await observer.call("bind", exchange="benchmark-raw")
            await stage.server.rest()
        receiver = await stage.start("reconnect.Receiver", url=proxy.url(stage.server.url))
        sender = await stage.start("reconnect.Sender")
        opened = await receiver.call("open")
        metrics["join_s"] = opened["join_seconds"]
        await _hear_all(sender, receiver)
        await sender.call("start", channel=opened["channel"])
        await receiver.call("sample_heard")
        await receiver.call("first_direct")
        if observer is not None:
            await observer.call("start")
        await stage.server.rest()

        lost_at = proxy.swallow() if half_open else proxy.disconnect(say_goodbye=stage.has_rabbitmq)
        await receiver.call("forget", since=lost_at)
        try:
            direct_at, group_at = await asyncio.wait_for(
                asyncio.gather(receiver.call("first_direct"), _all_back(sender, receiver)),
                patience,
            )
        except asyncio.TimeoutError:
            returned = proxy.first_accepted_after(lost_at)
            raise Failed(
                f"not back after {patience:g} s "
                f"({'connected again' if returned else 'never connected again'}; "
                f"{GROUPS - len(await receiver.call('missing')):,} of {GROUPS:,} groups)"
            ) from None
        returned_at = proxy.first_accepted_after(lost_at) or lost_at
        metrics["away_s"] = returned_at - lost_at
        metrics["direct_s"] = direct_at - returned_at
        metrics["groups_s"] = group_at - returned_at
        if observer is not None:
            metrics["ratio"] = metrics["groups_s"] / metrics["idle_bind_s"]
            metrics["confirm_s"] = await observer.call("longest_confirm", since=lost_at)
    return metrics


async def _hear_all(sender: WorkerHandle, receiver: WorkerHandle) -> None:
    """Asks all groups, until all were heard."""
    missing = list(range(GROUPS))
    while missing:
        await sender.call("ask", groups=missing)
        missing = await receiver.call("missing")


async def _all_back(sender: WorkerHandle, receiver: WorkerHandle) -> float:
    await receiver.call("sample_heard")
    await sender.call("stop_sampling")
    await _hear_all(sender, receiver)
    at: float = await receiver.call("last_group")
    return at


def _scenario(name: str, title: str, layers: tuple[str, ...], half_open: bool) -> Scenario:
    return Scenario(
        name=name,
        title=f"Reconnect with 5,000 groups, {title}",
        metrics=(
            Metric("groups_s", "last group, s", 2, more_is_better=False),
            Metric("direct_s", "direct sends, s", 2),
            Metric("away_s", "before the return, s", 2),
            Metric("confirm_s", "longest confirm, s", 2),
            Metric("idle_bind_s", "idle bind, s", 2),
            Metric("ratio", "last group / idle bind", 2),
            Metric("join_s", "first join of all, s", 2),
        ),
        layers=layers,
        run=partial(run, half_open=half_open, patience=30.0 if half_open else 20.0),
        time_limit=90.0,
    )


SCENARIOS = (
    _scenario("reconnect-clean", "after a clean disconnect", (OURS, OLD, REDIS_PUBSUB), False),
    _scenario("reconnect-half-open", "after a half-open one", (OURS, OLD), True),
)
