"""The layer under web servers: sync consumers and views, start-up and shutdown.

Each server is started once: websockets of all kinds talk in it, then a signal ends it while they
are open.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.programs import (
    BACKGROUND_THREAD,
    FORKING_PYTHON,
    OF_SPAWNED_PROCESSES,
    STRICT_PYTHON,
    Program,
    Programs,
)
from tools.private_broker import free_port

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

KINDS = ["sync", "sync-json", "async"]  # of consumers


# No proxy on the way to ourselves, whatever the environment says.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str) -> Any:
    """The JSON of a page."""
    with OPENER.open(url, timeout=10) as response:
        assert response.status == 200
        return json.loads(response.read())


def answers(port: int) -> bool:
    try:
        OPENER.open(f"http://127.0.0.1:{port}/nothing/", timeout=10).close()
    except urllib.error.HTTPError as error:  # 404: there is a Django
        error.close()
        return True
    except OSError:
        return False
    return True


async def until_it_answers(program: Program, port: int) -> None:
    """Wait for a page: some listen, or say that they are ready, before they are."""
    while not await asyncio.to_thread(answers, port):
        assert program.process.returncode is None, repr(program)
        await asyncio.sleep(0.02)  # nobody tells when a server listens


@contextlib.asynccontextmanager
async def clients(port: int, room: str) -> AsyncIterator[dict[str, ClientConnection]]:
    """One for each kind of consumer; they may be lost, but not hang, at the end."""
    async with contextlib.AsyncExitStack() as stack:
        yield {
            kind: await stack.enter_async_context(
                connect(f"ws://127.0.0.1:{port}/{kind}/{room}/", proxy=None, close_timeout=5)
            )
            for kind in KINDS
        }


async def hear(client: ClientConnection, count: int = 1) -> list[Any]:
    return [json.loads(await asyncio.wait_for(client.recv(), 10)) for _ in range(count)]


async def talk(port: int, opened: dict[str, ClientConnection], room: str) -> None:
    """Each says something, then a sync view does; all hear it all."""
    for kind, client in opened.items():
        await client.send(json.dumps({"say": f"I am {kind}"}))
        for other, listener in opened.items():
            expected = [{"heard": f"I am {kind}"}]
            if other == kind == "sync-json":  # which also says it to itself
                expected.append({"said": f"I am {kind}"})
            assert await hear(listener, len(expected)) == expected
    answer = await asyncio.to_thread(get, f"http://127.0.0.1:{port}/notify/{room}/news/")
    for listener in opened.values():
        assert await hear(listener) == [{"heard": "news"}]
    # The view's call ran on the server's own loop.
    assert BACKGROUND_THREAD not in answer["threads"]


# The commands, after "python -m"; {port} is filled in.
ASGI = {
    "uvicorn": "uvicorn --port {port} --timeout-graceful-shutdown 2 --loop uvloop",
    "uvicorn-asyncio": "uvicorn --port {port} --timeout-graceful-shutdown 2 --loop asyncio",
    "daphne": "daphne --port {port}",
    "hypercorn": "hypercorn --bind 127.0.0.1:{port} --graceful-timeout 1",
    "granian": "granian --interface asginl --port {port}",
}
# Those that send the lifespan protocol, and what makes them do it.
LIFESPAN = {
    "uvicorn": "--lifespan on",
    "hypercorn": "",
    "granian": "--interface asgi",
}
# daphne's websockets ask asyncio what is a coroutine function, of which Python 3.14 and newer warn.
OF_DAPHNE = ("-W", "ignore:'asyncio.iscoroutinefunction':DeprecationWarning:txaio.tx")
# Warnings that are not about us.
ALLOWED = {
    "daphne": OF_DAPHNE,
    # Of each sync consumer: granian's ``send`` is no Python function. Its workers are spawned.
    "granian": ("-W", "ignore:async_to_sync was passed:UserWarning", *OF_SPAWNED_PROCESSES),
}
# On Python 3.15, with -X dev and -W together, granian 2.8.9 answers no request to a Django project,
# also without the layer.
PYTHON = {"granian": [sys.executable, "-W", "error"]} if sys.version_info >= (3, 15) else {}
# Servers that end their process before its event loop has ended. uvicorn does it by the very signal
# that it got, granian by leaving a child of multiprocessing: no Python runs then. The kernel closes
# the connections, and RabbitMQ logs that they were lost.
ABRUPT = {"uvicorn", "uvicorn-asyncio", "granian"}
# Servers with faults of their own when websockets are open at the end. hypercorn cancels their
# tasks, of which asyncio makes an error (until Python 3.11). granian stops its loop while a sync
# consumer is at its disconnect(): async_to_sync, whatever it calls, then waits for ever.
CLOSE_FIRST = {"hypercorn", "granian"}


async def start_asgi(
    programs: Programs,
    server: str,
    port: int,
    application: str,
    options: str = "",
    **variables: str,
) -> Program:
    return await programs.start(
        *("-m", *ASGI[server].format(port=port).split(), *options.split(), application),
        python=[*PYTHON.get(server, STRICT_PYTHON), *ALLOWED.get(server, ())],
        **variables,
    )


async def talk_and_stop(programs: Programs, server: str, program: Program, port: int) -> None:
    """Stop the server while websockets are open, as they are in a new deployment."""
    async with clients(port, "room") as opened:
        await talk(port, opened, "room")
        assert programs.roles() == {"publisher": 1, "subscriber": 1}
        assert await asyncio.to_thread(get, f"http://127.0.0.1:{port}/job/work/") == {"job": "work"}
        assert programs.roles() == {"publisher": 1, "subscriber": 1, "carehare_connection": 1}
        if server not in CLOSE_FIRST:
            await program.stop()
    if server in CLOSE_FIRST:
        await program.stop()
    program.assert_quiet()


@pytest.mark.slow
@pytest.mark.parametrize("server", ASGI)
async def test_asgi_server(programs: Programs, server: str) -> None:
    """Which knows nothing of the lifespan protocol, or whose project doesn't."""
    port = free_port()
    program = await start_asgi(programs, server, port, "mysite.asgi:application")
    await until_it_answers(program, port)
    await talk_and_stop(programs, server, program, port)
    await programs.assert_nothing_left(closed=server not in ABRUPT)


