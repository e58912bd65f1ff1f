"""One page's stay in one room.

Every page has a websocket and every websocket a ``ChatConsumer`` of its own, in whichever server
process took the connection. Consumers hear of each other by the room's group on the channel layer:

    chat.message     somebody said something
    chat.changed     somebody came, went, or has another name: look who is here

Who is here the channel layer knows: each consumer joins with its ``Person`` as the member's info,
and asks for all members every BEAT seconds, and when something has changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
from dataclasses import asdict, replace
from typing import Any

from channels.exceptions import ChannelFull
from channels.generic.websocket import AsyncJsonWebsocketConsumer

from channels_rabbitmq.exceptions import BrokerUnavailable
from chat.presence import Person, missing, people_in
from chat.rooms import group_of

logger = logging.getLogger(__name__)

BEAT = 2.0  # seconds between two looks at who is here
ROOM_TIMEOUT = 2.0  # seconds that the other processes may take to answer
MAX_NAME = 30  # characters
MAX_TEXT = 2000  # characters

# What a call to the channel layer may raise when all is well with our own code.
LayerError = (BrokerUnavailable, ChannelFull)


class ChatConsumer(AsyncJsonWebsocketConsumer):
    """Between a page (JSON over a websocket) and a room (a group of the channel layer).

    From the page: ``introduce`` (first of all, and again for a new name) and ``say``.
    To the page: ``welcome``, ``room`` (is it within reach? after every look), ``people``,
    ``joined``, ``left``, ``message`` and ``not_delivered``.
    """

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Run until the page is gone, then leave the room: however this ends."""
        self.stay: asyncio.Task[None] | None = None
        self.has_left = False
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.has_left = True
            if self.stay is not None:
                self.stay.cancel()
                await self.leave_room()

    # From the page

    async def connect(self) -> None:
        self.group = group_of(self.scope["url_route"]["kwargs"]["room"])
        self.me = Person(
            id=secrets.token_hex(8), name="", port=self.scope["server"][1], pid=os.getpid()
        )
        self.people: list[Person] = []  # as the page shows them
        self.room_is_up = False
        self.look_again = asyncio.Event()
        await self.accept()
        await self.send_json({"type": "welcome", "you": asdict(self.me)})

    @classmethod
    async def decode_json(cls, text_data: str) -> Any:
        try:
            return json.loads(text_data)
        except ValueError:
            return None  # as good as any other message that makes no sense

    async def receive_json(self, content: Any, **kwargs: Any) -> None:
        match content:
            case {"type": "introduce", "name": str(name)}:
                await self.introduce(name)
            case {"type": "say", "id": str(message_id), "text": str(text)}:
                await self.say(message_id[:MAX_NAME], text)
            case _:
                logger.warning("A page sent something that is no message of the chat")

    async def introduce(self, name: str) -> None:
        name = "".join(character for character in name if character.isprintable())
        self.me = replace(self.me, name=name.strip()[:MAX_NAME] or "Anonymous")
        if self.stay is None:
            self.stay = asyncio.create_task(self.stay_in_room())
        elif self.room_is_up:
            with contextlib.suppress(*LayerError):  # then the old name stays
                await self.join()

    async def say(self, message_id: str, text: str) -> None:
        if self.stay is None or not text.strip() or len(text) > MAX_TEXT:
            await self.show_not_delivered(message_id, "The server refused this message.")
            return
        try:
            await self.tell_room("chat.message", id=message_id, text=text)
        except LayerError as error:
            logger.warning("Not delivered: %s", error)
            await self.show_not_delivered(message_id, "The room is out of reach.")

    # To the room

    async def stay_in_room(self) -> None:
        """Join, then look who is here until cancelled.

        The look goes by RabbitMQ to all server processes, this one included. So it also shows
        whether the room is within reach. When it isn't (RabbitMQ restarts, say), the channel layer
        reconnects by itself: all there is to do here is to tell the page, and to try again.
        """
        is_member = False
        try:
            # Cancelling alone would not do: before Python 3.12, wait_for may swallow it.
            while not self.has_left:
                try:
                    if not is_member:
                        await self.join()
                        is_member = True
                    self.look_again.clear()
                    await self.look()
                except LayerError:
                    self.room_is_up = False
                await self.show_room()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(
                        self.look_again.wait(), BEAT if self.room_is_up else BEAT / 10
                    )
        except Exception:
            logger.exception("The stay in %s ended", self.group)
            await self.close()  # the page will come back

    async def join(self) -> None:
        """Become a member, or take another name."""
        await self.channel_layer.group_add(self.group, self.channel_name, info=asdict(self.me))
        await self.tell_room("chat.changed")

    async def look(self) -> None:
        """Ask who is here, and show it.

        After an outage the processes come back one by one, and those that aren't back yet miss what
        is said. So the room is within reach again when all have answered, or are known to be gone.
        """
        found = await self.channel_layer.group_members(self.group, timeout=ROOM_TIMEOUT)
        people = people_in(found)
        is_heard = self.is_among(people)
        self.room_is_up = is_heard and (self.room_is_up or found.is_complete)
        if self.room_is_up:
            await self.show_people(people)

    def is_among(self, people: list[Person]) -> bool:
        return any(person.id == self.me.id for person in people)

    async def leave_room(self) -> None:
        """Say good-bye, as far as that is possible."""
        await self.channel_layer.group_discard(self.group, self.channel_name)
        # Where this fails, the others find out at their next look.
        with contextlib.suppress(*LayerError, asyncio.TimeoutError):
            if self.room_is_up:
                await asyncio.wait_for(self.tell_room("chat.changed"), ROOM_TIMEOUT)

    async def tell_room(self, message_type: str, **content: Any) -> None:
        await self.channel_layer.group_send(
            self.group, {"type": message_type, "person": asdict(self.me), **content}
        )

    # From the room: Channels calls the method named like the message's type.

    async def chat_message(self, event: dict[str, Any]) -> None:
        await self.send_json({**event, "type": "message"})

    async def chat_changed(self, event: dict[str, Any]) -> None:
        self.look_again.set()

    # To the page

    async def show_room(self) -> None:
        await self.send_json({"type": "room", "up": self.room_is_up})

    async def show_people(self, people: list[Person]) -> None:
        if people == self.people:
            return
        before, self.people = self.people, people
        await self.send_json({"type": "people", "people": [asdict(person) for person in people]})
        if self.is_among(before):  # else it is we who came
            for person in missing(people, before):
                await self.send_json({"type": "joined", "person": asdict(person)})
        for person in missing(before, people):
            await self.send_json({"type": "left", "person": asdict(person)})

    async def show_not_delivered(self, message_id: str, reason: str) -> None:
        await self.send_json({"type": "not_delivered", "id": message_id, "reason": reason})
