"""What an operator is told to do about an attempt that failed, and that it can be typed."""

from __future__ import annotations

import ssl

import carehare
import pytest

from channels_rabbitmq._amqp.url import BrokerUrl
from channels_rabbitmq._broker.advice import advise

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
