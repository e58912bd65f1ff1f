"""``Connection``: from a URL to AMQP channels, with a time limit on everything."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Mapping
from time import time

from .binding import TopologyChannel
from .consuming import ConsumerChannel
from .heartbeat import Mark
from .on_demand import OnDemandChannel
from .opening import open_protocol
from .protocol import CLOSE_TIMEOUT, Protocol
from .publishing import PublisherChannel, Route
from .stages import Stage
from .url import BrokerUrl

# Seconds: the time limit if the caller sets none.
_LONGEST_CONNECT = 86400.0


class Connection:
    """A connection to one broker. Only ``connect`` opens anything.

    ``connection_name`` is what operators see in RabbitMQ's lists. ``on_blocked`` is called with the
    broker's reason when it stops reading from publishers (an alarm), and with None when it goes on;
    the broker says so only to a connection that has published since. ``on_stage`` is called as the
    attempt to connect goes on; addresses race, so not every stage need lead to the next one.
    """

    def __init__(
        self,
        url: BrokerUrl,
        *,
        ssl_context: ssl.SSLContext | None = None,
        connection_name: str = "channels_rabbitmq",
    ) -> None:
        self.url = url
        self._ssl_context = ssl_context
        self._connection_name = connection_name
        self._protocol: Protocol | None = None
        self._newest: Protocol | None = None  # of any attempt, whatever became of it
        self.has_answered = False  # a server has accepted the connection, perhaps the broker
        self.on_blocked: Callable[[str | None], None] = lambda reason: None
        self.on_stage: Callable[[Stage], None] = lambda stage: None

    def __repr__(self) -> str:
        return f"<Connection {self._connection_name!r} to {self.url}>"

    async def connect(self, deadline: float | None = None) -> None:
        """Connect, log in, and open the virtual host, by ``deadline`` (loop time) if there is one.

        The addresses of the host name race (see ``racing``), the one that worked the last time
        first. Raises OSError (TimeoutError is one), ssl.SSLError or an exception of carehare's.
        If it raises or is cancelled, no socket is left open.
        """
        if deadline is None:
            deadline = asyncio.get_running_loop().time() + _LONGEST_CONNECT
        self._protocol = await open_protocol(
            self.url,
            self._ssl_context,
            self._make_protocol,
            deadline,
            on_answer=self._on_answer,
        )

    def _on_answer(self) -> None:
        self.has_answered = True
        self.on_stage(Stage.TCP)

    def _make_protocol(self, tls_problem: str) -> Protocol:
        self._newest = Protocol(
            self.url,
            connection_name=self._connection_name,
            on_blocked=lambda reason: self.on_blocked(reason),
            on_stage=self.on_stage,
            tls_problem=tls_problem,
        )
        return self._newest

    async def close(self) -> None:
        """Close the connection in order; may be called at any time, any number of times.

        Takes a second at most: then the socket is closed on a broker that doesn't answer. Raises
        nothing. Cancelled, it closes the socket at once.
        """
        if self._protocol is None:
            return
        try:
            self._protocol.send_close()
            await asyncio.wait([self._protocol.closed], timeout=CLOSE_TIMEOUT)
        finally:
            self.abort()

    def abort(self) -> None:
        """Close the socket at once, without a word to the broker. Raises nothing."""
        if self._protocol is not None:
            with contextlib.suppress(RuntimeError):  # The event loop is closed.
                self._protocol.abort()

    @property
    def is_open(self) -> bool:
        """Whether messages can be written: neither side has begun to close the connection."""
        return self._protocol is not None and self._protocol.is_open

    @property
    def protocol(self) -> Protocol:
        """The ``ChannelHost`` for AMQP channels, once it is connected."""
        assert self._protocol is not None, "it was connected before"
        return self._protocol

    @property
    def server_version(self) -> tuple[int, ...]:
        """The broker's, as ``(4, 0)``; empty if it doesn't say."""
        return self.protocol.handshake.server_version

    @property
    def server_properties(self) -> Mapping[str, object]:
        """What the broker says of itself: "product", "version", "cluster_name" and others.

        For an attempt that has failed, it is what the last address has said, if it said anything.
        """
        return {} if self._newest is None else self._newest.handshake.server_properties

    @property
    def tls(self) -> ssl.SSLObject | None:
        """What was agreed on with the broker, also if an attempt has failed since; or None."""
        protocol = self._newest
        return None if protocol is None or not protocol.is_connected else protocol.transport.tls

    @property
    def closed(self) -> asyncio.Future[Exception | None]:
        """Done when the connection is closed, with the reason, None if it was by ``close``.

        Nobody may cancel it.
        """
        return self.protocol.closed

    def open_consumer(
        self,
        *,
        on_delivery: Callable[[bytes, int, int, ConsumerChannel], None],
        on_end: Callable[[Exception], None],
    ) -> ConsumerChannel:
        """Return a new AMQP channel that declares and consumes."""
        protocol = self.protocol
        return protocol.add_channel(
            lambda amqp_channel_id: ConsumerChannel(
                protocol, amqp_channel_id, on_delivery=on_delivery, on_end=on_end
            )
        )

    def open_on_demand(
        self,
        *,
        on_delivery: Callable[[str, bytes, int, OnDemandChannel], None],
        on_cancelled: Callable[[str], None],
        on_end: Callable[[Exception, OnDemandChannel], None],
    ) -> OnDemandChannel:
        """Return a new AMQP channel with consumers that come and go."""
        protocol = self.protocol
        return protocol.add_channel(
            lambda amqp_channel_id: OnDemandChannel(
                protocol,
                amqp_channel_id,
                on_delivery=on_delivery,
                on_cancelled=on_cancelled,
                on_end=on_end,
            )
        )

    def open_topology(self) -> TopologyChannel:
        """Return a new AMQP channel that binds and unbinds."""
        protocol = self.protocol
        return protocol.add_channel(
            lambda amqp_channel_id: TopologyChannel(protocol, amqp_channel_id)
        )

    def open_publisher(
        self, *, on_end: Callable[[Exception], None], ping_route: Route | None = None
    ) -> PublisherChannel:
        """Return a new AMQP channel that publishes."""
        protocol = self.protocol
        return protocol.add_channel(
            lambda amqp_channel_id: PublisherChannel(
                protocol, amqp_channel_id, on_end=on_end, ping_route=ping_route
            )
        )

    # Half-dead

    @property
    def has_heartbeats(self) -> bool:
        return self.protocol.heartbeat.has_heartbeats

    def is_usable(self) -> bool:
        """Return whether it is open, and nothing that the broker sent may say otherwise."""
        protocol = self.protocol
        if not protocol.is_open or protocol.is_being_read:
            return False
        return time() < protocol.heartbeat.fresh_until or (
            protocol.is_all_read() and protocol.is_open
        )

    @property
    def stood_still(self) -> float:
        """Seconds for which its event loop has not run. From any thread."""
        return self.protocol.heartbeat.late_by

    def shut_down(self) -> None:
        """Have the system close it; its event loop hears of that when it runs. From any thread."""
        self.protocol.transport.shut_down()

    async def read_first(self) -> None:
        """Have the loop read what came while it stood still; if it is closed, wait for that."""
        self.protocol.read_first()
        while self.protocol.is_being_read:  # noqa: ASYNC110 - a few turns of the loop
            await asyncio.sleep(0)
        if not self.is_open:
            await asyncio.wait([self.closed])

    def mark(self) -> Mark:
        """Return a mark for ``is_overdue``: the wait for an answer begins now."""
        return self.protocol.heartbeat.mark()

    def is_overdue(self, mark: Mark) -> bool:
        """Whether an answer awaited since ``mark`` won't come any more: see ``heartbeat``."""
        return self.protocol.heartbeat.is_overdue(mark)
