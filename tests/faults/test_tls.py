"""TLS to a real broker: who is trusted, what is said when somebody isn't, and that all works."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.brokers import broker_commands
from tests.support.log_lines import log_lines
from tests.support.programs import without_slowness
from tools.private_broker import PrivateBroker, TlsFiles

pytestmark = pytest.mark.slow  # two brokers start

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

GROUP = "g"
LARGE = {"type": "large", "data": bytes(range(256)) * 4096}  # 1 MiB
MESSAGE = {"type": "small"}


@pytest.fixture(scope="module")
def server(rabbitmq: None, certs: Path) -> Iterator[PrivateBroker]:
    """Shows its certificate, and asks for none."""
    with PrivateBroker(broker_commands(), tls=TlsFiles.in_folder(certs)) as server:
        yield server


@pytest.fixture(scope="module")
def mutual_server(rabbitmq: None, certs: Path) -> Iterator[PrivateBroker]:
    """Shows its certificate, and wants to see the client's."""
    with PrivateBroker(broker_commands(), tls=TlsFiles.in_folder(certs, mutual=True)) as server:
        yield server


def context(certs: Path, ca: str = "ca", client: str | None = None) -> ssl.SSLContext:
    """As the manual has it."""
    context = ssl.create_default_context(cafile=certs / f"{ca}.pem")
    if client is not None:
        context.load_cert_chain(certs / f"{client}.pem", certs / f"{client}-key.pem")
    return context


def query(certs: Path, ca: str = "ca", client: str | None = None) -> str:
    """The same in a URL."""
    query = f"?cacertfile={quote(str(certs / ca))}.pem"
    if client is not None:
        file = quote(str(certs / client))
        query += f"&certfile={file}.pem&keyfile={file}-key.pem"
    return query


async def receive(layer: RabbitmqChannelLayer, channel: str) -> dict[str, Any]:
    """Receive, with a limit so that a lost message fails here and not at the test's limit."""
    return await asyncio.wait_for(layer.receive(channel), 20)


async def must_work(layer: RabbitmqChannelLayer) -> None:
    channel = await layer.new_channel()
    await layer.group_add(GROUP, channel)
    for message in (MESSAGE, LARGE, MESSAGE):
        await layer.group_send(GROUP, message)
        assert await receive(layer, channel) == message
        await layer.send(channel, message)
        assert await receive(layer, channel) == message


async def must_be_refused(layer: RabbitmqChannelLayer, *reasons: str) -> None:
    """The error says why, and so does one line in the log for each reason, however many attempts.

    ``reasons`` are regular expressions; more than one if chance decides which of them it is.
    """
    with log_lines(logging.DEBUG) as lines:
        logged: list[str] = []
        while sum(bool(re.match("DEBUG publisher .*: reconnecting", one)) for one in logged) < 2:
            with pytest.raises(BrokerUnavailable, match="|".join(reasons)):
                await layer.group_send(GROUP, MESSAGE)
            await asyncio.sleep(0.05)
            logged += lines.rest()
        await layer.close()
        logged += lines.rest()
    warnings = [line for line in logged if not line.startswith(("DEBUG", "INFO"))]
    assert 1 <= len(warnings) <= len(reasons)
    for line in warnings:
        assert re.match("WARNING publisher .*: cannot connect to amqp", line)
        assert re.search("|".join(reasons), line)
    assert not [line for line in logged if "Traceback" in line]


