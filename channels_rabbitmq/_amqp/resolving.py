"""Find the addresses of a host, also if the name server is away, without holding up other callers.

A look-up can't be cancelled, and takes up to half a minute if no name server answers. So it runs in
a thread of ours (see ``_threads``), one at a time for each host.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any, NamedTuple

from .._futures import run_until
from .._threads import call_once

# The name server, or the way to it, has failed. All other errors are answers of the name server.
_NO_ANSWER = (socket.EAI_AGAIN, socket.EAI_FAIL)


class Address(NamedTuple):
    """Where to connect to, in the form of the module ``socket``."""

    family: int
    socket_address: tuple[Any, ...]


async def resolve(host: str, port: int, deadline: float) -> list[Address]:
    """Return the addresses of a host, without duplicates. ``host`` is a name or an IP address.

    Raises OSError, or TimeoutError at ``deadline`` (loop time); their texts name the host.
    """
    literal = _read_literal(host, port)
    if literal is not None:
        return [literal]
    try:
        found = await run_until(deadline, call_once("look-up", host, lambda: _look_up(host)))
    except socket.gaierror as err:
        if err.errno in _NO_ANSWER:
            raise OSError(f"no answer from the name server about the host {host} ({err})") from None
        raise OSError(f"the name server knows no address of the host {host} ({err})") from None
    except TimeoutError:
        raise TimeoutError(f"no answer from the name server about the host {host}") from None
    if not found:
        raise OSError(f"the name server knows no address of the host {host}")
    # A link-local address has its zone twice: in its text, and as a number behind the text.
    return [
        Address(family, (address[0].partition("%")[0], port, *address[2:]))
        for family, address in dict.fromkeys(found)
    ]


def _look_up(host: str) -> list[tuple[int, Any]]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [(family, address) for family, _, _, _, address in found]


def _read_literal(host: str, port: int) -> Address | None:
    """Return the address if ``host`` is an IP address, which needs no look-up; else None."""
    text, _, zone = host.partition("%")
    try:
        version = ipaddress.ip_address(text).version
    except ValueError:
        return None
    if version == 4:
        return Address(socket.AF_INET, (text, port))
    index = 0
    if zone:
        index = int(zone) if zone.isdigit() else socket.if_nametoindex(zone)
    return Address(socket.AF_INET6, (text, port, 0, index))
