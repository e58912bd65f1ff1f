"""Who serves which event loop; dropped layers; what a fork and the end of a process do."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import AsyncToSync, async_to_sync, sync_to_async
from channels.exceptions import StopConsumer

from channels_rabbitmq._loop_layer import LoopLayer
from channels_rabbitmq._loops import process as _process
from channels_rabbitmq._loops import registry as _registry
from channels_rabbitmq._loops.background import is_of_async_to_sync
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.brokers import Broker
from tests.support.layers import inside, loop_layers_of
from tests.support.loop_thread import LoopThread
from tests.support.programs import without_slowness
from tools.private_broker import PrivateBroker

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

MESSAGE = {"type": "test.message"}


@pytest.fixture
async def layer(open_layer: OpenLayer) -> AsyncIterator[RabbitmqChannelLayer]:
    """Closed for sync code, too."""
    layer = await open_layer()
    yield layer
    await in_sync_code(layer.close)


async def in_sync_code(function: Callable[..., Any], *args: Any) -> Any:
    """Call it as sync code does in a thread of its own."""
    return await asyncio.to_thread(lambda: async_to_sync(function)(*args))


async def receive(layer: RabbitmqChannelLayer, channel: str) -> dict[str, Any]:
    return await asyncio.wait_for(layer.receive(channel), 10)


def id_of(channel: str) -> str:
    return channel.partition("!")[0]


class TestWhoServes:
    """Which loop asgiref runs a call on is asgiref's business: these look at what it does."""

    async def running(self) -> bool:
        return is_of_async_to_sync(asyncio.get_running_loop())

    def test_async_to_sync(self) -> None:
        assert async_to_sync(self.running)()

    def test_asyncio_run(self) -> None:
        assert not asyncio.run(self.running())

    async def test_async_to_sync_beside_a_running_loop(self) -> None:
        assert not await self.running()
        assert await in_sync_code(self.running)

    async def test_async_to_sync_in_sync_to_async(self) -> None:
        """As in a sync consumer or a sync view under an ASGI server: no loop is made."""
        assert not await sync_to_async(lambda: async_to_sync(self.running)())()

    def test_async_to_sync_in_sync_to_async_in_async_to_sync(self) -> None:
        async def view() -> bool:
            return await sync_to_async(lambda: async_to_sync(self.running)())()

        assert async_to_sync(view)()

    def test_tasks_in_async_to_sync(self) -> None:
        async def start_task() -> bool:
            return await asyncio.create_task(self.running())

        assert async_to_sync(start_task)()

    def test_an_asgiref_that_does_not_tell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asyncio.run(self.running())
        monkeypatch.delattr(AsyncToSync, "loop_thread_executors")
        loop = asyncio.new_event_loop()
        assert not is_of_async_to_sync(loop)
        loop.close()


class TestLoopsAndThreads:
    """An event loop isn't its thread."""

    async def test_loops_that_take_turns_in_a_thread(self, layer: RabbitmqChannelLayer) -> None:
        def use() -> None:
            loops = [asyncio.new_event_loop() for _ in range(2)]
            channels = [loop.run_until_complete(layer.new_channel()) for loop in loops]
            assert id_of(channels[0]) != id_of(channels[1])
            for _ in range(2):
                for loop, channel in zip(loops, channels, strict=True):
                    assert id_of(loop.run_until_complete(layer.new_channel())) == id_of(channel)
                    loop.run_until_complete(layer.send(channel, MESSAGE))
                    assert loop.run_until_complete(receive(layer, channel)) == MESSAGE
            for loop in loops:
                loop.run_until_complete(layer.close())
                loop.close()

        await asyncio.to_thread(use)

    async def test_a_loop_that_another_thread_goes_on_with(
        self, layer: RabbitmqChannelLayer
    ) -> None:
        first = asyncio.new_event_loop()

        async def use(channel: str) -> None:
            assert id_of(await layer.new_channel()) != id_of(channel)
            assert await receive(layer, channel) == MESSAGE
            await layer.send(channel, MESSAGE)
            assert await receive(layer, channel) == MESSAGE

        def use_in_one_thread() -> None:
            channel = first.run_until_complete(layer.new_channel())
            first.run_until_complete(layer.send(channel, MESSAGE))
            other = threading.Thread(target=first.run_forever)
            other.start()
            try:
                asyncio.run(use(channel))
            finally:
                first.call_soon_threadsafe(first.stop)
                other.join()
                first.run_until_complete(layer.close())
                first.close()

        await asyncio.to_thread(use_in_one_thread)


