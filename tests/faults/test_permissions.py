"""What a user of RabbitMQ needs to be allowed, and what is said when something isn't."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import carehare
import pytest
from channels.exceptions import ChannelFull

from channels_rabbitmq._broker import topology as _topology
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support import manual
from tests.support.layers import settings_of
from tests.support.log_lines import LogLines
from tests.support.members import receive
from tests.support.old_version import OldProcess, make_environment
from tests.support.users import (
    EVERYTHING,
    GROUP,
    MESSAGE,
    ONLY_PUBLISHING,
    PASSWORD,
    Permissions,
    User,
    must_be_refused,
    must_work,
    until_available,
)

pytestmark = pytest.mark.slow  # a broker starts, and each rabbitmqctl takes a second

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

# For a program that publishes by itself to the exchange, which must be there then:
OTHER_PROGRAMS: Permissions = ("", "^groups$", "")
# While processes with channels_rabbitmq 4 run, which have a user of their own:
TO_VERSION_4: Permissions = (
    r"^(groups|crq\..*)$",
    r"^(groups|crq\..*|amq\.default)$",
    r"^(groups|crq\..*)$",
)
# The same if they are one user:
WITH_VERSION_4: Permissions = (
    r"^(groups|crq\..*|channels_.*)$",
    r"^(groups|crq\..*|channels_.*|amq\.default)$",
    r"^(groups|crq\..*|channels_.*)$",
)

# The queue has no number on the first connection; all else that is declared for it has.
UNNUMBERED = r"^(groups|crq\.[a-z2-7]{16})$"
NOT_GROUPS = r"^crq\..*$"
ONLY_GROUPS = r"^groups$"


@pytest.fixture
async def open_one(open_layer: OpenLayer, user: User) -> OpenLayer:
    """Opens layers of the user's, that don't wait long."""

    async def open_one(**config: Any) -> RabbitmqChannelLayer:
        config = {"host": user.url, "operation_timeout": 0.5, **config}
        return await open_layer(groups_exchange="groups", **config)

    return open_one


def test_the_manual_names_them() -> None:
    assert " ".join(f"'{pattern}'" for pattern in EVERYTHING) in manual.TEXT
    assert f"'{ONLY_PUBLISHING[0]}'" in manual.TEXT
    assert f"'{TO_VERSION_4[1]}'" in manual.TEXT


class TestEnough:
    async def test_for_everything(self, open_one: OpenLayer, user: User, lines: LogLines) -> None:
        """Also on later connections, whose queue has another name and which delete an exchange."""
        user.allow(EVERYTHING)
        layer = await open_one(operation_timeout=10.0)
        other = await open_one(operation_timeout=10.0)
        await must_work(layer)
        for _ in range(2):
            await asyncio.to_thread(user.disconnect)
            for _ in range(4):
                await lines.next("(INFO|WARNING) (subscriber|publisher) .*: connected")
            await must_work(layer)
            channel = await layer.new_channel()
            await other.send(channel, MESSAGE)
            assert await receive(layer, channel) == MESSAGE
        await layer.close()
        await other.close()
        assert not [line for line in lines.rest() if "403" in line]

    async def test_for_publishing(self, open_one: OpenLayer, user: User, lines: LogLines) -> None:
        receiver = await open_one(host=user.admin_url)
        channel = await receiver.new_channel()
        await receiver.group_add(GROUP, channel)
        user.allow(ONLY_PUBLISHING)
        publisher = await open_one()
        await publisher.group_send(GROUP, MESSAGE)
        await publisher.send(channel, MESSAGE)
        assert await receive(receiver, channel) == MESSAGE
        assert await receive(receiver, channel) == MESSAGE
        await must_be_refused(await open_one(), lines, "subscriber", "403 ACCESS_REFUSED .*'crq")

    async def test_for_other_programs(self, open_one: OpenLayer, user: User) -> None:
        receiver = await open_one(host=user.admin_url)
        channel = await receiver.new_channel()
        await receiver.group_add(GROUP, channel)
        user.allow(OTHER_PROGRAMS)
        body = settings_of(receiver).codec.encode_for_group(GROUP, MESSAGE)
        async with carehare.connect(user.url) as connection:
            await connection.publish(body, exchange_name="groups", routing_key=GROUP)
        assert await receive(receiver, channel) == MESSAGE

    @pytest.mark.parametrize("is_one_user", [True, False])
    async def test_beside_version_4(
        self, open_one: OpenLayer, user: User, old_python: Path, is_one_user: bool
    ) -> None:
        user.allow(WITH_VERSION_4 if is_one_user else TO_VERSION_4)
        new = await open_one(operation_timeout=10.0)
        await must_work(new)
        new_channel = await new.new_channel()
        await new.group_add(GROUP, new_channel)
        old_url = user.url if is_one_user else user.admin_url
        async with OldProcess(old_python, host=old_url) as old:
            old_channel = await old.call("new_channel")
            await old.call("group_add", GROUP, old_channel)
            await old.call("group_send", GROUP, {"type": "from.old"})
            assert await receive(new, new_channel) == {"type": "from.old"}
            assert await old.receive(old_channel) == {"type": "from.old"}
            await new.group_send(GROUP, {"type": "from.new"})
            assert await receive(new, new_channel) == {"type": "from.new"}
            assert await old.receive(old_channel) == {"type": "from.new"}
            await old.call("send", new_channel, {"type": "direct.from.old"})
            assert await receive(new, new_channel) == {"type": "direct.from.old"}
            await new.send(old_channel, {"type": "direct.from.new"})
            assert await old.receive(old_channel) == {"type": "direct.from.new"}


@pytest.fixture(scope="module")
def old_python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python in an environment with channels_rabbitmq 4."""
    return make_environment(request.config, tmp_path_factory)


