"""Normal channels in programs: the tutorial of Channels, ``runworker``, and workers that die."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.brokers import Broker
from tests.support.members import receive
from tests.support.normal_channels import delete_queue, queue_of, ready_messages, until_ready
from tests.support.programs import STRICT_PYTHON, Programs

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

# runworker gives its sync consumers a function that asgiref complains about.
_OF_CHANNELS = "ignore:async_to_sync was passed a non-async-marked callable:UserWarning"

CONFIG = {"LAYER_CONFIG": json.dumps({"normal_channels": True})}
CHANNELS = ("jobs", "jobs-other", "test_channel", "thumbnails-generate", "reports")

# As Channels' tutorial types it.
SHELL = """\
import channels.layers
channel_layer = channels.layers.get_channel_layer()
from asgiref.sync import async_to_sync
async_to_sync(channel_layer.send)('test_channel', {'type': 'hello'})
print(async_to_sync(channel_layer.receive)('test_channel'))
"""


@pytest.fixture
async def layer(open_layer: OpenLayer) -> RabbitmqChannelLayer:
    return await open_layer(normal_channels=True)


@pytest.fixture(autouse=True)
async def _no_queue_stays(broker: Broker, groups_exchange: str) -> AsyncIterator[None]:
    yield
    for channel in CHANNELS:
        await delete_queue(broker.url, queue_of(groups_exchange, channel))


async def test_the_tutorial(programs: Programs) -> None:
    command = ("manage.py", "shell", "--verbosity", "0", "--interface", "python")
    shell = await programs.start(*command, **CONFIG)
    shell.say(SHELL)
    shell.end_input()
    assert await shell.ended() == 0
    assert (shell.stdout, shell.stderr) == ("{'type': 'hello'}\n", "")


async def test_the_tutorial_without_the_option(programs: Programs) -> None:
    shell = await programs.start("manage.py", "shell", "--verbosity", "0", "--interface", "python")
    shell.say(SHELL)
    shell.end_input()
    await shell.ended()
    assert "set the option normal_channels to True" in shell.stderr


async def test_runworker(programs: Programs, layer: RabbitmqChannelLayer) -> None:
    workers = [
        await programs.start(
            *("manage.py", "runworker", "thumbnails-generate", "reports"),
            **CONFIG,
            python=[*STRICT_PYTHON, "-W", _OF_CHANNELS],
            SITE_APPLICATION="mysite.jobs.application",
        )
        for _ in range(2)
    ]
    here = await layer.new_channel()
    await layer.group_add("any", here)  # so that it can be reached
    for number in range(1, 21):
        await layer.send(
            "thumbnails-generate", {"type": "generate", "id": number, "reply_to": here}
        )
        await layer.send("reports", {"type": "report", "id": number, "reply_to": here})
    done = [(await receive(layer, here))["id"] for _ in range(40)]
    assert sorted(done) == [n for n in range(-20, 21) if n]
    for worker in workers:
        worker.interrupt()
        await worker.ended()
        worker.assert_quiet(allowed="KeyboardInterrupt|Traceback")


@pytest.mark.parametrize(
    "how", ["die_of_a_job", "die_of_a_job_on_uvloop", "die_of_a_job_in_sync_code"]
)
async def test_a_job_that_kills_its_worker_kills_one(
    programs: Programs,
    layer: RabbitmqChannelLayer,
    broker: Broker,
    groups_exchange: str,
    how: str,
) -> None:
    """Each job is handled once, or not to its end: never by the next worker again."""
    for number in range(6):
        await layer.send("jobs", {"type": "job", "n": number})
    for number in range(4):
        worker = await programs.start("workers.py", how, "jobs", **CONFIG)
        assert await worker.ended() == -signal.SIGKILL
        assert worker.stdout == f"working on {number}\n"
        await until_ready(broker.url, queue_of(groups_exchange, "jobs"), 5 - number)
    assert await receive(layer, "jobs") == {"type": "job", "n": 4}


@pytest.mark.parametrize("how", ["run", "closed", "thread"])
async def test_an_end_while_a_call_waits_is_quiet(programs: Programs, how: str) -> None:
    program = await programs.start("workers.py", "end_while_waiting", how, "jobs", **CONFIG)
    assert await program.ended() == 0
    assert (program.stdout, program.stderr) == ("over\n", "")
    await programs.proxy.until(lambda: not programs.proxy.links)


async def test_workers_share_the_jobs_of_a_killed_one(
    programs: Programs, layer: RabbitmqChannelLayer, broker: Broker, groups_exchange: str
) -> None:
    worker = await programs.start("workers.py", "die_of_a_job", "jobs", **CONFIG)
    jobs = [asyncio.create_task(receive(layer, "jobs")) for _ in range(3)]
    for number in range(4):
        await layer.send("jobs", {"type": "job", "n": number})
    await worker.ended()
    done = {(await job)["n"] for job in jobs} | {int(worker.stdout.split()[-1])}
    assert done == {0, 1, 2, 3}
    assert await ready_messages(broker.url, queue_of(groups_exchange, "jobs")) == 0
