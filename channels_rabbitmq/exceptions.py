"""Errors of this layer beyond those of Channels (``channels.exceptions``)."""

from __future__ import annotations


class UnreadableMessage(ValueError):
    """The project's serializer has read a message once, and failed to read it again.

    ``receive()`` raises it, and the message is gone for its channel. A group's message is read once
    for each member. The text names the serializer and its exception, and holds no part of the
    message.
    """


class BrokerUnavailable(ConnectionError):
    """RabbitMQ could not be reached within ``operation_timeout``, or for longer; nothing was sent.

    The text names the URLs, without passwords, and the reasons, such as a refused login.
    """
