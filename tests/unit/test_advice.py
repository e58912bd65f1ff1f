"""What an operator is told to do about an attempt that failed, and that it can be typed."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import carehare
import pytest

from channels_rabbitmq._amqp.url import BrokerUrl
from channels_rabbitmq._broker.advice import advise
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.brokers import Broker
from tools.private_broker import PrivateBroker, TlsFiles, free_port

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

URL = BrokerUrl.parse("amqp://web:s3cret@broker/my%20site")


def closed(code: int, text: str) -> Exception:
    return carehare.ConnectionClosedByServer(code, text)


def certificate_error(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED]")
    error.verify_code = code
    return error


@pytest.mark.parametrize(
    ("exc", "advice"),
    [
        (closed(530, "NOT_ALLOWED - vhost my site not found"), "rabbitmqctl add_vhost 'my site'"),
        (
            closed(530, "NOT_ALLOWED - access to vhost 'my site' refused for user 'web'"),
            "rabbitmqctl set_permissions -p 'my site' web '.*' '.*' '.*'",
        ),
        (
            closed(403, "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN."),
            "user name and password in the URL",
        ),
        (  # 3.10
            carehare.ChannelClosedByServer(
                403, "ACCESS_REFUSED - access to exchange 'groups' in vhost '/' refused for user"
            ),
            "set_permissions -p 'my site' web CONFIGURE WRITE READ",
        ),
        (  # 4.0
            carehare.ChannelClosedByServer(
                403, "ACCESS_REFUSED - configure access to queue 'crq.x' in vhost '/' refused"
            ),
            "set_permissions -p 'my site' web CONFIGURE WRITE READ",
        ),
        (ConnectionRefusedError(111, "Connect call failed"), "is RabbitMQ running"),
        (certificate_error(20), "cacertfile"),
        (certificate_error(62), "server_name_indication"),
        (certificate_error(10), "renew"),
    ],
)
def test_what_is_known(exc: Exception, advice: str) -> None:
    assert advice in advise(exc, URL)
    assert "s3cret" not in advise(exc, URL)


@pytest.mark.parametrize(
    "exc",
    [
        OSError("no"),
        closed(320, "CONNECTION_FORCED"),
        # Permissions aren't what is missing.
        closed(
            530,
            "NOT_ALLOWED - access to vhost '/' refused for user 'web': "
            "connection limit (1) is reached",
        ),
        certificate_error(99),
    ],
)
def test_what_is_not_known(exc: Exception) -> None:
    assert advise(exc, URL) == ""


def test_guest_is_told_from_where_it_may_log_in() -> None:
    refusal = closed(403, "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN")
    assert "own machine" in advise(refusal, BrokerUrl.parse("amqp://broker"))
    assert "own machine" not in advise(refusal, URL)


def test_names_that_would_break_the_line_are_left_out() -> None:
    url = BrokerUrl.parse("amqp://web:x@broker/a%0Ab")
    advice = advise(closed(530, "NOT_ALLOWED - vhost a\nb not found"), url)
    assert "\n" not in advice


# On real brokers


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
