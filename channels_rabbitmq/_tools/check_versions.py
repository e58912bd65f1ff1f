"""Which RabbitMQ answers, and whether this package was tested with it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .check_report import Finding, Status

OLDEST = (3, 10)
NEWEST_TESTED = (4, 3)


def describe_broker(properties: Mapping[str, object]) -> Finding:
    """Tell which broker this is, by what it says of itself in the handshake."""
    product, version = str(properties.get("product", "")), str(properties.get("version", ""))
    node = f", cluster {properties['cluster_name']}" if properties.get("cluster_name") else ""
    text = f"{product or 'a broker'} {version}, {properties.get('platform', '?')}{node}"
    if product != "RabbitMQ":
        return _warn(text, "this package is tested with RabbitMQ only")
    numbers = tuple(map(int, re.findall(r"\d+", version)))[:2]
    if numbers < OLDEST:
        return _warn(text, f"this package needs RabbitMQ {_show(OLDEST)} or newer: upgrade it")
    if numbers > NEWEST_TESTED:
        return _warn(
            text,
            f"newer than what this release was tested with, {_show(NEWEST_TESTED)}: look for "
            "a newer release of channels_rabbitmq",
        )
    return Finding(text)


def _show(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _warn(text: str, advice: str) -> Finding:
    return Finding(text, advice, Status.WARNING)
