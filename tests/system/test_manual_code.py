"""The manual's code runs, on a RabbitMQ."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from channels.layers import channel_layers
from channels.testing import ApplicationCommunicator, WebsocketCommunicator

from channels_rabbitmq import _codec
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from channels_rabbitmq.lifespan import LifespanApp
from tests.support.brokers import Broker
from tests.support.manual import (
    TEXT,
    URL,
    block,
    commands,
    in_thread,
    plain,
    run,
)
from tests.support.members import must_work, receive, reconnect
from tests.support.normal_channels import delete_queue, queue_of
from tools.private_broker import BrokerFailed, PrivateBroker, TlsFiles, free_port

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]
OpenFromSettings = Callable[[dict[str, Any]], Awaitable[RabbitmqChannelLayer]]


async def test_encryption(
    open_layer: OpenLayer, open_from_settings: OpenFromSettings, broker: Broker
) -> None:
    layer = await open_from_settings(run("encryption", (URL, broker.url)))
    # As the manual says of changing keys, and of programs with other keys.
    await must_work(layer, await open_layer(symmetric_encryption_keys=["old key"]))
    channel = await layer.new_channel()
    for keys in (["third key"], None):
        stranger = await open_layer(symmetric_encryption_keys=keys)
        await stranger.send(channel, {"type": "lost"})
    await layer.send(channel, {"type": "next"})
    assert await receive(layer, channel) == {"type": "next"}


async def test_encryption_by_another_program(open_layer: OpenLayer) -> None:
    import base64
    import hashlib

    import msgpack
    from cryptography.fernet import Fernet

    codec = _codec.MessageCodec(max_message_size=1000, symmetric_encryption_keys=["new key"])
    key = base64.urlsafe_b64encode(hashlib.sha256(b"new key").digest())
    token = Fernet(key).encrypt(msgpack.packb({"type": "t"}))
    body = msgpack.packb({"__asgi_group__": "chat", "__asgi_encrypted__": token})
    assert codec.decode(body).message() == {"type": "t"}


async def test_serializers(
    open_layer: OpenLayer, open_from_settings: OpenFromSettings, broker: Broker
) -> None:
    layer = await open_from_settings(run("serializer", (URL, broker.url)))
    await must_work(layer, await open_layer(serializer="json"))
    own = run("serializer-class")["PickleSerializer"]
    await must_work(await open_layer(serializer=own), await open_layer(serializer=own))
    channel = await layer.new_channel()
    for serializer in (own, "msgpack"):
        stranger = await open_layer(serializer=serializer)
        await stranger.send(channel, {"type": "lost"})
    await layer.send(channel, {"type": "next"})
    assert await receive(layer, channel) == {"type": "next"}


async def test_a_serializer_by_another_program() -> None:
    import msgpack

    from channels_rabbitmq._serializers import load_serializer

    codec = _codec.MessageCodec(max_message_size=1000, serializer=load_serializer("json"))
    content = {"__asgi_serializer__": "json", "__asgi_serialized__": b'{"type": "t"}'}
    body = msgpack.packb({"__asgi_group__": "chat", **content})
    assert codec.decode(body).message() == {"type": "t"}


async def test_host_function(
    open_from_settings: OpenFromSettings,
    broker: Broker,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    password, address = "guest", broker.url.rpartition("@")[2]
    secret = tmp_path / "password"
    secret.write_text(f"{password}\n")
    module = types.ModuleType("mysite.rabbitmq")
    module.__dict__.update(
        run(
            "host-function",
            ("/run/secrets/rabbitmq-password", str(secret)),
            ("web:", "guest:"),
            ("rabbit.example.com/asgi", address),
        )
    )
    monkeypatch.setitem(sys.modules, "mysite", types.ModuleType("mysite"))
    monkeypatch.setitem(sys.modules, "mysite.rabbitmq", module)
    layer = await open_from_settings(run("host-function-settings"))
    await must_work(layer)
    await reconnect(layer)
    await must_work(layer)


async def test_cluster(open_from_settings: OpenFromSettings, broker: Broker) -> None:
    """Two nodes are down, the third takes it."""
    first, second, last = re.findall(r"amqp://web:secret@rabbit.*?(?=\")", block("cluster"))
    virtual_host = urlsplit(broker.url).path
    namespace = run(
        "cluster",
        (first, f"amqp://127.0.0.1:{free_port()}{virtual_host}"),
        (second, f"amqp://127.0.0.1:{free_port()}{virtual_host}"),
        (last, broker.url),
    )
    await must_work(await open_from_settings(namespace))


@pytest.mark.timeout(120)
async def test_tls(
    open_from_settings: OpenFromSettings,
    private_broker_factory: Callable[..., PrivateBroker],
    certs: Path,
) -> None:
    """With a broker that demands a client certificate."""
    private = private_broker_factory(tls=TlsFiles.in_folder(certs, mutual=True))
    replacements = (
        ("web:secret@rabbit.example.com/asgi", f"guest:guest@localhost:{private.tls_port}"),
        ("/etc/mysite/", f"{certs}/"),
    )
    await must_work(await open_from_settings(run("tls-url", *replacements)))
    await must_work(await open_from_settings(run("tls-context", *replacements)))


@pytest.mark.timeout(120)
async def test_permissions(
    open_layer: OpenLayer, private_broker_factory: Callable[..., PrivateBroker]
) -> None:
    private = private_broker_factory()

    def rabbitmqctl(*words: str) -> Awaitable[str]:
        return asyncio.to_thread(private.ctl, *words)

    for command, *words in commands("permissions"):
        assert command == "rabbitmqctl"
        await rabbitmqctl(*words)
    url = private.url.replace("guest:guest", "web:secret") + "/asgi"
    config: dict[str, Any] = {"host": url, "groups_exchange": "groups", "operation_timeout": 2}
    layer = await open_layer(**config)
    await must_work(layer)
    await reconnect(layer)
    await must_work(layer)

    # A channel of a 4.x process is a queue's name, on the default exchange.
    [write] = re.findall(r"``'(\S+amq\S+)'``", TEXT)
    everything = await open_layer(**{**config, "host": private.url + "/asgi"})
    await rabbitmqctl("set_permissions", "-p", "asgi", "guest", ".*", ".*", ".*")
    connection = await everything.carehare_connection
    await connection.queue_declare("channels_abcdefghijkl", exclusive=True)
    same = words[-1]
    await rabbitmqctl("set_permissions", "-p", "asgi", "web", same, write, same)
    async with connection.acking_consumer("channels_abcdefghijkl") as consumer:
        await layer.send("channels_abcdefghijkl!x", {"type": "t"})
        await asyncio.wait_for(consumer.next_delivery(), 10)

    # Who only sends
    [patterns] = re.findall(r"only sends needs ``'(\S*)'``, ``'(\S*)'`` and ``'(\S*)'``", plain())
    await rabbitmqctl("set_permissions", "-p", "asgi", "web", *patterns)
    await must_work(everything, await open_layer(**config))


def test_logging() -> None:
    """In a process of its own: it changes logging for good."""
    program = f"""
