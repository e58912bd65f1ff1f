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
    transport.write_at_flush(lambda: b"".join(collected))
    transport.write(b"a")
    collected.append(b"2")
    await turn()
    assert below.done == [b"a12"]
    transport.write_at_flush(lambda: b"alone")
    await turn()
    assert below.done == [b"a12", b"alone"]


async def test_those_who_were_woken_write_in_their_own_turn(
    transport: CoalescingTransport, below: FakeTransport
) -> None:
    loop = asyncio.get_running_loop()
    loop.call_soon(transport.write, b"a")
    loop.call_soon(transport.write_at_flush, lambda: b"last")
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


async def test_nothing_to_write_at_flush_is_no_write(
    transport: CoalescingTransport, below: FakeTransport
) -> None:
    transport.write_at_flush(bytes)
    await turn()
    assert below.done == []


async def test_what_is_written_meanwhile_waits_for_the_next_turn(
    transport: CoalescingTransport, below: FakeTransport
) -> None:
    def make() -> bytes:
        transport.write(b"next")
        return b"last"

    transport.write_at_flush(make)
    await turn()
    await turn()
    assert below.done == [b"last", b"next"]


@pytest.mark.parametrize("end", ["close", "abort", "lost"])
async def test_what_is_written_last_at_the_end(
    transport: CoalescingTransport, below: FakeTransport, end: str
) -> None:
    transport.write_at_flush(lambda: b"last")
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


async def test_it_is_full_until_a_turns_writes_have_gone_out(
    transport: CoalescingTransport,
) -> None:
    transport.write(b"x" * (HIGH_WATER - 1))
    assert not transport.is_full()
    transport.write(b"x")
    assert transport.is_full()
    await turn()
    assert not transport.is_full()


async def test_it_is_full_while_asyncios_buffer_is(transport: CoalescingTransport) -> None:
    told: list[bool] = []
    transport.pause()
    assert transport.is_full()
    transport.call_when_writable(lambda: told.append(transport.is_full()))
    await turn()
    assert told == []
    transport.resume()
    assert told == [False]
    transport.pause()
    transport.resume()
    assert told == [False]  # once


async def test_a_writer_that_is_told_of_room_writes_as_much_as_there_is_room_for(
    transport: CoalescingTransport, below: FakeTransport
) -> None:
    half = HIGH_WATER // 2
    waiting = [bytes([n]) * half for n in range(5)]

    def write() -> None:
        while waiting and not transport.is_full():
            transport.write(waiting.pop(0))
        if waiting:
            transport.call_when_writable(write)

    write()
    for _ in range(4):
        await turn()
    assert list(map(len, below.done)) == [2 * half, 2 * half, half]
    assert b"".join(below.done)[::half] == bytes(range(5))


async def test_asyncios_buffer_that_fills_with_a_flush_is_no_room(
    transport: CoalescingTransport, below: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    monkeypatch.setattr(below, "write", lambda data: transport.pause())
    transport.write(b"x" * HIGH_WATER)
    transport.call_when_writable(lambda: told.append(True))
    await turn()
    assert told == []
    transport.resume()
    assert told == [True]
