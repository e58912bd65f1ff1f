"""channels_rabbitmq 4.0.1, the last release before this project's."""

from __future__ import annotations

from typing import Any

from benchmarks.model import EXCHANGES, OLD

from . import WEBSITE

TITLE = "channels_rabbitmq 4.0.1"
# Channels up to the newest with which it was tried: 4.0.1 itself is not maintained.
REQUIREMENTS = ("channels_rabbitmq==4.0.1", "carehare==1.0.2", "channels<4.4", *WEBSITE)
PACKAGES = ("channels_rabbitmq", "carehare", "pamqp", "msgpack", "channels", "asgiref")
SERVER = "rabbitmq"
NEEDS_LOOP = True  # It looks for the running loop when it is made.


def make_layer(url: str, capacity: int | None) -> Any:
    from channels_rabbitmq.core import RabbitmqChannelLayer

    options = ("local_capacity", "remote_capacity") if capacity is not None else ()
    return RabbitmqChannelLayer(
        host=url, groups_exchange=EXCHANGES[OLD], **dict.fromkeys(options, capacity)
    )


async def close_layer(layer: Any) -> None:
    await layer.close()
