"""Errors of this layer beyond those of Channels (``channels.exceptions``)."""

from __future__ import annotations


class BrokerUnavailable(ConnectionError):
    """RabbitMQ could not be reached within ``operation_timeout``; nothing was sent.

    The text carries the last reason known, such as a refused login.
    """
