"""The form of a process's status, as it is told to others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest

from channels_rabbitmq._codec import MalformedBody
from channels_rabbitmq._peers.statuses import LONGEST_TEXT, pack, plain, read
from channels_rabbitmq.statistics import ConnectionStatistics, Counters
from channels_rabbitmq.status import ProcessStatus, WorstChannel
from tests.support.statuses import CONNECTED, status_of

ID = "crq." + "a" * 16
WORST = WorstChannel(f"{ID}!specific.x", 12, "ChatConsumer, in room")


def told(status: ProcessStatus) -> ProcessStatus:
    return read(msgpack.unpackb(msgpack.packb(pack(status))), ID)


def test_what_is_packed_is_read() -> None:
    counters = Counters(consumed=2**40, requests=7)
    status = status_of(ID, oldest=1.5, worst=WORST, counters=counters, is_blocked=True)
    assert told(status) == status
    assert told(status_of(ID)) == status_of(ID)


def test_its_size_is_bounded() -> None:
    assert len(msgpack.packb(pack(status_of(ID, worst=WORST)))) < 2500
    long = "x" * 10_000
    connection = ConnectionStatistics(long, 1.0, long, 1, long)
    status = status_of(
        ID,
        worst=WorstChannel(long, 1, long),
        host=long,
        **dict.fromkeys(
            ("publisher", "subscriber", "carehare_connection", "normal_channels"), connection
        ),
    )
    assert len(msgpack.packb(pack(status))) < 10_000
    assert told(status).statistics.host == "x" * LONGEST_TEXT


def test_of_another_version() -> None:
    packed = pack(status_of(ID, loop_lag=3.0))
    packed["later"] = packed["statistics"]["later"] = packed["statistics"]["counters"]["later"] = 1
    del packed["statistics"]["loop_lag"], packed["statistics"]["counters"]["consumed"]
    del packed["statistics"]["groups"], packed["statistics"]["host"]
    assert read(packed, ID) == status_of(ID, host="")


def test_terminals_get_no_control_characters() -> None:
    evil = "\x1b[2J\x07\u202e\udcff é"
    status = told(status_of(ID, host="web\x1b]0;x\x07", worst=replace(WORST, name="a\nb")))
    assert status.statistics.host == r"web\x1b]0;x\x07"
    assert status.worst_channel is not None
    assert status.worst_channel.name == r"a\nb"
    assert plain(evil) == r"\x1b[2J\x07\u202e\udcff é"


@pytest.mark.parametrize(
    "change",
    [
        {"id": "crq." + "b" * 16},
        {"pid": -1},
        {"pid": True},
        {"pid": 2**63},
        {"pid": 1.5},
        {"since": float("nan")},
        {"since": float("inf")},
        {"since": "yesterday"},
        {"loop_lag": -0.1},
        {"host": 1},
        {"is_blocked": 1},
        {"publisher": []},
        {"publisher": {"reconnects": "x"}},
        {"counters": {"consumed": -1}},
    ],
)
def test_nonsense_is_malformed(change: dict[str, Any]) -> None:
    packed = pack(status_of(ID, publisher=CONNECTED))
    packed["statistics"] |= change
    with pytest.raises(MalformedBody, match="a status"):
        read(packed, ID)


@pytest.mark.parametrize("whole", [None, [], "x", {}, {"statistics": 1}])
def test_no_status_at_all(whole: object) -> None:
    with pytest.raises(MalformedBody, match="a status"):
        read(whole, ID)
