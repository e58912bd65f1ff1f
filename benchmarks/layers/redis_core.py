"""channels_redis, its first layer: queues in Redis."""

from __future__ import annotations

from typing import Any

from . import WEBSITE

TITLE = "channels_redis core"
REQUIREMENTS = ("channels_redis", "hiredis", *WEBSITE)
PACKAGES = ("channels_redis", "redis", "hiredis", "msgpack", "channels", "asgiref")
SERVER = "redis"
NEEDS_LOOP = False


def make_layer(url: str, capacity: int | None) -> Any:
    from channels_redis.core import RedisChannelLayer

    options = {"capacity": capacity} if capacity is not None else {}
    return RedisChannelLayer(hosts=[url], **options)


async def close_layer(layer: Any) -> None:
    await layer.close_pools()
