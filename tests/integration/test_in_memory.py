"""``InMemoryChannelLayer`` says of each call what ``RabbitmqChannelLayer`` says of it."""

from __future__ import annotations

import asyncio
import datetime
import re
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from django.utils.functional import SimpleLazyObject

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.testing import InMemoryChannelLayer

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]
Step = Callable[[RabbitmqChannelLayer, str], Awaitable[Any]]

_DAY = datetime.date(2026, 1, 1)
_MESSAGES: list[Any] = [
    {"type": "n", "list": [(1, b"2"), {"a": {"b": None}}], "f": 1.5, "neg": -(2**63)},
    {"lazy": SimpleLazyObject(lambda: "text"), "view": memoryview(b"v"), "array": bytearray(b"a")},
    {"when": _DAY},
    {"deep": [{"id": uuid.UUID(int=1)}]},
    {"scores": {1: 2}},
    {1: "a"},
    {"set": {1}},
    {"huge": 2**64},
    {"__asgi_group__": "g"},
    {"__asgi_channel__": "c"},
    {"__asgi_encrypted__": b""},
    {"big": "x" * 3000},
    {"lone": "\ud800"},
    ["no", "dict"],
    None,
]
_GROUPS: list[Any] = ["room", "a b", "a!b", "x" * 100, "", None, "ümlaut"]
_CHANNELS: list[Any] = [*_GROUPS, "specific.", "a!b!c", "crq.aaaaaaaaaaaaaaaa!x"]


async def _outcome(call: Awaitable[Any]) -> object:
    """What came of it, as a text without ids; and a message, for a call that returned one."""
    try:
        result = await asyncio.wait_for(call, 10)
    except Exception as err:
        return re.sub(r"(ValueError: The channel \S+) .*", r"\1", f"{type(err).__name__}: {err}")
    # The id's process, the caller's part of the name, and a random part
    return re.sub(r"crq\.[a-z2-7]{16}!(\S*?)[a-z2-7]{12}\b", r"ID!\1RANDOM", repr(result))


async def _sent(layer: RabbitmqChannelLayer, message: Any) -> list[object]:
    """What one member receives of a message to the group, and of one to its channel."""
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    outcomes = []
    for call in (layer.group_send("g", message), layer.send(channel, message)):
        outcomes.append(await _outcome(call))
        if outcomes[-1] == "None":
            outcomes.append(await _outcome(layer.receive(channel)))
    await layer.group_discard("g", channel)
    return outcomes


async def _members(layer: RabbitmqChannelLayer) -> list[object]:
    channels = [await layer.new_channel() for _ in range(3)]
    infos: list[Any] = [{"user": ("a", 1)}, None, {"seat": 3}]
    for channel, info in zip(channels, infos, strict=True):
        await layer.group_add("room", channel, info)
    await layer.group_add("room", channels[2], {"seat": 4})
    await layer.group_discard("room", channels[1])
    found = await layer.group_members("room", timeout=5)
    counts = [await layer.group_count(group, timeout=5) for group in ("room", "empty")]
    order = [channels.index(member.channel) for member in found.members]
    bad: list[Any] = [{"when": _DAY}, {"big": "x" * 5000}, "text", {1: 2}]
    refused = [await _outcome(layer.group_add("room", channels[0], info)) for info in bad]
    timeouts: list[Any] = [0, -1, "1", None, True]
    refused += [await _outcome(layer.group_members("room", timeout)) for timeout in timeouts]
    return [
        sorted((n, member.info) for n, member in zip(order, found.members, strict=True)),
        replace(found, members=()),
        *(counts, refused),
    ]


async def _names(layer: RabbitmqChannelLayer) -> list[object]:
    message = {"type": "n"}
    calls: list[Awaitable[Any]] = []
    for group in _GROUPS[1:]:
        calls += [layer.group_send(group, message), layer.group_count(group)]
        calls += [layer.group_add(group, "a!b"), layer.group_discard(group, "a!b")]
    for name in _CHANNELS[:-1]:
        calls += [layer.send(name, message)] if "!" not in str(name) or "b!c" in name else []
        calls += [layer.group_add("room", name), layer.group_discard("room", name)]
        calls += [layer.new_channel(name)]
    outcomes = [await _outcome(call) for call in calls]
    outcomes += [await _outcome(layer.receive(name)) for name in _CHANNELS]
    return outcomes


