"""The steps of ``check`` that need a whole layer: its queue, and messages there and back."""

from __future__ import annotations

import asyncio
import secrets
import statistics
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from .._amqp.methods import Queue
from .._broker.normal_queues import NormalTopology
from .._broker.shared import Shared
from .._broker.supervisor import Supervisor
from .._futures import run_until
from .._settings.settings import Settings
from ..status import MissingProcess
from ..status import Status as ProcessesStatus
from .check_hints import advise_on_reason
from .check_report import Finding, Status
from .check_trial import Broken
from .own_layer import make_loop_layer

# Seconds, at most, for one call of the layer. The project's own limits may be lower.
_CALL = 3.0
# For one message there and back, and how many there are of each kind
_ROUND_TRIP = 2.0
_ROUND_TRIPS = 10
# For the answers of other processes
_ANSWERS = 1.0
_MOST_SHOWN = 3

_ALARM = (
    "RabbitMQ takes no messages before it has more free memory or disk space: "
    "`rabbitmq-diagnostics alarms` and `rabbitmqctl status` on its machine tell which"
)
_LOST = (
    "if it isn't frozen or overloaded (`rabbitmq-diagnostics status`): does a policy or another "
    "program expire or take the messages? rabbitmqctl list_policies, list_consumers"
)


class LayerSteps:
    """Each method is one step, with a layer of its own on the running event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = replace(
            settings,
            connect_timeout=min(settings.connect_timeout, _CALL),
            operation_timeout=min(settings.operation_timeout, _CALL),
        )
        self._loop = asyncio.get_running_loop()
        self._layer = make_loop_layer(self._settings)
        self._codec = settings.codec

    async def close(self) -> None:
        await self._layer.close()

    async def queue(self) -> Finding:
        """Declare and consume all that a process has for itself."""
        subscriber = self._layer.subscriber
        await self._connect(subscriber.supervisor)
        return Finding(f"{subscriber.queue}, with its bindings and exchanges")

    async def alarms(self) -> Finding:
        """Find out whether RabbitMQ takes messages."""
        publisher = self._layer.publisher
        await self._connect(publisher.supervisor)
        if publisher.is_blocked:
            raise Broken(f"RabbitMQ blocks publishers: {publisher.blocked_reason}", _ALARM)
        return Finding("none: RabbitMQ takes messages")

    async def _connect(self, supervisor: Supervisor) -> None:
        try:
            await supervisor.wait_tried(self._loop.time() + _CALL)
        except ConnectionError:
            reason = supervisor.last_reason
            if not reason:
                raise
            raise Broken(reason, advise_on_reason(reason)) from None

    async def send(self) -> Finding:
        """Send to a channel."""
        channel = await self._layer.new_channel("check.")
        body = self._codec.encode_for_channel(channel, _message())
        return await self._round_trips(
            lambda: self._layer.send(channel, body), lambda: self._layer.receive(channel)
        )

    async def group_send(self) -> Finding:
        """Send to a group with one member."""
        channel = await self._layer.new_channel("check.")
        group = f"check.{secrets.token_hex(8)}"
        body = self._codec.encode_for_group(group, _message())
        await self._layer.group_add(group, channel, None)
        finding = await self._round_trips(
            lambda: self._layer.group_send(group, body), lambda: self._layer.receive(channel)
        )
        await self._layer.group_discard(group, channel)
        return finding

    async def normal_channel(self) -> Finding:
        """Send to a channel without "!" in its name; its queue is deleted again."""
        channel = f"check.{secrets.token_hex(8)}"
        body = self._codec.encode_for_channel(channel, _message())
        try:
            return await self._round_trips(
                lambda: self._layer.send_normal(channel, body),
                lambda: self._layer.receive_normal(channel),
            )
        finally:
            await self._delete(channel)

    async def _delete(self, channel: str) -> None:
        names = NormalTopology(self._layer.id, self._settings, lambda channel: 1, Shared())
        queue = names.queue(channel)
        connection = self._layer.publisher.supervisor.connection
        if connection is not None and connection.is_open:
            await connection.open_topology().call(Queue.Delete(queue=queue))

    async def _round_trips(
        self,
        send: Callable[[], Coroutine[Any, Any, None]],
        receive: Callable[[], Coroutine[Any, Any, object]],
    ) -> Finding:
        """Send and receive some messages, one after the other."""
        times = []
        for _ in range(_ROUND_TRIPS):
            begun_at = self._loop.time()
            await send()
            try:
                await run_until(begun_at + _ROUND_TRIP, receive())
            except TimeoutError:
                text = f"a message was sent, and didn't arrive within {_ROUND_TRIP:g} s"
                raise Broken(text, _LOST) from None
            times.append(self._loop.time() - begun_at)
        median = statistics.median(times) * 1000
        return Finding(f"{_ROUND_TRIPS} messages there and back, {median:.1f} ms each (median)")

    async def processes(self) -> Finding:
        """Ask who else uses this exchange."""
        status = await self._layer.status(_ANSWERS)
        others = len(self._layer.peers.processes.known())
        where = f"on the exchange {self._settings.groups_exchange!r}: "
        if status.silent or status.absent:
            text, advice = describe_missing(status, others)
            return Finding(where + text, advice, Status.WARNING)
        told = f"{others} {'other answers' if others == 1 else 'others answer'}"
        if not others:
            told = "no other process answers (those with 4.x or other keys never do)"
        return Finding(where + told)


def describe_missing(status: ProcessesStatus, others: int) -> tuple[str, str]:
    """Return which of the others don't answer, and which aren't connected; and what to do."""
    texts, advice = [], []
    if status.silent:
        texts.append(f"no answer within {_ANSWERS:g} s: {_show(status.silent)}")
        advice.append(
            "one that gives no answer is blocked, stopped or killed, or has an older release"
        )
    if status.absent:
        texts.append(f"without a connection: {_show(status.absent)}")
        advice.append("one without a connection has lost it, or was killed, a moment ago")
    advice.append("`python -m channels_rabbitmq status` shows each")
    all_others = f"{others} {'other' if others == 1 else 'others'}"
    return f"of {all_others}, {'; '.join(texts)}", "; ".join(advice)


def _show(missing: Sequence[MissingProcess]) -> str:
    shown = [one.id + _place(one) for one in missing[:_MOST_SHOWN]]
    more = len(missing) - len(shown)
    return f"{len(missing)} ({', '.join(shown)}{f' and {more} more' if more else ''})"


def _place(one: MissingProcess) -> str:
    return f" on {one.host or '?'}, pid {one.pid or '?'}" if one.host or one.pid else ""


def _message() -> dict[str, Any]:
    return {"type": "channels_rabbitmq.check"}