CONFIGURE, WRITE, READ = range(3)


class TestMissing:
    """None of the permissions can be left out. On 4.0 the broker says which of the three it was."""

    @pytest.mark.parametrize(
        ("kind", "reduced", "role", "what"),
        [
            (CONFIGURE, NOT_GROUPS, "subscriber", "exchange 'groups'"),  # which isn't there
            (CONFIGURE, NOT_GROUPS, "publisher", "exchange 'groups'"),
            (CONFIGURE, ONLY_GROUPS, "subscriber", r"queue 'crq\.[a-z2-7]{16}(\.\d+)?'"),
            (WRITE, NOT_GROUPS, "publisher", "exchange 'groups'"),
            (WRITE, ONLY_GROUPS, "subscriber", r"exchange 'crq\.[a-z2-7]{16}\.\d+'"),
            (READ, NOT_GROUPS, "subscriber", "exchange 'groups'"),
            (READ, ONLY_GROUPS, "subscriber", r"exchange 'crq\.[a-z2-7]{16}\.\d+'"),
            (READ, UNNUMBERED, "subscriber", r"exchange 'crq\.[a-z2-7]{16}\.\d+'"),
        ],
    )
    async def test_it_is_named(
        self,
        open_one: OpenLayer,
        user: User,
        lines: LogLines,
        kind: int,
        reduced: str,
        role: str,
        what: str,
    ) -> None:
        permissions = list(EVERYTHING)
        permissions[kind] = reduced
        user.allow((permissions[0], permissions[1], permissions[2]))
        words = f"403 ACCESS_REFUSED - .*access to {what} in vhost '{user.vhost}' refused"
        await must_be_refused(await open_one(), lines, role, words)

    @pytest.mark.parametrize("kind", [CONFIGURE, WRITE])
    async def test_the_numbered_names_are_needed_from_the_first_connection_on(
        self, open_one: OpenLayer, user: User, lines: LogLines, kind: int
    ) -> None:
        permissions = list(EVERYTHING)
        permissions[kind] = UNNUMBERED
        user.allow((permissions[0], permissions[1], permissions[2]))
        layer = await open_one()
        channel = await layer.new_channel()
        line = await lines.next("WARNING")
        words = r"403 ACCESS_REFUSED - .*access to exchange 'crq\.[a-z2-7]{16}\.1'"
        assert re.search(words, line)
        with pytest.raises(BrokerUnavailable, match="403 ACCESS_REFUSED"):
            await layer.group_add(GROUP, channel)

    async def test_publishing_needs_to_write(
        self, open_one: OpenLayer, user: User, lines: LogLines
    ) -> None:
        await must_work(await open_one(host=user.admin_url))
        user.allow(("^groups$", "", ""))
        await must_be_refused(
            await open_one(), lines, "publisher", "403 ACCESS_REFUSED .*exchange 'groups'"
        )

    @pytest.mark.parametrize("kind", [CONFIGURE, WRITE, READ])
    async def test_the_layer_works_without_a_lease(
        self, open_one: OpenLayer, user: User, lines: LogLines, kind: int
    ) -> None:
        """It is told once. A loss of the connection and the end leave nothing behind either."""
        permissions = list(EVERYTHING)
        permissions[kind] = r"^(groups|crq\.[a-z2-7]{16}(\.\d+(\.(groups|members|requests))?)?)$"
        user.allow((permissions[0], permissions[1], permissions[2]))
        layer = await open_one(operation_timeout=10.0)
        await must_work(layer)
        line = await lines.next("WARNING subscriber .*: goes without a lease")
        assert re.search(r"403 ACCESS_REFUSED - .*'crq\.[a-z2-7]{16}\.1\.lease'", line)
        await asyncio.to_thread(user.disconnect)
        await lines.next("WARNING subscriber .*: connected again")
        await must_work(layer)
        await layer.close()
        assert not [line for line in lines.rest() if "lease" in line]
        for rows in (user.broker.list_queues, user.broker.list_exchanges):
            rest = await asyncio.to_thread(rows, "name", vhost=user.vhost)
            assert not [row for row in rest if row["name"].startswith("crq.")]

    async def test_without_a_lease_a_full_queue_is_full(
        self, open_one: OpenLayer, user: User
    ) -> None:
        """The queue for requests is asked whether the process is there, and nobody minds."""
        names = r"^(groups|crq\.[a-z2-7]{16}(\.\d+(\.(groups|members|requests))?)?)$"
        user.allow((names, ".*", ".*"))
        receiver = await open_one(local_capacity=1, remote_capacity=2)
        sender = await open_one()
        channel = await receiver.new_channel()
        await receiver.connect()
        for _ in range(3):
            await sender.send(channel, {"n": 0})
        for _ in range(3):
            with pytest.raises(ChannelFull):
                await sender.send(channel, {"n": 0})
        for _ in range(3):
            assert await asyncio.wait_for(receiver.receive(channel), 10) == {"n": 0}
        assert receiver.statistics()[0].counters.malformed_requests == 0
        assert sender.statistics()[0].counters.unreachable == 0

    async def test_event_loops_of_one_call_tell_it_once(
        self, open_one: OpenLayer, user: User, lines: LogLines
    ) -> None:
        names = r"^(groups|crq\.[a-z2-7]{16}(\.\d+(\.(groups|members|requests))?)?)$"
        user.allow((names, ".*", ".*"))
        layer = await open_one()

        async def connect_and_close() -> None:
            await layer.connect()
            await layer.close()

        for _ in range(3):
            await asyncio.to_thread(asyncio.run, connect_and_close())
        assert len([line for line in lines.all if "goes without a lease" in line]) == 1

    async def test_the_default_exchange_for_channels_of_version_4(
        self, open_one: OpenLayer, user: User, lines: LogLines
    ) -> None:
        """The send ends, the log has the broker's words, and the layer goes on."""
        user.allow(EVERYTHING)
        layer = await open_one(operation_timeout=5.0)
        channel = await layer.new_channel()
        good = [layer.send(channel, MESSAGE) for _ in range(50)]
        bad = [layer.send("channels_abcdefghijkl!abc", MESSAGE) for _ in range(50)]
        await asyncio.wait_for(asyncio.gather(*good, *bad), 10)
        # One that isn't allowed costs nobody else's.
        for _ in good:
            assert await asyncio.wait_for(layer.receive(channel), 10) == MESSAGE
        line = await lines.next("WARNING publisher")
        assert "403 ACCESS_REFUSED" in line
        assert "'amq.default'" in line
        await must_work(layer)
        assert not [line for line in lines.rest() if "Traceback" in line]

    async def test_given_later_it_needs_no_restart(
        self, open_one: OpenLayer, user: User, lines: LogLines
    ) -> None:
        """A call of ``receive`` that waited all the time gets the next message."""
        user.allow(EVERYTHING)
        layer = await open_one()
        channel = await layer.new_channel()
        await until_available(lambda: layer.group_add(GROUP, channel))
        await must_work(layer)
        waiting = asyncio.create_task(layer.receive(channel))
        # Until the connections end, the broker goes by what it has looked up before.
        await asyncio.to_thread(user.allow, ONLY_PUBLISHING)
        await asyncio.to_thread(user.disconnect)
        await lines.next("WARNING subscriber .*: lost the connection .*320 CONNECTION_FORCED")
        await lines.next("WARNING subscriber .*: cannot connect .*403 ACCESS_REFUSED")
        await asyncio.to_thread(user.allow, EVERYTHING)
        await lines.next("WARNING subscriber .*: connected again")
        await until_available(lambda: layer.send(channel, MESSAGE))
        assert await asyncio.wait_for(waiting, 10) == MESSAGE


