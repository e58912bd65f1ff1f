"""The manual on deploying: commands, files for Compose and Kubernetes, an example's sums."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # has no annotations

from channels_rabbitmq._amqp.url import BrokerUrl
from channels_rabbitmq._inbox.accounting import EARLY_ACKED_BYTES
from channels_rabbitmq._settings.settings import Settings
from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.brokers import Broker
from tests.support.manual import block, commands, run, section
from tests.support.members import must_work

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]
OpenFromSettings = Callable[[dict[str, Any]], Awaitable[RabbitmqChannelLayer]]

SERVERS_TEST = Path(__file__).with_name("test_everywhere_servers.py")


def assert_options_exist(command: list[str]) -> None:
    """A server knows the options of a command line."""
    program, *words = command
    done = subprocess.run(
        [sys.executable, "-m", program, "--help"], capture_output=True, text=True, check=True
    )
    for word in words:
        if word.startswith("-"):
            assert re.search(rf"(?<![\w-]){word}(?![\w-])", done.stdout), (program, word)


@pytest.mark.slow
def test_the_servers_are_those_that_are_tested() -> None:
    tested = SERVERS_TEST.read_text(encoding="utf-8")
    lines = commands("servers")
    assert len(lines) == 5
    for command in lines:
        assert f'"{command[0]}"' in tested
        assert_options_exist(command)


async def test_compose(
    open_from_settings: OpenFromSettings, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = yaml.safe_load(block("compose"))["services"]
    default = services["rabbitmq"]["environment"]
    for name in ("web", "worker"):
        assert services[name]["depends_on"] == {"rabbitmq": {"condition": "service_healthy"}}
        text = services[name]["environment"]["RABBITMQ_URL"]
        password = default["RABBITMQ_DEFAULT_PASS"]
        url = BrokerUrl.parse(text.replace(password, "secret"))
        assert (url.username, url.host, url.virtual_host) == (
            default["RABBITMQ_DEFAULT_USER"],
            "rabbitmq",
            default["RABBITMQ_DEFAULT_VHOST"],
        )
    command = shlex.split(services["web"]["command"])
    await asyncio.to_thread(assert_options_exist, command)
    grace = float(services["web"]["stop_grace_period"].removesuffix("s"))
    assert grace > float(command[command.index("--timeout-graceful-shutdown") + 1])
    monkeypatch.setenv("RABBITMQ_URL", broker.url)
    await must_work(await open_from_settings(run("compose-settings")))


def test_kubernetes() -> None:
    pod = yaml.safe_load(block("kubernetes"))["spec"]["template"]["spec"]
    [container] = pod["containers"]
    command = container["command"]
    time_out = float(command[command.index("--timeout-graceful-shutdown") + 1])
    _, pause = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] > time_out + float(pause)
    for probe, view in (("livenessProbe", "live"), ("readinessProbe", "ready")):
        assert container[probe]["httpGet"]["path"] == f"/health/{view}"
        if importlib.util.find_spec("channels_rabbitmq.health"):
            assert callable(getattr(importlib.import_module("channels_rabbitmq.health"), view))


def test_the_sums_of_the_example() -> None:
    said = " ".join(section("A site as an example").astext().split())
    processes, websockets, workers = 8, 2500, 4
    assert "Eight server processes, each with 2,500 websockets" in said
    assert "four Celery workers" in said
    defaults = Settings.from_config({})
    assert defaults.remote_capacity_bytes is not None
    for figure in (
        f"Connections to RabbitMQ {2 * processes + workers} ",
        f"Queues {3 * processes} ",
        f"up to {processes * 2 * websockets:,} ",
        f"idle channels {round(websockets * (2 + 2 * 0.4) / 1024)} MiB",
        f"{EARLY_ACKED_BYTES // 2**20} MiB and {defaults.local_capacity} messages",
        f"{processes * defaults.remote_capacity_bytes // 2**20} MiB",
    ):
        assert figure in said, figure
