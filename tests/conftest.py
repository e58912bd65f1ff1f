"""Fixtures for all tests: brokers, layers, certificates, and the guard against leftovers.

Which broker: $RABBITMQ_URL if it is set, else one private node for the whole run, started by the
commands that ``find_broker_commands`` finds. A test that kills, restarts or configures a broker
asks for ``private_broker`` or ``private_broker_factory``, which makes it a slow test.
"""

from __future__ import annotations

import gc
import os
import secrets
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import hypothesis
import pytest

from tests.support import lengths
from tests.support.brokers import Broker, broker_commands, installed_commands, obtained_broker
from tests.support.fixtures import (  # noqa: F401 - pytest finds them here
    fast,
    hooks_module,
    lines_without_errors,
    logged,
    proxy,
    queue,
    short_close,
)
from tests.support.leaks import LoopWatch, new_sockets, open_sockets, unclosed_resources
from tools.private_broker import PrivateBroker, find_broker_commands

if TYPE_CHECKING:
    from channels_rabbitmq.core import RabbitmqChannelLayer
    from tests.support.amqp_proxy import AmqpProxy
    from tests.support.programs import Programs

_ROOT = Path(__file__).parent.parent

# Derandomized: the suite says something about the change at hand, so it must not fail by chance for
# somebody who changed nothing. To search for new counter-examples: HYPOTHESIS_PROFILE=explore.
# No deadline: on a busy machine time says nothing about the code.
hypothesis.settings.register_profile("dev", derandomize=True, deadline=None, max_examples=100)
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=500)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=5000)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
)