async def _normal_channels(layer: RabbitmqChannelLayer) -> list[object]:
    outcomes = [await _outcome(layer.send("jobs", message)) for message in _MESSAGES[:4]]
    outcomes += [await _outcome(layer.receive("jobs")) for _ in range(2)]
    outcomes.append(await _outcome(layer.group_add("g", "jobs", {"info": 1})))
    await layer.group_add("g", "jobs")
    await layer.group_send("g", {"type": "job"})
    outcomes.append(await _outcome(layer.receive("jobs")))
    outcomes.append(await layer.group_count("g", timeout=5))
    await layer.group_discard("g", "jobs")
    await layer.send("jobs", {"type": "old"})
    await layer.flush()
    await layer.send("jobs", {"type": "new"})
    return [*outcomes, await _outcome(layer.receive("jobs"))]


async def _closed(layer: RabbitmqChannelLayer) -> list[object]:
    """What becomes of calls when the layer is closed, on this event loop or one that has ended."""

    async def use() -> str:
        channel = await layer.new_channel()
        await layer.close()
        return channel

    ended = await asyncio.to_thread(asyncio.run, use())
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    waiting = [asyncio.create_task(layer.receive(name)) for name in (channel, "jobs")]
    await asyncio.sleep(0)
    outcomes: list[object] = [one.receivers for one in layer.statistics()]
    await layer.close()
    outcomes += [await _outcome(call) for call in waiting]
    calls: list[Awaitable[Any]] = [
        *(layer.receive(name) for name in (channel, ended, "jobs")),
        *(layer.group_add("g", name) for name in (channel, ended)),
        layer.group_discard("g", channel),
        layer.new_channel(),
        layer.send(channel, {}),
        layer.status(),
    ]
    outcomes += [await _outcome(call) for call in calls]
    return [*outcomes, len(layer.statistics())]


@pytest.mark.parametrize("serializer", ["msgpack", "json"])
async def test_messages(open_layer: OpenLayer, serializer: str) -> None:
    config: dict[str, Any] = {"max_message_size": 2000, "serializer": serializer}
    layers = [await open_layer(**config), InMemoryChannelLayer(**config)]
    for message in _MESSAGES:
        of_both = [await _sent(layer, message) for layer in layers]
        assert of_both[0] == of_both[1]
    key = ["secret"]
    encrypted = InMemoryChannelLayer(**config, symmetric_encryption_keys=key)
    assert (await _sent(encrypted, {"type": "n"}))[1] == "{'type': 'n'}"


async def test_names(open_layer: OpenLayer) -> None:
    layers = [await open_layer(), InMemoryChannelLayer()]
    of_both = [await _names(layer) for layer in layers]
    assert of_both[0] == of_both[1]
    assert len([one for one in of_both[0] if "TypeError" in str(one)]) > 30
    assert len([one for one in of_both[0] if "ValueError" in str(one)]) > 1


async def test_members(open_layer: OpenLayer) -> None:
    layers = [await open_layer(), InMemoryChannelLayer()]
    of_both = [await _members(layer) for layer in layers]
    assert of_both[0] == of_both[1]


async def test_normal_channels(open_layer: OpenLayer) -> None:
    config: dict[str, Any] = {"normal_channels": True, "allow_flush": True}
    layers = [await open_layer(**config), InMemoryChannelLayer(**config)]
    of_both = [await _normal_channels(layer) for layer in layers]
    assert of_both[0] == of_both[1]
    assert await _outcome(InMemoryChannelLayer().send("jobs", {})) == await _outcome(
        (await open_layer()).send("jobs", {})
    )


async def test_closing(open_layer: OpenLayer) -> None:
    layers = [await open_layer(normal_channels=True), InMemoryChannelLayer(normal_channels=True)]
    of_both = [await _closed(layer) for layer in layers]
    assert of_both[0] == of_both[1]
