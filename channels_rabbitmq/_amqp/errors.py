"""Errors of the protocol, with the reply codes of AMQP 0-9-1, section 1.2."""

from __future__ import annotations

import carehare

ACCESS_REFUSED = 403
NOT_FOUND = 404
RESOURCE_LOCKED = 405
PRECONDITION_FAILED = 406
FRAME_ERROR = 501
SYNTAX_ERROR = 502
COMMAND_INVALID = 503
CHANNEL_ERROR = 504
UNEXPECTED_FRAME = 505
NOT_ALLOWED = 530
INTERNAL_ERROR = 541


class ProtocolError(carehare.BadBytesFromServer):
    """The broker broke the protocol; ``reply_code`` is what it is told."""

    def __init__(self, reply_code: int, text: str) -> None:
        super().__init__(text)
        self.reply_code = reply_code


def is_not_found(exc: BaseException) -> bool:
    """Whether the broker has closed an AMQP channel because a queue or an exchange is missing."""
    return isinstance(exc, carehare.ChannelClosedByServer) and exc.reply_code == NOT_FOUND


def reply_code_of(exc: Exception) -> int:
    """Return what the broker is told when an error closes the connection."""
    if isinstance(exc, ProtocolError):
        return exc.reply_code
    return SYNTAX_ERROR if isinstance(exc, carehare.BadBytesFromServer) else INTERNAL_ERROR


def unexpected_frame(what: str) -> ProtocolError:
    """Return the error for a frame that is out of place."""
    return ProtocolError(UNEXPECTED_FRAME, f"RabbitMQ broke the protocol: {what}")
