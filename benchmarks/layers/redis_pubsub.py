"""channels_redis, its second layer: Redis' publish and subscribe. It has no capacity."""

from __future__ import annotations

from typing import Any

from . import WEBSITE

TITLE = "channels_redis pubsub"
REQUIREMENTS = ("channels_redis", "hiredis", *WEBSITE)
PACKAGES = ("channels_redis", "redis", "hiredis", "msgpack", "channels", "asgiref")
SERVER = "redis"
NEEDS_LOOP = False


def make_layer(url: str, capacity: int | None) -> Any:
    from channels_redis.pubsub import RedisPubSubChannelLayer

    return RedisPubSubChannelLayer(hosts=[url])


async def close_layer(layer: Any) -> None:
    await layer.flush()
