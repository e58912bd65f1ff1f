"""The manual's pages about the check and the system checks: their commands, output and table."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from channels_rabbitmq._settings.settings import Settings
from channels_rabbitmq._tools import check, cli, system_checks
from channels_rabbitmq._tools.check_report import Report, Status
from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.brokers import Broker
from tests.support.manual import TEXT, block, commands, run

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]


def shape(line: str) -> str:
    """A line of the report without what differs from run to run, and from broker to broker."""
    for pattern, name in [
        (r" +\d+\.\d m?s", " TIME"),
        (r"\(\d\.\d s\)", "TIME"),
        (r"127\.0\.0\.1:\d+", "PLACE"),
        (r"\bcrq\.[a-z2-7]{16}", "ID"),
        (r"RabbitMQ \d.*", "VERSION"),
    ]:
        line = re.sub(pattern, name, line)
    return line


async def report_on(broker: Broker, groups_exchange: str, virtual_host: str) -> Report:
    """Check a broker; what is printed is as if its exchange were ``groups``."""
    parts = urlsplit(broker.url)
    host = f"amqp://guest:guest@127.0.0.1:{parts.port}/{virtual_host}"
    settings = Settings.from_config({"host": host, "groups_exchange": groups_exchange})
    report = Report(as_json=False)
    await check.Check("layer 'default'", settings, report, only_sends=False).run()
    report.finish(0.6)
    return report


async def test_the_manuals_output(
    broker: Broker, groups_exchange: str, open_layer: OpenLayer, capsys: pytest.CaptureFixture[str]
) -> None:
    if broker.private is None:
        pytest.skip("the manual shows a broker of one's own")
    for _ in range(2):
        await (await open_layer()).connect()
    for text, virtual_host in ((block("check-good"), ""), (block("check-bad"), "asgi")):
        report = await report_on(broker, groups_exchange, virtual_host)
        out = capsys.readouterr().out.replace(groups_exchange, "groups")
        shown = [shape(line) for line in text.splitlines()]
        assert shown[: len(out.splitlines())] == [shape(line) for line in out.splitlines()]
        failed = report.with_status(Status.FAILED)
        last = [f"channels_rabbitmq: the channel layer doesn't work: {step}" for step in failed]
        assert shown[len(out.splitlines()) :] == last


def test_the_manuals_commands() -> None:
    parser = argparse.ArgumentParser()
    cli.add_commands(parser)
    lines = [*commands("check"), *commands("check-manage")]
    lines.append(shlex.split(block("check-json").partition("|")[0]))
    assert len(lines) == 5
    for line in lines:
        at = line.index("channels_rabbitmq")
        assert line[:at] in (["python", "-m"], ["python", "manage.py"])
        assert parser.parse_args(line[at + 1 :]).command == "check"


def test_the_manuals_program_reads_the_json(broker: Broker) -> None:
    url = urlsplit(broker.url)
    command = block("check-json").replace(
        "check --json", f"check amqp://web:secret@{url.hostname}:{url.port} --json"
    )
    done = subprocess.run(
        ["sh", "-c", command.replace("python ", f"{sys.executable} ")],
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    assert done.stdout == "login look at the user name and password in the URL\n"


def test_the_manual_has_all_steps_and_system_checks() -> None:
    page = TEXT.partition("Checking the connection\n===")[2].partition("For programs\n---")[0]
    rows = re.findall(r"^   \* - ``([^`]+)``$", page, re.MULTILINE)
    settings = Settings.from_config({"host": "amqps://x", "normal_channels": True})
    every = check.Check("x", settings, Report(as_json=True), only_sends=False)
    every.urls = settings.urls
    assert rows == every.names()

    source = Path(system_checks.__file__).read_text(encoding="utf-8")
    table = TEXT.partition("System checks\n===")[2]
    ids = r"channels_rabbitmq\.[EW]\d{3}"
    rows = re.findall(rf"^   \* - ``({ids})``$", table, re.MULTILINE)
    assert rows == sorted(set(re.findall(ids, source)))
    silenced = run("system-checks")
    assert set(silenced["SILENCED_SYSTEM_CHECKS"]) < set(rows)
    assert f"after\n       {system_checks.DAPHNES_HANDSHAKE} seconds" in table
