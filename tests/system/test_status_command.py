"""``python -m channels_rabbitmq status``: what somebody on call sees of real processes."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import sys

from channels_rabbitmq._tools import cli
from channels_rabbitmq._tools.status import WIDTH
from channels_rabbitmq._tools.status_report import draw
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.statistics import GroupStatistics
from channels_rabbitmq.status import MissingProcess, Status, WorstChannel
from tests.support.manual import block, commands, run
from tests.support.programs import Program, Programs
from tests.support.statuses import CONNECTED, status_of


async def start(programs: Programs, kind: str) -> tuple[Program, str]:
    """Return a process and its channel."""
    program = await programs.start(
        *("-m", "tests.programs.status_member", programs.broker_url),
        *(programs.groups_exchange, kind),
        PYTHONPATH=":".join(filter(None, sys.path)),
    )
    return program, (await program.printed(r"crq\.\w+!\S+"))[0]


async def status(programs: Programs, *arguments: str) -> Program:
    return await programs.start(
        *("-m", "channels_rabbitmq", "status", programs.broker_url),
        *("--groups-exchange", programs.groups_exchange, *arguments),
    )


async def test_a_stuck_consumer_and_a_blocked_process_are_named(programs: Programs) -> None:
    (idle, _), (stuck, channel), (blocked, other) = await asyncio.gather(
        *(start(programs, kind) for kind in ("idle", "stuck", "idle"))
    )
    first = await status(programs)
    assert await first.ended() in (0, 1), "the stuck one may be stuck for ten seconds by now"
    assert "3 processes answer" in first.stdout
    assert "silent" not in first.stdout

    blocked.process.send_signal(signal.SIGSTOP)
    program = await status(programs, "--watch", "0.2")
    line = await program.printed(r"(crq\.\w+) +(\d+) (\S+) +doesn't answer; last heard \d")
    assert (line[1], int(line[2])) == (other.partition("!")[0], blocked.pid)
    id_, _, name = channel.partition("!")
    line = await program.printed(rf"{id_} +(\d+) .*\n +!{name}: 4 messages \((.*)\)")
    assert (int(line[1]), line[2]) == (stuck.pid, "StuckConsumer, in room")
    blocked.process.send_signal(signal.SIGCONT)
    await program.printed("3 processes answer")
    program.interrupt()
    assert await program.ended() == 130
    assert program.stderr == "channels_rabbitmq: interrupted\n"

    stuck.end_input()
    assert await stuck.ended() == 0
    program = await status(programs, "--json", "--timeout", "10")
    exit_status, last = await program.ended(), json.loads(program.stdout)
    assert {one["statistics"]["pid"] for one in last["processes"]} == {idle.pid, blocked.pid}
    lags = {one["statistics"]["pid"]: one["statistics"]["loop_lag"] for one in last["processes"]}
    assert lags[blocked.pid] > 0.5, "it shows afterwards"
    assert last["is_well"] is (max(lags.values()) < 1.0)
    assert exit_status == (0 if last["is_well"] else 1)


def test_the_manuals_commands() -> None:
    parser = argparse.ArgumentParser()
    cli.add_commands(parser)
    lines = commands("status-commands")
    assert len(lines) == 5
    for line in lines:
        *program, name, command = line[: line.index("status") + 1]
        assert (program, name) in (
            (["python", "-m"], "channels_rabbitmq"),
            (["python", "manage.py"], "channels_rabbitmq"),
        )
        assert parser.parse_args([command, *line[len(program) + 2 :]]).command == "status"


def test_the_manuals_picture() -> None:
    head, _, *lines = block("status-output").splitlines()
    ids = [re.match(r"crq\.\w+", line) for line in lines]
    silent, stuck, slow, other = [found[0] for found in ids if found]
    room = WorstChannel(f"{stuck}!specific.k3vlgvjnyqsl", 120, "ChatConsumer, in room-1")
    three = dict.fromkeys(("publisher", "subscriber", "carehare_connection"), CONNECTED)
    shown = Status(
        (
            status_of(
                stuck,
                oldest=41.0,
                worst=room,
                pid=17,
                groups=GroupStatistics(7, 7, 0),
                buffered=123,
                stalled_channels=1,
            ),
            status_of(other, pid=18, groups=GroupStatistics(12, 12, 0)),
            status_of(slow, pid=19, groups=GroupStatistics(5, 5, 0), loop_lag=2.5, **three),
        ),
        (MissingProcess(silent, 75.0, 4712, "web-2"),),
        (),
        is_complete=False,
    )
    sentence, *table = draw(shown, 1000.0 + 3 * 3600, WIDTH)
    assert head.endswith(f"  {sentence}")
    assert table == lines


async def test_the_manuals_code(default_layer: RabbitmqChannelLayer) -> None:
    await default_layer.connect()
    assert await run("status-method")["stuck"]() == []