_PRIVATE = {"private_broker", "private_broker_factory", "fault_broker"}
_passed = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run long tests at their full length")
    parser.addoption(
        "--get-broker",
        action="store_true",
        help="where there is no RabbitMQ, install it or start it in Docker for the first test that "
        "needs one",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--full"):
        lengths.use_full_lengths()
    # A shell's background jobs ignore SIGINT, and so would the processes that tests start, which
    # are to be interrupted by it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    url = os.environ.get("RABBITMQ_URL")
    if url:
        return f"broker: $RABBITMQ_URL at {urlsplit(url).hostname}"
    return f"broker: private nodes by the commands in {find_broker_commands()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _PRIVATE & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)  # a start alone takes more than two seconds


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[_passed] = report.passed
    return report


# Nothing may be left behind


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_behind_by_file() -> Iterator[None]:
    """What is there before a file's tests stays: collections needn't look at it.

    They took a third of the CPU of tests/unit when they looked at what earlier files had imported
    and what pytest keeps of their tests.
    """
    gc.collect()
    gc.freeze()
    yield
    problems = unclosed_resources()
    if problems:
        pytest.fail("left behind by this file:\n- " + "\n- ".join(problems), pytrace=False)


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Chooses what to look for: a pure test, which uses neither loop nor broker, costs nothing."""
    if request.node.get_closest_marker("asyncio") is not None:
        request.getfixturevalue("loop_watch")
        yield
    elif {"broker", *_PRIVATE} & set(request.fixturenames):
        before = open_sockets()
        yield
        _fail_with(request, new_sockets(before) + unclosed_resources())
    else:
        yield


@pytest.fixture
async def loop_watch(request: pytest.FixtureRequest) -> AsyncIterator[LoopWatch]:
    """The guard of an async test. A test which provokes an unhandled error clears ``.errors``."""
    watch = LoopWatch()
    yield watch
    _fail_with(request, await watch.left_behind())


def _fail_with(request: pytest.FixtureRequest, problems: list[str]) -> None:
    # A test that failed halfway couldn't clean up: its own error is the one to show.
    if problems and request.node.stash.get(_passed, False):
        pytest.fail("left behind by this test:\n- " + "\n- ".join(problems), pytrace=False)


# Brokers


@pytest.fixture(scope="session")
def rabbitmq(request: pytest.FixtureRequest) -> Iterator[None]:
    """Before any broker: where pytest may get one, there is one now."""
    if not request.config.getoption("--get-broker"):
        yield
        return
    with obtained_broker():
        yield


@pytest.fixture(scope="session")
def broker(rabbitmq: None) -> Iterator[Broker]:
    """One for all tests: don't stop it, don't count what others may have on it."""
    url = os.environ.get("RABBITMQ_URL")
    if url:
        _require_reachable(url)
        yield Broker(url, None)
        return
    with PrivateBroker(installed_commands()) as private:
        yield Broker(private.url, private)


def _require_reachable(url: str) -> None:
    parts = urlsplit(url)
    address = (parts.hostname or "localhost", parts.port or (5671 if "s" in parts.scheme else 5672))
    try:
        socket.create_connection(address, timeout=10).close()
    except OSError as exc:
        pytest.fail(f"$RABBITMQ_URL: nobody at {address[0]}:{address[1]} ({exc})", pytrace=False)


@pytest.fixture
def private_broker_factory(rabbitmq: None) -> Iterator[Callable[..., PrivateBroker]]:
    """Starts a broker of the test's own: ``private_broker_factory(config=..., tls=...)``.

    All its methods block. Where the loop has to go on meanwhile (a restart takes seconds) an async
    test calls them by ``asyncio.to_thread``.
    """
    commands = broker_commands()
    brokers: list[PrivateBroker] = []

    def start(**options: Any) -> PrivateBroker:
        made = PrivateBroker(commands, **options)
        brokers.append(made)
        made.start()
        return made

    yield start
    for made in brokers:
        made.stop()


@pytest.fixture
def private_broker(private_broker_factory: Callable[..., PrivateBroker]) -> PrivateBroker:
    """A broker of the test's own, to be killed, frozen and so on."""
    return private_broker_factory()


@pytest.fixture(scope="session")
def fault_broker(rabbitmq: None) -> Iterator[PrivateBroker]:
    """One for all tests that break it as a whole, and leave it running as it was before."""
    with PrivateBroker(broker_commands()) as broker:
        yield broker


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what ``ssl/prepare-certs.sh`` makes."""
    folder = tmp_path_factory.mktemp("certs")
    subprocess.run([_ROOT / "ssl" / "prepare-certs.sh", folder], check=True, capture_output=True)
    return folder


# Layers


@pytest.fixture(scope="session")
def _used_exchanges() -> Iterator[list[str]]:
    names: list[str] = []
    yield names
    url = os.environ.get("RABBITMQ_URL")
    if url and names:
        _delete_exchanges(url, names)


def _delete_exchanges(url: str, names: list[str]) -> None:
    """Exchanges for groups stay for ever, and this broker is somebody's."""
    import pika  # type: ignore[import-untyped]  # has no annotations

    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        amqp_channel = connection.channel()
        for name in names:
            amqp_channel.exchange_delete(name)


@pytest.fixture
def groups_exchange(_used_exchanges: list[str]) -> str:
    """A name for the groups exchange that no other test uses."""
    name = f"groups-{secrets.token_hex(8)}"
    _used_exchanges.append(name)
    return name


@pytest.fixture
async def open_layer(
    request: pytest.FixtureRequest, groups_exchange: str
) -> AsyncIterator[Callable[..., Awaitable[RabbitmqChannelLayer]]]:
    """Makes layers, ``layer = await open_layer(expiry=5)``, and closes them at the end of the test.

    ``host`` is the broker of this run unless the test names another one.
    """
    from channels_rabbitmq.core import RabbitmqChannelLayer

    if not _PRIVATE & set(request.fixturenames):
        request.getfixturevalue("broker")  # now, so that its start doesn't hold up the test's loop
    layers: list[RabbitmqChannelLayer] = []

    async def open_one(**config: Any) -> RabbitmqChannelLayer:
        if "host" not in config:
            config["host"] = request.getfixturevalue("broker").url
        layer = RabbitmqChannelLayer(**{"groups_exchange": groups_exchange, **config})
        layers.append(layer)
        return layer

    yield open_one
    for layer in layers:
        await layer.close()


# Programs


@pytest.fixture
async def programs(
    proxy: AmqpProxy,  # noqa: F811
    broker: Broker,
    groups_exchange: str,
) -> AsyncIterator[Programs]:
    """Starts the programs of ``tests/programs``; those that still run at the end are killed."""
    from tests.support.programs import Programs

    started = Programs(proxy, broker.url, groups_exchange)
    yield started
    await started.kill_all()
