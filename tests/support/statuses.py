"""Statuses of processes, as tests make them up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from channels_rabbitmq.statistics import (
    ConnectionStatistics,
    Counters,
    GroupStatistics,
    LoopLayerStatistics,
    ProcessStatistics,
)
from channels_rabbitmq.status import ProcessStatus, WorstChannel

CONNECTED = ConnectionStatistics("connected", 1000.0, "amqp://broker:5672/", 0, "")
IDLE = ConnectionStatistics("idle", 1000.0, "", 0, "")


def status_of(
    id_: str,
    *,
    oldest: float = 0.0,
    worst: WorstChannel | None = None,
    counters: Counters | None = None,
    **changes: Any,
) -> ProcessStatus:
    """Of a process that has connected and done nothing, but for ``changes`` in its statistics."""
    statistics = LoopLayerStatistics(
        id=id_,
        pid=4711,
        host="web-1",
        since=1000.0,
        for_sync_code=False,
        publisher=CONNECTED,
        subscriber=CONNECTED,
        carehare_connection=IDLE,
        normal_channels=IDLE,
        counters=counters or Counters(),
        is_blocked=False,
        unconfirmed=0,
        highest_age=0.0,
        loop_lag=0.0,
        loop_late=0.0,
        buffered=0,
        in_hand_over=0,
        channels=0,
        receivers=0,
        stalled_channels=0,
        unacked=0,
        local_capacity=100,
        early_acked_bytes=0,
        groups=GroupStatistics(0, 0, 0),
        processes=ProcessStatistics(0, 0),
    )
    return ProcessStatus(replace(statistics, **changes), oldest, worst)