class TestServerVerified:
    async def test_by_ssl_context(
        self, open_layer: OpenLayer, server: PrivateBroker, certs: Path
    ) -> None:
        await must_work(await open_layer(host=server.tls_url, ssl_context=context(certs)))

    async def test_by_url(self, open_layer: OpenLayer, server: PrivateBroker, certs: Path) -> None:
        await must_work(await open_layer(host=server.tls_url + query(certs)))

    async def test_by_host_name(
        self, open_layer: OpenLayer, server: PrivateBroker, certs: Path
    ) -> None:
        url = server.tls_url.replace("127.0.0.1", "localhost")
        await must_work(await open_layer(host=url, ssl_context=context(certs)))

    async def test_another_name_in_the_certificate_than_in_the_url(
        self, open_layer: OpenLayer, server: PrivateBroker, certs: Path
    ) -> None:
        """As with an address of the load balancer's, say."""
        url = server.tls_url + query(certs) + "&server_name_indication=localhost"
        await must_work(await open_layer(host=url))

    async def test_verify_none_trusts_anybody(
        self, open_layer: OpenLayer, server: PrivateBroker
    ) -> None:
        await must_work(await open_layer(host=server.tls_url + "?verify=verify_none"))

    async def test_between_processes_with_and_without_tls(
        self, open_layer: OpenLayer, server: PrivateBroker, certs: Path
    ) -> None:
        secured = await open_layer(host=server.tls_url, ssl_context=context(certs))
        plain = await open_layer(host=server.url)
        for sender, receiver in ((secured, plain), (plain, secured)):
            channel = await receiver.new_channel()
            await receiver.group_add(GROUP, channel)
            await sender.group_send(GROUP, LARGE)
            await sender.send(channel, MESSAGE)
            assert await receive(receiver, channel) == LARGE
            assert await receive(receiver, channel) == MESSAGE
            await receiver.group_discard(GROUP, channel)

    async def test_many_large_messages_at_once(
        self, open_layer: OpenLayer, server: PrivateBroker, certs: Path
    ) -> None:
        layer = await open_layer(host=server.tls_url, ssl_context=context(certs))
        channel = await layer.new_channel()
        await layer.group_add(GROUP, channel)
        count = 30
        await asyncio.gather(
            *(layer.group_send(GROUP, {**LARGE, "n": n}) for n in range(count)),
        )
        for n in range(count):
            assert await receive(layer, channel) == {**LARGE, "n": n}

    async def test_carehare_connection(
        self, open_layer: OpenLayer, server: PrivateBroker, certs: Path
    ) -> None:
        layer = await open_layer(host=server.tls_url, ssl_context=context(certs))
        connection = await layer.carehare_connection
        await connection.queue_declare("jobs", exclusive=True)
        await connection.publish(b"job", exchange_name="", routing_key="jobs")
        async with connection.acking_consumer("jobs") as consumer:
            assert await asyncio.wait_for(consumer.next_delivery(), 10) == (b"job", 1)

    async def test_it_reconnects(
        self, open_layer: OpenLayer, server: PrivateBroker, certs: Path
    ) -> None:
        layer = await open_layer(host=server.tls_url, ssl_context=context(certs))
        await must_work(layer)
        channel = await layer.new_channel()
        await layer.group_add(GROUP, channel)
        for _ in range(3):
            waiting = asyncio.create_task(layer.receive(channel))
            with log_lines() as lines:
                await asyncio.to_thread(server.close_all_connections, "for a test")
                await lines.next("WARNING subscriber .*: lost the connection to amqps://guest@")
                await lines.next("WARNING subscriber .*: connected again to amqps://guest@")
                await layer.group_add(GROUP, channel)
                await layer.group_send(GROUP, LARGE)
                assert await asyncio.wait_for(waiting, 20) == LARGE
                assert not [line for line in lines.rest() if "Traceback" in line]

    @pytest.mark.parametrize("close", [True, False])
    async def test_nothing_is_left_when_the_process_ends(
        self, server: PrivateBroker, certs: Path, close: bool
    ) -> None:
        """No ``ResourceWarning``, no unfinished task, no line on standard error."""
        program = f"""
import asyncio
from channels_rabbitmq.core import RabbitmqChannelLayer

async def main():
    layer = RabbitmqChannelLayer(host={server.tls_url + query(certs)!r})
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    await layer.group_send("g", {{"data": b"x" * 2**20}})
    assert len((await layer.receive(channel))["data"]) == 2**20
    if {close}:
        await layer.close()

asyncio.run(main())
"""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-X", "dev", "-W", "error", "-c", program),
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, _ = await asyncio.wait_for(process.communicate(), 30)
        assert without_slowness(output.decode()) == ""
        assert process.returncode == 0


