"""The layer in processes that come from other processes: forks, spawns, Celery, gunicorn."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pika  # type: ignore[import-untyped]  # has no annotations
import pytest

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.programs.celery_app import configured
from tests.support.programs import FORKING_PYTHON, Programs

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]


class TestMultiprocessing:
    @pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
    @pytest.mark.parametrize("function", ["on_a_loop", "in_sync_code"])
    async def test_parent_and_children_go_on(
        self, programs: Programs, function: str, method: str
    ) -> None:
        parent = await programs.start("forks.py", function, method, python=FORKING_PYTHON)
        told = await parent.result()
        by_type = defaultdict(list)
        for message in told["seen"]:
            by_type[message["type"]].append(message)
        types = [message["type"] for message in told["seen"]]
        assert (types[0], *types[-2:]) == ("before", "after", "after.to.group")
        numbers = Counter(message["n"] for message in by_type["question"])
        assert numbers == dict.fromkeys(range(5), 3)  # three children
        children = {message["pid"] for message in by_type["done"]}
        assert len(children) == 3
        for message in by_type["done"]:
            assert message["heard"] == [f"answer.{number}" for number in range(5)]
        # Each process has connections of its own, and never lost one.
        for pid in (told["pid"], *children):
            assert programs.roles(pid) == {"publisher": 1, "subscriber": 1}
        # A child of multiprocessing ends without Python's own end: nobody closes anything there.
        await programs.assert_nothing_left(closed=False)

    async def test_parent_ends_and_child_goes_on(
        self, programs: Programs, open_layer: OpenLayer
    ) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        await layer.group_add("numbers", channel)
        program = await programs.start("forks.py", "daemonize", python=FORKING_PYTHON)
        error = await program.result()  # of both processes
        assert "another process" in error
        for expected in ("from.parent", "from.child"):
            message = await asyncio.wait_for(layer.receive(channel), 10)
            assert message == {"type": expected}
        assert programs.roles() == {"publisher": 2, "subscriber": 1}
        await programs.assert_nothing_left()

    async def test_forks_amid_the_calls_of_threads(self, programs: Programs) -> None:
        program = await programs.start(
            "forks.py", "while_threads_call", "10", python=FORKING_PYTHON
        )
        assert await program.result() == list(range(10))
        assert programs.roles(program.pid) == {"publisher": 1, "subscriber": 1}
        assert len({one.pid for one in programs.opened}) == 11
        await programs.assert_nothing_left(closed=False)


class TestCelery:
    @pytest.fixture
    async def queue(self, programs: Programs) -> AsyncIterator[str]:
        name = f"celery-{secrets.token_hex(8)}"
        yield name
        await asyncio.to_thread(delete_queue, programs.broker_url, name)

    @pytest.mark.slow
    async def test_tasks_of_a_prefork_worker(
        self, programs: Programs, open_layer: OpenLayer, queue: str, tmp_path: Path
    ) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        await layer.group_add("tasks", channel)
        variables = {"CELERY_BROKER": programs.broker_url, "CELERY_QUEUE": queue}
        worker = await programs.start(
            *("-m", "celery", "-A", "celery_app", "worker", "--loglevel", "INFO"),
            *("--pool", "prefork", "--concurrency", "2"),
            *("--without-gossip", "--without-mingle", "--without-heartbeat"),
            # Which it is in some containers.
            python=[*FORKING_PYTHON, "-W", "ignore:You're running the worker with superuser"],
            **variables,
        )
        await worker.printed(r"ready\.")
        # Two at a time, and neither ends without the other: so each child has one of them.
        by_child = defaultdict(list)
        for number in range(10):
            await asyncio.to_thread(send_tasks, programs.broker_url, queue, [number, str(tmp_path)])
            for _ in range(2):
                message = await asyncio.wait_for(layer.receive(channel), 10)
                assert message["type"] == "task"
                by_child[message["pid"]].append(message["n"])
        assert len(by_child) == 2
        for child, numbers in by_child.items():
            assert numbers == list(range(10))
            assert programs.roles(child) == {"publisher": 1}
        assert programs.roles(worker.pid) == {}
        assert await worker.stop() == 0
        worker.assert_quiet()
        await programs.assert_nothing_left(closed=False)


def send_tasks(url: str, queue: str, arguments: list[Any]) -> None:
    """Two tasks with the same arguments, as a project sends them."""
    with configured(url, queue) as client, client.connection_for_write() as connection:
        for _ in range(2):
            client.send_task("notify", arguments, queue=queue, connection=connection)


def delete_queue(url: str, name: str) -> None:
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        connection.channel().queue_delete(name)
