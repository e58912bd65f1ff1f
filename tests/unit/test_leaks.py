"""The guard finds what a test leaves behind, and nothing else."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tests.support.leaks import LoopWatch, new_sockets, open_sockets, unclosed_resources


@pytest.fixture
async def watch() -> LoopWatch:
    return LoopWatch()


async def test_nothing_left(watch: LoopWatch) -> None:
    task = asyncio.create_task(asyncio.sleep(0))
    listener = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1")
    reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
    await reader.read()
    await task
    writer.close()
    listener.close()
    assert await watch.left_behind() == []


async def test_task_is_found_and_cancelled(watch: LoopWatch) -> None:
    task = asyncio.create_task(asyncio.Event().wait(), name="forgotten")
    [problem] = await watch.left_behind()
    assert problem.startswith("task still there: <Task pending name='forgotten'")
    assert task.cancelled()


async def test_socket_is_found() -> None:
    watch = LoopWatch(socket_grace=0.02)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert await watch.left_behind() == [
            f"socket still open: 127.0.0.1:{port}, not connected",
        ]


async def test_errors_that_the_loop_would_log_are_found(watch: LoopWatch) -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    task = asyncio.create_task(fail())
    await asyncio.wait([task])
    del task
    asyncio.get_running_loop().call_soon([].pop)
    problems = await watch.left_behind()
    assert len(problems) == 2
    assert "Task exception was never retrieved: ZeroDivisionError()" in problems[0]
    assert problems[1].endswith("IndexError('pop from empty list')")


def test_unclosed_socket_in_a_cycle_is_found() -> None:
    before = open_sockets()
    cycle: list[object] = [socket.create_server(("127.0.0.1", 0))]
    cycle.append(cycle)
    assert len(new_sockets(before)) == 1
    del cycle
    [problem] = unclosed_resources()
    assert problem.startswith("ResourceWarning: unclosed <socket.socket")
    assert new_sockets(before) == []
