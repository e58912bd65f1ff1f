"""AMQP's methods, as the modules above make them: pamqp's classes, under this package's name."""

from pamqp.base import Frame as Method
from pamqp.commands import Basic, Channel, Confirm, Exchange, Queue

__all__ = ["Basic", "Channel", "Confirm", "Exchange", "Method", "Queue"]
