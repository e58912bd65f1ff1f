"""The form of greetings, requests and answers, as messages of ``_codec``'s bodies.

``read`` takes whatever has arrived. It returns one of the types below or raises ``MalformedBody``.
It ignores unknown keys, so that later versions may add some.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from .._codec import LONGEST_INFO, MalformedBody, unpack_info
from .._identity import Place, id_of, is_id
from .._names import require_channel_name, require_group_name
from .statuses import plain

HELLO, HERE, ABSENT, BYE = "hello", "here", "absent", "bye"
MEMBERS, COUNT, ADD, DISCARD = "members", "count", "add", "discard"
FLUSH = "flush"
STATUS, HEARD = "status", "heard"
ANSWER = "answer"
_OF_GROUPS = (MEMBERS, COUNT, ADD, DISCARD)
_REQUESTS = (*_OF_GROUPS, FLUSH, STATUS, HEARD)

# Bytes, about, of one part of an answer that lists members.
PART_SIZE = 128 * 1024

# No question names more processes.
MOST_IDS = 100
_LARGEST_PID = 2**63 - 1
_LONGEST_HOST = 255

_T = TypeVar("_T")

# The process that has said it, and the number of its connection
Hello = tuple[str, int]
# A channel and its packed info
PackedMember = tuple[str, "bytes | None"]


class UnknownKind(MalformedBody):
    """A later version asks or tells something that this one doesn't know."""


@dataclass(frozen=True)
class Heard:
    """What one process knows of another one."""

    ago: float | None
    """Seconds since it has heard it; None if it knows it from others only."""
    place: Place | None

    def packed(self) -> list[Any]:
        return [self.ago, *(self.place or (0, ""))]


@dataclass(frozen=True)
class Greeting:
    """*hello*: I have just connected. *here*: the answer to that. *bye*: I end.

    *absent*: these processes have no queue now.
    """

    kind: str
    sender: str
    number: int = 0
    """With *hello*: the number of the sender's connection."""
    answered: tuple[Hello, ...] = ()
    """With *here*: the hellos that it answers."""
    known: tuple[str, ...] | None = None
    """With *here*: the processes that the sender knows; None if it may not know all yet."""
    absent: Mapping[str, float] = field(default_factory=dict)
    """With *here* and *absent*: for how many seconds each absent process has been so."""
    place: Place | None = None
    """With *hello* and *here*: where the sender runs."""

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"kind": self.kind, "from": self.sender}
        if self.kind == HELLO:
            message["number"] = self.number
        elif self.kind == HERE:
            message["answered"] = [list(hello) for hello in self.answered]
            message["known"] = None if self.known is None else list(self.known)
        if self.kind in (HERE, ABSENT):
            message["absent"] = dict(self.absent)
        if self.place is not None:
            message["place"] = list(self.place)
        return message


class Action(NamedTuple):
    """What other processes are asked to do.

    All are asked for the members of a group, for their count, to flush, how they are (*status*), or
    when they have heard other processes (*heard*). The process of a channel is asked to add it to a
    group or to discard it.
    """

    kind: str
    group: str = ""
    """Empty with *flush*, *status* and *heard*."""
    channel: str = ""
    """With *add* and *discard*."""
    info: bytes | None = None
    """With *add*: the packed info, if there is one."""
    ids: tuple[str, ...] = ()
    """With *heard*: of which processes."""


@dataclass(frozen=True)
class Request:
    """An action, and the process that asks for it. See ``Action`` for the other fields."""

    kind: str
    sender: str
    number: int
    timeout: float
    """Seconds that are left for the answer."""
    group: str = ""
    channel: str = ""
    info: bytes | None = None
    ids: tuple[str, ...] = ()

    def message(self) -> dict[str, Any]:
        message = {"kind": self.kind, "from": self.sender, "number": self.number}
        message |= {"timeout": self.timeout, "group": self.group}
        if self.channel:
            message |= {"channel": self.channel, "info": self.info}
        if self.ids:
            message["ids"] = list(self.ids)
        return message


@dataclass(frozen=True)
class Answer:
    """One part of an answer. The parts of one answer have the same ``series``."""

    sender: str
    number: int
    """The request's."""
    series: int = 0
    part: int = 0
    parts: int = 1
    count: int = 0
    members: tuple[PackedMember, ...] = ()
    error: str = ""
    """Why the action failed; empty if it didn't."""
    is_mistake: bool = False
    """With an error: True if the caller has made a mistake, False if the broker failed."""
    status: Mapping[str, Any] | None = None
    """To *status*: as ``statuses`` reads it."""
    heard: Mapping[str, Heard] = field(default_factory=dict)
    """To *heard*: by process. To *status*: of those that are lost."""

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"kind": ANSWER, "from": self.sender, "number": self.number}
        message |= {"series": self.series, "part": self.part, "parts": self.parts}
        message |= {"count": self.count, "members": [list(member) for member in self.members]}
        if self.error:
            message |= {"error": self.error, "mistake": self.is_mistake}
        if self.status is not None:
            message["status"] = self.status
        if self.heard:
            message["heard"] = {id_: heard.packed() for id_, heard in self.heard.items()}
        return message


