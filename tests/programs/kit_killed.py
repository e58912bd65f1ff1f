"""Tests that are killed, or whose child is. Leases last a second, not twenty."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import django

django.setup()

from channels.layers import get_channel_layer  # noqa: E402 (Django has to be set up)

from channels_rabbitmq._broker import topology  # noqa: E402 (as above)
from channels_rabbitmq.testing import exchange_of  # noqa: E402 (as above)

topology.LEASE = 1.0


async def _use_and_die() -> None:
    layer: Any = get_channel_layer()
    await layer.group_add("room", await layer.new_channel())
    await layer.group_send("room", {"type": "n"})
    print(f"exchange: {exchange_of(layer)}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


async def test_a_run() -> None:
    await _use_and_die()


def test_a_child() -> None:
    """Its parent never uses the layer."""
    pid = os.fork()
    if not pid:
        asyncio.run(_use_and_die())
    assert os.waitpid(pid, 0) == (pid, signal.SIGKILL)