class TestSyncCode:
    async def test_shares_one_loop_layer(self, layer: RabbitmqChannelLayer) -> None:
        together = threading.Barrier(10)

        def call() -> str:
            together.wait()
            return str(async_to_sync(layer.new_channel)())

        with ThreadPoolExecutor(10) as pool:  # asyncio's own may have fewer threads
            calls = [pool.submit(call) for _ in range(10)]
            channels = await asyncio.gather(*map(asyncio.wrap_future, calls))
        assert len({id_of(channel) for channel in channels}) == 1
        assert len(set(channels)) == 10
        assert id_of(await layer.new_channel()) != id_of(channels[0])
        assert isinstance(inside(layer), LoopLayer)

    async def test_uses_the_running_loop_where_asgiref_does(
        self, layer: RabbitmqChannelLayer
    ) -> None:
        channel = await sync_to_async(lambda: async_to_sync(layer.new_channel)())()
        assert id_of(channel) == id_of(await layer.new_channel())

    async def test_two_layers_are_two(
        self, layer: RabbitmqChannelLayer, open_layer: OpenLayer
    ) -> None:
        other = await open_layer()
        channel = await in_sync_code(layer.new_channel)
        other_channel = await in_sync_code(other.new_channel)
        assert id_of(channel) != id_of(other_channel)
        with pytest.raises(ValueError, match="another process, or to another layer"):
            await in_sync_code(other.receive, channel)
        await in_sync_code(other.close)
        await in_sync_code(layer.send, channel, MESSAGE)
        assert await in_sync_code(layer.receive, channel) == MESSAGE

    async def test_where_threads_are_not_real(
        self, layer: RabbitmqChannelLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As gevent.monkey would have it. (Whether a call works under gevent was tried by hand.)"""
        gevent = types.ModuleType("gevent.monkey")
        gevent.is_module_patched = lambda name: name == "threading"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "gevent.monkey", gevent)

        async def use() -> None:
            channel = await layer.new_channel()
            await layer.send(channel, MESSAGE)
            assert await receive(layer, channel) == MESSAGE
            assert isinstance(inside(layer), LoopLayer)

        await in_sync_code(use)

    async def test_on_the_background_loop_itself(self, layer: RabbitmqChannelLayer) -> None:
        channel = await in_sync_code(layer.new_channel)
        background = _process.current()._background
        assert background is not None
        calling = asyncio.run_coroutine_threadsafe(layer.new_channel(), background.loop)
        assert id_of(await asyncio.wrap_future(calling)) == id_of(channel)

    async def test_a_background_thread_that_died_is_replaced(
        self, layer: RabbitmqChannelLayer
    ) -> None:
        channel = await in_sync_code(layer.new_channel)
        background = _process.current()._background
        assert background is not None
        await asyncio.to_thread(background.close, 10)
        assert not background.is_alive()
        with pytest.raises(ValueError, match="has ended"):
            await in_sync_code(layer.receive, channel)
        channel = await in_sync_code(layer.new_channel)
        await in_sync_code(layer.send, channel, MESSAGE)
        assert await in_sync_code(layer.receive, channel) == MESSAGE


class TestClose:
    async def test_in_sync_code_closes_what_serves_sync_code(
        self, layer: RabbitmqChannelLayer
    ) -> None:
        own = await layer.new_channel()
        channel = await in_sync_code(layer.new_channel)
        receiving = asyncio.create_task(in_sync_code(layer.receive, channel))
        # Its own loop is another one, and the message goes through RabbitMQ: it waits by then.
        await in_sync_code(layer.group_add, "g", channel)
        await in_sync_code(layer.close)
        for call in (receiving, in_sync_code(layer.receive, channel)):
            with pytest.raises(StopConsumer):
                await call
        # Not what serves other loops.
        await layer.send(own, MESSAGE)
        assert await receive(layer, own) == MESSAGE

    async def test_sync_code_may_start_anew(self, layer: RabbitmqChannelLayer) -> None:
        """Each of its calls has a loop of its own, and only that one can't go back."""
        channel = await in_sync_code(layer.new_channel)

        async def close_and_send() -> None:
            await layer.close()
            with pytest.raises(BrokerUnavailable, match="closed"):
                await layer.send(channel, MESSAGE)

        await in_sync_code(close_and_send)
        channel = await in_sync_code(layer.new_channel)
        await in_sync_code(layer.send, channel, MESSAGE)
        assert await in_sync_code(layer.receive, channel) == MESSAGE

    async def test_others_that_are_running_start_anew(self, layer: RabbitmqChannelLayer) -> None:
        closed = threading.Event()

        async def long_call() -> None:
            await layer.group_send("g", MESSAGE)
            used.set()
            await asyncio.to_thread(closed.wait)
            await layer.group_send("g", MESSAGE)

        used = threading.Event()
        call = asyncio.create_task(in_sync_code(long_call))
        await asyncio.to_thread(used.wait)
        await in_sync_code(layer.close)
        closed.set()
        await asyncio.wait_for(call, 10)

    async def test_what_was_closed_is_forgotten(self, layer: RabbitmqChannelLayer) -> None:
        channels = []
        for _ in range(5):
            channels.append(await in_sync_code(layer.new_channel))
            await in_sync_code(layer.close)
        await in_sync_code(layer.new_channel)
        assert len(loop_layers_of(layer)._by_id) <= 2
        with pytest.raises(StopConsumer):
            await receive(layer, channels[0])
        with pytest.raises(BrokerUnavailable, match="closed"):
            await layer.group_add("g", channels[0])

    async def test_on_a_loop_leaves_sync_code_alone(self, layer: RabbitmqChannelLayer) -> None:
        channel = await in_sync_code(layer.new_channel)
        await layer.new_channel()
        await layer.close()
        await in_sync_code(layer.send, channel, MESSAGE)
        assert await in_sync_code(layer.receive, channel) == MESSAGE

    async def test_unused_and_twice(self, layer: RabbitmqChannelLayer) -> None:
        await in_sync_code(layer.close)
        await in_sync_code(layer.close)

    async def test_cancelled_at_once_it_closes_all_the_same(
        self, layer: RabbitmqChannelLayer
    ) -> None:
        await in_sync_code(layer.group_send, "g", MESSAGE)
        [background] = loop_layers_of(layer).all()

        async def close_and_cancel() -> None:
            closing = asyncio.create_task(layer.close())
            await asyncio.sleep(0)  # lets it call
            closing.cancel()
            await asyncio.wait([closing])

        await in_sync_code(close_and_cancel)
        while background.publisher.supervisor.connection is not None:  # noqa: ASYNC110 - another thread tells nobody
            await asyncio.sleep(0.001)
        assert background.is_closing


class TestUserConnection:
    async def test_in_sync_code_it_is_the_calls_own(self, layer: RabbitmqChannelLayer) -> None:
        async def use() -> Any:
            connection = await layer.carehare_connection
            await connection.queue_declare("", exclusive=True)
            assert await layer.current_connection is connection
            return connection

        one, other = await in_sync_code(use), await in_sync_code(use)
        assert one is not other
        assert one.closed.done()

    async def test_close_closes_it(self, layer: RabbitmqChannelLayer) -> None:
        async def use_and_close() -> Any:
            connection = await layer.carehare_connection
            await layer.close()
            assert connection.closed.done()
            with pytest.raises(BrokerUnavailable, match="closed"):
                await layer.carehare_connection

        await in_sync_code(use_and_close)


class TestForgetting:
    async def test_loops_that_have_ended(self, layer: RabbitmqChannelLayer) -> None:
        seen: list[weakref.ref[Any]] = []

        async def use() -> None:
            await layer.send(await layer.new_channel(), MESSAGE)
            seen.extend(map(weakref.ref, (asyncio.get_running_loop(), inside(layer))))

        for _ in range(5):
            await asyncio.to_thread(lambda: asyncio.run(use()))
            await in_sync_code(use)
        await in_sync_code(layer.group_send, "g", MESSAGE)
        gc.collect()
        alive = [reference() for reference in seen]
        # The last ones go when another loop comes.
        assert [one for one in alive[:-4] if one is not None] == []
        assert len(loop_layers_of(layer).by_loop) <= 3

    async def test_the_last_loop_when_another_one_comes(self, layer: RabbitmqChannelLayer) -> None:
        async def use() -> weakref.ref[Any]:
            await layer.new_channel()
            return weakref.ref(inside(layer))

        ended = await asyncio.to_thread(lambda: asyncio.run(use()))
        await in_sync_code(layer.new_channel)
        gc.collect()
        assert ended() is None

    async def test_ids_are_not_remembered_for_ever(
        self, layer: RabbitmqChannelLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_registry, "REMEMBERED_IDS", 2)
        channels = [
            await asyncio.to_thread(lambda: asyncio.run(layer.new_channel())) for _ in range(4)
        ]
        await in_sync_code(layer.new_channel)
        errors = []
        for channel in channels:
            with pytest.raises(ValueError, match=id_of(channel)) as caught:
                await layer.receive(channel)
            errors.append("has ended" in str(caught.value))
        assert errors == [False, False, True, True]

    async def test_a_layer_that_nobody_has_closes_everywhere(
        self, broker: Broker, groups_exchange: str
    ) -> None:
        with LoopThread() as other:
            layer = RabbitmqChannelLayer(host=broker.url, groups_exchange=groups_exchange)
            for call in (layer.new_channel(), other.run(layer.new_channel())):
                channel = await call
                await layer.group_add("g", channel)
            await in_sync_code(layer.group_send, "g", MESSAGE)
            loop_layers = loop_layers_of(layer).all()
            supervisors = [one for layer in loop_layers for one in layer.connections.supervisors]
            # The two that receive have greeted others by their own connection for sending.
            assert sum(one.connection is not None for one in supervisors) == 5
            former = weakref.ref(layer)
            del layer, call
            while former() is not None:  # a thread that has called it lets go a moment later
                gc.collect()
                await asyncio.sleep(0.001)
            while any(one.connection is not None for one in supervisors):  # noqa: ASYNC110 - other threads tell nobody
                await asyncio.sleep(0.001)
            assert all(one.is_closing for one in loop_layers)
            for one in supervisors:
                if one._task is not None and one._task.get_loop() is asyncio.get_running_loop():
                    await one.wait_closed()

    def test_many_layers_leave_nothing(self) -> None:
        before = len(_process.current()._registries)
        for _ in range(100):
            RabbitmqChannelLayer()
        assert len(_process.current()._registries) <= before + 1

    async def test_a_call_that_waits_keeps_its_layer(
        self, broker: Broker, groups_exchange: str
    ) -> None:
        layer = RabbitmqChannelLayer(host=broker.url, groups_exchange=groups_exchange)
        channel = await layer.new_channel()
        receiving = asyncio.create_task(layer.receive(channel))
        await asyncio.sleep(0)  # lets it begin
        sender = RabbitmqChannelLayer(host=broker.url, groups_exchange=groups_exchange)
        loop_layers = loop_layers_of(layer)
        del layer
        gc.collect()
        await sender.send(channel, MESSAGE)
        assert await receiving == MESSAGE
        await loop_layers.all()[0].close()
        await sender.close()


# Processes of their own


def command(code: str, broker_url: str) -> list[str]:
    """A program that fails at each warning; ``layer`` is what it uses."""
    head = (
        "import asyncio, atexit, gc, os, signal, sys, threading, time\n"
        "from asgiref.sync import async_to_sync\n"
        "from channels_rabbitmq._loops import process as _process\n"
        "from channels_rabbitmq.core import RabbitmqChannelLayer\n"
        "from channels_rabbitmq.exceptions import BrokerUnavailable\n"
        f"layer = RabbitmqChannelLayer(host={broker_url!r})\n"
    )
    # Python 3.12 and newer warn of every fork of a process with threads.
    ignored = ["-W", "ignore:This process:DeprecationWarning"]
    return [sys.executable, "-X", "dev", "-W", "error", *ignored, "-c", head + code]


def run_python(code: str, broker_url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(code, broker_url), capture_output=True, text=True, check=False, timeout=30
    )


def assert_output(done: subprocess.CompletedProcess[str], expected: str) -> None:
    stderr = without_slowness(done.stderr)
    assert (done.returncode, done.stdout, stderr) == (0, expected, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork()")
class TestFork:
    def test_the_child_has_nothing_of_its_parents(self, broker: Broker) -> None:
        code = """
async def use():
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    return channel

loop = asyncio.new_event_loop()
channels = [async_to_sync(use)(), loop.run_until_complete(use())]
child = os.fork()
if not child:
    theirs = [async_to_sync(use)(), asyncio.run(use())]
    ids = {channel.partition("!")[0] for channel in channels + theirs}
    assert len(ids) == 4
    for channel in channels:
        try:
            async_to_sync(layer.receive)(channel)
        except ValueError as err:
            assert "another process" in str(err)
    async_to_sync(layer.group_send)("g", {"type": "child"})
    del layer, loop
    gc.collect()
    sys.exit()  # With all that Python does at its end, unlike a child of multiprocessing's.
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
# Nothing that the child did or freed took anything from this process.
print(async_to_sync(layer.receive)(channels[0]))
print(loop.run_until_complete(layer.receive(channels[1])))
async_to_sync(layer.group_send)("g", {"type": "parent"})
print(async_to_sync(layer.receive)(channels[0]))
print(loop.run_until_complete(layer.receive(channels[1])))
loop.run_until_complete(layer.close())
loop.close()
"""
        expected = "{'type': 'child'}\n" * 2 + "{'type': 'parent'}\n" * 2
        assert_output(run_python(code, broker.url), expected)

    def test_that_python_was_not_told_of(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By a C library; here as far as it can be seen from within."""
        layer = RabbitmqChannelLayer()
        inherited = _process.current()
        monkeypatch.setattr(inherited, "_pid", -1)
        monkeypatch.setattr(_process, "_current", inherited)  # as it was, in the end

        async def use() -> None:
            assert await layer.new_channel()
            assert _process.current() is not inherited
            assert loop_layers_of(layer).process is _process.current()
            await layer.close()

        asyncio.run(use())
        assert inherited in _process._inherited
        _process._inherited.remove(inherited)

    def test_in_a_coroutine(self, broker: Broker) -> None:
        code = """
async def main():
    channel = await layer.new_channel()
    await layer.send(channel, {"type": "before"})
    child = os.fork()
    if not child:
        try:
            async_to_sync(layer.send)(channel, {"type": "sync code"})
            asyncio.run(layer.send(channel, {"type": "another loop"}))
        finally:
            os._exit(0)  # This loop is the parent's.
    for _ in range(3):
        print((await layer.receive(channel))["type"])
    os.waitpid(child, 0)

asyncio.run(main())
"""
        expected = "before\nsync code\nanother loop\n"
        assert_output(run_python(code, broker.url), expected)

    def test_in_a_coroutine_when_messages_wait(self, broker: Broker) -> None:
        code = """
async def main():
    channel = await layer.new_channel()
    for n in range(2):
        await layer.send(channel, {"type": str(n)})
    while layer.statistics()[0].buffered < 2:
        await asyncio.sleep(0.001)
    child = os.fork()
    if not child:
        try:
            asyncio.run(layer.receive(channel))
        except ValueError as err:
            assert "another process" in str(err)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for _ in range(2):
        print((await layer.receive(channel))["type"])

asyncio.run(main())
"""
        assert_output(run_python(code, broker.url), "0\n1\n")

    def test_locks_that_are_held(self, broker: Broker) -> None:
        code = """
channel = async_to_sync(layer.new_channel)()
held = threading.Event()

def hold():
    with _process.current().lock:
        held.set()
        time.sleep(60)

threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if not child:
    async_to_sync(layer.send)(channel, {"type": "child"})
    sys.exit()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
        assert_output(run_python(code, broker.url), "")

    def test_threads_of_the_child_at_once(self, broker: Broker) -> None:
        code = """
async_to_sync(layer.new_channel)()
child = os.fork()
if not child:
    together = threading.Barrier(10)
    ids = set()

    def work():
        together.wait()
        ids.add(async_to_sync(layer.new_channel)().partition("!")[0])

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 1
    sys.exit()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
        assert_output(run_python(code, broker.url), "")


class TestExit:
    def test_calls_between_the_threads_end_and_the_layers_own(self, broker: Broker) -> None:
        """Handlers registered after the layer's run before it. There are no executors any more."""
        code = """
@atexit.register
def last_words():
    asyncio.run(layer.group_send("g", {"type": "bye"}))
    print("sent")
"""
        assert_output(run_python(code, broker.url), "sent\n")

    def test_calls_after_it(self, broker: Broker) -> None:
        """Handlers registered before it run after it."""
        code = """
async def use():
    return await layer.new_channel()

loop = asyncio.new_event_loop()
loop.run_until_complete(use())

def late():
    for run in (loop.run_until_complete, asyncio.run):
        for call in (layer.group_send("g", {"type": "late"}), layer.connect()):
            try:
                run(call)
            except BrokerUnavailable as err:
                print(err)
        run(layer.close())
    loop.close()

_process.current().close_at_exit()
late()
"""
        told = "The channel layer is closed\n" * 2 + "The process is ending\n" * 2
        assert_output(run_python(code, broker.url), told)

    def test_connections_that_are_being_made(self, broker: Broker) -> None:
        code = """
loop = asyncio.new_event_loop()
loop.run_until_complete(layer.new_channel())
async_to_sync(layer.new_channel)()
_process.current().close_at_exit()
loop.close()
"""
        assert_output(run_python(code, broker.url), "")

    def test_a_loop_that_is_stopped_inside_another_one(self, broker: Broker) -> None:
        """It can't be run then, so it is left alone."""
        code = """
loop = asyncio.new_event_loop()
loop.run_until_complete(layer.new_channel())

async def end():
    _process.current().close_at_exit()

asyncio.run(end())
_process.current().is_ending = False
loop.run_until_complete(layer.close())
loop.close()
"""
        assert_output(run_python(code, broker.url), "")

    @pytest.mark.slow
    async def test_a_frozen_broker_does_not_hold_it_up(self, private_broker: PrivateBroker) -> None:
        code = """
async def use():
    channel = await layer.new_channel()
    await layer.send(channel, {"type": "x"})
    assert await layer.receive(channel)

async def stay():
    await use()
    staying.set()
    await asyncio.sleep(60)

staying = threading.Event()
threading.Thread(target=lambda: asyncio.run(stay()), daemon=True).start()
staying.wait()
async_to_sync(use)()
loop = asyncio.new_event_loop()
loop.run_until_complete(use())
print("ready", flush=True)
input()
begun_at = time.monotonic()
_process.current().close_at_exit()
loop.close()
print(time.monotonic() - begun_at < 5)
"""
        program = await asyncio.create_subprocess_exec(
            *command(code, private_broker.url),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert program.stdout is not None
        assert await program.stdout.readline() == b"ready\n"
        private_broker.freeze()
        try:
            output = await asyncio.wait_for(program.communicate(b"\n"), 20)
        finally:
            private_broker.thaw()
        assert output[0] == b"True\n"
        assert without_slowness(output[1].decode()) == ""
