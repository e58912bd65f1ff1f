"""A cluster of three nodes, which go away one after the other.

Measured figures go to the log (``pytest --log-cli-level=INFO``). With RabbitMQ 4 everything is
shown twice: with its metadata in Mnesia, then in Khepri.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.brokers import broker_commands
from tests.support.layers import inside, statistics_of
from tests.support.lengths import Length
from tests.support.log_lines import unhandled
from tests.support.name_server import serve_names
from tests.support.private_cluster import PrivateCluster
from tests.support.sockets import address_of
from tests.support.traffic import Outages, RollCall, Traffic
from tools.private_broker import PrivateBroker

figures = logging.getLogger("figures")

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

_CHANNELS = 100
_GROUPS = Length(full=1000, brief=100)
_RATE = 200  # messages a second
# Seconds until messages pass through another node. The brief tests run beside others on small
# machines, on which three nodes are a load.
_RECOVERY = Length(full=5.0, brief=20.0)
# Whether nodes are restarted, or only what runs on them, which clients can't tell apart.
_WHOLE_NODES = Length(full=1, brief=0)
# Seconds of traffic between two nodes' restarts.
_BETWEEN = Length(full=5.0, brief=0.5)
# Seconds around a loss in which a message can have been in flight.
_IN_FLIGHT = Length(full=1.0, brief=2.0)

pytestmark = [
    pytest.mark.slow,
    # Starting the cluster counts for the first test, and each test restarts nodes.
    pytest.mark.timeout(240),
]


@pytest.fixture(autouse=True)
def _nothing_unhandled(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    assert unhandled(caplog) == []


@pytest.fixture(scope="module")
def any_cluster(rabbitmq: None) -> Iterator[PrivateCluster]:
    with PrivateCluster(broker_commands()) as cluster:
        yield cluster


@pytest.fixture(scope="module", params=["Mnesia", "Khepri"])
def cluster(request: pytest.FixtureRequest, any_cluster: PrivateCluster) -> PrivateCluster:
    """One for all tests; each leaves it complete."""
    if request.param == "Khepri":
        if any_cluster.version < (4, 0):
            pytest.skip("RabbitMQ 3 has no Khepri")
        any_cluster.use_khepri()
    return any_cluster


@pytest.fixture
def hosts(cluster: PrivateCluster, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The option: the nodes' URLs, or one whose host name has their addresses."""
    # In random order, as name servers do it
    serve_names(monkeypatch, cluster=lambda: random.sample(cluster.addresses, 3))
    name = cluster.nodes[0].url.replace(cluster.addresses[0], "cluster.test")
    return {"list": cluster.urls, "name": name}


class Stage:
    """A sender and a receiver on the cluster, with traffic between them."""

    def __init__(self, sender: RabbitmqChannelLayer, receiver: RabbitmqChannelLayer) -> None:
        self.sender = sender
        self.receiver = receiver
        self.traffic = Traffic(sender, receiver, channels=_CHANNELS, rate=_RATE)
        self.groups = RollCall(sender, receiver, groups=_GROUPS.count)
        self.outages = Outages()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Stage]:
        async with self.groups, self.traffic:
            await self.groups.all_bound()
            await self.traffic.flows()
            with self.outages.recorded():
                yield self

    def address(self, layer: RabbitmqChannelLayer, role: str) -> str:
        """Of the node to which a layer is connected."""
        supervisor = getattr(inside(layer), role).supervisor
        return address_of(supervisor.connection)

    async def finish(self, name: str, cluster: PrivateCluster) -> None:
        """Every group and channel works, and only what was in flight is lost."""
        await self.groups.all_bound()
        await self.groups.call()
        await self.traffic.finish()
        books = self.traffic.books
        counters = statistics_of(self.sender).counters
        figures.info(
            "%s on %s: %s; %d unknown, %d unreachable; connections lost: %d",
            name,
            ".".join(map(str, cluster.version)),
            books.summary(),
            counters.outcome_unknown,
            counters.unreachable,
            len(self.outages.spans()),
        )
        assert books.twice() == []
        assert books.out_of_order == []
        assert books.raised_and_arrived() == []
        assert self.groups.twice() == []
        assert [
            (sent, self.outages.spans())
            for sent in books.lost()
            if not any(
                gone - _IN_FLIGHT.value < sent.begun_at < back
                for gone, back in self.outages.spans()
            )
        ] == []


@contextlib.asynccontextmanager
async def staged(
    open_layer: OpenLayer, sender_host: Any, receiver_host: Any
) -> AsyncIterator[Stage]:
    config = {"remote_capacity": 1000, "connect_timeout": 3}
    sender = await open_layer(host=sender_host, **config)
    receiver = await open_layer(host=receiver_host, **config)
    async with Stage(sender, receiver).running() as stage:
        yield stage


@pytest.mark.parametrize("kind", ["list", "name"])
async def test_the_node_that_holds_our_queue_is_killed(
    open_layer: OpenLayer, cluster: PrivateCluster, hosts: dict[str, Any], kind: str
) -> None:
    async with staged(open_layer, hosts[kind], hosts[kind]) as stage:
        await lose_the_node(stage, cluster, f"host as a {kind}")


async def lose_the_node(stage: Stage, cluster: PrivateCluster, name: str) -> None:
    node = cluster.node_at(stage.address(stage.receiver, "subscriber"))
    try:
        await asyncio.to_thread(node.kill)
        killed_at = time.monotonic()
        again = await stage.traffic.flows() - killed_at
        bound = await stage.groups.all_bound() - killed_at
        await stage.groups.call()
        assert stage.address(stage.receiver, "subscriber") != node.address
    finally:
        await asyncio.to_thread(node.start)
        await asyncio.to_thread(cluster.wait_complete, node)
    figures.info(
        "%s: delivering again after %.2f s, %d groups after %.2f s",
        name,
        again,
        _GROUPS.count,
        bound,
    )
    await stage.finish("node killed", cluster)
    assert again < _RECOVERY.value


async def test_all_nodes_are_restarted_one_after_the_other(
    open_layer: OpenLayer, cluster: PrivateCluster, hosts: dict[str, Any]
) -> None:
    async with staged(open_layer, hosts["list"], hosts["name"]) as stage:
        for node in cluster.nodes:
            await asyncio.to_thread(stop, node)
            try:
                await stage.traffic.flows()
            finally:
                await asyncio.to_thread(start, node)
                await asyncio.to_thread(cluster.wait_complete, node)
            await stage.traffic.flows()
            await asyncio.sleep(_BETWEEN.value)
        await stage.finish("rolling restart", cluster)
        assert stage.outages.spans(), "nobody was connected to any node: nothing was shown"


def stop(node: PrivateBroker) -> None:
    if _WHOLE_NODES.count:
        node.shut_down()
    else:
        node.ctl("stop_app")


def start(node: PrivateBroker) -> None:
    if _WHOLE_NODES.count:
        node.start()
    else:
        node.ctl("start_app")
