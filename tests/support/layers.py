"""What tests see of a layer, and how they have its connections change."""

from __future__ import annotations

import asyncio
from typing import Any

from asgiref.sync import async_to_sync

from channels_rabbitmq._loops.registry import LoopLayers
from channels_rabbitmq._settings.settings import Settings
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.statistics import LoopLayerStatistics


def statistics_of(layer: RabbitmqChannelLayer) -> LoopLayerStatistics:
    """Those of the only event loop that uses the layer."""
    (statistics,) = layer.statistics()
    return statistics


def statistics_of_id(layer: RabbitmqChannelLayer, id_: str) -> LoopLayerStatistics:
    """Those of one of its event loops, by the id with which the names of its channels begin."""
    (statistics,) = [one for one in layer.statistics() if one.id == id_]
    return statistics


def inside(layer: RabbitmqChannelLayer) -> Any:
    """The running event loop's LoopLayer, for what no statistics tell."""
    return layer._loop_layer()


def loop_layers_of(layer: RabbitmqChannelLayer) -> LoopLayers:
    """What serves the layer's calls in this process."""
    return layer._loop_layers


def inside_of_loop(layer: RabbitmqChannelLayer, loop: asyncio.AbstractEventLoop) -> Any:
    """As ``inside``, of another event loop that uses the layer."""
    return loop_layers_of(layer).by_loop[loop]


def settings_of(layer: RabbitmqChannelLayer) -> Settings:
    return layer._settings


def subscriber_of(layer: RabbitmqChannelLayer) -> Any:
    return inside(layer).subscriber


def publisher_of(layer: RabbitmqChannelLayer) -> Any:
    return inside(layer).publisher


def reconnect_subscriber(layer: RabbitmqChannelLayer) -> None:
    """Have it replace its connection for receiving, as the watchdog would."""
    supervisor = subscriber_of(layer).supervisor
    assert supervisor.connection is not None, "while one is set up, its set-up would fail"
    supervisor.reconnect("for a test")


def set_linger(layer: RabbitmqChannelLayer, seconds: float) -> None:
    """How long a group without members stays bound."""
    inside(layer).bindings._linger = seconds


def set_retry_timeout(layer: RabbitmqChannelLayer, seconds: float) -> None:
    """How long it tries to reach a process that was there before, also after its own reconnect."""
    direct_sender = inside(layer)._sender.direct_sender
    direct_sender._retry_timeout, direct_sender._reconnect_grace = seconds, 0.0


def has_members(layer: RabbitmqChannelLayer, group: str) -> bool:
    """Whether the group has members on the running event loop."""
    return bool(inside(layer).members.has_members(group))


async def close_for_sync_code(layer: RabbitmqChannelLayer) -> None:
    """Close what serves sync code.

    ``async_to_sync`` is called in the thread: that of asgiref 3.6, called here, would use our loop.
    """
    await asyncio.to_thread(lambda: async_to_sync(layer.close)())
