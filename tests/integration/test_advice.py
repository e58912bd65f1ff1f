"""What is logged and raised when a real broker refuses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.brokers import Broker
from tools.private_broker import PrivateBroker, TlsFiles, free_port

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]


async def reason_of(layer: RabbitmqChannelLayer) -> str:
    with pytest.raises(BrokerUnavailable) as caught:
        await layer.connect(fail_fast=True)
    return str(caught.value)


async def test_the_broker_says_it_so(open_layer: OpenLayer, broker: Broker) -> None:
    parts = urlsplit(broker.url)
    at = f"{parts.hostname}:{parts.port}"
    layer = await open_layer(host=f"amqp://guest:guest@{at}/no-vhost")
    assert f"amqp://guest@{at}/no-vhost: " in (reason := await reason_of(layer))
    assert "add_vhost no-vhost" in reason
    reason = await reason_of(await open_layer(host=f"amqp://guest:s3cret@{at}/"))
    assert "403 ACCESS_REFUSED" in reason
    assert "user name and password" in reason
    assert "s3cret" not in reason
    nobody = await open_layer(host=f"amqp://guest:s3cret@localhost:{free_port()}")
    assert "is RabbitMQ running" in await reason_of(nobody)


@pytest.mark.slow  # a broker starts
async def test_a_broker_with_permissions_and_certificates_says_it_so(
    open_layer: OpenLayer, private_broker_factory: Callable[..., PrivateBroker], certs: Path
) -> None:
    broker = private_broker_factory(tls=TlsFiles.in_folder(certs))
    assert "cacertfile" in await reason_of(await open_layer(host=broker.tls_url))
    broker.ctl("add_user", "web", "s3cret")
    url = f"amqp://web:s3cret@127.0.0.1:{broker.port}/"
    assert "set_permissions -p / web '.*'" in await reason_of(await open_layer(host=url))
    broker.ctl("set_permissions", "-p", "/", "web", "", "", "")
    assert "web CONFIGURE WRITE READ" in await reason_of(await open_layer(host=url))
