"""Why there is no connection, in words for operators, without secrets."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl

import carehare

from .._amqp import errors
from .shared import Told

logger = logging.getLogger("channels_rabbitmq.connection")

# Seconds for which the same reason for not connecting isn't logged as a warning again.
REMINDER_INTERVAL = 60.0
# Characters of an error's text.
_LONGEST_REASON = 1000
# Refusals that won't pass by themselves. The broker sends others while it starts.
_REFUSALS = (
    errors.ACCESS_REFUSED,
    errors.NOT_FOUND,
    errors.RESOURCE_LOCKED,
    errors.PRECONDITION_FAILED,
    errors.NOT_ALLOWED,
)

_CONNECTION_TROUBLE = (
    OSError,  # ssl.SSLError and TimeoutError among them
    asyncio.TimeoutError,  # until Python 3.10 not a TimeoutError
    carehare.BadBytesFromServer,
    carehare.ChannelClosed,
    carehare.ChannelClosedByServer,
    carehare.ConnectionClosed,
    carehare.ConnectionClosedByHeartbeatMonitor,
    carehare.ConnectionClosedByServer,
)


def is_trouble(exc: BaseException) -> bool:
    """Whether this is how connections fail, and not a bug."""
    return isinstance(exc, _CONNECTION_TROUBLE)


def is_refusal(exc: Exception) -> bool:
    """Whether one side has refused the other, so that another attempt would end the same way.

    The broker refuses a command or a log-in; we refuse the broker's certificate.
    """
    return isinstance(exc, ssl.SSLCertVerificationError) or (
        isinstance(exc, (carehare.ConnectionClosedByServer, carehare.ChannelClosedByServer))
        and exc.reply_code in _REFUSALS
    )


def describe(exc: BaseException) -> str:
    """Return one line about an error, without secrets, and of a length that a log can take."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"TLS certificate refused: {exc.verify_message}"
    text = " ".join(str(exc)[:_LONGEST_REASON].split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    if isinstance(exc, (TimeoutError, asyncio.TimeoutError)) and not text:
        return "timed out"
    if is_trouble(exc) and text:
        return text
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


class Reasons:
    """Why one supervised connection isn't there, as far as that is known.

    Also writes it to the log. ``name`` and ``role`` are the connection's: with its id, and without.
    URLs are strings, without passwords.
    """

    def __init__(self, name: str, role: str, told: Told) -> None:
        self._name = name
        self._role = role
        self._told = told
        self.last = ""  # or why the last connection was lost
        self.by_url: dict[str, str] = {}

    def __str__(self) -> str:
        return "; ".join(f"{url}: {reason}" for url, reason in self.by_url.items())

    def note(self, url: str, reason: str) -> None:
        self.last = self.by_url[url] = reason

    def keep_only(self, urls: set[str]) -> None:
        """Forget what was said of other URLs."""
        self.by_url = {url: reason for url, reason in self.by_url.items() if url in urls}

    def log_failure(self, url: str) -> None:
        """Warn of an attempt that has failed, if that is news; or as a reminder."""
        # Numbers don't matter: the queue of each attempt has another one in its name.
        news = (self._role, url, re.sub(r"\d+", "0", self.last))
        if self._told.is_news(news, REMINDER_INTERVAL):
            logger.warning("%s: cannot connect to %s: %s", self._name, url, self.last)

    def log_loss(self, url: str) -> None:
        logger.warning("%s: lost the connection to %s: %s", self._name, url, self.last)

    def log_connected(self, url: str, seconds: float, *, again: bool) -> None:
        """Log the end of an outage, at the level at which its beginning was logged."""
        if again:
            logger.warning("%s: connected again to %s after %.1f s", self._name, url, seconds)
        elif self.last:
            logger.warning("%s: connected to %s after %.1f s", self._name, url, seconds)
        else:
            logger.info("%s: connected to %s", self._name, url)

    def log_unexpected(self, exc: BaseException) -> None:
        """Report a bug, with its traceback; the supervisor goes on all the same."""
        logger.error("%s: unexpected error", self._name, exc_info=exc)
