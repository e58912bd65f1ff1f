"""Whatever answers at the port is named, also if its words come in pieces."""

from __future__ import annotations

import ssl

import carehare
import pytest

from channels_rabbitmq._amqp import greeting, opening
from channels_rabbitmq._amqp.connection import Connection
from channels_rabbitmq._amqp.url import BrokerUrl
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.amqp_peer import START, Client, Peer, marshal, scripted_broker
from tests.support.deadlines import soon
from tests.support.fake_servers import closing_server, fake_server
from tests.support.log_lines import log_lines

TLS = "not RabbitMQ but TLS answers there: the URL must start with amqps://"
ANSWERS = {
    b"HTTP/1.1 400 Bad Request\r\nServer: nginx\r\n\r\n": "an HTTP server answers there: "
    "'HTTP/1.1 400 Bad Request'",
    b"<!DOCTYPE html>\n<html>": "an HTTP server answers there: '<!DOCTYPE html>'",
    b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03": "an HTTP/2 server answers there",
    b"AMQP\x00\x01\x00\x00": "a server of AMQP 1.0 (the layer speaks AMQP 0-9-1) answers there",
    b"AMQP\x03\x01\x00\x00": "a server of AMQP 1.0 (the layer speaks AMQP 0-9-1) answers there",
    b"AMQP\x01\x01\x00\x0a": "a server of AMQP 0-10 (the layer speaks AMQP 0-9-1) answers there",
    b"AMQP\x00\x00\x09\x01": "a server that sends back what it is sent answers there",
    b"-ERR unknown command 'AMQP'\r\n": "Redis answers there: \"-ERR unknown command 'AMQP'\"",
    b"SSH-2.0-OpenSSH_9.2p1\r\n": "an SSH server answers there: 'SSH-2.0-OpenSSH_9.2p1'",
    b"220 mail.example ESMTP\r\n": "a mail or FTP server answers there: '220 mail.example ESMTP'",
    b"ERROR\r\n": "a server of STOMP or memcached answers there: 'ERROR'",
    b"J\x00\x00\x00\x0a8.0.36\x00\x08\x00": "MySQL answers there: 'J???'",
    b"\xff\xfd\x18\xff\xfd\x20\xff\xfd\x23": "another service answers there: '????? ??#'",
    b"gr\xc3\xbc\xc3\x9fe!" + b"x" * 5000: "another service answers there: 'gr????e!xxx",
}


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
@pytest.mark.parametrize("pieces", [1, 4])
async def test_an_answer_that_is_not_rabbitmqs(answer: bytes, pieces: int) -> None:
    peer = Peer(is_open=False)
    size = -(-min(len(answer), 8) // pieces)
    for at in range(0, 8, size):
        assert peer.protocol._reads
        peer.protocol.data_received(answer[at : at + size] + answer[8:] * (at + size >= 8))
        if not peer.protocol._reads:
            break
    with pytest.raises(carehare.BadBytesFromServer) as caught:
        raise peer.protocol._reason or AssertionError("it goes on")
    if pieces == 1:
        assert f"not RabbitMQ but {ANSWERS[answer]}" in str(caught.value)
    assert str(caught.value).startswith("not RabbitMQ but ")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "alert", [b"\x15\x03\x01\x00\x02\x02\x46", b"\x15\x03\x03\x00\x02\x02\x0a"]
)
async def test_tls(alert: bytes) -> None:
    async with fake_server(answer=alert, close=True) as server:
        with pytest.raises(carehare.BadBytesFromServer, match=TLS):
            await connect(server.url)


async def connect(
    url: str, limit: float = 10.0, *, ssl_context: ssl.SSLContext | None = None
) -> None:
    connection = Connection(BrokerUrl.parse(url), ssl_context=ssl_context)
    await connection.connect(soon(limit))


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
@pytest.mark.parametrize("close", [True, False])
async def test_in_the_error_and_in_the_log(answer: bytes, close: bool) -> None:
    async with fake_server(answer=answer, close=close) as server:
        layer = RabbitmqChannelLayer(host=server.url)
        with log_lines() as lines:
            with pytest.raises(BrokerUnavailable, match="not RabbitMQ but"):
                await layer.connect(fail_fast=True)
            await layer.close()
            logged = lines.rest()
        await server.until_gone()
    warnings = [line for line in logged if line.startswith("WARNING")]
    assert len([line for line in warnings if "subscriber" in line]) == 1
    for line in warnings:
        assert ANSWERS[answer] in line
        assert "Traceback" not in line


async def test_a_few_bytes_and_the_end() -> None:
    async with fake_server(answer=b"no", close=True) as server:
        with pytest.raises(carehare.BadBytesFromServer, match="another service answers there"):
            await connect(server.url)


async def test_one_that_waits_for_the_end_of_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As some HTTP servers do: it is given one before the attempt is given up."""
    monkeypatch.setattr(opening, "_PROVOKE_BEFORE", 9.9)  # of 10 s
    monkeypatch.setattr(opening, "_PROVOKE_SHARE", 1.0)

    async def answer(client: Client) -> None:
        while await client._reader.read(1) != b"\n":
            pass
        client._writer.write(b"HTTP/1.0 400 Bad request\r\n")
        await client.hear_end()

    async with scripted_broker(answer) as server:
        with pytest.raises(carehare.BadBytesFromServer, match="an HTTP server answers there"):
            await connect(server.url)
        await server.until_gone()


async def test_one_that_says_nothing() -> None:
    async with fake_server() as server:
        with pytest.raises(TimeoutError, match="doesn't greet as RabbitMQ does"):
            await connect(server.url, 0.2)
        await server.until_gone()


async def test_one_that_says_nothing_to_tls() -> None:
    async with fake_server() as server:
        url = server.url.replace("amqp:", "amqps:")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # It takes a while to read CAs.
        with pytest.raises(TimeoutError, match="doesn't answer to TLS"):
            await connect(url, 0.3, ssl_context=context)
        await server.until_gone()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"AMQP\x00\x00\x09\x01"])
async def test_one_that_does_not_speak_tls(answer: bytes) -> None:
    async with fake_server(answer=answer, close=True) as server:
        url = server.url.replace("amqp:", "amqps:")
        with pytest.raises(OSError, match="what answers there doesn't speak TLS"):
            await connect(url)


@pytest.mark.parametrize("scheme", ["amqp", "amqps"])
async def test_one_that_closes_at_once(scheme: str) -> None:
    """A load balancer without a broker behind it."""
    async with closing_server() as server:
        url = server.url.replace("amqp:", f"{scheme}:")
        with pytest.raises(
            (carehare.ConnectionClosed, OSError),
            match=r"^the server ended the connection before it greeted as RabbitMQ does: ",
        ) as err:
            await connect(url)
    hint = "or this is another service, or a proxy that has no RabbitMQ behind it"
    assert hint in str(err.value)


async def test_rabbitmqs_greeting_in_single_bytes() -> None:
    peer = Peer(is_open=False)
    for byte in marshal(START):
        peer.protocol.data_received(bytes([byte]))
    assert peer.protocol.is_greeted
    assert peer.protocol._reads


def test_every_byte_that_rabbitmq_would_not_say_is_told_apart() -> None:
    for first in range(256):
        start = bytes([first]) + b"abcdefgh"
        assert greeting.is_rabbitmq(start) is False
        assert greeting.describe(start).isprintable()
    assert greeting.is_rabbitmq(b"\x01\x00\x00") is True
    for start in (b"", b"\x01", b"\x01\x00"):
        assert greeting.is_rabbitmq(start) is None
