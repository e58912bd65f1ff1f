"""A process of ``test_presence.py``: its channels join and leave a group, at random.

    python -m tests.programs.presence_member URL EXCHANGE GROUP CHANNELS SEED

Each line on standard output is a step, ``joined crq.x!specific.y 12345.678``: what was done or is
about to be done (joining, joined, leaving, left), to which channel, and when: by the monotonic
clock, which all processes of a machine share. The first line is ``id``. SIGTERM ends it in order
(``closing``). Without CHANNELS that move (0) one channel joins and stays.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time

from channels_rabbitmq.core import RabbitmqChannelLayer


def tell(step: str, channel: str) -> None:
    sys.stdout.write(f"{step} {channel} {time.monotonic()}\n")
    sys.stdout.flush()


async def join(layer: RabbitmqChannelLayer, group: str, channel: str) -> None:
    tell("joining", channel)
    await layer.group_add(group, channel, {"of": channel})
    tell("joined", channel)


async def join_and_leave(
    layer: RabbitmqChannelLayer, group: str, channel: str, chance: random.Random
) -> None:
    while True:
        await join(layer, group, channel)
        await asyncio.sleep(chance.expovariate(4))
        tell("leaving", channel)
        await layer.group_discard(group, channel)
        tell("left", channel)
        await asyncio.sleep(chance.expovariate(8))


async def main(url: str, exchange: str, group: str, channels: int, seed: int) -> None:
    layer = RabbitmqChannelLayer(host=url, groups_exchange=exchange)
    channel = await layer.new_channel()
    tell("id", channel.partition("!")[0])
    is_over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, is_over.set)
    chance = random.Random(seed)
    await join(layer, group, channel)  # This one stays.
    tasks = [
        asyncio.create_task(join_and_leave(layer, group, await layer.new_channel(), chance))
        for _ in range(channels)
    ]
    over = asyncio.create_task(is_over.wait())
    done, _ = await asyncio.wait([over, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    for task in tasks:
        task.cancel()
    tell("closing", "-")
    await layer.close()


if __name__ == "__main__":
    url, exchange, group, channels, seed = sys.argv[1:]
    asyncio.run(main(url, exchange, group, int(channels), int(seed)))
