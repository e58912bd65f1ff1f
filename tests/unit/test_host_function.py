"""``host`` as a function: asked before each attempt, and whatever it does is survived."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from channels.exceptions import InvalidChannelLayerError
from pamqp import commands

from channels_rabbitmq._broker import host_function as _host_function
from channels_rabbitmq._broker.host_function import NoUrl, current_urls
from channels_rabbitmq._settings.settings import Settings
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.amqp_peer import START, Client, close_connection, scripted_broker, tune
from tests.support.log_lines import log_lines
from tests.support.programs import without_slowness

MESSAGE = {"type": "t"}
URL = "amqp://alice:hush@broker.example/v"

shared_url = URL  # what the functions below return


def url_of_this_module() -> str:
    return shared_url


not_a_function = "amqp://"


async def ask(function: Any, *, timeout: float = 5.0, **options: Any) -> list[str]:
    """Return the URLs that a layer would try."""
    settings = Settings.from_config({"host": function, "connect_timeout": timeout, **options})
    return [str(url) for url in await current_urls(settings)]


async def problem(function: Any, **options: Any) -> str:
    with pytest.raises(NoUrl) as caught:
        await ask(function, **options)
    assert "hush" not in str(caught.value)
    return str(caught.value)


class TestTheOption:
    @pytest.mark.parametrize(
        ("value", "problem"),
        [
            (lambda one: URL, "host is called without arguments: missing a required argument"),
            ("no_such_module.url", "there is no module 'no_such_module'"),
            ("rabbit.example.com", "the URL must start with amqp:// or amqps://, such as"),
            ([lambda: URL], "host[0] must be a URL"),
            (b"amqp://", "host must be a URL or a list of URLs, not bytes"),
        ],
    )
    def test_a_mistake_is_told_at_once(self, value: object, problem: str) -> None:
        with pytest.raises(InvalidChannelLayerError, match="RabbitmqChannelLayer: host") as caught:
            RabbitmqChannelLayer(host=value)  # type: ignore[arg-type]  # on purpose
        assert problem in str(caught.value)

    @pytest.mark.parametrize("name", ["missing", "not_a_function"])
    async def test_a_path_that_cannot_be_used_is_told_by_the_first_call(self, name: str) -> None:
        layer = RabbitmqChannelLayer(host=f"{__name__}.{name}")
        for _ in range(2):
            with pytest.raises(InvalidChannelLayerError, match=f"host: cannot use '.*{name}'"):
                await layer.send("specific!x", MESSAGE)

    def test_what_shows_it(self) -> None:
        shown = {
            "os.getcwd": "os.getcwd",
            url_of_this_module: f"{__name__}.url_of_this_module",
            max: "builtins.max",
            URL: None,
        }
        for value, name in shown.items():
            layer = RabbitmqChannelLayer(host=value)  # type: ignore[arg-type]  # a mixture
            where = f"the URL of {name}" if name else "amqp://alice@broker.example:5672/v"
            assert repr(layer) == f"<RabbitmqChannelLayer: {where}>"
            assert layer.statistics() == ()


class Callables:
    """Everything that can be called without arguments."""

    async def method(self) -> str:
        return URL

    async def __call__(self) -> str:
        return URL


async def _coroutine() -> str:
    return URL


async def _list() -> list[str]:
    return [URL, URL.replace("broker", "other")]


@pytest.mark.parametrize(
    "function",
    [
        url_of_this_module,
        lambda: URL,
        lambda: f" '{URL}' ",  # as read from a file
        lambda: (URL,),
        _coroutine,
        lambda: _coroutine(),
        Callables().method,
        Callables(),
    ],
)
async def test_what_may_be_called(function: Any) -> None:
    assert await ask(function) == ["amqp://alice@broker.example:5672/v"]


@pytest.mark.parametrize("function", [_list, lambda: _list(), lambda: [URL, URL]])
async def test_several_urls(function: Any) -> None:
    assert len(await ask(function)) == 2


# Mistakes


def raise_it(error: BaseException) -> str:
    raise error


async def raise_it_async(error: BaseException) -> str:
    raise error


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("vault is sealed"), "it raised RuntimeError: vault is sealed ("),
        (KeyError("RABBIT"), "it raised KeyError: 'RABBIT' ("),
        (ValueError(f"bad: {URL}"), "it raised ValueError: bad: amqp://...@broker.example/v ("),
        (OSError(f"{URL!r}, a:hush@b://x"), "it raised OSError: 'amqp://...@b://x ("),
        (TimeoutError(), "it raised TimeoutError ("),
        (SystemExit(1), "it raised SystemExit: 1 ("),
        (StopIteration("x"), "it raised "),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_an_exception(is_async: bool, error: BaseException, text: str) -> None:
    function = raise_it_async if is_async else raise_it
    if is_async and isinstance(error, StopIteration):
        text = "it raised RuntimeError"  # Python makes that of it
    told = await problem(lambda: function(error))
    assert told.startswith(text)
    assert re.search(r"host_function\.py, line \d+\)$", told)


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (None, "its result must be a URL or a list of URLs, not NoneType"),
        (5672, "its result must be a URL or a list of URLs, not int"),
        ([], "its result must be a URL or a list of URLs; the list is empty"),
        ("", "its result must be a URL, but is empty"),
        ("redis://alice:hush@x", "its result: the URL must start with amqp://"),
        ("amqp://alice:hu/sh@x", "its result: the URL has an @ after the place"),
        ([URL, "hush"], "its result[1]: the URL must start with amqp://"),
        ("os.getcwd", "its result: the URL must start with amqp://"),
    ],
    ids=repr,
)
async def test_a_result_that_is_no_url(result: object, text: str) -> None:
    assert text in await problem(lambda: result)


async def test_a_url_that_does_not_go_with_the_context() -> None:
    context = ssl.create_default_context()
    assert "ssl_context needs amqps://" in await problem(lambda: URL, ssl_context=context)
    assert await ask(lambda: URL.replace("amqp", "amqps"), ssl_context=context)


# Time


async def hang() -> str:
    await asyncio.Event().wait()
    return URL


async def test_an_async_one_that_hangs() -> None:
    assert await problem(hang, timeout=0.05) == "it gave none within 0.05 s"


@pytest.mark.slow
async def test_an_async_one_that_cannot_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_host_function, "_CANCEL_TIMEOUT", 0.05)
    released = asyncio.Event()

    async def hang_in_spite_of_cancellation() -> str:
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await released.wait()
        return URL

    assert await problem(hang_in_spite_of_cancellation, timeout=0.05) == (
        "it gave none within 0.05 s"
    )
    released.set()
    (task,) = [task for task in asyncio.all_tasks() if task.get_name() == "channels_rabbitmq host"]
    await task


@pytest.fixture
def released() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


async def test_a_sync_one_that_hangs(released: threading.Event) -> None:
    """It blocks nothing, and isn't called again meanwhile."""
    calls: list[threading.Thread] = []

    def hang() -> str:
        calls.append(threading.current_thread())
        released.wait(60)
        return URL

    for _ in range(3):
        assert await problem(hang, timeout=0.05) == "it gave none within 0.05 s"
    (thread,) = calls
    assert thread.daemon
    asking = asyncio.create_task(ask(hang))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    released.set()
    assert await asking
    assert len(calls) == 1


