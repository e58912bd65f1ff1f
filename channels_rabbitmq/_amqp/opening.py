"""Open a ``Protocol`` from a URL: addresses, TCP, TLS, the AMQP handshake.

The addresses of a host race until one attempt has done all these steps. A load balancer or a frozen
broker that accepts connections and says nothing is no better than an address that swallows packets.
The winner starts first in the next race, so a process waits for a dead address only once.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable

import carehare

from .protocol import Protocol
from .racing import Race
from .resolving import Address, resolve
from .tls import Tls, explain, explain_end, read_tls
from .url import BrokerUrl

# When a server that hasn't greeted is provoked to say what it is: so many seconds before the
# deadline, but at most this share of the time before it.
_PROVOKE_BEFORE = 0.5
_PROVOKE_SHARE = 0.2
# The address that won last, by host and port, for hosts with several addresses.
last_winners: dict[tuple[str, int], Address] = {}
_MOST_HOSTS = 1000

# Makes a protocol from ``Tls.problem``.
MakeProtocol = Callable[[str], Protocol]


async def open_protocol(
    url: BrokerUrl,
    ssl_context: ssl.SSLContext | None,
    make_protocol: MakeProtocol,
    deadline: float,
    *,
    on_answer: Callable[[], None],
) -> Protocol:
    """Connect, log in, and open the virtual host, by ``deadline`` (loop time).

    ``on_answer`` is called when a server has accepted a connection. Raises OSError (TimeoutError
    and ssl.SSLError are such) or an exception of carehare's. If this raises or is cancelled, no
    socket is left open.
    """
    begun_at = asyncio.get_running_loop().time()
    addresses = await resolve(url.host, url.port, deadline)
    last = last_winners.get((url.host, url.port))
    addresses.sort(key=lambda address: address != last)
    tls = None
    if url.tls:
        tls = Tls(ssl_context) if ssl_context is not None else await read_tls(url, deadline)
    provoke_at = deadline - min(_PROVOKE_BEFORE, _PROVOKE_SHARE * (deadline - begun_at))
    race = Race(
        [
            _Attempt(address, url, tls, make_protocol, provoke_at, on_answer)
            for address in addresses
        ],
        # A broker that refuses the login or the virtual host does so at each address.
        final=(carehare.ConnectionClosedByServer,),
    )
    try:
        winner = await race.run(deadline)
    except TimeoutError as err:
        if err.args:
            raise  # It comes from an attempt and has a text.
        seen = [*(attempt.silence for attempt in race.unfinished), *map(str, race.errors)]
        within = f"no answer from {url} within {round(deadline - begun_at, 2):g} s"
        raise TimeoutError(": ".join([within, *dict.fromkeys(filter(None, seen))])) from None
    if len(addresses) > 1:
        _remember(url, winner.address)
    assert winner.protocol is not None
    return winner.protocol


def _remember(url: BrokerUrl, winner: Address) -> None:
    if len(last_winners) >= _MOST_HOSTS:
        last_winners.clear()
    last_winners[url.host, url.port] = winner


class _Attempt:
    """One attempt to open a ``Protocol``, at one address."""

    def __init__(
        self,
        address: Address,
        url: BrokerUrl,
        tls: Tls | None,
        make_protocol: MakeProtocol,
        provoke_at: float,
        on_answer: Callable[[], None],
    ) -> None:
        self.address = address
        self._url = url
        self._tls = tls
        self._tls_problem = tls.problem if tls else ""
        self._make = make_protocol
        self._provoke_at = provoke_at
        self._on_answer = on_answer
        self.protocol: Protocol | None = None
        self.has_answered = False

    async def run(self) -> None:
        """Open ``protocol``; leave no socket open if that fails."""
        tcp = socket.socket(self.address.family, socket.SOCK_STREAM)
        try:
            tcp.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(tcp, self.address.socket_address)
            self.has_answered = True
            self._on_answer()
            await self._shake_hands(tcp)
        finally:
            if self.protocol is None:  # Otherwise the protocol's transport owns the socket.
                tcp.close()

    async def _shake_hands(self, tcp: socket.socket) -> None:
        opened = False
        try:
            protocol = await self._start(tcp)
            loop = asyncio.get_running_loop()
            provoking = loop.call_at(self._provoke_at, protocol.provoke)
            # `await protocol.open` would cancel the protocol's own future if it is cancelled.
            await asyncio.wait([protocol.open])
            provoking.cancel()
            protocol.open.result()
            opened = True
        finally:
            if not opened:
                self.abort()

    async def _start(self, tcp: socket.socket) -> Protocol:
        """Return the protocol when it can write, which is after the TLS handshake."""
        url = self._url
        context = self._tls.context if self._tls else None
        try:
            _, protocol = await asyncio.get_running_loop().create_connection(
                self._make_protocol,
                sock=tcp,
                ssl=context,
                server_hostname=(url.server_name_indication or url.host) if context else None,
            )
        except ssl.SSLError as err:
            raise explain(err, self._tls_problem) from None
        except ConnectionError as err:
            raise explain_end(err, tls=url.tls, problem=self._tls_problem) from None
        return protocol

    def _make_protocol(self) -> Protocol:
        self.protocol = self._make(self._tls_problem)
        return self.protocol

    def abort(self) -> None:
        if self.protocol is not None and self.protocol.is_connected:
            with contextlib.suppress(RuntimeError):  # The event loop is closed.
                self.protocol.abort()

    @property
    def silence(self) -> str:
        """The step after which the server was silent, in words; "" if no server was there."""
        if not self.has_answered:
            return ""
        if self.protocol is not None and self.protocol.is_greeted:
            return "RabbitMQ greeted, and then said nothing"
        if self._tls is not None and not (self.protocol and self.protocol.is_connected):
            return "it accepts connections, and doesn't answer to TLS (is it the port for amqp://?)"
        return "it accepts connections, and doesn't greet as RabbitMQ does (is it Redis, say?)"
