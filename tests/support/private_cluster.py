"""Three RabbitMQ nodes that are one cluster, on this machine.

    with PrivateCluster(find_broker_commands()) as cluster:
        print(cluster.urls)

Each has its own name, folder and distribution port, and listens for AMQP on an address of its own
(127.0.0.1 to 127.0.0.3) at one and the same port, so that one host name can stand for all. They
share an epmd and a cookie. Otherwise each is a ``PrivateBroker``, and as clean in the end.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.private_broker import BrokerFailed, PrivateBroker, free_port
from tools.start_stop import StartStop

_ADDRESSES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
# Three nodes that start at once on two cores need their time.
_JOIN_TIMEOUT = 60.0


class PrivateCluster(StartStop):
    """All methods block."""

    def __init__(self, commands: Path) -> None:
        self.port = _port_free_on(_ADDRESSES)
        cookie = secrets.token_hex(10)
        epmd_port = free_port()
        self.nodes = [
            PrivateBroker(
                commands, address=address, port=self.port, epmd_port=epmd_port, cookie=cookie
            )
            for address in _ADDRESSES
        ]

    @property
    def urls(self) -> list[str]:
        return [node.url for node in self.nodes]

    @property
    def addresses(self) -> tuple[str, ...]:
        return _ADDRESSES

    @property
    def version(self) -> tuple[int, ...]:
        return self.nodes[0].version

    def node_at(self, address: str) -> PrivateBroker:
        (node,) = [node for node in self.nodes if node.address == address]
        return node

    def start(self) -> None:
        with ThreadPoolExecutor() as threads:
            list(threads.map(PrivateBroker.start, self.nodes))
        first, *others = self.nodes
        for node in others:
            node.join(first)
        self.wait_complete(first)

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()

    def wait_complete(self, node: PrivateBroker) -> None:
        """Returns when all three nodes run, as far as this one knows."""
        deadline = time.monotonic() + _JOIN_TIMEOUT
        while True:
            status = json.loads(node.ctl("cluster_status", "--formatter", "json"))
            if len(status["running_nodes"]) == len(self.nodes):
                return
            if time.monotonic() > deadline:
                raise BrokerFailed(f"not complete: {status['running_nodes']}")
            time.sleep(0.1)

    def use_khepri(self) -> None:
        """Moves the cluster's metadata from Mnesia to Khepri, for good."""
        self.nodes[0].ctl("enable_feature_flag", "--opt-in", "khepri_db")


def _port_free_on(addresses: tuple[str, ...]) -> int:
    while True:
        port = free_port()
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for address in addresses:
                probe = probes.enter_context(socket.socket())
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address, port))
            return port
