"""One page's stay in one room.

Every page has a websocket and every websocket a ``ChatConsumer`` of its own, in whichever server
process took the connection. Consumers know nothing of each other: all they hear comes from the
room's group on the channel layer.

    chat.message     somebody said something
    chat.joined      somebody came
    chat.left        somebody went
    chat.here        a sign of life, every BEAT seconds from everyone
    chat.roll_call   somebody asks who is here; answered by a chat.here to that channel only

Signs of life make n * n deliveries per BEAT for n people: right for a room, wrong for a stadium.
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
from chat.presence import Person, Roster
from chat.rooms import group_of

logger = logging.getLogger(__name__)

BEAT = 2.0  # seconds between two signs of life
ROOM_TIMEOUT = 2.0  # seconds after which a sign of life that didn't come back is lost
MAX_NAME = 30  # characters
MAX_TEXT = 2000  # characters

# What a call to the channel layer may raise when all is well with our own code.
LayerError = (BrokerUnavailable, ChannelFull)


class ChatConsumer(AsyncJsonWebsocketConsumer):
    """Between a page (JSON over a websocket) and a room (a group of the channel layer).

    From the page: ``introduce`` (first of all, and again for a new name) and ``say``.
    To the page: ``welcome``, ``room`` (is it within reach? after every sign of life), ``people``,
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
        self.roster = Roster(patience=3 * BEAT + ROOM_TIMEOUT)
        self.is_member = False
        self.can_hear = False
        self.room_is_up = False
        self.heard_myself = asyncio.Event()
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
        elif self.can_hear:
            with contextlib.suppress(*LayerError):  # the next sign of life says the same
                await self.tell_room("chat.here")

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
        """Join, then give signs of life until cancelled.

        The sign goes through the room like any message. So the others learn that this person is
        still here; and hearing it oneself proves that the room is within reach. When it isn't
        (RabbitMQ restarts, say), the channel layer reconnects by itself: all there is to do here
        is to tell the page, and to try again.

        The processes come back one by one, and who isn't back yet misses what is said. So the room
        counts as within reach when everybody who was here has been heard again (who can be heard
        can hear: group_send waits for the sender's own group) or has been silent for too long.
        """
        try:
            # Cancelling alone would not do: before Python 3.12, wait_for may swallow it.
            while not self.has_left:
                try:
                    await asyncio.wait_for(self.give_sign_of_life(), ROOM_TIMEOUT)
                except (*LayerError, asyncio.TimeoutError):
                    self.can_hear = False
                else:
                    self.can_hear = True
                    await self.miss_the_silent()
                await self.show_room()
                await asyncio.sleep(BEAT if self.can_hear else BEAT / 10)
        except Exception:
            logger.exception("The stay in %s ended", self.group)
            await self.close()  # the page will come back

    async def give_sign_of_life(self) -> None:
        """Say that one is here and wait to hear it."""
        if not self.is_member:
            await self.channel_layer.group_add(self.group, self.channel_name)
            self.is_member = True
            await self.tell_room("chat.joined")
        if not self.can_hear:
            # New here, or deaf until now: whoever came and went meanwhile, we missed it.
            self.roster.start_over()
            await self.tell_room("chat.roll_call", reply_channel=self.channel_name)
        self.heard_myself.clear()
        await self.tell_room("chat.here")
        await self.heard_myself.wait()

    async def leave_room(self) -> None:
        """Say good-bye, as far as that is possible."""
        await self.channel_layer.group_discard(self.group, self.channel_name)
        # Where this fails, the others will notice by the missing signs of life.
        with contextlib.suppress(*LayerError, asyncio.TimeoutError):
            if self.can_hear:
                await asyncio.wait_for(self.tell_room("chat.left"), ROOM_TIMEOUT)

    async def tell_room(self, message_type: str, **content: Any) -> None:
        await self.channel_layer.group_send(
            self.group, {"type": message_type, "person": asdict(self.me), **content}
        )

    # From the room: Channels calls the method named like the message's type.

    async def chat_message(self, event: dict[str, Any]) -> None:
        await self.send_json({**event, "type": "message"})

    async def chat_joined(self, event: dict[str, Any]) -> None:
        await self.chat_here(event)
        await self.send_json({**event, "type": "joined"})

    async def chat_left(self, event: dict[str, Any]) -> None:
        if self.roster.remove(event["person"]["id"]):
            await self.send_json({**event, "type": "left"})
            await self.show_people()

    async def chat_here(self, event: dict[str, Any]) -> None:
        person = Person(**event["person"])
        if person.id == self.me.id:
            self.heard_myself.set()
        if self.roster.hear(person):
            await self.show_people()
        if not self.room_is_up:
            await self.show_room()  # this may have been the last one missing

    async def chat_roll_call(self, event: dict[str, Any]) -> None:
        with contextlib.suppress(*LayerError):
            await self.channel_layer.send(
                event["reply_channel"], {"type": "chat.here", "person": asdict(self.me)}
            )

    # To the page

    async def miss_the_silent(self) -> None:
        silent = self.roster.remove_silent()
        for person in silent:
            await self.send_json({"type": "left", "person": asdict(person)})
        if silent:
            await self.show_people()

    async def show_room(self) -> None:
        self.room_is_up = self.can_hear and self.roster.is_complete
        await self.send_json({"type": "room", "up": self.room_is_up})

    async def show_people(self) -> None:
        people = [asdict(person) for person in self.roster.people()]
        await self.send_json({"type": "people", "people": people})

    async def show_not_delivered(self, message_id: str, reason: str) -> None:
        await self.send_json({"type": "not_delivered", "id": message_id, "reason": reason})
