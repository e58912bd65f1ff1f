"""Certificate files: when they are read and by whom, and what is told if one is no good."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from channels_rabbitmq._amqp import tls
from channels_rabbitmq._amqp.connection import Connection
from channels_rabbitmq._amqp.url import BrokerUrl
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.amqp_peer import Client, ScriptedBroker
from tests.support.certificates import Authority
from tests.support.log_lines import log_lines


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def serve(client: Client) -> None:
    await client.greet()
    await client.answer()


@pytest.fixture
async def start_server(tmp_path: Path) -> AsyncIterator[Callable[[str], Awaitable[ScriptedBroker]]]:
    """Starts a broker that shows the certificate of this name, and wants none."""
    brokers: list[tuple[ScriptedBroker, asyncio.Server]] = []

    async def start(name: str) -> ScriptedBroker:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(tmp_path / f"{name}.pem", tmp_path / f"{name}-key.pem")
        broker = ScriptedBroker(serve)
        server = await asyncio.start_server(
            broker.on_connect, "127.0.0.1", broker.port, ssl=context
        )
        brokers.append((broker, server))
        return broker

    yield start
    for broker, server in brokers:
        server.close()
        await broker.end()


def url(port: int, **files: Path) -> str:
    query = "&".join(f"{name}={quote(str(path))}" for name, path in files.items())
    return f"amqps://guest:guest@127.0.0.1:{port}?{query}"


async def connect(url: str, limit: float = 10.0) -> None:
    connection = Connection(BrokerUrl.parse(url))
    await connection.connect(asyncio.get_running_loop().time() + limit)
    await connection.close()


# Files


async def test_renewed_files_are_read(
    authority: Authority, tmp_path: Path, start_server: Any
) -> None:
    authority.make("server")
    broker = await start_server("server")
    ca = tmp_path / "the-ca.pem"
    ca.write_bytes(authority.make("somebody").read_bytes())
    for _ in range(2):
        with pytest.raises(ssl.SSLCertVerificationError):
            await connect(url(broker.port, cacertfile=ca))
    shutil.copy(tmp_path / "ca.pem", ca)
    await connect(url(broker.port, cacertfile=ca))


async def test_files_are_read_in_a_thread_of_ours(
    authority: Authority, tmp_path: Path, start_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority.make("server")
    broker = await start_server("server")
    readers: list[threading.Thread] = []
    make = tls.make_tls

    def note(url: BrokerUrl) -> tls.Tls:
        readers.append(threading.current_thread())
        return make(url)

    monkeypatch.setattr(tls, "make_tls", note)
    for _ in range(2):
        await connect(url(broker.port, cacertfile=tmp_path / "ca.pem"))
    assert [(one.name, one.daemon) for one in readers] == [("channels_rabbitmq files", True)] * 2


async def test_files_that_cannot_be_read_in_time(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a network file system that hangs: nobody else waits, and one thread is enough."""
    released = threading.Event()
    readers: list[threading.Thread] = []

    def hang(url: BrokerUrl) -> tls.Tls:
        readers.append(threading.current_thread())
        released.wait(60)
        return tls.Tls(ssl.create_default_context())

    monkeypatch.setattr(tls, "make_tls", hang)
    for _ in range(3):
        with pytest.raises(TimeoutError, match=r"files for TLS can't be read in time: /.*/ca\.pem"):
            await connect(url(1, cacertfile=tmp_path / "ca.pem"), 0.05)
    released.set()
    (reader,) = readers
    reader.join(10)


# What is wrong with them


async def told(url: str) -> str:
    """Return why there is no connection."""
    with pytest.raises(OSError, match=r".") as caught:
        await connect(url)
    return str(caught.value)


async def test_a_pair_that_does_not_match(authority: Authority, tmp_path: Path) -> None:
    client, other = authority.make("client"), authority.make("other")
    key = other.with_name("other-key.pem")
    text = await told(url(1, cacertfile=tmp_path / "ca.pem", certfile=client, keyfile=key))
    assert text.startswith(
        f"no pair of a certificate and its key: {client} and {key} ([X509: KEY_VALUES_MISMATCH]"
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cacertfile": "missing.pem"}, "[Errno 2] No such file or directory: '{}/missing.pem'"),
        ({"cacertfile": "."}, "[Errno 21] Is a directory: '{}'"),
        ({"cacertfile": "client-key.pem"}, "no certificate of a CA in {}/client-key.pem ("),
        ({"cacertfile": "empty.pem"}, "no certificate of a CA in {}/empty.pem ("),
        (
            {"certfile": "client.pem"},
            "no pair of a certificate and its key: {0}/client.pem and the key in it (",
        ),
        (
            {"certfile": "empty.pem", "keyfile": "client-key.pem"},
            "no pair of a certificate and its key: {0}/empty.pem and {0}/client-key.pem (",
        ),
    ],
)
async def test_files_that_are_no_good(
    authority: Authority, tmp_path: Path, options: dict[str, str], text: str
) -> None:
    authority.make("client")
    (tmp_path / "empty.pem").touch()
    files = {"cacertfile": "ca.pem", **options}
    text_told = await told(url(1, **{name: tmp_path / file for name, file in files.items()}))
    assert text_told.startswith(text.format(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere such a path may be forbidden")
async def test_files_at_a_path_that_is_not_utf_8(
    authority: Authority, tmp_path: Path, start_server: Any
) -> None:
    authority.make("server")
    broker = await start_server("server")
    start = f"amqps://guest:guest@127.0.0.1:{broker.port}?cacertfile={quote(str(tmp_path))}"
    assert "No such file or directory" in await told(f"{start}/caf%E9.pem")
    shutil.copy(tmp_path / "ca.pem", os.fsencode(tmp_path) + b"/caf\xe9.pem")
    for name in ("caf%E9.pem", "caf\udce9.pem"):  # The second one is as os.environ has it.
        await connect(f"{start}/{name}")


@pytest.mark.parametrize("days", [(-3, -1), (1, 3)])
async def test_a_server_whose_time_is_over_or_not_yet(
    authority: Authority, tmp_path: Path, start_server: Any, days: tuple[float, float]
) -> None:
    authority.make("server", days=days)
    broker = await start_server("server")
    layer = RabbitmqChannelLayer(
        host=url(broker.port, cacertfile=tmp_path / "ca.pem"), operation_timeout=0.5
    )
    word = "has expired" if days[0] < 0 else "is not yet valid"
    text = f"TLS certificate refused: certificate {word}"
    with log_lines() as lines:
        with pytest.raises(BrokerUnavailable, match=text):
            await layer.group_send("g", {"type": "t"})
        await layer.close()
        (line,) = [line for line in lines.rest() if line.startswith("WARNING")]
    assert text in line


# Our own


@pytest.mark.parametrize(
    ("days", "problem"), [((-9, -1), "has expired"), ((1, 9), "isn't valid yet"), ((-1, 1), "")]
)
def test_the_dates_of_a_certificate(
    authority: Authority, days: tuple[float, float], problem: str
) -> None:
    path = authority.make("client", days=days)
    found = tls.problem_of(str(path))
    assert found == (problem and f"the client certificate in {path} {problem}")


def test_the_dates_of_what_is_no_certificate(tmp_path: Path) -> None:
    """It is only for an explanation, and never a problem of its own."""
    path = tmp_path / "client.pem"
    for content in ("", "x", "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"):
        path.write_text(content)
        assert tls.problem_of(str(path)) == ""
    assert tls.problem_of(str(tmp_path / "missing.pem")) == ""
