"""``channels_rabbitmq.testing`` as projects use it, and what docs/howto/testing.rst says of it."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
from pathlib import Path

import pytest

from channels_rabbitmq._loops.process import current
from channels_rabbitmq.testing import _keeper, _run
from tests.support.brokers import Broker
from tests.support.manual import DOCS, block
from tests.support.programs import FORKING_PYTHON, Program, Programs
from tools.private_broker import free_port

PAGE = DOCS / "howto" / "testing.rst"
PLUGIN = ("-p", "channels_rabbitmq.testing.pytest_plugin")
PYTEST = (
    *("-m", "pytest", "-q", "-c", "pytest.ini", "--rootdir", ".", "--noconftest"),
    *("-p", "no:cacheprovider", "-W", "error"),
)
NORMAL_CHANNELS = '{"normal_channels": true}'


async def start(programs: Programs, *command: str, **variables: str) -> Program:
    return await programs.start(
        *PYTEST, *PLUGIN, *command, LAYER_CONFIG=NORMAL_CHANNELS, **variables
    )


async def passed(program: Program, count: int) -> str:
    assert await program.ended() == 0, repr(program)
    assert f"{count} passed" in program.stdout, repr(program)
    program.assert_quiet()
    return program.stdout


async def assert_nothing_left(broker: Broker, names: set[str]) -> None:
    """Wait until no exchange of these runs is there, and nothing whose name holds that of one.

    That is so at once, or, where RabbitMQ was too busy to answer, when the leases have expired.
    """
    while broker.private is not None:
        exchanges = await asyncio.to_thread(broker.private.list_exchanges, "name")
        queues = await asyncio.to_thread(broker.private.list_queues)
        found = [row["name"] for row in (*exchanges, *queues)]
        if not any(name in one for one in found for name in names):
            return
        await asyncio.sleep(0.2)


async def test_suites_on_one_broker_at_the_same_time(programs: Programs, broker: Broker) -> None:
    suites = [
        await start(programs, "-s", *workers, "kit_suite.py") for workers in ((), ("-n", "2"))
    ]
    outputs = [await passed(suite, 10) for suite in suites]
    # Workers of xdist don't show what is printed.
    names = set(re.findall(r"exchange of \d+: (\S+)", "".join(outputs)))
    assert names
    assert all(name.endswith(f".{programs.groups_exchange}") for name in names)
    await programs.assert_nothing_left(closed=False)
    await assert_nothing_left(broker, {programs.groups_exchange})


async def test_a_layer_that_was_used_before(programs: Programs) -> None:
    suite = await start(programs, "-p", "kit_early", "-k", "test_the_exchange", "kit_suite.py")
    await passed(suite, 1)


@pytest.mark.parametrize(("test", "status"), [("test_a_run", -9), ("test_a_child", 0)])
async def test_what_is_killed(programs: Programs, broker: Broker, test: str, status: int) -> None:
    suite = await start(programs, "-s", "-W", "ignore:This process", f"kit_killed.py::{test}")
    [_, name] = (await suite.printed(r"exchange: (\S+)\n")).group(0).split()
    assert await suite.ended() == status, repr(suite)
    await assert_nothing_left(broker, {name})


async def test_without_a_broker(programs: Programs) -> None:
    url = f"amqp://guest:secret@127.0.0.1:{free_port()}/"
    command = ("-k", "test_nothing or test_without or swallows", "-rs", "kit_suite.py")
    outcomes = {"fail": "4 failed, 1 passed", "skip": "1 passed, 4 skipped"}
    suites = [
        await start(programs, *command, LAYER_HOST=url, WITHOUT_RABBITMQ=how) for how in outcomes
    ]
    for suite, (how, outcome) in zip(suites, outcomes.items(), strict=True):
        assert await suite.ended() == (how == "fail")
        assert outcome in suite.stdout, repr(suite)
        said = "No RabbitMQ for the tests. No connection to RabbitMQ: amqp://guest@"
        assert suite.stdout.count(said) >= 2
        assert "Start RabbitMQ (docker run" in suite.stdout
        assert "secret" not in suite.stdout + suite.stderr
        assert suite.stderr.count("cannot connect") <= 1  # in the log: once for the run


async def test_djangos_runner(programs: Programs, broker: Broker) -> None:
    command = ("manage.py", "test", "kit_django_suite")
    workers, live = [
        await programs.start(*command, *tags, python=FORKING_PYTHON, LAYER_CONFIG=NORMAL_CHANNELS)
        for tags in (("--parallel", "2", "--exclude-tag", "live"), ("--tag", "live"))
    ]
    for suite, count in ((workers, 12), (live, 1)):
        assert await suite.ended() == 0, repr(suite)
        assert f"Ran {count} test" in suite.stderr, repr(suite)
    names = set(re.findall(r"exchange: (\S+)", workers.stdout))
    assert len(names) == 2
    await assert_nothing_left(broker, names)


async def test_djangos_runner_without_a_broker(programs: Programs) -> None:
    command = ("manage.py", "test", "kit_django_suite.Simple", "kit_django_suite.InMemory")
    url = f"amqp://guest:secret@127.0.0.1:{free_port()}/"
    failing = await programs.start(*command, LAYER_HOST=url)
    skipping = await programs.start(*command, LAYER_HOST=url, WITHOUT_RABBITMQ="skip")
    assert await failing.ended() == 1
    assert "setUpClass (kit_django_suite.Simple)" in failing.stderr
    assert "BrokerUnavailable: No RabbitMQ for the tests. No conn" in failing.stderr
    assert await skipping.ended() == 0, repr(skipping)
    assert "OK (skipped=1)" in skipping.stderr
    assert "secret" not in failing.stderr + skipping.stderr


async def test_the_page(programs: Programs, tmp_path: Path) -> None:
    """A project as the page shows it; once on RabbitMQ, once in memory."""
    (tmp_path / "conftest.py").write_text(block("testing-conftest"))
    tests = (block("testing-pytest"), block("testing-django"), block("testing-programs"))
    for number, text in enumerate(tests):
        (tmp_path / f"test_{number}.py").write_text("import django\ndjango.setup()\n" + text)
    settings = "from mysite.settings import *\n" + block("testing-in-memory")
    (tmp_path / "settings_in_memory.py").write_text(settings)
    command = [*PYTEST, "-W", "ignore:This process", str(tmp_path)]
    command.remove("--noconftest")
    pytest_command, runner_command = map(shlex.split, block("testing-skip").splitlines())
    assert pytest_command[0] == "pytest"
    assert runner_command[0] == "WITHOUT_RABBITMQ=skip"
    path = os.pathsep.join((str(tmp_path), str(Path(__file__).parents[1] / "programs")))
    on_rabbitmq = await programs.start(*command, *pytest_command[1:])
    in_memory = await programs.start(
        *command,
        LAYER_HOST="amqp://nobody/",
        DJANGO_SETTINGS_MODULE="settings_in_memory",
        PYTHONPATH=path,
    )
    await passed(on_rabbitmq, 4)
    await passed(in_memory, 4)
    await programs.assert_nothing_left()


def test_numbers_and_names_of_the_page() -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    run = _run.Run("7d0fe5a2b1c9")
    assert f"``{run.exchange('groups')}``" in text
    assert _keeper.LONGEST_LOOK == 5.0
    assert "within five seconds" in text
    assert _run._NORMAL_QUEUE_EXPIRY == 60
    assert "within 20 seconds, or a minute" in text
    assert len(_run.Run().exchange("x" * 127)) <= 127


def test_layers_that_were_used_before_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a signal's handler, while Django makes the database for tests."""
    started: list[object] = []

    class Registry:
        def all(self) -> list[object]:
            return []

        def start_over(self) -> None:
            started.append(self)

    registry = Registry()
    monkeypatch.setattr(current(), "prepare", current().prepare)
    monkeypatch.setattr(current(), "_registries", {registry})
    _run.Run().start()
    assert started == [registry]
