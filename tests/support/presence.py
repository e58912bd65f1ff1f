"""Processes whose channels join and leave a group, and an oracle for what others say of them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.presence import GroupMembers
from tests.support.changes import Changes

_ROOT = Path(__file__).parents[2]


@dataclass
class Step:
    """What happened to a channel, and when (``time.monotonic()``)."""

    kind: str
    at: float


@dataclass
class History:
    """One channel's life, as its own process tells it."""

    steps: list[Step] = field(default_factory=list)
    ends_at: float = float("inf")  # of its process: from then on it may be a member or not
    ended_at: float = float("inf")  # of its process: from then on it is none

    def must_be_in(self, asked_at: float, answered_at: float) -> bool:
        """Whether it was a member from before the question until after the answer."""
        last = [step for step in self.steps if step.at < answered_at][-1:]
        return (
            [step.kind for step in last] == ["joined"]
            and last[0].at < asked_at
            and answered_at < self.ends_at
        )

    def may_be_in(self, asked_at: float, answered_at: float) -> bool:
        """Whether it was a member, or about to be or not to be, at some moment in between."""
        if self.ended_at < asked_at:
            return False
        before = [step for step in self.steps if step.at < asked_at][-1:]
        meanwhile = [step for step in self.steps if asked_at <= step.at < answered_at]
        return any(step.kind != "left" for step in [*before, *meanwhile])


class MemberProcess:
    """A process of ``tests/programs/presence_member.py``. Its end is the test's to see to."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.id = ""
        self.histories: dict[str, History] = {}
        self._changes = Changes()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(
        cls, url: str, exchange: str, group: str, *, channels: int = 0, seed: int = 0
    ) -> MemberProcess:
        """Return it at once; ``joined`` waits until it has begun."""
        program = "tests.programs.presence_member"
        arguments = (url, exchange, group, str(channels), str(seed))
        return cls(
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", program, *arguments),
                cwd=_ROOT,
                stdout=asyncio.subprocess.PIPE,
            )
        )

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            # The last line of one that was killed may be half of one.
            kind, channel, at = [*line.decode().split(), "", ""][:3]
            with contextlib.suppress(ValueError):
                self._note(kind, channel, float(at))
            self._changes.notify()

    def _note(self, kind: str, name: str, at: float) -> None:
        if kind == "id":
            self.id = name
        elif kind == "closing":
            self._end_at(at)
        else:
            self.histories.setdefault(name, History()).steps.append(Step(kind, at))

    def _end_at(self, at: float) -> None:
        for history in self.histories.values():
            history.ends_at = min(history.ends_at, at)

    @property
    def channels(self) -> set[str]:
        """Those that it has made so far."""
        return set(self.histories)

    async def joined(self) -> str:
        """Wait until its first channel is a member; return that."""

        def first() -> str | None:
            steps = ((name, step) for name, one in self.histories.items() for step in one.steps)
            return next((name for name, step in steps if step.kind == "joined"), None)

        await self._changes.until(lambda: first() is not None, timeout=30)
        found = first()
        assert found is not None
        return found

    async def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it, and wait until it has."""
        at = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        await asyncio.wait_for(self.process.wait(), 30)
        ended_at = time.monotonic()
        await self._reader
        if number != signal.SIGTERM:
            self._end_at(at)
        for history in self.histories.values():
            history.ended_at = ended_at
            history.ends_at = min(history.ends_at, ended_at)

    def stop(self) -> None:
        """Hold it, without its knowing."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@dataclass(frozen=True)
class Asked:
    """One result, and when it was asked for and given (``time.monotonic()``)."""

    timeout: float
    asked_at: float
    answered_at: float
    result: GroupMembers

    @property
    def channels(self) -> set[str]:
        found = [member.channel for member in self.result.members]
        assert len(found) == len(set(found)), "a member comes twice"
        return set(found)

    @property
    def took(self) -> float:
        return self.answered_at - self.asked_at


async def ask(layer: RabbitmqChannelLayer, group: str, timeout: float = 1.0) -> Asked:
    """Ask once."""
    asked_at = time.monotonic()
    result = await layer.group_members(group, timeout)
    return Asked(timeout, asked_at, time.monotonic(), result)


class Oracle:
    """Says what is wrong with results, once all histories are known."""

    def __init__(self, histories: dict[str, History]) -> None:
        self._histories = histories

    def lacking(self, asked: Asked) -> set[str]:
        """Return the members that a complete result lacks."""
        if not asked.result.is_complete:
            return set()
        members = {
            name
            for name, history in self._histories.items()
            if history.must_be_in(asked.asked_at, asked.answered_at)
        }
        return members - asked.channels

    def wrong(self, asked: Asked) -> set[str]:
        """Return the channels in any result that were no members."""
        return {
            name
            for name in asked.channels
            if name not in self._histories
            or not self._histories[name].may_be_in(asked.asked_at, asked.answered_at)
        }
