"""What layers have declared on a private broker."""

from __future__ import annotations

import asyncio
from typing import Any

from tools.private_broker import PrivateBroker


async def queues(broker: PrivateBroker) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in await asyncio.to_thread(broker.list_queues)}


async def exchanges(broker: PrivateBroker) -> set[str]:
    rows = await asyncio.to_thread(broker.list_exchanges, "name")
    return {row["name"] for row in rows if row["name"].startswith("crq.")}


async def group_bindings(broker: PrivateBroker, group: str) -> list[str]:
    """To which exchange or queue a group is bound."""
    rows = await asyncio.to_thread(broker.list_bindings, "destination_name", "routing_key")
    return sorted(row["destination_name"] for row in rows if row["routing_key"] == group)


async def until_expired(broker: PrivateBroker, lease: str) -> None:
    while lease in await queues(broker):  # noqa: ASYNC110 - nobody tells when a queue expires
        await asyncio.sleep(0.1)
