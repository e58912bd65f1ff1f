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
  arrival of the first that was sent after the loss. Until then there is nobody to send to: how many
  sends were *refused* (the sender was told: ChannelFull), and how many were accepted and *lost*
  (no layer promises more than at most once), is a column each. Later, either is a problem.
- It sends one to each of a dozen of the groups every 20 ms, the first and the last among them. When
  all of these were heard, it sends one to each of the 5,000, and again to those not heard. *Last
  group* is the arrival of the first message of the last group, among the dozen and those that had
  to be asked again. (To ask all groups all the time would keep the broker from its work.)

Both times count from the *connection's return*, the first TCP connection of the receiver after the
loss. The yardstick, *idle bind*: what binding 5,000 groups to a queue takes the raw client, in
batches of 250, through the same broker in the same run, before anything is lost.
"""

from __future__ import annotations

import asyncio
import secrets
from functools import partial
from typing import TYPE_CHECKING

from benchmarks import problems
from benchmarks.model import EXCHANGES, OLD, OURS, RAW, REDIS_PUBSUB, Failed
from benchmarks.proxy import Proxy
from benchmarks.role import Progress, Role, now, side_by_side
from benchmarks.scenario import Metric, Scenario

if TYPE_CHECKING:
    from benchmarks.stage import Stage
    from benchmarks.workers import WorkerHandle

GROUPS = 5000
_BATCH = 250
_SAMPLE = sorted({*range(0, GROUPS, GROUPS // 10), 1, GROUPS - 1})
_EVERY = 0.02  # seconds between direct sends, samples, the observer's messages
_IMPATIENCE = 0.5  # seconds without a message after which the missing ones count as not coming


def _group(n: int) -> str:
    return f"reconnect.{n}"


class Receiver(Role):
    async def open(self) -> str:
        """One channel for direct messages, which is returned, and one that joins all groups."""
        self._direct: dict[int, tuple[float, float]] = {}  # by number: sent at, arrived at
        self._groups: dict[int, float] = {}  # when the first message arrived
        self._since = 0.0  # sent before that, a message doesn't count
        direct: str = await self.layer.new_channel()
        channel = await self.layer.new_channel()
        await self.connect(direct)
        await self.join(map(_group, range(GROUPS)), channel)
        self.spawn(self._receive_direct(direct))
        self.spawn(self._receive_groups(channel))
        return direct

    async def _receive_direct(self, channel: str) -> None:
        while True:
            message = await self.layer.receive(channel)
            if message["n"] in self._direct:
                self.tally.note(problems.DUPLICATED)
            elif message["at"] > self._since:
                self._direct[message["n"]] = (message["at"], now())

    async def _receive_groups(self, channel: str) -> None:
        while True:
            message = await self.layer.receive(channel)
            if message["at"] > self._since:
                self._groups.setdefault(message["n"], now())

    async def forget(self, since: float) -> None:
        """What was sent before that moment doesn't count from now on."""
        self._since = since
        self._direct = {n: times for n, times in self._direct.items() if times[0] > since}
        self._groups.clear()

    async def first_direct(self) -> float:
        """When the first direct message that counts has arrived; waits for it."""
        while not self._direct:  # noqa: ASYNC110 - a benchmark, and 10 ms is fine enough
            await asyncio.sleep(0.01)
        return min(arrived_at for _, arrived_at in self._direct.values())

    async def missing_direct(self, accepted: list[int]) -> list[int]:
        """Of these direct messages those that don't come."""
        left = set(accepted)
        await Progress(lambda: len(self._direct)).reach(len(left), patience=_IMPATIENCE)
        return sorted(left - self._direct.keys())

    async def sample_heard(self) -> float:
        """Waits until each group of the sample was heard; when the last of them was."""
        while not all(n in self._groups for n in _SAMPLE):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
        return await self.last_heard(_SAMPLE)

    async def missing(self) -> list[int]:
        """The groups not heard yet, once nothing has come for a moment."""
        await Progress(lambda: len(self._groups)).reach(GROUPS, patience=_IMPATIENCE)
        return [n for n in range(GROUPS) if n not in self._groups]

    async def last_heard(self, groups: list[int]) -> float:
        return max(self._groups[n] for n in groups)


