"""TLS as an ``amqps://`` URL asks for it, and in words what its errors mean.

The files are read anew for each connection, in a thread of ours: so certificates that were renewed
count, and a slow file system doesn't hold up the event loop.

With TLS 1.3 a client has finished the handshake before the broker has looked at the client's
certificate. So the client writes. If the broker then closes the connection, unread bytes turn that
into a reset, which may swallow the broker's reason. So we look at our certificate's dates, too.
"""

from __future__ import annotations

import re
import ssl
import time
from calendar import timegm
from dataclasses import dataclass

import carehare

from .._futures import run_until
from .._threads import call_once
from .url import BrokerUrl

# OpenSSL's names for bytes of a server that doesn't speak TLS; the newer OpenSSL, the less it says.
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNKNOWN_PROTOCOL")
# OpenSSL's names for what the broker says of our certificate, behind "ALERT_".
_ALERTS = {
    "CERTIFICATE_EXPIRED": "the client certificate has expired",
    "CERTIFICATE_REVOKED": "the client certificate was revoked",
    "CERTIFICATE_UNKNOWN": "RabbitMQ doesn't accept the client certificate",
    "BAD_CERTIFICATE": "RabbitMQ doesn't accept the client certificate",
    "UNSUPPORTED_CERTIFICATE": "RabbitMQ doesn't accept the client certificate",
    "UNKNOWN_CA": "RabbitMQ doesn't know the CA of the client certificate",
    "CERTIFICATE_REQUIRED": "RabbitMQ wants a client certificate (certfile)",
}
_PEM_CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
# Tags of DER: the optional first field of a certificate; a time with two digits for the year
_VERSION, _UTC_TIME = 0xA0, 0x17


@dataclass(frozen=True)
class Tls:
    """How a connection is secured."""

    context: ssl.SSLContext
    # What is wrong with our own certificate, or "". The broker may take it all the same.
    problem: str = ""


async def read_tls(url: BrokerUrl, deadline: float) -> Tls:
    """Return the TLS settings that an ``amqps://`` URL asks for.

    Raises OSError (ssl.SSLError is one), or TimeoutError at ``deadline`` (loop time).
    """
    files = (url.cacertfile, url.certfile, url.keyfile)
    try:
        return await run_until(
            deadline, call_once("files", (*files, url.verify), lambda: make_tls(url))
        )
    except TimeoutError:
        shown = ", ".join(filter(None, files)) or "the system's CAs"
        raise TimeoutError(f"the files for TLS can't be read in time: {shown}") from None


def make_tls(url: BrokerUrl) -> Tls:
    """As ``read_tls``, without a time limit."""
    for path in filter(None, (url.cacertfile, url.certfile, url.keyfile)):
        with open(path, "rb"):
            pass  # so that the error for a missing file names it, which ssl's doesn't
    try:
        context = ssl.create_default_context(cafile=url.cacertfile)
    except ssl.SSLError as err:
        raise _error(f"no certificate of a CA in {url.cacertfile} ({err})") from None
    problem = ""
    if url.certfile is not None:
        _load_client_certificate(context, url.certfile, url.keyfile)
        problem = _problem_of(url.certfile)
    if not url.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return Tls(context, problem)


def _load_client_certificate(context: ssl.SSLContext, certfile: str, keyfile: str | None) -> None:
    try:
        # Without a way to ask, OpenSSL would ask for a passphrase on the terminal.
        context.load_cert_chain(certfile, keyfile, password=_have_no_passphrase)
    except (ssl.SSLError, OSError) as err:
        files = f"{certfile} and {keyfile or 'the key in it'}"
        raise _error(f"no pair of a certificate and its key: {files} ({err})") from None


def _have_no_passphrase() -> str:
    raise OSError("the key is encrypted, and there is no way to give its passphrase")


def _error(text: str) -> ssl.SSLError:
    # With one argument alone its text would be that of a tuple.
    return ssl.SSLError(ssl.SSL_ERROR_SSL, text)


# Errors


def explain(err: Exception, problem: str) -> Exception:
    """Return an error in words, if it is one of TLS; ``problem`` is that of ``Tls``."""
    if not isinstance(err, ssl.SSLError) or isinstance(err, ssl.SSLCertVerificationError):
        return err
    reason: str = getattr(err, "reason", None) or ""
    if reason in _NO_TLS:
        return _error(f"what answers there doesn't speak TLS: is it the port for amqp://? ({err})")
    alert = reason.partition("ALERT_")[2]
    if alert in _ALERTS:
        return _error(f"{problem or _ALERTS[alert]} ({err})")
    return err


def explain_end(exc: Exception | None, *, tls: bool, problem: str) -> Exception:
    """Return why the connection ended before the broker said anything; None: without an error."""
    if exc is not None and (explained := explain(exc, problem)) is not exc:
        return explained
    if tls:
        hint = problem or "it may want a client certificate which it trusts"
    else:
        hint = "this may be its port for TLS (amqps://)"
    told = f" ({exc})" if str(exc or "") else ""
    return carehare.ConnectionClosed(
        f"RabbitMQ ended the connection before it greeted: {hint}, "
        f"or this is a proxy that has no RabbitMQ behind it{told}"
    )


def _problem_of(certfile: str) -> str:
    """Return what is wrong with the dates of a certificate, in one sentence; "": nothing."""
    try:
        with open(certfile, encoding="ascii", errors="replace") as file:
            found = _PEM_CERTIFICATE.search(file.read())
        assert found is not None, "OpenSSL has found one"
        begins_at, ends_at = _read_validity(ssl.PEM_cert_to_DER_cert(found.group()))
    except Exception:
        return ""  # It is for an explanation only.
    if ends_at < time.time():
        return f"the client certificate in {certfile} has expired"
    if begins_at > time.time():
        return f"the client certificate in {certfile} isn't valid yet"
    return ""


def _read_validity(der: bytes) -> tuple[float, float]:
    """Return from when until when a certificate (RFC 5280, section 4.1) is valid."""
    _, at, _ = _read_element(der, 0)  # the certificate: to its first field
    _, at, _ = _read_element(der, at)  # what is signed: to its first field
    tag, _, end = _read_element(der, at)
    if tag == _VERSION:
        at = end
    for _ in ("serial number", "algorithm", "issuer"):
        _, _, at = _read_element(der, at)
    _, at, _ = _read_element(der, at)
    begins_at, at = _read_time(der, at)
    return begins_at, _read_time(der, at)[0]


def _read_time(der: bytes, at: int) -> tuple[float, int]:
    tag, start, end = _read_element(der, at)
    text = der[start:end].decode()
    if tag == _UTC_TIME:
        text = ("20" if text < "50" else "19") + text
    return float(timegm(time.strptime(text, "%Y%m%d%H%M%SZ"))), end


def _read_element(der: bytes, at: int) -> tuple[int, int, int]:
    """Return the tag of what begins at ``at``, and where its content starts and ends."""
    length, start = der[at + 1], at + 2
    if length & 0x80:  # so many bytes of length follow
        start += length & 0x7F
        length = int.from_bytes(der[at + 2 : start], "big")
    return der[at], start, start + length
