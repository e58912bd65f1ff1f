"""``Keeper``: has RabbitMQ delete a test run's exchange when the run ends, however it ends.

The exchange is declared as auto-delete: RabbitMQ deletes it with its last binding. The first of its
bindings is that of an exclusive queue which nothing uses. RabbitMQ deletes that queue when the
keeper's connection ends, also after ``kill -9``. What layers have bound goes with their own
connections, or with their leases, 20 seconds later. (Without the first binding the exchange would
go whenever a test ends, and a layer would declare it again, not as auto-delete.)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterable
from dataclasses import replace

import carehare

from .._amqp.connection import Connection
from .._amqp.methods import Exchange, Method, Queue
from .._broker.shared import Shared
from .._broker.supervisor import Supervisor
from .._futures import wait_all
from .._identity import new_id
from .._settings.settings import Settings

# Seconds after which a broker that doesn't answer counts as not there.
LONGEST_LOOK = 5.0
_KEY_OF_NO_MESSAGE = "!kept"  # No group's name holds a "!".
_TIMEOUT = 2.0


class Keeper:
    """Keeps the groups exchange of ``settings``. To be used on one event loop."""

    name = "test_run"

    def __init__(self, settings: Settings) -> None:
        self._exchange = settings.groups_exchange
        self._id = new_id()
        self._number = 0
        timeout = min(LONGEST_LOOK, settings.connect_timeout, settings.operation_timeout)
        settings = replace(settings, connect_timeout=timeout, operation_timeout=timeout)
        self._timeout = timeout
        self._supervisor = Supervisor(self, settings, id_=self._id, shared=Shared())

    async def open(self) -> None:
        """Connect. Raises BrokerUnavailable as soon as every URL was tried once in vain."""
        deadline = asyncio.get_running_loop().time() + self._timeout
        try:
            await self._supervisor.wait_tried(deadline)
        except BaseException:
            self._supervisor.close()
            raise

    async def set_up(self, connection: Connection) -> None:
        """Declare the exchange, and bind the queue that keeps it."""
        self._number += 1
        queue = f"{self._id}.{self._number}"
        amqp_channel = self._amqp_channel = connection.open_topology()
        # It exists, and isn't auto-delete, if RabbitMQ was restarted and a layer was faster.
        with contextlib.suppress(carehare.ChannelClosedByServer):
            await amqp_channel.call(
                Exchange.Declare(exchange=self._exchange, exchange_type="direct", auto_delete=True)
            )
        await amqp_channel.call(Queue.Declare(queue=queue, exclusive=True))
        await amqp_channel.call(
            Queue.Bind(queue=queue, exchange=self._exchange, routing_key=_KEY_OF_NO_MESSAGE)
        )

    def on_ready(self) -> None:
        pass

    def on_lost(self, reason: str) -> None:
        pass

    async def delete(self, queues: Iterable[str]) -> set[str]:
        """Delete these queues; return those that are left, empty, since somebody consumes them.

        Raises BrokerUnavailable if there is no connection.
        """
        await self._supervisor.wait_ready(self._deadline())
        answers = {
            queue: self._amqp_channel.call(Queue.Delete(queue=queue, if_unused=True))
            for queue in queues
        }
        await self._wait(answers.values())
        left = {queue for queue, answer in answers.items() if _is_refused(answer)}
        await self._wait([self._amqp_channel.call(Queue.Purge(queue=queue)) for queue in left])
        return left

    async def close(self, queues: Iterable[str]) -> None:
        """Delete the exchange and these queues, and disconnect."""
        commands: list[Method] = [Queue.Delete(queue=queue) for queue in queues]
        commands.append(Exchange.Delete(exchange=self._exchange))
        with contextlib.suppress(carehare.ConnectionClosed):
            await self._wait([self._amqp_channel.call(command) for command in commands])
        self._supervisor.close()
        await self._supervisor.wait_closed()

    async def _wait(self, answers: Collection[asyncio.Future[None]]) -> None:
        await wait_all(answers, self._deadline())

    @staticmethod
    def _deadline() -> float:
        return asyncio.get_running_loop().time() + _TIMEOUT


def _is_refused(answer: asyncio.Future[None]) -> bool:
    return answer.done() and isinstance(answer.exception(), carehare.ChannelClosedByServer)
