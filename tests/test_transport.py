"""CoalescingTransport: one write a turn, in order, and nothing after the end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from channels_rabbitmq._amqp.transport import CoalescingTransport


class FakeTransport(asyncio.Transport):
    """Notes what is done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[Any] = []

    def write(self, data: Any) -> None:
        self.done.append(data)

    def is_closing(self) -> bool:
        return "close" in self.done or "abort" in self.done

    def close(self) -> None:
        self.done.append("close")

    def abort(self) -> None:
        self.done.append("abort")


@pytest.fixture
def below() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
async def transport(below: FakeTransport) -> CoalescingTransport:
    return CoalescingTransport(below)


async def turn() -> None:
    await asyncio.sleep(0)  # lets what was scheduled before run


async def test_all_of_one_turn_is_one_write(
    transport: CoalescingTransport, below: FakeTransport
) -> None:
    for data in (b"a", b"b", b"c"):
        transport.write(data)
    assert below.done == []
    await turn()
    assert below.done == [b"abc"]


async def test_each_turn_has_its_write(
    transport: CoalescingTransport, below: FakeTransport
) -> None:
    transport.write(b"a")
    await turn()
    await turn()
    transport.write(b"b")
    transport.write(b"c")
    await turn()
    assert below.done == [b"a", b"bc"]


async def test_close_writes_what_is_left(
    transport: CoalescingTransport, below: FakeTransport
) -> None:
    transport.write(b"a")
    transport.write(b"b")
    transport.close()
    await turn()
    assert below.done == [b"ab", "close"]


async def test_abort_drops_what_is_left(
    transport: CoalescingTransport, below: FakeTransport
) -> None:
    transport.write(b"a")
    transport.abort()
    await turn()
    assert below.done == ["abort"]


@pytest.mark.parametrize("end", ["close", "abort"])
async def test_nothing_is_written_after_the_end(
    transport: CoalescingTransport, below: FakeTransport, end: str
) -> None:
    """asyncio would warn "socket.send() raised exception"."""
    getattr(transport, end)()
    transport.write(b"late")
    await turn()
    assert below.done == [end]


async def test_transport_that_was_lost_gets_nothing(
    transport: CoalescingTransport, below: FakeTransport
) -> None:
    transport.write(b"a")
    below.abort()  # the network's doing
    await turn()
    assert below.done == ["abort"]
