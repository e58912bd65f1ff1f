"""``Connector``: connects to one of the broker's URLs, or says why it can't.

The attempts at all URLs race (see ``Race``): a node that hangs, or a machine that is gone, costs
the clients of the others a moment instead of its whole ``connect_timeout``. The order of the URLs
is random each time, which spreads the load over a cluster. The node that worked last isn't
preferred: its connection was just lost.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from .._amqp.connection import Connection
from .._amqp.racing import ATTEMPT_DELAY_ONCE_ANSWERED, Race
from .._amqp.url import BrokerUrl
from .._identity import own_place
from .._settings.settings import Settings
from .advice import advise
from .host_function import NoUrl, current_urls
from .reasons import Reasons, describe, is_refusal, is_trouble


def connection_name(role: str, id_: str) -> str:
    """Return what operators see in RabbitMQ's list of connections."""
    place = own_place()
    return f"channels_rabbitmq {role} {id_} ({place.host}, pid {place.pid})"


@dataclass(eq=False)
class UrlAttempt:
    """``connection`` is open once ``run`` returns; its set-up, too, has until ``deadline``."""

    url: BrokerUrl
    connection: Connection
    timeout: float
    on_failure: Callable[[UrlAttempt, Exception], None]
    deadline: float = 0.0  # loop time, once it runs

    @property
    def has_answered(self) -> bool:
        return self.connection.has_answered

    async def run(self) -> None:
        self.deadline = asyncio.get_running_loop().time() + self.timeout
        try:
            await self.connection.connect(self.deadline)
        except Exception as err:
            self.on_failure(self, err)
            raise

    def abort(self) -> None:
        self.connection.abort()


class Connector:
    """Makes round after round of attempts; each tries every URL once.

    ``on_failure()`` is called for each attempt that fails before its connection is open.
    """

    def __init__(
        self,
        settings: Settings,
        connection_name: str,
        reasons: Reasons,
        on_failure: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._connection_name = connection_name
        self._reasons = reasons
        self._on_failure_seen = on_failure
        self._untried: list[BrokerUrl] = []
        # How many URLs the present round has, and how many of them the broker has refused
        self._urls = 0
        self._refused = 0

    async def begin_round(self) -> None:
        """Find the URLs to try now; there are none if the project's function gives none."""
        self._refused = 0
        self._untried = []
        try:
            self._untried = list(await current_urls(self._settings))
        except NoUrl as err:
            self._reasons.note(self._settings.host, describe(err))
            self._reasons.log_failure(self._settings.host)
        else:
            random.shuffle(self._untried)
            self._reasons.keep_only(set(map(str, self._untried)))
        self._urls = len(self._untried)

    async def connect(self) -> UrlAttempt | None:
        """Return the first attempt whose connection is open; None if no URL is left to try."""
        if not self._untried:
            return None
        attempts = [self._make_attempt(url) for url in self._untried]
        # Each attempt has an earlier deadline of its own.
        longest = max(attempt.timeout for attempt in attempts) + 1.0
        longest += ATTEMPT_DELAY_ONCE_ANSWERED * len(attempts)
        try:
            winner = await Race(attempts).run(asyncio.get_running_loop().time() + longest)
        except Exception:  # _on_failure has noted those of each attempt.
            return None
        self._note_tried(winner)
        return winner

    def _make_attempt(self, url: BrokerUrl) -> UrlAttempt:
        connection = Connection(
            url, ssl_context=self._settings.ssl_context, connection_name=self._connection_name
        )
        timeout = url.connection_timeout or self._settings.connect_timeout
        return UrlAttempt(url, connection, timeout, self._on_failure)

    def _on_failure(self, attempt: UrlAttempt, err: Exception) -> None:
        self._note_tried(attempt)
        self.note_failure(attempt, err)
        self._on_failure_seen()
        self._reasons.log_failure(str(attempt.url))

    def _note_tried(self, attempt: UrlAttempt) -> None:
        self._untried = [url for url in self._untried if url != attempt.url]

    def note_failure(self, attempt: UrlAttempt, err: Exception) -> None:
        """Note why an attempt has failed, or the set-up of its connection."""
        reason = describe(err)
        if isinstance(err, (TimeoutError, asyncio.TimeoutError)):
            if not str(err):
                reason = f"no answer from {attempt.url} within {attempt.timeout:g} s"
        elif is_trouble(err):
            advice = advise(err, attempt.url)
            if advice:
                reason += f" ({advice})"
            self._refused += is_refusal(err)
        else:
            self._reasons.log_unexpected(err)
        self._reasons.note(str(attempt.url), reason)

    @property
    def has_refusals(self) -> bool:
        """Whether the broker has refused an attempt of this round."""
        return self._refused > 0

    @property
    def is_refused(self) -> bool:
        """Whether it has refused all of them."""
        return self._refused >= max(1, self._urls)
