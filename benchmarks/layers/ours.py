"""This project's channel layer."""

from __future__ import annotations

from typing import Any

TITLE = "channels_rabbitmq (this)"
REQUIREMENTS = None  # The project's own environment has it.
PACKAGES = ("channels_rabbitmq", "carehare", "pamqp", "msgpack", "channels", "asgiref")
SERVER = "rabbitmq"


async def open_layer(url: str, capacity: int) -> Any:
    from channels_rabbitmq.core import RabbitmqChannelLayer

    return RabbitmqChannelLayer(
        host=url,
        local_capacity=capacity,
        remote_capacity=capacity,
        capacity=capacity,
        groups_exchange="benchmark-ours",
    )


async def close_layer(layer: Any) -> None:
    await layer.close()
