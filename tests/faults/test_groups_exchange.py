"""The groups exchange may be somebody else's: made before, and not to be configured by us."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.log_lines import LogLines
from tests.support.users import (
    EVERYTHING,
    ONLY_PUBLISHING,
    Permissions,
    User,
    call_as_admin,
    must_be_refused,
    must_work,
)

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

GROUP = "g"
MESSAGE = {"type": "m"}
# All but to configure the exchange itself
NOT_CONFIGURE: Permissions = (r"^crq\..*$", EVERYTHING[1], EVERYTHING[2])

slow = pytest.mark.slow  # a broker starts, and each rabbitmqctl takes a second


@pytest.fixture
async def open_one(open_layer: OpenLayer, user: User) -> OpenLayer:
    async def open_one(**config: Any) -> RabbitmqChannelLayer:
        return await open_layer(**{"host": user.url, "groups_exchange": "groups", **config})

    return open_one


async def declare(user: User, exchange_type: str = "direct", **options: Any) -> None:
    await asyncio.to_thread(
        call_as_admin, user, "exchange_declare", "groups", exchange_type, **options
    )


OTHER_PROPERTIES: list[dict[str, Any]] = [
    {"durable": True},
    {"auto_delete": True},
    {"durable": True, "auto_delete": True},
    {"arguments": {"alternate-exchange": "other"}},
    {"arguments": {"x-some-argument": 1}},
]


@slow
@pytest.mark.parametrize("permissions", [EVERYTHING, NOT_CONFIGURE])
@pytest.mark.parametrize("declared", OTHER_PROPERTIES)
async def test_it_is_used_as_it_is(
    open_one: OpenLayer,
    user: User,
    lines: LogLines,
    permissions: Permissions,
    declared: dict[str, Any],
) -> None:
    """By those who send and by those who receive, on each connection, and nobody changes it."""
    user.allow(permissions)
    await declare(user, **declared)
    before = await asyncio.to_thread(user.broker.list_exchanges, vhost=user.vhost)
    layer, other = await open_one(), await open_one()
    channel = await layer.new_channel()
    await layer.group_add(GROUP, channel)
    await other.group_send(GROUP, MESSAGE)
    assert await asyncio.wait_for(layer.receive(channel), 10) == MESSAGE
    await must_work(layer)
    await must_work(other)
    await asyncio.to_thread(user.disconnect)
    await lines.next("WARNING subscriber .*: connected again")
    await must_work(layer)
    after = await asyncio.to_thread(user.broker.list_exchanges, vhost=user.vhost)
    if not declared.get("auto_delete"):  # It may have gone with its last binding, and come again.
        assert [row for row in after if not row["name"].startswith("crq.")] == before
    assert not [line for line in lines.all if "cannot connect" in line]


@slow
async def test_a_process_that_only_sends_needs_no_permission_to_configure_it(
    open_one: OpenLayer, user: User
) -> None:
    receiver = await open_one(host=user.admin_url)
    channel = await receiver.new_channel()
    await receiver.group_add(GROUP, channel)
    user.allow(("", *ONLY_PUBLISHING[1:]))
    await (await open_one()).group_send(GROUP, MESSAGE)
    assert await asyncio.wait_for(receiver.receive(channel), 10) == MESSAGE


@slow
async def test_one_that_goes_is_declared_again(
    open_one: OpenLayer, user: User, lines: LogLines
) -> None:
    """An auto-delete exchange goes with its last binding: that of the last process with a queue."""
    user.allow(EVERYTHING)
    await declare(user, auto_delete=True)
    sender, receiver = await open_one(), await open_one()
    await must_work(receiver)
    await sender.group_send(GROUP, MESSAGE)
    await receiver.close()

    async def send_on() -> None:
        while True:
            with contextlib.suppress(BrokerUnavailable):
                await sender.group_send(GROUP, MESSAGE)
            await asyncio.sleep(0.05)

    # RabbitMQ 4.3 deletes the exchange a moment after the connection has been closed.
    sending = asyncio.create_task(send_on())
    await lines.next("WARNING publisher .*: lost .* 404 NOT_FOUND")
    sending.cancel()
    await asyncio.wait([sending])
    await lines.next("WARNING publisher .*: connected again")
    await must_work(sender)


@slow
@pytest.mark.parametrize("role", ["subscriber", "publisher"])
@pytest.mark.parametrize(
    ("exchange_type", "declared"),
    [("topic", {}), ("fanout", {"durable": True}), ("headers", {"auto_delete": True})],
)
async def test_one_of_another_type_is_named(
    open_one: OpenLayer,
    user: User,
    lines: LogLines,
    role: str,
    exchange_type: str,
    declared: dict[str, Any],
) -> None:
    """Once it is deleted all goes well, without a restart."""
    user.allow(EVERYTHING)
    await declare(user, exchange_type, **declared)
    layer = await open_one(operation_timeout=0.5)
    words = (
        r"406 PRECONDITION_FAILED - inequivalent arg 'type' for exchange 'groups' in vhost "
        rf"'{user.vhost}': received 'direct' but current is '{exchange_type}' \(groups need a "
        r"direct exchange: .*groups_exchange"
    )
    await must_be_refused(layer, lines, role, words)
    patient = await open_one()
    waiting = asyncio.create_task(patient.receive(await patient.new_channel()))
    await lines.next("WARNING subscriber .*: cannot connect")
    await asyncio.to_thread(call_as_admin, user, "exchange_delete", "groups")
    await must_work(patient)
    waiting.cancel()


@slow
async def test_an_internal_one_is_named(open_one: OpenLayer, user: User, lines: LogLines) -> None:
    user.allow(EVERYTHING)
    await declare(user, internal=True)
    words = "406 PRECONDITION_FAILED - inequivalent arg 'internal' for exchange 'groups'"
    await must_be_refused(await open_one(operation_timeout=0.5), lines, "subscriber", words)
