"""Who is in a room, as far as one connection has heard."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Person:
    """One open page. Somebody with two pages is in the room twice."""

    id: str
    name: str
    port: int  # the server process that serves the page
    pid: int


class Roster:
    """People by their signs of life; who gives none for ``patience`` seconds is gone.

    Nobody keeps a list of who is where. So a server process may die at any moment without
    leaving ghosts behind for longer than that.
    """

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience = patience
        self._clock = clock
        self._people: dict[str, Person] = {}
        self._last_heard: dict[str, float] = {}
        self._missing: set[str] = set()  # not heard since we started over

    def hear(self, person: Person) -> bool:
        """Note a sign of life. True if it tells something new."""
        is_news = self._people.get(person.id) != person
        self._people[person.id] = person
        self._last_heard[person.id] = self._clock()
        self._missing.discard(person.id)
        return is_news

    def remove(self, person_id: str) -> Person | None:
        self._last_heard.pop(person_id, None)
        self._missing.discard(person_id)
        return self._people.pop(person_id, None)

    def remove_silent(self) -> list[Person]:
        """Remove and return those whose signs of life have ended."""
        limit = self._clock() - self._patience
        silent = [person_id for person_id, heard in self._last_heard.items() if heard < limit]
        return [person for person_id in silent if (person := self.remove(person_id))]

    def start_over(self) -> None:
        """Be patient with everybody again: it was we who couldn't hear."""
        self._last_heard = dict.fromkeys(self._people, self._clock())
        self._missing = set(self._people)

    @property
    def is_complete(self) -> bool:
        """Has everybody been heard, or given up, since we started over?"""
        return not self._missing

    def people(self) -> list[Person]:
        return sorted(self._people.values(), key=lambda person: (person.name.lower(), person.id))