class Sender(Role):
    async def start(self, channel: str) -> None:
        self._sent_at: list[float] = []  # by number, of direct messages
        self._accepted: list[int] = []
        self._refused: list[int] = []
        self._sends: set[asyncio.Task[None]] = set()
        self._sending = asyncio.create_task(self._send_forever(channel))
        self._sampling = asyncio.create_task(self._ask_sample_forever())

    async def _send_forever(self, channel: str) -> None:
        while True:
            # Not awaited: it may be held up, and the next one must not be.
            send = asyncio.create_task(self._send(channel, len(self._sent_at)))
            self._sends.add(send)
            send.add_done_callback(self._sends.discard)
            self._sent_at.append(now())
            await asyncio.sleep(_EVERY)

    async def _send(self, channel: str, n: int) -> None:
        message = {"type": "benchmark.message", "n": n, "at": self._sent_at[n]}
        try:
            await self.layer.send(channel, message)
            self._accepted.append(n)
        except Exception as exc:
            if problems.describe(exc)[0] == problems.REFUSED:
                self._refused.append(n)
            else:
                self.tally.note_exc(exc)

    async def _ask_sample_forever(self) -> None:
        while True:
            await self.ask(_SAMPLE)
            await asyncio.sleep(_EVERY)

    async def stop_sampling(self) -> None:
        self._sampling.cancel()
        await asyncio.wait([self._sampling])

    async def stop_sending(self, since: float) -> list[int]:
        """The direct messages sent since then that were accepted."""
        self._sending.cancel()
        if self._sends:
            await asyncio.wait(self._sends)
        return [n for n in self._accepted if self._sent_at[n] > since]

    async def count(self, missing: list[int], since: float, back_at: float) -> dict[str, float]:
        """What was refused or lost while the receiver was away; what was later, is a problem."""
        counts = {}
        for key, kind, numbers in (
            ("refused", problems.REFUSED, self._refused),
            ("lost", problems.LOST, missing),
        ):
            counts[key] = sum(since < self._sent_at[n] <= back_at for n in numbers)
            self.tally.note(kind, sum(self._sent_at[n] > back_at for n in numbers))
        return counts

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
        await connection.declare_exchange(exchange, "direct")
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
        self._sent_at: list[float] = []
        self._confirmed_at: dict[int, float] = {}  # by number
        self._channel = await self.layer.consume(lambda body: None)
        self.spawn(self._publish_forever())

    async def _publish_forever(self) -> None:
        while True:
            self.spawn(self._publish(len(self._sent_at)))
            self._sent_at.append(now())
            await asyncio.sleep(_EVERY)

    async def _publish(self, n: int) -> None:
        await self.layer.send(self._channel, {"sender": 0, "n": n, "data": b"x" * 100})
        self._confirmed_at[n] = now()

    async def longest_confirm(self, since: float) -> float:
        """In seconds; one that is still due counts until now."""
        return max(
            self._confirmed_at.get(n, now()) - sent_at
            for n, sent_at in enumerate(self._sent_at)
            if sent_at > since
        )


async def run(stage: Stage, half_open: bool, patience: float) -> dict[str, float]:
    metrics: dict[str, float] = {}
    async with Proxy(stage.server.host, stage.server.port) as proxy:
        observer = None
        if stage.has_rabbitmq:
            observer = await stage.start("reconnect.Observer", layer=RAW)
            metrics["idle_bind_s"] = await observer.call("bind", exchange=EXCHANGES[RAW])
            await stage.server.rest()
        receiver = await stage.start("reconnect.Receiver", url=proxy.url_of(stage.server.url))
        sender = await stage.start("reconnect.Sender")
        channel = await receiver.call("open")
        await _hear_all(sender, receiver)
        await sender.call("start", channel=channel)
        await receiver.call("first_direct")
        if observer is not None:
            await observer.call("start")
        await stage.server.rest()

        lost_at = proxy.swallow() if half_open else proxy.disconnect(orderly=stage.has_rabbitmq)
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
        accepted = await sender.call("stop_sending", since=lost_at)
        missing = await receiver.call("missing_direct", accepted=accepted)
        metrics.update(
            await sender.call("count", missing=missing, since=lost_at, back_at=direct_at)
        )
    return metrics


async def _hear_all(sender: WorkerHandle, receiver: WorkerHandle) -> list[int]:
    """Asks all groups, until all were heard; returns those that weren't at the first time."""
    missing = list(range(GROUPS))
    late = None
    while missing:
        await sender.call("ask", groups=missing)
        missing = await receiver.call("missing")
        late = missing if late is None else late
    return late or []


async def _all_back(sender: WorkerHandle, receiver: WorkerHandle) -> float:
    """When the last group was back."""
    sample_at: float = await receiver.call("sample_heard")
    await sender.call("stop_sampling")
    late = await _hear_all(sender, receiver)
    return max(sample_at, await receiver.call("last_heard", groups=late)) if late else sample_at


def _scenario(name: str, title: str, layers: tuple[str, ...], half_open: bool) -> Scenario:
    return Scenario(
        name=name,
        title=f"Reconnect with 5,000 groups, {title}",
        metrics=(
            Metric("groups_s", "last group, s", 2, more_is_better=False),
            Metric("direct_s", "direct sends, s", 2),
            Metric("away_s", "before the return, s", 2),
            Metric("refused", "refused"),
            Metric("lost", "lost"),
            Metric("confirm_s", "longest confirm, s", 3),
            Metric("idle_bind_s", "idle bind, s", 2),
            Metric("ratio", "last group / idle bind", 2),
        ),
        layers=layers,
        run=partial(run, half_open=half_open, patience=30.0 if half_open else 20.0),
        time_limit=90.0,
    )


SCENARIOS = (
    _scenario("reconnect-clean", "after a clean disconnect", (OURS, OLD, REDIS_PUBSUB), False),
    _scenario("reconnect-half-open", "after a half-open one", (OURS, OLD), True),
)
