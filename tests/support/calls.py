"""All calls of a layer that need a connection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from channels_rabbitmq.core import RabbitmqChannelLayer

Call = Callable[[RabbitmqChannelLayer, str], Awaitable[Any]]


MESSAGE = {"type": "test"}


async def _carehare_connection(layer: RabbitmqChannelLayer, channel: str) -> object:
    return await layer.carehare_connection


CALLS: dict[str, Call] = {
    "send": lambda layer, channel: layer.send("crq.aaaaaaaaaaaaaaaa!x", MESSAGE),
    "send to a channel of one's own": lambda layer, channel: layer.send(channel, MESSAGE),
    "group_send": lambda layer, channel: layer.group_send("nobody", MESSAGE),
    "group_send with members here": lambda layer, channel: layer.group_send("g", MESSAGE),
    "group_add": lambda layer, channel: layer.group_add("new", channel),
    "carehare_connection": _carehare_connection,
    "connect": lambda layer, channel: layer.connect(),
    "connect, fail fast": lambda layer, channel: layer.connect(fail_fast=True),
}