class TestRefusedByUs:
    """Nothing is sent to a server that isn't who it should be, and it's said why."""

    async def test_another_ca_by_ssl_context(
        self, open_layer: OpenLayer, server: PrivateBroker, certs: Path
    ) -> None:
        layer = await open_layer(
            host=server.tls_url, ssl_context=context(certs, "wrong-ca"), operation_timeout=1.0
        )
        await must_be_refused(layer, "TLS certificate refused: self.signed certificate")

    async def test_another_ca_by_url(
        self, open_layer: OpenLayer, server: PrivateBroker, certs: Path
    ) -> None:
        layer = await open_layer(
            host=server.tls_url + query(certs, "wrong-ca"), operation_timeout=1.0
        )
        await must_be_refused(layer, "TLS certificate refused: self.signed certificate")

    async def test_no_ca_but_the_systems(
        self, open_layer: OpenLayer, server: PrivateBroker
    ) -> None:
        layer = await open_layer(host=server.tls_url, operation_timeout=1.0)
        await must_be_refused(layer, "TLS certificate refused: self.signed certificate")

    async def test_another_host_name(
        self, open_layer: OpenLayer, server: PrivateBroker, certs: Path
    ) -> None:
        layer = await open_layer(
            host=server.tls_url + query(certs) + "&server_name_indication=other-host.example",
            operation_timeout=1.0,
        )
        await must_be_refused(
            layer,
            "TLS certificate refused: Hostname mismatch, "
            "certificate is not valid for 'other-host.example'",
        )

    async def test_tls_to_a_port_without_tls(
        self, open_layer: OpenLayer, server: PrivateBroker
    ) -> None:
        url = f"amqps://guest:guest@127.0.0.1:{server.port}"
        layer = await open_layer(host=url, operation_timeout=1.0)
        # The newer the OpenSSL, the less it says.
        await must_be_refused(layer, "wrong version number|record layer failure")

    async def test_a_file_that_is_not_there(
        self, open_layer: OpenLayer, server: PrivateBroker, certs: Path
    ) -> None:
        layer = await open_layer(
            host=server.tls_url + query(certs, "missing"), operation_timeout=1.0
        )
        await must_be_refused(layer, "No such file or directory")


class TestMutual:
    async def test_by_ssl_context(
        self, open_layer: OpenLayer, mutual_server: PrivateBroker, certs: Path
    ) -> None:
        ssl_context = context(certs, client="client")
        await must_work(await open_layer(host=mutual_server.tls_url, ssl_context=ssl_context))

    async def test_by_url(
        self, open_layer: OpenLayer, mutual_server: PrivateBroker, certs: Path
    ) -> None:
        url = mutual_server.tls_url + query(certs, client="client")
        await must_work(await open_layer(host=url))

    @pytest.mark.parametrize(
        ("client", "version", "alert"),
        [
            (None, ssl.TLSVersion.TLSv1_3, "certificate required"),
            (None, ssl.TLSVersion.TLSv1_2, "handshake failure"),
            ("wrong-client", ssl.TLSVersion.TLSv1_3, "unknown ca"),
            ("wrong-client", ssl.TLSVersion.TLSv1_2, "unknown ca"),
        ],
    )
    async def test_a_client_that_the_broker_does_not_trust(
        self,
        open_layer: OpenLayer,
        mutual_server: PrivateBroker,
        certs: Path,
        client: str | None,
        version: ssl.TLSVersion,
        alert: str,
    ) -> None:
        ssl_context = context(certs, client=client)
        ssl_context.maximum_version = version
        layer = await open_layer(
            host=mutual_server.tls_url, ssl_context=ssl_context, operation_timeout=1.0
        )
        if version is ssl.TLSVersion.TLSv1_2:
            await must_be_refused(layer, alert)
        else:
            # To the client the handshake is over before the broker has seen its certificate, so it
            # writes, and what it wrote turns the broker's close into a reset that may swallow the
            # alert (measured: one time in five to nine in ten).
            await must_be_refused(layer, alert, "may want a client certificate that it trusts")
