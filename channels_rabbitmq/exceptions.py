"""Errors of this layer beyond those of Channels (``channels.exceptions``)."""

from __future__ import annotations


class BrokerUnavailable(ConnectionError):
    """RabbitMQ could not be reached within ``operation_timeout``, or for longer; nothing was sent.

    The text names the URLs, without passwords, and the reasons, such as a refused login.
    """
