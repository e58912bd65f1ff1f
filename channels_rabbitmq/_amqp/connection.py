"""``Connection``: carehare's, with a time limit on everything, and the layer's AMQP channels."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

import carehare

from .._waiting import run_until
from .amqp_channels import ConsumerChannel, PublisherChannel, TopologyChannel
from .protocol import FAREWELL_TIMEOUT, Protocol
from .url import BrokerUrl


def _ssl_context_of(url: BrokerUrl) -> ssl.SSLContext:
    """Return the TLS settings that an ``amqps://`` URL asks for.

    Made for each connection, so that files which were renewed are read.
    """
    for path in filter(None, (url.cacertfile, url.certfile, url.keyfile)):
        with open(path, "rb"):
            pass  # so that the error for a missing file names it, which ssl's doesn't
    context = ssl.create_default_context(cafile=url.cacertfile)
    if url.certfile is not None:
        try:
            # Without a way to ask, OpenSSL would ask for a passphrase on the terminal.
            context.load_cert_chain(url.certfile, url.keyfile, password=_have_no_passphrase)
        except (ssl.SSLError, OSError) as err:
            files = f"{url.certfile} and {url.keyfile or 'the key in it'}"
            raise ssl.SSLError(f"no pair of a certificate and its key: {files} ({err})") from None
    if not url.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _have_no_passphrase() -> str:
    raise OSError("the key is encrypted, and there is no way to give its passphrase")


async def _resolve(url: BrokerUrl) -> list[tuple[Any, ...]]:
    """Return what ``getaddrinfo`` does."""
    with contextlib.suppress(socket.gaierror):
        # An address needs no look-up, nor a thread for it.
        return socket.getaddrinfo(
            url.host, url.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    loop = asyncio.get_running_loop()
    try:
        return await loop.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    except RuntimeError:
        if threading.main_thread().is_alive():
            raise
        # Once the main thread has ended there are no executors. Other threads may go on for long,
        # and would rather wait here than not at all.
        return socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)


class Connection(carehare.Connection):
    """A ``carehare.Connection`` of the layer's.

    All of carehare's methods work as documented there. ``connection_name`` is what operators see
    in RabbitMQ's lists. ``on_blocked`` is called with the broker's reason when it stops reading
    from publishers (an alarm), and with None when it goes on; the broker says so only to a
    connection that has published since.
    """

    _protocol: Protocol

    def __init__(
        self,
        url: BrokerUrl,
        *,
        ssl_context: ssl.SSLContext | None = None,
        connection_name: str = "channels_rabbitmq",
    ) -> None:
        super().__init__(str(url))
        self._broker_url = url
        self._ssl_context = ssl_context
        self._connection_name = connection_name
        self.on_blocked: Callable[[str | None], None] = lambda reason: None

    def __repr__(self) -> str:
        return f"<Connection {self._connection_name!r} to {self._broker_url}>"

    async def connect(self, deadline: float | None = None) -> None:
        """Connect, log in, and open the virtual host, by ``deadline`` (loop time) if there is one.

        Every address of the host name is tried in turn, each for an equal share of what is left of
        the time, so that one which doesn't answer leaves some to the others. Whatever ends it, no
        socket is left open unless it returns. Raises OSError (TimeoutError is one), ssl.SSLError
        or an exception of carehare's.
        """
        url = self._broker_url
        loop = asyncio.get_running_loop()
        addresses = await _resolve(url)
        for untried, (family, _, _, _, address) in zip(
            range(len(addresses), 0, -1), addresses, strict=True
        ):
            attempt = self._connect_to(str(address[0]), family)
            try:
                if deadline is None:
                    return await attempt
                now = loop.time()
                return await run_until(now + (deadline - now) / untried, attempt)
            except asyncio.CancelledError:
                if self.is_open:  # since this very moment: run_until() lets go of the result
                    self._protocol.abort()
                raise
            except carehare.ConnectionClosedByServer:
                raise  # It refused, in words, and so will the others: login, virtual host.
            except Exception:
                if untried == 1:
                    raise
        raise OSError(f"The host name {url.host} has no address")

    async def _connect_to(self, address: str, family: int) -> None:
        url = self._broker_url
        context = (self._ssl_context or _ssl_context_of(url)) if url.tls else None
        protocol: Protocol | None = None

        def make_protocol() -> Protocol:
            nonlocal protocol
            protocol = Protocol(
                url,
                connection_name=self._connection_name,
                on_blocked=lambda reason: self.on_blocked(reason),
            )
            return protocol

        opened = False
        try:
            await asyncio.get_running_loop().create_connection(
                make_protocol,
                address,
                url.port,
                family=family,
                ssl=context,
                server_hostname=(url.server_name_indication or url.host) if context else None,
            )
            assert protocol is not None
            # Not `await protocol.open`: cancelling that would cancel the protocol's own future.
            await asyncio.wait([protocol.open])
            protocol.open.result()
            self._protocol = protocol
            opened = True
        finally:
            if not opened and protocol is not None and hasattr(protocol, "_transport"):
                protocol.abort()

    async def close(self) -> None:
        """Say goodbye to the broker and close; may be called at any time, any number of times.

        Takes a second at most: a broker that doesn't answer is left alone then. Raises nothing.
        Cancelling it closes the socket at once.
        """
        if not hasattr(self, "_protocol"):
            return
        protocol = self._protocol
        try:
            protocol.send_close_if_allowed()
            await asyncio.wait([protocol.ended], timeout=FAREWELL_TIMEOUT)
        finally:
            protocol.abort()

    @property
    def is_open(self) -> bool:
        """Whether messages can be written: connected, and nobody has said goodbye since."""
        return hasattr(self, "_protocol") and self._protocol.can_write

    @property
    def ended(self) -> asyncio.Future[Exception | None]:
        """Done when the connection has ended, with the reason, None if it was ``close``.

        For the layer itself, which never cancels it; ``closed`` is the users'.
        """
        return self._protocol.ended

    def open_consumer(
        self,
        *,
        on_delivery: Callable[[bytes, int, ConsumerChannel], None],
        on_end: Callable[[Exception], None],
    ) -> ConsumerChannel:
        """Return a new AMQP channel that declares and consumes."""
        protocol = self._protocol
        return protocol.add_channel(
            lambda amqp_channel_id: ConsumerChannel(
                protocol, amqp_channel_id, on_delivery=on_delivery, on_end=on_end
            )
        )

    def open_topology(self) -> TopologyChannel:
        """Return a new AMQP channel that binds and unbinds."""
        protocol = self._protocol
        return protocol.add_channel(
            lambda amqp_channel_id: TopologyChannel(protocol, amqp_channel_id)
        )

    def open_publisher(self, *, on_end: Callable[[Exception], None]) -> PublisherChannel:
        """Return a new AMQP channel that publishes."""
        protocol = self._protocol
        return protocol.add_channel(
            lambda amqp_channel_id: PublisherChannel(protocol, amqp_channel_id, on_end=on_end)
        )
