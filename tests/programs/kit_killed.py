"""A run that is killed in a test. Its leases last a second, not twenty."""

from __future__ import annotations

import os
import signal
from typing import Any

import django

django.setup()

from channels.layers import get_channel_layer  # noqa: E402 (Django has to be set up)

from channels_rabbitmq._broker import topology  # noqa: E402 (as above)
from channels_rabbitmq.testing import exchange_of  # noqa: E402 (as above)

topology.LEASE = 1.0


async def test_something() -> None:
    layer: Any = get_channel_layer()
    await layer.group_add("room", await layer.new_channel())
    await layer.group_send("room", {"type": "n"})
    print(f"exchange: {exchange_of(layer)}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
