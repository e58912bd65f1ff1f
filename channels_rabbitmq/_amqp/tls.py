"""Make the TLS settings of an ``amqps://`` URL, and explain TLS errors in words.

The certificate files are read anew for each connection, so renewed certificates are used. A thread
of ours reads them, so a slow file system doesn't hold up the event loop.

With TLS 1.3 a client finishes the handshake before the broker has checked the client's certificate,
and begins to write. If the broker then closes the connection, the unread bytes turn that into a
reset, and the broker's reason may be lost. So the layer checks the dates of its own certificate,
too.
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

# OpenSSL's names for the bytes of a server without TLS. Newer OpenSSLs have less telling names.
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNKNOWN_PROTOCOL")
# OpenSSL's names, behind "ALERT_", for the broker's answers to our certificate.
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
# DER tags: the optional first field of a certificate; a time with a year of two digits
_VERSION, _UTC_TIME = 0xA0, 0x17


@dataclass(frozen=True)
class Tls:
    """How a connection is secured."""

    context: ssl.SSLContext
    # What is wrong with our own certificate, or "". The broker may accept it all the same.
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
    """Do the work of ``read_tls``, which blocks, without a time limit."""
    for path in filter(None, (url.cacertfile, url.certfile, url.keyfile)):
        with open(path, "rb"):
            pass  # This error names a missing file. ssl's own error doesn't.
    try:
        context = ssl.create_default_context(cafile=url.cacertfile)
    except ssl.SSLError as err:
        raise _error(f"no certificate of a CA in {url.cacertfile} ({err})") from None
    problem = ""
    if url.certfile is not None:
        _load_client_certificate(context, url.certfile, url.keyfile)
        problem = problem_of(url.certfile)
    if not url.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return Tls(context, problem)


def _load_client_certificate(context: ssl.SSLContext, certfile: str, keyfile: str | None) -> None:
    try:
        # Without this function OpenSSL would ask for a passphrase on the terminal.
        context.load_cert_chain(certfile, keyfile, password=_have_no_passphrase)
    except (ssl.SSLError, OSError) as err:
        files = f"{certfile} and {keyfile or 'the key in it'}"
        raise _error(f"no pair of a certificate and its key: {files} ({err})") from None


def _have_no_passphrase() -> str:
    raise OSError("the key is encrypted, and there is no way to give its passphrase")


def _error(text: str) -> ssl.SSLError:
    # With the text as the only argument, str() of the error would show a tuple.
    return ssl.SSLError(ssl.SSL_ERROR_SSL, text)


# Errors


def explain(err: Exception, problem: str) -> Exception:
    """Return a TLS error with an explanation, other errors as they are.

    ``problem`` is that of ``Tls``.
    """
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
    """Return why a connection ended before the broker greeted.

    ``exc`` is asyncio's error; None if the connection ended without one.
    """
    if exc is not None and (explained := explain(exc, problem)) is not exc:
        return explained
    if tls:
        # Of a context that the user has made, the dates of its certificate can't be read.
        hint = (
            problem
            or "RabbitMQ may want a client certificate that it trusts and that hasn't expired"
        )
    else:
        hint = "this may be RabbitMQ's port for TLS (amqps://)"
    told = f" ({exc})" if str(exc or "") else ""
    return carehare.ConnectionClosed(
        f"the server ended the connection before it greeted as RabbitMQ does: {hint}, "
        f"or this is another service, or a proxy that has no RabbitMQ behind it{told}"
    )


def problem_of(certfile: str) -> str:
    """Return what is wrong with a certificate's dates, in one sentence, or ""."""
    try:
        with open(certfile, encoding="ascii", errors="replace") as file:
            found = _PEM_CERTIFICATE.search(file.read())
        assert found is not None, "OpenSSL has found one"
        begins_at, ends_at = _read_validity(ssl.PEM_cert_to_DER_cert(found.group()))
    except Exception:
        return ""  # The result only improves an error's text.
    if ends_at < time.time():
        return f"the client certificate in {certfile} has expired"
    if begins_at > time.time():
        return f"the client certificate in {certfile} isn't valid yet"
    return ""


def _read_validity(der: bytes) -> tuple[float, float]:
    """Return when a certificate (RFC 5280, section 4.1) begins and ends to be valid."""
    _, at, _ = _read_element(der, 0)  # enter the certificate
    _, at, _ = _read_element(der, at)  # enter its first field, the signed part
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
    """Return the tag of the element at ``at``, and where its content starts and ends."""
    length, start = der[at + 1], at + 2
    if length & 0x80:  # The other bits say how many bytes of length follow.
        start += length & 0x7F
        length = int.from_bytes(der[at + 2 : start], "big")
    return der[at], start, start + length
