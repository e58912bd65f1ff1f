"""What a connection's socket says."""

from __future__ import annotations

from typing import Any

from channels_rabbitmq._amqp.connection import Connection


def socket_of(connection: Connection) -> Any:
    return _extra_info(connection, "socket")


def address_of(connection: Connection) -> str:
    """The other side's."""
    return str(_extra_info(connection, "peername")[0])


def _extra_info(connection: Connection, name: str) -> Any:
    return connection.protocol.transport._transport.get_extra_info(name)