def read(message: dict[str, Any]) -> Greeting | Request | Answer:
    """Return what a message says. The only exception is ``MalformedBody``."""
    kind, sender = _get(message, "kind", str), _get(message, "from", str)
    if not is_id(sender):
        raise MalformedBody("a request without a sender")
    if kind == HELLO:
        place = _read_place(message.get("place"))
        return Greeting(kind, sender, _get(message, "number", int), place=place)
    if kind == HERE:
        answered = tuple(_read_hello(hello) for hello in _get(message, "answered", list))
        known, absent = _read_known(message), _read_absent(message)
        place = _read_place(message.get("place"))
        return Greeting(kind, sender, answered=answered, known=known, absent=absent, place=place)
    if kind == ABSENT:
        return Greeting(kind, sender, absent=_read_absent(message))
    if kind == BYE:
        return Greeting(kind, sender)
    if kind in _REQUESTS:
        return _read_request(message, kind, sender)
    if kind == ANSWER:
        return _read_answer(message, sender)
    raise UnknownKind("a request of an unknown kind")


def _read_hello(hello: object) -> Hello:
    if isinstance(hello, list) and len(hello) == 2:
        id_, number = hello
        if isinstance(id_, str) and isinstance(number, int):
            return id_, number
    raise MalformedBody("a request with a wrong list of hellos")


def _read_known(message: dict[str, Any]) -> tuple[str, ...] | None:
    known = message.get("known")
    return None if known is None else _read_ids(known)


def _read_ids(ids: object) -> tuple[str, ...]:
    if not isinstance(ids, list) or not _are_ids(ids):
        raise MalformedBody("a request with a wrong list of processes")
    return tuple(ids)


def _are_ids(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) and is_id(value) for value in values)


def _read_place(place: object) -> Place | None:
    if place is None:
        return None
    if isinstance(place, list) and len(place) == 2:
        pid, host = place
        if type(pid) is int and 0 <= pid <= _LARGEST_PID and isinstance(host, str):
            return Place(pid, plain(host[:_LONGEST_HOST]))
    raise MalformedBody("a request with a wrong place")


def _read_absent(message: dict[str, Any]) -> dict[str, float]:
    absent = _get(message, "absent", dict)
    if not _are_ids(absent):
        raise MalformedBody("a request with a wrong list of processes")
    for age in absent.values():
        if not isinstance(age, (int, float)) or not 0 <= age < float("inf"):
            raise MalformedBody("a request with a wrong age")
    return absent


def _read_request(message: dict[str, Any], kind: str, sender: str) -> Request:
    info = _read_info(message.get("info"))
    timeout = message.get("timeout")
    if not isinstance(timeout, (int, float)) or not 0 <= timeout < float("inf"):
        raise MalformedBody("a request with a wrong timeout")
    group: Any = message.get("group")
    channel: Any = message.get("channel")
    try:
        if kind in _OF_GROUPS:
            require_group_name(group)
        if kind in (ADD, DISCARD):
            require_channel_name(channel)
    except TypeError:
        raise MalformedBody("a request with a wrong name") from None
    number = _get(message, "number", int)
    ids = _read_ids(message.get("ids", []))[:MOST_IDS]
    group = group if kind in _OF_GROUPS else ""
    return Request(kind, sender, number, timeout, group, channel or "", info, ids)


def _read_info(info: object) -> bytes | None:
    if info is None:
        return None
    if not isinstance(info, bytes) or len(info) > LONGEST_INFO:
        raise MalformedBody("a wrong info about a member")
    unpack_info(info)  # Otherwise other processes would get an info that they can't read.
    return info


def _read_answer(message: dict[str, Any], sender: str) -> Answer:
    part, parts = _get(message, "part", int), _get(message, "parts", int)
    count = _get(message, "count", int)
    if not 0 <= part < parts or count < 0:
        raise MalformedBody("an answer with wrong numbers")
    return Answer(
        sender,
        _get(message, "number", int),
        _get(message, "series", int),
        part,
        parts,
        count,
        tuple(_read_member(member, sender) for member in _get(message, "members", list)),
        _get(message, "error", str) if "error" in message else "",
        message.get("mistake") is True,
        _get(message, "status", dict) if "status" in message else None,
        _read_all_heard(message.get("heard", {})),
    )


def _read_all_heard(all_heard: object) -> dict[str, Heard]:
    if not isinstance(all_heard, dict) or not _are_ids(all_heard):
        raise MalformedBody("an answer with wrong processes")
    return {id_: _read_heard(heard) for id_, heard in all_heard.items()}


def _read_heard(heard: object) -> Heard:
    if isinstance(heard, list) and len(heard) == 3:
        ago, *place = heard
        if ago is None or (isinstance(ago, (int, float)) and 0 <= ago < float("inf")):
            return Heard(ago, _read_place(place) if place != [0, ""] else None)
    raise MalformedBody("an answer with wrong processes")


def _read_member(member: object, sender: str) -> PackedMember:
    # Only channels of the sender: so no member comes twice.
    if isinstance(member, list) and len(member) == 2:
        channel, info = member
        if isinstance(channel, str) and "!" in channel and id_of(channel) == sender:
            return channel, _read_info(info)
    raise MalformedBody("an answer with a wrong member")


def _get(message: dict[str, Any], key: str, kind: type[_T]) -> _T:
    value = message.get(key)
    if type(value) is not kind:
        raise MalformedBody(f"a request with a wrong value of {key!r}")
    return value


def split(members: Sequence[PackedMember], part_size: int) -> list[tuple[PackedMember, ...]]:
    """Return the members in parts, at least one, of about so many bytes each."""
    parts: list[tuple[PackedMember, ...]] = []
    part: list[PackedMember] = []
    size = 0
    for channel, info in members:
        if size >= part_size:
            parts.append(tuple(part))
            part, size = [], 0
        part.append((channel, info))
        size += len(channel) + len(info or b"") + 8  # of msgpack's headers
    return [*parts, tuple(part)]
