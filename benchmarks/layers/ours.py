"""This project's channel layer."""

from __future__ import annotations

from typing import Any

from benchmarks.model import EXCHANGES, OURS

TITLE = "channels_rabbitmq (this)"
REQUIREMENTS = None  # The project's own environment has it.
PACKAGES = ("channels_rabbitmq", "carehare", "pamqp", "msgpack", "channels", "asgiref")
SERVER = "rabbitmq"
NEEDS_LOOP = False


def make_layer(url: str, capacity: int | None) -> Any:
    from channels_rabbitmq.core import RabbitmqChannelLayer

    options = ("local_capacity", "remote_capacity", "capacity") if capacity is not None else ()
    return RabbitmqChannelLayer(
        host=url,
        groups_exchange=EXCHANGES[OURS],
        normal_channels=True,
        **dict.fromkeys(options, capacity),
    )


async def close_layer(layer: Any) -> None:
    await layer.close()
