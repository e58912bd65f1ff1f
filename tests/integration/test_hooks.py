"""Hooks are called with what happens on a broker."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pamqp.commands
import pytest
from asgiref.sync import async_to_sync

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.amqp_proxy import TO_BROKER, AmqpProxy, Frame
from tests.support.brokers import Broker
from tests.support.changes import until
from tests.support.layers import close_for_sync_code, subscriber_of
from tests.support.log_lines import log_lines
from tests.support.loop_thread import LoopThread
from tools.private_broker import PrivateBroker

HOOKS = ("on_disconnect", "on_reconnect")


async def turns() -> None:
    """Let run what is due."""
    for _ in range(10):
        await asyncio.sleep(0)


OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]


MESSAGE = {"type": "test.message"}


commands = pamqp.commands


outer: contextvars.ContextVar[str] = contextvars.ContextVar("outer", default="nobody's")


class Calls:
    """What a layer's hooks were called with, in order: (hook, id, reason)."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[str, str, str]] = asyncio.Queue()

    def hooks(self) -> dict[str, Any]:
        """For ``CONFIG``: async functions that note the call."""
        return {name: functools.partial(self.note, name) for name in HOOKS}

    async def note(self, hook: str, id_: str, reason: str) -> None:
        self._queue.put_nowait((hook, id_, reason))

    async def next(self) -> tuple[str, str, str]:
        return await asyncio.wait_for(self._queue.get(), 20)

    @property
    def rest(self) -> int:
        return self._queue.qsize()


@pytest.fixture
def calls() -> Calls:
    return Calls()


def id_of(layer: RabbitmqChannelLayer) -> str:
    (statistics,) = layer.statistics()
    return statistics.id


async def lose(proxy: AmqpProxy, times: int = 1) -> None:
    """Have the connection that receives lost, and come back."""
    with log_lines() as lines:
        for _ in range(times):
            proxy.cut(name="subscriber")
            await lines.next("WARNING subscriber .*: lost")
            await lines.next("WARNING subscriber .*: connected again")


class TestTheOptions:
    async def test_a_module_is_imported_by_the_first_call_and_not_before(
        self, hooks_module: Path, open_layer: OpenLayer
    ) -> None:
        """It may make the layer itself, as a module of the project may at its top."""
        hooks_module.write_text(
            "from channels_rabbitmq.core import RabbitmqChannelLayer\n"
            "layer = RabbitmqChannelLayer(on_reconnect='hooks_of_a_test.sub.hook')\n"
            "async def hook(id, reason): pass\n"
        )
        layer = await open_layer(on_reconnect="hooks_of_a_test.sub.hook")
        assert "hooks_of_a_test" not in sys.modules
        await layer.new_channel()
        assert "hooks_of_a_test.sub" in sys.modules


