"""The manual's runbook: its commands exist, and lead from a line in the log to a process."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shlex
import subprocess
import sys

import pytest

from channels_rabbitmq import _reporter
from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.brokers import Broker
from tests.support.manual import block, commands, in_thread, lines_of
from tests.support.members import must_work


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("channels_rabbitmq.__main__") is None, reason="no command line"
)
@pytest.mark.parametrize("number", [0, 1])
def test_the_commands_of_the_runbook(number: int) -> None:
    python, *words = commands("runbook")[number]
    assert python == "python"
    done = subprocess.run([sys.executable, *words, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--settings" in done.stdout


async def test_asking_who_is_in_a_group(
    default_layer: RabbitmqChannelLayer, capsys: pytest.CaptureFixture[str]
) -> None:
    channel = await default_layer.new_channel()
    await default_layer.group_add("chat", channel)
    await default_layer.group_count("chat", 10.0)  # From now on it can be asked.
    await in_thread("runbook-count")
    assert channel in capsys.readouterr().out


async def test_from_an_id_to_a_process(default_layer: RabbitmqChannelLayer, broker: Broker) -> None:
    """And the longest queue, which has its id for a name."""
    if broker.private is None:
        pytest.skip("needs rabbitmqctl for the broker")
    await must_work(default_layer)
    id_ = default_layer.statistics()[0].id
    shown = []
    for line in (block("runbook-pid"), block("runbook-queues")):
        ctl, _, rest = line.replace("asgi", "/").partition(" | ")
        _, *words = shlex.split(ctl)
        output = await asyncio.to_thread(broker.private.ctl, *words)
        done = await asyncio.to_thread(
            subprocess.run, rest, shell=True, input=output, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        shown.append(done.stdout)
    [found] = [line for line in shown[0].splitlines() if f" subscriber {id_} " in line]
    assert f"pid {os.getpid()}" in found
    assert f"\t{id_}\n" in shown[1]


def test_the_lines_that_the_runbook_quotes() -> None:
    said = " ".join(" ".join(lines_of("Runbook: the site stops pushing")).split())
    assert "``refused by at least one queue``" in said
    assert "refused by at least one queue" in _reporter.SENTENCES["group_nacked"]
