"""The handshake of a connection (AMQP 0-9-1, section 2.2.4), without I/O.

The client names the connection, logs in by user name and password, agrees on limits and on
heartbeats, and opens the virtual host.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from typing import Any

import carehare
from pamqp.commands import Connection

from .errors import COMMAND_INVALID, SYNTAX_ERROR, ProtocolError
from .methods import Method
from .url import BrokerUrl

# AMQP 0-9-1, section 4.2.3: what every peer can take.
_SMALLEST_FRAME_MAX = 4096

# Characters. RabbitMQ's initial_frame_max, which holds for user name and password, is 4096 bytes up
# to 4.0, and 8192 since; a token as the password may exceed it.
_LONG_CREDENTIALS = 3000

# What the broker says in the handshake, in this order.
_ORDER: tuple[type, ...] = (Connection.Start, Connection.Tune, Connection.OpenOk)

# What the client understands beyond AMQP 0-9-1.
_CAPABILITIES: Any = {
    "authentication_failure_close": True,
    "basic.nack": True,
    "connection.blocked": True,
    "consumer_cancel_notify": True,
    "publisher_confirms": True,
}


class Handshake:
    """Answers what the broker says; holds what was agreed on once the broker has said Tune."""

    def __init__(self, url: BrokerUrl, connection_name: str) -> None:
        self._url = url
        self._connection_name = connection_name
        self._order = iter(_ORDER)
        self.server_properties: Mapping[str, object] = {}
        self.server_version: tuple[int, ...] = ()  # as (4, 0), if the broker says it
        self.frame_max = 0  # bytes; 0: no limit
        self.channel_max = 0  # 0: no limit
        self.heartbeat = 0  # seconds; 0: no heartbeats

    def check_turn(self, frame: Any) -> None:
        """Raise ProtocolError if this isn't what the broker has to say next."""
        if type(frame) is not next(self._order, None):
            raise ProtocolError(COMMAND_INVALID, f"RabbitMQ sent {frame.name} out of turn")

    def answer_start(self, frame: Connection.Start) -> Method:
        """Return the login."""
        self.check_turn(frame)
        self.server_properties = frame.server_properties or {}
        version = re.match(r"(\d{1,4})\.(\d{1,4})", str(self.server_properties.get("version")))
        self.server_version = tuple(map(int, version.groups())) if version else ()
        if "PLAIN" not in (frame.mechanisms or "").split():
            raise carehare.ConnectionClosed("RabbitMQ offers no login by name and password (PLAIN)")
        return Connection.StartOk(
            client_properties={
                "product": "channels_rabbitmq",
                "platform": f"{platform.python_implementation()} {platform.python_version()}",
                "connection_name": self._connection_name,
                "capabilities": _CAPABILITIES,
            },
            mechanism="PLAIN",
            response=f"\0{self._url.username}\0{self._url.password}",
        )

    def answer_tune(self, frame: Connection.Tune) -> tuple[Method, Method]:
        """Return the agreed limits, and the virtual host to open."""
        self.check_turn(frame)
        url = self._url
        # frame_max is echoed: RabbitMQ 4.1 refuses a client that asks for less than 8192.
        self.frame_max = frame.frame_max or 0
        if 0 < self.frame_max < _SMALLEST_FRAME_MAX:
            raise ProtocolError(SYNTAX_ERROR, f"RabbitMQ asked for a frame_max of {self.frame_max}")
        self.channel_max = _least(frame.channel_max or 0, url.channel_max or 0)
        self.heartbeat = _least(frame.heartbeat or 0, url.heartbeat) if url.heartbeat else 0
        tune_ok = Connection.TuneOk(
            channel_max=self.channel_max, frame_max=self.frame_max, heartbeat=self.heartbeat
        )
        return tune_ok, Connection.Open(virtual_host=url.virtual_host)

    def explain_end(self, exc: Exception | None) -> carehare.ConnectionClosed:
        """Return why the broker may have ended the connection meanwhile; ``exc`` is asyncio's."""
        # RabbitMQ says nothing about a frame that is too large.
        hint = ""
        if len(self._url.username) + len(self._url.password) > _LONG_CREDENTIALS:
            hint = ": user name and password may be too long for its initial_frame_max"
        told = f" ({exc})" if exc else ""
        return carehare.ConnectionClosed(
            f"RabbitMQ ended the connection during the login{hint}{told}"
        )


def _least(ours: int, theirs: int) -> int:
    """Return the smaller of two limits, where 0 stands for none."""
    return min(ours, theirs) if ours and theirs else ours or theirs