class TestWhen:
    async def test_a_loss_and_a_reconnect(
        self, open_layer: OpenLayer, proxy: AmqpProxy, calls: Calls
    ) -> None:
        layer = await open_layer(host=proxy.url, **calls.hooks())
        await layer.connect()
        id_ = (await layer.new_channel()).partition("!")[0]
        await turns()
        assert calls.rest == 0  # Nobody is told of the first connection.
        for number in range(3):
            proxy.inject(
                commands.Connection.Close(
                    reply_code=320, reply_text=f"FORCED {number}", class_id=0, method_id=0
                ),
                name="subscriber",
            )
            called, told_id, reason = await calls.next()
            assert (called, told_id) == ("on_disconnect", id_)
            assert reason == f"RabbitMQ closed the connection: 320 FORCED {number}"
            assert await calls.next() == ("on_reconnect", id_, reason)
        assert calls.rest == 0

    async def test_on_disconnect_comes_at_once_and_attempts_that_fail_say_nothing(
        self, open_layer: OpenLayer, proxy: AmqpProxy, calls: Calls
    ) -> None:
        layer = await open_layer(host=proxy.url, **calls.hooks())
        await layer.connect()
        with log_lines(logging.DEBUG) as lines:
            proxy.refuse()
            proxy.cut()
            assert (await calls.next())[0] == "on_disconnect"
            for _ in range(3):
                await lines.next("DEBUG subscriber .*: reconnecting")
            assert calls.rest == 0
            await proxy.accept()
            assert (await calls.next())[0] == "on_reconnect"
        await turns()
        assert calls.rest == 0

    async def test_a_first_attempt_that_fails_says_nothing(
        self, open_layer: OpenLayer, proxy: AmqpProxy, calls: Calls
    ) -> None:
        proxy.refuse()
        layer = await open_layer(host=proxy.url, **calls.hooks())
        with log_lines(logging.DEBUG) as lines:
            await layer.new_channel()
            await lines.next("DEBUG subscriber .*: reconnecting")
            await proxy.accept()
            await lines.next("WARNING subscriber .*: connected to .* after")
        await turns()
        assert calls.rest == 0

    async def test_the_connection_that_sends_says_nothing(
        self, open_layer: OpenLayer, proxy: AmqpProxy, calls: Calls
    ) -> None:
        layer = await open_layer(host=proxy.url, **calls.hooks())
        await layer.connect()
        with log_lines() as lines:
            proxy.cut(name="publisher")
            await lines.next("WARNING publisher .*: connected again")
        await turns()
        assert calls.rest == 0

    async def test_on_reconnect_waits_for_every_group(
        self, open_layer: OpenLayer, proxy: AmqpProxy, calls: Calls
    ) -> None:
        layer = await open_layer(host=proxy.url, **calls.hooks())
        channel = await layer.new_channel()
        await asyncio.gather(*(layer.group_add(f"g{n}", channel) for n in range(20)))
        release = asyncio.Event()

        async def hold_the_last(frame: Frame) -> Frame:
            if frame.decode().routing_key == "g19":
                await release.wait()
            return frame

        proxy.rule(TO_BROKER, commands.Exchange.Bind, hold_the_last)
        with log_lines() as lines:
            proxy.cut(name="subscriber")
            await lines.next("WARNING subscriber .*: connected again")
        assert (await calls.next())[0] == "on_disconnect"
        await until(lambda: layer.statistics()[0].groups.bound == 19)
        await turns()
        assert calls.rest == 0
        release.set()
        assert (await calls.next())[0] == "on_reconnect"
        assert layer.statistics()[0].groups.bound == 20

    async def test_a_group_left_meanwhile_is_not_waited_for(
        self, open_layer: OpenLayer, proxy: AmqpProxy, calls: Calls
    ) -> None:
        layer = await open_layer(host=proxy.url, **calls.hooks())
        channel = await layer.new_channel()
        await layer.group_add("g", channel)
        release = asyncio.Event()

        async def hold_the_group(frame: Frame) -> Frame:
            if frame.decode().routing_key == "g":
                await release.wait()
            return frame

        proxy.rule(TO_BROKER, commands.Exchange.Bind, hold_the_group)
        proxy.cut(name="subscriber")
        assert (await calls.next())[0] == "on_disconnect"
        await until(lambda: layer.statistics()[0].subscriber.state == "connected")
        await turns()
        assert calls.rest == 0
        await layer.group_discard("g", channel)
        assert (await calls.next())[0] == "on_reconnect"
        release.set()

    async def test_a_group_that_is_refused_is_not_waited_for(
        self, open_layer: OpenLayer, proxy: AmqpProxy, calls: Calls
    ) -> None:
        layer = await open_layer(host=proxy.url, **calls.hooks())
        channel = await layer.new_channel()
        await asyncio.gather(*(layer.group_add(f"g{n}", channel) for n in range(5)))

        def bind_to_the_default_exchange(frame: Frame) -> Any:
            bind = frame.decode()
            if bind.routing_key == "g3":
                bind.destination = ""  # 403 ACCESS_REFUSED
            return bind

        proxy.rule(TO_BROKER, commands.Exchange.Bind, bind_to_the_default_exchange)
        with log_lines() as lines:
            proxy.cut(name="subscriber")
            await lines.next("ERROR subscriber .*: RabbitMQ refused to bind the group 'g3'")
        assert [(await calls.next())[0] for _ in HOOKS] == list(HOOKS)
        assert layer.statistics()[0].groups.bound == 4

    async def test_lost_again_before_every_group_is_bound_is_one_loss(
        self, open_layer: OpenLayer, proxy: AmqpProxy, calls: Calls
    ) -> None:
        layer = await open_layer(host=proxy.url, **calls.hooks())
        channel = await layer.new_channel()
        await layer.group_add("g", channel)
        rule = proxy.rule(
            TO_BROKER,
            commands.Exchange.Bind,
            lambda frame: None if frame.decode().routing_key == "g" else frame,
        )
        await lose(proxy, 3)
        proxy.remove(rule)
        proxy.cut(name="subscriber")
        first, second = await calls.next(), await calls.next()
        assert (first[0], second[0]) == HOOKS
        assert first[1:] == second[1:]
        assert calls.rest == 0
        await layer.group_send("g", MESSAGE)
        assert await layer.receive(channel) == MESSAGE

    async def test_what_the_hook_sends_reaches_every_member(
        self, open_layer: OpenLayer, proxy: AmqpProxy
    ) -> None:
        """The manual's way to have all clients of a process resynchronise, and other groups."""
        layer: RabbitmqChannelLayer

        async def resynchronise(id_: str, reason: str) -> None:
            await layer.group_send(id_, {"type": "resynchronise"})
            for n in range(300):
                await layer.group_send(f"g{n}", {"n": n})

        layer = await open_layer(
            host=proxy.url, on_reconnect=resynchronise, remote_capacity=1000, local_capacity=1000
        )
        channels = [await layer.new_channel() for _ in range(30)]
        id_ = id_of(layer)
        await asyncio.gather(
            *(layer.group_add(id_, channel) for channel in channels),
            *(layer.group_add(f"g{n}", channels[n % 30]) for n in range(300)),
        )
        proxy.cut()
        for number, channel in enumerate(channels):
            heard = [await asyncio.wait_for(layer.receive(channel), 20) for _ in range(11)]
            assert heard[0] == {"type": "resynchronise"}
            assert [message["n"] for message in heard[1:]] == list(range(number, 300, 30))

    @pytest.mark.timeout(120)
    async def test_a_broker_that_is_killed_and_started_again(
        self, open_layer: OpenLayer, private_broker: PrivateBroker, calls: Calls
    ) -> None:
        layer = await open_layer(host=private_broker.url, **calls.hooks())
        channel = await layer.new_channel()
        await asyncio.gather(*(layer.group_add(f"g{n}", channel) for n in range(100)))
        await asyncio.to_thread(private_broker.kill)
        assert (await calls.next())[0] == "on_disconnect"
        await asyncio.to_thread(private_broker.start)
        assert (await calls.next())[0] == "on_reconnect"
        assert layer.statistics()[0].groups.bound == 100
        assert calls.rest == 0

    async def test_each_event_loop_is_told_of_its_own(
        self, open_layer: OpenLayer, proxy: AmqpProxy, calls: Calls
    ) -> None:
        told: list[tuple[str, str, threading.Thread]] = []
        both = asyncio.Event()
        loop = asyncio.get_running_loop()

        async def note(hook: str, id_: str, reason: str) -> None:
            told.append((hook, id_, threading.current_thread()))
            if len(told) == 4:
                loop.call_soon_threadsafe(both.set)

        layer = await open_layer(
            host=proxy.url, **{name: functools.partial(note, name) for name in HOOKS}
        )
        with LoopThread() as other:
            ids = {
                (await layer.new_channel()).partition("!")[0]: threading.current_thread(),
                (await other.run(layer.new_channel())).partition("!")[0]: other._thread,
            }
            await proxy.until(lambda: len(proxy.named("subscriber")) == 2)
            await layer.connect()
            await other.run(layer.connect())
            proxy.cut(name="subscriber")
            await asyncio.wait_for(both.wait(), 20)
            for id_, thread in ids.items():
                assert [(h, t) for h, i, t in told if i == id_] == [(h, thread) for h in HOOKS]
            await other.run(layer.close())

    async def test_sync_codes_connection(self, open_layer: OpenLayer, proxy: AmqpProxy) -> None:
        told: list[tuple[str, str, str]] = []
        done = threading.Event()

        async def note(id_: str, reason: str) -> None:
            told.append((id_, reason, threading.current_thread().name))
            done.set()

        layer = await open_layer(host=proxy.url, on_reconnect=note)
        await asyncio.to_thread(lambda: async_to_sync(layer.connect)())
        proxy.cut(name="subscriber")
        assert await asyncio.to_thread(done.wait, 20)
        ((id_, _, thread),) = told
        assert (id_, thread) == (id_of(layer), "channels_rabbitmq")
        await close_for_sync_code(layer)


