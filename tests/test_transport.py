"""CoalescingTransport: one write a turn, in order, and nothing after the end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from channels_rabbitmq._amqp.transport import HIGH_WATER, CoalescingTransport


class FakeTransport(asyncio.Transport):
    """Notes what is done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[Any] = []

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == HIGH_WATER

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


async def test_what_is_written_now_waits_for_nothing(
    transport: CoalescingTransport, below: FakeTransport
) -> None:
    transport.write_now((b"a",))
    assert below.done == [b"a"]
    transport.write(b"b")
    transport.write_now((b"c", b"d"))  # behind what waits
    assert below.done == [b"a"]
    await turn()
    assert below.done == [b"a", b"bcd"]
    transport.write_now((b"e", b"f"))
    assert below.done == [b"a", b"bcd", b"ef"]
    below.close()
    transport.write_now((b"g",))
    assert below.done == [b"a", b"bcd", b"ef", "close"]


async def test_what_is_written_last_is_made_then(
    transport: CoalescingTransport, below: FakeTransport
) -> None:
    collected = [b"1"]
    transport.write_last(lambda: b"".join(collected))
    transport.write(b"a")
    collected.append(b"2")
    await turn()
    assert below.done == [b"a12"]
    transport.write_last(lambda: b"alone")
    await turn()
    assert below.done == [b"a12", b"alone"]


async def test_those_who_were_woken_write_in_their_own_turn(
    transport: CoalescingTransport, below: FakeTransport
) -> None:
    loop = asyncio.get_running_loop()
    loop.call_soon(transport.write, b"a")
    loop.call_soon(transport.write_last, lambda: b"last")
    transport.flush_soon()
    transport.flush_soon()
    await turn()
    assert below.done == [b"alast"]
    transport.flush_soon()
    await turn()
    assert below.done == [b"alast"]  # There was nothing.


async def test_a_write_in_the_wrong_thread_keeps_nobody_else_from_writing(
    transport: CoalescingTransport, below: FakeTransport
) -> None:
    loop = asyncio.get_running_loop()
    loop.set_debug(True)  # else nobody notices
    try:
        with pytest.raises(RuntimeError):
            await asyncio.to_thread(transport.write, b"wrong")
        transport.write(b"right")
        await turn()
    finally:
        loop.set_debug(False)
    assert below.done == [b"right"]


async def test_nothing_to_write_last_is_no_write(
    transport: CoalescingTransport, below: FakeTransport
) -> None:
    transport.write_last(bytes)
    await turn()
    assert below.done == []


async def test_what_is_written_meanwhile_waits_for_the_next_turn(
    transport: CoalescingTransport, below: FakeTransport
) -> None:
    def make() -> bytes:
        transport.write(b"next")
        return b"last"

    transport.write_last(make)
    await turn()
    await turn()
    assert below.done == [b"last", b"next"]


@pytest.mark.parametrize("end", ["close", "abort", "lost"])
async def test_what_is_written_last_at_the_end(
    transport: CoalescingTransport, below: FakeTransport, end: str
) -> None:
    transport.write_last(lambda: b"last")
    if end == "close":
        transport.close()
    elif end == "abort":
        transport.abort()
    else:
        below.abort()
    await turn()
    assert below.done == ([b"last", "close"] if end == "close" else ["abort"])


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


# Room


def soon() -> float:
    return asyncio.get_running_loop().time() + 10


async def test_it_is_full_until_a_turns_writes_have_gone_out(
    transport: CoalescingTransport,
) -> None:
    transport.write(b"x" * (HIGH_WATER - 1))
    assert not transport.is_full()
    transport.write(b"x")
    assert transport.is_full()
    assert await transport.wait_writable(1, soon())
    assert not transport.is_full()


async def test_it_is_full_while_asyncios_buffer_is(transport: CoalescingTransport) -> None:
    transport.pause()
    waiting = asyncio.create_task(transport.wait_writable(1, soon()))
    await turn()
    assert not waiting.done()
    transport.resume()
    assert await waiting


async def test_who_waits_in_vain_is_told_at_his_deadline(transport: CoalescingTransport) -> None:
    transport.pause()
    assert not await transport.wait_writable(1, asyncio.get_running_loop().time() + 0.01)
    transport.resume()
    assert await transport.wait_writable(1, soon())


async def test_those_who_wait_write_in_their_order_as_much_as_there_is_room_for(
    transport: CoalescingTransport, below: FakeTransport
) -> None:
    async def write(data: bytes) -> None:
        assert await transport.wait_writable(len(data), soon())
        transport.write(data)

    transport.pause()
    half = HIGH_WATER // 2
    writing = [asyncio.create_task(write(bytes([n]) * half)) for n in range(6)]
    await turn()
    writing[2].cancel()
    transport.resume()
    await asyncio.wait(writing)
    await turn()
    assert max(map(len, below.done)) == 2 * half
    written = b"".join(below.done)
    assert written[::half] == bytes([0, 1, 3, 4, 5])


async def test_the_one_who_was_let_through_and_is_cancelled_lets_the_next_one_through(
    transport: CoalescingTransport,
) -> None:
    transport.pause()
    waiting = [asyncio.create_task(transport.wait_writable(1, soon())) for _ in range(3)]
    await turn()
    transport.resume()
    waiting[0].cancel()
    assert await waiting[1]
    assert await waiting[2]