class TestRefusedConnections:
    @pytest.mark.parametrize("role", ["subscriber", "publisher"])
    async def test_wrong_password(
        self, open_one: OpenLayer, user: User, lines: LogLines, role: str
    ) -> None:
        url = user.url.replace(PASSWORD, PASSWORD + "-wrong")
        words = "403 ACCESS_REFUSED - Login was refused"
        await must_be_refused(await open_one(host=url), lines, role, words)

    async def test_no_such_vhost(self, open_one: OpenLayer, user: User, lines: LogLines) -> None:
        layer = await open_one(host=f"{user.url}-missing")
        words = f"530 NOT_ALLOWED - vhost {user.vhost}-missing not found"
        await must_be_refused(layer, lines, "subscriber", words)

    async def test_no_access_to_the_vhost(
        self, open_one: OpenLayer, user: User, lines: LogLines
    ) -> None:
        words = f"530 NOT_ALLOWED - access to vhost '{user.vhost}' refused for user '{user.name}'"
        await must_be_refused(await open_one(), lines, "publisher", words)


class TestLimits:
    """A process needs two connections with four AMQP channels, two queues, three exchanges."""

    async def test_connections(self, open_one: OpenLayer, user: User, lines: LogLines) -> None:
        user.allow(EVERYTHING)
        user.broker.ctl("set_user_limits", user.name, '{"max-connections": 1}')
        layer = await open_one()
        channel = await layer.new_channel()
        await lines.next("INFO subscriber .*: connected")
        with pytest.raises(BrokerUnavailable, match=r"530 NOT_ALLOWED .*limit \(1\) is reached"):
            await layer.send(channel, MESSAGE)
        line = await lines.next("WARNING")
        assert re.match("WARNING publisher .*: cannot connect", line)
        assert "user connection limit (1) is reached" in line
        args = ("set_user_limits", user.name, '{"max-connections": 2}')
        await asyncio.to_thread(user.broker.ctl, *args)
        await must_work(layer)

    @pytest.mark.parametrize("kind", ["user", "vhost"])
    async def test_connections_while_it_reconnects(
        self, open_one: OpenLayer, user: User, lines: LogLines, kind: str
    ) -> None:
        user.allow(EVERYTHING)
        whose = (user.name,) if kind == "user" else ("-p", user.vhost)
        user.broker.ctl(f"set_{kind}_limits", *whose, '{"max-connections": 2}')
        layer = await open_one(operation_timeout=10.0)
        await must_work(layer)
        await asyncio.to_thread(user.disconnect)
        for _ in range(2):
            line = await lines.next("WARNING (subscriber|publisher) .*: connected again")
            assert float(re.findall(r"after ([\d.]+) s", line)[0]) < 5
        await must_work(layer)

    async def test_amqp_channels(self, open_one: OpenLayer, user: User, lines: LogLines) -> None:
        user.allow(EVERYTHING)
        user.broker.ctl("set_user_limits", user.name, '{"max-channels": 4}')
        await must_work(await open_one())
        words = r"530 NOT_ALLOWED - number of channels opened for user .* limit of \(?4\b"
        await must_be_refused(await open_one(), lines, "publisher", words)

    async def test_queues(self, open_one: OpenLayer, user: User, lines: LogLines) -> None:
        """Two are enough: it goes without a lease."""
        user.allow(EVERYTHING)
        user.broker.ctl("set_vhost_limits", "-p", user.vhost, '{"max-queues": 1}')
        words = f"406 PRECONDITION_FAILED - .*queue limit in vhost '{user.vhost}' .1. is reached"
        await must_be_refused(await open_one(), lines, "subscriber", words)
        exchanges = user.broker.list_exchanges("name", vhost=user.vhost)
        assert not [row for row in exchanges if row["name"].startswith("crq.")]
        await asyncio.to_thread(
            user.broker.ctl, "set_vhost_limits", "-p", user.vhost, '{"max-queues": 2}'
        )
        await must_work(await open_one())
        line = await lines.next("WARNING subscriber .*: goes without a lease")
        assert re.search(r"406 PRECONDITION_FAILED - .*queue limit in vhost", line)

    @pytest.mark.parametrize("queues", [2, 3, 4])
    async def test_queues_while_it_reconnects(
        self, open_one: OpenLayer, user: User, lines: LogLines, queues: int
    ) -> None:
        """The lease of the former connection counts, and must not keep the next one's queue out."""
        user.allow(EVERYTHING)
        limits = f'{{"max-queues": {queues}}}'
        user.broker.ctl("set_vhost_limits", "-p", user.vhost, limits)
        layer = await open_one(operation_timeout=10.0)
        await must_work(layer)
        for _ in range(3):
            await asyncio.to_thread(user.disconnect)
            line = await lines.next("WARNING subscriber .*: connected again")
            assert float(re.findall(r"after ([\d.]+) s", line)[0]) < 5
            await must_work(layer)
        refused = [line for line in lines.all if "cannot connect" in line and "limit" in line]
        assert refused == []

    @pytest.mark.parametrize(("queues", "seconds"), [(16, 5.0), (12, 15.0)])
    async def test_queues_of_processes_that_reconnect_at_the_same_time(
        self,
        open_one: OpenLayer,
        user: User,
        lines: LogLines,
        monkeypatch: pytest.MonkeyPatch,
        queues: int,
        seconds: float,
    ) -> None:
        """Four for each are enough. With three, some wait until the leases of others are over."""
        if queues == 12:
            monkeypatch.setattr(_topology, "LEASE", 3.0)
        user.allow(EVERYTHING)
        limits = f'{{"max-queues": {queues}}}'
        user.broker.ctl("set_vhost_limits", "-p", user.vhost, limits)
        layers = [await open_one(operation_timeout=10.0) for _ in range(4)]
        for layer in layers:
            await must_work(layer)
        await asyncio.to_thread(user.disconnect)
        for _ in layers:
            line = await lines.next("WARNING subscriber .*: connected again")
            assert float(re.findall(r"after ([\d.]+) s", line)[0]) < seconds
        for layer in layers:
            await must_work(layer)
        refused = [line for line in lines.all if "queue limit" in line]
        assert bool(refused) == (queues == 12)

    @pytest.mark.parametrize("exchanges", [4, 5, 9])
    async def test_exchanges(
        self, open_one: OpenLayer, user: User, lines: LogLines, exchanges: int
    ) -> None:
        """4 without a lease, 5 with it, 9 with that of the former connection."""
        if user.broker.version < (4, 2):
            pytest.skip("RabbitMQ has this limit since 4.2")
        user.allow(EVERYTHING)
        limit = f"length(rabbit_exchange:list_names()) + {exchanges}"
        user.broker.ctl("eval", f"application:set_env(rabbit, cluster_exchange_limit, {limit}).")
        try:
            layer = await open_one(operation_timeout=10.0)
            await must_work(layer)
            await asyncio.to_thread(user.disconnect)
            line = await lines.next("WARNING subscriber .*: connected again")
            assert float(re.findall(r"after ([\d.]+) s", line)[0]) < 5
            await must_work(layer)
        finally:
            user.broker.ctl("eval", "application:unset_env(rabbit, cluster_exchange_limit).")
        without = [line for line in lines.all if "goes without a lease" in line]
        assert len(without) == (exchanges < 9)
        assert not [line for line in lines.all if "cannot connect" in line]