import django, logging
from django.conf import settings
{block("logging")}
settings.configure(LOGGING=LOGGING)
django.setup()
logging.getLogger("channels_rabbitmq.connection").info("a line")
logging.getLogger("channels_rabbitmq.connection").debug("not this one")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == "a line\n"


async def test_sync_code(default_layer: RabbitmqChannelLayer) -> None:
    channel = await default_layer.new_channel()
    await default_layer.group_add("chat", channel)
    # On a loop of its own, and on this one, as in a sync view.
    await in_thread("sync")
    await sync_to_async(run)("sync")
    for _ in range(2):
        assert await receive(default_layer, channel) == {"type": "chat.message", "text": "hi"}


async def test_which_loop_sync_code_uses(default_layer: RabbitmqChannelLayer) -> None:
    def new_id() -> str:
        channel: str = async_to_sync(default_layer.new_channel)()
        return channel.partition("!")[0]

    own_id = (await default_layer.new_channel()).partition("!")[0]
    assert await sync_to_async(new_id)() == own_id
    ids = [await asyncio.to_thread(new_id) for _ in range(2)]
    assert own_id not in ids
    assert ids[0] == ids[1]


async def test_sync_codes_channel(
    default_layer: RabbitmqChannelLayer, capsys: pytest.CaptureFixture[str]
) -> None:
    code = block("sync").partition("async_to_sync(get")[0] + block("sync-channel")
    await asyncio.to_thread(exec, code, {})
    said = code.rpartition("# ")[2]
    assert capsys.readouterr().out.strip() == said.strip()


