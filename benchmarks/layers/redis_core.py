"""channels_redis, its first layer: queues in Redis."""

from __future__ import annotations

from typing import Any

TITLE = "channels_redis core"
REQUIREMENTS = ("channels_redis", "hiredis")
PACKAGES = ("channels_redis", "redis", "hiredis", "msgpack", "channels", "asgiref")
SERVER = "redis"
NEEDS_LOOP = False


def make_layer(url: str, capacity: int) -> Any:
    from channels_redis.core import RedisChannelLayer

    return RedisChannelLayer(hosts=[url], capacity=capacity)


async def close_layer(layer: Any) -> None:
    await layer.close_pools()