class TestLifespan:
    """Servers that tell a project of their start and end, and a project that listens."""

    async def start(self, programs: Programs, server: str, port: int, **variables: str) -> Program:
        application = "mysite.asgi_lifespan:application"
        return await start_asgi(programs, server, port, application, LIFESPAN[server], **variables)

    @pytest.mark.slow
    @pytest.mark.parametrize("server", LIFESPAN)
    async def test_connects_at_the_start_and_closes_at_the_end(
        self, programs: Programs, server: str
    ) -> None:
        port = free_port()
        program = await self.start(programs, server, port)
        # Before anybody asks for anything.
        await programs.proxy.until(lambda: programs.roles() == {"publisher": 1, "subscriber": 1})
        await until_it_answers(program, port)
        await talk_and_stop(programs, server, program, port)
        await programs.assert_nothing_left()

    @pytest.mark.slow
    @pytest.mark.parametrize("server", LIFESPAN)
    async def test_fail_fast_refuses_to_start(self, programs: Programs, server: str) -> None:
        port = free_port()
        program = await self.start(
            programs,
            server,
            port,
            FAIL_FAST="1",
            LAYER_HOST=f"amqp://guest:wrong@{programs.proxy.host}:{programs.proxy.port}",
        )
        # hypercorn forgets the exit status of its worker.
        assert await program.ended() != 0 or server == "hypercorn"
        assert "ACCESS_REFUSED" in program.stdout + program.stderr, repr(program)
        await programs.assert_nothing_left(closed=False)

    @pytest.mark.slow
    @pytest.mark.parametrize("server", LIFESPAN)
    async def test_starts_without_a_broker(self, programs: Programs, server: str) -> None:
        """And ends while it still tries to connect."""
        port = free_port()
        program = await self.start(
            programs,
            server,
            port,
            LAYER_HOST=f"amqp://127.0.0.1:{free_port()}",
            LAYER_CONFIG='{"operation_timeout": 0.3}',
        )
        await program.printed("started without a connection: .*refused|Connect call failed")
        await until_it_answers(program, port)
        await program.stop()
        program.assert_quiet()


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--noreload"], []], ids=["alone", "with the reloader"])
async def test_runserver(programs: Programs, options: list[str]) -> None:
    """Daphne's: in the main thread; and in a daemon thread, beside the reloader."""
    port = free_port()
    program = await programs.start(
        *("manage.py", "runserver", *options, f"127.0.0.1:{port}"),
        python=[
            *STRICT_PYTHON,
            *OF_DAPHNE,
            # Ctrl-C takes the reloader away before its child, and Django before its database.
            *("-W", "ignore:subprocess ", "-W", "ignore:unclosed database"),
        ],
    )
    await until_it_answers(program, port)
    async with clients(port, "room") as opened:
        await talk(port, opened, "room")
        program.interrupt()
        assert await program.ended() == 0
    program.assert_quiet()
    await programs.assert_nothing_left(closed=False)


