"""What ``check`` says of TLS, once it is agreed on."""

from __future__ import annotations

import ssl
import time

from .check_report import Finding, Status

# Seconds of validity that are left when the certificate should be renewed
_SOON = 14 * 86400.0


def describe_tls(tls: ssl.SSLObject | None) -> Finding:
    """Tell of the version, and of RabbitMQ's certificate."""
    if tls is None:
        return Finding("agreed")
    version = tls.version() or "TLS"
    certificate = tls.getpeercert()
    if not certificate:
        return Finding(
            f"{version}, but nothing checks RabbitMQ's certificate, so a machine in between can "
            "read everything",
            "name its CA by cacertfile in the URL, in place of verify=verify_none",
            Status.WARNING,
        )
    ends = str(certificate.get("notAfter", ""))
    days = (ssl.cert_time_to_seconds(ends) - time.time()) / 86400.0 if ends else float("inf")
    text = f"{version}; RabbitMQ's certificate is valid until {ends}"
    if days * 86400.0 < _SOON:
        return Finding(
            f"{text}: for {days:.0f} more days", "renew RabbitMQ's certificate", Status.WARNING
        )
    return Finding(text)
