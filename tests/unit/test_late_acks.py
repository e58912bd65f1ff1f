"""Requests are acked together: after so many of them, or after a moment."""

from __future__ import annotations

import asyncio

from channels_rabbitmq._peers.late_acks import LONGEST, MOST, LateAcks
from tests.support.virtual_time import run


class Channel:
    def __init__(self) -> None:
        self.acked: list[int] = []

    def ack(self, delivery_tag: int) -> None:
        self.acked.append(delivery_tag)


def test_one_is_acked_after_a_moment() -> None:
    async def main() -> None:
        amqp_channel, acks = Channel(), LateAcks()
        acks.add(amqp_channel, 1)
        await asyncio.sleep(LONGEST / 2)
        acks.add(amqp_channel, 2)
        assert amqp_channel.acked == []
        await asyncio.sleep(LONGEST / 2 + 0.001)
        assert amqp_channel.acked == [1, 2]
        await asyncio.sleep(2 * LONGEST)
        assert amqp_channel.acked == [1, 2]

    run(main())


def test_many_are_acked_at_once() -> None:
    async def main() -> None:
        amqp_channel, acks = Channel(), LateAcks()
        for tag in range(1, MOST + 2):
            acks.add(amqp_channel, tag)
        assert amqp_channel.acked == list(range(1, MOST + 1))
        await asyncio.sleep(LONGEST + 0.001)
        assert amqp_channel.acked == list(range(1, MOST + 2))

    run(main())


def test_tags_of_a_lost_connection_are_not_acked_on_the_next_one() -> None:
    async def main() -> None:
        lost, current, acks = Channel(), Channel(), LateAcks()
        acks.add(lost, 7)
        acks.add(current, 1)
        await asyncio.sleep(LONGEST + 0.001)
        assert (lost.acked, current.acked) == ([], [1])
        acks.add(current, 2)
        acks.clear()
        await asyncio.sleep(LONGEST + 0.001)
        assert current.acked == [1]

    run(main())
