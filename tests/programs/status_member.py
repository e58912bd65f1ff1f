"""A process of ``test_status.py``: one consumer, that may be stuck.

    python -m tests.programs.status_member URL EXCHANGE {idle,stuck}

Prints the name of its channel, which is in the group "room", when others can ask it. The end of its
input ends it.
"""

from __future__ import annotations

import asyncio
import sys

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.consumers import StuckConsumer


async def main(url: str, exchange: str, kind: str) -> None:
    layer = RabbitmqChannelLayer(host=url, groups_exchange=exchange)
    await layer.connect()
    consumer = StuckConsumer(layer, await layer.new_channel())
    await layer.group_add("room", consumer.channel_name)
    task = asyncio.create_task(consumer())
    if kind == "stuck":
        for _ in range(5):
            await layer.send(consumer.channel_name, {"type": "x"})
    print(consumer.channel_name, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    task.cancel()
    await asyncio.wait([task])
    await layer.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
