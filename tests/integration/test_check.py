"""``check`` on a RabbitMQ where all is well, or one thing is wrong in the URL."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import pytest

from channels_rabbitmq._tools import check_layer, cli
from channels_rabbitmq._tools.check_report import Status
from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.brokers import Broker
from tests.support.checks import Checked, check
from tests.support.fake_servers import silent_server
from tests.support.normal_channels import on_amqp_channel, queue_of
from tests.support.programs import Programs, assert_no_queues

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]


def at(broker: Broker, credentials: str = "guest:guest", path: str = "") -> str:
    parts = urlsplit(broker.url)
    return f"amqp://{credentials}@{parts.hostname}:{parts.port}{path or parts.path}"


async def test_all_is_well(broker: Broker, groups_exchange: str) -> None:
    checked = await check(broker.url, groups_exchange=groups_exchange)
    assert checked.names == [
        *("settings", "name look-up", "TCP", "RabbitMQ", "login", "virtual host", "exchange"),
        *("permissions", "queue", "alarms", "send", "group_send", "processes"),
    ]
    assert {step.finding.status for step in checked.report.steps} == {Status.OK}
    assert all(step.seconds is not None for step in checked.report.steps)
    assert checked.text("RabbitMQ").startswith("RabbitMQ ")
    assert "no other process answers" in checked.text("processes")
    await assert_no_queues(broker.url, {checked.text("queue").partition(",")[0]})


async def test_other_processes_are_counted(
    broker: Broker, open_layer: OpenLayer, groups_exchange: str
) -> None:
    for _ in range(2):
        await (await open_layer()).connect()
    checked = await check(broker.url, groups_exchange=groups_exchange)
    assert checked.text("processes") == f"on the exchange {groups_exchange!r}: 2 others answer"


async def test_a_process_that_only_sends(broker: Broker, groups_exchange: str) -> None:
    checked = await check(broker.url, groups_exchange=groups_exchange, only_sends=True)
    assert checked.report.is_ok
    assert checked.names[-3:] == ["exchange", "permissions", "alarms"]


async def test_normal_channels(
    broker: Broker, groups_exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check deletes the queue that it has used."""
    monkeypatch.setattr(check_layer.secrets, "token_hex", lambda size: "x")
    config = {"groups_exchange": groups_exchange, "normal_channels": True}
    checked = await check(broker.url, **config)
    assert checked.report.is_ok
    assert "10 messages" in checked.text("normal channel")
    await assert_no_queues(broker.url, {queue_of(groups_exchange, "check.x")})


async def test_what_rabbitmq_refuses(broker: Broker) -> None:
    checked = await check(at(broker, "web:s3cret"))
    name, text, advice = checked.the_failed()
    assert (name, "403 ACCESS_REFUSED" in text) == ("login", True)
    assert "user name and password" in advice
    name, text, advice = (await check(at(broker, path="/no-vhost"))).the_failed()
    assert (name, advice) == ("virtual host", "create it: rabbitmqctl add_vhost no-vhost")


async def test_an_exchange_that_is_there(broker: Broker, groups_exchange: str) -> None:
    """It is used if it is direct, whatever else it is."""

    async def declared(exchange_type: str) -> Checked:
        await on_amqp_channel(broker.url, lambda c: c.exchange_delete(groups_exchange))
        await on_amqp_channel(
            broker.url, lambda c: c.exchange_declare(groups_exchange, exchange_type, durable=True)
        )
        return await check(broker.url, groups_exchange=groups_exchange)

    name, text, advice = (await declared("topic")).the_failed()
    assert (name, "inequivalent arg 'type'" in text) == ("exchange", True)
    assert "groups_exchange" in advice
    checked = await declared("direct")
    assert checked.report.is_ok
    assert "used as it is" in checked.text("exchange")


async def test_a_url_that_hangs_costs_the_layer_no_time(
    broker: Broker, groups_exchange: str
) -> None:
    """Only the step for this URL has tried it."""
    async with silent_server() as silent:
        hanging = f"{silent.url}{urlsplit(broker.url).path}?connection_timeout=500"
        checked = await check(f"{hanging} {broker.url}", groups_exchange=groups_exchange)
        await silent.until_gone()
        assert silent.accepted == 1
    assert checked.report.is_ok
    assert set(checked.warned()) == {"RabbitMQ"}


# The command


def test_the_command(
    broker: Broker, groups_exchange: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """For a URL; its log lines don't mix with the report."""
    command = ["check", broker.url, "--groups-exchange", groups_exchange]
    assert cli.main(command) == 0
    out, err = capfd.readouterr()
    assert re.search(r"^ok    send +[0-9.]+ ms  10 messages", out, re.MULTILINE)
    assert re.search(r"^The channel layer works \(", out, re.MULTILINE)
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["ok"] is True
    assert cli.main(["check", at(broker, "web:s3cret")]) == cli.FAILED
    out, err2 = capfd.readouterr()
    assert re.search(r"^FAIL  login", out, re.MULTILINE)
    assert (err, err2) == ("", "channels_rabbitmq: the channel layer doesn't work: login\n")


async def test_ctrl_c_and_a_reader_that_goes(programs: Programs) -> None:
    """Each ends it at once, with one line and nothing left behind."""
    async with silent_server() as silent:
        program = await programs.start("-m", "channels_rabbitmq", "check", silent.url)
        await silent.until_accepted()
        program.interrupt()
        assert await program.ended() == cli.INTERRUPTED
        await silent.until_gone()
    assert program.stderr == "channels_rabbitmq: interrupted\n"
    shell = f"{sys.executable} -m channels_rabbitmq check {programs.broker_url}"
    command = f"({shell}; echo $? >&2) | head -1"
    process = await asyncio.create_subprocess_shell(
        command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert out.decode().startswith("ok    settings")
    assert err.decode().splitlines() == [
        "channels_rabbitmq: nobody reads the output any more",
        str(cli.NOT_READ),
    ]
