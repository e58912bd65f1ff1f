"""channels_rabbitmq 4.0.1, the last release before this project's."""

from __future__ import annotations

from typing import Any

TITLE = "channels_rabbitmq 4.0.1"
# Channels up to the newest with which it was tried: 4.0.1 itself is not maintained.
REQUIREMENTS = ("channels_rabbitmq==4.0.1", "carehare==1.0.2", "channels<4.4")
PACKAGES = ("channels_rabbitmq", "carehare", "pamqp", "msgpack", "channels", "asgiref")
SERVER = "rabbitmq"


async def open_layer(url: str, capacity: int) -> Any:
    from channels_rabbitmq.core import RabbitmqChannelLayer

    return RabbitmqChannelLayer(
        host=url,
        local_capacity=capacity,
        remote_capacity=capacity,
        groups_exchange="benchmark-4",
    )


async def close_layer(layer: Any) -> None:
    await layer.close()
