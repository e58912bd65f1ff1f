"""Which permissions the layer needs, and which of them its user hasn't got.

What it needs is read from the commands by which it declares its queues and exchanges, so the names
are the real ones. Each permission is then tried by a command that needs it and changes nothing: to
delete or unbind what isn't there is no error, and RabbitMQ looks at the permission first (3.10, 4.0
and 4.3). Its error names the queue or exchange. Up to 3.13 it doesn't say which permission was
missing, so each command tries one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import carehare

from .._amqp.binding import TopologyChannel
from .._amqp.errors import ACCESS_REFUSED
from .._amqp.methods import Basic, Exchange, Method, Queue
from .._broker.topology import Topology
from .._settings.settings import Settings

CONFIGURE, WRITE, READ = PERMISSIONS = ("configure", "write", "read")


class Need(NamedTuple):
    """A permission for a queue or an exchange."""

    permission: str
    is_queue: bool
    name: str


def needs_of(id_: str, settings: Settings) -> dict[Need, bool]:
    """Return what the connections of a ``LoopLayer`` need, and whether the layer needs it, too.

    It goes without the others: those that are for the lease only.
    """
    needs = {Need(WRITE, False, settings.groups_exchange): True}
    first, second = (Topology(id_, number, settings) for number in (1, 2))
    for topology in (first, second):
        for command in _commands_of(topology):
            for need in _needs_of_command(command):
                is_required = not topology.is_for_lease(command)
                needs[need] = needs.get(need, False) or is_required
    return needs


def _commands_of(topology: Topology) -> Iterator[Method]:
    yield from topology.declare_commands()
    yield topology.bind_direct()
    yield Basic.Consume(queue=topology.queue)
    yield Basic.Consume(queue=topology.requests_queue)
    yield from topology.unbind_commands()  # by the next connection


def _needs_of_command(command: Method) -> Iterator[Need]:
    if isinstance(command, Queue.Declare):
        yield Need(CONFIGURE, True, command.queue)
    elif isinstance(command, Exchange.Declare):
        yield Need(CONFIGURE, False, command.exchange)
        if command.arguments:  # an alternate exchange, which is the exchange itself
            yield Need(READ, False, command.exchange)
            yield Need(WRITE, False, command.exchange)
    elif isinstance(command, Queue.Bind):
        yield Need(WRITE, True, command.queue)
        yield Need(READ, False, command.exchange)
    elif isinstance(command, (Exchange.Bind, Exchange.Unbind)):
        yield Need(WRITE, False, command.destination)
        yield Need(READ, False, command.source)
    elif isinstance(command, Basic.Consume):
        yield Need(READ, True, command.queue)


async def find_missing(
    amqp_channel: TopologyChannel, needs: Iterable[Need], spare: str
) -> list[Need]:
    """Return what is missing. ``spare`` is the name of nothing, and none of those needed.

    Without any permission to write, those to read can't be tried; then none of them is returned.
    """
    needs = list(needs)
    missing = await _refused(
        amqp_channel,
        {need: _try_to_change(need, spare) for need in needs if need.permission != READ},
    )
    writable = [need for need in needs if need.permission == WRITE and need not in missing]
    if writable:
        reads = {need: _unbind(writable, need.name) for need in needs if need.permission == READ}
        missing += await _refused(amqp_channel, reads)
    return missing


def _try_to_change(need: Need, spare: str) -> Method:
    if need.permission == CONFIGURE:
        if need.is_queue:
            return Queue.Delete(queue=need.name)
        return Exchange.Delete(exchange=need.name)
    if need.is_queue:
        return Queue.Unbind(queue=need.name, exchange=spare, routing_key="check")
    return Exchange.Unbind(destination=need.name, source=spare, routing_key="check")


def _unbind(writable: Sequence[Need], source: str) -> Method:
    """Return a command that needs to read ``source``."""
    # A queue is read by the same permission as an exchange of that name. To try it as a queue would
    # be an error in RabbitMQ's log.
    destination = next((need for need in writable if need.name != source), writable[0])
    if destination.is_queue:
        return Queue.Unbind(queue=destination.name, exchange=source, routing_key="check")
    return Exchange.Unbind(destination=destination.name, source=source, routing_key="check")


async def _refused(amqp_channel: TopologyChannel, commands: Mapping[Need, Method]) -> list[Need]:
    answers = {need: amqp_channel.call(command) for need, command in commands.items()}
    if answers:
        await asyncio.wait(answers.values())
    return [need for need, answer in answers.items() if _is_refused(need, answer)]


def _is_refused(need: Need, answer: asyncio.Future[None]) -> bool:
    exc = answer.exception()
    if exc is None:
        return False
    if not isinstance(exc, carehare.ChannelClosedByServer):
        raise exc
    # It may be that the other name of the command is refused, but only after this one was allowed.
    return exc.reply_code == ACCESS_REFUSED and f"'{need.name}'" in str(exc)
