"""What becomes of a message that the broker returned: tried again, in order, not for ever."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from typing import cast

import pytest

from channels_rabbitmq._amqp.publishing import Outcome, Route
from channels_rabbitmq._broker import receivers as _receivers
from channels_rabbitmq._broker import refusals as _refusals
from channels_rabbitmq._broker.direct_sender import FIRST_PAUSE, LONGEST_PAUSE, DirectSender
from channels_rabbitmq._broker.publisher import Publisher
from channels_rabbitmq._broker.receivers import Receivers
from channels_rabbitmq._broker.refusals import Refusals
from channels_rabbitmq._broker.routes import Routes
from channels_rabbitmq._futures import FairLock
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from channels_rabbitmq.statistics import Counters

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

ROUTE = Route("groups", "crq.a!", mandatory=True)
OWN = Route("groups", "crq.own!", mandatory=True)
OTHER = Route("groups", "crq.b!", mandatory=True)


QUICK = {"first_pause": 0.001, "longest_pause": 0.001}


class FakePublisher:
    """A broker on which only some keys have a queue; what they took, in order."""

    def __init__(self) -> None:
        self.reconnected_at = float("-inf")
        self.is_blocked = False
        self.reachable: set[str] = set()
        self.refusing: set[str] = set()  # keys whose queue is full, or just being deleted
        self.taken: list[bytes] = []
        self.tries: dict[str, int] = defaultdict(int)
        self.tried = asyncio.Event()
        self.fates: deque[Outcome] = deque()  # of the next tries, whatever else is true

    async def publish(
        self, body: bytes, route: Route, deadline: float, after: object = None
    ) -> Outcome:
        routing_key = route.routing_key
        await asyncio.sleep(0)  # as long as a confirm takes: others run
        self.tries[routing_key] += 1
        self.tried.set()
        if self.fates:
            return self.fates.popleft()
        if self.is_blocked:
            return Outcome.BLOCKED
        if routing_key in self.refusing:
            return Outcome.NACKED
        if routing_key not in self.reachable:
            return Outcome.RETURNED
        self.taken.append(body)
        return Outcome.CONFIRMED

    async def wait_for_tries(self, route: Route, count: int) -> None:
        while self.tries[route.routing_key] < count:
            self.tried.clear()
            await asyncio.wait_for(self.tried.wait(), 10)


class Clock:
    """The loop's, which a test can put forward: for what a sender remembers, not for its tries."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return asyncio.get_running_loop().time() + self.ahead


class MakeSender:
    """Makes senders that publish by one fake, and count together."""

    def __init__(self, publisher: FakePublisher, counters: Counters, clock: Clock) -> None:
        self._publisher = cast(Publisher, publisher)
        self._counters = counters
        self._clock = clock

    def __call__(
        self,
        operation_timeout: float = 10.0,
        *,
        receivers: Receivers | None = None,
        first_pause: float = FIRST_PAUSE,
        longest_pause: float = LONGEST_PAUSE,
        **timings: float,
    ) -> DirectSender:
        return DirectSender(
            self._publisher,
            operation_timeout,
            receivers or Receivers(OWN, self._clock),
            Refusals(self._publisher, self._counters, "groups", self._clock),
            first_pause=first_pause,
            longest_pause=longest_pause,
            **timings,
        )


@pytest.fixture
def publisher() -> FakePublisher:
    return FakePublisher()


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def no_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    """To be used before ``receivers``, which begins with a full one."""
    monkeypatch.setattr(_receivers, "STRANGERS_TIMEOUT", 0.0)


@pytest.fixture
def receivers(clock: Clock) -> Receivers:
    """What ``sender`` and ``slow_sender`` know of other processes."""
    return Receivers(OWN, clock)


@pytest.fixture
def make_sender(publisher: FakePublisher, counters: Counters, clock: Clock) -> MakeSender:
    return MakeSender(publisher, counters, clock)


@pytest.fixture
async def sender(make_sender: MakeSender, receivers: Receivers) -> DirectSender:
    return make_sender(receivers=receivers, **QUICK)