class TestTheEnd:
    async def test_not_called_by_close(self, open_layer: OpenLayer, calls: Calls) -> None:
        layer = await open_layer(**calls.hooks())
        await layer.connect()
        await layer.close()
        await turns()
        assert calls.rest == 0

    def test_not_called_when_the_loop_ends(self, broker: Broker, groups_exchange: str) -> None:
        told: list[str] = []
        layer = RabbitmqChannelLayer(
            host=broker.url,
            groups_exchange=groups_exchange,
            on_disconnect=lambda id_, reason: told.append(reason),
            on_reconnect=lambda id_, reason: told.append(reason),
        )
        asyncio.run(layer.connect())
        assert told == []

    async def test_not_called_when_it_is_closed_while_the_connection_is_down(
        self, open_layer: OpenLayer, proxy: AmqpProxy, calls: Calls
    ) -> None:
        layer = await open_layer(host=proxy.url, **calls.hooks())
        await layer.connect()
        proxy.refuse()
        proxy.cut()
        assert (await calls.next())[0] == "on_disconnect"
        await layer.close()
        await turns()
        assert calls.rest == 0

    async def test_a_hook_may_close_the_layer(
        self, open_layer: OpenLayer, proxy: AmqpProxy
    ) -> None:
        closed = asyncio.Event()
        layer: RabbitmqChannelLayer

        async def close(id_: str, reason: str) -> None:
            try:
                await layer.close()
            finally:
                closed.set()

        layer = await open_layer(host=proxy.url, on_disconnect=close)
        await layer.connect()
        proxy.cut()
        await asyncio.wait_for(closed.wait(), 10)
        await layer.close()
        assert layer.statistics()[0].subscriber.state == "closed"