async def test_normal_channels(
    open_layer: OpenLayer,
    open_from_settings: OpenFromSettings,
    broker: Broker,
    groups_exchange: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layer = await open_from_settings(run("normal-channels", (URL, broker.url)))
    monkeypatch.setitem(channel_layers.backends, "default", layer)
    await in_thread("normal-channels-use")
    said = block("normal-channels-use").rpartition("# ")[2]
    assert capsys.readouterr().out.strip() == said.strip()
    await asyncio.to_thread(async_to_sync(layer.close))
    await delete_queue(broker.url, queue_of(groups_exchange, "test_channel"))


async def test_lifespan(default_layer: RabbitmqChannelLayer) -> None:
    to_app = ApplicationCommunicator(run("lifespan")["application"], {"type": "lifespan"})
    await to_app.send_input({"type": "lifespan.startup"})
    assert await to_app.receive_output(10) == {"type": "lifespan.startup.complete"}
    await to_app.send_input({"type": "lifespan.shutdown"})
    assert await to_app.receive_output(10) == {"type": "lifespan.shutdown.complete"}
    with pytest.raises(BrokerUnavailable):
        await default_layer.connect()


def test_the_lifespan_apps_parameters() -> None:
    [said] = re.findall(r"``LifespanApp\((.*?)\)`` connects", TEXT)
    parameters = list(inspect.signature(LifespanApp).parameters.values())
    plain = (str(parameter.replace(annotation=parameter.empty)) for parameter in parameters)
    assert ", ".join(plain) == said.replace('"', "'")


async def test_statistics(default_layer: RabbitmqChannelLayer) -> None:
    metrics = run("statistics")["metrics"]
    assert metrics() == "[]"
    await must_work(default_layer)
    (one,) = json.loads(await asyncio.to_thread(metrics))
    assert (one["counters"]["consumed"], one["subscriber"]["state"]) == (2, "connected")


async def test_presence(default_layer: RabbitmqChannelLayer) -> None:
    consumer = run("presence")["RoomConsumer"]
    await default_layer.group_count("room", 10.0)  # From now on it knows all.
    clients = []
    here = []
    for name in ("Ada", "Bob"):
        client = WebsocketCommunicator(consumer.as_asgi(), "/")
        client.scope["url_route"] = {"kwargs": {"name": name}}
        assert await client.connect(10) == (True, None)
        clients.append(client)
        here.append(name)
        assert await client.receive_json_from(10) == {"here": here, "all": True}
    for client in clients:
        await client.disconnect()
    assert await default_layer.group_count("room", 10.0) == 0


async def test_what_operators_see(default_layer: RabbitmqChannelLayer, broker: Broker) -> None:
    if broker.private is None:
        pytest.skip("needs rabbitmqctl for the broker")
    await must_work(default_layer)
    shown = []
    for command, *words in commands("watch"):
        assert command == "rabbitmqctl"
        words = ["/" if word == "asgi" else word for word in words]
        shown.append(await asyncio.to_thread(broker.private.ctl, *words))
    id_ = default_layer.statistics()[0].id
    assert f"channels_rabbitmq subscriber {id_} " in shown[0]
    assert re.search(rf"^{re.escape(id_)}\t0\t0\t1$", shown[1], re.MULTILINE)
    assert "Alarms" in shown[2]


async def test_definitions(open_layer: OpenLayer, private_broker: PrivateBroker) -> None:
    """The export leaves out what is the layer's; what remains of others' goes, and of it only."""
    if shutil.which("jq") is None:
        pytest.skip("needs jq")
    layer = await open_layer(host=private_broker.url)
    await must_work(layer)
    everything, definitions = (f"{private_broker.folder}/{name}" for name in ("all", "without"))
    export, jq = block("export-definitions").split("\n", maxsplit=1)
    export, jq = (
        text.replace("/tmp/all.json", everything).replace("/tmp/definitions.json", definitions)
        for text in (export, jq)
    )
    await asyncio.to_thread(private_broker.ctl, *shlex.split(export)[1:])
    await asyncio.to_thread(subprocess.run, ["sh", "-c", jq], check=True)
    assert "crq." in Path(everything).read_text(encoding="utf-8")
    assert "crq." not in Path(definitions).read_text(encoding="utf-8")
    await asyncio.to_thread(private_broker.ctl, "import_definitions", definitions)

    # As if it were another process's, without a lease
    remains = Path(everything).read_text(encoding="utf-8")
    remains = remains.replace(layer.statistics()[0].id, "crq.aaaaaaaaaaaaaaaa")
    remains = json.dumps({**json.loads(remains), "queues": []})
    Path(everything).write_text(remains, encoding="utf-8")
    with contextlib.suppress(BrokerFailed):
        await asyncio.to_thread(private_broker.ctl, "import_definitions", everything)

    async def exchanges() -> list[str]:
        rows = await asyncio.to_thread(private_broker.list_exchanges, "name")
        return [row["name"] for row in rows if row["name"].startswith("crq.")]

    before = await exchanges()
    _, *words = shlex.split(block("delete-remains").replace("asgi", "/"))
    await asyncio.to_thread(private_broker.ctl, *words)
    own = [name for name in before if not name.startswith("crq.aaaaaaaaaaaaaaaa")]
    assert (len(before), len(own)) == (8, 4)
    assert sorted(await exchanges()) == sorted(own)
    rows = await asyncio.to_thread(private_broker.list_bindings, "destination_name")
    assert not [row for row in rows if "crq.aaaaaaaaaaaaaaaa" in row["destination_name"]]
    await must_work(layer)


async def test_hooks(
    open_layer: OpenLayer,
    open_from_settings: OpenFromSettings,
    broker: Broker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clients of a process whose connection was lost hear of it, and only these."""
    module = types.ModuleType("mysite.consumers")
    module.__dict__.update(run("hooks"))
    monkeypatch.setitem(sys.modules, "mysite", types.ModuleType("mysite"))
    monkeypatch.setitem(sys.modules, "mysite.consumers", module)
    layer = await open_from_settings(run("hooks-settings", (URL, broker.url)))
    # Those of another server process.
    other = await open_layer()
    clients = []
    for used in (layer, other):
        monkeypatch.setitem(channel_layers.backends, "default", used)
        client = WebsocketCommunicator(module.Dashboard.as_asgi(), "/")
        assert await client.connect(10) == (True, None)
        clients.append(client)
    monkeypatch.setitem(channel_layers.backends, "default", layer)
    for _ in range(2):
        await reconnect(layer)
        assert await clients[0].receive_json_from(10) == {"fetch": "everything"}
    assert await clients[1].receive_nothing(0.1)
    for client in clients:
        await client.disconnect()


async def test_carehare_connection(
    default_layer: RabbitmqChannelLayer, groups_exchange: str
) -> None:
    names = run("carehare", ('"jobs"', f'"jobs-of-{groups_exchange}"'), ("True", "False"))
    assert await default_layer.current_connection is await default_layer.carehare_connection
    done: asyncio.Queue[bytes] = asyncio.Queue()
    working = asyncio.create_task(names["work"](done.put))
    try:
        for job in (b"one", b"two"):
            await names["enqueue"](job)
            assert await asyncio.wait_for(done.get(), 10) == job
    finally:
        working.cancel()
        await asyncio.wait([working])


@pytest.mark.parametrize("program", ["kombu", "pika"])
async def test_other_programs(
    open_layer: OpenLayer, broker: Broker, groups_exchange: str, program: str
) -> None:
    layer = await open_layer()
    channel = await layer.new_channel()
    await layer.group_add("chat", channel)
    replacements = ((URL, broker.url), ('"groups"', repr(groups_exchange)))
    if program == "kombu":
        names = await asyncio.to_thread(run, "kombu", *replacements)
    else:
        names = await asyncio.to_thread(run, "pika", *replacements)
    assert await receive(layer, channel) == {"type": "chat.message", "text": f"from {program}"}
    await asyncio.to_thread(names["send_to_channel"], channel, {"type": "to.one"})
    assert await receive(layer, channel) == {"type": "to.one"}
    await asyncio.to_thread(names["send_to_group"], "chat", {"type": "to.all"})
    assert await receive(layer, channel) == {"type": "to.all"}
