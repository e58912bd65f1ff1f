"""This project's channel layer."""

from __future__ import annotations

from typing import Any

from model import EXCHANGES, OURS

TITLE = "channels_rabbitmq (this)"
REQUIREMENTS = None  # The project's own environment has it.
PACKAGES = ("channels_rabbitmq", "carehare", "pamqp", "msgpack", "channels", "asgiref")
SERVER = "rabbitmq"
NEEDS_LOOP = False


def make_layer(url: str, capacity: int) -> Any:
    from channels_rabbitmq.core import RabbitmqChannelLayer

    return RabbitmqChannelLayer(
        host=url,
        local_capacity=capacity,
        remote_capacity=capacity,
        capacity=capacity,
        groups_exchange=EXCHANGES[OURS],
    )


async def close_layer(layer: Any) -> None:
    await layer.close()
