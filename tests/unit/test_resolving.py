"""A name server that doesn't answer: whom it holds up, and what is told."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from channels_rabbitmq._amqp.resolving import Address, resolve
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.deadlines import soon
from tests.support.log_lines import log_lines, unhandled
from tests.support.name_server import serve_names
from tests.support.programs import without_slowness


class DeadNameServer:
    """Answers nothing until it is released."""

    def __init__(self) -> None:
        self._released = threading.Event()
        self.asked = 0
        self.answered = threading.Event()

    def answer(self) -> list[str]:
        self.asked += 1
        self._released.wait(60)
        self.answered.set()
        return ["127.0.0.1"]

    def release(self) -> None:
        self._released.set()


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeadNameServer]:
    server = DeadNameServer()
    serve_names(monkeypatch, broker=server.answer, other=server.answer)
    yield server
    server.release()


async def begun() -> None:
    """Let calls that were just made come to where they wait."""
    for _ in range(5):
        await asyncio.sleep(0)


def threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "channels_rabbitmq look-up"]


async def test_one_look_up_at_a_time_for_a_host(dead: DeadNameServer) -> None:
    results = await asyncio.gather(
        *(resolve(host, 5672, soon(0.1)) for host in ["broker.test", "other.test"] * 20),
        return_exceptions=True,
    )
    assert {str(result) for result in results} == {
        "no answer from the name server about the host broker.test",
        "no answer from the name server about the host other.test",
    }
    assert all(isinstance(result, TimeoutError) for result in results)
    assert dead.asked == 2
    assert len(threads()) == 2
    # Who asks meanwhile waits for the same, and the next is asked anew.
    asking = asyncio.create_task(resolve("broker.test", 5672, soon()))
    await begun()
    dead.release()
    assert await asking == [Address(socket.AF_INET, ("127.0.0.1", 5672))]
    assert dead.asked == 2
    await resolve("broker.test", 5673, soon())
    assert dead.asked == 3


async def test_the_executor_is_the_applications(dead: DeadNameServer) -> None:
    """Far more look-ups than it has threads."""
    asking = [asyncio.create_task(resolve("broker.test", n, soon())) for n in range(1, 100)]
    await begun()
    assert await asyncio.wait_for(asyncio.to_thread(lambda: "done"), 5) == "done"
    assert dead.asked == 1
    dead.release()
    assert len(await asyncio.gather(*asking)) == 99


async def test_one_that_is_cancelled_harms_no_other(dead: DeadNameServer) -> None:
    one, two = (asyncio.create_task(resolve("broker.test", 5672, soon())) for _ in range(2))
    await begun()
    one.cancel()
    dead.release()
    assert await two
    assert one.cancelled()


def test_an_answer_for_a_loop_that_is_closed(
    dead: DeadNameServer, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.new_event_loop()
    with pytest.raises(TimeoutError):
        loop.run_until_complete(_resolve_shortly())
    loop.close()
    (thread,) = threads()
    dead.release()
    thread.join(10)
    assert not unhandled(caplog)


async def _resolve_shortly() -> None:
    await resolve("broker.test", 5672, soon(0.05))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (socket.EAI_AGAIN, r"no answer from the name server about the host broker\.test \("),
        (socket.EAI_NONAME, r"the name server knows no address of the host broker\.test \("),
    ],
)
async def test_what_the_system_says(monkeypatch: pytest.MonkeyPatch, error: int, text: str) -> None:
    def answer() -> list[str]:
        raise socket.gaierror(error, "the system's words")

    serve_names(monkeypatch, broker=answer)
    with pytest.raises(OSError, match=text) as caught:
        await resolve("broker.test", 5672, soon())
    assert "the system's words" in str(caught.value)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", Address(socket.AF_INET, ("127.0.0.1", 5672))),
        ("::1", Address(socket.AF_INET6, ("::1", 5672, 0, 0))),
        ("fe80::1%7", Address(socket.AF_INET6, ("fe80::1", 5672, 0, 7))),
    ],
)
async def test_an_address_is_not_looked_up(
    monkeypatch: pytest.MonkeyPatch, host: str, address: Address
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert await resolve(host, 5672, soon()) == [address]


async def test_the_name_server_is_blamed_and_not_the_broker(dead: DeadNameServer) -> None:
    layer = RabbitmqChannelLayer(
        host="amqp://broker.test", connect_timeout=0.1, operation_timeout=0.2
    )
    with log_lines() as lines:
        with pytest.raises(BrokerUnavailable, match="no answer from the name server"):
            await layer.group_send("g", {"type": "t"})
        await layer.close()
        logged = lines.rest()
    (line,) = [line for line in logged if line.startswith("WARNING")]
    assert "no answer from the name server about the host broker.test" in line
    assert not [line for line in logged if "Traceback" in line]
    assert dead.asked == 1


PROGRAM = """
    import asyncio, logging, os, socket, sys, time

    real = socket.getaddrinfo

    def getaddrinfo(host, *args, **options):
        if host == "broker.test":
            time.sleep(60)
        return real(host, *args, **options)

    socket.getaddrinfo = getaddrinfo

    from asgiref.sync import async_to_sync
    from channels_rabbitmq.core import RabbitmqChannelLayer
    from channels_rabbitmq.exceptions import BrokerUnavailable

    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
    layer = RabbitmqChannelLayer(
        host="amqp://broker.test", connect_timeout=0.1, operation_timeout=0.2
    )

    async def main():
        try:
            await layer.group_send("g", {"type": "t"})
        except BrokerUnavailable as err:
            print("failed:", err)

    HOW
    print("ended", flush=True)
"""


HOW = [
    "asyncio.run(main())",
    "async_to_sync(main)()",
    "for _ in range(3): asyncio.run(main())",
    "if os.fork() == 0: async_to_sync(main)()\n    else: os.wait()",
    # A look-up that the parent has begun isn't the child's.
    "async_to_sync(main)()\n    if os.fork() == 0: async_to_sync(main)()\n    else: os.wait()",
]


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All of them side by side: they mostly wait."""
    with contextlib.ExitStack() as stack:
        started = {}
        for how in HOW:
            program = textwrap.dedent(PROGRAM.replace("HOW", how))
            started[how] = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
                    cwd=Path(__file__).parents[2],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            stack.callback(started[how].kill)
        yield started


@pytest.mark.parametrize("how", HOW)
def test_the_process_ends_in_time_and_without_noise(
    processes: dict[str, subprocess.Popen[str]], how: str
) -> None:
    process = processes[how]
    stdout, _ = process.communicate(timeout=20)  # The name server takes a minute.
    output = without_slowness(stdout)
    assert output.endswith("ended\n")
    assert "Traceback" not in output
    assert "failed: " in output
    assert "no answer from the name server about the host broker.test" in output
    assert process.returncode == 0
