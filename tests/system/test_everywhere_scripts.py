"""The layer in plain scripts: sync code, threads, event loops of all kinds, and how they end.

Each program runs by itself, on the Python that runs the tests, so that nothing here knows that it
is tested; what it does stands in ``tests/programs``.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.amqp_proxy import TO_CLIENT
from tests.support.members import receive
from tests.support.programs import BACKGROUND_THREAD, Programs
from tools.private_broker import free_port

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]


@pytest.fixture
async def listener(
    open_layer: OpenLayer,
) -> AsyncIterator[Callable[[int], Awaitable[list[dict[str, Any]]]]]:
    """Hears what is sent to the group "numbers"; returns as many messages as are asked for."""
    layer = await open_layer()
    channel = await layer.new_channel()
    await layer.group_add("numbers", channel)
    heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def listen() -> None:
        while True:
            heard.put_nowait(await layer.receive(channel))

    listening = asyncio.create_task(listen())

    async def next_messages(count: int) -> list[dict[str, Any]]:
        return [await asyncio.wait_for(heard.get(), 20) for _ in range(count)]

    yield next_messages
    listening.cancel()
    await asyncio.wait([listening])


class TestSyncCode:
    @pytest.mark.parametrize("calls", [100, pytest.param(1000, marks=pytest.mark.slow)])
    async def test_calls_share_one_connection(
        self, programs: Programs, listener: Any, calls: int
    ) -> None:
        """And nothing is printed at the end."""
        assert await programs.run("sync_calls.py", "send_numbers", "numbers", str(calls)) is None
        assert programs.roles() == {"publisher": 1}
        assert [message["n"] for message in await listener(calls)] == list(range(calls))

    async def test_twenty_threads_share_one_connection(
        self, programs: Programs, listener: Any
    ) -> None:
        await programs.run("sync_calls.py", "send_from_threads", "numbers", "20", "20")
        assert programs.roles() == {"publisher": 1}
        by_thread = defaultdict(list)
        for message in await listener(400):
            by_thread[message["sender"]].append(message["n"])
        assert dict(by_thread) == {str(number): list(range(20)) for number in range(20)}

    async def test_a_channel_outlives_the_call_that_made_it(self, programs: Programs) -> None:
        heard = await programs.run("sync_calls.py", "talk_to_myself")
        assert heard == [
            {"type": "hello", "n": 1},
            {"type": "hello", "n": 2},
            {"type": "to.room"},
            {"type": "end"},
        ]
        assert programs.roles() == {"publisher": 1, "subscriber": 1}

    async def test_in_a_thread_beside_a_running_loop(self, programs: Programs) -> None:
        """Two loops use the layer: the running one, and the background loop of the thread."""
        told = await programs.run("sync_calls.py", "beside_a_running_loop", "thread")
        assert told["asked"] == list(range(20))
        assert told["answered"] == list(range(1000, 1020))
        assert programs.roles() == {"publisher": 2, "subscriber": 2}
        assert BACKGROUND_THREAD in told["threads"]

    async def test_in_sync_to_async_the_running_loop_does_it(self, programs: Programs) -> None:
        """Not a background loop: there is neither another connection nor another thread."""
        told = await programs.run("sync_calls.py", "beside_a_running_loop", "sync_to_async")
        assert told["asked"] == list(range(20))
        assert told["answered"] == list(range(1000, 1020))
        assert programs.roles() == {"publisher": 1, "subscriber": 1}
        assert BACKGROUND_THREAD not in told["threads"]


class TestLoops:
    @pytest.mark.parametrize("function", ["one_after_the_other", "one_after_the_other_on_uvloop"])
    async def test_one_after_the_other(self, programs: Programs, function: str) -> None:
        channels = await programs.run("loops.py", function, "3")
        assert len(set(channels)) == 3
        assert programs.roles() == {"publisher": 3, "subscriber": 3}
        assert programs.peak == {"publisher": 1, "subscriber": 1}  # each ended with its loop

    async def test_two_threads_with_loops_reach_each_other(self, programs: Programs) -> None:
        one, two = await programs.run("loops.py", "side_by_side")
        expected = {"direct": list(range(50)), "one": list(range(50)), "two": list(range(50))}
        assert one == two == expected
        assert programs.roles() == {"publisher": 2, "subscriber": 2}

    @pytest.mark.parametrize(
        "function", ["with_background_channel", "from_sync_code", "from_another_loop"]
    )
    async def test_a_channel_is_usable_on_every_loop_of_its_process(
        self, programs: Programs, function: str
    ) -> None:
        used_elsewhere, used_at_home = await programs.run("loops.py", function)
        assert used_elsewhere == used_at_home == ["to.room", "to.channel", "end"]
        assert programs.roles()["subscriber"] == 1  # the owner's

    async def test_a_channel_of_another_process(
        self, programs: Programs, open_layer: OpenLayer
    ) -> None:
        """It can be added to groups, from any loop and from sync code, but not received from."""
        layer = await open_layer()
        channel = await layer.new_channel()
        results = await programs.run("loops.py", "with_foreign_channel", channel)
        for group, (error, *result) in zip(("own-loop", "sync-code"), results, strict=True):
            assert f"The channel {channel} belongs to another process" in error
            assert result == [True, [[channel, {"by": group}]], 0]
            assert await receive(layer, channel) == {"type": group}


class TestCancelling:
    @pytest.mark.parametrize("calls", [200, pytest.param(2000, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("function", ["on_an_async_to_sync_loop", "across_threads"])
    async def test_receive_on_a_foreign_loop_loses_nothing(
        self, programs: Programs, function: str, calls: int
    ) -> None:
        # Without asyncio's debug mode: it takes most of the time, and hides what is close together.
        program = await programs.start(
            "cancelling.py", function, str(calls), python=[sys.executable, "-W", "error"]
        )
        told = await program.result()
        await programs.assert_nothing_left()
        assert told["heard"] == list(range(calls // 2))
        # Both outcomes were there, many times.
        assert calls // 10 < told["cancelled"] < calls * 9 // 10


class TestUserConnection:
    async def test_by_async_to_sync(self, programs: Programs) -> None:
        await programs.run("user_connection.py", "by_async_to_sync")
        assert programs.roles() == {"carehare_connection": 2}
        assert programs.peak == {"carehare_connection": 1}

    async def test_by_asyncio_run(self, programs: Programs) -> None:
        await programs.run("user_connection.py", "by_asyncio_run")
        assert programs.roles() == {"carehare_connection": 2}
        assert programs.peak == {"carehare_connection": 1}

    async def test_in_threads_beside_a_loop(self, programs: Programs) -> None:
        await programs.run("user_connection.py", "in_threads_beside_a_loop")
        assert programs.roles() == {"carehare_connection": 3}
        assert programs.peak == {"carehare_connection": 2}

    async def test_on_uvloop(self, programs: Programs) -> None:
        await programs.run("user_connection.py", "on_uvloop")
        assert programs.roles() == {"carehare_connection": 1}


class TestEndings:
    @pytest.mark.parametrize(
        "function",
        [
            "asyncio_run_and_close",
            "sync_code",
            "sync_code_and_close",
            "both",
            "daemon_thread_with_a_loop",
            "daemon_thread_with_sync_code",
        ],
    )
    async def test_without_a_word(self, programs: Programs, function: str) -> None:
        assert await programs.run("endings.py", function) is None
        assert "subscriber" in programs.roles()

    async def test_while_a_daemon_thread_goes_on(self, programs: Programs) -> None:
        """Its calls may fail as they like, also with asgiref's warnings, but hold up nothing."""
        program = await programs.start(
            "endings.py", "daemon_thread_that_goes_on", python=[sys.executable]
        )
        assert await program.ended() == 0
        await programs.assert_nothing_left()

    @pytest.mark.parametrize("function", ["asyncio_run", "loop_left_open"])
    async def test_while_a_call_waits(self, programs: Programs, function: str) -> None:
        program = await programs.start("endings.py", function)
        assert await program.ended() == 0
        assert (program.stdout, program.stderr) == ("ready\n", "")
        await programs.assert_nothing_left()

    @pytest.mark.parametrize("function", ["interrupted", "sync_code_interrupted"])
    async def test_interrupted(self, programs: Programs, function: str) -> None:
        program = await programs.start("endings.py", function)
        await program.printed("ready")
        assert await program.stop(signal.SIGINT) == 0
        assert (program.stdout, program.stderr) == ("ready\n", "")
        await programs.assert_nothing_left()

    async def test_with_an_error_of_its_own(self, programs: Programs) -> None:
        program = await programs.start("endings.py", "error")
        assert await program.ended() == 1
        assert (program.stdout, program.stderr) == ("", "an error of its own\n")
        await programs.assert_nothing_left()

    async def test_calls_after_the_end_are_refused(self, programs: Programs) -> None:
        errors = await programs.run("late_calls.py")
        assert len(errors) == 3

    @pytest.mark.slow
    async def test_while_the_broker_is_silent(self, programs: Programs) -> None:
        """The farewell isn't answered, and that is all."""
        program = await programs.start("endings.py", "both_when_told")
        await program.printed("ready")
        programs.proxy.stall(TO_CLIENT)
        program.say("go on")
        assert await program.ended() == 0
        assert (program.stdout, program.stderr) == ("ready\n", "")
        programs.proxy.resume()
        await programs.assert_nothing_left()

    async def test_while_it_tries_to_connect(self, programs: Programs) -> None:
        said = await programs.run(
            "endings.py",
            "no_broker",
            LAYER_HOST=f"amqp://127.0.0.1:{free_port()}",
            LAYER_CONFIG='{"operation_timeout": 0.5}',
        )
        assert "No connection to RabbitMQ" in said
