"""What comes of exporting a broker's definitions and importing them, there or elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest

from channels_rabbitmq._broker import topology as _topology
from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.declared import exchanges, group_bindings, queues, until_expired
from tests.support.members import reconnect
from tools.private_broker import BrokerFailed, PrivateBroker

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]


async def import_definitions(broker: PrivateBroker, file: str) -> None:
    """As an operator does. From 4.0 on it fails for the exclusive queue, and imports the rest."""
    with contextlib.suppress(BrokerFailed) if broker.version >= (4,) else contextlib.nullcontext():
        await asyncio.to_thread(broker.ctl, "import_definitions", file)


@pytest.mark.parametrize("has_reconnected", [False, True])
async def test_nothing_stays_of_a_process_that_was_connected_at_the_export(
    open_layer: OpenLayer,
    private_broker: PrivateBroker,
    monkeypatch: pytest.MonkeyPatch,
    has_reconnected: bool,
) -> None:
    monkeypatch.setattr(_topology, "LEASE", 5.0)
    layer = await open_layer(host=private_broker.url)
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    if has_reconnected:
        await reconnect(layer)
        await layer.group_add("g", channel)
    file = f"{private_broker.folder}/definitions.json"
    await asyncio.to_thread(private_broker.ctl, "export_definitions", file)
    await layer.close()
    assert await exchanges(private_broker) == set()

    await import_definitions(private_broker, file)
    assert await group_bindings(private_broker, "g") != []
    for lease in await queues(private_broker):
        await until_expired(private_broker, lease)
    assert await exchanges(private_broker) == set()
    assert await group_bindings(private_broker, "g") == []
