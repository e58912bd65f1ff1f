"""``await layer.carehare_connection`` gives a connection that works on the loop that asks."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from asgiref.sync import async_to_sync, sync_to_async
from channels.layers import get_channel_layer
from named import call_by_name

layer: Any = get_channel_layer()


async def use() -> int:
    """Put a job into a queue and get it out again; return which connection did it."""
    connection = await layer.carehare_connection
    queue = f"test-{secrets.token_hex(8)}"
    await connection.queue_declare(queue, exclusive=True)
    await connection.publish(b"a job", routing_key=queue)
    async with connection.acking_consumer(queue) as consumer:
        async for job in consumer:
            assert job == b"a job"
            break
    assert connection is await layer.carehare_connection
    return id(connection)


def by_async_to_sync() -> None:
    """Opened for the call and closed with it."""
    for _ in range(2):
        async_to_sync(use)()


def by_asyncio_run() -> None:
    async def main() -> None:
        assert await use() == await use()

    for _ in range(2):
        asyncio.run(main())


def in_threads_beside_a_loop() -> None:
    """The running loop's, another loop's, and that of sync code, all at the same time."""

    async def main() -> None:
        mine = await use()
        assert await sync_to_async(async_to_sync(use))() == mine  # it runs on this loop
        others = [
            # Made there: an old asgiref remembers the loop on which that happened.
            await asyncio.to_thread(lambda: async_to_sync(use)()),
            await asyncio.to_thread(lambda: asyncio.run(use())),
        ]
        assert mine not in others
        assert await use() == mine

    asyncio.run(main())


def on_uvloop() -> None:
    import uvloop

    uvloop.run(use())


if __name__ == "__main__":
    call_by_name(globals())
