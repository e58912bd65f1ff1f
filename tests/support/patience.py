"""Connecting where a test's limits are short: those are for what it is about, not for its start."""

from __future__ import annotations

import asyncio
import contextlib

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable


async def connect_patiently(layer: RabbitmqChannelLayer) -> None:
    """Connect, on however busy a machine and however short ``operation_timeout`` is."""
    is_connected = False
    while not is_connected:
        with contextlib.suppress(BrokerUnavailable):
            await layer.connect()
            is_connected = True
        await asyncio.sleep(0.01)  # once there was an outage, it raises at once