@pytest.mark.slow
@pytest.mark.parametrize("preload", [False, True], ids=["", "preload"])
@pytest.mark.parametrize("worker", ["sync", "gthread"])
async def test_gunicorn(programs: Programs, tmp_path: Path, worker: str, preload: bool) -> None:
    """A sync view notifies websockets of an ASGI server in another process."""
    ports = {"uvicorn": free_port(), "gunicorn": free_port()}
    options = [
        "--workers",
        "2",
        "--worker-class",
        worker,
        "--bind",
        f"127.0.0.1:{ports['gunicorn']}",
    ]
    if worker == "gthread":
        options += ["--threads", "3"]
    variables = {"HOME": str(tmp_path)}  # where it makes a socket
    if preload:
        options += ["--preload"]
        variables["USE_BEFORE_FORK"] = "1"
    uvicorn = await start_asgi(programs, "uvicorn", ports["uvicorn"], "mysite.asgi:application")
    gunicorn = await programs.start(
        "-m", "gunicorn", *options, "mysite.wsgi", python=FORKING_PYTHON, **variables
    )
    await until_it_answers(uvicorn, ports["uvicorn"])
    await until_it_answers(gunicorn, ports["gunicorn"])
    async with clients(ports["uvicorn"], "room") as opened:
        notified: Counter[int] = Counter()  # by worker
        while len(notified) < 2 or min(notified.values()) < 3:
            # Some at once, so that one worker can't take them all.
            texts = [secrets.token_hex(4) for _ in range(4)]
            answers = await asyncio.gather(
                *(
                    asyncio.to_thread(
                        get, f"http://127.0.0.1:{ports['gunicorn']}/notify/room/{text}/"
                    )
                    for text in texts
                )
            )
            notified.update(answer["pid"] for answer in answers)
            for client in opened.values():
                heard = [message["heard"] for message in await hear(client, len(texts))]
                assert sorted(heard) == sorted(texts)
        for pid in notified:
            # Channels lets threads that come at once make a layer each, and drops all but one.
            await programs.proxy.until(lambda pid=pid: programs.open_roles(pid) == {"publisher": 1})
        used_before = {"publisher": 1, "subscriber": 1} if preload else {}
        assert programs.roles(gunicorn.pid) == used_before
    assert await gunicorn.stop() == 0
    # Its workers leave the socket open at which they listen.
    gunicorn.assert_quiet(allowed=rf"<socket.*laddr=\('127.0.0.1', {ports['gunicorn']}\)>:?$")
    await uvicorn.stop()
    uvicorn.assert_quiet()
    await programs.assert_nothing_left(but_for=uvicorn)
