"""What an operator can do about a failed attempt to connect, where that is known.

The advice stands in the log and in ``BrokerUnavailable``, behind the reason. The manual has it too,
but an operator who reads the log may not have it at hand.
"""

from __future__ import annotations

import re
import shlex
import ssl

import carehare

from .._amqp.url import BrokerUrl

# OpenSSL's codes for what is wrong with a certificate (X509_V_ERR_*)
_EXPIRED = 10
_UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21)
_OTHER_NAME = (62, 64)

# By the text of RabbitMQ's refusal; RabbitMQ 4 adds a word to the fourth of them.
_BY_WORDS = (
    (r"530 NOT_ALLOWED - vhost .* not found", "create it: rabbitmqctl add_vhost {vhost}"),
    (
        r"530 NOT_ALLOWED - access to vhost .* refused for user '[^']*'$",
        "permit it: rabbitmqctl set_permissions -p {vhost} {user} '.*' '.*' '.*'",
    ),
    (
        r"403 ACCESS_REFUSED - Login was refused",
        "look at the user name and password in the URL{guest}",
    ),
    (
        r"403 ACCESS_REFUSED - (\w+ )?access to \w+ ",
        "permit it by rabbitmqctl set_permissions -p {vhost} {user} CONFIGURE WRITE READ: "
        "the manual has the patterns",
    ),
    (
        r"406 PRECONDITION_FAILED - inequivalent arg 'type' for exchange",
        "groups need a direct exchange: delete that one, or let groups_exchange name another one",
    ),
)
_GUEST = "; guest may log in from RabbitMQ's own machine only"


def advise(exc: Exception, url: BrokerUrl) -> str:
    """Return what to do in a few words, or ``""``; without secrets."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return _advise_on_certificate(exc)
    if isinstance(exc, ConnectionRefusedError):
        return "nobody listens there: is RabbitMQ running, and is this its port?"
    if isinstance(exc, (carehare.ConnectionClosedByServer, carehare.ChannelClosedByServer)):
        for words, advice in _BY_WORDS:
            if re.search(words, str(exc)):
                return advice.format(
                    vhost=shell_word(url.virtual_host),
                    user=shell_word(url.username),
                    guest=_GUEST if url.username == "guest" else "",
                )
    return ""


def _advise_on_certificate(exc: ssl.SSLCertVerificationError) -> str:
    if exc.verify_code in _UNKNOWN_AUTHORITY:
        return "if it is signed by an authority of your own: cacertfile in the URL, or ssl_context"
    if exc.verify_code in _OTHER_NAME:
        return "write the host as the certificate has it, or server_name_indication in the URL"
    if exc.verify_code == _EXPIRED:
        return "renew RabbitMQ's certificate"
    return ""


def shell_word(text: str) -> str:
    """Return a name as a shell's command needs it, in one line."""
    return shlex.quote(text) if text.isascii() and text.isprintable() else "NAME"
