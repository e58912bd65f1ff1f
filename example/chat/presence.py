"""Who is in a room, by what the channel layer's processes answer.

Nobody keeps a list of who is where: each look asks all server processes. So a process may die at
any moment without leaving ghosts behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from channels_rabbitmq.presence import GroupMembers


@dataclass(frozen=True)
class Person:
    """One open page. Somebody with two pages is in the room twice."""

    id: str
    name: str
    port: int  # the server process that serves the page
    pid: int


def people_in(found: GroupMembers) -> list[Person]:
    """Return the people in a room, by name; each member's info describes a ``Person``."""
    people = [Person(**member.info) for member in found.members if member.info is not None]
    return sorted(people, key=lambda person: (person.name.lower(), person.id))


def missing(people: Iterable[Person], from_others: Iterable[Person]) -> list[Person]:
    """Return the people whose page isn't among the others. (A new name makes nobody new.)"""
    ids = {person.id for person in from_others}
    return [person for person in people if person.id not in ids]
