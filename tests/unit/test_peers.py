"""Processes that greet, ask and answer each other, in virtual time, over a wire in memory.

The wire is where a broker would be: it can drop, return and block what a real one only does at
moments that no test can choose.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from channels_rabbitmq._amqp.publishing import Outcome
from channels_rabbitmq._codec import MessageCodec, pack_info
from channels_rabbitmq._identity import TO_ALL, Place, to_process
from channels_rabbitmq._peers import answerer as _answerer
from channels_rabbitmq._peers.greeter import SETTLE_TIMEOUT, SPREAD
from channels_rabbitmq._peers.late_acks import LONGEST
from channels_rabbitmq._peers.peers import Peers
from channels_rabbitmq._peers.processes import GONE_AFTER
from channels_rabbitmq._peers.requests import (
    ABSENT,
    ADD,
    ANSWER,
    FLUSH,
    HELLO,
    HERE,
    MEMBERS,
    Greeting,
    Request,
    read,
)
from channels_rabbitmq._reporter import Reporter
from channels_rabbitmq._settings.settings import Settings
from channels_rabbitmq.exceptions import BrokerUnavailable
from channels_rabbitmq.presence import Member
from channels_rabbitmq.statistics import Counters
from channels_rabbitmq.status import MissingProcess, ProcessStatus
from tests.support.statuses import status_of
from tests.support.virtual_time import VirtualLoop, run

GROUP = "room"
REQUEST_EXPIRY = 5.0
DELAY = 0.001  # seconds from the publisher to the queue
_codec = MessageCodec(max_message_size=10**6)


class Wire:
    """Brings bodies to the processes that are connected, and keeps a list of them."""

    def __init__(self) -> None:
        self.connected: dict[str, Process] = {}
        self.is_blocked = False
        self.is_full = False  # no room to write anything at once
        self.unblocked = asyncio.Event()
        self.on_blocked: list[Callable[[], None]] = []
        self.deaf: set[str] = set()  # what is for them stays in their queues
        self.lost_answers: list[Outcome] = []  # outcomes in place of the next ones
        self.said: list[tuple[str, str, str]] = []  # (sender, recipient, kind)

    def block(self) -> None:
        self.is_blocked = True
        for callback in self.on_blocked:
            callback()

    def kinds(self, sender: str) -> Counter[str]:
        return Counter(kind for one, _, kind in self.said if one == sender)

    async def publish(self, recipient: str, body: bytes) -> Outcome:
        if self.is_blocked:
            return Outcome.BLOCKED
        found = self._begin(recipient, body)
        await asyncio.sleep(DELAY)
        if self.lost_answers:
            return self.lost_answers.pop(0)
        self._deliver(found, body)
        return Outcome.CONFIRMED if found or recipient == TO_ALL else Outcome.RETURNED

    def publish_nowait(self, recipient: str, body: bytes) -> bool:
        if self.is_blocked or self.is_full:
            return False
        found = self._begin(recipient, body)
        asyncio.get_running_loop().call_later(DELAY, self._deliver, found, body)
        return True

    def _begin(self, recipient: str, body: bytes) -> list[Process]:
        message = _codec.decode(body).message()
        self.said.append((message["from"], recipient, message["kind"]))
        return [
            process
            for process in self.connected.values()
            if recipient in (TO_ALL, to_process(process.id))
        ]

    def _deliver(self, processes: list[Process], body: bytes) -> None:
        for process in processes:
            if process.id not in self.deaf:
                process.peers.on_request(body, 1, 0, process)


class Process:
    """One process: its groups, and its way to the wire."""

    def __init__(self, wire: Wire, letter: str, keys: tuple[str, ...] = ()) -> None:
        self.id = f"crq.{letter * 16}"
        self.wire = wire
        self.members: dict[str, bytes | None] = {}
        self.counters = Counters()
        self.acked = 0
        self.answers_late = asyncio.Event()
        self.answers_late.set()
        self.allows_flush = True
        self.has_no_broker = False
        self.flushes = self.added = 0
        settings = Settings.from_config({"symmetric_encryption_keys": list(keys) or None})
        self.place = Place(ord(letter), f"host-{letter}")
        self.reporter = Reporter(logging.getLogger("test"), self.id)
        self.peers = Peers(
            self.id,
            settings,
            self,
            self,
            self.counters,
            self.reporter,
            REQUEST_EXPIRY,
            self.place,
        )
        self._is_ready = asyncio.Event()
        self.bye: bytes | None = None

    def connect(self) -> None:
        self.wire.connected[self.id] = self
        self._is_ready.set()
        self.peers.on_ready()

    def disconnect(self) -> None:
        """As by a fault: nobody is told."""
        del self.wire.connected[self.id]
        self._is_ready.clear()
        self.peers.on_lost()

    async def say_bye(self) -> None:
        del self.wire.connected[self.id]
        assert self.bye is not None
        await self.wire.publish(TO_ALL, self.bye)
        self.close()

    def close(self) -> None:
        self.wire.connected.pop(self.id, None)
        self.peers.close()
        self.reporter.close()

    def ack(self, delivery_tag: int) -> None:
        self.acked += 1

    # Link

    @property
    def is_blocked(self) -> bool:
        return self.wire.is_blocked

    def call_when_blocked(self, callback: Callable[[], None]) -> None:
        self.wire.on_blocked.append(callback)

    async def wait_unblocked(self) -> None:
        while self.wire.is_blocked:
            await self.wire.unblocked.wait()

    async def publish(self, recipient: str, body: bytes, deadline: float) -> Outcome:
        return await self.wire.publish(recipient, body)

    def publish_nowait(self, recipient: str, body: bytes, deadline: float) -> bool:
        return self.wire.publish_nowait(recipient, body)

    def set_bye(self, body: bytes) -> None:
        self.bye = body

    async def wait_publisher_ready(self, deadline: float) -> None:
        pass

    async def wait_subscriber_ready(self, deadline: float) -> None:
        try:
            await asyncio.wait_for(self._is_ready.wait(), max(0, deadline - now()))
        except asyncio.TimeoutError:
            raise BrokerUnavailable("no connection") from None

    # Local

    def confirmed(self, group: str) -> list[tuple[str, bytes | None]]:
        return list(self.members.items()) if group == GROUP else []

    def count(self, group: str) -> int:
        return len(self.confirmed(group))

    def add(
        self, group: str, channel: str, info: bytes | None, deadline: float
    ) -> Coroutine[Any, Any, None]:
        if channel.endswith("!bad"):
            raise ValueError("a bad channel")
        self.added += 1
        return self._finish_add(channel, info)

    async def _finish_add(self, channel: str, info: bytes | None) -> None:
        await self.answers_late.wait()
        if channel.endswith("!unlucky"):
            raise BrokerUnavailable("no broker")
        self.members[channel] = info

    def discard(self, group: str, channel: str) -> None:
        self.members.pop(channel, None)

    def flush_here(self, deadline: float) -> Coroutine[Any, Any, None]:
        if not self.allows_flush:
            raise ValueError("not allowed")
        return self._flush_here()

    def own_status(self) -> ProcessStatus:
        return status_of(self.id, since=float(self.place.pid))

    async def _flush_here(self) -> None:
        self.flushes += 1
        await self.answers_late.wait()
        if self.has_no_broker:
            raise BrokerUnavailable("no broker")
        self.members.clear()


def now() -> float:
    return asyncio.get_running_loop().time()


def stand_still(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.work(seconds)


Scene = Callable[[Wire, list[Process]], Coroutine[Any, Any, None]]


def play(scene: Scene, letters: str = "abc", *, settled: bool = True) -> None:
    """Run a scene with processes that are connected, each with one member."""

    async def main() -> None:
        wire = Wire()
        processes = [Process(wire, letter) for letter in letters]
        for process in processes:
            process.members[f"{process.id}!x"] = None
            process.connect()
        if settled:
            await asyncio.sleep(1)
        await scene(wire, processes)
        for process in processes:
            process.close()
        await asyncio.gather(*(process.peers.wait_closed() for process in processes))

    run(main())


def channels(result: Any) -> list[str]:
    return sorted(member.channel for member in result.members)


class TestGreeting:
    def test_all_know_all_after_a_moment(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            for process in processes:
                others = sorted(one.id for one in processes if one is not process)
                assert sorted(process.peers.processes.known()) == others
                assert wire.kinds(process.id)[HELLO] == 1
            await asyncio.sleep(LONGEST)
            assert all(process.acked for process in processes)

        play(scene)

    def test_hello_is_repeated_until_it_is_confirmed(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            (a,) = processes
            wire.lost_answers = [Outcome.UNKNOWN, Outcome.UNKNOWN]
            assert not a.peers.greeter.is_greeted
            assert await a.peers.greeter.wait_greeted(now() + 10)
            assert wire.kinds(a.id)[HELLO] == 3
            assert not await a.peers.greeter.wait_greeted(now() + 10)

        play(scene, "a", settled=False)

    def test_who_waits_for_it_is_told_in_time(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            wire.lost_answers = [Outcome.UNKNOWN] * 100
            with pytest.raises(BrokerUnavailable, match="did not confirm"):
                await processes[0].peers.greeter.wait_greeted(now() + 1)
            assert now() == pytest.approx(1, abs=0.01)

        play(scene, "a", settled=False)

    def test_nobody_waits_for_it_while_publishers_are_blocked(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a = Process(wire, "n")
            wire.is_blocked = True
            a.connect()
            await a.peers.greeter.wait_greeted(now() + 10)
            assert wire.kinds(a.id) == {}
            wire.is_blocked = False
            wire.unblocked.set()
            await asyncio.sleep(DELAY * 2)
            assert wire.kinds(a.id) == {HELLO: 1}
            assert a.id in processes[0].peers.processes.known()
            a.close()

        play(scene)

    def test_who_waits_for_it_goes_on_when_publishers_are_blocked(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            (a,) = processes
            wire.lost_answers = [Outcome.UNKNOWN] * 100
            waiting = asyncio.create_task(a.peers.greeter.wait_greeted(now() + 10))
            await asyncio.sleep(1)
            assert not waiting.done()
            wire.block()
            assert await waiting
            assert now() == 1

        play(scene, "a", settled=False)

    def test_publishers_are_blocked_while_the_connection_is_set_up(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            (a,) = processes
            wire.lost_answers = [Outcome.UNKNOWN] * 100

            async def connect(deadline: float) -> None:
                await asyncio.sleep(1)
                wire.block()

            monkeypatch.setattr(a, "wait_publisher_ready", connect)
            assert await a.peers.greeter.wait_greeted(now() + 10)
            assert now() == 1

        play(scene, "a", settled=False)

    def test_each_hello_is_answered(self) -> None:
        """Also of one that has just been answered: it knows nobody any more."""

        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b = processes
            for times in range(2, 5):
                b.disconnect()
                b.connect()
                await asyncio.sleep(2 * SPREAD)
                assert wire.kinds(a.id)[HERE] == times
                assert wire.said[-1] == (a.id, to_process(b.id), HERE)

        play(scene, "ab")

    def test_many_hellos_are_answered_together(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            answers = [(to, kind) for one, to, kind in wire.said if one == processes[0].id]
            assert answers.count((TO_ALL, HERE)) >= 1
            assert len(answers) <= 3
            assert all(len(one.peers.processes.known()) == 19 for one in processes)

        play(scene, "abcdefghijklmnopqrst")

    def test_one_answer_tells_a_new_process_of_all(self) -> None:
        """It doesn't take the time that it takes if nobody answers."""

        async def scene(wire: Wire, processes: list[Process]) -> None:
            new = Process(wire, "n")
            begun = now()
            new.connect()
            wire.deaf = {one.id for one in processes[1:]}  # They hear no hello.
            result = await new.peers.group_members(GROUP, begun + 0.4)
            assert sorted(new.peers.processes.known()) == [one.id for one in processes]
            assert new.peers.greeter.is_settled
            assert result.silent == tuple(one.id for one in processes[1:])
            new.close()

        play(scene)

    def test_one_that_has_just_heard_of_all_passes_them_on(self) -> None:
        """It hasn't heard them itself, and they may be too busy to answer the next one."""

        async def scene(wire: Wire, processes: list[Process]) -> None:
            new, newer = Process(wire, "n"), Process(wire, "o")
            new.connect()
            await new.peers.group_members(GROUP, now() + 1)
            assert new.peers.greeter.is_settled
            wire.deaf = {one.id for one in processes}
            newer.connect()
            await asyncio.sleep(3 * SPREAD)
            assert {*newer.peers.processes.known()} == {new.id, *wire.deaf}
            assert newer.peers.greeter.is_settled
            for one in (new, newer):
                one.close()

        play(scene)

    def test_an_answer_to_another_hello_is_no_proof(self) -> None:
        """It may be older than this connection, and lack who has come since."""

        async def scene(wire: Wire, processes: list[Process]) -> None:
            (a,) = processes
            settled = "crq." + "s" * 16
            for answered in ((), ((a.id, 2),), ((settled, 1),), ((a.id, 1),)):
                assert not a.peers.greeter.is_settled
                here = Greeting(HERE, settled, answered=answered, known=())
                a.peers.on_request(_codec.encode_for_channel(TO_ALL, here.message()), 1, 0, a)
            assert a.peers.greeter.is_settled

        play(scene, "a", settled=False)

    def test_before_it_knows_all_no_result_is_complete(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            (a,) = processes
            result = await a.peers.group_members(GROUP, now() + SETTLE_TIMEOUT / 2)
            assert not result.is_complete
            assert result.silent == result.absent == ()
            result = await a.peers.group_members(GROUP, now() + 1)
            assert result.is_complete
            assert now() == pytest.approx(SETTLE_TIMEOUT, abs=0.01)

        play(scene, "a", settled=False)

    def test_an_unsettled_ones_list_is_no_proof(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b = processes
            await asyncio.sleep(2 * SPREAD)
            assert a.peers.processes.known() == [b.id]
            assert not a.peers.greeter.is_settled
            assert not b.peers.greeter.is_settled

        play(scene, "ab", settled=False)


class TestPassingOn:
    def test_one_that_is_stuck_is_known_by_way_of_others(self) -> None:
        """Also if the only one that had heard it has ended."""

        async def scene(wire: Wire, processes: list[Process]) -> None:
            b, stuck = processes
            wire.deaf = {stuck.id}
            a = Process(wire, "m")
            a.connect()
            assert (await a.peers.group_members(GROUP, now() + 1)).silent == (stuck.id,)
            await b.say_bye()
            d = Process(wire, "n")
            d.connect()
            result = await d.peers.group_members(GROUP, now() + 1)
            assert not result.is_complete
            assert result.silent == (stuck.id,)
            a.close()
            d.close()

        play(scene, "bs")

    def test_the_name_of_a_killed_one_is_not_passed_on_for_ever(self) -> None:
        """Also if only processes that have just come ask."""

        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, killed = processes
            await asyncio.sleep(GONE_AFTER)
            killed.disconnect()
            for letter in "mn":
                new = Process(wire, letter)
                new.connect()
                result = await new.peers.group_members(GROUP, now() + 1)
                # The second one is told how long it has been away.
                assert result.absent == (killed.id,)
                await asyncio.sleep(GONE_AFTER / 2)
                await new.say_bye()
            new = Process(wire, "o")
            new.connect()
            assert (await new.peers.group_members(GROUP, now() + 1)).is_complete
            assert a.peers.processes.is_gone(killed.id)
            new.close()

        play(scene, "ak")

    def test_what_is_known_already_is_not_told(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            *alive, killed = processes
            await asyncio.sleep(GONE_AFTER)
            killed.disconnect()
            asking = [one.peers.group_members(GROUP, now() + 1) for one in alive]
            await asyncio.gather(*asking)
            await asyncio.sleep(1)
            told = sum(wire.kinds(one.id)[ABSENT] for one in alive)
            assert 1 <= told < len(alive)
            assert [list(one.peers.processes.absences()) for one in alive] == [[killed.id]] * len(
                alive
            )

        play(scene, "abcdefghijk")

    def test_nothing_is_told_while_publishers_are_blocked(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, killed = processes
            killed.disconnect()
            await a.peers.group_members(GROUP, now() + 1)
            wire.is_blocked = True
            await asyncio.sleep(1)
            wire.is_blocked = False
            assert wire.kinds(a.id)[ABSENT] == 0

        play(scene, "ak")


class TestStandstill:
    @pytest.mark.parametrize("asks_at_once", [True, False])
    def test_it_may_have_missed_a_hello(self, asks_at_once: bool) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, _ = processes
            await asyncio.sleep(REQUEST_EXPIRY / 3)
            wire.deaf = {a.id}
            new = Process(wire, "n")
            new.members[f"{new.id}!x"] = None
            new.connect()
            await asyncio.sleep(0.5)  # Its hello expires in the queue.
            stand_still(REQUEST_EXPIRY + 0.1)
            wire.deaf = {new.id}
            if not asks_at_once:
                await asyncio.sleep(1)
            result = await a.peers.group_members(GROUP, now() + 1)
            assert not result.is_complete
            assert result.silent == (new.id,)
            wire.deaf = set()
            assert (await a.peers.group_members(GROUP, now() + 1)).is_complete
            new.close()

        play(scene, "ab")

    def test_one_in_the_middle_of_a_question(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b = processes
            wire.deaf = {b.id}
            asking = asyncio.create_task(a.peers.group_members(GROUP, now() + 20))
            await asyncio.sleep(0.01)
            stand_still(REQUEST_EXPIRY + 2)
            wire.deaf = set()
            assert (await asking).is_complete
            assert wire.kinds(a.id)[HELLO] == 2

        play(scene, "ab")

    def test_a_short_one_or_a_long_rest_is_none(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, _ = processes
            stand_still(REQUEST_EXPIRY / 2)
            await asyncio.sleep(20 * REQUEST_EXPIRY)
            assert (await a.peers.group_members(GROUP, now() + 1)).is_complete
            assert wire.kinds(a.id)[HELLO] == 1

        play(scene, "ab")

    def test_without_a_connection_it_says_nothing(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, _ = processes
            a.disconnect()
            stand_still(2 * REQUEST_EXPIRY)
            await asyncio.sleep(REQUEST_EXPIRY)
            assert wire.kinds(a.id)[HELLO] == 1

        play(scene, "ab")


class TestAskingAll:
    def test_all_members_once(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, c = processes
            b.members[f"{b.id}!y"] = pack_info({"name": "y"})
            begun = now()
            result = await a.peers.group_members(GROUP, begun + 1)
            assert now() - begun < 10 * DELAY
            assert result.is_complete
            assert (result.silent, result.absent) == ((), ())
            expected = [f"{a.id}!x", f"{b.id}!x", f"{b.id}!y", f"{c.id}!x"]
            assert channels(result) == expected
            assert Member(f"{b.id}!y", {"name": "y"}) in result.members
            assert await a.peers.group_count(GROUP, now() + 1) == 4
            assert await a.peers.group_count("another", now() + 1) == 0
            # One question, and one answer from each: nobody is asked twice.
            assert wire.kinds(a.id)[MEMBERS] == 1

        play(scene)

    def test_large_answers_come_in_parts(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b = processes
            b.members = {f"{b.id}!{n}": pack_info({"x": "y" * 4000}) for n in range(200)}
            result = await a.peers.group_members(GROUP, now() + 1)
            assert result.is_complete
            assert len(result.members) == 201
            assert wire.kinds(b.id)["answer"] > 1

        play(scene, "ab")

    def test_the_silent_are_named_in_time(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, c = processes
            wire.deaf = {b.id}
            begun = now()
            result = await a.peers.group_members(GROUP, begun + 1)
            assert now() - begun == pytest.approx(1, abs=0.01)
            assert not result.is_complete
            assert (result.silent, result.absent) == ((b.id,), ())
            assert channels(result) == [f"{a.id}!x", f"{c.id}!x"]
            assert (a.counters.questions, a.counters.incomplete, a.counters.silent) == (1, 1, 1)

        play(scene)

    def test_one_that_answers_late_is_asked_again(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            wire.deaf = {b.id}
            asking = asyncio.create_task(a.peers.group_members(GROUP, now() + 1))
            await asyncio.sleep(0.2)
            wire.deaf = set()
            result = await asking
            assert result.is_complete
            assert (a.id, to_process(b.id), MEMBERS) in wire.said

        play(scene)

    def test_the_lost_are_absent_then_gone(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, c = processes
            b.disconnect()
            begun = now()
            result = await a.peers.group_members(GROUP, begun + 1)
            assert now() - begun < 0.2  # Who is known to be away isn't waited for.
            assert (result.is_complete, result.silent, result.absent) == (False, (), (b.id,))
            begun = now()
            result = await a.peers.group_members(GROUP, begun + 1)
            assert now() - begun < 10 * DELAY  # It is asked alone at once.
            assert result.absent == (b.id,)
            await asyncio.sleep(GONE_AFTER)
            result = await a.peers.group_members(GROUP, now() + 1)
            assert result.is_complete
            assert channels(result) == [f"{a.id}!x", f"{c.id}!x"]

        play(scene)

    def test_one_that_is_back_is_asked_again(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            b.disconnect()
            assert not (await a.peers.group_members(GROUP, now() + 1)).is_complete
            b.connect()
            await b.peers.greeter.wait_greeted(now() + 1)
            result = await a.peers.group_members(GROUP, now() + 1)
            assert result.is_complete
            assert len(result.members) == 3

        play(scene)

    def test_one_that_has_ended_in_order_is_gone_at_once(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, c = processes
            await b.say_bye()
            result = await a.peers.group_members(GROUP, now() + 1)
            assert result.is_complete
            assert channels(result) == [f"{a.id}!x", f"{c.id}!x"]

        play(scene)

    def test_one_that_ends_meanwhile_is_not_waited_for(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            wire.deaf = {b.id}
            asking = asyncio.create_task(a.peers.group_members(GROUP, now() + 5))
            await asyncio.sleep(0.5)
            await b.say_bye()
            begun = now()
            assert (await asking).is_complete
            assert now() - begun < 0.01

        play(scene)

    def test_without_the_echo_no_result_is_complete(self) -> None:
        """Somebody may have greeted whom this process hasn't heard."""

        async def scene(wire: Wire, processes: list[Process]) -> None:
            a = processes[0]
            wire.deaf = {a.id}
            result = await a.peers.group_members(GROUP, now() + 1)
            assert not result.is_complete
            wire.deaf = set()
            assert (await a.peers.group_members(GROUP, now() + 1)).is_complete

        play(scene)

    def test_while_publishers_are_blocked_all_is_quiet(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            before = len(wire.said)
            wire.is_blocked = True
            begun = now()
            result = await a.peers.group_members(GROUP, begun + 1)
            assert now() == begun
            assert not result.is_complete
            assert result.silent == tuple(one.id for one in processes[1:])
            assert channels(result) == [f"{a.id}!x"]
            # A question that was written just before
            request = Request(MEMBERS, a.id, 99, 1.0, GROUP)
            b.peers.on_request(_codec.encode_for_channel(TO_ALL, request.message()), 1, 0, b)
            assert b.counters.unanswered == 1
            assert len(wire.said) == before

        play(scene)

    def test_on_the_next_connection_it_is_asked_again(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            wire.deaf = {b.id}
            asking = asyncio.create_task(a.peers.group_members(GROUP, now() + 5))
            await asyncio.sleep(0.05)
            a.disconnect()
            wire.deaf = set()
            await asyncio.sleep(1)
            assert not asking.done()
            a.connect()
            result = await asking
            assert result.is_complete
            assert len(result.members) == 3

        play(scene)

    def test_an_own_connection_that_stays_away(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            wire.deaf = {b.id}
            asking = asyncio.create_task(a.peers.group_members(GROUP, now() + 2))
            await asyncio.sleep(0.05)
            a.disconnect()
            begun = now()
            result = await asking
            assert now() - begun < 2
            assert not result.is_complete
            assert f"{a.id}!x" in channels(result)
            with pytest.raises(BrokerUnavailable):
                await a.peers.group_members(GROUP, now() + 1)

        play(scene)

    def test_cancelled_it_leaves_nothing(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            wire.deaf = {b.id}
            asking = asyncio.create_task(a.peers.group_members(GROUP, now() + 5))
            await asyncio.sleep(0.05)
            asking.cancel()
            await asyncio.wait([asking])
            assert len(a.peers._asker.questions) == 0

        play(scene)


class TestSharing:
    def test_a_thousand_calls_at_once(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, *_ = processes
            begun = now()
            counts = [a.peers.group_count(GROUP, begun + 1) for _ in range(1000)]
            assert await asyncio.gather(*counts) == [3] * 1000
            assert now() - begun < 10 * DELAY
            assert wire.kinds(a.id)["count"] == 1
            assert a.counters.questions == 1000

        play(scene)

    def test_a_call_has_only_what_is_asked_after_it(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b = processes
            first = asyncio.create_task(a.peers.group_count(GROUP, now() + 1))
            await asyncio.sleep(1.5 * DELAY)  # The answer is under way.
            b.members[f"{b.id}!y"] = None
            later = [a.peers.group_count(GROUP, now() + 1) for _ in range(10)]
            assert await asyncio.gather(first, *later) == [2] + [3] * 10
            assert wire.kinds(a.id)["count"] == 2

        play(scene, "ab")

    def test_one_before_that_takes_long(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, c = processes
            wire.deaf = {b.id}
            begun = now()
            first = asyncio.create_task(a.peers.group_members(GROUP, begun + 1))
            await asyncio.sleep(0.01)
            c.members[f"{c.id}!y"] = None
            second = await a.peers.group_members(GROUP, begun + 0.5)
            assert f"{c.id}!y" in channels(second)
            assert now() == pytest.approx(begun + 0.5)
            assert f"{c.id}!y" not in channels(await first)
            assert now() == pytest.approx(begun + 1, abs=0.01)

        play(scene)

    def test_each_has_its_own_time(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            wire.deaf = {b.id}
            begun = now()
            short = asyncio.create_task(a.peers.group_members(GROUP, begun + 0.3))
            long = asyncio.create_task(a.peers.group_members(GROUP, begun + 2))
            assert (await short).silent == (b.id,)
            assert now() == pytest.approx(begun + 0.3)
            wire.deaf = set()
            assert (await long).is_complete
            assert now() < begun + 1

        play(scene)

    def test_cancelling_one_leaves_the_others(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            wire.deaf = {b.id}
            first, second, third = [
                asyncio.create_task(a.peers.group_members(GROUP, now() + 1)) for _ in range(3)
            ]
            await asyncio.sleep(0.01)
            first.cancel()
            second.cancel()
            await asyncio.sleep(0.01)
            assert len(a.peers._asker.questions) == 1
            wire.deaf = set()
            assert (await third).is_complete
            assert len(a.peers._asker.questions) == 0

        play(scene)

    def test_no_number_if_nobody_has_answered(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, c = processes
            wire.deaf = {b.id}
            assert await a.peers.group_count(GROUP, now() + 1) == 2
            wire.deaf = {b.id, c.id}
            with pytest.raises(BrokerUnavailable, match="of 2 that are there"):
                await a.peers.group_count(GROUP, now() + 1)
            wire.is_blocked = True
            with pytest.raises(BrokerUnavailable):
                await a.peers.group_count(GROUP, now() + 1)

        play(scene)

    def test_no_number_before_it_is_known_who_is_there(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            (a,) = processes
            with pytest.raises(BrokerUnavailable, match="isn't known yet"):
                await a.peers.group_count(GROUP, now() + SETTLE_TIMEOUT / 2)
            assert await a.peers.group_count(GROUP, now() + 1) == 1

        play(scene, "a", settled=False)

    def test_the_end_of_the_layer_ends_it(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            wire.deaf = {b.id}
            asking = asyncio.create_task(a.peers.group_members(GROUP, now() + 1))
            await asyncio.sleep(0.01)
            begun = now()
            a.peers.close()
            await a.peers.wait_closed()
            assert not (await asking).is_complete
            assert now() == begun

        play(scene)


class TestAnswering:
    def test_one_whose_layer_closes_in_the_same_turn(self) -> None:
        """The coroutine that would have confirmed is closed, or Python would warn."""

        async def scene(wire: Wire, processes: list[Process]) -> None:
            (a,) = processes
            request = Request(ADD, "crq." + "z" * 16, 1, 1.0, GROUP, f"{a.id}!y")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                a.peers.on_request(_codec.encode_for_channel(TO_ALL, request.message()), 1, 0, a)
                a.peers.close()
                await a.peers.wait_closed()
                gc.collect()
            assert a.added == 1
            assert caught == []

        play(scene, "a")

    def test_an_answer_that_is_too_large(self) -> None:
        """It harms neither later answers nor the task that gives them."""

        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b = processes
            b.members[f"{b.id}!y"] = b"x" * 2_000_000
            result = await a.peers.group_members(GROUP, now() + 1)
            assert result.silent == (b.id,)
            assert b.counters.unanswered > 0
            del b.members[f"{b.id}!y"]
            assert (await a.peers.group_members(GROUP, now() + 1)).is_complete

        play(scene, "ab")

    def test_many_questions_at_once_are_all_answered(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b = processes
            begun = now()
            asking = [a.peers.group_count(f"room{n}", begun + 1) for n in range(1000)]
            assert await asyncio.gather(*asking) == [0] * 1000
            assert (a.counters.incomplete, b.counters.unanswered) == (0, 0)

        play(scene, "ab")

    def test_without_room_to_write_questions_wait_and_are_answered(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b = processes
            wire.is_full = True
            asking = [a.peers.group_count(f"room{n}", now() + 1) for n in range(100)]
            assert await asyncio.gather(*asking) == [0] * 100
            assert (a.counters.incomplete, b.counters.unanswered) == (0, 0)

        play(scene, "ab")

    def test_a_question_whose_time_is_over_is_not_answered(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_answerer, "MOST_WORKERS", 1)

        async def scene(wire: Wire, processes: list[Process]) -> None:
            (a,) = processes
            wire.is_full = True
            for number in (1, 2, 2, 3):
                timeout = 1.0 if number != 2 else DELAY / 2
                request = Request(MEMBERS, "crq." + "z" * 16, number, timeout, GROUP)
                a.peers.on_request(_codec.encode_for_channel(TO_ALL, request.message()), 1, 0, a)
            await asyncio.sleep(1)
            assert (a.counters.answered, a.counters.unanswered) == (2, 1)
            assert wire.kinds(a.id)[ANSWER] == 2

        play(scene, "a")

    def test_only_so_many_questions_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_answerer, "MOST_QUESTIONS", 2)

        async def scene(wire: Wire, processes: list[Process]) -> None:
            (a,) = processes
            wire.is_full = True
            for number in range(3):
                request = Request(MEMBERS, "crq." + "z" * 16, number, 1.0, GROUP)
                a.peers.on_request(_codec.encode_for_channel(TO_ALL, request.message()), 1, 0, a)
            assert a.counters.unanswered == 1

        play(scene, "a")

    def test_a_hundred_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_answerer, "MOST_AT_ONCE", 3)

        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            b.answers_late.clear()
            adding = [
                asyncio.create_task(a.peers.add(GROUP, f"{b.id}!{n}", None, now() + 5))
                for n in range(5)
            ]
            await asyncio.sleep(0.01)
            assert (b.counters.answered, b.counters.unanswered) == (3, 2)
            b.answers_late.set()
            await asyncio.gather(*adding)  # The rest is asked again.
            assert len(b.members) == 6

        play(scene)

    def test_what_a_later_version_asks_is_ignored(self, logged: pytest.LogCaptureFixture) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b = processes
            message = Request(MEMBERS, b.id, 1, 1.0, GROUP).message() | {"kind": "riddle"}
            a.peers.on_request(_codec.encode_for_channel(TO_ALL, message), 1, 0, a)
            await asyncio.sleep(10)
            assert (a.counters.unanswered, a.counters.malformed_requests) == (1, 0)

        play(scene, "ab")
        assert not [one for one in logged.records if one.name == "test"]

    @pytest.mark.parametrize("what", ["garbage", "for another", "without a sense"])
    def test_what_nobody_should_send_is_counted(self, what: str) -> None:
        bodies = {
            "garbage": b"\xc1",
            "for another": _codec.encode_for_channel(
                "crq.x!requests", Greeting(HELLO, "crq." + "z" * 16).message()
            ),
            "without a sense": _codec.encode_for_channel(TO_ALL, {"kind": "hello"}),
        }

        async def scene(wire: Wire, processes: list[Process]) -> None:
            (a,) = processes
            await asyncio.sleep(LONGEST)  # its own hello is acked
            acked = a.acked
            a.peers.on_request(bodies[what], 1, 0, a)
            assert a.counters.malformed_requests == 1
            await asyncio.sleep(LONGEST)
            assert a.acked == acked + 1
            assert a.peers.processes.known() == []
            assert (await a.peers.group_members(GROUP, now() + 1)).is_complete

        play(scene, "a")

    def test_with_other_keys_nobody_is_known(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            (a,) = processes
            stranger = Process(wire, "s", keys=("another",))
            stranger.peers.on_ready()
            assert stranger.bye is not None
            assert a.bye is not None
            a.peers.on_request(stranger.bye, 1, 0, a)
            stranger.peers.on_request(a.bye, 1, 0, stranger)
            for one in (a, stranger):
                assert one.counters.malformed_requests == 1
                assert one.peers.processes.known() == []
            stranger.close()

        play(scene, "a")

    def test_what_it_says_can_be_read(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            (a,) = processes
            assert a.bye is not None
            assert read(_codec.decode(a.bye).message()) == Greeting("bye", a.id)

        play(scene, "a")


class TestAskingOne:
    def test_it_is_done_there(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            channel = f"{b.id}!y"
            await a.peers.add(GROUP, channel, pack_info({"n": 1}), now() + 10)
            assert b.members[channel] == pack_info({"n": 1})
            await a.peers.discard(GROUP, channel, now() + 10)
            assert channel not in b.members

        play(scene)

    @pytest.mark.parametrize(
        ("end", "error"), [("bad", ValueError), ("unlucky", BrokerUnavailable)]
    )
    def test_what_it_raises_there_is_raised_here(self, end: str, error: type[Exception]) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            with pytest.raises(error, match=f"The process {b.id} answers: "):
                await a.peers.add(GROUP, f"{b.id}!{end}", None, now() + 10)

        play(scene)

    @pytest.mark.parametrize("is_lost", [True, False], ids=["the answer is lost", "it takes long"])
    def test_a_request_that_is_repeated_is_done_once(self, is_lost: bool) -> None:
        """By then the process itself may have changed the same."""

        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b = processes
            channel = f"{b.id}!y"
            b.answers_late.clear()
            adding = asyncio.create_task(a.peers.add(GROUP, channel, None, now() + 10))
            if is_lost:
                await asyncio.sleep(0.1)
                wire.deaf = {a.id}
                b.answers_late.set()
                await asyncio.sleep(0.1)
                wire.deaf = set()
                b.discard(GROUP, channel)
            else:
                await asyncio.sleep(3)
                b.answers_late.set()
            await adding
            assert b.added == 1
            assert (channel in b.members) is not is_lost

        play(scene, "ab")

    def test_one_that_has_ended(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            await b.say_bye()
            begun = now()
            with pytest.raises(ValueError, match=f"The process {b.id} is gone"):
                await a.peers.add(GROUP, f"{b.id}!x", None, now() + 10)
            assert now() == begun

        play(scene)

    def test_one_that_ends_meanwhile(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            wire.deaf = {b.id}
            adding = asyncio.create_task(a.peers.add(GROUP, f"{b.id}!x", None, now() + 10))
            await asyncio.sleep(0.5)
            begun = now()
            await b.say_bye()
            with pytest.raises(ValueError, match="is gone"):
                await adding
            assert now() - begun < 0.01

        play(scene)

    @pytest.mark.parametrize("is_known", [True, False])
    def test_one_that_has_vanished(self, is_known: bool) -> None:
        """First nobody can know; when it has been away for long enough, it is gone."""

        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            b.disconnect()
            id_ = b.id if is_known else "crq." + "z" * 16
            with pytest.raises(BrokerUnavailable, match="has no queue on RabbitMQ"):
                await a.peers.add(GROUP, f"{id_}!x", None, now() + GONE_AFTER / 2)
            with pytest.raises(ValueError, match="is gone"):
                await a.peers.add(GROUP, f"{id_}!x", None, now() + GONE_AFTER)
            begun = now()
            with pytest.raises(ValueError, match="is gone"):
                await a.peers.add(GROUP, f"{id_}!x", None, now() + GONE_AFTER)
            assert now() == begun

        play(scene)

    def test_one_that_comes_back(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            b.disconnect()
            adding = asyncio.create_task(a.peers.add(GROUP, f"{b.id}!y", None, now() + 10))
            await asyncio.sleep(3)
            b.connect()
            begun = now()
            await adding
            assert now() - begun < 0.3
            assert f"{b.id}!y" in b.members

        play(scene)

    def test_one_that_does_not_answer(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            wire.deaf = {b.id}
            begun = now()
            with pytest.raises(BrokerUnavailable, match="did not answer in time"):
                await a.peers.add(GROUP, f"{b.id}!x", None, begun + 10)
            assert now() - begun == pytest.approx(10, abs=0.01)

        play(scene)

    def test_while_publishers_are_blocked(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, _ = processes
            wire.is_blocked = True
            with pytest.raises(BrokerUnavailable, match="takes nothing"):
                await a.peers.add(GROUP, f"{b.id}!x", None, now() + 1)

        play(scene)


class TestFlush:
    def test_all_others_empty_what_they_hold(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, *others = processes
            await a.peers.flush(now() + 10)
            assert [one.members for one in others] == [{}, {}]
            assert a.flushes == 0  # Its own part is not the wire's.

        play(scene)

    def test_a_question_that_is_repeated_empties_once(self) -> None:
        """Afterwards there may be new messages, which it mustn't take away."""

        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b = processes
            b.answers_late.clear()
            flushing = asyncio.create_task(a.peers.flush(now() + 10))
            await asyncio.sleep(1)
            assert wire.kinds(a.id)[FLUSH] > 1
            b.answers_late.set()
            await flushing
            assert b.flushes == 1

        play(scene, "ab")

    def test_an_answer_that_is_lost_is_given_again(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b = processes
            flushing = asyncio.create_task(a.peers.flush(now() + 10))
            await asyncio.sleep(1.5 * DELAY)
            assert wire.kinds(b.id)[ANSWER] == 1
            wire.lost_answers = [Outcome.UNKNOWN]
            await flushing
            assert (b.flushes, wire.kinds(b.id)[ANSWER]) == (1, 2)

        play(scene, "ab")

    def test_who_does_not_answer_is_named(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b = processes
            wire.deaf = {b.id}
            with pytest.raises(BrokerUnavailable, match=f"no answer of {b.id}"):
                await a.peers.flush(now() + 1)

        play(scene, "ab")

    def test_refusals_are_the_callers(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b = processes
            b.has_no_broker = True
            with pytest.raises(BrokerUnavailable, match=f"{b.id} answers: no broker"):
                await a.peers.flush(now() + 1)
            b.allows_flush = False
            with pytest.raises(NotImplementedError, match=f"{b.id} answers: not allowed"):
                await a.peers.flush(now() + 1)
            assert b.members

        play(scene, "ab")

    def test_only_so_many_are_remembered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_answerer, "_MOST_CHANGES", 2)

        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b = processes
            for _ in range(4):
                await a.peers.flush(now() + 10)
            assert b.flushes == 4
            assert len(b.peers._answerer._changes) == 2

        play(scene, "ab")


class TestStatus:
    def test_all_answer(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            status = await processes[1].peers.status(now() + 1)
            assert [one.statistics.id for one in status.processes] == [one.id for one in processes]
            assert status.processes[0] == processes[0].own_status()
            assert (status.silent, status.absent, status.is_complete) == ((), (), True)
            # Nobody else counts or logs it as a question of the application's.
            assert processes[1].counters.questions == 0

        play(scene)

    def test_who_is_missing_is_known_from_others(self) -> None:
        """Also by one that came when the silent one was silent already."""

        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b, c = processes
            wire.deaf.add(c.id)
            await asyncio.sleep(100)
            late = Process(wire, "d")
            late.connect()
            await asyncio.sleep(SETTLE_TIMEOUT)
            began = now()
            status = await late.peers.status(now() + 1)
            assert now() - began <= 1.5
            assert not status.is_complete
            assert {one.statistics.id for one in status.processes} == {a.id, b.id, late.id}
            assert status.absent == ()
            (silent,) = status.silent
            assert (silent.id, silent.pid, silent.host) == (c.id, *c.place)
            assert silent.heard_ago is not None
            assert 100 <= silent.heard_ago <= 103
            wire.deaf.clear()
            assert (await late.peers.status(now() + 1)).is_complete
            late.close()
            await late.peers.wait_closed()

        play(scene)

    def test_nobody_knows_of_the_missing_one(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b = processes
            b.disconnect()
            a.peers.processes._places.clear()
            status = await a.peers.status(now() + 1)
            (absent,) = status.absent
            assert absent == MissingProcess(b.id, absent.heard_ago, 0, "")
            assert status.silent == ()

        play(scene, "ab")

    def test_one_that_answers_with_nonsense_is_silent(self) -> None:
        async def scene(wire: Wire, processes: list[Process]) -> None:
            a, b = processes
            b.own_status = a.own_status  # type: ignore[method-assign]
            status = await a.peers.status(now() + 1)
            assert [one.id for one in status.silent] == [b.id]
            assert not status.is_complete

        play(scene, "ab")