async def test_each_process_has_a_route_and_messages_by_it_are_mandatory() -> None:
    routes = Routes("groups")
    name = "crq.aaaaaaaaaaaaaaaa!x.y"
    assert routes.to_channel(name) == ("groups", "crq.aaaaaaaaaaaaaaaa!", True)
    # Of channels_rabbitmq 4.x, whose queues are on the default exchange:
    assert routes.to_channel("channels_ABCDEFGHIJKL!x") == ("", "channels_ABCDEFGHIJKL", True)


def deadline(seconds: float = 30.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_a_message_that_is_taken_is_written_once(
    sender: DirectSender, publisher: FakePublisher
) -> None:
    publisher.reachable.add("crq.a!")
    assert await sender.send(ROUTE, b"m", deadline()) is Outcome.CONFIRMED
    assert publisher.tries == {"crq.a!": 1}


async def test_a_returned_message_is_tried_again_until_the_receiver_is_back(
    sender: DirectSender, publisher: FakePublisher
) -> None:
    sending = asyncio.create_task(sender.send(ROUTE, b"m", deadline()))
    await publisher.wait_for_tries(ROUTE, 3)
    publisher.reachable.add("crq.a!")
    assert await sending is Outcome.CONFIRMED
    assert publisher.taken == [b"m"]


async def test_later_messages_wait_behind_and_keep_their_order(
    sender: DirectSender, publisher: FakePublisher
) -> None:
    bodies = [b"%d" % n for n in range(20)]
    sending = [asyncio.create_task(sender.send(ROUTE, bodies[0], deadline()))]
    await publisher.wait_for_tries(ROUTE, 2)
    sending += [asyncio.create_task(sender.send(ROUTE, body, deadline())) for body in bodies[1:]]
    await publisher.wait_for_tries(ROUTE, 5)
    publisher.reachable.add("crq.a!")
    assert set(await asyncio.gather(*sending)) == {Outcome.CONFIRMED}
    assert publisher.taken == bodies


async def test_messages_to_others_do_not_wait(
    sender: DirectSender, publisher: FakePublisher
) -> None:
    sending = asyncio.create_task(sender.send(ROUTE, b"m", deadline()))
    await publisher.wait_for_tries(ROUTE, 2)
    publisher.reachable.add("crq.b!")
    assert await sender.send(OTHER, b"other", deadline()) is Outcome.CONFIRMED
    assert not sending.done()
    sending.cancel()
    await asyncio.wait([sending])


async def test_a_process_that_stayed_away_gets_one_try_a_message_until_one_gets_through(
    make_sender: MakeSender, publisher: FakePublisher
) -> None:
    sender = make_sender(retry_timeout=0.01, **QUICK)
    assert await sender.send(ROUTE, b"lost", deadline()) is Outcome.RETURNED
    tries = publisher.tries["crq.a!"]
    assert tries > 1
    assert await sender.send(ROUTE, b"lost", deadline()) is Outcome.RETURNED
    assert publisher.tries["crq.a!"] == tries + 1

    publisher.reachable.add("crq.a!")
    assert await sender.send(ROUTE, b"m", deadline()) is Outcome.CONFIRMED
    publisher.reachable.clear()
    tries = publisher.tries["crq.a!"]
    assert await sender.send(ROUTE, b"lost", deadline()) is Outcome.RETURNED
    assert publisher.tries["crq.a!"] > tries + 1, "forgotten, so it is tried for a while again"


async def test_a_process_that_stayed_away_is_forgotten_after_a_while(
    make_sender: MakeSender, publisher: FakePublisher, clock: Clock
) -> None:
    sender = make_sender(retry_timeout=0.01, **QUICK)
    for _ in range(2):
        tries = publisher.tries["crq.a!"]
        assert await sender.send(ROUTE, b"lost", deadline()) is Outcome.RETURNED
        assert publisher.tries["crq.a!"] > tries + 1
        clock.ahead += _receivers.UNREACHABLE_TIMEOUT


async def test_after_our_own_reconnect_it_is_tried_for_longer(
    make_sender: MakeSender, publisher: FakePublisher
) -> None:
    sender = make_sender(retry_timeout=0.0, **QUICK)
    publisher.reconnected_at = asyncio.get_running_loop().time()
    sending = asyncio.create_task(sender.send(ROUTE, b"m", deadline()))
    await publisher.wait_for_tries(ROUTE, 10)
    publisher.reachable.add("crq.a!")
    assert await sending is Outcome.CONFIRMED


async def test_a_process_not_back_long_after_our_own_reconnect_has_stayed_away(
    make_sender: MakeSender, receivers: Receivers, publisher: FakePublisher
) -> None:
    sender = make_sender(receivers=receivers, retry_timeout=0.0, reconnect_grace=0.05, **QUICK)
    publisher.reconnected_at = asyncio.get_running_loop().time()
    assert await sender.send(ROUTE, b"lost", deadline()) is Outcome.RETURNED
    assert receivers.is_unreachable(ROUTE)


async def test_a_call_whose_time_is_over_too_soon_to_tell_raises_and_blames_nobody(
    sender: DirectSender, publisher: FakePublisher
) -> None:
    # As those that waited for our own connection through most of an outage.
    publisher.reconnected_at = asyncio.get_running_loop().time()
    with pytest.raises(BrokerUnavailable, match="no queue on RabbitMQ yet"):
        await sender.send(ROUTE, b"refused", deadline(0.52))
    # The next one, with more time, waits for the receiver and reaches it.
    sending = asyncio.create_task(sender.send(ROUTE, b"m", deadline()))
    await publisher.wait_for_tries(ROUTE, publisher.tries["crq.a!"] + 3)
    publisher.reachable.add("crq.a!")
    assert await sending is Outcome.CONFIRMED
    assert publisher.taken == [b"m"]


async def test_a_short_time_limit_alone_is_no_error(
    make_sender: MakeSender, publisher: FakePublisher
) -> None:
    # Half of what the confirm leaves of it is for all tries.
    sender = make_sender(1.5, first_pause=0.001)
    assert await sender.send(ROUTE, b"lost", deadline(1.5)) is Outcome.RETURNED
    assert publisher.tries["crq.a!"] > 2


async def test_a_call_that_finds_publishers_blocked_does_not_wait_behind_others(
    make_sender: MakeSender, publisher: FakePublisher
) -> None:
    sender = make_sender(first_pause=60.0, longest_pause=60.0)
    publisher.reconnected_at = asyncio.get_running_loop().time() + 100
    first = asyncio.create_task(sender.send(ROUTE, b"first", deadline(200)))
    await publisher.wait_for_tries(ROUTE, 1)  # and now it sleeps for a minute
    publisher.is_blocked = True
    assert await asyncio.wait_for(sender.send(ROUTE, b"m", deadline()), 10) is Outcome.BLOCKED
    first.cancel()
    await asyncio.wait([first])


async def test_a_cancelled_send_lets_those_behind_it_go_on(
    sender: DirectSender, publisher: FakePublisher
) -> None:
    first = asyncio.create_task(sender.send(ROUTE, b"first", deadline()))
    await publisher.wait_for_tries(ROUTE, 2)
    second = asyncio.create_task(sender.send(ROUTE, b"second", deadline()))
    third = asyncio.create_task(sender.send(ROUTE, b"third", deadline()))
    await publisher.wait_for_tries(ROUTE, 4)
    first.cancel()
    second.cancel()
    await asyncio.wait([first, second])
    publisher.reachable.add("crq.a!")
    assert await third is Outcome.CONFIRMED
    assert publisher.taken == [b"third"]
    assert not sender.locks


async def test_a_call_behind_others_waits_until_its_own_deadline(
    sender: DirectSender, publisher: FakePublisher
) -> None:
    publisher.reconnected_at = asyncio.get_running_loop().time()
    first = asyncio.create_task(sender.send(ROUTE, b"first", deadline()))
    await publisher.wait_for_tries(ROUTE, 2)
    with pytest.raises(BrokerUnavailable):
        await sender.send(ROUTE, b"second", deadline(0.01))
    assert not first.done()
    publisher.reachable.add("crq.a!")
    assert await first is Outcome.CONFIRMED
    assert publisher.taken == [b"first"]


async def test_a_call_cancelled_on_its_turn_lets_the_next_one_have_it(
    sender: DirectSender, publisher: FakePublisher
) -> None:
    publisher.reconnected_at = asyncio.get_running_loop().time()
    sending = [asyncio.create_task(sender.send(ROUTE, b"0", deadline()))]
    await publisher.wait_for_tries(ROUTE, 2)
    sending += [asyncio.create_task(sender.send(ROUTE, b"%d" % n, deadline())) for n in (1, 2)]
    await publisher.wait_for_tries(ROUTE, 6)
    publisher.reachable.add("crq.a!")
    await sending[0]
    sending[1].cancel()  # woken, and not yet running
    assert await sending[2] is Outcome.CONFIRMED
    assert not sender.locks


# Nacks


async def test_a_queue_that_was_just_being_deleted_is_no_full_one(
    sender: DirectSender, publisher: FakePublisher
) -> None:
    publisher.fates.append(Outcome.NACKED)  # From the second try on it doesn't exist.
    sending = asyncio.create_task(sender.send(ROUTE, b"m", deadline()))
    await publisher.wait_for_tries(ROUTE, 4)
    publisher.reachable.add("crq.a!")
    assert await sending is Outcome.CONFIRMED
    assert publisher.taken == [b"m"]
    assert "crq.a!alive" not in publisher.tries


async def test_a_queue_that_goes_on_refusing_while_its_process_is_there_is_full(
    sender: DirectSender, publisher: FakePublisher, counters: Counters
) -> None:
    publisher.refusing.add("crq.a!")
    publisher.reachable.add("crq.a!alive")
    begun_at = time.monotonic()
    assert await sender.send(ROUTE, b"m", deadline()) is Outcome.NACKED
    assert _refusals.DELETION_TIMEOUT <= time.monotonic() - begun_at < 1.0
    # And the next ones at once.
    for _ in range(10):
        tries = publisher.tries["crq.a!"]
        assert await sender.send(ROUTE, b"m", deadline()) is Outcome.NACKED
        assert publisher.tries["crq.a!"] == tries + 1
    assert publisher.tries["crq.a!alive"] == 1
    assert counters.nacked == 11
    # When there is room again:
    publisher.refusing.clear()
    publisher.reachable.add("crq.a!")
    assert await sender.send(ROUTE, b"m", deadline()) is Outcome.CONFIRMED


async def test_after_a_while_it_is_found_out_anew_why_a_queue_refuses(
    sender: DirectSender, publisher: FakePublisher, clock: Clock
) -> None:
    publisher.refusing.add("crq.a!")
    publisher.reachable.add("crq.a!alive")
    assert await sender.send(ROUTE, b"m", deadline()) is Outcome.NACKED
    clock.ahead += _refusals.VERDICT_TIMEOUT
    sending = asyncio.create_task(sender.send(ROUTE, b"m", deadline()))
    await publisher.wait_for_tries(ROUTE, publisher.tries["crq.a!"] + 2)
    publisher.refusing.clear()  # It has just ended,
    publisher.reachable.add("crq.a!")  # and is back.
    assert await sending is Outcome.CONFIRMED


async def test_a_process_that_vanished_with_its_node_is_gone(
    make_sender: MakeSender, publisher: FakePublisher, counters: Counters, clock: Clock
) -> None:
    sender = make_sender(retry_timeout=0.1, **QUICK)
    publisher.refusing.update(("crq.a!", "crq.a!alive"))
    assert await sender.send(ROUTE, b"lost", deadline()) is Outcome.RETURNED
    tries = publisher.tries["crq.a!"]
    for _ in range(10):
        assert await sender.send(ROUTE, b"lost", deadline()) is Outcome.RETURNED
    assert publisher.tries["crq.a!"] == tries + 10
    assert publisher.tries["crq.a!alive"] == 1
    assert counters.nacked == 0
    # It is back, and full before the first message gets through.
    publisher.refusing.remove("crq.a!alive")
    publisher.reachable.add("crq.a!alive")
    clock.ahead += _refusals.VERDICT_TIMEOUT
    assert await sender.send(ROUTE, b"m", deadline()) is Outcome.NACKED


async def test_a_message_after_which_another_was_taken_is_not_tried_again(
    make_sender: MakeSender, publisher: FakePublisher
) -> None:
    """It would come behind that one."""
    sender = make_sender(first_pause=0.02, longest_pause=0.001)
    publisher.refusing.add("crq.a!")
    first = asyncio.create_task(sender.send(ROUTE, b"1", deadline()))
    second = asyncio.create_task(sender.send(ROUTE, b"2", deadline()))
    await asyncio.sleep(0)  # Both are written:
    publisher.refusing.clear()
    publisher.reachable.add("crq.a!")
    publisher.fates.append(Outcome.NACKED)  # the first one's
    assert await first is Outcome.NACKED
    assert await second is Outcome.CONFIRMED
    assert publisher.taken == [b"2"]


async def test_those_that_wait_behind_are_refused_with_the_first(
    sender: DirectSender, publisher: FakePublisher
) -> None:
    publisher.refusing.add("crq.a!")
    publisher.reachable.add("crq.a!alive")
    sending = [asyncio.create_task(sender.send(ROUTE, b"0", deadline()))]
    await publisher.wait_for_tries(ROUTE, 2)
    sending += [asyncio.create_task(sender.send(ROUTE, b"m", deadline())) for _ in range(100)]
    assert set(await asyncio.gather(*sending)) == {Outcome.NACKED}
    assert publisher.tries["crq.a!"] < 100, "they need no try"
    assert not sender.locks


async def test_a_short_time_limit_says_full_too(
    make_sender: MakeSender, publisher: FakePublisher
) -> None:
    sender = make_sender(0.4)
    publisher.refusing.add("crq.a!")
    publisher.reachable.add("crq.a!alive")
    assert await sender.send(ROUTE, b"m", deadline(0.4)) is Outcome.NACKED
    # And the rest of one, in which the receiver may reconnect yet.
    sender = make_sender()
    publisher.reconnected_at = asyncio.get_running_loop().time()
    assert await sender.send(ROUTE, b"m", deadline(0.51)) is Outcome.NACKED
    publisher.refusing.update(("crq.b!", "crq.b!alive"))
    with pytest.raises(BrokerUnavailable, match="no queue on RabbitMQ yet"):
        await sender.send(OTHER, b"m", deadline(0.51))


# Whose process nobody has heard of


def route(number: int) -> Route:
    return Route("groups", f"crq.{number}!", mandatory=True)


@pytest.fixture
async def slow_sender(make_sender: MakeSender, receivers: Receivers) -> DirectSender:
    """With the pauses that are the real ones."""
    return make_sender(receivers=receivers)


async def test_a_table_of_dead_names_costs_one_allowance(
    slow_sender: DirectSender, publisher: FakePublisher
) -> None:
    for number in range(8):
        assert await slow_sender.send(route(number), b"lost", deadline()) is Outcome.RETURNED
    tries = sum(publisher.tries.values())
    assert 8 + 4 < tries < 8 + 15, "at two seconds for each it would be some 90"
    # And from then on not even that.
    for number in range(8, 300):
        assert await slow_sender.send(route(number), b"lost", deadline()) is Outcome.RETURNED
    assert sum(publisher.tries.values()) - tries < 292 + 5, "one try each"


async def test_dead_names_at_the_same_time_cost_no_more(
    slow_sender: DirectSender, publisher: FakePublisher
) -> None:
    sending = [slow_sender.send(route(number), b"lost", deadline()) for number in range(300)]
    assert set(await asyncio.gather(*sending)) == {Outcome.RETURNED}
    assert sum(publisher.tries.values()) < 300 + 2 * 0.6 / 0.02


async def test_the_allowance_comes_back(receivers: Receivers) -> None:
    allowance = receivers.allowance
    now = asyncio.get_running_loop().time()
    assert allowance.spend(0.5, now)
    assert not allowance.spend(0.2, now)
    assert allowance.spend(0.2, now + 3)
    assert not allowance.spend(0.7, now + 1000), "no more than there was"
    assert allowance.spend(0.6, now + 1000)


async def test_processes_that_turn_up_cost_nothing(
    slow_sender: DirectSender, publisher: FakePublisher
) -> None:
    """As those that start one after the other: their names are known before their queues are."""
    for number in range(5):  # Together they take longer than the allowance lasts.
        sending = asyncio.create_task(slow_sender.send(route(number), b"m", deadline()))
        await publisher.wait_for_tries(route(number), 3)
        publisher.reachable.add(f"crq.{number}!")
        assert await sending is Outcome.CONFIRMED


@pytest.mark.usefixtures("no_allowance")
async def test_a_process_that_took_a_message_lately_is_tried_for_longer(
    sender: DirectSender, publisher: FakePublisher, receivers: Receivers
) -> None:
    publisher.reachable.update(("crq.a!", "crq.b!"))
    assert await sender.send(ROUTE, b"1", deadline()) is Outcome.CONFIRMED
    assert await sender.send(OTHER, b"1", deadline()) is Outcome.CONFIRMED
    publisher.reachable.clear()
    now = asyncio.get_running_loop().time()
    receivers.on_taken(OTHER, called_at=now - _receivers.HEARD_TIMEOUT)
    # Not lately: one try
    assert await sender.send(OTHER, b"2", deadline()) is Outcome.RETURNED
    assert publisher.tries["crq.b!"] == 2
    sending = asyncio.create_task(sender.send(ROUTE, b"2", deadline()))
    await publisher.wait_for_tries(ROUTE, 10)
    publisher.reachable.add("crq.a!")
    assert await sending is Outcome.CONFIRMED


@pytest.mark.usefixtures("no_allowance")
async def test_ones_own_process_is_alive(sender: DirectSender, publisher: FakePublisher) -> None:
    sending = asyncio.create_task(sender.send(OWN, b"m", deadline()))
    await publisher.wait_for_tries(OWN, 10)
    publisher.reachable.add("crq.own!")
    assert await sending is Outcome.CONFIRMED


async def test_a_lock_is_in_the_order_of_the_calls_and_not_of_acquire() -> None:
    """Many are written together, and are returned one after the other: later calls come between."""
    now = asyncio.get_running_loop().time()
    lock, order = FairLock(), []
    assert await lock.acquire(now + 10)

    async def take_turn(called: int) -> None:
        assert await lock.acquire(now + 10 + called)
        order.append(called)
        lock.release()

    turns = [asyncio.create_task(take_turn(called)) for called in (5, 6, 1, 2, 7, 3, 4)]
    await asyncio.sleep(0)
    lock.release()
    await asyncio.wait(turns)
    assert order == [1, 2, 3, 4, 5, 6, 7]


async def test_a_process_that_has_ended_is_unreachable_for_ever(clock: Clock) -> None:
    ended: set[str] = set()
    receivers = Receivers(OWN, clock, ended.__contains__)
    route = Route("groups", "crq.gone!", mandatory=True)
    receivers.on_taken(route, clock())
    assert receivers.is_alive(route, clock())
    assert not receivers.is_unreachable(route)
    ended.add("crq.gone")
    assert receivers.is_unreachable(route)
    assert not receivers.is_unreachable(Route("groups", "crq.other!", mandatory=True))


async def test_a_nack_for_a_process_that_has_ended_does_not_mean_full(
    make_sender: MakeSender, publisher: FakePublisher, counters: Counters, clock: Clock
) -> None:
    """RabbitMQ 4.2 and newer refuse what comes while they delete its queue."""
    sender = make_sender(receivers=Receivers(OWN, clock, lambda id_: True))
    publisher.refusing.add(ROUTE.routing_key)
    assert await sender.send(ROUTE, b"", clock() + 10) is Outcome.RETURNED
    assert publisher.tries == {ROUTE.routing_key: 1}
    assert (counters.returned, counters.nacked) == (1, 0)
