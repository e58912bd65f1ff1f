"""``CarehareConnection``: what ``carehare_connection`` gives to users."""

from __future__ import annotations

import asyncio
from typing import Any

import carehare

from .._amqp.connection import Connection
from .._amqp.methods import Exchange, Queue
from .._futures import fail, resolve
from .channels import UserChannels
from .consumer import AckingConsumer


class CarehareConnection(carehare.Connection):
    """A ``carehare.Connection`` on top of an open ``Connection`` of ours.

    Each public method is overridden and works as carehare documents it, also where carehare 1.0
    doesn't: a cancelled caller harms no other, a call on a closed connection is refused, and one
    that finds no free AMQP channel waits for one.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__(str(connection.url))
        self._connection = connection
        self._channels = UserChannels(connection.protocol)
        # The users' own: they may cancel it.
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        connection.closed.add_done_callback(self._on_closed)

    def __repr__(self) -> str:
        return repr(self._connection)

    def _on_closed(self, closed: asyncio.Future[Exception | None]) -> None:
        reason = closed.result()
        if reason is None:
            resolve(self._closed, None)
        else:
            fail(self._closed, reason)

    async def connect(self) -> None:
        """Do nothing: it is connected."""

    async def __aenter__(self) -> CarehareConnection:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @property
    def closed(self) -> asyncio.Future[None]:
        """Done when the connection is closed; with an exception unless it was by ``close``."""
        return self._closed

    async def close(self) -> None:
        """Close it: see ``Connection.close``."""
        await self._connection.close()

    def acking_consumer(  # type: ignore[override]  # carehare's type isn't public
        self, queue_name: str, *, prefetch_size: int = 0, prefetch_count: int = 1
    ) -> AckingConsumer:
        return self._channels.acking_consumer(
            queue_name, prefetch_size=prefetch_size, prefetch_count=prefetch_count
        )

    def publish(
        self, message: bytes, *, exchange_name: str = "", routing_key: str = ""
    ) -> asyncio.Future[None]:
        return self._channels.publish(message, exchange_name=exchange_name, routing_key=routing_key)

    def exchange_declare(
        self,
        exchange_name: str,
        *,
        exchange_type: str = "direct",
        passive: bool = False,
        durable: bool = False,
        auto_delete: bool = False,
        internal: bool = False,
        arguments: dict[str, Any] | None = None,
    ) -> asyncio.Future[None]:
        return self._channels.rpc(
            Exchange.Declare(
                exchange=exchange_name,
                exchange_type=exchange_type,
                passive=passive,
                durable=durable,
                auto_delete=auto_delete,
                internal=internal,
                nowait=True,
                arguments=arguments,
            )
        )

    def queue_bind(
        self,
        queue_name: str,
        exchange_name: str,
        *,
        routing_key: str = "",
        arguments: dict[str, Any] | None = None,
    ) -> asyncio.Future[None]:
        return self._channels.rpc(
            Queue.Bind(
                queue=queue_name,
                exchange=exchange_name,
                routing_key=routing_key,
                nowait=True,
                arguments=arguments,
            )
        )

    def queue_declare(
        self,
        queue_name: str,
        *,
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = False,
        arguments: dict[str, Any] | None = None,
    ) -> asyncio.Future[None]:
        return self._channels.rpc(
            Queue.Declare(
                queue=queue_name,
                passive=passive,
                durable=durable,
                exclusive=exclusive,
                auto_delete=auto_delete,
                nowait=True,
                arguments=arguments,
            )
        )

    def queue_unbind(
        self,
        queue_name: str,
        exchange_name: str,
        *,
        routing_key: str = "",
        arguments: dict[str, Any] | None = None,
    ) -> asyncio.Future[None]:
        return self._channels.rpc(  # It has no ``nowait``.
            Queue.Unbind(
                queue=queue_name,
                exchange=exchange_name,
                routing_key=routing_key,
                arguments=arguments,
            ),
            answer=Queue.UnbindOk,
        )
