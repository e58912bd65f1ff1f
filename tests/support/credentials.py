"""What clients log in with."""

from __future__ import annotations

from pamqp import commands

from tests.support.amqp_peer import (
    START,
    Client,
    connected,
    scripted_broker,
    tune,
)


async def credentials(url: str, *, host: str = "127.0.0.1") -> str | None:
    """What a client with this URL logs in with; also tells that it reached the server."""
    heard: list[str] = []

    async def listen(client: Client) -> None:
        client.say(START)
        heard.append((await client.hear(commands.Connection.StartOk)).response)
        client.say(tune())
        await client.hear(commands.Connection.Open)
        client.say(commands.Connection.OpenOk())
        await client.hear(commands.Connection.Close)
        client.say(commands.Connection.CloseOk())

    async with (
        scripted_broker(listen, host=host) as server,
        connected(url.replace("PORT", str(server.port))),
    ):
        pass
    return heard[0] if heard else None
