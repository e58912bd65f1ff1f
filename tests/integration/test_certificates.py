"""Certificates that are renewed while connections last."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from channels_rabbitmq._amqp.url import BrokerUrl
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.brokers import broker_commands
from tests.support.certificates import Authority
from tests.support.log_lines import log_lines
from tools.private_broker import PrivateBroker, TlsFiles


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def url(port: int, **files: Path) -> str:
    query = "&".join(f"{name}={quote(str(path))}" for name, path in files.items())
    return f"amqps://guest:guest@127.0.0.1:{port}?{query}"


OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expired")
    authority = Authority(folder)
    authority.make("server")
    authority.make("client")
    authority.make("expired", days=(-9, -1))
    return folder


@pytest.fixture(scope="module")
def mutual_server(rabbitmq: None, folder: Path) -> Iterator[PrivateBroker]:
    files = TlsFiles.in_folder(folder, mutual=True)
    with PrivateBroker(broker_commands(), tls=files) as server:
        yield server


class TestExpired:
    """With a real broker, which wants to see the client's certificate."""

    pytestmark = pytest.mark.slow

    def host(self, mutual_server: PrivateBroker, folder: Path, name: str) -> str:
        port = BrokerUrl.parse(mutual_server.tls_url).port
        return url(
            port,
            cacertfile=folder / "ca.pem",
            certfile=folder / f"{name}.pem",
            keyfile=folder / f"{name}-key.pem",
        )

    async def test_in_a_url(
        self, open_layer: OpenLayer, mutual_server: PrivateBroker, folder: Path
    ) -> None:
        """Always, although the broker's word for it often is lost: the reset overtakes it."""
        text = f"the client certificate in {folder}/expired.pem has expired"
        for _ in range(3):
            layer = await open_layer(
                host=self.host(mutual_server, folder, "expired"), operation_timeout=0.5
            )
            with log_lines() as lines:
                with pytest.raises(BrokerUnavailable, match=text):
                    await layer.group_send("g", {"type": "t"})
                await layer.close()
                for line in lines.rest():
                    assert text in line

    async def test_renewed_it_connects(
        self, open_layer: OpenLayer, mutual_server: PrivateBroker, folder: Path
    ) -> None:
        for end in (".pem", "-key.pem"):
            shutil.copy(folder / f"expired{end}", folder / f"current{end}")
        layer = await open_layer(host=self.host(mutual_server, folder, "current"))
        with log_lines() as lines:
            connecting = asyncio.create_task(layer.connect())
            await lines.next("WARNING .* has expired")
            for end in (".pem", "-key.pem"):
                shutil.copy(folder / f"client{end}", folder / f"new{end}")
                os.replace(folder / f"new{end}", folder / f"current{end}")
            await connecting

    async def test_in_a_context(
        self, open_layer: OpenLayer, mutual_server: PrivateBroker, folder: Path
    ) -> None:
        """With TLS 1.3, whether or not the broker's word arrives."""
        context = ssl.create_default_context(cafile=folder / "ca.pem")
        context.load_cert_chain(folder / "expired.pem", folder / "expired-key.pem")
        for _ in range(5):
            layer = await open_layer(
                host=mutual_server.tls_url, ssl_context=context, operation_timeout=0.5
            )
            text = "a client certificate that .* hasn't expired|the client certificate has expired"
            with pytest.raises(BrokerUnavailable, match=text):
                await layer.group_send("g", {"type": "t"})
            await layer.close()

    async def test_in_a_context_with_tls_1_2(
        self, open_layer: OpenLayer, mutual_server: PrivateBroker, folder: Path
    ) -> None:
        """There the broker's word for it arrives."""
        context = ssl.create_default_context(cafile=folder / "ca.pem")
        context.load_cert_chain(folder / "expired.pem", folder / "expired-key.pem")
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        layer = await open_layer(
            host=mutual_server.tls_url, ssl_context=context, operation_timeout=0.5
        )
        with pytest.raises(BrokerUnavailable, match="the client certificate has expired"):
            await layer.group_send("g", {"type": "t"})
