"""``check`` against a broker that is broken in one way after the other.

It names the culprit and the remedy, and takes less than ten seconds whatever is broken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from channels_rabbitmq._amqp.url import BrokerUrl
from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.brokers import broker_commands
from tests.support.checks import Checked, check
from tests.support.users import EVERYTHING, ONLY_PUBLISHING, PASSWORD, Permissions, User
from tools.private_broker import PrivateBroker, TlsFiles

pytestmark = pytest.mark.slow  # a broker starts, and each rabbitmqctl takes half a second

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

LONGEST = 10.0  # seconds, by the manual
NOT_GROUPS = r"^crq\..*$"
NOT_LEASES = r"^(groups|crq\.[a-z2-7]*(\.\d+(\.(groups|members|requests))?)?)$"


@pytest.fixture(scope="module")
def own_broker(rabbitmq: None, certs: Path) -> Iterator[PrivateBroker]:
    with PrivateBroker(broker_commands(), tls=TlsFiles.in_folder(certs)) as broker:
        yield broker


def assert_failed(checked: Checked, step: str, text: str, advice: str) -> None:
    name, told, todo = checked.the_failed()
    assert (name, text in told, advice in todo) == (step, True, True), (told, todo)
    assert PASSWORD not in f"{told}{todo}"
    assert checked.seconds < LONGEST


def changed(kind: int, pattern: str) -> Permissions:
    permissions = list(EVERYTHING)
    permissions[kind] = pattern
    return (permissions[0], permissions[1], permissions[2])


# What is missing, and what is told then. RabbitMQ up to 3.13 doesn't say which of the three it was.
MISSING: list[tuple[Permissions, str, str]] = [
    (("", "", ""), "exchange", "exchange 'groups'"),  # which isn't there
    (("^groups$", "", ""), "permissions", "may not configure crq.*; write 'groups', crq.*"),
    (changed(1, NOT_GROUPS), "permissions", "may not write 'groups'"),
    (changed(2, NOT_GROUPS), "permissions", "may not read 'groups'"),
    (changed(0, "^groups$"), "permissions", "may not configure crq.*"),
    (changed(1, "^groups$"), "permissions", "may not write crq.*"),
    (changed(2, "^groups$"), "permissions", "may not read crq.*"),
    (changed(0, r"^(groups|crq\.[a-z2-7]*)$"), "permissions", "crq.*.1.groups"),
]
ENOUGH: list[Permissions] = [
    changed(0, NOT_GROUPS),  # It is there by then.
    ONLY_PUBLISHING,
    (NOT_LEASES, NOT_LEASES, EVERYTHING[2]),
]


def add_users(own: User, permissions: list[Permissions]) -> list[str]:
    """Return the URLs of users with these permissions, made by one command."""
    names = [f"{own.name}-{number}" for number in range(len(permissions))]
    rows = ", ".join(_as_erlang(name, *each) for name, each in zip(names, permissions, strict=True))
    own.broker.ctl(
        "eval",
        f"""
        [begin
            ok = rabbit_auth_backend_internal:add_user(Name, <<"{PASSWORD}">>, Name),
            ok = rabbit_auth_backend_internal:set_permissions(
                Name, <<"{own.vhost}">>, Configure, Write, Read, Name)
        end || {{Name, Configure, Write, Read}} <- [{rows}]].
        """,
    )
    return [own.url.replace(f"{own.name}:", f"{name}:") for name in names]


def _as_erlang(*texts: str) -> str:
    escaped = (text.replace("\\", "\\\\") for text in texts)
    return "{" + ", ".join(f'<<"{text}">>' for text in escaped) + "}"


async def test_each_permission(user: User) -> None:
    patterns = " ".join(f"'{pattern}'" for pattern in EVERYTHING)
    permissions = [each for each, _, _ in MISSING] + ENOUGH
    urls = await asyncio.to_thread(add_users, user, permissions)
    for url, (_, step, text) in zip(urls, MISSING, strict=False):
        name = BrokerUrl.parse(url).username
        command = f"rabbitmqctl set_permissions -p {user.vhost} {name} {patterns}"
        assert_failed(await check(url), step, text, command)
    may_not_configure, only_publishes, has_no_leases = urls[len(MISSING) :]
    assert (await check(may_not_configure)).report.is_ok
    assert_failed(await check(only_publishes), "permissions", "read 'groups', crq.*", "--send-only")
    assert (await check(only_publishes, only_sends=True)).report.is_ok
    checked = await check(has_no_leases)
    assert checked.report.is_ok
    assert "may not configure crq.*.1.lease" in checked.warned()["permissions"]


async def test_a_virtual_host_that_the_user_may_not_use(user: User) -> None:
    url = user.url.removesuffix(user.vhost)
    checked = await check(url)
    assert_failed(checked, "virtual host", "access to vhost '/' refused", r"crq\..*)$")


async def test_a_limit(user: User) -> None:
    limit = '{"max-queues": 0}'
    await asyncio.to_thread(user.allow, EVERYTHING)
    await asyncio.to_thread(user.broker.ctl, "set_vhost_limits", "-p", user.vhost, limit)
    assert_failed(await check(user.url), "queue", "limit", "list_vhost_limits")


async def test_tls(own_broker: PrivateBroker, certs: Path) -> None:
    trusted = f"{own_broker.tls_url}/?cacertfile={certs / 'ca.pem'}"
    checked = await check(trusted)
    assert checked.report.is_ok
    assert "valid until" in checked.text("TLS")
    assert_failed(await check(own_broker.tls_url), "TLS", "certificate refused", "cacertfile")
    other = await check(f"{trusted}&server_name_indication=elsewhere")
    assert_failed(other, "TLS", "elsewhere", "server_name_indication")
    unchecked = await check(f"{own_broker.tls_url}/?verify=verify_none")
    assert "nothing checks" in unchecked.warned()["TLS"]
    to_plain = own_broker.url.replace("amqp:", "amqps:")
    assert_failed(await check(to_plain), "TLS", "doesn't speak TLS", "write amqp://")
    to_tls = own_broker.tls_url.replace("amqps:", "amqp:")
    assert_failed(await check(to_tls), "RabbitMQ", "TLS", "amqps://")


async def test_an_alarm(own_broker: PrivateBroker, open_layer: OpenLayer) -> None:
    layer = await open_layer(host=own_broker.url)
    await layer.connect()
    try:
        await asyncio.to_thread(own_broker.raise_memory_alarm)
        checked = await check(own_broker.url)
    finally:
        await asyncio.to_thread(own_broker.end_memory_alarm)
    assert_failed(checked, "alarms", "low on memory", "rabbitmq-diagnostics alarms")


async def test_a_frozen_broker(own_broker: PrivateBroker) -> None:
    """With the check's own limits, which are its longest wait."""
    own_broker.freeze()
    try:
        checked = await check(own_broker.url)
    finally:
        own_broker.thaw()
    assert_failed(checked, "RabbitMQ", "doesn't greet", "frozen")


async def test_a_broker_that_is_down(own_broker: PrivateBroker) -> None:
    await asyncio.to_thread(own_broker.kill)
    checked = await check(own_broker.url)
    assert_failed(checked, "TCP", "Connect call failed", "is RabbitMQ running")
