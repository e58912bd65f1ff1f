"""The queues of normal channels, as another program sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import pika  # type: ignore[import-untyped]  # has no annotations
import pika.exceptions  # type: ignore[import-untyped]  # as above

T = TypeVar("T")


async def on_amqp_channel(url: str, do: Callable[[Any], T]) -> T:
    """Do something on an AMQP channel of a connection of its own."""

    def run() -> T:
        with pika.BlockingConnection(pika.URLParameters(url)) as connection:
            return do(connection.channel())

    return await asyncio.to_thread(run)


def queue_of(groups_exchange: str, channel: str) -> str:
    return f"crq.channel.{groups_exchange}:{channel}"


async def delete_queue(url: str, queue: str) -> None:
    await on_amqp_channel(url, lambda amqp_channel: amqp_channel.queue_delete(queue))


async def ready_messages(url: str, queue: str) -> int:
    """How many wait in a queue, which must exist, without a consumer."""

    def count(amqp_channel: Any) -> int:
        return int(amqp_channel.queue_declare(queue, passive=True).method.message_count)

    return await on_amqp_channel(url, count)


async def until_ready(url: str, queue: str, messages: int) -> None:
    while await ready_messages(url, queue) != messages:  # noqa: ASYNC110 - no queue tells it
        await asyncio.sleep(0.01)


async def consumers(url: str, queue: str) -> int:
    def count(amqp_channel: Any) -> int:
        return int(amqp_channel.queue_declare(queue, passive=True).method.consumer_count)

    return await on_amqp_channel(url, count)