async def test_it_may_use_async_to_sync() -> None:
    """In the thread there is no event loop."""
    assert await ask(lambda: async_to_sync(_coroutine)())


# With a broker


async def test_each_attempt_has_the_credentials_of_now() -> None:
    """As long as they don't fit, the broker refuses; then they do, without a restart."""
    heard: list[str] = []
    is_in = asyncio.Event()

    async def check_password(client: Client) -> None:
        client.say(START)
        response = (await client.hear(commands.Connection.StartOk)).response
        heard.append(response.rpartition("\0")[2])
        if heard[-1] != "good":
            client.say(close_connection(403, "ACCESS_REFUSED - Login was refused"))
            await client.hear_end()
            return
        client.say(tune())
        await client.hear(commands.Connection.Open)
        is_in.set()

    passwords = itertools.chain(["bad", "worse"], itertools.repeat("good"))
    async with scripted_broker(check_password) as server:
        layer = RabbitmqChannelLayer(
            host=lambda: f"amqp://u:{next(passwords)}@127.0.0.1:{server.port}"
        )
        with log_lines() as lines:
            connecting = asyncio.create_task(layer.connect())
            await asyncio.wait_for(is_in.wait(), 20)
            await layer.close()
            logged = "\n".join(lines.rest())
        with pytest.raises(BrokerUnavailable):
            await connecting
    assert {"bad", "worse", "good"} == set(heard)
    assert "403 ACCESS_REFUSED" in logged
    assert not [password for password in heard if password in logged]


async def test_the_log_names_the_function() -> None:
    layer = RabbitmqChannelLayer(host=hang, connect_timeout=0.05, operation_timeout=0.2)
    with log_lines() as lines:
        with pytest.raises(
            BrokerUnavailable, match=r"the URL of .*hang: it gave none within 0\.05"
        ):
            await layer.group_send("g", MESSAGE)
        await layer.close()
        (line,) = [line for line in lines.rest() if line.startswith("WARNING")]
    assert line.endswith(
        f"cannot connect to the URL of {__name__}.hang: it gave none within 0.05 s"
    )


async def test_close_while_it_hangs(released: threading.Event) -> None:
    def hang_in_thread() -> str:
        released.wait(60)
        return URL

    for function in (hang, hang_in_thread):
        layer = RabbitmqChannelLayer(host=function)
        connecting = asyncio.create_task(layer.connect())
        await asyncio.sleep(0.05)
        started_at = time.monotonic()
        await layer.close()
        assert time.monotonic() - started_at < 3
        with pytest.raises(BrokerUnavailable):
            await connecting


def test_the_end_of_the_process_does_not_wait_for_it() -> None:
    program = textwrap.dedent("""
        import asyncio, time
        from channels_rabbitmq.core import RabbitmqChannelLayer
        from channels_rabbitmq.exceptions import BrokerUnavailable

        layer = RabbitmqChannelLayer(host=lambda: time.sleep(60), operation_timeout=0.3)

        async def main():
            try:
                await layer.group_send("g", {})
            except BrokerUnavailable:
                print("failed")

        asyncio.run(main())
    """)
    process = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=20,
    )
    warning, failed = without_slowness(process.stdout).splitlines()
    assert "cannot connect to the URL of __main__.<lambda>: no answer within 0.3 s" in warning
    assert failed == "failed"
    assert process.returncode == 0
