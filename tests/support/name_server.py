"""A name server of the test's own: host names, and which addresses they have."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

Answer = Callable[[], list[str]]


def serve_names(monkeypatch: pytest.MonkeyPatch, **answers: Answer) -> None:
    """Answer for ``NAME.test``, from now on; ``answers[NAME]()`` is called in the asking thread.

    It returns the addresses, or raises what ``getaddrinfo`` may. Other names are none of its
    business.
    """
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> list[Any]:
        name = host.removesuffix(".test") if isinstance(host, str) else ""
        if name not in answers:
            return real(host, port, *args, **options)
        return [
            found
            for address in answers[name]()
            for found in real(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