class Hanging:
    """A hook that is called and doesn't return until ``release()``, or until it is cancelled."""

    def __init__(self) -> None:
        self.started: asyncio.Queue[str] = asyncio.Queue()
        self.is_cancelled = False
        self._released = asyncio.Event()

    async def __call__(self, id_: str, reason: str) -> None:
        self.started.put_nowait(reason)
        try:
            await self._released.wait()
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise

    async def start(self) -> str:
        return await asyncio.wait_for(self.started.get(), 20)

    def release(self) -> None:
        self._released.set()


class TestWhatAHookMayBe:
    """Functions of all kinds; each is called with the id and the reason, in its own context."""

    @pytest.mark.parametrize("kind", ["async", "sync", "object", "partial", "lambda", "path"])
    async def test_kinds(
        self,
        open_layer: OpenLayer,
        proxy: AmqpProxy,
        kind: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        loop = asyncio.get_running_loop()
        called: asyncio.Future[tuple[Any, ...]] = loop.create_future()

        def note(id_: str, reason: str) -> None:
            told = (id_, reason, threading.current_thread(), outer.get())
            loop.call_soon_threadsafe(called.set_result, told)

        async def note_async(id_: str, reason: str) -> None:
            note(id_, reason)

        class Noter:
            async def __call__(self, id_: str, reason: str) -> None:
                note(id_, reason)

        monkeypatch.setattr(sys.modules[__name__], "the_hook", note_async, raising=False)
        hooks: dict[str, Any] = {
            "async": note_async,
            "sync": note,
            "object": Noter(),
            "partial": functools.partial(note_async),
            "lambda": lambda id_, reason: note_async(id_, reason),
            "path": f"{__name__}.the_hook",
        }
        layer = await open_layer(host=proxy.url, on_disconnect=hooks[kind])
        outer.set("the first caller's")
        await layer.connect()
        proxy.cut(name="subscriber")
        id_, reason, thread, seen = await asyncio.wait_for(called, 20)
        assert id_ == id_of(layer)
        assert reason == layer.statistics()[0].subscriber.last_reason != ""
        assert (thread is threading.current_thread()) == (kind != "sync")
        assert seen == "nobody's"

    async def test_a_sync_hook_can_use_the_layer(
        self, open_layer: OpenLayer, proxy: AmqpProxy
    ) -> None:
        """By async_to_sync, on the very connections of the event loop."""
        layer: RabbitmqChannelLayer

        def tell(id_: str, reason: str) -> None:
            async_to_sync(layer.group_send)("g", {"id": id_})

        layer = await open_layer(host=proxy.url, on_reconnect=tell)
        channel = await layer.new_channel()
        await layer.group_add("g", channel)
        proxy.cut(name="subscriber")
        assert await asyncio.wait_for(layer.receive(channel), 20) == {"id": id_of(layer)}
        assert len(layer.statistics()) == 1


class TestWhatItCannotHarm:
    async def must_work(self, layer: RabbitmqChannelLayer) -> None:
        channel = await layer.new_channel()
        await layer.group_add("works", channel)
        await layer.send(channel, {"n": 1})
        await layer.group_send("works", {"n": 2})
        for n in (1, 2):
            assert await asyncio.wait_for(layer.receive(channel), 10) == {"n": n}
        await layer.group_discard("works", channel)

    @pytest.mark.parametrize("is_async", [True, False])
    async def test_an_exception_is_logged(
        self, open_layer: OpenLayer, proxy: AmqpProxy, calls: Calls, is_async: bool
    ) -> None:
        def fail(id_: str, reason: str) -> None:
            raise RuntimeError("a bug of the project's")

        async def fail_async(id_: str, reason: str) -> None:
            fail(id_, reason)

        layer = await open_layer(
            host=proxy.url,
            on_disconnect=fail_async if is_async else fail,
            on_reconnect=calls.hooks()["on_reconnect"],
        )
        await layer.connect()
        for _ in range(2):
            with log_lines() as lines:
                proxy.cut(name="subscriber")
                line = await lines.next(r"ERROR on_disconnect crq\.\w+: it raised an exception")
            assert "RuntimeError: a bug of the project's" in line
            assert (await calls.next())[0] == "on_reconnect"
            await self.must_work(layer)

    async def test_one_that_hangs_holds_up_nothing_and_close_ends_it(
        self, open_layer: OpenLayer, proxy: AmqpProxy, calls: Calls
    ) -> None:
        hanging = Hanging()
        layer = await open_layer(
            host=proxy.url, on_disconnect=hanging, on_reconnect=calls.hooks()["on_reconnect"]
        )
        await layer.connect()
        for _ in range(3):
            await lose(proxy)
            assert (await calls.next())[0] == "on_reconnect"
            await self.must_work(layer)
        assert hanging.started.qsize() == 1
        await layer.close()
        assert hanging.is_cancelled

    async def test_one_that_is_slow_is_called_once_more_for_all_that_it_missed(
        self, open_layer: OpenLayer, proxy: AmqpProxy
    ) -> None:
        slow = Hanging()
        layer = await open_layer(host=proxy.url, on_reconnect=slow)
        await layer.connect()
        await lose(proxy)
        await slow.start()
        for number in range(3):
            with log_lines() as lines:
                subscriber_of(layer).supervisor.reconnect(f"test {number}")
                await lines.next("WARNING subscriber .*: lost")
                await lines.next("WARNING subscriber .*: connected again")
        assert slow.started.empty()
        slow.release()
        assert await slow.start() == "test 2"
        await turns()
        assert slow.started.empty()

    async def test_a_thread_that_hangs_holds_up_nothing(
        self, open_layer: OpenLayer, proxy: AmqpProxy, calls: Calls
    ) -> None:
        started, release, ended = threading.Event(), threading.Event(), threading.Event()

        def hang(id_: str, reason: str) -> None:
            started.set()
            release.wait(30)
            ended.set()

        layer = await open_layer(
            host=proxy.url, on_disconnect=hang, on_reconnect=calls.hooks()["on_reconnect"]
        )
        await layer.connect()
        try:
            for _ in range(3):
                await lose(proxy)
                assert (await calls.next())[0] == "on_reconnect"
            assert started.is_set()
            threads = [t for t in threading.enumerate() if t.name == "channels_rabbitmq hook"]
            assert len(threads) == 1
            await self.must_work(layer)
            await asyncio.wait_for(layer.close(), 10)
            assert not ended.is_set()
        finally:
            release.set()
        assert await asyncio.to_thread(ended.wait, 10)
        for thread in threads:
            await asyncio.to_thread(thread.join, 10)

    def test_a_process_ends_although_a_thread_hangs(self, broker: Broker) -> None:
        program = f"""
import asyncio, threading
from channels_rabbitmq.core import RabbitmqChannelLayer

started = threading.Event()

def hang(id, reason):
    started.set()
    threading.Event().wait()

async def main():
    layer = RabbitmqChannelLayer(host={broker.url!r}, on_disconnect=hang)
    await layer.connect()
    layer._loop_layer().subscriber.supervisor.reconnect("for a test")
    await asyncio.to_thread(started.wait)

asyncio.run(main())
print("done")
"""
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=40
        )
        assert done.stdout == "done\n"
        assert "lost the connection" in done.stderr  # Python prints warnings if nobody logs them.
        assert len(done.stderr.splitlines()) == 1
